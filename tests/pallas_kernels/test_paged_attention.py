"""Paged attention kernels in the GPU interpreter: every mix of rows equals dense attention.

The interpreter runs TMA, barriers and warpgroups and reports races as text on stdout, which is why
the tests read what was printed.  Every slot that no row owns holds NaN, tables are padded with the
id of such a block, and reading outside an array raises: touching what is dead shows.
"""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import paged_attention as pa
from pallas_kernels.paged_attention import onebyte, quantised
from pallas_kernels.paged_attention import worklist as wl
from pallas_kernels.paged_attention.geometry import Geometry
from tests.pallas_kernels import one_byte

SPLIT = pa.SplitConfig(ctas=5, stages=2)
PREFILL = pa.PrefillConfig(block_kv=64)


def make(lens, new, *, heads=8, kv_heads=2, dim=64, size=16, spare=1, dtype=jnp.bfloat16, seed=0):
    """Operands of a call: rows of `lens` keys whose last `new` are the queries, `spare` unowned."""
    rng = np.random.default_rng(seed)
    need = [-(-n // size) for n in lens]
    num_blocks, width = sum(need) + 2, max(need) + 1
    pools = np.full((2, num_blocks, kv_heads, size, dim), np.nan, np.float32)
    order, begin = rng.permutation(num_blocks), 0
    table = np.full((len(lens), width), order[-1], np.int32)  # a block that nobody owns
    for r, blocks in enumerate(need):
        table[r, :blocks] = order[begin : begin + blocks]
        begin += blocks
        for j in range(blocks):
            live = min(size, lens[r] - j * size)
            pools[:, table[r, j], :, :live] = rng.standard_normal((2, kv_heads, live, dim))
    indptr = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    q = rng.standard_normal((int(indptr[-1]) + spare, heads, dim))
    k_pool, v_pool = jnp.asarray(pools, dtype)
    arrays = (table, np.asarray(lens, np.int32), indptr)
    return jnp.asarray(q, dtype), k_pool, v_pool, *map(jnp.asarray, arrays)


INTERPRET = plgpu.InterpretGPUParams(
    detect_races=True, out_of_bounds_reads="raise", uninitialized_memory="nan"
)


def run(args, max_q, *, config, **options):
    """(out, lse) in the interpreter, where reading outside an array raises."""
    f = functools.partial(
        pa.paged_attention,
        max_q=max_q,
        config=config,
        return_lse=True,
        interpret=INTERPRET,
        **options,
    )
    return [np.asarray(x, np.float32) for x in jax.jit(f)(*args)]


def check(args, max_q, capfd, *, config, evicted=None, **options):
    """`evicted`: (row, entry) of the table that lies before the window and has lost its block."""
    given = list(args)
    if evicted is not None:
        given[3] = given[3].at[evicted].set(given[3][0, -1])
    out, lse = run(given, max_q, config=config, **options)
    want, want_lse = map(np.asarray, pa.paged_attention_reference(*args, **options))
    seen = np.isfinite(want_lse)
    np.testing.assert_allclose(out, want, atol=1.5e-2)
    np.testing.assert_array_equal(np.isfinite(lse), seen)
    np.testing.assert_allclose(lse[seen], want_lse[seen], atol=1e-4)
    assert "RACE" not in capfd.readouterr().out
    return out


# ------------------------------------------------------------------------------------- decode


@pytest.mark.smoke
def test_split_decode_of_ragged_rows(capfd):
    """Empty rows, a padding row, a row of one key, a tail inside a block, an unowned query."""
    args = make([130, 0, 1, 70], [1, 1, 0, 1])
    out = check(args, 1, capfd, config=SPLIT)
    assert (out[1] == 0).all() and (out[3:] == 0).all()


def test_split_decode_of_whole_segments(capfd):
    """The same rows, no segment cut: one kernel, and shares that hold nothing."""
    args = make([130, 0, 1, 70], [1, 1, 0, 1])
    check(args, 1, capfd, config=pa.SplitConfig(ctas=3, stages=2, uncut=True))


def test_split_decode_with_options(capfd):
    """Window, soft cap, ALiBi and sinks together; a group that does not divide 8; large blocks."""
    args = make([130, 300, 1], [1, 1, 1], heads=6, kv_heads=2, size=128)
    options = dict(window=40, logits_soft_cap=20.0, scale=0.3)
    vectors = dict(alibi_slopes=jnp.linspace(0.1, 1, 6), sinks=jnp.linspace(-1, 2, 6))
    check(args, 1, capfd, config=SPLIT, **options, **vectors)


def test_split_verification(capfd):
    """Rows of several queries are causal among themselves; they fill more than one query tile."""
    args = make([40, 130, 64], [3, 9, 0], heads=32, kv_heads=2, size=32)
    check(args, 9, capfd, config=SPLIT, window=90, evicted=(1, 0))


@pytest.mark.smoke
def test_cluster_decode_of_ragged_rows(capfd):
    args = make([200, 0, 70], [1, 1, 0], heads=4, kv_heads=1)
    out = check(args, 1, capfd, config=pa.ClusterConfig(cluster=2, warpgroups=1, stages=2))
    assert (out[1:] == 0).all()


def test_cluster_of_two_warpgroups_with_options(capfd):
    args = make([300, 65], [5, 2], heads=6, kv_heads=2, size=64)
    config = pa.ClusterConfig(cluster=1, warpgroups=2, stages=1)
    vectors = dict(alibi_slopes=jnp.linspace(0.1, 1, 6), sinks=jnp.linspace(-1, 2, 6))
    check(args, 5, capfd, config=config, window=100, logits_soft_cap=20.0, **vectors)


@pytest.mark.parametrize(
    "config",
    [SPLIT, pytest.param(pa.ClusterConfig(2, 1, 2), marks=pytest.mark.slow)],
    ids=["split", "cluster"],
)
def test_tokens_may_come_first_in_the_pool(config, capfd):
    """As a contiguous cache lies: the same bits as with the heads first."""
    q, k_pool, v_pool, *rest = make([130, 0, 70], [1, 1, 1])
    turned = (q, k_pool.swapaxes(1, 2), v_pool.swapaxes(1, 2), *rest)
    out, lse = run(turned, 1, config=config, tokens_first=True)
    want, want_lse = run((q, k_pool, v_pool, *rest), 1, config=config)
    np.testing.assert_array_equal(out, want)
    np.testing.assert_array_equal(lse, want_lse)
    assert "RACE" not in capfd.readouterr().out


# ------------------------------------------------------------------- pools of one byte a value


def quantise(args, dtype, *, fixed=False, apart=8, seed=0):
    """`args` with pools and scales as written token by token; what no row owns is NaN or noise."""
    q, k_pool, v_pool, *rest = args
    rng = np.random.default_rng(seed)
    pools, scales = [], []
    for pool in (k_pool, v_pool):
        x = np.asarray(pool, np.float32)
        x = x * np.exp2(rng.integers(-apart, apart, x.shape[:3]))[..., None]  # scales far apart
        top = 127.0 if dtype == jnp.int8 else 448.0
        dead = np.isnan(x).any(-1)
        scale = np.where(dead, 1.0, np.abs(np.nan_to_num(x)).max(-1)) / top
        if fixed:
            scale = np.full_like(scale, 8.0 / top)
        x = np.clip(np.nan_to_num(x) / scale[..., None], -top, top)
        x[dead] = rng.integers(-100, 100) if dtype == jnp.int8 else np.nan
        pools.append(jnp.asarray(np.rint(x) if dtype == jnp.int8 else x, dtype))
        scales.append(jnp.asarray(np.where(dead, np.nan, scale), jnp.float32))
    if fixed:
        scales = [jnp.full(k_pool.shape[1:2], 8.0 / top) * jnp.array([1.0, 0.5])] * 2
    return (q, *pools, *rest), dict(k_scale=scales[0], v_scale=scales[1])


def check_quantised(args, max_q, dtype, capfd, *, fixed=False, apart=8, config=SPLIT, **options):
    """Every value is as near to the exact one as the kernel's arithmetic promises (`one_byte`)."""
    args, scales = quantise(args, dtype, fixed=fixed, apart=apart)
    out, lse = run(args, max_q, config=config, **scales, **options)
    if isinstance(config, pa.PrefillConfig):
        arithmetic = one_byte.Arithmetic(dtype, args[0].dtype, config.block_kv, converted=True)
    else:
        arithmetic = one_byte.Arithmetic(dtype, args[0].dtype, config.key_tile)
    want, miss = one_byte.attention(args, arithmetic, **scales, **options)
    for got, exact, most in zip((out, lse), want, miss, strict=True):
        seen = np.isfinite(exact)
        np.testing.assert_array_equal(np.isfinite(got), seen)
        error = np.abs(np.subtract(got, exact, where=seen, out=np.zeros_like(exact)))
        assert (error <= most).all(), f"{(error / np.maximum(most, 1e-30)).max()} times the bound"
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.smoke
def test_fp8_decode_in_small_blocks(capfd):
    """Scales of blocks of 16 arrive two heads at a time; queries beyond f16 are not lost."""
    q, *rest = make([130, 0, 1, 70], [1, 1, 0, 1])
    q = (q * 1e6).at[0, 1].multiply(1e6)
    check_quantised((q, *rest), 1, jnp.float8_e4m3fn, capfd, scale=1e-6)


@pytest.mark.slow
def test_int8_verification_with_options(capfd):
    args = make([130, 300, 1], [3, 1, 1], heads=6, kv_heads=2, size=64, dim=128)
    vectors = dict(alibi_slopes=jnp.linspace(0.1, 1, 6), sinks=jnp.linspace(-1, 2, 6))
    check_quantised(args, 3, jnp.int8, capfd, window=100, logits_soft_cap=20.0, **vectors)


@pytest.mark.parametrize(
    "stages,key_tile,size,dtype",
    [
        (1, 64, 32, jnp.float8_e4m3fn),
        (2, 128, 16, jnp.int8),
        pytest.param(2, 64, 16, jnp.int8, marks=pytest.mark.slow),
        pytest.param(1, 128, 256, jnp.float8_e4m3fn, marks=pytest.mark.slow),
    ],
)
def test_a_warpgroup_alone_feeds_itself(stages, key_tile, size, dtype, capfd):
    """Shares that begin and end inside rows, and rows of one tile after another."""
    args = make([130, 0, 1, 300], [1, 1, 0, 1], size=size)
    config = pa.SplitConfig(ctas=3, stages=stages, key_tile=key_tile, alone=True)
    check_quantised(args, 1, dtype, capfd, config=config)


def test_int8_weights_are_those_of_their_tile(capfd):
    """Beside a key that takes nearly everything, thousands of small ones still count."""
    q, k_pool, _, table, *rest = make([3000], [1], heads=2, kv_heads=1, size=64)
    first = (table[0, 0], 0, 0)
    k = jnp.full(k_pool.shape, -123, jnp.int8).at[first].set(127)  # logits 10 apart
    v = jnp.full(k_pool.shape, 100, jnp.int8).at[first].set(0)
    scales = dict.fromkeys(("k_scale", "v_scale"), jnp.full(k.shape[:3], 0.005))
    args = (jnp.ones_like(q), k, v, table, *rest)
    config = pa.SplitConfig(ctas=2, stages=2, alone=True)
    out, _ = run(args, 1, config=config, **scales)
    want = np.asarray(pa.paged_attention_reference(*args, **scales)[0])
    assert 0.05 < want[0, 0, 0] < 0.1  # of 0.5
    np.testing.assert_allclose(out[0], want[0], rtol=2e-2)
    assert "RACE" not in capfd.readouterr().out


PREFILL_NARROW = pa.PrefillConfig(consumers=2, block_kv=64, stages=2)
NEAR = dict(apart=1)  # scores of a few, so that many keys weigh


@pytest.mark.parametrize(
    "dtype,size", [(jnp.float8_e4m3fn, 16), pytest.param(jnp.int8, 64, marks=pytest.mark.slow)]
)
def test_a_chunk_over_one_byte_pools(dtype, size, capfd):
    """Tiles are converted on their way; a row that ends inside a block, one of few tokens."""
    args = make([200, 0, 70], [130, 0, 9], size=size)
    check_quantised(args, 130, dtype, capfd, config=PREFILL_NARROW, window=90, **NEAR)


@pytest.mark.slow
def test_a_chunk_with_fixed_scales(capfd):
    args = make([150], [150], size=32)
    sinks = jnp.linspace(-1, 2, 8)
    options = dict(fixed=True, config=PREFILL_NARROW, sinks=sinks, **NEAR)
    check_quantised(args, 150, jnp.int8, capfd, **options)


def test_queries_are_whole_in_terms_of_one_byte():
    """Whatever XLA may leave out: two terms of e4m3 hold a bf16, compiled or not."""
    q = jax.random.normal(jax.random.key(0), (64, 128), jnp.bfloat16)
    q = q.at[0, :3].set(jnp.array([3e38, 1.7578125, -3.1e38], q.dtype)).astype(jnp.float32)

    def terms(q, dtype):
        top = jnp.abs(q).max(-1, keepdims=True)
        factor, inverse = quantised.factor_of(top, dtype)
        parts = onebyte.split(q * inverse, dtype, 2)
        weighed = [t.astype(jnp.float32) / quantised.base(dtype) ** i for i, t in enumerate(parts)]
        return sum(weighed) * factor

    for dtype, error in ((quantised.E4M3, 2.0**-15), (quantised.INT8, 2.0**-14)):
        whole = jax.jit(terms, static_argnums=1)(q, dtype)
        assert (jnp.abs(whole - q) <= error * jnp.abs(q).max(-1, keepdims=True)).all()


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_fixed_scales_of_heads(dtype, capfd):
    args = make([130, 40], [1, 1], size=32)
    sinks = jnp.linspace(-1, 2, 8)
    check_quantised(args, 1, dtype, capfd, fixed=True, sinks=sinks)


@pytest.mark.smoke
@pytest.mark.parametrize("apart", [1, 8])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_the_bounds_see_what_is_wrong(dtype, apart):
    """A query without its second term, or scores off by 1%, lies beyond them in most rows."""
    args, scales = quantise(make([150, 33], [1, 1], dim=128, spare=0), dtype, apart=apart)
    arithmetic = one_byte.Arithmetic(dtype, args[0].dtype, 64)
    (_, lse), (_, most) = one_byte.attention(args, arithmetic, **scales)
    q = args[0].astype(jnp.float32)
    factor, inverse = quantised.factor_of(jnp.abs(q).max(-1, keepdims=True), dtype)
    first = onebyte.split(q * inverse, dtype, 1)[0].astype(jnp.float32) * factor
    for wrong in (first, q * 1.01):
        (_, other), _ = one_byte.attention((wrong, *args[1:]), arithmetic, **scales)
        assert (np.abs(other - lse) > most).mean() > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_every_block_and_head_size_of_one_byte(dtype, dim, size, capfd):
    args = make([150, 33], [1, 1], heads=4, kv_heads=2, dim=dim, size=size, dtype=jnp.float16)
    check_quantised(args, 1, dtype, capfd, config=pa.SplitConfig(ctas=3, stages=1))


# --------------------------------------------------------------- trees, positions, shared prefixes


def tree_words(parents):
    """(u32 words [n, 1], depth [n]) of a tree: a node sees its ancestors and itself."""
    words, depth = np.zeros((len(parents), 1), np.uint32), np.zeros(len(parents), np.int32)
    for i, parent in enumerate(parents):
        words[i] = np.uint32(1 << i) | (words[parent] if parent >= 0 else np.uint32(0))
        depth[i] = 0 if parent < 0 else depth[parent] + 1
    return words, depth


def test_trees_see_their_ancestors(capfd):
    """The new tokens of a row straddle two key tiles, of another row they are all keys."""
    args = make([66, 5, 130], [5, 5, 1], heads=8, kv_heads=2, spare=0)
    trees = [tree_words(p) for p in ([-1, 0, 0, 1, 2], [-1, 0, 1, 1, -1], [-1])]
    mask = jnp.asarray(np.concatenate([w for w, _ in trees]))
    starts = np.repeat([61, 0, 129], [5, 5, 1])
    positions = jnp.asarray(starts + np.concatenate([d for _, d in trees]), jnp.int32)
    slopes = jnp.linspace(0.1, 1, 8)
    options = dict(tree_mask=mask, positions=positions, window=50, alibi_slopes=slopes)
    check(args, 5, capfd, config=SPLIT, **options)


@pytest.mark.slow
def test_a_tree_beyond_one_word(capfd):
    """More than 32 query tokens in a tile and more than 32 nodes: two words of both."""
    args = make([90], [40], heads=1, kv_heads=1)
    seen = np.tril(np.ones((41, 40), np.uint32)) * (np.arange(40) % 3 != 1)
    words = np.zeros((41, 2), np.uint32)
    for j in range(40):
        words[:, j // 32] |= seen[:, j] << np.uint32(j % 32)
    check(args, 40, capfd, config=SPLIT, tree_mask=jnp.asarray(words))


@pytest.mark.smoke
def test_a_shared_prefix_is_read_through_its_own_table(capfd):
    """Whole shared blocks are poisoned in the rows' tables; a prefix may end inside a block."""
    lens, new = [150, 130, 70, 40], [1, 2, 1, 1]
    args = list(make(lens, new, heads=4, kv_heads=1, spare=0))
    table = np.array(args[3])
    prefix = table[0].copy()
    table[1, :6] = table[0, :6]
    want, want_lse = map(
        np.asarray, pa.paged_attention_reference(*args[:3], jnp.asarray(table), *args[4:])
    )
    table[:2, :5] = table[0, -1]
    args[3] = jnp.asarray(table)
    shared = jnp.asarray(np.stack([prefix[:6], prefix[:6]]))
    cascade = (shared, jnp.array([0, 90]), jnp.array([1, 1, -1, -1]))
    sinks = jnp.linspace(-1, 2, 4)
    out, lse = run(args, 2, config=SPLIT, cascade=cascade, sinks=sinks)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)
    share = 1 / (1 + np.exp(np.asarray(sinks) - lse))
    np.testing.assert_allclose(out, want * share[..., None], atol=1.5e-2)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("heads, kv_heads", [(8, 2), (8, 8)])
def test_single_tokens_of_small_groups_share_a_prefix(heads, kv_heads, capfd):
    """Eight columns hold the groups of several KV heads: every one sees its row's new key."""
    lens = [40, 36, 20]
    args = list(make(lens, [1, 1, 1], heads=heads, kv_heads=kv_heads, spare=0))
    table = np.array(args[3])
    table[1, :2] = table[0, :2]
    args[3] = jnp.asarray(table)
    cascade = (jnp.asarray(table[:1]), jnp.array([32]), jnp.array([0, 0, -1]))
    slopes = jnp.linspace(0.1, 1, heads)
    options = dict(config=SPLIT, alibi_slopes=slopes)
    want, want_lse = pa.paged_attention_reference(*args, alibi_slopes=slopes)
    out, lse = run(args, 1, cascade=cascade, **options)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)
    np.testing.assert_allclose(out, want, atol=1.5e-2)
    positions = jnp.array(lens) - 1
    out, lse = run(args, 1, positions=positions, **options)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)
    assert "RACE" not in capfd.readouterr().out


# ------------------------------------------------------------------------------------ prefill


@pytest.mark.smoke
def test_prefill_of_ragged_rows(capfd):
    """A chunk over a prefix, a fresh prompt, an empty row and a decode, in one call."""
    args = make([300, 7, 0, 40], [70, 7, 0, 1], heads=4, kv_heads=1)
    check(args, 70, capfd, config=PREFILL)


def test_prefill_with_tiles_of_192_keys(capfd):
    """Late sums; a row that ends inside the first tile, and one that fills two."""
    args = make([384, 130], [9, 40], heads=4, kv_heads=1)
    check(args, 40, capfd, config=pa.PrefillConfig(block_kv=192, late_sum=True))


def test_prefill_with_options(capfd):
    args = make([200, 150], [40, 20], heads=3, kv_heads=1, size=256)
    options = dict(window=100, logits_soft_cap=20.0)
    vectors = dict(alibi_slopes=jnp.linspace(0.1, 1, 3), sinks=jnp.linspace(-1, 2, 3))
    check(args, 40, capfd, config=PREFILL, **options, **vectors)


@pytest.mark.slow
def test_a_mixed_call_runs_both_kernels(capfd):
    """Static shapes that choose the split-KV and the prefill kernel; each takes its own rows."""
    args = make([600, 90, 33], [540, 1, 2], heads=32, kv_heads=8)
    geom = Geometry(543 + 1, 32, 8, 64, 64, args[1].shape[0], 16, 3, args[3].shape[1], max_q=540)
    assert [type(c) for c in pa.default_plan(geom)] == [pa.SplitConfig, pa.PrefillConfig]
    check(args, 540, capfd, config=None)


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("kernel", ["split", "cluster", "prefill"])
def test_every_block_and_head_size(kernel, dim, size, capfd):
    config = {
        "split": pa.SplitConfig(ctas=3, stages=1),
        "cluster": pa.ClusterConfig(cluster=2, warpgroups=1, stages=1),
        "prefill": PREFILL,
    }[kernel]
    new = [17, 1] if kernel == "prefill" else [1, 1]
    args = make([150, 33], new, heads=4, kv_heads=1, dim=dim, size=size, dtype=jnp.float16)
    check(args, max(new), capfd, config=config)


# ------------------------------------------- a row's first key to read and its last in one block

INT8, E4M3 = jnp.int8, jnp.float8_e4m3fn
CLUSTER = pa.ClusterConfig(cluster=2, warpgroups=1, stages=2)
NARROW_WINDOWS = {  # (pool, config): rows of one query, or chunks for the prefill kernel
    "split": (None, SPLIT),
    "cluster": (None, CLUSTER),
    "prefill": (None, PREFILL),
    "split-fp8": (E4M3, SPLIT),
    "alone-fp8": (E4M3, pa.SplitConfig(ctas=3, stages=1, key_tile=128, alone=True)),
    "prefill-fp8": (E4M3, PREFILL_NARROW),
    "split-int8": (INT8, SPLIT),
    "prefill-int8": (INT8, PREFILL_NARROW),
}


@pytest.mark.parametrize("name", list(NARROW_WINDOWS))
def test_a_window_shorter_than_a_block(name, capfd):
    """Blocks of a tile before the one that is read repeat it, with the dead slots of its end."""
    dtype, config = NARROW_WINDOWS[name]
    args = make([100, 58, 5, 64], [1, 2, 1, 1], heads=4)
    if dtype is None:
        check(args, 2, capfd, config=config, window=3, evicted=(0, 4))
    else:
        check_quantised(args, 2, dtype, capfd, config=config, window=3, **NEAR)


@pytest.mark.parametrize("kind", ["tree", "cascade"])
def test_blocks_before_a_window_may_be_gone(kind, capfd):
    """Trees and cascades too read no block before the window, in whatever tile it lies."""
    args = make([170, 100], [3, 1], heads=4, kv_heads=1, spare=0)
    q, k_pool, v_pool, table, *rest = args
    causal = jnp.array([[1], [3], [7], [1]], jnp.uint32)
    shared = table[:1, :2], jnp.array([32]), jnp.array([0, -1])
    options = dict(tree_mask=causal) if kind == "tree" else dict(cascade=shared)
    want, want_lse = pa.paged_attention_reference(*args, window=20)
    gone = table.at[0, :9].set(table[0, -1]).at[1, :5].set(table[0, -1])
    args = (q, k_pool, v_pool, gone, *rest)
    out, lse = run(args, 3, config=SPLIT, window=20, **options)
    np.testing.assert_allclose(out, want, atol=1.5e-2)
    np.testing.assert_allclose(lse, want_lse, atol=1e-4)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize("dtype", [jnp.bfloat16, E4M3, INT8])
def test_a_cascade_leaves_keys_within_one_block(dtype, capfd):
    """The shared prefix ends inside the rows' last block, whose slots before that are dead too."""
    shared, size = 90, 16
    args = make([shared, 94, 93], [0, 1, 1], heads=4, kv_heads=1, size=size, spare=0)
    scales = {}
    if dtype != jnp.bfloat16:
        args, scales = quantise(args, dtype)
    q, k_pool, v_pool, table, *rest = args
    whole, left = divmod(shared, size)
    prefix, own = table[0, : whole + 1], table[1:, whole]
    pools = dict(k=k_pool, v=v_pool, **scales)

    def with_slots(value):
        """The pools, those of the shared keys in the rows' own blocks set to `value(pool)`."""
        return {name: x.at[own, :, :left].set(value(x)) for name, x in pools.items()}

    def call(f, pools, table, **options):
        scales = {name: pools[name] for name in pools if "scale" in name}
        return f((q, pools["k"], pools["v"], table, *rest), **scales, **options)

    full = table.at[1:, :whole].set(prefix[:whole])
    copied = with_slots(lambda x: x[prefix[-1], :, :left])
    reference = lambda args, **options: pa.paged_attention_reference(*args, **options)
    want, want_lse = map(np.asarray, call(reference, copied, full))
    dead = with_slots(lambda x: 77 if x.dtype == INT8 else jnp.nan)
    poisoned = table.at[1:, :whole].set(table[0, -1])
    cascade = prefix[None], jnp.array([shared]), jnp.array([-1, 0, 0])
    out, lse = call(run, dead, poisoned, max_q=1, config=SPLIT, cascade=cascade)
    np.testing.assert_allclose(out, want, atol=1e-2 * np.abs(want).max())
    np.testing.assert_allclose(lse, want_lse, atol=1e-3, rtol=1e-4)
    assert "RACE" not in capfd.readouterr().out


# --------------------------------------------------------------------------------------- laws


def test_blocks_do_not_matter():
    """The same sequences in blocks of 16 and of 64 give the same bits."""
    outs = []
    for size in (16, 64):
        args = list(make([130, 70], [1, 1], heads=4, kv_heads=1, size=16, spare=0))
        if size == 64:
            args[1:4] = _regroup(*args[1:4], 4)
        outs.append(run(args, 1, config=SPLIT)[0])
    np.testing.assert_array_equal(*outs)


def _regroup(k_pool, v_pool, table, factor):
    """Pools and table with blocks `factor` times as large."""
    table = np.pad(table, ((0, 0), (0, -table.shape[1] % factor)), mode="edge")
    rows, num = table.shape[0], table.shape[1] // factor
    ids = table.reshape(rows * num, factor)

    def regroup(pool):
        x = np.asarray(pool, np.float32)[ids]  # [rows * num, factor, K, size, H]
        x = np.moveaxis(x, 1, 2).reshape(rows * num, pool.shape[1], -1, pool.shape[3])
        return jnp.asarray(x, pool.dtype)

    new = jnp.arange(rows * num, dtype=jnp.int32).reshape(rows, num)
    return regroup(k_pool), regroup(v_pool), new


def test_deterministic_rows_do_not_see_their_batch():
    """The last query of a row: decoded alone, or in a chunk beside other rows, the same bits."""
    args = make([200, 70, 9], [6, 1, 9], heads=16, kv_heads=1, spare=0)
    config = pa.SplitConfig(stages=1, fixed_chunk=64)
    both = run(args, 9, config=config)[0]
    q, k_pool, v_pool, table, lens, _ = args
    indptr = jnp.array([0, 1], jnp.int32)
    alone = run((q[5:6], k_pool, v_pool, table[:1], lens[:1], indptr), 1, config=config)[0]
    np.testing.assert_array_equal(alone[0], both[5])
    want, _ = pa.paged_attention_reference(*args)
    np.testing.assert_allclose(both, want, atol=1.5e-2)


rows = st.lists(
    st.tuples(st.integers(0, 700), st.integers(0, 40)).map(lambda x: (max(x[0], x[1]), x[1])),
    min_size=1,
    max_size=6,
)


@pytest.mark.smoke
@hypothesis.settings(deadline=None, max_examples=25)
@hypothesis.given(
    rows=rows,
    window=st.sampled_from([None, 1, 100]),
    ctas=st.sampled_from([1, 7]),
    uncut=st.booleans(),
)
def test_shares_cover_every_key_tile_once(rows, window, ctas, uncut):
    """The shares, read one after another, are all key tiles of all segments in order."""
    lens, new = (np.array(x, np.int32) for x in zip(*rows, strict=True))
    lens, new = (np.concatenate([x, np.zeros(6 - len(x), np.int32)]) for x in (lens, new))
    indptr = np.concatenate([[0], np.cumsum(new)]).astype(np.int32)
    geom = Geometry(6 * 40, 8, 2, 64, 64, 99, 16, 6, 44, max_q=40, q_tokens=4)
    tiles, shares, dead = map(np.asarray, _work_list(lens, indptr, geom, window, ctas, uncut))
    want, tokens = [], set()
    for r in range(6):
        for i in range(0, new[r], 4):
            last = min(i + 4, new[r]) - 1
            first = lens[r] - new[r] + i
            low = max(first - window + 1, 0) // 64 if window else 0
            high = (lens[r] - new[r] + last) // 64 + 1
            tokens |= set(range(indptr[r] + i, indptr[r] + last + 1))
            want += [(r, indptr[r] + i, h, t) for h in range(2) for t in range(low, high)]
    got = []
    for c in range(ctas):
        u, head, offset = shares[c, [wl.TILE, wl.HEAD, wl.OFFSET]]
        merge = offset > 0 and shares[c, wl.LENGTH] >= tiles[u, wl.COUNT] - offset
        begun = [x for x in range(c) if shares[x, wl.LENGTH]]
        if merge:  # the partials of all shares from MERGE_FROM on belong to this segment
            start = sum(shares[x, wl.LENGTH] for x in begun[: shares[c, wl.MERGE_FROM]])
            end = start + shares[shares[c, wl.MERGE_FROM], wl.LENGTH]
            assert start <= len(got) - offset < end
        else:
            assert shares[c, wl.MERGE_FROM] == -1
        np.testing.assert_array_equal(shares[c, wl.FACTS :], tiles[u])
        for _ in range(shares[c, wl.LENGTH]):
            fact = tiles[u]
            got.append((fact[wl.ROW], fact[wl.FIRST_TOKEN], head, fact[wl.KEY_TILE] + offset))
            offset += 1
            if offset == fact[wl.COUNT]:
                offset, head = 0, head + 1
            if head == 2:
                head, u = 0, fact[wl.NEXT]
        assert offset == 0 or not uncut
    assert got == want
    assert {t for t in range(240) if not dead[t]} == tokens
    lengths = shares[:, wl.LENGTH]
    if uncut:
        assert lengths.max() - lengths.sum() // ctas <= tiles[:, wl.COUNT].max()
    else:
        assert lengths.max() - lengths.min() <= 1


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def _work_list(lens, indptr, geom, window, ctas, uncut):
    options = dict(key_tile=64, ctas=ctas, window=window, uncut=uncut)
    return wl.make_work_list(lens, indptr, geom, **options)


# ------------------------------------------------------------------------------------ refusals


def _shapes(t=2, n=8, k=2, h=64, size=16, rows=2, dtype=jnp.bfloat16):
    sds = jax.ShapeDtypeStruct
    pool, i32 = sds((9, k, size, h), dtype), jnp.int32
    return (
        sds((t, n, h), dtype),
        pool,
        pool,
        sds((rows, 4), i32),
        sds((rows,), i32),
        sds((rows + 1,), i32),
    )


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("shapes", "options", "error"),
    [
        (_shapes(h=96), {}, NotImplementedError),
        (_shapes(dtype=jnp.float32), {}, NotImplementedError),
        (_shapes(size=24), {}, NotImplementedError),
        (_shapes(n=9), {}, ValueError),
        (_shapes(), dict(window=0), ValueError),
        (_shapes(), dict(max_q=0), ValueError),
        (_shapes(), dict(logits_soft_cap=-1.0), ValueError),
        (_shapes(), dict(sinks=jnp.zeros(3)), ValueError),
        ((*_shapes()[:4], *_shapes(rows=3)[4:]), {}, ValueError),
        (_shapes(), dict(config=pa.SplitConfig(stages=99)), NotImplementedError),
    ],
)
def test_refusals(shapes, options, error):
    with pytest.raises(error):
        jax.eval_shape(functools.partial(pa.paged_attention, **{"max_q": 1, **options}), *shapes)


# ------------------------------------------------------------------------- lowering for Hopper


def lower(shapes, max_q, config=None, **options):
    f = jax.jit(functools.partial(pa.paged_attention, max_q=max_q, config=config, **options))
    return f.trace(*shapes).lower(lowering_platforms=("cuda",))


LOWERINGS = {
    "cluster": (_shapes(t=1, n=32, k=8, h=128, rows=1), 1),
    "split": (_shapes(t=64, n=32, k=8, h=128, rows=64), 1),
    "verify": (_shapes(t=64, n=32, k=8, h=128, rows=16), 5),
    "mixed": (_shapes(t=600, n=32, k=8, h=128, rows=65), 512),
    "h256": (_shapes(t=600, n=16, k=8, h=256, size=64, rows=65), 512),
}


@pytest.mark.parametrize("name", ["cluster", pytest.param("mixed", marks=pytest.mark.smoke)])
def test_lowers_for_cuda(name):
    assert "mosaic_gpu" in lower(*LOWERINGS[name]).as_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LOWERINGS))
def test_lowers_for_cuda_with_options(name):
    shapes, max_q = LOWERINGS[name]
    n = shapes[0].shape[1]
    vectors = dict(alibi_slopes=jnp.ones(n), sinks=jnp.ones(n))
    options = dict(window=100, logits_soft_cap=9.0, return_lse=True, **vectors)
    assert "mosaic_gpu" in lower(shapes, max_q, **options).as_text()
