"""paged_attention and write_kv against dense attention on gathered rows, and their laws."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidx.ops.paged_attention import PagedAttentionConfig, paged_attention
from aidx.ops.rope import apply_rope, rope_angles
from aidx.ops.write_kv import quantise, write_kv
from tests.ops import cases, dense

N, K, H, HV = 4, 2, 8, 6
SMALL = PagedAttentionConfig(block_size_q=8, chunk_size_kv=16)  # many chunks and tiles


def batch(rows, block_size=4, width=16, pool=72, spare=3, seed=0, tokens=None):
    """q, pools with NaN in every slot that no row owns, shuffled tables padded with -1, lengths."""
    rng = np.random.default_rng(seed)
    indptr = np.cumsum([0] + [n for n, _ in rows]).astype(np.int32)
    tables = np.full((len(rows), width), -1, np.int32)
    k = np.full((pool, K, block_size, H), np.nan, np.float32)
    v = np.full((pool, K, block_size, HV), np.nan, np.float32)
    free = list(rng.permutation(pool))
    for r, (_, length) in enumerate(rows):
        for m in range(-(-length // block_size)):
            block, used = free.pop(), min(block_size, length - m * block_size)
            tables[r, m] = block
            k[block, :, :used] = rng.normal(size=(K, used, H))
            v[block, :, :used] = rng.normal(size=(K, used, HV))
    size = indptr[-1] + spare if tokens is None else tokens
    q = rng.normal(size=(size, N, H)).astype(np.float32)
    return q, k, v, tables, np.array([s for _, s in rows], np.int32), indptr


def check(arrays, max_q, ours=None, theirs=None, **call):
    call = {"config": SMALL} | call
    out, lse = paged_attention(*arrays, max_q=max_q, return_lse=True, **(ours or {}), **call)
    ref, ref_lse = dense.paged(*arrays, **(theirs or {}))
    chex.assert_trees_all_close(out, ref, atol=2e-5)
    chex.assert_trees_all_close(lse, ref_lse, atol=2e-5)


SLOPES = np.array([0.5, 0.25, 0.1, 0.05], np.float32)
SINKS = np.array([0.3, -1.0, 2.0, 0.0], np.float32)
OPTIONS = {
    "none": ({}, {}),
    "window": ({"window": 9}, {"window": 9}),
    "soft_cap": ({"logits_soft_cap": 1.5}, {"soft_cap": 1.5}),
    "alibi": ({"alibi_slopes": SLOPES}, {"alibi_slopes": SLOPES}),
    "sinks": ({"sinks": SINKS}, {"sinks": SINKS}),
    "scale": ({"scale": 0.8}, {"scale": 0.8}),
    "deterministic": ({"deterministic": True}, {}),
}
PAIRS = [
    ("decode", ("none",)),
    ("decode", ("window", "sinks")),
    ("decode", ("deterministic", "soft_cap")),
    ("verify", ("alibi", "scale")),
    ("verify", ("window", "deterministic")),
    ("prefill", ("window", "soft_cap")),
    ("prefill", ("sinks", "alibi")),
    ("mixed", ("none",)),
    ("mixed", ("window", "alibi", "sinks")),
]


@pytest.mark.parametrize(("name", "options"), PAIRS)
def test_rows_match_dense_attention(name, options):
    ours, theirs = {}, {}
    for option in options:
        ours |= OPTIONS[option][0]
        theirs |= OPTIONS[option][1]
    rows = cases.PAGED_SMALL[name]
    check(batch(rows), max(n for n, _ in rows), ours, theirs)


def test_tokens_may_come_first_in_the_pool():
    """The layout of a contiguous cache, scales of one-byte pools as ever."""
    rows = cases.PAGED_SMALL["mixed"]
    q, k, v, *rest = batch(rows)
    first = lambda x: x.swapaxes(1, 2)
    call = dict(max_q=max(n for n, _ in rows), config=SMALL)
    out = paged_attention(q, first(k), first(v), *rest, tokens_first=True, **call)
    np.testing.assert_array_equal(out, paged_attention(q, k, v, *rest, **call))
    stored, scale = quantise(jnp.nan_to_num(k), jnp.int8)
    call |= dict(k_scale=scale, v_scale=scale)
    out = paged_attention(q, first(stored), first(stored), *rest, tokens_first=True, **call)
    np.testing.assert_array_equal(out, paged_attention(q, stored, stored, *rest, **call))
    with pytest.raises(ValueError, match="k_scale must be"):
        paged_attention(q, stored, stored, *rest, tokens_first=True, **call)


@pytest.mark.slow
@pytest.mark.parametrize("name", cases.PAGED_SMALL)
@pytest.mark.parametrize("a", OPTIONS)
@pytest.mark.parametrize("b", OPTIONS)
@pytest.mark.parametrize("block_size", [1, 16])
def test_all_pairs_match_dense_attention(name, a, b, block_size):
    rows = cases.PAGED_SMALL[name]
    arrays = batch(rows, block_size, -(-64 // block_size), 300 // block_size)
    ours, theirs = OPTIONS[a][0] | OPTIONS[b][0], OPTIONS[a][1] | OPTIONS[b][1]
    check(arrays, max(n for n, _ in rows), ours, theirs)


@pytest.mark.smoke
def test_the_sizes_chosen_here():
    check(batch(cases.PAGED_SMALL["mixed"]), None, config=None)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 24), st.integers(0, 40)), min_size=6, max_size=6),
       st.integers(0, 9))  # fmt: skip
def test_any_mix_of_rows(mix, seed):
    rows = [(n, min(64, n + old)) for n, old in mix]
    check(batch(rows, pool=100, seed=seed, tokens=150), 24)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 61)), min_size=6, max_size=6))
def test_any_mix_of_short_rows(mix):
    rows = [(n, n + old) for n, old in mix]
    check(batch(rows, pool=100, tokens=20), 3)


# --- trees, positions, shared prefixes -----------------------------------------------------------


def tree_batch():
    rows = [(5, 30), (3, 3), (1, 17)]
    parents = [[-1, 0, 0, 1, 2], [-1, 0, 0], [-1]]
    total = sum(n for n, _ in rows)
    words, positions = np.zeros((total + 3, 1), np.uint32), np.zeros(total + 3, np.int32)
    seen, t = {}, 0
    for (n, length), parent in zip(rows, parents, strict=True):
        for i in range(n):
            chain, node = [False] * n, i
            while node >= 0:
                chain[node], node = True, parent[node]
            seen[t] = chain
            words[t, 0] = sum(1 << j for j in range(n) if chain[j])
            positions[t] = length - n + sum(chain) - 1
            t += 1
    return batch(rows), words, positions, seen


@pytest.mark.parametrize("max_q", [5, 20])
def test_trees_see_their_ancestors_only(max_q):
    arrays, words, positions, seen = tree_batch()
    check(
        arrays,
        max_q,
        {"tree_mask": words, "positions": positions, "window": 12, "alibi_slopes": SLOPES},
        {"tree": seen, "positions": positions, "window": 12, "alibi_slopes": SLOPES},
    )


def test_a_tree_of_more_than_one_word():
    arrays = batch([(40, 50)])
    words = np.zeros((43, 2), np.uint32)
    seen = {t: [(t + j) % 3 == 0 or j == t for j in range(40)] for t in range(40)}
    for t, row in seen.items():
        for j, bit in enumerate(row):
            words[t, j // 32] |= np.uint32(bit << (j % 32))
    check(arrays, 40, {"tree_mask": words}, {"tree": seen})


@pytest.mark.parametrize("extra", [{}, {"window": 14, "sinks": SINKS, "alibi_slopes": SLOPES}])
def test_a_shared_prefix_changes_no_answer(extra):
    q, k, v, tables, context, indptr = batch([(1, 30), (3, 44), (1, 21), (12, 40)])
    tables[1, :4] = tables[0, :4]
    tables[3, :2] = tables[2, :2]
    shared = np.stack([tables[0, :4], np.r_[tables[2, :2], -1, -1]])
    # Only 13 of the 16 shared slots: the length need not be a whole number of blocks.
    cascade = (shared, np.array([13, 8]), np.array([0, 0, 1, 1]))
    run = functools.partial(
        paged_attention, q, k, v, context_lens=context, q_indptr=indptr, max_q=12, config=SMALL,
        return_lse=True, **extra,
    )  # fmt: skip
    ref = run(block_tables=tables)
    poisoned = tables.copy()
    poisoned[:2, :3] = poisoned[2:, :2].max()  # whole shared blocks are read through `shared` only
    chex.assert_trees_all_close(run(block_tables=poisoned, cascade=cascade), ref, atol=2e-5)
    alone = (shared, np.array([13, 8]), np.array([-1, 0, -1, 1]))
    chex.assert_trees_all_close(run(block_tables=tables, cascade=alone), ref, atol=2e-5)


# --- laws ----------------------------------------------------------------------------------------


def test_a_row_alone_is_the_row_in_a_batch_bitwise_when_deterministic():
    rows = cases.PAGED_SMALL["decode"]
    q, k, v, tables, context, indptr = batch(rows)
    call = functools.partial(paged_attention, deterministic=True, max_q=1, config=SMALL)
    together = call(q, k, v, tables, context, indptr)
    others = np.where(np.arange(len(rows)) == 1, context, 1)
    alone = call(q, k, v, np.maximum(tables, 0), others, indptr)
    chex.assert_trees_all_equal(alone[indptr[1]], together[indptr[1]])


def test_work_follows_the_longest_context_not_the_table():
    """Twice the table's width costs nothing: the loops end at the contexts."""
    q, k, v, tables, context, indptr = batch([(1, 20), (1, 7)])
    wide = np.concatenate([tables, np.full((2, 4096), -1, np.int32)], axis=1)
    out = paged_attention(q, k, v, wide, context, indptr, max_q=1, config=SMALL)
    ref = paged_attention(q, k, v, tables, context, indptr, max_q=1, config=SMALL)
    chex.assert_trees_all_close(out, ref, atol=1e-6)
    text = jax.jit(functools.partial(paged_attention, max_q=1, config=SMALL)).lower(
        q, k, v, wide, context, indptr
    )
    analysis = text.compile().memory_analysis()
    assert analysis.temp_size_in_bytes < 64 * 1024  # a whole gathered row is 4 MiB


def test_lengths_and_tables_recompile_nothing():
    traces = []

    @jax.jit
    def step(*arrays):
        traces.append(1)
        return paged_attention(*arrays, max_q=1, config=SMALL)

    for seed, rows in enumerate(([(1, 20), (1, 7)], [(0, 0), (1, 60)])):
        arrays = batch(rows, seed=seed, tokens=2)
        ref = dense.paged(*arrays)[0]
        chex.assert_trees_all_close(step(*arrays), ref, atol=2e-5)
    assert len(traces) == 1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_pools(dtype):
    arrays = batch(cases.PAGED_SMALL["mixed"])
    half = [jnp.asarray(x, dtype) for x in arrays[:3]]
    out = paged_attention(*half, *arrays[3:], max_q=20, config=SMALL)
    ref = dense.paged(*(np.asarray(x, np.float32) for x in half), *arrays[3:])[0]
    assert out.dtype == dtype
    chex.assert_trees_all_close(out.astype(jnp.float32), ref, atol=8 * float(jnp.finfo(dtype).eps))


# --- writing -------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_slot_gets_its_token_and_minus_one_writes_nothing():
    rng = np.random.default_rng(0)
    pool = rng.normal(size=(5, K, 4, H)).astype(np.float32)
    k, v = rng.normal(size=(2, 4, K, H)).astype(np.float32)
    slots = np.array([7, -1, 19, 2], np.int32)
    wrote = write_kv(jnp.asarray(pool), jnp.asarray(pool), k, v, slots)
    for got, x in zip(wrote, (k, v), strict=True):
        expected = pool.copy()
        for t, slot in enumerate(slots):
            if slot >= 0:
                expected[slot // 4, :, slot % 4] = x[t]
        chex.assert_trees_all_equal(np.asarray(got), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.int8])
def test_the_write_is_in_place_under_donation(dtype):
    scales = {}
    if dtype == jnp.int8:
        scales = {name: jnp.zeros((64, K, 16)) for name in ("k_scale", "v_scale")}
    pools = [jnp.zeros((64, K, 16, H), dtype) for _ in range(2)]
    x, slots = jnp.ones((3, K, H)), jnp.array([5, -1, 900], jnp.int32)
    step = jax.jit(
        lambda pools, scales: write_kv(*pools, x, x, slots, **scales), donate_argnums=(0, 1)
    )
    compiled = step.lower(pools, scales).compile()
    analysis = compiled.memory_analysis()
    held = sum(a.nbytes for a in jax.tree.leaves((pools, scales)))
    assert analysis.alias_size_in_bytes == held
    assert analysis.temp_size_in_bytes < pools[0].nbytes
    before = [p.unsafe_buffer_pointer() for p in pools]
    after = [p.unsafe_buffer_pointer() for p in compiled(pools, scales)[:2]]
    assert before == after


@pytest.mark.parametrize("where", ["k", "v", "q"])
@pytest.mark.parametrize("max_q", [1, 3])
def test_a_nan_stays_in_its_row(where, max_q):
    rows = [(max_q, 60), (1, 45), (max_q, 33), (1, 64)]  # several chunks each
    q, k, v, tables, context, indptr = batch(rows)
    good = paged_attention(q, k, v, tables, context, indptr, max_q=max_q, config=SMALL)
    if where == "q":
        q[indptr[1]] = np.nan
    else:
        {"k": k, "v": v}[where][tables[1, 3]] = np.nan
    out = paged_attention(q, k, v, tables, context, indptr, max_q=max_q, config=SMALL)
    hit = np.arange(len(q)) == indptr[1]
    assert np.isnan(out[hit]).all()
    chex.assert_trees_all_close(out[~hit], good[~hit], atol=1e-6)


@pytest.mark.parametrize("max_q", [2, 20])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
def test_dead_slots_of_the_only_block_in_a_window_change_nothing(dtype, shared, max_q):
    """NaN in values or in scales, in the last block's end and where a shared prefix is read."""
    rows = [(1, 44), (2, 21), (1, 5), (max_q, 58)]
    q, k, v, tables, context, indptr = batch(rows, block_size=16, width=5)
    call = dict(window=3, max_q=max_q, config=SMALL)
    if shared:
        own = tables[0, 2]
        elsewhere = np.setdiff1d(np.arange(len(k)), tables)[0]
        for pool in (k, v):  # slots 32 to 39 are read elsewhere, the row's own are dead
            pool[elsewhere] = pool[own]
            pool[own, :, :8] = np.nan
        prefix = np.append(tables[0, :2], elsewhere)
        call["cascade"] = (prefix[None], np.array([40]), np.array([0, -1, -1, -1]))
    one_byte = dtype != jnp.bfloat16

    def answer(dead):
        pools = [jnp.asarray(np.where(np.isnan(x), dead, x)) for x in (k, v)]
        scales = {}
        if one_byte:
            names = ("k_scale", "v_scale")
            scales = {n: jnp.where(np.isnan(k[..., 0]), dead, 0.5) for n in names}
        if dtype == jnp.int8:
            pools = [jnp.rint(jnp.nan_to_num(x, nan=9.0) * 9) for x in pools]
        pools = [x.astype(dtype) for x in pools]
        queries = jnp.asarray(q, jnp.bfloat16)
        return paged_attention(
            queries, *pools, tables, context, indptr, return_lse=True, **scales, **call
        )

    clean = answer(0.0)
    assert np.isfinite(np.asarray(clean[0], np.float32)).all()
    chex.assert_trees_all_equal(answer(np.nan), clean)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
def test_quantised_pools_equal_quantised_then_dense(dtype, fixed):
    rows = cases.PAGED_SMALL["mixed"] if fixed else cases.PAGED_SMALL["decode"]
    q, k, v, tables, context, indptr = batch(rows)
    block_size, length = k.shape[2], 16 * 72
    clean = [np.nan_to_num(x) for x in (k, v)]
    tokens = [np.moveaxis(x, 1, 2).reshape(-1, K, x.shape[-1])[:length] for x in clean]
    slots = np.arange(tokens[0].shape[0], dtype=np.int32)
    pools = [jnp.zeros(x.shape, dtype) for x in clean]
    one = jnp.array([0.02, 0.03])
    scale = one if fixed else jnp.zeros(k.shape[:3])
    result = write_kv(*pools, *tokens, slots, k_scale=scale, v_scale=scale)
    scales = (one, one) if fixed else result[2:]
    spread = [s[None, :, None, None] if fixed else s[..., None] for s in scales]
    wide = [np.asarray(p.astype(jnp.float32) * s) for p, s in zip(result[:2], spread, strict=True)]
    if not fixed:
        # Half a step of the largest value of each token and head, or fp8's three mantissa bits.
        step = 0.5 / 127 if dtype == jnp.int8 else 2.0**-4
        for got, x in zip(wide, clean, strict=True):
            assert (np.abs(got - x) <= step * np.abs(x).max(-1, keepdims=True) + 1e-6).all()
        scales = [jnp.where(np.isnan(k[..., 0]), jnp.nan, s) for s in scales]
    assert block_size == 4
    out = paged_attention(
        q, *result[:2], tables, context, indptr, k_scale=scales[0], v_scale=scales[1],
        max_q=max(n for n, _ in rows), config=SMALL,
    )  # fmt: skip
    chex.assert_trees_all_close(out, dense.paged(q, *wide, tables, context, indptr)[0], atol=2e-5)


def test_keys_and_queries_are_rotated_before_the_write():
    rng = np.random.default_rng(0)
    k, v, q = (jnp.asarray(rng.normal(size=(3, n, H)), jnp.float32) for n in (K, K, N))
    cos, sin = rope_angles(jnp.array([4, 0, 9]), np.ones(H // 2, np.float32))
    pool, slots = jnp.zeros((4, K, 4, H)), jnp.array([7, -1, 2])
    wrote = write_kv(pool, pool, k, v, slots, q=q, cos=cos, sin=sin)
    expected = write_kv(pool, pool, apply_rope(k, cos, sin), v, slots)
    chex.assert_trees_all_close(wrote, (*expected, apply_rope(q, cos, sin)), atol=1e-6)


def test_a_token_is_quantised_alone():
    x = jnp.stack([jnp.ones((K, H)), 100 * jnp.ones((K, H)), jnp.zeros((K, H))])
    stored, scale = quantise(x, jnp.int8)
    chex.assert_trees_all_equal(stored[0], stored[1])
    assert not stored[2].any() and not scale[2].any()


# --- what does not fit is refused, with its values -----------------------------------------------

GOOD = batch([(1, 5), (2, 9)])
NAMES = ("q", "k_pool", "v_pool", "block_tables", "context_lens", "q_indptr")
GOOD_CALL = dict(zip(NAMES, GOOD, strict=True))
INT8 = np.zeros(GOOD[1].shape, np.int8)
REFUSED = {
    "rank": (dict(q=GOOD[0][0]), ValueError, "T, N, H"),
    "pools": (dict(v_pool=GOOD[2][:3]), ValueError, "alike"),
    "head_dim": (dict(q=GOOD[0][..., :4]), ValueError, "head_dim"),
    "group": (dict(q=GOOD[0][:, :3]), ValueError, "no multiple"),
    "empty_pool": (dict(k_pool=GOOD[1][:0], v_pool=GOOD[2][:0]), ValueError, "empty"),
    "integer_q": (dict(q=GOOD[0].astype(int)), TypeError, "float"),
    "integer_pool": (dict(k_pool=np.zeros(GOOD[1].shape, np.int16)), TypeError, "int16"),
    "no_scale": (dict(k_pool=INT8), ValueError, "k_scale goes with"),
    "lone_scale": (dict(v_scale=np.ones(K)), ValueError, "v_scale goes with"),
    "scale_shape": (dict(k_pool=INT8, k_scale=np.ones(3)), ValueError, "k_scale must be"),
    "tables_dtype": (dict(block_tables=GOOD[3] * 1.0), TypeError, "block_tables"),
    "tables_rank": (dict(block_tables=GOOD[3][0]), ValueError, "block_tables"),
    "context_shape": (dict(context_lens=GOOD[4][:1]), ValueError, "context_lens"),
    "indptr_shape": (dict(q_indptr=GOOD[5][:2]), ValueError, "q_indptr"),
    "indptr_order": (dict(q_indptr=np.array([0, 2, 1])), ValueError, "ascend"),
    "indptr_start": (dict(q_indptr=np.array([1, 2, 3])), ValueError, "from 0"),
    "indptr_past": (dict(q_indptr=np.array([0, 1, 99])), ValueError, "ascend"),
    "max_q_zero": (dict(max_q=0), ValueError, "max_q"),
    "max_q_small": (dict(max_q=1), ValueError, "2 queries"),
    "context_short": (dict(context_lens=np.array([5, 1])), ValueError, "own queries"),
    "context_long": (dict(context_lens=np.array([5, 65])), ValueError, "16 x 4 slots"),
    "window": (dict(window=0), ValueError, "window"),
    "window_pair": (dict(window=(3, 0)), ValueError, "window"),
    "cap": (dict(logits_soft_cap=-1.0), ValueError, "positive"),
    "slopes": (dict(alibi_slopes=np.ones(3)), ValueError, "alibi_slopes"),
    "sinks": (dict(sinks=np.ones(4, int)), ValueError, "sinks"),
    "positions": (dict(positions=np.zeros(2, int)), ValueError, "positions"),
    "tree": (dict(tree_mask=np.zeros((6, 1), np.int32)), TypeError, "tree_mask"),
    "cascade": (
        dict(cascade=(GOOD[3], np.zeros(2, int), np.zeros(3, int))), ValueError, "cascade group",
    ),
    "implementation": (dict(implementation="vllm"), ValueError, "vllm"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_refused_with_its_values(name):
    arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        paged_attention(**(GOOD_CALL | arguments))


X, SLOTS, POOL = np.zeros((3, K, H), np.float32), np.zeros(3, np.int32), np.zeros((2, K, 4, H))
REFUSED_WRITES = {
    "pools": (dict(v_pool=POOL[:1]), ValueError, "alike"),
    "token": (dict(k=X[:2]), ValueError, "k must be"),
    "heads": (dict(v=X[:, :1]), ValueError, "v must be"),
    "slots": (dict(slots=SLOTS * 1.0), TypeError, "slots"),
    "one_quantised": (dict(k_pool=POOL.astype(np.int8)), TypeError, "one pool"),
    "no_scale": (dict(k_pool=INT8[:2], v_pool=INT8[:2]), ValueError, "go with"),
    "scale": (dict(k_scale=np.ones(K), v_scale=np.ones(K)), ValueError, "go with"),
    "scale_shape": (
        dict(k_pool=INT8[:2], v_pool=INT8[:2], k_scale=np.ones(3), v_scale=np.ones(K)),
        ValueError, "k_scale must be",
    ),
    "bare_queries": (dict(q=X), ValueError, "rotated"),
    "two_kinds": (
        dict(k_pool=INT8[:2], v_pool=INT8[:2], k_scale=np.ones((2, K, 4)), v_scale=np.ones(K)),
        ValueError, "one kind",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_WRITES)
def test_a_wrong_write_is_refused_with_its_values(name):
    arguments, error, message = REFUSED_WRITES[name]
    with pytest.raises(error, match=message):
        write_kv(**(dict(k_pool=POOL, v_pool=POOL, k=X, v=X, slots=SLOTS) | arguments))
