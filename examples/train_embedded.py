"""Train the embedded model and its draft on the source text of Python's standard library.

    python examples/train_embedded.py                      # everything, into aidx/data (GPU)
    python examples/train_embedded.py --stage prepare      # tokenizer and tokens only (CPU)
    python examples/train_embedded.py --stage train --epochs 20 --deadline 90 --out DIR

`aidx.train` does the training: `make_train_step` makes a pure function of (state, batch), `fit`
calls it.  The corpus is on the device as one uint16 array, and a step's crops and dropout come from
its own key, so a run is a function of its seed (unless its deadline hastens it).  The draft is
distilled from the model that it will draft for; its programs compile while the model trains.

Matrices are updated by Muon (Jordan et al., 2024) scaled to Adam's RMS (Liu et al., 2025), the
rest by Adam.  The corpus is passed many times, so weight decay is heavy and what a layer adds is
dropped at random.  Dropout needs no help from the model: `forward` lets every layer be wrapped.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from optax.contrib import MuonDimensionNumbers, muon
from stdlib_corpus import END_OF_TEXT, prepare

from aidx.cache import no_cache_attend
from aidx.models import (
    LlamaConfig,
    Model,
    Tokenizer,
    bind_forward,
    init_params,
    num_params,
    save_model,
    stack_layers,
    unstack_layers,
)
from aidx.train import (
    Callback,
    TrainState,
    device_crops,
    fit,
    init_state,
    make_evaluate,
    make_train_step,
    next_token_batch,
    train_flops_per_token,
)

HEAD_DIM, CONTEXT, VOCAB = 64, 2048, 4096
MODEL = LlamaConfig(VOCAB, 256, 768, 6, 4, 2, HEAD_DIM, max_position_embeddings=CONTEXT, tied=True)
DRAFT = LlamaConfig(VOCAB, 80, 192, 3, 2, 1, HEAD_DIM, max_position_embeddings=CONTEXT, tied=True)
TINY = LlamaConfig(VOCAB, 32, 64, 2, 2, 1, HEAD_DIM, max_position_embeddings=64, tied=True)
WARMUP = 100  # steps of rising learning rate
EVALUATIONS = 16
EVAL_ROWS = 8  # windows of a batch of the evaluation

# The standard library is full of interactive sessions; a chat with the model is one.
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '>>> ' + m.content + '\n' }}"
    "{% else %}{{ m.content + '\n' }}{% endif %}{% endfor %}"
)
TOKENIZER_CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": CONTEXT,
    "bos_token": END_OF_TEXT,
    "eos_token": END_OF_TEXT,
    "clean_up_tokenization_spaces": False,
}
GENERATION_CONFIG = {
    "bos_token_id": 0,
    "eos_token_id": 0,
    "do_sample": True,
    "temperature": 0.7,
    "top_p": 0.95,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run is, beside its data.  After `deadline` seconds of training the rate is zero."""

    epochs: float = 13.0
    deadline: float = 600.0
    batch: int = 32
    learning_rate: float = 6e-3
    weight_decay: float = 0.3
    dropout: float = 0.1
    distill: float = 0.0
    seed: int = 0


def dropping(key: jax.Array, rate: float) -> Callable:
    """A wrapper of layers: `x + drop(layer(x) - x)`, each feature dropped with probability rate."""
    layers = itertools.count()

    def wrap(layer):
        own = jax.random.fold_in(key, next(layers))

        def dropped(x, cache, params):
            y, cache = layer(x, cache, params)
            keep = jax.random.bernoulli(own, 1 - rate, x.shape)
            return x + jnp.where(keep, (y - x) / (1 - rate), 0).astype(x.dtype), cache

        return dropped

    return wrap


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon on the layers' matrices, Adam on embeddings and norms, at learning rate one."""

    def dimensions(params):
        def of(path, x):  # layers [L, in, *heads, out]: every [in, out] by itself
            if path[0].key != "layers" or x.ndim < 3:
                return None
            return MuonDimensionNumbers(reduction_axis=1, output_axis=x.ndim - 1)

        return jax.tree_util.tree_map_with_path(of, params)

    return muon(
        1.0,
        weight_decay=recipe.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dimensions,
    )


def schedule(step: jax.Array, progress: jax.Array) -> jax.Array:
    """Warm up, hold, and over the last 60% fall linearly to zero (WSD, Hu et al., 2024)."""
    fall = jnp.clip((1 - progress) / 0.6, 0.0, 1.0)
    return jnp.minimum(fall, (step + 1) / WARMUP)


def annealed(recipe: Recipe) -> optax.GradientTransformation:
    """Scale updates by the schedule of (steps so far, progress); the batch tells the progress."""

    def update(updates, step, params=None, *, progress):
        rate = recipe.learning_rate * schedule(step, progress)
        return jax.tree.map(lambda u: rate * u, updates), step + 1

    return optax.GradientTransformationExtraArgs(lambda params: jnp.zeros((), jnp.int32), update)


def logits_of(config: LlamaConfig, params: Any, window: jax.Array, wrap: Any = None) -> jax.Array:
    """Forward over all tokens of `window` but the last: f32 logits `[B, T, V]`.

    The unembedding gives the parameters' dtype, so that its gradient is a matmul in it too.
    """
    tokens = window[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    params, attend = unstack_layers(params), no_cache_attend()
    forward = bind_forward(config)
    hidden, _ = forward(params, tokens, positions, attend, None, hidden=True, remat=wrap)
    return jnp.einsum("btd,vd->btv", hidden, params["embed"]).astype(jnp.float32)


def losses(logits: jax.Array, targets: jax.Array, teacher: jax.Array | None):
    """Cross-entropy in nats a token, and KL(teacher || student) (0 without a teacher)."""
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1).mean()
    if teacher is None:
        return nll, jnp.zeros(())
    log_t = jax.nn.log_softmax(teacher)
    return nll, (jnp.exp(log_t) * (log_t - log_p)).sum(-1).mean()


def half(tree: Any) -> Any:
    """A tree of f32 arrays in bf16."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)


def make_loss(config: LlamaConfig, recipe: Recipe, teacher: LlamaConfig | None) -> Callable:
    """The loss of random crops of `tokens`; with a teacher, partly of its distributions."""

    def loss_fn(params, batch, key, tokens, teacher_params):
        del batch  # it tells the optimiser how far the run has come
        crop_key, drop_key = jax.random.split(key)
        length = config.max_position_embeddings
        window = device_crops(tokens, crop_key, recipe.batch, length)
        target = None if teacher is None else logits_of(teacher, half(teacher_params), window)
        wrap = dropping(drop_key, recipe.dropout) if recipe.dropout else None
        nll, kl = losses(logits_of(config, params, window, wrap), window[:, 1:], target)
        n = recipe.batch * length
        return n * ((1 - recipe.distill) * nll + recipe.distill * kl), n, {"nll": n * nll}

    return loss_fn


def make_eval_loss(config: LlamaConfig, teacher: LlamaConfig | None) -> Callable:
    """The cross-entropy of held-out windows, and the share of the teacher's best tokens."""

    def loss_fn(params, window, key, teacher_params):
        del key
        batch = next_token_batch(window)
        live = batch["targets"] >= 0
        logits = logits_of(config, params, window)
        log_p = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(log_p, batch["targets"].clip(0)[..., None], axis=-1)[..., 0]
        total, weight = (nll * live).sum(), live.sum()
        if teacher is None:
            return total, weight
        best = logits_of(teacher, half(teacher_params), window).argmax(-1)
        return total, weight, {"agreement": ((best == logits.argmax(-1)) & live).sum()}

    return loss_fn


def heldout_windows(tokens: np.ndarray, context: int) -> list[np.ndarray]:
    """The held-out stream as adjacent windows of context + 1 tokens, in batches; -1 fills up."""
    count = (tokens.size - 1) // context
    cut = [tokens[i * context : (i + 1) * context + 1].astype(np.int32) for i in range(count)]
    cut += [np.full(context + 1, -1, np.int32)] * (-count % EVAL_ROWS)
    return [np.stack(cut[i : i + EVAL_ROWS]) for i in range(0, len(cut), EVAL_ROWS)]


@dataclasses.dataclass(frozen=True)
class Data:
    """The corpus."""

    tokens: jax.Array  # [n] u16, the training stream, on the device
    windows: list[np.ndarray]  # [EVAL_ROWS, context + 1] i32 each, the held-out stream
    meta: dict

    @classmethod
    def load(cls, folder: pathlib.Path, context: int) -> "Data":
        """What `stdlib_corpus.prepare` wrote."""
        read = lambda part: np.fromfile(folder / f"{part}.bin", np.uint16)
        meta = json.loads((folder / "corpus.json").read_text())
        return cls(jnp.asarray(read("train")), heldout_windows(read("heldout"), context), meta)

    @property
    def bits_per_byte(self) -> float:
        """What a nat per held-out token is."""
        return self.meta["heldout"]["tokens"] / self.meta["heldout"]["bytes"] / math.log(2)


@dataclasses.dataclass(frozen=True)
class Run:
    """A compiled run, before its first step."""

    config: LlamaConfig
    recipe: Recipe
    teacher: LlamaConfig | None
    state: TrainState
    step: Callable


def compile_run(
    config: LlamaConfig, recipe: Recipe, data: Data, teacher: LlamaConfig | None = None
) -> Run:
    """Initialise the state and compile the step."""
    transform = optax.chain(optimizer(recipe), annealed(recipe))
    key = jax.random.key(recipe.seed)
    state = init_state(stack_layers(init_params(config, key)), transform, key)
    step = make_train_step(
        make_loss(config, recipe, teacher),
        transform,
        clip_norm=1.0,
        compute_dtype=jnp.bfloat16,
        update_args=lambda batch: batch,
    )
    theirs = teacher and jax.eval_shape(lambda: stack_layers(init_params(teacher, key)))
    batch = {"progress": np.float32(0)}
    compiled = step.lower(state, batch, data.tokens, theirs).compile()
    return Run(config, recipe, teacher, state, compiled)


class Progress(Callback):
    """How far a run has come, by steps and by its deadline; keeps the best parameters."""

    def __init__(self, run: Run, data: Data):
        self.recipe, self.data = run.recipe, data
        self.per_step = run.recipe.batch * run.config.max_position_embeddings
        self.total = max(2, round(run.recipe.epochs * data.tokens.size / self.per_step))
        self.begun, self.best, self.kept, self.report = 0.0, math.inf, None, {}
        self.train_nll = math.nan

    def elapsed(self) -> float:
        self.begun = self.begun or time.perf_counter()
        return time.perf_counter() - self.begun

    def batch(self, step: int) -> dict[str, np.float32]:
        return {
            "progress": np.float32(max(step / self.total, self.elapsed() / self.recipe.deadline))
        }

    def on_step(self, step: int, metrics: dict[str, float]) -> bool:
        self.train_nll = metrics["nll"]
        return self.elapsed() >= self.recipe.deadline

    def keep_best(self, evaluate: Callable) -> Callable:
        """An evaluation that prints, and copies what is best: the next step donates the state."""

        def assess(state: TrainState) -> dict[str, float]:
            found, steps = evaluate(state), int(state.step)
            figures = {
                "steps": steps,
                "seconds": round(self.elapsed(), 1),
                "epochs": round(steps * self.per_step / self.data.tokens.size, 2),
                "train_nll": round(self.train_nll, 4),
                "heldout_nll": round(found["loss"], 4),
                "heldout_bits_per_byte": round(found["loss"] * self.data.bits_per_byte, 4),
            }
            if "agreement" in found:
                figures["agreement_with_teacher"] = round(found["agreement"], 4)
            print(" ".join(f"{k} {v}" for k, v in figures.items()), flush=True)
            if found["loss"] < self.best:
                self.best, self.report = found["loss"], figures
                self.kept = jax.tree.map(jnp.copy, state.params)
            return found

        return assess


def train(
    run: Run, data: Data, teacher: Model | None = None, log: pathlib.Path | None = None
) -> tuple[Any, dict]:
    """Train one model; its f32 parameters at the best evaluation, and how it went."""
    progress = Progress(run, data)
    theirs = teacher and stack_layers(teacher.params)
    evaluate = make_evaluate(
        make_eval_loss(run.config, run.teacher),
        data.windows,
        rest=(theirs,),
        compute_dtype=jnp.bfloat16,
    )
    with contextlib.ExitStack() as stack:
        callbacks: list[Any] = [progress]
        if log is not None:
            from aidx.telemetry.tensorboard import SummaryWriter, TensorBoardCallback

            writer = stack.enter_context(SummaryWriter(log, max_queue=1000))
            callbacks.append(TensorBoardCallback(writer, scalars_every=10, histograms_every=500))
        fit(
            run.step,
            run.state,
            progress.batch,
            steps=progress.total,
            rest=(data.tokens, theirs),
            evaluate=progress.keep_best(evaluate),
            eval_every=max(1, progress.total // EVALUATIONS),
            callbacks=callbacks,
            prefetch_depth=1,  # progress is read off the clock
            flops_per_token=train_flops_per_token(run.config, run.config.max_position_embeddings),
        )
    report = {"parameters": num_params(run.config), **progress.report}
    report |= {"planned_steps": progress.total, "recipe": dataclasses.asdict(run.recipe)}
    return unstack_layers(progress.kept), report | data.meta


def save(path: pathlib.Path, model: Model, report: dict, data: pathlib.Path) -> None:
    """Write a checkpoint in Hugging Face layout, with bf16 weights and how it came to be."""
    backend = tokenizers.Tokenizer.from_file(str(data / "tokenizer.json"))
    model = model.replace(
        params=jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params),
        tokenizer=Tokenizer(backend, TOKENIZER_CONFIG, {"default": CHAT_TEMPLATE}),
        generation_config=GENERATION_CONFIG,
        eos_token_ids=(0,),
        bos_token_id=0,
    )
    save_model(model, path)
    (path / "training.json").write_text(json.dumps(report, indent=1) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Prepare and train, as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default, root = Recipe(), pathlib.Path(__file__).resolve().parent.parent
    add = parser.add_argument
    add("--stage", choices=("all", "prepare", "train"), default="all")
    add("--data", type=pathlib.Path, default=root / ".data", help="tokenizer and tokens")
    add("--out", type=pathlib.Path, default=root / "aidx" / "data", help="where models go")
    add("--epochs", type=float, default=default.epochs, help="of the model")
    add("--deadline", type=float, default=default.deadline, help="seconds, of the model")
    add("--draft-epochs", type=float, default=13.0)
    add("--draft-deadline", type=float, default=600.0)
    add("--batch", type=int, default=default.batch)
    add("--learning-rate", type=float, default=default.learning_rate)
    add("--weight-decay", type=float, default=default.weight_decay)
    add("--dropout", type=float, default=default.dropout)
    add("--seed", type=int, default=default.seed)
    add("--log", type=pathlib.Path, help="folder for TensorBoard")
    add("--tiny", action="store_true", help="a model of nothing, to try the script on a CPU")
    args = parser.parse_args(argv)

    if args.stage != "train":
        print(json.dumps(prepare(args.data)))
    if args.stage == "prepare":
        return
    fields = {f.name for f in dataclasses.fields(Recipe)} & set(vars(args))
    recipe = Recipe(**{name: getattr(args, name) for name in fields})
    drafting = dataclasses.replace(
        recipe,
        epochs=args.draft_epochs,
        deadline=args.draft_deadline,
        dropout=0.0,
        weight_decay=0.1,
        distill=0.7,
    )
    config, draft_config = (TINY, TINY) if args.tiny else (MODEL, DRAFT)
    data = Data.load(args.data, config.max_position_embeddings)
    with concurrent.futures.ThreadPoolExecutor(1) as beside:
        run = compile_run(config, recipe, data)
        draft_run = beside.submit(compile_run, draft_config, drafting, data, config)
        log = lambda name: None if args.log is None else args.log / name
        params, report = train(run, data, log=log("embedded"))
        model = Model(config, params)
        save(args.out / "embedded", model, report, args.data)
        params, report = train(draft_run.result(), data, model, log=log("draft"))
        save(args.out / "embedded-draft", Model(draft_config, params), report, args.data)


if __name__ == "__main__":
    main()
