"""Device time of one sampling step over a vocabulary of 128,256 tokens.

    python bench/sampling.py                # every row, into bench/results/<device>/sampling.json
    python bench/sampling.py --rows 1 8 --vocab 32000 --out somewhere

A case is `variant RxV dtype`.  aidx: the mean of many calls inside one program, so that nothing is
dispatched between them.  `sort`: the same top-k and top-p by a full sort in XLA, what a sampler
that sorts pays.  `torch`: temperature, sort, cumulative sum, scatter and an exponential draw, which
is how samplers without a kernel of their own do it on torch, captured in a CUDA graph where there
is a GPU.
"""

import argparse
import concurrent.futures
import datetime
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp

from aidx.ops.sampling import draw_keys, gumbel, sample, sampling_rows, sampling_state

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def sampled(variant, num_rows, vocab_size, **options):
    """(logits, positions, state) -> tokens with parameters typical of the variant."""
    rows = sampling_rows(num_rows, seed=1, temperature=0.7, top_k=50, top_p=0.9)

    def call(logits, positions, state):
        out = sample(logits, rows, positions, state, variant=variant, **options)
        if out.logprobs is None:
            return out.tokens
        # Everything asked for must be used, or it would not be computed.
        used = out.logprobs.rank + (out.logprobs.logprob < 0)
        return out.tokens + used + jnp.sum(out.logprobs.top_tokens, axis=-1)

    return call


def sorted_sampler(num_rows, vocab_size):
    """The same distribution as "full" without state, by sorting."""
    rows = sampling_rows(num_rows, seed=1)

    def call(logits, positions, state):
        x = logits.astype(jnp.float32) / 0.7
        ordered = jnp.sort(x, axis=-1, descending=True)
        ordered = jnp.where(jnp.arange(vocab_size) < 50, ordered, -jnp.inf)
        prob = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(prob, axis=-1) - prob
        least = jnp.min(jnp.where(before < 0.9, ordered, jnp.inf), axis=-1, keepdims=True)
        noise = gumbel(draw_keys(rows, positions), vocab_size)
        return jnp.argmax(jnp.where(x >= least, x + noise, -jnp.inf), axis=-1)

    return call


def repeated(call, times):
    """`times` calls in one program, each made to wait for the one before."""

    def run(logits, positions, state):
        def body(_, positions):
            x, at, kept = jax.lax.optimization_barrier((logits, positions, state))
            return at + jnp.sign(call(x, at, kept).astype(jnp.int32))

        return jax.lax.fori_loop(0, times, body, positions)

    return jax.jit(run)


def cases(all_rows, vocab_size):
    """(case, implementation, rows, dtype, with state, function)."""
    f32, bf16 = jnp.float32, jnp.bfloat16
    for r in all_rows:
        shape = f"{r}x{vocab_size}"
        for variant in ("greedy", "plain", "full"):
            for dtype in (f32, bf16):
                case = f"{variant} {shape} {jnp.dtype(dtype).name}"
                yield case, "aidx", r, dtype, False, sampled(variant, r, vocab_size)
        penalised = sampled("full", r, vocab_size)
        yield f"full+state {shape} float32", "aidx", r, f32, True, penalised
        for n in (0, 5, 20):
            call = sampled("greedy", r, vocab_size, num_logprobs=n)
            yield f"greedy+logprobs{n} {shape} float32", "aidx", r, f32, False, call
        yield f"full {shape} float32", "sort", r, f32, False, sorted_sampler(r, vocab_size)


def measure(case, times, vocab_size, repeats):
    """(a function that measures us a call, seconds that compiling took)."""
    _, _, num_rows, dtype, stateful, call = case
    key = jax.random.key(0)
    logits = (3 * jax.random.normal(key, (num_rows, vocab_size))).astype(dtype)
    state = sampling_state(num_rows, vocab_size) if stateful else None
    positions = jnp.zeros(num_rows, jnp.int32)
    start = time.perf_counter()
    compiled = repeated(call, times).lower(logits, positions, state).compile()
    seconds = time.perf_counter() - start

    def run():
        jax.block_until_ready(compiled(logits, positions, state))  # warm
        spans = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(compiled(logits, positions, state))
            spans.append((time.perf_counter() - start) / times)
        return statistics.median(spans) * 1e6

    return run, seconds


def torch_rows(all_rows, vocab_size, times, repeats):
    """The peer's rows, or nothing where torch or its GPU is missing."""
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        return

    def draw(logits):
        x = logits / 0.7
        ordered, index = x.sort(dim=-1, descending=False)
        ordered = ordered.masked_fill(ordered < ordered[:, -50:-49], -float("inf"))
        mass = ordered.softmax(dim=-1).cumsum(dim=-1)
        hidden = mass <= 0.1
        hidden[:, -1] = False
        masked = ordered.masked_fill(hidden, -float("inf"))
        prob = torch.empty_like(masked).scatter_(-1, index, masked).softmax(dim=-1)
        return (prob / torch.empty_like(prob).exponential_(1)).argmax(dim=-1)

    for r in all_rows:
        logits = torch.randn(r, vocab_size, device="cuda") * 3
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            draw(logits)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            draw(logits)
        spans = []
        for _ in range(repeats):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(times):
                graph.replay()
            end.record()
            end.synchronize()
            spans.append(start.elapsed_time(end) / times * 1e3)
        yield f"full {r}x{vocab_size} float32", "torch", statistics.median(spans)


def device_name():
    kind = jax.devices()[0]
    return "h200" if "H200" in kind.device_kind else kind.platform


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--vocab", type=int, default=128_256)
    parser.add_argument("--times", type=int, default=20, help="calls in one program")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=RESULTS)
    args = parser.parse_args()
    found: list[tuple[str, str, float]] = []
    every = list(cases(args.rows, args.vocab))
    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        compiled = list(pool.map(lambda c: measure(c, args.times, args.vocab, args.repeats), every))
    print(f"compiled {len(every)} programs in {time.perf_counter() - start:.1f} s", flush=True)
    for case, (run, seconds) in zip(every, compiled, strict=True):
        found.append((case[0], case[1], run()))
        print(f"{case[0]:34} {case[1]:6} {found[-1][2]:9.1f} us   compiled in {seconds:.1f} s")
    versions = {"jax": jax.__version__}
    for row in torch_rows(args.rows, args.vocab, args.times, args.repeats):
        found.append(row)
        print(f"{row[0]:34} {row[1]:6} {row[2]:9.1f} us")
    device = jax.devices()[0].device_kind
    if "torch" in sys.modules:
        versions["torch"] = sys.modules["torch"].__version__
    meta = {
        "command": f"python bench/sampling.py --rows {' '.join(map(str, args.rows))}"
        f" --vocab {args.vocab} --times {args.times} --repeats {args.repeats}",
        "date": datetime.date.today().isoformat(),
        "device": device,
        "versions": versions,
    }
    rows = [
        {"case": case, "implementation": who, "metric": "time", "value": round(us, 2), "unit": "us"}
        for case, who, us in found
    ]
    path = args.out / device_name() / "sampling.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
