"""Flash attention on one GPU: aidx beside its peers, device time, one process.

    python bench/attention.py [--quick] [--variants] [--check] [--limit SECONDS] [--rows REGEX]

Every row of `ROWS`: errors of aidx and of jax.nn's cuDNN against f32 on the same inputs, repeats
that must be bitwise equal, then TFLOP/s of forward and of forward + backward for aidx, jax.nn's
cuDNN, torch's SDPA on cuDNN, and tokamax where it is installed.  A JAX figure is the time of one
program that chains its calls, divided by their number; a torch figure is events around a queue of
calls.
Operations: 4*B*N*S^2*H forward, half when causal, 3.5 times that forward + backward.
`--variants` times other tile shapes of aidx as well; `--check` compares masks and options with f32.
Writes bench/results/<device>/attention.json, or into $OUT where that is set.
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

FORWARD_VARIANTS = {  # (head_dim, causal): name: config
    (128, False): {
        "kv128": F(),
        "kv192": F(block_kv=192),
        "pers": F(persistent=True),
        "kv128+nkv": F(release="named"),
    },
    (128, True): {
        "kv128": F(),
        "kv192": F(block_kv=192),
        "pers": F(persistent=True),
        "kv128+nkv": F(release="named"),
    },
    (64, False): {
        "3wg": F(consumers=3),
        "3wg+poly2": F(consumers=3, late_sum=True, poly=2),
        "3wg-pp+poly2": F(consumers=3, pingpong=False, late_sum=True, poly=2),
    },
    (64, True): {
        "3wg": F(consumers=3),
        "3wg-pp+pers+poly2": F(consumers=3, pingpong=False, persistent=True, late_sum=True, poly=2),
        "pers+s3+poly3": F(persistent=True, stages=3, late_sum=True, poly=3),
    },
    (256, False): {
        "nkv": F(block_kv=64, release="named"),
        "late": F(block_kv=64, late_sum=True),
        "pers": F(block_kv=64, persistent=True),
    },
    (256, True): {
        "nkv": F(block_kv=64, release="named"),
        "late": F(block_kv=64, late_sum=True),
        "pers": F(block_kv=64, persistent=True),
    },
}
BACKWARD_VARIANTS = {
    128: {"named": B(), "mbar": B(sync="mbar")},
    64: {"named": B(block_q=128), "mbar": B(block_q=128, sync="mbar")},
    256: {},
}


def aidx_forward(q, k, v, causal, config=None):
    """(out, lse)."""
    band = fa.Band(right=0 if causal else None)
    return fa.flash_attention_fwd(q, k, v, band=band, scale=q.shape[-1] ** -0.5, config=config)


def aidx_both(q, k, v, do, causal, config=None):
    """(out, dq, dk, dv)."""
    band = fa.Band(right=0 if causal else None)
    scale = q.shape[-1] ** -0.5
    out, lse = fa.flash_attention_fwd(q, k, v, band=band, scale=scale)
    grads = fa.flash_attention_bwd(q, k, v, out, lse, do, band=band, scale=scale, config=config)
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


def chained(f, calls):
    """One program of `calls` calls, each waiting for the one before; inputs stay what they are."""

    def body(_, state):
        total, *args = state
        out = f(*args)
        total = total + sum(x.ravel()[0].astype(jnp.float32) for x in jax.tree.leaves(out))
        return jax.lax.optimization_barrier((total, *args))

    return lambda *args: jax.lax.fori_loop(0, calls, body, (jnp.float32(0), *args))[0]


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


def seconds(compiled, args, calls, repeats=3):
    jax.block_until_ready(compiled(*args))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(compiled(*args))
        times.append(time.perf_counter() - start)
    return sorted(times)[repeats // 2] / calls


# --- programs: lowered on one thread, compiled in a pool -----------------------------------------


def plan(rows, masks, variants):
    """(row, causal, metric, implementation, function of the inputs) of every JAX figure."""
    for row in rows:
        head_dim = ROWS[row][-1]
        for causal in masks:
            forward = {"aidx": aidx_forward, "cudnn_jax": cudnn_forward}
            both = {"aidx": aidx_both, "cudnn_jax": cudnn_both}
            if HAVE_TOKAMAX:
                forward["tokamax"], both["tokamax"] = tokamax_forward, tokamax_both
            if variants:
                for name, config in FORWARD_VARIANTS[head_dim, causal].items():
                    forward[f"aidx:{name}"] = functools.partial(aidx_forward, config=config)
                for name, config in BACKWARD_VARIANTS[head_dim].items():
                    both[f"aidx:{name}"] = functools.partial(aidx_both, config=config)
            for name, f in forward.items():
                yield row, causal, "fwd", name, functools.partial(f, causal=causal)
            for name, f in both.items():
                yield row, causal, "fwd+bwd", name, functools.partial(f, causal=causal)


def compile_all(entries, workers):
    """{entry key: compiled, or the refusal as text}."""
    lowered, out = {}, {}
    for row, causal, metric, name, f in entries:
        count = 3 if metric == "fwd" else 4
        args = jax.eval_shape(functools.partial(inputs, row))[:count]
        try:
            program = jax.jit(chained(f, CALLS[metric]))
            lowered[row, causal, metric, name] = program.lower(*args)
        except (NotImplementedError, ValueError, RuntimeError) as refusal:
            out[row, causal, metric, name] = f"{type(refusal).__name__}: {str(refusal)[:90]}"
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {key: pool.submit(x.compile) for key, x in lowered.items()}
        for key, future in futures.items():
            try:
                out[key] = future.result()
            except (NotImplementedError, ValueError, RuntimeError) as refusal:
                out[key] = f"{type(refusal).__name__}: {str(refusal)[:90]}"
    return out


CALLS = {"fwd": 12, "fwd+bwd": 6}


def torch_seconds(row, causal):
    """{"fwd": s, "fwd+bwd": s} of torch SDPA on cuDNN."""
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

    def both():
        return torch.autograd.grad(forward(), (q, k, v), do)

    def timed(f, calls):
        f()
        torch.cuda.synchronize()
        times = []
        for _ in range(3):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                f()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / calls)
        return sorted(times)[1]

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        with torch.no_grad():
            fwd = timed(forward, CALLS["fwd"])
        return {"fwd": fwd, "fwd+bwd": timed(both, CALLS["fwd+bwd"])}


# --- correctness ---------------------------------------------------------------------------------


def f32_rows(q, k, v, do, causal, limit=2048):
    """(out, dq, dk, dv) in f32 of the first batch row and KV head, its first `limit` tokens."""
    group = q.shape[2] // k.shape[2]
    f32 = lambda x, n: x[:1, :limit, :n].astype(jnp.float32)
    band = fa.Band(right=0 if causal else None)
    scale = q.shape[-1] ** -0.5
    f = lambda q, k, v: fa.reference(q, k, v, band=band, scale=scale)[0]
    out, pull = jax.vjp(f, f32(q, group), f32(k, 1), f32(v, 1))
    return out, *pull(f32(do, group))


def errors(got, want):
    """RMS and maximum, relative to the RMS of the truth."""
    norm = jnp.sqrt(jnp.mean(want**2))
    norm = jnp.where(norm > 1e-6, norm, 1.0)  # one key: dQ and dK are zero
    difference = got.astype(jnp.float32) - want
    return float(jnp.sqrt(jnp.mean(difference**2)) / norm), float(jnp.abs(difference).max() / norm)


def check_row(row, causal, report):
    """Errors of aidx beside cuDNN's on a corner of the row's inputs, and repeats of the forward."""
    q, k, v, do = inputs(row)
    group = q.shape[2] // k.shape[2]
    corner = [x[:1, :2048, :n] for x, n in zip((q, k, v, do), (group, 1, 1, group), strict=True)]
    want = jax.jit(functools.partial(f32_rows, causal=causal))(*corner)
    for name, f in (("aidx", aidx_both), ("cudnn_jax", cudnn_both)):
        try:
            got = jax.jit(functools.partial(f, causal=causal))(*corner)
        except NotImplementedError as refusal:
            print(f"  {name} {refusal}")
            continue
        text = []
        for part, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
            rms, worst = errors(a, b)
            report(name, f"rms_error_{part}", rms, "relative")
            report(name, f"max_error_{part}", worst, "relative")
            text.append(f"{part} {rms:.1e}/{worst:.2g}")
        print(f"  {name:10s} rms/max: {'  '.join(text)}")


def check_repeats(row, causal, repeats):
    """Whether the forward gives the same bits every time."""
    q, k, v, _ = inputs(row)
    f = jax.jit(functools.partial(aidx_forward, causal=causal))
    first, lse = f(q, k, v)
    same = jax.jit(lambda a, b: (a[0] == b[0]).all() & (a[1] == b[1]).all())
    return all(bool(same(f(q, k, v), (first, lse))) for _ in range(repeats))


def option_cases():
    """(name, shape (B, T, S, N, K, H, Hv), dtype, options) of masks and options."""
    bf16, f16 = jnp.bfloat16, jnp.float16
    causal, full = fa.Band(right=0), fa.Band()
    square = (2, 384, 384, 4, 2, 128, 128)
    lens = lambda *x: jnp.array(x, jnp.int32)
    packed = fa.packed_segments(lens(0, 1, 130, 130, 700, 900), 1001)

    def bounds(band, shape, **kw):
        return fa.dynamic_bounds(band, shape[1], shape[2], **kw)

    yield "full", square, bf16, dict(band=full)
    yield "f16 causal", square, f16, dict(band=causal)
    for tokens in (1, 63, 65, 129, 1000, 1001):
        yield f"T{tokens}", (2, tokens, tokens, 4, 2, 128, 128), bf16, dict(band=causal)
    yield "T!=S", (2, 200, 457, 4, 2, 128, 128), bf16, dict(band=fa.Band(right=0, offset=257))
    yield "T>S", (2, 457, 200, 4, 2, 128, 128), bf16, dict(band=fa.Band(right=0, offset=-257))
    yield "window", (2, 900, 900, 4, 2, 128, 128), bf16, dict(band=fa.Band(left=200, right=0))
    yield "window2", (2, 900, 900, 4, 2, 64, 64), bf16, dict(band=fa.Band(left=70, right=30))
    yield "soft cap", square, bf16, dict(band=causal, soft_cap=20.0)
    slopes = 2.0 ** -jnp.arange(1.0, 5.0)
    yield "alibi", square, bf16, dict(band=causal, alibi_slopes=slopes)
    yield "alibi full", square, bf16, dict(band=full, alibi_slopes=slopes)
    yield "sinks", square, bf16, dict(band=causal, sinks=jnp.linspace(-1.0, 3.0, 4))
    shape = (2, 500, 600, 4, 2, 128, 128)
    b = bounds(causal, shape, q_lens=lens(500, 77), kv_lens=lens(0, 333))
    yield "lens", shape, bf16, dict(band=causal, bounds=b)
    shape = (1, 1001, 1001, 4, 1, 128, 128)
    b = bounds(causal, shape, segments=(packed, packed))
    yield "packed", shape, bf16, dict(band=causal, bounds=b)
    for head_dim, head_dim_v in ((40, 40), (64, 64), (80, 80), (96, 64), (192, 128), (256, 256)):
        shape = (1, 450, 450, 4, 4, head_dim, head_dim_v)
        yield f"H{head_dim}/{head_dim_v}", shape, bf16, dict(band=causal)


def option_gradients(options, scale):
    """q, k, v, do -> (out, lse, dq, dk, dv), or (out, lse) where the backward refuses."""

    def f(q, k, v, do):
        out, lse = fa.flash_attention_fwd(q, k, v, scale=scale, **options)
        try:
            grads = fa.flash_attention_bwd(q, k, v, out, lse, do, scale=scale, **options)
        except NotImplementedError as refusal:
            print(f"  backward refused: {str(refusal)[:80]}")
            return out, lse
        return out, lse, *grads[:3]

    return f


def option_oracle(options, scale):
    """The same in f32."""

    def f(q, k, v, do):
        f32 = [x.astype(jnp.float32) for x in (q, k, v, do)]
        oracle = lambda q, k, v: fa.reference(q, k, v, scale=scale, **options)
        (out, lse), pull = jax.vjp(oracle, *f32[:3])
        return out, lse, *pull((f32[3], jnp.zeros_like(lse)))

    return f


def option_inputs(shape, dtype):
    b, t, s, n, kv, h, hv = shape
    shapes = ((b, t, n, h), (b, s, kv, h), (b, s, kv, hv), (b, t, n, hv))
    keys = jax.random.split(jax.random.key(1), 4)
    return [jax.random.normal(key, x, dtype) for key, x in zip(keys, shapes, strict=True)]


def check_options(report, workers):
    """Every case against f32, forward and backward: the relative RMS errors must be small."""
    lowered = {}
    for name, shape, dtype, options in option_cases():
        args, scale = option_inputs(shape, dtype), shape[5] ** -0.5
        pair = (option_gradients(options, scale), option_oracle(options, scale))
        lowered[name] = args, [jax.jit(f).lower(*args) for f in pair]
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        futures = {
            name: (args, [pool.submit(x.compile) for x in pair])
            for name, (args, pair) in lowered.items()
        }
    bad = []
    for name, (args, (mine, oracle)) in futures.items():
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


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rows, causal only")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--limit", type=float, default=300.0, help="stop starting rows after this")
    parser.add_argument("--rows", default=".", help="regular expression on the row names")
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()

    rows = [x for x in ROWS if re.search(options.rows, x)]
    masks = (False, True)
    if options.quick:
        rows, masks = ["H128 S4096", "gqa S4096"], (True,)
    device = jax.devices()[0].device_kind
    print(jax.__version__, device, "tokamax" if HAVE_TOKAMAX else "no tokamax", flush=True)
    results = []

    def report(case, implementation, metric, value, unit):
        results.append(
            dict(case=case, implementation=implementation, metric=metric, value=value, unit=unit)
        )

    workers = min(14, os.cpu_count() or 1)
    if options.check:
        check_options(report, workers)
    programs = compile_all(plan(rows, masks, options.variants), workers)
    print(f"{len(programs)} programs compiled at {time.time() - T0:.0f} s", flush=True)
    for row in rows:
        for causal in masks:
            if time.time() - T0 > options.limit:
                print(f"limit: no {row} causal={causal}")
                continue
            case = f"{row} {'causal' if causal else 'full'}"
            figures = {}
            args = inputs(row)
            work = operations(row, causal)
            for (r, c, metric, name), program in programs.items():
                if (r, c) != (row, causal):
                    continue
                if isinstance(program, str):
                    print(f"  {case} {metric} {name}: {program}")
                    continue
                given = args[:3] if metric == "fwd" else args
                took = seconds(program, given, CALLS[metric])
                figures[metric, name] = work * (1 if metric == "fwd" else 3.5) / took / 1e12
            del args
            try:
                for metric, took in torch_seconds(row, causal).items():
                    scale = 1 if metric == "fwd" else 3.5
                    figures[metric, "cudnn_torch"] = work * scale / took / 1e12
            except (ImportError, RuntimeError) as refusal:
                print(f"  {case} torch: {str(refusal)[:90]}")
            for (metric, name), value in figures.items():
                report(case, name, metric, value, "TFLOP/s")
            for metric in ("fwd", "fwd+bwd"):
                line = "  ".join(f"{n} {x:.0f}" for (m, n), x in figures.items() if m == metric)
                print(f"{case:20s} {metric:8s} {line}", flush=True)
            if options.check:
                check_row(row, causal, functools.partial(report, case))
    if options.check:
        for row in rows[: 1 if options.quick else 4]:
            same = check_repeats(row, True, options.repeats)
            report(f"{row} causal", "aidx", "repeats_equal", float(same), "bool")
            print(f"{row}: {options.repeats} repeats bitwise equal: {same}", flush=True)

    name = "h200" if "H200" in device else re.sub(r"\W+", "_", device.lower())
    folder = pathlib.Path(os.environ.get("OUT", ROOT / "bench" / "results" / name))
    folder.mkdir(parents=True, exist_ok=True)
    meta = dict(
        command="python bench/attention.py " + " ".join(sys.argv[1:]),
        date=datetime.date.today().isoformat(),
        device=device,
        versions={"jax": jax.__version__},
    )
    text = json.dumps(dict(meta=meta, rows=results), indent=1)
    (folder / "attention.json").write_text(text + "\n")
    print(f"total {time.time() - T0:.0f} s")


if __name__ == "__main__":
    main()
