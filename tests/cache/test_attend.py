"""Attention through a cache is attention over the whole sequence, however it was cut into calls."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.cache import KVCache, KVCacheConfig, contiguous_attend, no_cache_attend
from aidx.cache import attend as attending

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
LENGTHS = (13, 9)


def dense(q, k, v, *, window=None, scale=None, soft_cap=None, sinks=None):
    """Causal attention in float64; q `[T, N, H]`, k and v `[T, K, H]`."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, q.shape[1] // x.shape[1], axis=1) for x in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) * (scale or q.shape[-1] ** -0.5)
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    distance = np.arange(len(q))[:, None] - np.arange(len(k))[None]
    scores = np.where((distance >= 0) & (distance < (window or len(k))), scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(np.asarray(sinks, np.float64)[:, None, None] - top)
    return np.einsum("nts,snh->tnh", weights / total, v)


def sequences(seed=0, rows=2, tokens=13):
    """q `[B, T, N, H]`, k and v `[B, T, K, H]`."""
    keys = jax.random.split(jax.random.key(seed), 3)
    heads = (HEADS, KV_HEADS, KV_HEADS)
    draw = lambda key, n: np.asarray(jax.random.normal(key, (rows, tokens, n, HEAD_DIM)))
    return [draw(key, n) for key, n in zip(keys, heads, strict=True)]


def config(**changes):
    geometry = dict(num_layers=1, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM)
    fields = dict(max_seq_len=16, max_batch=2, dtype="float32")
    return KVCacheConfig(**geometry, **{**fields, **changes})


@partial(jax.jit, static_argnames=("window", "scale", "soft_cap"), donate_argnums=0)
def call(cache, q, k, v, counts, sinks=None, **options):
    return contiguous_attend(counts)(cache, 0, q, k, v, sinks=sinks, **options)


def in_chunks(cache, q, k, v, chunks, width, **options):
    """Feed row b `chunks[i][b]` tokens in call i, padded with NaN to `width` (or to 1)."""
    out = np.full(q.shape, np.nan, np.float32)
    fed = np.zeros(len(q), int)
    for counts in chunks:
        tokens = 1 if max(counts) <= 1 else width
        padded = [np.full((len(x), tokens, *x.shape[2:]), np.nan, x.dtype) for x in (q, k, v)]
        for row, count in enumerate(counts):
            for new, whole in zip(padded, (q, k, v), strict=True):
                new[row, :count] = whole[row, fed[row] : fed[row] + count]
        given, cache = call(cache, *padded, jnp.array(counts), **options)
        for row, count in enumerate(counts):
            out[row, fed[row] : fed[row] + count] = given[row, :count]
            assert np.all(given[row, count:] == 0), "padding gives zeros"
        fed += counts
    assert cache.lengths[0].tolist() == fed.tolist()
    return out, cache


# Ragged prefill, chunks of other sizes, decode, pauses: rows end at 13 and 9 tokens.
SCHEDULE = [(5, 2), (1, 1), (0, 1), (3, 4), (1, 0), (1, 1), (2, 0)]

CASES = {
    "full": ({}, {}),
    "layer_window": ({}, dict(window=4)),
    "ring": (dict(window=4), dict(window=4)),
    "ring_with_rollback": (dict(window=4, rollback=2), dict(window=3)),
    "options": ({}, dict(scale=0.2, soft_cap=1.5, sinks=np.array([0.5, -1.0, 2.0, 0.0]))),
}


@pytest.mark.parametrize("case", CASES)
def test_prefill_and_decode_equal_full_attention(case):
    changes, options = CASES[case]
    q, k, v = sequences()
    traced = {**options}
    if "sinks" in traced:
        traced["sinks"] = jnp.asarray(traced["sinks"], jnp.float32)
    out, _ = in_chunks(KVCache.create(config(**changes)), q, k, v, SCHEDULE, 5, **traced)
    for row, length in enumerate(LENGTHS):
        expected = dense(q[row, :length], k[row, :length], v[row, :length], **options)
        np.testing.assert_allclose(out[row, :length], expected, atol=2e-6)


@pytest.mark.smoke
def test_a_cache_with_a_window_gives_full_layers_that_window():
    q, k, v = sequences()
    out, _ = in_chunks(KVCache.create(config(window=4)), q, k, v, SCHEDULE, 5)
    expected = dense(q[0], k[0], v[0], window=4)
    np.testing.assert_allclose(out[0], expected, atol=2e-6)


def test_a_prefill_longer_than_the_window_then_decode():
    q, k, v = sequences()
    out, _ = in_chunks(KVCache.create(config(window=4)), q, k, v, [(11, 8), (1, 1), (1, 0)], 11)
    for row, length in enumerate(LENGTHS):
        expected = dense(q[row, :length], k[row, :length], v[row, :length], window=4)
        np.testing.assert_allclose(out[row, :length], expected, atol=2e-6)


@pytest.mark.parametrize("window", [None, 4])
def test_with_int8_chunks_change_nothing(window):
    """A token sees its own chunk as every later token will see it: through the storage."""
    q, k, v = sequences()
    cache = lambda: KVCache.create(config(window=window, dtype="int8"))
    chunked, _ = in_chunks(cache(), q, k, v, SCHEDULE, 5)
    whole, _ = in_chunks(cache(), q, k, v, [LENGTHS], 13)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(chunked[row, :length], whole[row, :length], atol=2e-6)
        expected = dense(q[row, :length], k[row, :length], v[row, :length], window=window)
        np.testing.assert_allclose(whole[row, :length], expected, atol=0.05)
        assert np.abs(whole[row, :length] - expected).max() > 1e-4, "int8 was used"


def test_taking_tokens_back_and_going_on_equals_never_having_had_them():
    """As a rejected draft: with `rollback` even a full window is whole again."""
    q, k, v = sequences()
    wrong = [x[:, ::-1].copy() for x in (q, k, v)]
    cache = KVCache.create(config(window=4, rollback=2))
    _, cache = in_chunks(cache, q, k, v, [(5, 5), (3, 2)], 5)
    _, cache = call(cache, *(x[:, :5] for x in wrong), jnp.array([2, 2]))
    cache = cache.truncate(jnp.array([8, 7]))
    given, cache = call(cache, q[:, 8:9], k[:, 8:9], v[:, 8:9], jnp.array([1, 0]))
    expected = dense(q[0, :9], k[0, :9], v[0, :9], window=4)
    np.testing.assert_allclose(given[0, 0], expected[8], atol=2e-6)


def test_bf16_storage_of_a_f32_model_is_cast_both_ways():
    q, k, v = sequences()
    out, cache = in_chunks(KVCache.create(config(dtype="bfloat16")), q, k, v, [(5, 5)], 5)
    assert cache.k[0].dtype == jnp.bfloat16
    rounded = [np.asarray(jnp.asarray(x, jnp.bfloat16), np.float32) for x in (k, v)]
    expected = dense(q[0, :5], *(x[0, :5] for x in rounded))
    np.testing.assert_allclose(out[0, :5], expected, atol=2e-6)


@pytest.mark.smoke
def test_without_a_cache_it_is_causal_attention_and_packs():
    q, k, v = (x[0] for x in sequences())
    borders = jnp.array([0, 4, 13])

    @jax.jit
    def packed(q, k, v):
        return no_cache_attend(cu_seqlens=borders)("cache", 0, q, k, v, window=3)[0]

    out = packed(q, k, v)
    for start, stop in ((0, 4), (4, 13)):
        part = slice(start, stop)
        expected = dense(q[part], k[part], v[part], window=3)
        np.testing.assert_allclose(out[part], expected, atol=2e-6)


@pytest.mark.parametrize("changes", [{}, dict(window=4)])
def test_a_row_of_nan_hurts_no_other_row_and_no_later_tenant(changes):
    q, k, v = sequences()
    cache = KVCache.create(config(**changes))
    sick = lambda x: np.concatenate([x[:1, :5], np.full_like(x[1:, :5], np.nan)])
    given, cache = call(cache, sick(q), sick(k), sick(v), jnp.array([5, 5]))
    np.testing.assert_allclose(given[0], dense(q[0, :5], k[0, :5], v[0, :5], **changes), atol=2e-6)
    cache = cache.clear(1)
    given, cache = call(cache, *(np.roll(x[:, :5], 1, 0) for x in (q, k, v)), jnp.array([0, 3]))
    expected = dense(q[0, :3], k[0, :3], v[0, :3], **changes)
    np.testing.assert_allclose(given[1, :3], expected, atol=2e-6)


# Decode over the buffer as a pool of blocks: what a GPU runs.


def filled_cache(dtype, head_dim=64, size=48, rows=3):
    geometry = dict(num_layers=1, num_heads=4, num_kv_heads=2, head_dim=head_dim)
    cache = KVCache.create(KVCacheConfig(**geometry, max_seq_len=size, max_batch=rows, dtype=dtype))
    x = jax.random.normal(jax.random.key(0), (rows, size - 1, 2, head_dim), jnp.bfloat16)
    cache = cache.append(0, x, x + 1, jnp.array([5, 47, 20][:rows]))
    return cache.append(0, x[:, :1], x[:, :1], jnp.array([1, 1, 0][:rows]))


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("counts", [None, [1, 0, 1]])
def test_a_buffer_read_as_blocks_is_the_buffer(dtype, counts):
    """Rows of several lengths, one that does not take part, a window; heads of 64."""
    cache = filled_cache(dtype)
    q = jax.random.normal(jax.random.key(1), (3, 1, 4, 64), jnp.bfloat16)
    assert attending._is_pool(cache, 0, q)
    counts = counts and jnp.array(counts)
    for options in ({}, dict(window=7, scale=0.3, sinks=jnp.linspace(-1.0, 1.0, 4))):
        common = dict(logits_soft_cap=None, scale=None, sinks=None, window=None) | options
        as_pool = attending._decode_as_pool(cache, 0, q, counts, **common)
        as_rows = attending._decode(cache, 0, q, counts, **common)
        np.testing.assert_allclose(
            *(np.asarray(x, np.float32) for x in (as_pool, as_rows)), atol=0.03
        )


@pytest.mark.smoke
def test_decode_on_a_gpu_is_the_paged_kernel_without_a_copy():
    """The program for a GPU calls the kernel on the reshaped buffer; the one for a CPU does not."""
    cache = filled_cache("bfloat16", size=64)
    q, kv = jnp.ones((3, 1, 4, 64), jnp.bfloat16), jnp.ones((3, 1, 2, 64), jnp.bfloat16)

    def step(cache, q, kv):
        return contiguous_attend()(cache, 0, q, kv, kv)

    traced = jax.jit(step, donate_argnums=0).trace(cache, q, kv)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert "stablehlo.transpose" not in text
    assert "mosaic_gpu" not in traced.lower(lowering_platforms=("cpu",)).as_text()


@pytest.mark.parametrize("change", [dict(head_dim=8), dict(dtype="float32"), dict(size=49)])
def test_other_buffers_are_no_pools(change):
    cache = filled_cache(**({"dtype": "bfloat16"} | change))
    q = jnp.ones((3, 1, 4, change.get("head_dim", 64)), jnp.bfloat16)
    assert not attending._is_pool(cache, 0, q)
