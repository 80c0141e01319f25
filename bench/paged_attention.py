"""Paged attention on one GPU: aidx beside JAX's own op, device time inside one program.

    python bench/paged_attention.py [--sections large,small,chunk,narrow,cascade,layout,fixed,peer]
        [--variants] [--limit S] [--rows REGEX] [--dry]
    python bench/paged_attention.py --sections check [--rows REGEX]
    python bench/paged_attention.py --sections write [--rows REGEX]
    python bench/paged_attention.py --sections swap
    python bench/paged_attention.py --sections duel [--rows REGEX]

check   outputs of ragged mixes against a dense f32 reference; every slot that no sequence owns
        holds NaN, tables are padded with ids outside the pool, five runs have to be bitwise equal
large   TB/s of K and V over pools of 4.3 GB, tables shuffled, blocks of 16 and 64; 16 calls chained
        through q inside one program, the combine and the work list included
small   rows that last microseconds: CUPTI sum of kernel durations per call
chunk   chunked prefill and a mixed call, TFLOP/s, beside dense flash attention
narrow  rows of `large` over int8 and float8_e4m3fn pools with scales: also tokens of context per us
cascade decodes that share a prefix, with and without telling the kernel
layout  rows of `large` over pools whose tokens come first, as a contiguous cache lies
fixed   rows of `large` in the deterministic mode, and its bits: rows alone, among others, in chunks
swap    (alone) blocks to pinned host memory and back, beside a plain copy over the same bus
write   (alone) new keys and values into their slots by one kernel and by XLA, the latter's queries
        and keys rotated by a fusion of their own
duel    (alone) variants in turns, each checked before its time counts: `paged_duel.py`
peer    the rows of `large` by JAX's own op (deprecated)
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

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

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
S, C, P = pa.SplitConfig, pa.ClusterConfig, pa.PrefillConfig

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
LARGE_VARIANTS = {"c132t128": S(ctas=132, stages=3, key_tile=128)}
NARROW = ("int8", "float8_e4m3fn")
TOKENS_FIRST = "tokens first"  # a kind of pools
SMALL_BLOCKS = ("large", "small", "chunk", "narrow", "peer")  # sections that blocks of 16 matter to
NARROW_ROWS = ("64x4k", "256x4k", "16x32k")
# rows of (tokens of the prefix that they share, context lengths)
CASCADE = {
    "64x(2k+512)": (2048, [2560] * 64),
    "256x(2k+256)": (2048, [2304] * 256),
    "32x(8k+256)": (8192, [8448] * 32),
    "8x(32k+256)": (32768, [33024] * 8),
    "128x(1k+256)": (1024, [1280] * 128),
    "128x(2k+256)": (2048, [2304] * 128),
}
LAYOUT_ROWS = ("64x4k", "256x1k", "16x32k")
FIXED_ROWS = ("64x1k", "64x4k", "16x32k")
SMALL_VARIANTS = {
    "k4w2": C(4, 2, 3),
    "split": S(ctas=264, stages=3),
}
# rows of (context, new tokens), chunks first
CHUNKS = {
    "1x512 over 8k": [(8704, 512)],
    "8x512 over 8k": [(8704, 512)] * 8,
    "64x4k + 512 over 8k": [(8704, 512)] + [(4096, 1)] * 64,
}
CHUNK_VARIANTS = {"kv64s4": P(2, 64, 4), "kv64s3": P(2, 64, 3), "kv192s1": P(2, 192, 1)}
# context lengths, new tokens, heads, KV heads, head size, block size, options, configurations
CHECKS = [
    ([5000, 1, 65, 64, 63, 0, 700, 17], None, 32, 8, 128, 16, {}, [S(), S(ctas=132, stages=6)]),
    ([5000, 0, 65, 640], None, 32, 8, 128, 64, {}, [C(8, 2, 3), C(8, 1, 2)]),
    ([3000, 100], None, 16, 16, 64, 32, dict(window=500), [C(2, 2, 2), S()]),
    ([1500, 2222, 9], None, 8, 1, 256, 256, dict(sinks=True, alibi=True), [S(ctas=132)]),
    ([5000, 1, 65, 640], [5, 1, 4, 0], 32, 8, 128, 16, {}, [S(), C(8, 2, 2)]),
    ([900, 300, 64], [200, 1, 64], 24, 8, 128, 64, dict(window=333, sinks=True), [S(), P()]),
    ([3000, 700, 64, 0, 90], [600, 1, 64, 0, 2], 32, 8, 128, 16, {}, [None, P()]),
    ([900, 300], [200, 3], 8, 1, 256, 128, dict(logits_soft_cap=30.0), [P(block_kv=64)]),
    ([900, 300], [200, 64], 4, 4, 64, 32, dict(alibi=True), [P()]),
    *[
        ([5000, 1, 65, 0, 700], [1, 1, 1, 0, 1], 32, 8, 128, size, dict(pool=pool), [None])
        for pool in ("int8", "float8_e4m3fn")
        for size in (16, 64)
    ],
    ([1500, 70], [5, 2], 32, 8, 128, 32, dict(pool="float8_e4m3fn", sinks=True), [None]),
    ([1500, 70], [1, 1], 16, 2, 64, 128, dict(pool="int8", window=333), [None]),
    ([1500, 70], [1, 1], 8, 2, 256, 16, dict(pool="float8_e4m3fn"), [None]),
    ([1500, 70], [3, 1], 16, 4, 256, 64, dict(pool="int8", logits_soft_cap=30.0), [None]),
    ([1000, 70], [1, 1], 32, 8, 128, 16, dict(pool="int8", fixed=True), [None]),
    ([3000, 700, 64, 0], [600, 1, 64, 0], 32, 8, 128, 16, dict(pool="int8"), [None]),
    ([3000, 700], [600, 3], 32, 8, 128, 64, dict(pool="float8_e4m3fn", window=900), [None]),
    ([5000, 66, 40, 900], [5, 5, 33, 1], 32, 8, 128, 16, dict(tree=True, window=500), [None]),
    ([5000, 66, 40, 900], [5, 5, 7, 1], 24, 8, 64, 64, dict(tree=True, alibi=True), [None]),
    ([3000, 2500, 2100, 900], [1, 5, 1, 1], 32, 8, 128, 64, dict(cascade=2001), [None]),
    ([3000, 2500, 2100, 900], [1, 1, 1, 1], 8, 1, 64, 16, dict(cascade=2001, sinks=True), [None]),
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
    special = ("sinks", "alibi", "pool", "fixed", "tree", "cascade")
    kw = {x: y for x, y in options.items() if x not in special}
    if options.get("sinks"):
        kw["sinks"] = jnp.linspace(-1.0, 2.0, n)
    if options.get("alibi"):
        kw["alibi_slopes"] = jnp.linspace(0.01, 0.3, n)
    if options.get("tree"):
        t = q.shape[0]
        words = rng.integers(0, 2**32, (t, -(-max(new) // 32)), dtype=np.uint64)
        kw["tree_mask"] = jnp.asarray(words.astype(np.uint32))
        kw["positions"] = jnp.asarray(rng.integers(0, max(lens), t), jnp.int32)
    if "cascade" in options:  # the first three rows share, their own whole blocks are poison
        shared = table[0, : -(-options["cascade"] // size)].copy()
        whole = options["cascade"] // size
        for r in (1, 2):
            for j in range(whole):
                pools[:, table[r, j]] = np.nan
            pools[:, table[r, whole], :, : options["cascade"] % size] = np.nan
            if options["cascade"] % size:
                left = options["cascade"] % size
                pools[:, table[r, whole], :, :left] = pools[:, shared[-1], :, :left]
        lens_ = jnp.array([options["cascade"]], jnp.int32)
        groups = jnp.array([0, 0, 0] + [-1] * (len(lens) - 3), jnp.int32)
        kw["cascade"] = (jnp.asarray(shared)[None], lens_, groups)
    if "pool" in options:
        pools, scales = narrow(pools, jnp.dtype(options["pool"]), options.get("fixed"))
        kw["k_scale"], kw["v_scale"] = scales
    else:
        pools = jnp.asarray(pools, jnp.bfloat16)
    k_pool, v_pool = pools
    args = (
        q,
        k_pool,
        v_pool,
        jnp.asarray(table),
        jnp.asarray(lens, jnp.int32),
        jnp.asarray(indptr),
    )
    return args, kw, max(new)


def narrow(pools, dtype, fixed):
    """K and V pools at one byte a value with scales by token, or by head; dead slots are poison."""
    top = 127.0 if dtype == jnp.int8 else 448.0
    out, scales = [], []
    for x in pools:
        dead = np.isnan(x).any(-1)
        scale = np.abs(np.nan_to_num(x)).max(-1) / top
        scale = np.where(scale > 0, scale, 1.0)
        if fixed:
            scale = np.full_like(scale, 6.0 / top)
        x = np.clip(np.nan_to_num(x) / scale[..., None], -top, top)
        x[dead] = 77 if dtype == jnp.int8 else np.nan
        out.append(jnp.asarray(np.rint(x) if dtype == jnp.int8 else x, dtype))
        scales.append(jnp.asarray(np.where(dead, np.nan, scale), jnp.float32))
    if fixed:
        scales = [jnp.full(pools.shape[2:3], 6.0 / top, jnp.float32)] * 2
    return out, scales


def expected(args, kw):
    """The reference; rows that share a prefix get tables that hold it."""
    kw = dict(kw)
    if "cascade" in kw:
        shared, lens, groups = (np.asarray(x) for x in kw.pop("cascade"))
        table, size = np.array(args[3]), args[1].shape[2]
        for r in np.flatnonzero(groups >= 0):
            whole = lens[0] // size
            table[r, :whole] = shared[0, :whole]
        args = (*args[:3], jnp.asarray(table), *args[4:])
    return jax.jit(functools.partial(pa.paged_attention_reference, **kw))(*args)


def check(rows, pattern):
    wrong = 0
    for lens, new, n, k, h, size, options, configs in CHECKS:
        args, kw, max_q = check_case(lens, new, n, k, h, size, options)
        if not re.search(pattern, f"{n}/{k} h{h} b{size} q{max_q} {options}"):
            continue
        ref, ref_lse = map(np.asarray, expected(args, kw))
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
                rounded = "pool" in options and max_q > 16  # keys times their scales are, to bf16
                ok = (
                    err < 2e-2
                    and lse_err < (1e-2 if rounded else 2e-3)
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
            write([row("check", "aidx", "wrong results", wrong, "cases")], "paged_attention_check")
    rows.append(row("check", "aidx", "wrong results", wrong, "cases"))


# ------------------------------------------------------------------------------------------ times


def row(case, implementation, metric, value, unit):
    return dict(case=case, implementation=implementation, metric=metric, value=value, unit=unit)


def aidx_call(config, max_q=1, **options):
    return functools.partial(pa.paged_attention, max_q=max_q, config=config, **options)


def narrow_call(config, max_q=1):
    """Pools with scales of tokens and heads."""

    def call(q, k, v, table, lens, indptr):
        rows = (table, lens, indptr)
        options = dict(max_q=max_q, config=config, k_scale=k[1], v_scale=v[1])
        return pa.paged_attention(q, k[0], v[0], *rows, **options)

    return call


def shared_call(shared, cascade):
    """All rows begin with the blocks of the first row's prefix; read it once, or by every row."""

    def call(q, k, v, table, lens, indptr):
        blocks = shared // k.shape[2]
        prefix = table[:1, :blocks]
        table = table.at[:, :blocks].set(prefix)
        group = jnp.zeros(lens.shape, jnp.int32)
        given = (prefix, jnp.full((1,), shared, jnp.int32), group) if cascade else None
        return pa.paged_attention(q, k, v, table, lens, indptr, max_q=1, cascade=given)

    return call


def jax_call(q, k, v, table, lens, indptr):
    """JAX's own op: deprecated, Triton, pools as `[K, P, block_size, H]`."""
    from jax.experimental.pallas.ops.gpu import paged_attention as op

    return op.paged_attention(q, k, v, jnp.minimum(table, k.shape[1] - 1), lens)


def dense_call(q, k, v, band):
    """Our dense flash attention at the operations of a chunk: `[R, 512]` queries over keys."""
    from pallas_kernels import flash_attention as fa

    return fa.flash_attention_fwd(q, k, v, band=band, scale=H**-0.5)[0]


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
    f = jax.jit(jnp.copy).lower(x).compile()
    return 2 * x.nbytes / seconds(f, (x,)) / 1e12


def pool_shape(size, kind):
    """Of a pool of about POOL_TOKENS; JAX's own op wants the heads first."""
    blocks = POOL_TOKENS // size // 8 * 8
    shapes = {"jax": (K, blocks, size, H), TOKENS_FIRST: (blocks, size, K, H)}
    return shapes.get(kind, (blocks, K, size, H))


def fresh_pools(size, kind):
    """K and V of normals; pairs of (pool, scales) where a value takes one byte."""
    shape = pool_shape(size, kind)
    make = jax.jit(functools.partial(normal_pool, shape=shape))
    pools = [make(jax.random.key(i)) for i in (0, 1)]
    if kind not in NARROW:
        return pools
    times, scale = (40.0, 1 / 40) if kind == "int8" else (1.0, 1.0)
    cast = jax.jit(lambda x: (x * times).astype(kind), donate_argnums=0)
    return [(cast(x), jnp.full(shape[:3], scale, jnp.float32)) for x in pools]


def lower(call, rows, size, sds, kind):
    """`program(call)` for rows of (context, new tokens), lowered."""
    r, m = len(rows), -(-max(n for n, _ in rows) // size)
    shape = pool_shape(size, kind)
    pool = sds(shape, jnp.bfloat16)
    if kind in NARROW:
        pool = sds(shape, jnp.dtype(kind)), sds(shape[:3], jnp.float32)
    i32 = lambda *s: sds(s, jnp.int32)
    q = sds((sum(n for _, n in rows), N, H), jnp.bfloat16)
    return program(call).lower(q, pool, pool, [i32(r, m)] * SETS, i32(r), i32(r + 1))


def arguments(rows, size, pools):
    rng = np.random.default_rng(1)
    lens, new = zip(*rows, strict=True)
    tabs = [jnp.asarray(t) for t in tables(lens, size, POOL_TOKENS // size // 8 * 8, rng)]
    indptr = jnp.asarray(np.concatenate([[0], np.cumsum(new)]), jnp.int32)
    q = jax.random.normal(jax.random.key(3), (sum(new), N, H), jnp.bfloat16)
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


def operations(rows):
    """4 * N * H for every query and every key that it sees."""
    return sum(4 * N * H * (new * (n - new) + new * (new + 1) // 2) for n, new in rows)


def jobs_of(sections, variants, pattern):
    """(section, case, rows, label, call, kind of pools) in the order of running."""
    decode = lambda lens: [(n, 1) for n in lens]
    for name, rows in CHUNKS.items() if "chunk" in sections else ():
        yield "chunk", name, rows, "aidx", aidx_call(None, 512), "bf16"
        for kind in NARROW if len(rows) < 9 else ():
            yield "chunk", f"{name} {kind}", rows, "aidx", narrow_call(None, 512), kind
        for label, config in CHUNK_VARIANTS.items() if variants and len(rows) < 9 else ():
            yield "chunk", name, rows, label, aidx_call(config, 512), "bf16"
    for section, shapes, configs in (
        ("large", LARGE, LARGE_VARIANTS),
        ("small", SMALL, SMALL_VARIANTS),
    ):
        for name, lens in shapes.items() if section in sections else ():
            yield section, name, decode(lens), "aidx", aidx_call(None), "bf16"
            for label, config in configs.items() if variants else ():
                yield section, name, decode(lens), label, aidx_call(config), "bf16"
    for name, (shared, lens) in CASCADE.items() if "cascade" in sections else ():
        yield "cascade", name, decode(lens), "aidx", shared_call(shared, True), "bf16"
        yield "cascade", name, decode(lens), "aidx, alone", shared_call(shared, False), "bf16"
    for name in FIXED_ROWS if "fixed" in sections else ():
        call = aidx_call(None, deterministic=True)
        yield "fixed", f"{name} deterministic", decode(LARGE[name]), "aidx", call, "bf16"
    for name in LAYOUT_ROWS if "layout" in sections else ():
        call = aidx_call(None, tokens_first=True)
        yield "layout", f"{name} tokens first", decode(LARGE[name]), "aidx", call, TOKENS_FIRST
    for kind in NARROW if "narrow" in sections else ():
        for name in NARROW_ROWS:
            case, rows = f"{name} {kind}", decode(LARGE[name])
            yield "narrow", case, rows, "aidx", narrow_call(None), kind
    for name, lens in LARGE.items() if "peer" in sections else ():
        yield "peer", name, decode(lens), "jax", jax_call, "jax"


def lower_all(sections, variants, pattern, limit, sds):
    """Compiles in threads while the next program is lowered: (block size, job, future)."""
    threads, out = concurrent.futures.ThreadPoolExecutor(8), []
    for size in (64, 16):
        for job in jobs_of(sections, variants, pattern):
            section, name, rows, label, call, kind = job
            small = section in SMALL_BLOCKS and label in ("aidx", "jax")
            if not re.search(pattern, name) or (size == 16 and not small):
                continue
            if time.time() - T0 > limit:
                say("lowering cut short at", size, name, label)
                return out
            try:
                lowered = lower(call, rows, size, sds, kind)
                out.append((size, job, threads.submit(lowered.compile)))
            except Exception as e:
                say(size, name, label, "LOWER FAIL", type(e).__name__, str(e)[:300])
    return out


def timed(sections, variants, pattern, limit, sds, dry, rows_out):
    jobs = lower_all(sections, variants, pattern, limit - 20, sds)
    say(f"{len(jobs)} programs lowered")
    pools = last = layout = None
    for size, (section, name, rows, label, _, kind), future in jobs:
        if time.time() - T0 > limit:
            say("out of time")
            return
        try:
            compiled = future.result()
            if dry:
                continue
            if layout != (size, kind):
                layout, pools, last = (size, kind), None, None
                pools = fresh_pools(size, kind)
                if kind == "bf16":
                    rate = copy_rate(pools[0])
                    say(f"copy {rate:.2f} TB/s")
                    rows_out.append(row(f"copy block {size}", "device", "bandwidth", rate, "TB/s"))
            if last != (name, layout):
                last, args = (name, layout), arguments(rows, size, pools)
            one_row(section, f"{name} block {size}", label, rows, compiled, args, rows_out)
        except Exception as e:
            say(size, name, label, "FAIL", type(e).__name__, str(e)[:300])
    if "chunk" in sections and not dry:
        dense(rows_out)
    if "fixed" in sections and not dry:
        fixed_bits(rows_out)


def one_row(section, case, label, rows, compiled, args, rows_out):
    """Time one program and write everything measured so far: a cut run keeps its rows."""
    measure_row(section, case, label, rows, compiled, args, rows_out)
    write(rows_out, "paged_attention")


def measure_row(section, case, label, rows, compiled, args, rows_out):
    us = seconds(compiled, args) / CALLS * 1e6
    if section == "chunk":
        rate = operations(rows) / us / 1e6
        say(f"{case:28s} {label:9s} {us:8.2f} us {rate:6.1f} TFLOP/s")
        rows_out.append(row(case, label, "time", us, "us"))
        rows_out.append(row(case, label, "rate", rate, "TFLOP/s"))
        return
    tokens = sum(n for n, _ in rows)
    bytes_ = (H + 4) * 2 if section == "narrow" else H * 4  # a scale takes 4
    text, rate = "", tokens * K * bytes_ / us / 1e6
    rows_out.append(row(case, label, "context", tokens / us, "tokens/us"))
    if label != "jax":
        kernels, parts = cupti(compiled, args)
        text = f"cupti {kernels:.2f} us " + " ".join(f"{a}={b:.2f}" for a, b in parts.items())
        rows_out.append(row(case, label, "kernel time", kernels, "us"))
    say(f"{case:26s} {label:11s} {us:8.2f} us {rate:5.2f} TB/s {tokens / us:7.1f} tok/us {text}")
    if section != "cascade":  # bytes that are read once for all rows are no bandwidth
        rows_out.append(row(case, label, "bandwidth", rate, "TB/s"))


def dense(rows_out):
    """Our dense flash attention over contiguous keys, at the operations of the chunks."""
    from pallas_kernels import flash_attention as fa

    for name in list(CHUNKS)[:2]:
        rows = CHUNKS[name]
        r, (n, new) = len(rows), rows[0]
        keys = [jax.random.key(i) for i in range(3)]
        make = lambda k, *s: jax.random.normal(k, s, jnp.bfloat16)
        q, k, v = make(keys[0], r, new, N, H), make(keys[1], r, n, K, H), make(keys[2], r, n, K, H)
        one = functools.partial(dense_call, band=fa.Band(right=0, offset=n - new))
        run = lambda q, k, v: jax.lax.fori_loop(0, CALLS, lambda _, q: one(q, k, v), q)
        try:
            us = seconds(jax.jit(run).lower(q, k, v).compile(), (q, k, v)) / CALLS * 1e6
        except Exception as e:
            say(name, "dense FAIL", type(e).__name__, str(e)[:300])
            continue
        rate = operations(rows) / us / 1e6
        say(f"{name:28s} dense     {us:8.2f} us {rate:6.1f} TFLOP/s")
        for size in (64, 16):
            rows_out.append(row(f"{name} block {size}", "dense flash", "rate", rate, "TFLOP/s"))


# ---------------------------------------------------------------------------------------- writing

WRITES = {"8k": 8192, "256": 256, "8": 8}
WRITE_KINDS = ("bf16", *NARROW)


def write_calls(kind, rotate):
    """name -> function (pools, k, v, q, cos, sin, slots) -> (pools, q): our kernel, and XLA's."""
    from aidx.ops.rope import apply_rope
    from aidx.ops.write_kv import write_kv as scatter

    scaled = kind in NARROW

    def kernel(pools, k, v, q, cos, sin, slots):
        scales = dict(k_scale=pools[2], v_scale=pools[3]) if scaled else {}
        angles = dict(q=q, cos=cos, sin=sin) if rotate else {}
        out = pa.write_kv(*pools[:2], k, v, slots, **scales, **angles)
        return tuple(x for x in out[:4] if x is not None), out.q if rotate else q

    def xla(pools, k, v, q, cos, sin, slots):
        if rotate:
            k, q = apply_rope(k, cos, sin), apply_rope(q, cos, sin)
        scales = dict(k_scale=pools[2], v_scale=pools[3]) if scaled else {}
        options = scales | dict(implementation="xla")
        return tuple(scatter(*pools[:2], k, v, slots, **options)), q

    return {"aidx": kernel, "xla": xla}


def write_arguments(tokens, kind):
    """(pools, [(k, v, q, cos, sin, slots)] of 4 sets, so that L2 does not hold what is read)."""
    size, sets = 64, 4
    blocks = max(4 * tokens, 4096) // size * 4
    shape = (blocks, K, size, H)
    pools = [jnp.zeros(shape, jnp.bfloat16 if kind == "bf16" else kind) for _ in range(2)]
    if kind in NARROW:
        pools += [jnp.zeros(shape[:3], jnp.float32) for _ in range(2)]
    slots = np.random.default_rng(0).permutation(blocks * size).astype(np.int32)
    make = lambda i, *s: jax.random.normal(jax.random.key(i), s, jnp.bfloat16)
    out = []
    for i in range(sets):
        angles = jax.random.uniform(jax.random.key(i), (tokens, H // 2))
        k, v, q = make(i, tokens, K, H), make(i + 9, tokens, K, H), make(i + 18, tokens, N, H)
        place = jnp.asarray(slots[i * tokens : (i + 1) * tokens])
        out.append((k, v, q, jnp.cos(angles), jnp.sin(angles), place))
    return tuple(pools), out


def writes(rows_out, pattern):
    """Time of a write, with and without the rotation of q and k, beside the copy rate."""
    for kind in WRITE_KINDS:
        for name, tokens in WRITES.items():
            pools, sets = write_arguments(tokens, kind)
            for rotate in (False, True):
                for label, call in write_calls(kind, rotate).items():
                    case = f"write {name} {kind}" + (" rotated" if rotate else "")
                    if not re.search(pattern, case):
                        continue
                    try:
                        one_write(case, label, call, pools, sets, tokens, kind, rotate, rows_out)
                    except Exception as e:
                        say(case, label, "FAIL", type(e).__name__, str(e)[:300])


def one_write(case, label, call, pools, sets, tokens, kind, rotate, rows_out):
    def run(pools, sets):
        def rounds(_, pools):
            out = []
            for given in sets:
                pools, q = call(pools, *given)
                out.append(q)
            # the rotated queries have to be made, and may not be hoisted out of the loop
            return jax.lax.optimization_barrier((pools, out))[0]

        return jax.lax.fori_loop(0, CALLS // len(sets), rounds, pools)

    donated = jax.jit(run, donate_argnums=0).lower(pools, sets).compile()
    state = jax.tree.map(jnp.copy, pools)

    def queue(n):
        nonlocal state
        t = time.perf_counter()
        for _ in range(n):
            state = donated(state, sets)
        jax.block_until_ready(state)
        return time.perf_counter() - t

    queue(2)
    one, many = (sorted(queue(n) for _ in range(5))[2] for n in (1, 9))
    us = (many - one) / 8 / CALLS * 1e6
    _, parts = cupti(jax.jit(run).lower(pools, sets).compile(), (pools, sets))
    parts = {k: v for k, v in parts.items() if "copy" not in k}
    value = 2 if kind == "bf16" else 1
    bytes_ = 2 * tokens * K * H * (2 + value) + (4 * tokens * N * H + 2 * tokens * H * 2) * rotate
    kernels = sum(parts.values())
    rate = bytes_ / kernels / 1e6
    text = " ".join(f"{a}={b:.2f}" for a, b in parts.items())
    say(f"{case:32s} {label:5s} {us:8.2f} us cupti {kernels:7.2f} us {rate:5.2f} TB/s {text}")
    rows_out.append(row(case, label, "time", us, "us"))
    rows_out.append(row(case, label, "kernel time", kernels, "us"))
    rows_out.append(row(case, label, "bandwidth", rate, "TB/s"))


# ------------------------------------------------------------------------------ bits and the bus


def fixed_bits(rows_out):
    """The deterministic mode: a prompt of 700 tokens in chunks, alone and beside other rows."""
    rng = np.random.default_rng(5)
    size, total, others = 64, 700, [(3000, 1), (90, 5), (1500, 300)]
    table = jnp.asarray(tables([total] + [n for n, _ in others], size, 200, rng, sets=1)[0])
    pools = [jax.random.normal(jax.random.key(i), (200, K, size, H), jnp.bfloat16) for i in (0, 1)]
    q = jax.random.normal(jax.random.key(2), (total, N, H), jnp.bfloat16)
    more = jax.random.normal(jax.random.key(3), (sum(n for _, n in others), N, H), jnp.bfloat16)

    def attend(begin, end, beside):
        queries, rows = [q[begin:end]], [(end, end - begin)]
        if beside:
            queries, rows = [more, *queries], [*others, *rows]
        lens, new = zip(*rows, strict=True)
        own = jnp.concatenate([table[1:], table[:1]]) if beside else table[:1]
        indptr = jnp.asarray(np.concatenate([[0], np.cumsum(new)]), jnp.int32)
        f = functools.partial(pa.paged_attention, max_q=512, deterministic=True)
        out = jax.jit(f)(
            jnp.concatenate(queries), *pools, own, jnp.asarray(lens, jnp.int32), indptr
        )
        return np.asarray(out[-(end - begin) :], np.float32)

    whole = np.concatenate([attend(0, 350, False), attend(350, 700, False)])
    found = {
        "other chunks": np.concatenate(
            [attend(a, b, False) for a, b in ((0, 100), (100, 227), (227, 699), (699, 700))]
        ),
        "beside others": np.concatenate([attend(a, b, True) for a, b in ((0, 350), (350, 700))]),
    }
    for name, out in found.items():
        differ = int((out != whole).sum())
        say(f"deterministic, {name}: {differ} of {whole.size} values differ")
        rows_out.append(
            row(f"deterministic, {name}", "aidx", "values that differ", differ, "values")
        )


def swaps(rows_out):
    """GB/s of 64 blocks of a model of 32 layers to the host and back, beside a copy of as much."""
    from aidx.cache import PagedKVCache, swap_in, swap_out

    cache = PagedKVCache.create(
        num_layers=32, num_blocks=256, block_size=64, num_kv_heads=K, head_dim=H
    )
    blocks = np.random.default_rng(0).permutation(256)[:64]
    bytes_ = cache.memory_bytes // 4

    def best(f, reset=lambda x: x):
        times = []
        for _ in range(6):
            t = time.perf_counter()
            out = jax.block_until_ready(f())
            times.append(time.perf_counter() - t)
            reset(out)
        return bytes_ / min(times[1:]) / 1e9

    x = jnp.ones((bytes_ // 2,), jnp.bfloat16)
    host = x.sharding.with_memory_kind("pinned_host")
    kept = jax.device_put(x, host)
    swapped = swap_out(cache, blocks)

    def back():
        nonlocal cache
        cache = swap_in(cache, swapped, blocks)
        return cache

    rates = {
        ("copy", "to the host"): best(lambda: jax.device_put(x, host)),
        ("copy", "from the host"): best(lambda: jax.device_put(kept, x.sharding)),
        ("aidx", "to the host"): best(lambda: swap_out(cache, blocks)),
        ("aidx", "from the host"): best(back),
    }
    for (name, way), rate in rates.items():
        say(f"swap {way:14s} {name:5s} {rate:6.1f} GB/s")
        rows_out.append(row(f"swap {way}", name, "rate", rate, "GB/s"))


def write(rows, name):
    folder = pathlib.Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "h200")
    folder.mkdir(parents=True, exist_ok=True)
    meta = dict(
        command=" ".join(["python bench/paged_attention.py", *sys.argv[1:]]),
        date=datetime.date.today().isoformat(),
        device=jax.devices()[0].device_kind,
        versions=dict(jax=jax.__version__),
    )
    (folder / f"{name}.json").write_text(json.dumps(dict(meta=meta, rows=rows), indent=1))


def dry_shapes():
    """`ShapeDtypeStruct` on an H200 that is not here."""
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    target = (ROOT / "scripts" / "h200.txtpb").read_text()
    topo = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    sharding = NamedSharding(Mesh(np.array(topo.devices[:1]), ("x",)), PartitionSpec())
    return functools.partial(jax.ShapeDtypeStruct, sharding=sharding)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sections", default="large,small,chunk,peer")
    parser.add_argument("--rows", default="")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--limit", type=float, default=170)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    sections, rows = args.sections.split(","), []
    if not args.dry:
        say("jax", jax.__version__, jax.devices()[0].device_kind)
    if sections == ["check"]:
        check(rows, args.rows)
        write(rows, "paged_attention_check")
    elif sections == ["write"]:
        writes(rows, args.rows)
        write(rows, "paged_write")
    elif sections == ["swap"]:
        swaps(rows)
        write(rows, "swap")
    elif sections == ["duel"]:
        sys.modules["paged_attention"] = sys.modules["__main__"]  # one module, one clock
        import paged_duel

        sds = dry_shapes() if args.dry else jax.ShapeDtypeStruct
        paged_duel.run(args.rows, args.limit, sds, args.dry, rows)
    else:
        sds = dry_shapes() if args.dry else jax.ShapeDtypeStruct
        timed(sections, args.variants, args.rows, args.limit, sds, args.dry, rows)
        if not args.dry:
            write(rows, "paged_attention")
    say("done")


if __name__ == "__main__":
    main()
