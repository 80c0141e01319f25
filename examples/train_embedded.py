"""Train the embedded model and its draft on the source text of Python's standard library.

    python examples/train_embedded.py                      # everything, into aidx/data (GPU)
    python examples/train_embedded.py --stage prepare      # tokenizer and tokens only (CPU)
    python examples/train_embedded.py --stage train --minutes 2 --draft-minutes 1 --out DIR

Training is `train_step`, a pure function of (state, tokens, total), donated, with the corpus on
the device as one uint16 array.  Crops and dropout come from `fold_in(key, step)`, so a run is a
function of its seed.  The draft is distilled from the model it will draft for.

Matrices are updated by Muon (Jordan et al., 2024) scaled to Adam's RMS (Liu et al., 2025), the
rest by Adam.  The corpus is passed dozens of times, so weight decay is heavy and the outputs of
attention are dropped at random.  Dropout needs no help from the model: attention is its argument.
"""

import argparse
import dataclasses
import functools
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
from aidx.typing import Attend

HEAD_DIM, CONTEXT, VOCAB = 64, 2048, 4096
MODEL = LlamaConfig(VOCAB, 256, 768, 6, 4, 2, HEAD_DIM, max_position_embeddings=CONTEXT, tied=True)
DRAFT = LlamaConfig(VOCAB, 80, 192, 3, 2, 1, HEAD_DIM, max_position_embeddings=CONTEXT, tied=True)
TINY = LlamaConfig(VOCAB, 32, 64, 2, 2, 1, HEAD_DIM, max_position_embeddings=64, tied=True)
WARMUP = 100  # steps of rising learning rate
TIMED = 20  # of them, after the first, measure how long a step takes

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
    """What a run is, beside its data.  `minutes` is the time on the clock after compilation."""

    minutes: float = 2.0
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


def dropping_attend(key: jax.Array, rate: float, implementation: str) -> Attend:
    """Causal attention without a cache whose outputs are dropped with probability `rate`."""

    def attend(cache, layer, q, k, v, *, window=None, scale=None, soft_cap=None, sinks=None):
        if window is not None or soft_cap is not None or sinks is not None:
            raise NotImplementedError(f"{window=} {soft_cap=} {sinks=}: plain causal attention")
        out = jax.nn.dot_product_attention(
            q, k, v, is_causal=True, scale=scale, implementation=implementation
        )
        if rate:
            keep = jax.random.bernoulli(jax.random.fold_in(key, layer), 1 - rate, out.shape)
            out = jnp.where(keep, out / (1 - rate), 0).astype(out.dtype)
        return out, cache

    return attend


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


def schedule(step: jax.Array, total: jax.Array) -> jax.Array:
    """Warm up, hold, and over the second half fall linearly to zero (WSD, Hu et al., 2024)."""
    progress = step / total
    return jnp.minimum(1.0, (step + 1) / WARMUP) * jnp.clip(2 * (1 - progress), 0.0, 1.0)


def crops(tokens: jax.Array, key: jax.Array, batch: int, context: int) -> jax.Array:
    """`batch` random windows of context + 1 tokens, i32."""
    starts = jax.random.randint(key, (batch,), 0, tokens.shape[0] - context, dtype=jnp.int32)
    window = lambda start: jax.lax.dynamic_slice(tokens, (start,), (context + 1,))
    return jax.vmap(window)(starts).astype(jnp.int32)


def logits_of(config: LlamaConfig, params: Any, window: jax.Array, attend: Attend) -> jax.Array:
    """bf16 forward over all tokens of `window` but the last: f32 logits `[B, T, V]`.

    The unembedding gives bf16, so that its gradient is a bf16 matmul too.
    """
    tokens = window[:, :-1]
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), unstack_layers(params))
    hidden, _ = bind_forward(config)(half, tokens, positions, attend, None, hidden=True)
    return jnp.einsum("btd,vd->btv", hidden, half["embed"]).astype(jnp.float32)


def losses(logits: jax.Array, targets: jax.Array, teacher: jax.Array | None):
    """Cross-entropy in nats a token, and KL(teacher || student) (0 without a teacher)."""
    log_p = jax.nn.log_softmax(logits)
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1).mean()
    if teacher is None:
        return nll, jnp.zeros(())
    log_t = jax.nn.log_softmax(teacher)
    return nll, (jnp.exp(log_t) * (log_t - log_p)).sum(-1).mean()


def make_train_step(
    config: LlamaConfig, recipe: Recipe, teacher: LlamaConfig | None = None
) -> Callable:
    """`train_step(state, teacher_params, tokens, total) -> (state, nll)`; the state is donated."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    transform = optimizer(recipe)

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, teacher_params: Any, tokens: jax.Array, total: jax.Array):
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
        crop_key, drop_key = jax.random.split(key)
        window = crops(tokens, crop_key, recipe.batch, config.max_position_embeddings)
        target = None
        if teacher is not None:
            still = dropping_attend(drop_key, 0.0, implementation)
            target = logits_of(teacher, teacher_params, window, still)

        def loss(params):
            attend = dropping_attend(drop_key, recipe.dropout, implementation)
            nll, kl = losses(logits_of(config, params, window, attend), window[:, 1:], target)
            return (1 - recipe.distill) * nll + recipe.distill * kl, nll

        grads, nll = jax.grad(loss, has_aux=True)(state.params)
        updates, opt_state = transform.update(grads, state.opt_state, state.params)
        rate = recipe.learning_rate * schedule(state.step, total)
        params = jax.tree.map(lambda p, u: p + rate * u, state.params, updates)
        return TrainState(params, opt_state, state.step + 1), nll

    return train_step


def make_evaluate(config: LlamaConfig, other: LlamaConfig | None = None) -> Callable:
    """`evaluate(params, windows, other_params) -> (nll a token, share of equal argmax)`."""
    implementation = "cudnn" if jax.default_backend() == "gpu" else "xla"
    attend = dropping_attend(jax.random.key(0), 0.0, implementation)

    @jax.jit
    def evaluate(params, windows, other_params):
        def one(window):
            logits = logits_of(config, params, window[None], attend)
            nll, _ = losses(logits, window[None, 1:], None)
            if other is None:
                return nll, jnp.ones(())
            theirs = logits_of(other, other_params, window[None], attend)
            return nll, (theirs.argmax(-1) == logits.argmax(-1)).mean()

        nll, agreement = jax.lax.map(one, windows)
        return nll.mean(), agreement.mean()

    return evaluate


def heldout_windows(tokens: np.ndarray, context: int) -> jax.Array:
    """The held-out stream cut into adjacent windows of context + 1 tokens."""
    count = (tokens.size - 1) // context
    cut = [tokens[i * context : (i + 1) * context + 1] for i in range(count)]
    return jnp.asarray(np.stack(cut), jnp.int32)


def train(config: LlamaConfig, recipe: Recipe, data: pathlib.Path, teacher: Model | None = None):
    """Train one model; return its f32 parameters at the best evaluation, and how it went."""
    meta = json.loads((data / "corpus.json").read_text())
    tokens = jnp.asarray(np.fromfile(data / "train.bin", np.uint16))
    heldout = np.fromfile(data / "heldout.bin", np.uint16)
    windows = heldout_windows(heldout, config.max_position_embeddings)
    bits = meta["heldout"]["tokens"] / meta["heldout"]["bytes"] / math.log(2)  # nats -> bits a byte

    params = stack_layers(init_params(config, jax.random.key(recipe.seed)))
    state = TrainState(params, optimizer(recipe).init(params), jnp.zeros((), jnp.int32))
    step = make_train_step(config, recipe, teacher and teacher.config)
    evaluate = make_evaluate(config, teacher and teacher.config)
    theirs = teacher and stack_layers(teacher.params)

    begun = time.perf_counter()
    far = jnp.float32(1e9)  # while the step is being timed nothing decays
    state, nll = step(state, theirs, tokens, far)
    float(evaluate(state.params, windows, theirs)[0])
    count = num_params(config)
    print(f"{count / 1e6:.2f}M parameters, compiled in {time.perf_counter() - begun:.0f} s")

    begun = time.perf_counter()
    for _ in range(TIMED):
        state, nll = step(state, theirs, tokens, far)
    nll.block_until_ready()
    seconds = (time.perf_counter() - begun) / TIMED
    total = max(2 * TIMED, round(recipe.minutes * 60 / seconds))
    epochs = total * recipe.batch * config.max_position_embeddings / tokens.size
    print(f"{seconds * 1e3:.1f} ms a step, {total} steps, {epochs:.1f} epochs", flush=True)

    best, kept, report, every = math.inf, None, {}, max(1, total // 20)
    for i in range(TIMED + 1, total):
        state, nll = step(state, theirs, tokens, jnp.float32(total))
        if (i + 1) % every and i + 1 < total:
            continue
        nats, agreement = map(float, evaluate(state.params, windows, theirs))
        figures = {
            "step": i + 1,
            "train_nll": float(nll),
            "heldout_nll": nats,
            "heldout_bits_per_byte": nats * bits,
        } | ({"agreement_with_teacher": agreement} if teacher else {})
        print(" ".join(f"{k} {v:.4g}" for k, v in figures.items()), flush=True)
        if nats < best:  # the next step donates the state: what is kept is a copy
            best, kept, report = nats, jax.tree.map(jnp.copy, state.params), figures
    run = {"parameters": count, "steps": total, "epochs": epochs, "step_ms": seconds * 1e3}
    report = {"corpus": meta, "recipe": dataclasses.asdict(recipe), **run, **report}
    return unstack_layers(kept), report


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
    default, data = Recipe(), pathlib.Path(__file__).resolve().parent.parent
    add = parser.add_argument
    add("--stage", choices=("all", "prepare", "train"), default="all")
    add("--data", type=pathlib.Path, default=data / ".data", help="tokenizer and tokens")
    add("--out", type=pathlib.Path, default=data / "aidx" / "data", help="where models go")
    add("--minutes", type=float, default=default.minutes, help="training time of the model")
    add("--draft-minutes", type=float, default=1.0, help="training time of the draft; 0: none")
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
        recipe, minutes=args.draft_minutes, dropout=0.0, weight_decay=0.1, distill=0.5
    )
    config, draft_config = (TINY, TINY) if args.tiny else (MODEL, DRAFT)
    params, report = train(config, recipe, args.data)
    model = Model(config, params)
    save(args.out / "embedded", model, report, args.data)
    if not drafting.minutes:
        return
    params, report = train(draft_config, drafting, args.data, model)
    draft = Model(draft_config, params)
    save(args.out / "embedded-draft", draft, report, args.data)


if __name__ == "__main__":
    main()
