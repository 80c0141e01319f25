"""Paged attention on a device against a dense f32 reference: ragged mixes, every kind of pool.

    python bench/paged_attention.py --sections check [--rows REGEX]

Every slot that no sequence owns holds NaN, tables are padded with ids outside the pool, five runs
have to be bitwise equal.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
from paged_common import row, say, tables, write

from pallas_kernels import paged_attention as pa

S, C, P = pa.SplitConfig, pa.ClusterConfig, pa.PrefillConfig

# context lengths, new tokens, heads, KV heads, head size, block size, options, configurations
CHECKS = [
    ([5000, 1, 65, 64, 63, 0, 700, 17], None, 32, 8, 128, 16, {}, [S(), S(uncut=True)]),
    # tables of one tile of keys: a cluster of one CTA
    ([50, 3, 64, 0], None, 32, 8, 128, 16, {}, [None]),
    ([64], None, 8, 1, 256, 64, dict(sinks=True), [None]),
    ([60, 9, 33], [5, 2, 1], 16, 4, 64, 32, dict(alibi=True), [None]),
    ([5000, 0, 65, 640], None, 32, 8, 128, 64, {}, [C(8, 2, 3), C(8, 1, 2)]),
    ([3000, 100], None, 16, 16, 64, 32, dict(window=500), [C(2, 2, 2), S()]),
    ([1500, 2222, 9], None, 8, 1, 256, 256, dict(sinks=True, alibi=True), [S(ctas=132)]),
    ([5000, 1, 65, 640], [5, 1, 4, 0], 32, 8, 128, 16, {}, [S(), C(8, 2, 2)]),
    ([900, 300, 64], [200, 1, 64], 24, 8, 128, 64, dict(window=333, sinks=True), [S(), P(2, 192)]),
    ([3000, 700, 64, 0, 90], [600, 1, 64, 0, 2], 32, 8, 128, 16, {}, [None, P()]),
    ([900, 300], [200, 3], 8, 1, 256, 128, dict(logits_soft_cap=30.0), [P(block_kv=64)]),
    ([900, 300], [200, 64], 4, 4, 64, 32, dict(alibi=True), [P(2, 192, 2, True)]),
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
    # a window shorter than a block, rows that end inside one: the first block to read is the last
    ([5000, 100, 58, 5], None, 32, 8, 128, 16, dict(window=3), [S(), S(uncut=True), C(8, 2, 2)]),
    ([900, 302, 58], [200, 70, 1], 32, 8, 128, 16, dict(window=3), [P(2, 192, 2, True), P()]),
    *[
        (lens, new, 32, 8, 128, 16, dict(pool=pool, window=3), [config])
        for pool in ("int8", "float8_e4m3fn")
        for lens, new, config in (
            ([5000, 100, 58, 5], None, None),
            ([5000, 100, 58, 5], None, S(ctas=132)),
            ([900, 302, 58], [200, 70, 1], P(2, 64, 3)),
        )
    ],
    ([5000, 66, 40, 900], [5, 5, 33, 1], 32, 8, 128, 16, dict(tree=True, window=500), [None]),
    ([5000, 66, 40, 900], [5, 5, 7, 1], 24, 8, 64, 64, dict(tree=True, alibi=True), [None]),
    ([3000, 2500, 2100, 900], [1, 5, 1, 1], 32, 8, 128, 64, dict(cascade=2001), [None]),
    ([3000, 2500, 2100, 900], [1, 1, 1, 1], 8, 1, 64, 16, dict(cascade=2001, sinks=True), [None]),
    ([3000, 2500, 2100, 900], [1, 1, 1, 1], 8, 2, 64, 16, dict(cascade=2001), [None]),
    ([3000, 2500, 2100, 900], [1, 1, 1, 1], 32, 8, 128, 64, dict(cascade=2001), [None]),
    # the prefix ends in the last block of two of its rows, in the second of a tile
    ([2008, 2010, 2100, 900], [1, 1, 1, 1], 8, 2, 64, 16, dict(cascade=2002), [None]),
    *[
        ([2008, 2010, 2100, 900], [1, 1, 1, 1], 8, 2, 64, 16, dict(cascade=2002, pool=pool), [None])
        for pool in ("int8", "float8_e4m3fn")
    ],
]


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
