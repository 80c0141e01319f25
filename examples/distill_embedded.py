"""Distil the embedded model into its draft, and measure what speculative decoding gains.

    python examples/distill_embedded.py --out DIR                  # a GPU: minutes
    python examples/distill_embedded.py --out DIR --tiny           # a CPU: whether it works
    python examples/distill_embedded.py --out DIR --on-policy 200  # then on the draft's own text
    python examples/distill_embedded.py --out DIR --steps 0 --on-policy 200   # on that alone

The target takes a drafted token with probability min(1, p/q), so a draft is worth

    acceptance = sum_v min(p_v, q_v)     on text that neither has read     (Leviathan et al., 2023)

which is measured before and after.  The draft learns from the target's predictions alone, first by
forward KL, which shows it every mode of the target, then by total variation, which is one minus
the acceptance itself (Zhou et al., 2024, DistillSpec).  With --on-policy it is corrected on
continuations that it samples itself through `aidx.LLM` (Agarwal et al., 2024, GKD).

The text is that of `train_embedded.py`, with the same files held out.  Logits of both models exist
for a slice of the vocabulary at a time (`aidx.distill.linear_divergence`).
"""

import argparse
import dataclasses
import json
import math
import pathlib
import platform
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tokenizers
from optax.contrib import MuonDimensionNumbers, muon
from stdlib_corpus import END_OF_TEXT, held_out, source_files

import aidx
from aidx.distill import (
    expected_tokens,
    lm_distill_loss_fn,
    measure_acceptance,
    on_policy_batch,
)
from aidx.models import Model, load_model, num_params, save_model
from aidx.train import TrainState, init_state, make_train_step

WARMUP = 50  # steps of rising learning rate


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a run is, beside its data; the divergences share the run evenly, in their order."""

    steps: int = 3000
    deadline: float = 150.0  # seconds of training; then the rate is zero
    batch: int = 32
    context: int = 2048
    learning_rate: float = 4e-3
    weight_decay: float = 0.05
    divergences: tuple[str, ...] = ("forward_kl", "total_variation")
    on_policy_rounds: int = 0
    on_policy_deadline: float = 60.0  # seconds of sampling and training
    on_policy_rate: float = 4e-4  # falls linearly to zero
    chunk: int = 2048  # columns of the vocabulary at a time
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Text:
    """The corpus as tokens."""

    train: np.ndarray  # [n] u16
    windows: np.ndarray  # [W, context] i32, held out
    meta: dict


def read_text(directory: pathlib.Path, context: int, root: pathlib.Path | None = None) -> Text:
    """The standard library through the checkpoint's tokenizer, whole files held out."""
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    end = backend.token_to_id(END_OF_TEXT)
    files = list(source_files(root))
    streams, meta = (
        {},
        {"python": platform.python_version(), "vocab_size": backend.get_vocab_size()},
    )
    for part, wanted in (("train", False), ("heldout", True)):
        texts = [text for name, text in files if held_out(name) is wanted]
        ids = [np.array([end, *d.ids], np.uint16) for d in backend.encode_batch(texts)]
        streams[part] = np.concatenate(ids)
        size = sum(len(text.encode()) for text in texts)
        meta[part] = {"files": len(texts), "bytes": size, "tokens": int(streams[part].size)}
    return Text(streams["train"], cut(streams["heldout"], context), meta)


def load_text(directory: pathlib.Path, folder: pathlib.Path, context: int) -> Text:
    """What `stdlib_corpus.prepare` wrote in `folder`, with the tokenizer of the checkpoint."""
    vocabularies = [
        tokenizers.Tokenizer.from_file(str(d / "tokenizer.json")).get_vocab()
        for d in (directory, folder)
    ]
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(f"the tokens of {folder} are not those of {directory}")
    stream, held = (np.fromfile(folder / f"{part}.bin", np.uint16) for part in ("train", "heldout"))
    return Text(stream, cut(held, context), json.loads((folder / "corpus.json").read_text()))


def cut(tokens: np.ndarray, context: int) -> np.ndarray:
    """A stream as adjacent windows, i32."""
    return tokens[: tokens.size // context * context].reshape(-1, context).astype(np.int32)


def optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Muon on the layers' matrices, Adam on the rest; its last part scales by the rate."""

    def dimensions(params: Any) -> Any:
        def of(path, x):  # [in, *heads, out]: every [in, out] by itself
            if path[0].key != "layers" or x.ndim < 2:
                return None
            return MuonDimensionNumbers(reduction_axis=0, output_axis=x.ndim - 1)

        return jax.tree_util.tree_map_with_path(of, params)

    direction = muon(
        1.0,
        weight_decay=recipe.weight_decay,
        consistent_rms=0.2,
        muon_weight_dimension_numbers=dimensions,
    )
    scale = optax.inject_hyperparams(optax.scale)(step_size=0.0)
    return optax.chain(optax.clip_by_global_norm(1.0), direction, scale)


def at_rate(state: TrainState, rate: float) -> TrainState:
    """The state with another learning rate for its next step."""
    *rest, last = state.opt_state
    last = last._replace(hyperparams={"step_size": jnp.float32(rate)})
    return state.replace(opt_state=(*rest, last))  # pyright: ignore


def rate_at(recipe: Recipe, step: int, progress: float) -> float:
    """Warm up, hold, and over the last 60% fall linearly to zero."""
    fall = min(1.0, max(0.0, (1 - progress) / 0.6))
    return recipe.learning_rate * min(fall, (step + 1) / WARMUP)


def crops(text: Text, recipe: Recipe, length: int, batch: int) -> Iterator[np.ndarray]:
    """Endless batches of random windows of `length` tokens, i32."""
    rng = np.random.default_rng(recipe.seed)
    while True:
        starts = rng.integers(0, text.train.size - length, batch)
        yield text.train[starts[:, None] + np.arange(length)].astype(np.int32)


def make_steps(recipe: Recipe, draft: Model, target: Model) -> list[Callable]:
    """One training step per divergence: `step(state, batch, target_params)`."""
    losses = [
        lm_distill_loss_fn(draft.forward, target.forward, kind=kind, chunk=recipe.chunk)
        for kind in recipe.divergences
    ]
    dtype = target.dtype
    return [make_train_step(loss, optimizer(recipe), compute_dtype=dtype) for loss in losses]


def distil(recipe: Recipe, draft: Model, target: Model, text: Text) -> tuple[Model, dict]:
    """The draft after its lessons, and how they went."""
    if not recipe.steps:
        return draft, {"steps": 0, "seconds": 0.0, "planned_steps": 0}
    state = init_state(draft.params, optimizer(recipe), jax.random.key(recipe.seed))
    example = {"tokens": jnp.zeros((recipe.batch, recipe.context + 1), jnp.int32)}
    steps = [
        step.lower(state, example, target.params).compile()
        for step in make_steps(recipe, draft, target)
    ]
    before, begun, progress, elapsed = jnp.zeros(()), time.perf_counter(), 0.0, 0.0
    metrics, done = None, 0
    for done, tokens in enumerate(crops(text, recipe, recipe.context + 1, recipe.batch)):
        if progress >= 1:
            break
        phase = min(len(steps) - 1, int(progress * len(steps)))
        state = at_rate(state, rate_at(recipe, done, progress))
        state, metrics = steps[phase](state, {"tokens": jnp.asarray(tokens)}, target.params)
        before.block_until_ready()  # the host stays one step ahead, so that its clock is true
        before, elapsed = metrics.loss, time.perf_counter() - begun
        progress = max((done + 1) / recipe.steps, elapsed / recipe.deadline)
        if done % 200 == 0:
            name = recipe.divergences[phase]
            print(f"step {done} {name} {float(metrics.loss):.4f} {elapsed:.0f} s", flush=True)
    report = {
        "steps": done,
        "seconds": round(elapsed, 1),
        "epochs": round(done * recipe.batch * recipe.context / text.train.size, 2),
        "planned_steps": recipe.steps,
    }
    return draft.replace(params=state.params), report


def on_policy(recipe: Recipe, draft: Model, target: Model, text: Text) -> tuple[Model, dict]:
    """GKD: the draft continues the corpus, and learns from the target how it should have.

    Every round samples with the parameters of the round before: `update_params` compiles nothing.
    """
    prompt, answer = recipe.context // 8, recipe.context // 8
    rows = recipe.batch * 4
    llm = aidx.LLM(
        rounded(draft, target.dtype),
        max_num_seqs=rows,
        max_model_len=prompt + answer,
        max_num_batched_tokens=max(rows, min(8192, rows * prompt)),
        num_blocks=2 + rows * -(-(prompt + answer) // 16),
        enable_prefix_caching=False,
        warmup=False,
        progress=False,
    )
    loss = lm_distill_loss_fn(
        draft.forward, target.forward, kind=recipe.divergences[-1], chunk=recipe.chunk
    )
    transform = optimizer(recipe)
    step = make_train_step(loss, transform, compute_dtype=target.dtype)
    state = init_state(draft.params, transform, jax.random.key(recipe.seed + 1))
    begun = sampling = progress = 0.0
    done, losses = 0, []
    for i, prompts in enumerate(crops(text, recipe, prompt, rows)):
        if i == 1:  # the first round compiles
            begun, sampling = time.perf_counter(), 0.0
        if progress >= 1:
            break
        asked = time.perf_counter()
        llm.update_params(rounded(draft.replace(params=state.params), target.dtype).params)
        ask = [
            aidx.SamplingParams(temperature=1.0, max_tokens=answer, ignore_eos=True, seed=seed)
            for seed in range(recipe.seed + i * rows, recipe.seed + (i + 1) * rows)
        ]
        sampler = lambda asked, ask=ask: [
            o.outputs[0].token_ids for o in llm.generate(list(asked), ask)
        ]
        batch = on_policy_batch(prompts.tolist(), sampler, length=prompt + answer - 1)
        sampling += time.perf_counter() - asked
        given = {"tokens": batch.tokens, "weights": batch.weights}
        state = at_rate(state, recipe.on_policy_rate * min(1 - progress, (i + 1) / 10))
        state, metrics = step(state, given, target.params)
        losses.append(float(metrics.loss))
        done = i + 1
        spent = time.perf_counter() - begun if i else 0.0
        progress = max(done / recipe.on_policy_rounds, spent / recipe.on_policy_deadline)
        if i % 20 == 0:
            print(f"round {i} on policy {losses[-1]:.4f} {spent:.0f} s", flush=True)
    tokens, seconds = (done - 1) * rows * answer, max(1e-9, time.perf_counter() - begun)
    first, last = (float(np.mean(part)) for part in (losses[:20], losses[-20:]))
    report = {
        "rounds": done,
        "seconds": round(seconds, 1) if done > 1 else 0.0,
        "sampled_tokens": done * rows * answer,
        "sampled_tokens_per_second": round(tokens / sampling) if done > 1 else 0,
        "loss_first_20_rounds": round(first, 4),
        "loss_last_20_rounds": round(last, 4),
    }
    return draft.replace(params=state.params), report


def rounded(model: Model, dtype: Any) -> Model:
    """The model with its parameters in another dtype."""
    return model.replace(params=jax.tree.map(lambda x: x.astype(dtype), model.params))


def heldout_nll(model: Model, windows: np.ndarray) -> float:
    """Nats a token on the held-out windows."""

    @jax.jit
    def one(params, window):
        positions = jnp.arange(window.size - 1, dtype=jnp.int32)[None]
        logits, _ = model.forward(
            params, window[None, :-1], positions, aidx.no_cache_attend(), None
        )
        log_p = jax.nn.log_softmax(logits[0])
        return -jnp.take_along_axis(log_p, window[1:, None], axis=-1).mean()

    return float(np.mean([one(model.params, jnp.asarray(w)) for w in windows]))


def measure(draft: Model, target: Model, text: Text) -> dict:
    """What is reported before and after, on held-out text with bf16 weights."""
    greedy, sampled = measure_acceptance(draft, target, text.windows).values()
    nats = heldout_nll(draft, text.windows)
    tokens, size = (text.meta["heldout"][k] for k in ("tokens", "bytes"))
    return {
        "acceptance": round(sampled, 4),
        "agreement_with_teacher": round(greedy, 4),
        "tokens_per_verification_of_4": round(expected_tokens(sampled, 4), 3),
        "heldout_nll": round(nats, 4),
        "heldout_bits_per_byte": round(nats * tokens / size / math.log(2), 4),
    }


def main(argv: list[str] | None = None) -> dict:
    """Distil, measure, write; returns the report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default, add = Recipe(), parser.add_argument
    add("--out", type=pathlib.Path, required=True, help="where the distilled draft goes")
    add("--target", type=pathlib.Path, default=aidx.embedded_path("embedded"))
    add("--draft", type=pathlib.Path, default=aidx.embedded_path("embedded-draft"))
    add("--data", type=pathlib.Path, help="tokens that stdlib_corpus.prepare has written")
    add("--root", type=pathlib.Path, help="of the text; the standard library by default")
    add("--steps", type=int, default=default.steps)
    add("--deadline", type=float, default=default.deadline, help="seconds of training")
    add("--batch", type=int, default=default.batch)
    add("--learning-rate", type=float, default=default.learning_rate)
    add("--divergences", nargs="+", default=default.divergences)
    add("--on-policy", type=int, default=0, dest="on_policy_rounds", help="rounds of GKD after")
    add("--on-policy-deadline", type=float, default=default.on_policy_deadline, help="seconds")
    add("--on-policy-rate", type=float, default=default.on_policy_rate, help="learning rate")
    add("--seed", type=int, default=default.seed)
    add("--tiny", action="store_true", help="a few steps on short windows, to try it on a CPU")
    args = parser.parse_args(argv)
    fields = {f.name for f in dataclasses.fields(Recipe)} & set(vars(args))
    recipe = Recipe(**{name: getattr(args, name) for name in fields})
    recipe = dataclasses.replace(recipe, divergences=tuple(recipe.divergences))
    if args.tiny:
        recipe = dataclasses.replace(recipe, steps=min(args.steps, 4), context=64, batch=2)

    dtype = "bfloat16" if jax.default_backend() == "gpu" else "float32"
    target = load_model(args.target, dtype=dtype)
    draft = load_model(args.draft, dtype="float32")
    if args.data:
        text = load_text(args.draft, args.data, recipe.context)
    else:
        text = read_text(args.draft, recipe.context, args.root)
    if args.tiny:
        text = dataclasses.replace(text, windows=text.windows[:2])
    shown = lambda model: measure(rounded(model, dtype), target, text)
    report: dict = {"parameters": num_params(draft.config), "before": shown(draft)}
    print("before", json.dumps(report["before"]), flush=True)
    taught, lessons = distil(recipe, draft, target, text)
    if recipe.on_policy_rounds:
        report["offline"] = shown(taught) if recipe.steps else report["before"]
        print("offline", json.dumps(report["offline"]), flush=True)
        taught, report["on_policy"] = on_policy(recipe, taught, target, text)
        print("on policy", json.dumps(report["on_policy"]), flush=True)
    after = shown(taught)
    print("after", json.dumps(after), flush=True)
    report |= lessons | after | {"recipe": dataclasses.asdict(recipe)} | text.meta
    save_model(rounded(taught, jnp.bfloat16), args.out)
    (args.out / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    return report


if __name__ == "__main__":
    main()
