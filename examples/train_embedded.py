"""Train the embedded model and its draft on the source text of Python's standard library.

    python examples/train_embedded.py                      # everything, into aidx/data (GPU)
    python examples/train_embedded.py --stage prepare      # tokenizer and tokens only (CPU)
    python examples/train_embedded.py --stage train --epochs 20 --deadline 90 --out DIR

Training is `train_step`, a pure function of (state, tokens, progress), donated, with the corpus on
the device as one uint16 array.  Crops and dropout come from `fold_in(key, step)`, so a run is a
function of its seed (unless its deadline hastens it).  The draft is distilled from the model that
it will draft for; its programs compile while the model trains.

Matrices are updated by Muon (Jordan et al., 2024) scaled to Adam's RMS (Liu et al., 2025), the
rest by Adam.  The corpus is passed many times, so weight decay is heavy and what a layer adds is
dropped at random.  Dropout needs no help from the model: `forward` lets every layer be wrapped.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from optax.contrib import MuonDimensionNumbers, muon
from stdlib_corpus import END_OF_TEXT, prepare

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

HEAD_DIM, CONTEXT, VOCAB = 64, 2048, 4096
MODEL = LlamaConfig(VOCAB, 256, 768, 6, 4, 2, HEAD_DIM, max_position_embeddings=CONTEXT, tied=True)
DRAFT = LlamaConfig(VOCAB, 80, 192, 3, 2, 1, HEAD_DIM, max_position_embeddings=CONTEXT, tied=True)
TINY = LlamaConfig(VOCAB, 32, 64, 2, 2, 1, HEAD_DIM, max_position_embeddings=64, tied=True)
WARMUP = 100  # steps of rising learning rate
EVALUATIONS = 16

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


@flax.struct.dataclass
class TrainState:
    """What a step needs and leaves; the f32 master weights have their layers stacked."""

    params: Any
    opt_state: Any
    step: jax.Array  # [] i32


def causal_attend(cache, layer, q, k, v, *, window=None, scale=None, soft_cap=None, sinks=None):
    """An `Attend` for training: causal, without a cache, through cuDNN on a GPU."""
    if window is not None or soft_cap is not None or sinks is not None:
        raise NotImplementedError(f"{window=} {soft_cap=} {sinks=}: plain causal attention")
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    out = jax.nn.dot_product_attention(
        q, k, v, is_causal=True, scale=scale, implementation=implementation
    )
    return out, cache


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

    return optax.chain(
        optax.clip_by_global_norm(1.0),
        muon(
            1.0,
            weight_decay=recipe.weight_decay,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=dimensions,
        ),
    )


def schedule(step: jax.Array, progress: jax.Array) -> jax.Array:
    """Warm up, hold, and over the last 60% fall linearly to zero (WSD, Hu et al., 2024)."""
    fall = jnp.clip((1 - progress) / 0.6, 0.0, 1.0)
    return jnp.minimum(fall, (step + 1) / WARMUP)


def crops(tokens: jax.Array, key: jax.Array, batch: int, context: int) -> jax.Array:
    """`batch` random windows of context + 1 tokens, i32."""
    starts = jax.random.randint(key, (batch,), 0, tokens.shape[0] - context, dtype=jnp.int32)
    window = lambda start: jax.lax.dynamic_slice(tokens, (start,), (context + 1,))
    return jax.vmap(window)(starts).astype(jnp.int32)


def logits_of(config: LlamaConfig, params: Any, window: jax.Array, wrap: Any = None) -> jax.Array:
    """bf16 forward over all tokens of `window` but the last: f32 logits `[B, T, V]`.

    The unembedding gives bf16, so that its gradient is a bf16 matmul too.
    """
    tokens = window[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), unstack_layers(params))
    forward = bind_forward(config)
    hidden, _ = forward(half, tokens, positions, causal_attend, None, hidden=True, remat=wrap)
    return jnp.einsum("btd,vd->btv", hidden, half["embed"]).astype(jnp.float32)


def losses(logits: jax.Array, targets: jax.Array, teacher: jax.Array | None):
    """Cross-entropy in nats a token, and KL(teacher || student) (0 without a teacher)."""
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1).mean()
    if teacher is None:
        return nll, jnp.zeros(())
    log_t = jax.nn.log_softmax(teacher)
    return nll, (jnp.exp(log_t) * (log_t - log_p)).sum(-1).mean()


def make_train_step(config: LlamaConfig, recipe: Recipe, teacher: LlamaConfig | None = None):
    """`train_step(state, teacher_params, tokens, progress) -> (state, nll)`; state is donated."""
    transform = optimizer(recipe)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, teacher_params: Any, tokens: jax.Array, progress: jax.Array):
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
        crop_key, drop_key = jax.random.split(key)
        window = crops(tokens, crop_key, recipe.batch, config.max_position_embeddings)
        target = None if teacher is None else logits_of(teacher, teacher_params, window)

        def loss(params):
            wrap = dropping(drop_key, recipe.dropout) if recipe.dropout else None
            nll, kl = losses(logits_of(config, params, window, wrap), window[:, 1:], target)
            return (1 - recipe.distill) * nll + recipe.distill * kl, nll

        grads, nll = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        rate = recipe.learning_rate * schedule(state.step, progress)
        params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
        return TrainState(params, opt_state, state.step + 1), nll

    return train_step


def make_evaluate(config: LlamaConfig, other: LlamaConfig | None = None) -> Callable:
    """`evaluate(params, other_params, windows) -> (nll a token, share of equal argmax)`."""

    @jax.jit
    def evaluate(params, other_params, windows):
        def one(window):
            logits = logits_of(config, params, window[None])
            nll, _ = losses(logits, window[None, 1:], None)
            if other is None:
                return nll, jnp.ones(())
            theirs = logits_of(other, other_params, window[None])
            return nll, (theirs.argmax(-1) == logits.argmax(-1)).mean()

        nll, agreement = jax.lax.map(one, windows, batch_size=8)
        return nll.mean(), agreement.mean()

    return evaluate


def heldout_windows(tokens: np.ndarray, context: int) -> jax.Array:
    """The held-out stream cut into adjacent windows of context + 1 tokens."""
    count = (tokens.size - 1) // context
    cut = [tokens[i * context : (i + 1) * context + 1] for i in range(count)]
    return jnp.asarray(np.stack(cut), jnp.int32)


@dataclasses.dataclass(frozen=True)
class Data:
    """The corpus on the device."""

    tokens: jax.Array  # [n] u16, the training stream
    windows: jax.Array  # [W, context + 1] i32, the held-out stream
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
    state: TrainState
    step: Callable
    evaluate: Callable


def compile_run(
    config: LlamaConfig, recipe: Recipe, data: Data, teacher: LlamaConfig | None = None
) -> Run:
    """Initialise the state and compile step and evaluation: three programs."""

    def initial(config, recipe):
        params = stack_layers(init_params(config, jax.random.key(recipe.seed)))
        return TrainState(params, optimizer(recipe).init(params), jnp.zeros((), jnp.int32))

    state = jax.jit(lambda: initial(config, recipe))()
    theirs = teacher and jax.eval_shape(lambda: initial(teacher, recipe).params)
    step = make_train_step(config, recipe, teacher).lower(
        state, theirs, data.tokens, jnp.float32(0)
    )
    evaluate = make_evaluate(config, teacher).lower(state.params, theirs, data.windows)
    return Run(config, recipe, state, step.compile(), evaluate.compile())


def train(run: Run, data: Data, teacher: Model | None = None) -> tuple[Any, dict]:
    """Train one model; its f32 parameters at the best evaluation, and how it went."""
    recipe, state = run.recipe, run.state
    per_step = recipe.batch * run.config.max_position_embeddings
    total = max(2, round(recipe.epochs * data.tokens.size / per_step))
    theirs = teacher and stack_layers(teacher.params)
    best, kept, report = math.inf, None, {}
    progress, evaluated, before, begun = 0.0, 0.0, jnp.zeros(()), time.perf_counter()
    for steps in itertools.count(1):
        state, nll = run.step(state, theirs, data.tokens, jnp.float32(progress))
        before.block_until_ready()  # the host stays one step ahead, so that its clock is true
        before, elapsed = nll, time.perf_counter() - begun
        progress = max(steps / total, elapsed / recipe.deadline)
        if progress - evaluated < 1 / EVALUATIONS and progress < 1:
            continue
        evaluated = progress
        nats, agreement = map(float, run.evaluate(state.params, theirs, data.windows))
        figures = {
            "steps": steps,
            "seconds": round(elapsed, 1),
            "epochs": round(steps * per_step / data.tokens.size, 2),
            "train_nll": round(float(nll), 4),
            "heldout_nll": round(nats, 4),
            "heldout_bits_per_byte": round(nats * data.bits_per_byte, 4),
        } | ({"agreement_with_teacher": round(agreement, 4)} if teacher else {})
        print(" ".join(f"{k} {v}" for k, v in figures.items()), flush=True)
        if nats < best:  # the next step donates the state: what is kept is a copy
            best, kept, report = nats, jax.tree.map(jnp.copy, state.params), figures
        if progress >= 1:
            break
    report = {"parameters": num_params(run.config), **report, "planned_steps": total}
    return unstack_layers(kept), report | {"recipe": dataclasses.asdict(recipe)} | data.meta


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
        params, report = train(run, data)
        model = Model(config, params)
        save(args.out / "embedded", model, report, args.data)
        params, report = train(draft_run.result(), data, model)
        save(args.out / "embedded-draft", Model(draft_config, params), report, args.data)


if __name__ == "__main__":
    main()
