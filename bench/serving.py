"""Serving, end to end: output tokens a second beside what else serves the same weights.

    python bench/serving.py             # on a CPU: the embedded model beside transformers
    python bench/serving.py             # on a GPU: Llama shapes with random weights
    python bench/serving.py --models llama-3.2-1b --runs b1 b8

CPU: float32, prompts of 8-256 and outputs of 16-256 tokens cut from Python's standard library, at
concurrency 1, 8 and 32.  Of each concurrency there are four times as many requests (eight at 1): as
one ends the next begins, and the last wave drains.  Peers (where torch and transformers are
installed) are transformers one by one and as left-padded `generate`s of so many at a time, same
requests, same weights, same run, in turns with aidx (the slower way once); medians count.  All are
greedy and ignore the end of text; how many of aidx's outputs equal transformers' token for token is
in the results.

GPU: bf16, runs as in the table of vLLM's: b1 (a prompt of 128), b8, b64, b256 (prompts of 512), 128
output tokens each; chat512: 512 requests of lognormal lengths; at most 256 running.  `decode step`
is the median time of a call of `engine.step` in which every row decodes, also with top-k and top-p
on every row.  `pool` is chat512 again, for the share of the reserved tokens that live; `prefix`
sends requests one by one behind a system prompt of 2048 tokens, each one's own and then the same
for all.  `orders` (on demand) is chat512 in five other orders: 256 run at once, so where the
longest requests stand decides how long a tail of few rows lasts, and the mark's order is not known.
vLLM and the plain-XLA step are not on that machine: their rows are the figures of 2026-11-22, times
this run's device copy rate over that day's.
"""

import argparse
import dataclasses
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import inspect
import json
import pathlib
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from aidx.cli.bench import serve
from aidx.cli.options import embedded_path
from aidx.engine import SamplingParams
from aidx.llm import LLM
from aidx.models import PRESETS, Model, init_params

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
COPY_TB_S = 4.29  # device copy on the day of the marks
VLLM = "vLLM 0.22.1 (mark)"
UNROLLED = "plain XLA step (mark)"
MARKS = {  # output tokens/s
    ("llama-3.1-8b", VLLM): {
        "b1": 200, "b8": 1368, "b64": 5110, "b256": 6934, "chat512": 9112},
    ("llama-3.2-1b", VLLM): {
        "b1": 784, "b8": 5537, "b64": 21103, "b256": 29649, "chat512": 25939},
}  # fmt: skip
STEP_MARKS = {  # ms a decode step
    ("llama-3.1-8b", UNROLLED): {"b1": 4.26, "b8": 4.44, "b64": 6.04, "b256": 11.6},
    ("llama-3.2-1b", UNROLLED): {"b1": 1.38, "b8": 1.07, "b64": 1.54, "b256": 2.79},
}
RUNS = ("b1", "b8", "b64", "b256", "chat512", "pool", "prefix")
ORDERS = 5  # of the run `orders`

Request = tuple[list[int], int]  # prompt ids, tokens to generate


def row(case: str, who: str, metric: str, value: float, unit: str) -> dict:
    print(f"{case:28} {who:28} {metric:24} {value:12.3f} {unit}", flush=True)
    value = float(f"{value:.5g}")
    return {"case": case, "implementation": who, "metric": metric, "value": value, "unit": unit}


def write(rows: list[dict], device: str, out: pathlib.Path, extra: dict) -> None:
    packages = ("jax", "torch", "transformers")
    versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
    meta = {
        "command": "python bench/serving.py" + "".join(f" {a}" for a in sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        **extra,
    }
    path = out / device / "serving.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")


def tokens_per_second(seconds: float, outputs: list) -> float:
    failed = [o.outputs[0] for o in outputs if o.outputs[0].finish_reason == "error"]
    if failed:
        raise RuntimeError(f"{len(failed)} requests failed: {failed[0].stop_reason}")
    return sum(len(o.outputs[0].token_ids) for o in outputs) / seconds


# --- CPU: the embedded model beside transformers -------------------------------------------------


def mixed_requests(count: int, tokenizer, seed: int) -> list[Request]:
    """Pieces of argparse's source: prompts of 8-256 tokens, 16-256 tokens to generate."""
    tokens = tokenizer.encode(inspect.getsource(argparse))
    rng = np.random.default_rng(seed)
    requests = []
    for _ in range(count):
        length, new = int(rng.integers(8, 257)), int(rng.integers(16, 257))
        start = int(rng.integers(0, len(tokens) - length))
        requests.append((tokens[start : start + length], new))
    return requests


def transformers_ways(path, requests: list[Request], concurrency: int):
    """name -> function () -> (seconds, outputs): transformers one by one, and padded."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model.generation_config = transformers.GenerationConfig(
        do_sample=False, eos_token_id=None, pad_token_id=0
    )

    @torch.inference_mode()
    def generate(batch: list[Request]) -> list[list[int]]:
        width, new = max(len(p) for p, _ in batch), max(n for _, n in batch)
        ids = torch.tensor([[0] * (width - len(p)) + p for p, _ in batch])
        mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in batch])
        out = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=new)
        return [r[width : width + n].tolist() for r, (_, n) in zip(out, batch, strict=True)]

    def timed(size: int) -> tuple[float, list[list[int]]]:
        generate([(requests[0][0], 2)])
        begun, outputs = time.perf_counter(), []
        for i in range(0, len(requests), size):
            outputs += generate(requests[i : i + size])
        return time.perf_counter() - begun, outputs

    sizes = {"transformers one by one": 1}
    if concurrency > 1:
        sizes["transformers padded"] = concurrency
    return {name: functools.partial(timed, size) for name, size in sizes.items()}


def on_cpu(args: argparse.Namespace) -> None:
    path = args.model or embedded_path()
    torch = all(importlib.util.find_spec(p) for p in ("torch", "transformers"))
    rows = []
    for concurrency in args.concurrency:
        case = f"{concurrency} at once"
        llm = LLM(
            path,
            dtype="float32",
            max_num_seqs=concurrency,
            max_num_batched_tokens=256,
            max_model_len=512,
            enable_prefix_caching=False,  # the prompts overlap, and a peer caches nothing
            warmup="greedy",
        )
        count = args.num_prompts or max(8, args.waves * concurrency)
        requests = mixed_requests(count, llm.tokenizer, seed=0)
        ways = transformers_ways(path, requests, concurrency) if torch else {}
        speeds, theirs = {name: [] for name in ("aidx", *ways)}, {}
        for _ in range(args.repeats):  # in turns: a machine's speed drifts
            seconds, outputs = serve(llm, requests, concurrency)
            speeds["aidx"].append(tokens_per_second(seconds, outputs))
            for name, way in ways.items():
                seconds, theirs[name] = way()
                speeds[name].append(sum(map(len, theirs[name])) / seconds)
            best = max(ways, key=lambda name: speeds[name][-1], default=None)
            ways = {name: way for name, way in ways.items() if name == best}
        middle = statistics.median(speeds["aidx"])
        rows.append(row(case, "aidx", "output tokens/s", middle, "tokens/s"))
        for name, metric in (("TTFT", "time_to_first_token"), ("ITL", "inter_token_latency")):
            ms = 1e3 * statistics.median(getattr(o.metrics, metric) for o in outputs)
            rows.append(row(case, "aidx", f"{name} p50", ms, "ms"))
        texts = {
            (tuple(o.prompt_token_ids), len(o.outputs[0].token_ids)): o.outputs[0].token_ids
            for o in outputs
        }
        for name, answers in theirs.items():
            speed = statistics.median(speeds[name])
            rows.append(row(case, name, "output tokens/s", speed, "tokens/s"))
            equal = sum(
                list(texts[tuple(p), n]) == t for (p, n), t in zip(requests, answers, strict=True)
            )
            share = 100 * equal / len(requests)
            rows.append(row(case, name, "outputs equal to aidx's", share, "%"))
        del llm
        gc.collect()
    requests = args.num_prompts or f"{args.waves} waves, 8 at least"
    extra = {"requests": requests, "model": path.name, "dtype": "float32"}
    write(rows, "cpu", args.out, extra)


# --- GPU: Llama shapes with random weights -------------------------------------------------------


def run_requests(name: str, vocab_size: int, seed: int = 0) -> list[Request]:
    """The requests of a run, as in the module's docstring."""
    rng = np.random.default_rng(seed)
    prompt = lambda n: rng.integers(0, vocab_size, n).tolist()
    if name not in ("chat512", "orders", "pool"):
        count = int(name[1:])
        return [(prompt(128 if count == 1 else 512), 128) for _ in range(count)]
    # Quantiles of lognormals in random order: medians 134 and 164, 107k output tokens in all.
    normal = [statistics.NormalDist().inv_cdf((i + 0.5) / 512) for i in range(512)]
    inputs = np.clip(134 * np.exp(0.9 * rng.permutation(normal)), 4, 2048).astype(int)
    outputs = np.clip(164 * np.exp(0.7 * rng.permutation(normal)), 4, 2048).astype(int)
    return [(prompt(i), int(o)) for i, o in zip(inputs, outputs, strict=True)]


def copy_rate() -> float:
    """TB/s of a device copy, read and written bytes counted."""
    x = jnp.zeros(2**29, jnp.float32)  # bytes would be added one by one, at a third of the rate
    copy = jax.jit(lambda x: x + 1)
    copy(x).block_until_ready()
    seconds = []
    for _ in range(5):
        begun = time.perf_counter()
        for _ in range(10):
            y = copy(x)
        y.block_until_ready()
        seconds.append((time.perf_counter() - begun) / 10)
    return 2 * x.nbytes / min(seconds) / 1e12


def decode_step_ms(llm: LLM, requests: list[Request], **sampling) -> float:
    """Median milliseconds of the steps in which every request decodes."""
    for i, (prompt, new) in enumerate(requests):
        params = SamplingParams(
            max_tokens=new, ignore_eos=True, detokenize=False, seed=i, **sampling
        )
        llm.engine.add_request(prompt, params)
    prefilled = -(-sum(len(p) for p, _ in requests) // llm.engine.config.max_num_batched_tokens)
    times = []
    while llm.engine.has_unfinished:
        begun = time.perf_counter()
        llm.engine.step()
        times.append(time.perf_counter() - begun)
    steady = times[prefilled + 4 : -4]
    return 1e3 * statistics.median(steady)


def pool_rows(llm: LLM, case: str, requests: list[Request]) -> list[dict]:
    """Live over reserved tokens while `requests` run, the mean over steps with somebody running."""
    for prompt, new in requests:
        params = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        llm.engine.add_request(prompt, params)
    shares, used = [], []
    while llm.engine.has_unfinished:
        llm.engine.step()
        stats = llm.engine.stats()
        if stats.running:
            shares.append(stats.pool_utilization)
            used.append(stats.pool_use)
    return [
        row(case, "aidx", "pool utilisation", 100 * statistics.mean(shares), "%"),
        row(case, "aidx", "pool use, most", 100 * max(used), "%"),
    ]


def order_rows(llm: LLM, case: str, requests: list[Request]) -> list[dict]:
    """Output tokens/s of the same requests in `ORDERS` random orders."""
    speeds = []
    for seed in range(1, ORDERS + 1):
        order = np.random.default_rng(seed).permutation(len(requests))
        seconds, outputs = serve(llm, [requests[i] for i in order], len(requests))
        speeds.append(tokens_per_second(seconds, outputs))
    which = {"least": min(speeds), "median": statistics.median(speeds), "most": max(speeds)}
    return [row(case, "aidx", f"output tokens/s, {k}", v, "tokens/s") for k, v in which.items()]


def prefix_rows(llm: LLM, case: str, vocab_size: int, count: int = 24, shared: int = 2048):
    """Time to the first token behind a system prompt, one that each request has for itself and
    one that all share, and how much of the latter's prompts the prefix cache holds."""
    engine, rng = llm.engine, np.random.default_rng(3)
    before = engine._batch.config
    caching = dataclasses.replace(before, enable_prefix_caching=True)
    engine._batch = dataclasses.replace(engine._batch, config=caching)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, detokenize=False)
    system = rng.integers(0, vocab_size, shared).tolist()
    rows, medians, hits, tokens = [], [], 0, 1
    for label in ("own", "shared"):
        first, hits, tokens = [], 0, 0
        for _ in range(count):
            head = system if label == "shared" else rng.integers(0, vocab_size, shared).tolist()
            prompt = [*head, *rng.integers(0, vocab_size, int(rng.integers(32, 129))).tolist()]
            [output] = llm.generate([prompt], params)
            first.append(1e3 * output.metrics.time_to_first_token)
            hits, tokens = hits + output.num_cached_tokens, tokens + len(prompt)
        medians.append(statistics.median(first))
        rows.append(row(case, "aidx", f"TTFT p50, {label} prompt", medians[-1], "ms"))
    rows.append(row(case, "aidx", "prefix-cache hit rate", 100 * hits / tokens, "%"))
    rows.append(row(case, "aidx", "TTFT gain", medians[0] / medians[1], "x"))
    engine._batch = dataclasses.replace(engine._batch, config=before)
    return rows


def on_gpu(args: argparse.Namespace) -> None:
    rate = copy_rate()
    scale = rate / COPY_TB_S
    extra = {"dtype": "bfloat16", "marks": f"of 2026-11-22, x {scale:.3f} (copy rate)"}
    kind = jax.devices()[0].device_kind.lower()
    device = "h200" if "h200" in kind else kind.replace(" ", "-")
    rows = [row("device copy", "aidx", "bandwidth", rate, "TB/s")]
    for name in args.models:
        begun = time.perf_counter()
        config = dataclasses.replace(PRESETS[name], max_model_len=4096)
        params = init_params(config, jax.random.key(0), jnp.bfloat16)
        llm = LLM(
            Model(config, params),
            max_num_seqs=256,
            max_num_batched_tokens=args.max_num_batched_tokens,
            enable_prefix_caching=False,
            implementation=args.implementation,
            warmup="greedy",
        )
        rows.append(row(name, "aidx", "start-up", time.perf_counter() - begun, "s"))
        for run in args.runs:
            requests = [] if run == "prefix" else run_requests(run, config.vocab_size)
            case = f"{name} {run}"
            if run == "orders":
                rows += order_rows(llm, case, requests)
            if run == "pool":
                rows += pool_rows(llm, case, requests)
            if run == "prefix":
                rows += prefix_rows(llm, case, config.vocab_size)
            if run in ("orders", "pool", "prefix"):
                continue
            seconds, outputs = serve(llm, requests, len(requests))
            speed = tokens_per_second(seconds, outputs)
            rows.append(row(case, "aidx", "output tokens/s", speed, "tokens/s"))
            mark = MARKS.get((name, VLLM), {}).get(run)
            if mark:
                rows.append(row(case, VLLM, "output tokens/s", mark * scale, "tokens/s"))
            write(rows, device, args.out, extra)  # a run that is cut short keeps what it measured
            if run == "chat512":
                continue
            ms = decode_step_ms(llm, requests, temperature=0)
            rows.append(row(case, "aidx", "decode step", ms, "ms"))
            mark = STEP_MARKS.get((name, UNROLLED), {}).get(run)
            if mark:
                rows.append(row(case, UNROLLED, "decode step", mark / scale, "ms"))
            if run == "b64":
                full = {"temperature": 0.7, "top_k": 50, "top_p": 0.9}
                decode_step_ms(llm, requests[:64], **full)  # compiles what "greedy" left out
                ms = decode_step_ms(llm, requests, **full)
                rows.append(row(case, "aidx", "decode step, top-k and top-p", ms, "ms"))
        write(rows, device, args.out, extra)
        del llm, params
        gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=pathlib.Path, default=RESULTS)
    add("--model", type=pathlib.Path, help="CPU: another checkpoint than the embedded one")
    add("--concurrency", type=int, nargs="+", default=[1, 8, 32], help="CPU")
    add(
        "--waves", type=int, default=4, help="CPU: requests of each concurrency, in multiples of it"
    )
    add("--num-prompts", type=int, help="CPU: requests, in place of --waves")
    add("--repeats", type=int, default=3, help="CPU: medians of so many turns")
    add("--models", nargs="+", default=["llama-3.2-1b", "llama-3.1-8b"], help="GPU: shapes")
    add("--runs", nargs="+", default=list(RUNS), choices=(*RUNS, "orders"), help="GPU")
    add("--max-num-batched-tokens", type=int, default=8192, help="GPU")
    add("--implementation", help="GPU: of paged attention, default the best there is")
    args = parser.parse_args()
    if jax.default_backend() == "cpu":
        on_cpu(args)
    else:
        on_gpu(args)


if __name__ == "__main__":
    main()
