"""Paged attention on one GPU: aidx beside JAX's own op, device time inside one program.

    python bench/paged_attention.py [--sections check,large,small,chunk] [--variants] [--limit S]
        [--rows REGEX] [--dry]

check   outputs of ragged mixes against a dense f32 reference; every slot that no sequence owns
        holds NaN, tables are padded with ids outside the pool, five runs have to be bitwise equal
large   TB/s of K and V over pools of 4.3 GB, tables shuffled, blocks of 16 and 64; 16 calls chained
        through q inside one program, the combine and the work list included
small   rows that last microseconds: CUPTI sum of kernel durations per call
chunk   chunked prefill and mixed calls, TFLOP/s
`--variants` times other configurations too; `--dry` compiles everything for sm_90a without a GPU.
Writes bench/results/<device>/paged_attention.json, or into $OUT where that is set.
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

os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.6")

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pallas_kernels import paged_attention as pa  # noqa: E402

T0 = time.time()
N, K, H = 32, 8, 128
POOL_TOKENS = 256 * 4096 + 4096
SETS, CALLS = 8, 16
S, C = pa.SplitConfig, pa.ClusterConfig

LARGE = {
    "1x32k": [32768],
    "64x1k": [1024] * 64,
    "64x4k": [4096] * 64,
    "256x1k": [1024] * 256,
    "256x4k": [4096] * 256,
    "16x32k": [32768] * 16,
    "32k+255x512": [32768] + [512] * 255,
}
SMALL = {"1x1k": [1024], "1x4k": [4096], "1x32k": [32768], "8x4k": [4096] * 8}
LARGE_VARIANTS = {
    "c264s3": S(ctas=264, stages=3),
    "c264s3dl": S(ctas=264, stages=3, dependent_launch=True),
    "c132s6": S(ctas=132, stages=6),
    "c396s2": S(ctas=396, stages=2),
    "c132t128": S(ctas=132, stages=3, key_tile=128),
}
SMALL_VARIANTS = {
    "k16w1": C(16, 1, 3),
    "k16w2": C(16, 2, 2),
    "k8w2": C(8, 2, 3),
    "k8w4": C(8, 4, 1),
    "k4w2": C(4, 2, 3),
    "k2w2": C(2, 2, 3),
    "split": S(ctas=264, stages=3),
}
# context lengths, new tokens, heads, KV heads, head size, block size, options, configurations
CHECKS = [
    ([5000, 1, 65, 64, 63, 0, 700, 17], None, 32, 8, 128, 16, {}, [S(), S(ctas=132, stages=6)]),
    (
        [5000, 0, 65, 640],
        None,
        32,
        8,
        128,
        64,
        {},
        [C(8, 2, 3), C(16, 1, 2), C(4, 4, 1), S(ctas=396, stages=2)],
    ),
    ([3000, 100], None, 16, 16, 64, 32, dict(window=500), [C(8, 2, 2), S()]),
    ([1500, 2222, 9], None, 16, 1, 128, 128, dict(logits_soft_cap=30.0), [S(ctas=132), C(8, 2, 2)]),
    (
        [1500, 2222, 9],
        None,
        8,
        1,
        256,
        256,
        dict(sinks=True, alibi=True),
        [S(ctas=132, stages=3), C(8, 1, 2)],
    ),
    ([5000, 1, 65, 640], [5, 1, 4, 0], 32, 8, 128, 16, {}, [S(ctas=264, stages=3), C(8, 2, 2)]),
    (
        [900, 300, 64],
        [200, 1, 64],
        24,
        8,
        128,
        64,
        dict(window=333, sinks=True),
        [S(ctas=132, stages=4)],
    ),
]


def say(*words):
    print(f"[{time.time() - T0:5.0f}s]", *words, flush=True)


def tables(lens, size, num_blocks, rng, sets=SETS):
    """Block tables over a shuffled pool, disjoint between sets while the pool lasts."""
    need = [-(-n // size) for n in lens]
    total, out = sum(need), []
    perm = rng.permutation(num_blocks).astype(np.int32)
    for s in range(sets):
        ids = perm[(np.arange(total) + s * total) % num_blocks]
        table = np.full((len(lens), max(need)), num_blocks + 7, np.int32)
        begin = 0
        for r, n in enumerate(need):
            table[r, :n] = ids[begin : begin + n]
            begin += n
        out.append(table)
    return out


def normal_pool(key, shape):
    """bf16 normals made in slices, so that the f32 scratch stays small."""
    parts = 8
    make = lambda k: jax.random.normal(k, (shape[0] // parts, *shape[1:]), jnp.bfloat16)
    pool = jax.lax.map(make, jax.random.split(key, parts))
    return pool.reshape(-1, *shape[1:])


# ------------------------------------------------------------------------------------------ check


def check_case(lens, new, n, k, h, size, options):
    """Arguments with NaN in every slot that no sequence owns, and the keyword arguments."""
    rng = np.random.default_rng(0)
    new = [1 if x else 0 for x in lens] if new is None else new
    num_blocks = sum(-(-x // size) for x in lens) + 5
    table = tables(lens, size, num_blocks, rng, sets=1)[0]
    pools = np.full((2, num_blocks, k, size, h), np.nan, np.float32)
    for r, x in enumerate(lens):
        for j in range(-(-x // size)):
            live = min(size, x - j * size)
            pools[:, table[r, j], :, :live] = rng.standard_normal((2, k, live, h))
    indptr = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    q = jnp.asarray(rng.standard_normal((int(indptr[-1]) + 2, n, h)), jnp.bfloat16)
    kw = {x: y for x, y in options.items() if x not in ("sinks", "alibi")}
    if options.get("sinks"):
        kw["sinks"] = jnp.linspace(-1.0, 2.0, n)
    if options.get("alibi"):
        kw["alibi_slopes"] = jnp.linspace(0.01, 0.3, n)
    k_pool, v_pool = jnp.asarray(pools, jnp.bfloat16)
    args = (
        q,
        k_pool,
        v_pool,
        jnp.asarray(table),
        jnp.asarray(lens, jnp.int32),
        jnp.asarray(indptr),
    )
    return args, kw, max(new)


def check(rows):
    wrong = 0
    for lens, new, n, k, h, size, options, configs in CHECKS:
        args, kw, max_q = check_case(lens, new, n, k, h, size, options)
        ref, ref_lse = map(
            np.asarray, jax.jit(functools.partial(pa.paged_attention_reference, **kw))(*args)
        )
        seen = np.isfinite(ref_lse)
        for config in configs:
            name = f"check {n}/{k} h{h} b{size} q{max_q} {options} {config}"
            try:
                f = jax.jit(
                    functools.partial(
                        pa.paged_attention, max_q=max_q, return_lse=True, config=config, **kw
                    )
                )
                runs = [[np.asarray(x, np.float32) for x in f(*args)] for _ in range(5)]
                out, lse = runs[0]
                err = np.abs(out - ref).max()
                lse_err = np.abs(np.where(seen, lse, 0) - np.where(seen, ref_lse, 0)).max()
                same = all(np.array_equal(out, x[0]) for x in runs)
                ok = (
                    err < 2e-2
                    and lse_err < 2e-3
                    and same
                    and np.array_equal(seen, np.isfinite(lse))
                )
                say(
                    name,
                    f"err {err:.4f} lse {lse_err:.5f} {'equal' if same else 'DIFFERS'}",
                    "ok" if ok else "WRONG",
                )
            except Exception as e:
                ok = False
                say(name, "FAIL", type(e).__name__, str(e)[:300])
            wrong += not ok
    rows.append(row("check", "aidx", "wrong results", wrong, "cases"))


# ------------------------------------------------------------------------------------------ times


def row(case, implementation, metric, value, unit):
    return dict(case=case, implementation=implementation, metric=metric, value=value, unit=unit)


def aidx_call(config, max_q=1):
    return functools.partial(pa.paged_attention, max_q=max_q, config=config)


def jax_call(q, k, v, table, lens, indptr):
    """JAX's own op: deprecated, Triton, pools as `[K, P, block_size, H]`."""
    from jax.experimental.pallas.ops.gpu import paged_attention as op

    return op.paged_attention(q, k, v, table, lens)


def program(call):
    """CALLS calls, each reading the output of the one before, through SETS tables in turn."""
    one = jax.jit(call)

    def run(q, k, v, tabs, lens, indptr):
        def rounds(_, q):
            for t in tabs:
                q = one(q, k, v, t, lens, indptr)
            return q

        return jax.lax.fori_loop(0, CALLS // SETS, rounds, q)

    return jax.jit(run)


def seconds(compiled, args):
    """Device time of one program: the slope between one program and five in a queue."""

    def queue(n):
        t = time.perf_counter()
        for _ in range(n):
            out = compiled(*args)
        jax.block_until_ready(out)
        return time.perf_counter() - t

    queue(2)
    one = sorted(queue(1) for _ in range(5))[2]
    five = sorted(queue(5) for _ in range(5))[2]
    return (five - one) / 4


def copy_rate(x):
    """TB/s read and written by the device copying `x`."""
    f = jax.jit(lambda x: jax.lax.bitcast_convert_type(x, jnp.uint16) ^ jnp.uint16(1))
    args = (x,)
    f = f.lower(*args).compile()
    return 2 * x.nbytes / seconds(f, args) / 1e12


def lower(call, lens, size, sds):
    num_blocks = POOL_TOKENS // size // 8 * 8
    r, m = len(lens), -(-max(lens) // size)
    pool = sds((num_blocks, K, size, H), jnp.bfloat16)
    i32 = lambda *s: sds(s, jnp.int32)
    q = sds((r, N, H), jnp.bfloat16)
    return program(call).lower(q, pool, pool, [i32(r, m)] * SETS, i32(r), i32(r + 1))


def arguments(lens, size, pools):
    rng = np.random.default_rng(1)
    tabs = [jnp.asarray(t) for t in tables(lens, size, pools[0].shape[0], rng)]
    q = jax.random.normal(jax.random.key(3), (len(lens), N, H), jnp.bfloat16)
    indptr = jnp.arange(len(lens) + 1, dtype=jnp.int32)
    return q, *pools, tabs, jnp.asarray(lens, jnp.int32), indptr


def cupti(compiled, args):
    """Microseconds of kernels per call, and the part of each kernel."""
    from jax.experimental.mosaic.gpu import profiler

    _, kernels = profiler.measure(compiled, aggregate=False)(*args)
    parts = {}
    for name, ms in kernels:
        name = re.sub(r"[^a-z_].*", "", name.replace("mosaic_gpu_", ""))[:24]
        parts[name] = parts.get(name, 0.0) + ms * 1e3 / CALLS
    return sum(parts.values()), parts


def jobs_of(sections, variants, size, pattern, peer):
    for section, shapes, configs in (
        ("large", LARGE, LARGE_VARIANTS),
        ("small", SMALL, SMALL_VARIANTS),
    ):
        if section not in sections:
            continue
        for name, lens in shapes.items():
            if not re.search(pattern, name):
                continue
            yield section, name, lens, "aidx", aidx_call(None)
            for label, config in configs.items() if variants else ():
                yield section, name, lens, label, aidx_call(config)


def timed(sections, variants, pattern, limit, sds, dry, rows):
    pool = concurrent.futures.ThreadPoolExecutor(8)
    for size in (64, 16):
        pools, jobs = None, []
        for section, name, lens, label, call in jobs_of(sections, variants, size, pattern, False):
            if time.time() - T0 > limit - 20:
                say("lowering cut short at", name, label)
                break
            try:
                jobs.append(
                    (section, name, lens, label, pool.submit(lower(call, lens, size, sds).compile))
                )
            except Exception as e:
                say(size, name, label, "LOWER FAIL", type(e).__name__, str(e)[:300])
        say(f"block {size}: {len(jobs)} lowered")
        last = None
        for section, name, lens, label, future in jobs:
            if time.time() - T0 > limit:
                say("out of time")
                return
            try:
                compiled = future.result()
                if dry:
                    continue
                if pools is None:
                    shape = (POOL_TOKENS // size // 8 * 8, K, size, H)
                    pools = [
                        jax.jit(functools.partial(normal_pool, shape=shape))(jax.random.key(i))
                        for i in (0, 1)
                    ]
                    rate = copy_rate(pools[0])
                    say(f"copy {rate:.2f} TB/s")
                    rows.append(row("copy", "device", "bandwidth", rate, "TB/s"))
                if last != name:
                    last, args = name, arguments(lens, size, pools)
                us = seconds(compiled, args) / CALLS * 1e6
                text, bytes_ = "", sum(lens) * K * H * 4
                if section == "small" or variants:
                    kernels, parts = cupti(compiled, args)
                    text = f"cupti {kernels:.2f} us " + " ".join(
                        f"{a}={b:.2f}" for a, b in parts.items()
                    )
                    rows.append(row(f"{name} block {size}", label, "kernel time", kernels, "us"))
                say(
                    f"block {size:3d} {name:12s} {label:9s} {us:8.2f} us {bytes_ / us / 1e6:5.2f} TB/s {text}"
                )
                rows.append(
                    row(f"{name} block {size}", label, "bandwidth", bytes_ / us / 1e6, "TB/s")
                )
            except Exception as e:
                say(size, name, label, "FAIL", type(e).__name__, str(e)[:300])
        pools = None


def write(rows, device):
    folder = pathlib.Path(os.environ.get("OUT") or ROOT / "bench" / "results" / device)
    folder.mkdir(parents=True, exist_ok=True)
    meta = dict(
        command="python bench/paged_attention.py",
        date=datetime.date.today().isoformat(),
        device=jax.devices()[0].device_kind,
        versions=dict(jax=jax.__version__),
    )
    (folder / "paged_attention.json").write_text(json.dumps(dict(meta=meta, rows=rows), indent=1))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sections", default="check,large,small")
    parser.add_argument("--rows", default="")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--limit", type=float, default=170)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    sections, rows, sds = args.sections.split(","), [], jax.ShapeDtypeStruct
    if args.dry:
        from jax.experimental import topologies
        from jax.sharding import Mesh, NamedSharding, PartitionSpec

        target = (ROOT / "scripts" / "h200.txtpb").read_text()
        topo = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
        sharding = NamedSharding(Mesh(np.array(topo.devices[:1]), ("x",)), PartitionSpec())
        sds = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    else:
        say("jax", jax.__version__, jax.devices()[0].device_kind)
        if "check" in sections:
            check(rows)
    timed(sections, args.variants, args.rows, args.limit, sds, args.dry, rows)
    if not args.dry:
        write(rows, "h200")
    say("done")


if __name__ == "__main__":
    main()
