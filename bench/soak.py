"""A soak of the engine: random arrivals, cancels, forks, beams and preemptions on a pool too small.

    python bench/soak.py [--seconds 60] [--requests N] [--seed 0] [--modes swap,recompute]
        [--dtypes bfloat16,int8,float8_e4m3fn]

Some blocks of every pool belong to nobody and hold random bits, NaN among them: their bits must
not change, and no answer may be made of them (a NaN would end its request with an error).  Greedy
requests are asked again alone at the end: how many answers are the same is printed, since another
batch may round a tie another way, and how far a token of theirs ever was behind the best one when
prompt and answer are read in one pass: more than GAP is no tie.  At the end nobody holds a block.
The exit status is the number of soaks that went wrong.
"""

import argparse
import collections
import dataclasses
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aidx.engine import BeamSearchParams, Engine, EngineConfig, RequestOutput, SamplingParams
from aidx.models import LlamaConfig, Model, init_params

GUARDS = 7  # blocks that belong to nobody
GAP = 1.0  # nats, where logits have a standard deviation of 5
MODEL = LlamaConfig(512, 256, 512, 2, 8, 2, 64)
TINY = LlamaConfig(97, 32, 64, 2, 4, 2, 8)


@dataclasses.dataclass(frozen=True)
class Soak:
    """What a soak did, and what went wrong.

    Attributes:
        reasons: requests by the finish_reason of their first sample.
        same, repeated: greedy answers that were the same alone, of how many.
        gap: the most that a token of these answers was behind the best one, nats.
        wrong: what may not be, in words; empty: all is well.
    """

    steps: int
    reasons: dict[str, int]
    preempted: int
    swapped: int
    cache_hit_rate: float
    same: int
    repeated: int
    gap: float
    wrong: tuple[str, ...]


def make_engine(mode: str, dtype: str, *, tiny: bool = False) -> Engine:
    """An engine with room for about a third of what its seats could hold."""
    config = TINY if tiny else MODEL
    compute = "float32" if tiny else "bfloat16"
    model = Model(config, init_params(config, jax.random.key(0), jnp.dtype(compute), std=0.3))
    limits: dict[str, Any] = dict(num_blocks=41, block_size=4, max_num_seqs=4, max_model_len=64)
    limits |= dict(max_num_batched_tokens=16, cascade_tokens=24)
    if not tiny:
        limits = dict(num_blocks=250, block_size=16, max_num_seqs=32, max_model_len=640)
        limits |= dict(max_num_batched_tokens=256, cascade_tokens=512)
    engine_config = EngineConfig(
        num_layers=model.num_layers,
        num_kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        vocab_size=model.vocab_size,
        dtype=dtype,
        max_logprobs=6,
        preemption_mode=mode,
        cpu=tiny,
        **limits,
    )
    return Engine(model.forward, model.params, engine_config)


def plant_guards(engine: Engine, rng: np.random.Generator) -> np.ndarray:
    """Blocks that nobody is ever given, filled with random bits."""
    pool, guards = engine.pool.allocate(GUARDS)
    engine._batch = dataclasses.replace(engine._batch, pool=pool)

    def planted(leaf):
        bits = rng.integers(0, 256, (GUARDS, *leaf.shape[1:], leaf.dtype.itemsize), np.uint8)
        values = bits.view(leaf.dtype)[..., 0]
        return jax.device_put(leaf.at[guards].set(values), leaf.sharding)

    engine._device.cache = jax.tree.map(planted, engine._device.cache)
    return guards


def bits_of(engine: Engine, guards: np.ndarray) -> list[bytes]:
    """What lies in the guard blocks, bit for bit."""
    return [np.asarray(leaf[guards]).tobytes() for leaf in jax.tree.leaves(engine._device.cache)]


def random_request(rng: np.random.Generator, engine: Engine, prefixes: list[list[int]]):
    """(prompt, params): short and long, with a shared beginning or none, samples and beams."""
    config, most = engine.config, engine.config.max_model_len
    size = int(min(rng.lognormal(np.log(most / 8), 1.0), most / 2)) + 1
    prompt = rng.integers(0, config.vocab_size, size).tolist()
    if rng.random() < 0.4:
        prompt = [*prefixes[rng.integers(len(prefixes))], *prompt]
    prompt = prompt[: most // 2]
    tokens = int(rng.integers(1, most // 3))
    if rng.random() < 0.05:
        return prompt, BeamSearchParams(beam_width=2, max_tokens=min(tokens, 12))
    samples = 1 + (rng.random() < 0.15) * int(rng.integers(1, 3))
    if samples > 1 or rng.random() < 0.3:
        seed = int(rng.integers(1 << 30))
        return prompt, SamplingParams(temperature=0.8, n=samples, max_tokens=tokens, seed=seed)
    return prompt, SamplingParams(temperature=0, max_tokens=tokens)


def soak(engine: Engine, *, seed: int, requests: int | None = None, seconds: float = 60) -> Soak:
    """Traffic for so many requests or seconds, then until the last one has ended."""
    rng = np.random.default_rng(seed)
    guards = plant_guards(engine, rng)
    bits, began = bits_of(engine, guards), time.monotonic()
    size = engine.config.max_model_len // 4
    prefixes = [rng.integers(0, engine.config.vocab_size, size).tolist() for _ in range(3)]
    asked, done, open_names, wrong, steps = {}, {}, [], [], 0
    enough = lambda: (
        len(asked) >= requests if requests is not None else time.monotonic() - began >= seconds
    )
    while not enough() or engine.has_unfinished:
        for _ in range(int(rng.poisson(0.5)) if not enough() else 0):
            prompt, params = random_request(rng, engine, prefixes)
            name = engine.add_request(prompt, params)
            asked[name] = prompt, params
            open_names.append(name)
        if open_names and rng.random() < 0.03:
            engine.abort(open_names[rng.integers(len(open_names))])
        for output in engine.step():
            done[output.request_id] = output
            open_names.remove(output.request_id)
        steps += 1
        if steps % 256 == 0 and bits_of(engine, guards) != bits:
            wrong.append(f"a guard block has changed by step {steps}")
            break
    stats = engine.stats()
    if bits_of(engine, guards) != bits:
        wrong.append("a guard block has changed")
    if engine.pool.stats().held != GUARDS:
        wrong.append(f"{engine.pool.stats().held - GUARDS} blocks are still held")
    if set(done) != set(asked):
        wrong.append(f"{len(set(asked) - set(done))} requests did not end")
    reasons = collections.Counter(output.outputs[0].finish_reason for output in done.values())
    if reasons["error"]:
        texts = {o.outputs[0].stop_reason for o in done.values() if o.outputs[0].stop_reason}
        wrong.append(f"{reasons['error']} requests failed: {sorted(map(str, texts))[:3]}")
    same, repeated, gap = repeat_alone(engine, asked, done)
    if gap > GAP:
        wrong.append(f"an answer holds a token {gap:.2f} nats behind the best")
    return Soak(
        steps,
        dict(reasons),
        stats.preempted,
        stats.swapped,
        stats.cache_hit_rate,
        same,
        repeated,
        gap,
        tuple(wrong),
    )


def repeat_alone(engine: Engine, asked: dict, done: dict, most: int = 20) -> tuple[int, int, float]:
    """(greedy answers that are the same alone, how many were asked again, `Soak.gap` of them)."""
    greedy = [
        name
        for name, (_, params) in asked.items()
        if isinstance(params, SamplingParams)
        and params.temperature == 0
        and name in done
        and done[name].outputs[0].finish_reason == "length"
    ][:most]
    same, gap = 0, 0.0
    for name in greedy:
        prompt, answer = asked[name][0], list(done[name].outputs[0].token_ids)
        same += alone(engine, *asked[name]).outputs[0].token_ids == done[name].outputs[0].token_ids
        whole = [*prompt, *answer]
        read = alone(engine, whole, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1))
        for token, found in list(zip(whole, read.prompt_logprobs, strict=True))[len(prompt) :]:
            gap = max(gap, max(x.logprob for x in found.values()) - found[token].logprob)
    return same, len(greedy), gap


def alone(engine: Engine, prompt: list[int], params: SamplingParams) -> RequestOutput:
    """A request's last output, with nobody beside it."""
    engine.add_request(prompt, params, request_id="alone")
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    return outputs[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60, help="of each soak")
    parser.add_argument("--requests", type=int, help="instead of seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modes", default="swap,recompute")
    parser.add_argument("--dtypes", default="bfloat16,int8,float8_e4m3fn")
    args = parser.parse_args()
    failed = 0
    for mode in args.modes.split(","):
        for dtype in args.dtypes.split(","):
            engine = make_engine(mode, dtype)
            if args.requests is None:
                engine.warmup()  # the seconds are for traffic
            began = time.monotonic()
            found = soak(engine, seed=args.seed, requests=args.requests, seconds=args.seconds)
            failed += bool(found.wrong)
            if args.requests is None and not found.preempted:
                print("nobody was preempted: longer, please")
                failed += 1
            took = time.monotonic() - began
            print(f"{mode} {dtype} {took:.0f} s: {found}", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
