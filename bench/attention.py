"""Flash attention on one GPU: aidx beside its peers, device time, one process.

    python bench/attention.py [--quick] [--limit SECONDS] [--rows REGEX] [--stages NAMES]

Stages, in this order and each only while `--limit` lasts:

* `rows`: TFLOP/s of forward and of forward + backward on every row of `ROWS` for aidx, jax.nn's
  cuDNN, torch's SDPA on cuDNN, and tokamax where it is installed.
* `check`: masks and options against f32, and repeats that must be bitwise equal.
* `errors`: RMS and maximum errors of aidx and of cuDNN against f32 on the same inputs.
* `variants`: other tile shapes of aidx.
* `packed_tiles`, `window_tiles`: tiles of packed sequences and of a window; the results of each
  are compared with the first.
* `varlen`, `window`, `deterministic`, `dropout`, `mods`: an option beside what it should cost (see
  `attention_options.py`); aidx through its public door.
* `memory`: the peak of forward + backward over 131072 tokens.

Implementations and variants take turns and the median turn counts, since the clock drifts; every
round has an order of its own, since what ran just before decides at what clock one starts.  A
figure is device time: programs that chain their calls are queued, and the time of one program is
taken off that of several, so that dispatch and wake-up do not count; torch gets bursts of as many
calls, since a GPU runs faster for the first milliseconds after a pause.  Operations: 4*B*N*S^2*H
forward, half when causal, 3.5 times that forward + backward.  Results are written after every row,
into bench/results/<device>/attention.json, or into $OUT where that is set.

Lowering and compiling takes most of a run.  Where AIDX_BENCH_LOCK names a file, several processes
(other `--rows`, other `--stages`) compile beside one another on one GPU and time one after another;
what is timed may then not compile on the GPU: XLA_FLAGS=--xla_gpu_autotune_level=0.
"""

import argparse
import concurrent.futures
import datetime
import functools
import json
import os
import pathlib
import re
import sys
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")

import jax
import jax.numpy as jnp

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import attention_options  # noqa: E402
from bench.device_time import alone, chained, seconds, shuffled  # noqa: E402
from pallas_kernels import flash_attention as fa  # noqa: E402

F, B = fa.ForwardConfig, fa.BackwardConfig
T0 = time.time()

# name: (batch, tokens, heads, KV heads, head_dim)
ROWS = {
    "H128 S4096": (4, 4096, 16, 16, 128),
    "H128 S16384": (1, 16384, 16, 16, 128),
    "H64 S4096": (4, 4096, 32, 32, 64),
    "H64 S16384": (1, 16384, 32, 32, 64),
    "H256 S4096": (4, 4096, 8, 8, 256),
    "H256 S16384": (1, 16384, 8, 8, 256),
    "gqa S4096": (4, 4096, 32, 8, 128),
    "gqa S16384": (1, 16384, 32, 8, 128),
}

PERSISTENT = dict(persistent=True)
RING = dict(block_kv=192, o_in_ring=True, **PERSISTENT)
LATE = dict(late_sum=True)
WIDE = dict(block_kv=64, release="named", **LATE)
COLUMNS = dict(split="columns", do_stages=1, dq_chunks=2)
FORWARD_VARIANTS = {  # head_dim: {name: config}
    128: {
        "default": None,
        "192+late": F(block_kv=192, **LATE),
        "persistent+late": F(**PERSISTENT, **LATE),
        "chained+q2+late": F(q_stages=2, chained=True, **PERSISTENT, **LATE),
        "192+ring+late": F(**RING, **LATE),
        "192+ring+late+lazy": F(**RING, **LATE, lazy_rescale=True),
        "192+ring+lazy": F(**RING, lazy_rescale=True),
    },
    64: {
        "three": F(consumers=3),
        "three+persistent": F(consumers=3, **PERSISTENT),
    },
    256: {
        "one tile": F(**WIDE),
        "persistent": F(**PERSISTENT, **WIDE),
    },
}
BACKWARD_VARIANTS = {
    128: {"base": B()},
    64: {"base": B(block_q=128)},
    256: {"base": B(**COLUMNS), "early": B(early_free=True, **COLUMNS)},
}


def aidx_forward(q, k, v, causal, config=None):
    """(out, lse)."""
    band = fa.Band(right=0 if causal else None)
    return fa.flash_attention_fwd(q, k, v, band=band, scale=q.shape[-1] ** -0.5, config=config)


def aidx_both(q, k, v, do, causal, config=None, deterministic=False):
    """(out, dq, dk, dv)."""
    band = fa.Band(right=0 if causal else None)
    scale = q.shape[-1] ** -0.5
    out, lse = fa.flash_attention_fwd(q, k, v, band=band, scale=scale)
    grads = fa.flash_attention_bwd(
        q, k, v, out, lse, do,
        band=band, scale=scale, config=config, deterministic=deterministic,
    )  # fmt: skip
    return out, *grads[:3]


def cudnn_forward(q, k, v, causal):
    return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")


def cudnn_both(q, k, v, do, causal):
    out, pull = jax.vjp(functools.partial(cudnn_forward, causal=causal), q, k, v)
    return out, *pull(do)


def tokamax_forward(q, k, v, causal):
    import tokamax

    return tokamax.dot_product_attention(q, k, v, is_causal=causal)


def tokamax_both(q, k, v, do, causal):
    out, pull = jax.vjp(functools.partial(tokamax_forward, causal=causal), q, k, v)
    return out, *pull(do)


def inputs(row, seed=0):
    batch, tokens, heads, kv_heads, head_dim = ROWS[row]
    keys = jax.random.split(jax.random.key(seed), 4)
    sizes = (heads, kv_heads, kv_heads, heads)
    shape = lambda n: (batch, tokens, n, head_dim)
    return [
        jax.random.normal(key, shape(n), jnp.bfloat16) for key, n in zip(keys, sizes, strict=True)
    ]


def operations(row, causal):
    batch, tokens, heads, _, head_dim = ROWS[row]
    return 4 * batch * heads * tokens**2 * head_dim / (2 if causal else 1)


# --- programs: lowered on one thread, compiled in a pool ----------------------------------------


def peers(metric):
    """{implementation: f(*inputs, causal)} of the JAX figures."""
    forward = {"aidx": aidx_forward, "cudnn_jax": cudnn_forward}
    both = {"aidx": aidx_both, "cudnn_jax": cudnn_both}
    if HAVE_TOKAMAX:
        forward["tokamax"], both["tokamax"] = tokamax_forward, tokamax_both
    return forward if metric == "fwd" else both


def variants(row, causal, metric, only="."):
    """The same for tile shapes of aidx, where "row mask metric name" matches `only`."""
    head_dim = ROWS[row][-1]
    if metric == "fwd":
        table, f = FORWARD_VARIANTS[head_dim], aidx_forward
    else:
        table, f = BACKWARD_VARIANTS[head_dim], aidx_both
    case = f"{row} {'causal' if causal else 'full'} {metric}"
    return {
        f"aidx:{name}": functools.partial(f, config=config)
        for name, config in table.items()
        if re.search(only, f"{case} {name}")
    }


def compile_all(entries, workers):
    """{(row, causal, metric, name): compiled, or the refusal as text}."""
    refusals = (NotImplementedError, ValueError, RuntimeError)
    text = lambda refusal: f"{type(refusal).__name__}: {str(refusal)[:90]}"
    futures, out = {}, {}
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for row, causal, metric, name, f in entries:
            key = row, causal, metric, name
            args = jax.eval_shape(functools.partial(inputs, row))[: 3 if metric == "fwd" else 4]
            program = jax.jit(chained(functools.partial(f, causal=causal), CALLS[metric]))
            try:
                futures[key] = pool.submit(program.lower(*args).compile)
            except refusals as refusal:
                out[key] = text(refusal)
        for key, future in futures.items():
            try:
                out[key] = future.result()
            except refusals as refusal:
                out[key] = text(refusal)
    return out


CALLS = {"fwd": 4, "fwd+bwd": 2}


def torch_timers(row, causal):
    """{"fwd": timer, "fwd+bwd": timer} of torch SDPA on cuDNN; a timer is as `seconds`."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    batch, tokens, heads, kv_heads, head_dim = ROWS[row]
    make = lambda n: torch.randn(
        batch, n, tokens, head_dim, device="cuda", dtype=torch.bfloat16, requires_grad=True
    )
    q, k, v = make(heads), make(kv_heads), make(kv_heads)
    do = torch.randn_like(q)

    def forward():
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=heads != kv_heads
        )

    def only_forward():
        with torch.no_grad():
            return forward()

    def both():
        return torch.autograd.grad(forward(), (q, k, v), do)

    def took(f, calls):
        start = time.perf_counter()
        for _ in range(calls):
            f()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    def timer(f, calls, queue=4):
        """The same bursts as the JAX programs get, so that the clock treats both alike."""
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            took(f, calls)
            return (took(f, queue * calls) - took(f, calls)) / ((queue - 1) * calls)

    return {
        "fwd": functools.partial(timer, only_forward, CALLS["fwd"]),
        "fwd+bwd": functools.partial(timer, both, CALLS["fwd+bwd"]),
    }


# --- correctness ---------------------------------------------------------------------------------


def errors(got, want):
    """RMS and maximum, relative to the RMS of the truth."""
    norm = jnp.sqrt(jnp.mean(want**2))
    norm = jnp.where(norm > 1e-6, norm, 1.0)  # one key: dQ and dK are zero
    difference = got.astype(jnp.float32) - want
    return float(jnp.sqrt(jnp.mean(difference**2)) / norm), float(jnp.abs(difference).max() / norm)


def corner_oracle(q, k, v, do, causal):
    """(out, dq, dk, dv) in f32."""
    band = fa.Band(right=0 if causal else None)
    f = lambda q, k, v: fa.reference(q, k, v, band=band, scale=q.shape[-1] ** -0.5)[0]
    out, pull = jax.vjp(f, *(x.astype(jnp.float32) for x in (q, k, v)))
    return out, *pull(do.astype(jnp.float32))


def check_errors(rows, causal, report, workers):
    """Errors of aidx beside cuDNN's on 2048 tokens and one KV head of each row's inputs."""
    programs = {}
    for row in rows:
        q, k, v, do = inputs(row)
        group = q.shape[2] // k.shape[2]
        heads = (group, 1, 1, group)
        args = [x[:1, :2048, :n] for x, n in zip((q, k, v, do), heads, strict=True)]
        for name, f in (("f32", corner_oracle), ("aidx", aidx_both), ("cudnn_jax", cudnn_both)):
            program = jax.jit(functools.partial(f, causal=causal)).lower(*args)
            programs[row, name] = args, program
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {key: pool.submit(x.compile) for key, (_, x) in programs.items()}
    for row in rows:
        run = lambda name, row=row: futures[row, name].result()(*programs[row, name][0])
        want = run("f32")
        for name in ("aidx", "cudnn_jax"):
            text = []
            for part, a, b in zip(("out", "dq", "dk", "dv"), run(name), want, strict=True):
                rms, worst = errors(a, b)
                report(row, name, f"rms_error_{part}", rms, "relative")
                report(row, name, f"max_error_{part}", worst, "relative")
                text.append(f"{part} {rms:.2e}/{worst:.3g}")
            print(f"{row} {name:10s} rms/max: {'  '.join(text)}", flush=True)


def check_repeats(row, causal, repeats, report):
    """Whether the forward and the deterministic backward give the same bits every time."""
    q, k, v, do = inputs(row)
    f = jax.jit(functools.partial(aidx_forward, causal=causal))
    g = jax.jit(functools.partial(aidx_both, causal=causal, deterministic=True))
    equal = lambda a, b: functools.reduce(
        jnp.logical_and, [(x == y).all() for x, y in zip(a, b, strict=True)]
    )
    for name, run, count in (
        ("forward", lambda: f(q, k, v), repeats),
        ("deterministic", lambda: g(q, k, v, do), repeats // 2),
    ):
        first, same = run(), jax.jit(equal)
        good = all(bool(same(run(), first)) for _ in range(count))
        case = f"{row} {'causal' if causal else 'full'}"
        report(case, "aidx", f"repeats_equal_{name}", float(good), "bool")
        print(f"{case}: {count} repeats of {name} bitwise equal: {good}", flush=True)


def option_cases():
    """(name, shape (B, T, S, N, K, H, Hv), dtype, options) of masks and options."""
    bf16, f16 = jnp.bfloat16, jnp.float16
    causal, full = fa.Band(right=0), fa.Band()
    lens = lambda *x: jnp.array(x, jnp.int32)
    packed = fa.packed_segments(lens(0, 1, 130, 130, 700, 900), 1001)

    def bounds(band, shape, **kw):
        return fa.dynamic_bounds(band, shape[1], shape[2], **kw)

    yield "T1001", (2, 1001, 1001, 4, 2, 128, 128), f16, dict(band=causal)
    yield "T1", (2, 1, 1, 4, 2, 128, 128), bf16, dict(band=full)
    shape = (2, 200, 457, 4, 2, 128, 128)
    yield "T!=S det", shape, bf16, dict(band=fa.Band(right=0, offset=257), deterministic=True)
    yield "T>S", (2, 457, 200, 4, 2, 128, 128), bf16, dict(band=fa.Band(right=0, offset=-257))
    yield "window", (2, 900, 900, 4, 2, 64, 64), bf16, dict(band=fa.Band(left=70, right=30))
    shape, sinks = (1, 450, 450, 4, 4, 80, 80), jnp.linspace(-1.0, 3.0, 4)
    yield "sinks cap H80", shape, bf16, dict(band=causal, sinks=sinks, soft_cap=20.0)
    shape = (2, 500, 600, 4, 2, 128, 128)
    b = bounds(causal, shape, q_lens=lens(500, 77), kv_lens=lens(0, 333))
    yield "lens", shape, bf16, dict(band=causal, bounds=b)
    shape = (1, 1001, 1001, 4, 1, 128, 128)
    b = bounds(causal, shape, segments=(packed, packed))
    yield "packed", shape, bf16, dict(band=causal, bounds=b)
    yield "H256", (1, 450, 450, 4, 4, 256, 256), bf16, dict(band=causal)
    yield "H192/128", (1, 450, 450, 4, 4, 192, 128), bf16, dict(band=causal)


def option_gradients(options, scale):
    """q, k, v, do -> (out, lse, dq, dk, dv)."""
    forward = {name: x for name, x in options.items() if name != "deterministic"}

    def f(q, k, v, do):
        out, lse = fa.flash_attention_fwd(q, k, v, scale=scale, **forward)
        grads = fa.flash_attention_bwd(q, k, v, out, lse, do, scale=scale, **options)
        return out, lse, *grads[:3]

    return f


def option_oracle(options, scale):
    """The same in f32."""
    forward = {name: x for name, x in options.items() if name != "deterministic"}

    def f(q, k, v, do):
        f32 = [x.astype(jnp.float32) for x in (q, k, v, do)]
        oracle = lambda q, k, v: fa.reference(q, k, v, scale=scale, **forward)
        (out, lse), pull = jax.vjp(oracle, *f32[:3])
        return out, lse, *pull((f32[3], jnp.zeros_like(lse)))

    return f


def option_inputs(shape, dtype):
    b, t, s, n, kv, h, hv = shape
    shapes = ((b, t, n, h), (b, s, kv, h), (b, s, kv, hv), (b, t, n, hv))
    keys = jax.random.split(jax.random.key(1), 4)
    return [jax.random.normal(key, x, dtype) for key, x in zip(keys, shapes, strict=True)]


NO_TUNING = {"xla_gpu_autotune_level": 0}  # the oracle's matmuls are not timed


def check_options(report, workers):
    """Every case against f32, forward and backward: the relative RMS errors must be small."""
    lowered = {}
    for name, shape, dtype, options in option_cases():
        args, scale = option_inputs(shape, dtype), shape[5] ** -0.5
        pair = (option_gradients(options, scale), option_oracle(options, scale))
        lowered[name] = args, [jax.jit(f).lower(*args) for f in pair]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {
            name: (args, pool.submit(pair[0].compile), pool.submit(pair[1].compile, NO_TUNING))
            for name, (args, pair) in lowered.items()
        }
    bad = []
    for name, (args, mine, oracle) in futures.items():
        got, want = mine.result()(*args), oracle.result()(*args)
        parts = ("out", "lse", "dq", "dk", "dv")
        pairs = zip(parts, got, want, strict=False)
        found = {p: errors(a, w)[0] for p, a, w in pairs if p != "lse"}
        lse, got_lse = want[1], got[1]
        infinite = bool((jnp.isneginf(lse) == jnp.isneginf(got_lse)).all())
        found["lse"] = float(jnp.abs(jnp.where(jnp.isneginf(lse), 0.0, got_lse - lse)).max())
        for part, value in found.items():
            report(f"option {name}", "aidx", f"rms_error_{part}", value, "relative")
        if not (infinite and all(x < 0.02 for x in found.values())):
            bad.append(name)
            print(f"  WRONG {name}: {found} -inf agrees: {infinite}", flush=True)
    verdict = "all right" if not bad else "WRONG: " + ", ".join(bad)
    print(f"{len(futures)} options at {time.time() - T0:.0f} s: {verdict}", flush=True)


# --- main ----------------------------------------------------------------------------------------


def has_tokamax():
    import importlib.util

    return importlib.util.find_spec("tokamax") is not None


HAVE_TOKAMAX = has_tokamax()


class Results:
    """Rows of figures, written whenever one is complete."""

    def __init__(self, device):
        name = "h200" if "H200" in device else re.sub(r"\W+", "_", device.lower())
        self.folder = pathlib.Path(os.environ.get("OUT", ROOT / "bench" / "results" / name))
        self.meta = dict(
            command=" ".join(["python bench/attention.py", *sys.argv[1:]]),
            date=datetime.date.today().isoformat(),
            device=device,
            versions={"jax": jax.__version__},
        )
        self.rows = []

    def add(self, case, implementation, metric, value, unit):
        row = dict(case=case, implementation=implementation, metric=metric, value=value, unit=unit)
        self.rows.append(row)

    def write(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(dict(meta=self.meta, rows=self.rows), indent=1)
        (self.folder / "attention.json").write_text(text + "\n")


def measure(row, causal, programs, with_torch, results, rounds):
    """Time one row's programs in turns, the median of `rounds`; print and keep the figures.

    In turns, because the clock of the GPU drifts by several percent within a minute.
    """
    case = f"{row} {'causal' if causal else 'full'}"
    args, work, figures = inputs(row), operations(row, causal), {}
    share = {"fwd": 1.0, "fwd+bwd": 3.5}
    timers = {}
    for (_, _, metric, name), program in programs.items():
        if isinstance(program, str):
            print(f"  {case} {metric} {name}: {program}", flush=True)
            continue
        given = args[:3] if metric == "fwd" else args
        timers[metric, name] = functools.partial(seconds, program, given, CALLS[metric], repeats=1)
    if with_torch:
        try:
            for metric, timer in torch_timers(row, causal).items():
                timers[metric, "cudnn_torch"] = timer
        except ImportError as refusal:
            print(f"  {case} torch: {refusal}", flush=True)
    times = {key: [] for key in timers}
    with alone():
        for turn in range(rounds):
            for key in sorted(shuffled(timers, turn), key=lambda key: key[0]):  # metric by metric
                times[key].append(timers[key]())
    for (metric, name), taken in times.items():
        figures[metric, name] = work * share[metric] / sorted(taken)[len(taken) // 2]
    del args
    for metric in share:
        found = {name: x / 1e12 for (m, name), x in figures.items() if m == metric}
        for name, x in found.items():
            results.add(case, name, metric, x, "TFLOP/s")
        if found:
            line = "  ".join(f"{name} {x:.0f}" for name, x in found.items())
            print(f"{case:20s} {metric:8s} {line}", flush=True)
    results.write()


def measure_rows(rows, masks, table, with_torch, results, workers, limit, rounds):
    """Rows of one sequence length at a time: compile them together, then time them."""
    for length in dict.fromkeys(ROWS[row][1] for row in rows):
        if time.time() - T0 > limit:
            print(f"limit: no rows of {length} tokens", flush=True)
            continue
        chosen = [(row, causal) for row in rows if ROWS[row][1] == length for causal in masks]
        entries = [
            (row, causal, metric, name, f)
            for row, causal in chosen
            for metric in ("fwd", "fwd+bwd")
            for name, f in table(row, causal, metric).items()
        ]
        programs = compile_all(entries, workers)
        print(f"{len(programs)} programs of {length} at {time.time() - T0:.0f} s", flush=True)
        for pair in chosen:
            own = {key: x for key, x in programs.items() if key[:2] == pair}
            measure(*pair, own, with_torch, results, rounds)


def measure_options(stage, options, results, workers):
    """The cases of one stage of `attention_options`, while the time lasts."""
    for case in attention_options.STAGES[stage]():
        if time.time() - T0 > options.limit:
            print(f"limit: no {case.name}", flush=True)
        elif re.search(options.rows, case.name):
            attention_options.measure(case, results, workers)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rows, causal only")
    parser.add_argument("--limit", type=float, default=900.0, help="start nothing after this")
    parser.add_argument("--rows", default=".", help="regular expression on the row names")
    parser.add_argument("--error-rows", default="S4096", help="rows of the stage `errors`")
    parser.add_argument("--stages", default="rows,check,errors,variants")
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--only", default=".", help="variants: regex on 'row mask metric name'")
    parser.add_argument("--rounds", type=int, default=5, help="turns whose median counts")
    options = parser.parse_args()

    rows, masks = [x for x in ROWS if re.search(options.rows, x)], (False, True)
    if options.quick:
        rows, masks = ["H128 S4096", "gqa S4096"], (True,)
    workers = min(14, os.cpu_count() or 1)
    results = Results(jax.devices()[0].device_kind)
    print(jax.__version__, results.meta["device"], f"tokamax {HAVE_TOKAMAX}", flush=True)
    timed = functools.partial(measure_rows, rows, masks)
    rest = dict(results=results, workers=workers, limit=options.limit, rounds=options.rounds)
    inexact = [row for row in rows if re.search(options.error_rows, row)]
    stages = {
        "rows": lambda: timed(lambda row, causal, metric: peers(metric), True, **rest),
        "check": lambda: (
            check_options(results.add, workers),
            [check_repeats(rows[0], x, options.repeats, results.add) for x in masks],
        ),
        "errors": lambda: check_errors(inexact, True, results.add, workers),
        "variants": lambda: timed(functools.partial(variants, only=options.only), False, **rest),
        "memory": lambda: attention_options.check_memory(results),
    }
    for name in attention_options.STAGES:
        stages[name] = functools.partial(measure_options, name, options, results, workers)
    for name in options.stages.split(","):
        if time.time() - T0 > options.limit:
            print(f"limit: no {name}", flush=True)
            continue
        stages[name]()
        results.write()
    print(f"total {time.time() - T0:.0f} s", flush=True)


if __name__ == "__main__":
    main()
