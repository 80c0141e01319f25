"""Variants of the paged kernels in turns, each held against dense f32 before its time counts.

    python bench/paged_attention.py --sections duel [--rows REGEX] [--limit S] [--dry]

Every variant of a case is compiled, gives its first output, which has to agree with the reference,
and is then timed in turns with the others, so that clock and neighbours are the same for all: the
time is the median of the rounds, `cupti` the sum of the kernels of a call.  A variant that fails
says so and the rest go on.  Names of cases begin with the group: `narrow`, `small`, `row`, `chunk`.
"""

import concurrent.futures
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
import paged_common as bench
from device_time import alone

from pallas_kernels import paged_attention as pa

ROUNDS = 3
S, C, P = pa.SplitConfig, pa.ClusterConfig, pa.PrefillConfig
NARROW = {"default": None, "c264s6": S(ctas=264, stages=6)}
ROWS = {"default": None, "cut": S(), "uncut": S(uncut=True)}
SMALL = {
    "1x1k": {"default": None, "8 x 1": C(8, 1, 2), "8 x 2": C(8, 2, 1), "4 x 2": C(4, 2, 2)},
    "1x4k": {"default": None, "8 x 1": C(8, 1, 4), "8 x 2": C(8, 2, 2), "8 x 2, 3": C(8, 2, 3)},
    "8x4k": {"default": None, "2 x 1": C(2, 1, 4), "2 x 2, 3": C(2, 2, 3)},
    "1x32k": {"default": None, "8 x 1": C(8, 1, 6), "8 x 2, 2": C(8, 2, 2)},
}
CHUNKS = {"default": None, "kv128": P(2, 128, 2), "kv192": P(2, 192, 2)}


def cases():
    """(case, rows of (context, new), kind of pools, block size, {label: call})."""
    for size in (64, 16):
        for name in ("64x4k", "16x32k"):
            calls = bench.aidx_call(None)
            yield (
                f"narrow{size} {name} bf16",
                bench.decode(bench.LARGE[name]),
                "bf16",
                size,
                dict(default=calls),
            )
        for kind in bench.NARROW:
            for name in ("64x4k", "16x32k"):
                calls = {x: bench.narrow_call(config) for x, config in NARROW.items()}
                yield (
                    f"narrow{size} {name} {kind}",
                    bench.decode(bench.LARGE[name]),
                    kind,
                    size,
                    calls,
                )
    for size in (64, 16):
        for name, chosen in SMALL.items():
            count, context = (int(x) for x in name[:-1].split("x"))
            calls = {x: bench.aidx_call(config) for x, config in chosen.items()}
            yield f"small{size} {name}", [(context * 1024, 1)] * count, "bf16", size, calls
        calls = {x: bench.aidx_call(config) for x, config in ROWS.items()}
        for name in ("64x1k", "256x1k", "64x4k"):
            yield f"row{size} {name}", bench.decode(bench.LARGE[name]), "bf16", size, calls
        calls = {x: bench.aidx_call(config, 512) for x, config in CHUNKS.items()}
        for name in list(bench.CHUNKS)[:2]:
            yield f"chunk{size} {name}", bench.CHUNKS[name], "bf16", size, calls


def program(call):
    """(q after CALLS more calls, output of the first)."""
    one = jax.jit(call)

    def run(q, k, v, tabs, lens, indptr):
        q = first = one(q, k, v, tabs[0], lens, indptr)
        for t in tabs:
            q = one(q, k, v, t, lens, indptr)
        return q, first

    return jax.jit(run)


def error(first, args):
    """Largest difference from f32, in parts of the largest value, on the outer rows."""
    q, k, v, tabs, lens, indptr = args
    scales = {}
    if isinstance(k, tuple):
        scales = dict(k_scale=k[1], v_scale=v[1])
        k, v = k[0], v[0]
    rows = sorted({0, 1, lens.shape[0] // 2, lens.shape[0] - 1} & set(range(lens.shape[0])))
    begin, end = np.asarray(indptr[:-1]), np.asarray(indptr[1:])
    worst = 0.0
    for r in rows:
        tokens = np.unique(np.clip([begin[r], begin[r] + 77, end[r] - 1], begin[r], end[r] - 1))
        for t in tokens:
            seen = lens[r] - (int(end[r]) - 1 - int(t))
            ref = reference(q[t : t + 1], k, v, tabs[0][r : r + 1], seen[None], **scales)
            ref = np.asarray(ref)
            worst = max(worst, np.abs(np.asarray(first[t], np.float32) - ref).max() / ref.std())
    return worst


@jax.jit
def reference(q, k, v, table, lens, **scales):
    return pa.paged_attention_reference(q, k, v, table, lens, jnp.array([0, 1]), **scales)[0][0]


def run(pattern, limit, sds, dry, rows_out):
    """Case after case, lowered before its own clock runs; results are written after each."""
    threads = concurrent.futures.ThreadPoolExecutor(8)
    chosen = [c for c in cases() if re.search(pattern, c[0])]
    layout = pools = None
    for case in chosen:
        name, rows, kind, size, _ = case
        if time.time() - bench.T0 > limit:
            bench.say("out of time before", name)
            break
        jobs = lower_all(case, sds, threads)
        if dry:
            for label, job in jobs.items():
                job.result()
                bench.say(name, label, "compiled")
            continue
        for job in jobs.values():
            job.exception()  # compiled, or not: what follows has the device to itself
        with alone():
            if layout != (size, kind):
                layout, pools = (size, kind), None
                pools = bench.fresh_pools(size, kind)
                if kind == "bf16":
                    rate = bench.copy_rate(pools[0])
                    bench.say(f"copy {rate:.2f} TB/s")
                    rows_out.append(bench.row("copy", "device", "bandwidth", rate, "TB/s"))
            args = bench.arguments(rows, size, pools)
            ready = right(name, jobs, args)
            times = {label: [] for label in ready}
            for _ in range(ROUNDS):
                for label, (compiled, _) in ready.items():
                    us = bench.seconds(compiled, args) / (bench.CALLS + 1) * 1e6
                    times[label].append(us)
            for label, (compiled, err) in ready.items():
                report(name, rows, kind, label, compiled, args, err, times[label], rows_out)
        bench.write(rows_out, "paged_duel")
    if not dry and any(name.startswith("chunk") for name, *_ in chosen):
        with alone():
            bench.dense(rows_out)
        bench.write(rows_out, "paged_duel")


def lower_all(case, sds, threads):
    """label -> the compilation under way."""
    name, rows, kind, size, calls = case
    jobs = {}
    for label, call in calls.items():
        try:
            lowered = bench.lower(program(call), rows, size, sds, kind)
            jobs[label] = threads.submit(lowered.compile)
        except Exception as e:
            bench.say(name, label, "LOWER FAIL", type(e).__name__, str(e)[:300])
    return jobs


def right(name, jobs, args):
    """label -> (program, error) of those whose first output agrees with the reference."""
    ready = {}
    for label, job in jobs.items():
        try:
            compiled = job.result()
            err = error(compiled(*args)[1], args)
            if err < 0.05:
                ready[label] = compiled, err
            else:
                bench.say(f"{name:26s} {label:18s} WRONG {err:.4f}")
        except Exception as e:
            bench.say(name, label, "FAIL", type(e).__name__, str(e)[:300])
    return ready


def report(name, rows, kind, label, compiled, args, err, times, rows_out):
    """One line, and rows of the results."""
    us = sorted(times)[len(times) // 2]
    text = ""
    try:
        kernels, parts = bench.cupti(compiled, args, bench.CALLS + 1)
        text = f"cupti {kernels:7.2f} " + " ".join(f"{a}={b:.2f}" for a, b in parts.items())
        rows_out.append(bench.row(name, label, "kernel time", kernels, "us"))
    except Exception as e:
        text = f"cupti FAIL {type(e).__name__}"
    if name.startswith("chunk"):
        rate, unit = bench.operations(rows) / us / 1e6, "TFLOP/s"
    else:
        bytes_ = (bench.H + 4) * 2 if kind in bench.NARROW else bench.H * 4
        rate, unit = sum(n for n, _ in rows) * bench.K * bytes_ / us / 1e6, "TB/s"
    spread = " ".join(f"{t:.1f}" for t in times)
    bench.say(
        f"{name:26s} {label:18s} {us:8.2f} us [{spread}] {rate:7.2f} {unit} err {err:.4f} {text}"
    )
    rows_out.append(bench.row(name, label, "time", us, "us"))
    rows_out.append(bench.row(name, label, "rate", rate, unit))
