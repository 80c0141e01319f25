"""The contiguous cache against lists of tokens, and what caches usually get wrong."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aidx.cache import CacheOverflow, KVCache, KVCacheConfig

ROWS, WIDTH, CAPACITY, WINDOW, ROLLBACK = 2, 5, 12, 3, 1
# Layer 0 keeps everything, layer 1 a window: they hold different numbers of tokens.
CONFIG = KVCacheConfig(
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    max_seq_len=CAPACITY,
    max_batch=ROWS,
    window=(None, WINDOW),
    rollback=ROLLBACK,
    dtype="float32",
)
append = jax.jit(KVCache.append, static_argnums=1, donate_argnums=0)
update_at = jax.jit(KVCache.update_at, static_argnums=1, donate_argnums=0)
truncate = jax.jit(KVCache.truncate, donate_argnums=0)
clear = jax.jit(KVCache.clear, donate_argnums=0)
reorder = jax.jit(KVCache.copy_batch_state)


def values(tokens, config=CONFIG):
    """K and V `[B, T, K, H]` that tell which token they belong to."""
    base = jnp.asarray(tokens, jnp.float32)[..., None, None]
    feature = jnp.arange(config.num_kv_heads * config.head_dim, dtype=jnp.float32) / 16
    k = base + feature.reshape(1, 1, config.num_kv_heads, config.head_dim)
    return k, -k


def held(cache, layer):
    """Per row {position: token} of what `get` says is there."""
    k, v, positions = (np.asarray(x) for x in cache.get(layer))
    rows = []
    for row in range(len(positions)):
        live = np.flatnonzero(positions[row] >= 0)
        assert len(set(positions[row, live])) == len(live)
        tokens = k[row, live, 0, 0]
        for slot, token in zip(live, tokens, strict=True):
            expected, _ = values(np.full((1, 1), token))
            np.testing.assert_array_equal(k[row, slot], expected[0, 0])
            np.testing.assert_array_equal(v[row, slot], -expected[0, 0])
        rows.append(dict(zip(positions[row, live].tolist(), tokens.tolist(), strict=True)))
    return rows


class Model:
    """One layer: what each row has taken (None where it was forgotten)."""

    def __init__(self, size, ring):
        self.rows, self.size, self.ring = [[] for _ in range(ROWS)], size, ring

    def append(self, row, tokens):
        self.rows[row] += tokens
        if self.ring:
            gone = max(len(self.rows[row]) - self.size, 0)
            self.rows[row][:gone] = [None] * gone

    def held(self, row):
        limit = len(self.rows[row]) if self.ring else self.size
        return {p: t for p, t in enumerate(self.rows[row][:limit]) if t is not None}


counts = st.tuples(*[st.integers(0, WIDTH)] * ROWS)
row = st.integers(0, ROWS - 1)
operations = st.lists(
    st.one_of(
        st.tuples(st.just("append"), counts),
        st.tuples(st.just("append"), counts),
        st.tuples(st.just("truncate"), st.tuples(*[st.integers(0, CAPACITY)] * ROWS)),
        st.tuples(st.just("clear"), row),
        st.tuples(st.just("reorder"), st.tuples(row, row)),
        st.tuples(st.just("update"), st.tuples(*[st.integers(-1, CAPACITY)] * ROWS)),
    ),
    max_size=14,
)


@settings(max_examples=40, deadline=None)
@given(operations)
def test_any_operations_in_any_order(steps):
    cache = KVCache.create(CONFIG)
    models = [Model(CAPACITY, False), Model(WINDOW + ROLLBACK, True)]
    token = 1
    for name, argument in steps:
        if name == "append":
            tokens = token + np.arange(ROWS * WIDTH).reshape(ROWS, WIDTH)
            token += tokens.size
            for layer, model in enumerate(models):
                cache = append(cache, layer, *values(tokens), jnp.array(argument))
                for r, count in enumerate(argument):
                    model.append(r, tokens[r, :count].tolist())
        elif name == "truncate":
            cache = truncate(cache, jnp.array(argument))
            for model in models:
                model.rows = [r[:n] for r, n in zip(model.rows, argument, strict=True)]
        elif name == "clear":
            cache = clear(cache, argument)
            for model in models:
                model.rows[argument] = []
        elif name == "reorder":
            cache = reorder(cache, jnp.array(argument))
            for model in models:
                model.rows = [model.rows[source][:] for source in argument]
        else:
            for layer, model in enumerate(models):
                tokens = token + np.arange(ROWS).reshape(ROWS, 1)
                cache = update_at(cache, layer, jnp.array(argument)[:, None], *values(tokens))
                for r, position in enumerate(argument):
                    if position in model.held(r):
                        model.rows[r][position] = int(tokens[r, 0])
            token += ROWS
        for layer, model in enumerate(models):
            assert cache.lengths[layer].tolist() == [len(r) for r in model.rows]
            assert held(cache, layer) == [model.held(r) for r in range(ROWS)]
        over = [len(r) > CAPACITY for r in models[0].rows]
        assert cache.overflowed.tolist() == over
        holes = [None in r[max(len(r) - WINDOW, 0) :] for r in models[1].rows]
        assert cache.incomplete.tolist() == [a or b for a, b in zip(over, holes, strict=True)]


@pytest.mark.smoke
def test_each_layer_has_its_own_length():
    cache = append(KVCache.create(CONFIG), 0, *values(np.ones((2, 5))), jnp.array([5, 2]))
    assert cache.lengths.tolist() == [[5, 2], [0, 0]]
    assert cache.next_positions(2, layer=0).tolist() == [[5, 6], [2, 3]]
    assert cache.next_positions(2, layer=1).tolist() == [[0, 1], [0, 1]]


@pytest.mark.smoke
def test_a_prefill_longer_than_the_window_keeps_its_end_and_its_positions():
    tokens = np.arange(1, 11).reshape(1, 10).repeat(2, 0)
    cache = append(KVCache.create(CONFIG), 1, *values(tokens))
    assert cache.lengths[1].tolist() == [10, 10]
    assert held(cache, 1) == [{6: 7, 7: 8, 8: 9, 9: 10}] * 2
    assert cache.next_positions(1, layer=1).tolist() == [[10], [10]]


def test_no_two_tokens_of_a_chunk_are_written_to_one_slot():
    """Which of them would win is undefined on a GPU, and right by luck on a CPU."""
    cache = KVCache.create(CONFIG)
    slots, _, _ = cache._plan(1, 10, jnp.array([10, 6]))
    size = cache.capacity(1)
    for row in np.asarray(slots):
        assert sorted(row[row < size]) == list(range(size))


def test_overflow_is_an_error_that_says_what_to_do():
    cache = append(KVCache.create(CONFIG), 0, *values(np.ones((2, 5))), jnp.array([5, 4]))
    cache = cache.append(0, *values(np.ones((2, 7))))
    message = "row 0 of layer 0 holds 12 of 12 tokens and has no room for 1 more.*max_seq_len"
    with pytest.raises(CacheOverflow, match=message):
        cache.append(0, *values(np.ones((2, 1))))
    assert cache.append(0, *values(np.ones((2, 1))), jnp.array([0, 1])).lengths[0, 1] == 12


@pytest.mark.smoke
def test_while_tracing_an_overflow_is_dropped_and_flagged():
    tokens = np.arange(1, 6).reshape(1, 5).repeat(2, 0)
    cache = KVCache.create(CONFIG)
    for start in (0, 5, 10):
        cache = append(cache, 0, *values(tokens + start), jnp.array([5, 4]))
    assert cache.overflowed.tolist() == [True, False]
    assert held(cache, 0)[0] == {p: p + 1 for p in range(12)}
    assert truncate(cache, 12).overflowed.tolist() == [False, False]


def test_a_window_cannot_be_taken_back_further_than_rollback():
    cache = append(KVCache.create(CONFIG), 1, *values(np.arange(20).reshape(2, 10)))
    cache = cache.truncate(9)
    assert sorted(held(cache, 1)[0]) == [6, 7, 8]
    assert not cache.incomplete.any()
    message = "row 0 of layer 1 from 9 to 8.*window of 3.*before position 6.*rollback"
    with pytest.raises(ValueError, match=message):
        cache.truncate(jnp.array([8, 9]))
    assert truncate(cache, jnp.array([8, 9])).incomplete.tolist() == [True, False]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda c, k, v: c.append(0, k[:1], v[:1]), ValueError, r"\(1, 3, 2, 4\)"),
        (lambda c, k, v: c.append(0, k, v[:, :2]), ValueError, r"\(2, 2, 2, 4\)"),
        (lambda c, k, v: c.append(0, k[0], v[0]), ValueError, r"\(3, 2, 4\)"),
        (lambda c, k, v: c.append(0, k, v, jnp.array([1])), ValueError, r"\(1,\) for 2 rows"),
        (
            lambda c, k, v: c.append(0, k, v, jnp.array([1, 4])),
            ValueError,
            r"\[1, 4\] outside 0..3",
        ),
        (lambda c, k, v: c.append(jnp.array([0]), k, v), TypeError, "Python int"),
        (lambda c, k, v: c.append(-1, k, v), IndexError, "layer -1 of a cache of 2 layers"),
        (lambda c, k, v: c.get(2), IndexError, "layer 2 of a cache of 2 layers"),
        (lambda c, k, v: jax.jit(KVCache.append)(c, 0, k, v), TypeError, "Python int"),
        (lambda c, k, v: c.update_at(0, [[0, 1]], k, v), ValueError, r"\(1, 2\)"),
        (lambda c, k, v: c.update_at(0, [[0, 1, 2]] * 2, k, v), IndexError, "not 0"),
        (lambda c, k, v: c.truncate(-1), ValueError, r"\[-1, -1\]"),
        (lambda c, k, v: c.clear(2), ValueError, "rows 2 of a cache of 2"),
        (lambda c, k, v: c.copy_batch_state([0, 2]), ValueError, r"\[0, 2\]"),
        (lambda c, k, v: c.copy_batch_state([0]), ValueError, r"\(1,\) for 2 rows"),
        (lambda c, k, v: c.replace(counters=None).stats(), ValueError, "statistics=False"),
    ],
)
def test_misuse_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call(KVCache.create(CONFIG), *values(np.ones((2, 3))))


def test_clear_empties_all_or_one_row():
    cache = append(KVCache.create(CONFIG), 0, *values(np.ones((2, 5))))
    assert cache.clear(1).lengths[0].tolist() == [5, 0]
    assert cache.clear([0, 1]).lengths[0].tolist() == [0, 0]
    assert cache.clear().lengths.tolist() == [[0, 0], [0, 0]]


def step(cache, k, v):
    for layer in range(2):
        cache = cache.append(layer, k, v)
    return cache


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_append_is_in_place_when_donated(dtype):
    config = KVCacheConfig(
        num_layers=2,
        num_heads=2,
        num_kv_heads=2,
        head_dim=64,
        max_seq_len=256,
        max_batch=2,
        window=(None, 128),
        dtype=dtype,
    )
    cache = KVCache.create(config)
    k, v = values(np.ones((2, 1)), config)
    compiled = jax.jit(step, donate_argnums=0).lower(cache, k, v).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.memory_bytes
    assert memory.temp_size_in_bytes < min(x.nbytes for x in (*cache.k, *cache.v))
    buffers = lambda c: [x.unsafe_buffer_pointer() for x in jax.tree.leaves((c.k, c.v, c.k_scale))]
    before = buffers(cache)
    for _ in range(3):
        cache = compiled(cache, k, v)
    assert buffers(cache) == before
    assert cache.lengths.tolist() == [[3, 3], [3, 3]]


def test_float8_is_near():
    config = KVCacheConfig(
        num_layers=1, num_heads=1, num_kv_heads=1, head_dim=32, max_seq_len=4, dtype="float8_e4m3fn"
    )
    k = jax.random.normal(jax.random.key(0), (1, 4, 1, 32)) * 10
    stored, _, _ = KVCache.create(config).append(0, k, k).get(0)
    np.testing.assert_allclose(stored, k, rtol=2**-4, atol=np.abs(k).max() * 2**-9)


def test_int8_is_within_half_a_scale_and_written_once():
    config = KVCacheConfig(
        num_layers=1, num_heads=2, num_kv_heads=2, head_dim=32, max_seq_len=64, dtype="int8"
    )
    keys = jax.random.split(jax.random.key(0), 3)
    k, v = (jax.random.normal(key, (1, 40, 2, 32)) * 10 for key in keys[:2])
    write = jax.jit(KVCache.append, static_argnums=1)
    first = write(KVCache.create(config), 0, k.at[:, 7].set(0), v)
    stored_k, stored_v, _ = first.get(0)
    scale = np.asarray(first.k_scale[0])[0, :40, :, None]
    assert np.all(np.abs(stored_k[0, :40] - k.at[:, 7].set(0)[0]) <= scale * 0.501)
    assert np.all(stored_k[0, 7] == 0)
    assert np.abs(stored_v[0, :40] - v[0]).max() <= np.abs(v).max() / 127
    later = write(first, 0, 1000 * k[:, :20], 1000 * v[:, :20])
    for old, new in zip((stored_k, stored_v), later.get(0)[:2], strict=True):
        np.testing.assert_array_equal(old[:, :40], new[:, :40])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stores_the_nearest(dtype):
    config = KVCacheConfig(
        num_layers=1, num_heads=1, num_kv_heads=1, head_dim=4, max_seq_len=4, dtype=dtype
    )
    k = jax.random.normal(jax.random.key(0), (1, 4, 1, 4))
    cache = KVCache.create(config).append(0, k, -k)
    np.testing.assert_array_equal(cache.get(0)[0], k.astype(dtype))
    np.testing.assert_array_equal(cache.get(0)[1], -k.astype(dtype))


def test_statistics_count_what_the_docstring_says():
    cache = KVCache.create(CONFIG)
    prompt, generated = 5, 6
    for layer in range(2):
        cache = append(cache, layer, *values(np.ones((2, 5))), jnp.array([prompt, 0]))
        for _ in range(generated):
            cache = append(cache, layer, *values(np.ones((2, 1))), jnp.array([1, 0]))
    stats = cache.stats()
    full = generated * prompt + generated * (generated - 1) // 2
    ring = WINDOW + ROLLBACK
    assert stats.hits == full + generated * ring
    assert stats.misses == 2 * (prompt + generated)
    assert stats.evictions == prompt + generated - ring
    assert stats.hit_rate == stats.hits / (stats.hits + stats.misses)
    assert stats.held_tokens == prompt + generated + ring
    assert stats.capacity_tokens == ROWS * (CAPACITY + ring)


def test_statistics_count_past_32_bits():
    cache = KVCache.create(CONFIG)
    near = cache.counters.at[:, 1, 0].set(jnp.uint32(2**32 - 1))
    cache = append(cache.replace(counters=near), 0, *values(np.ones((2, 5))))
    assert cache.stats().misses == 2 * (2**32 - 1) + 10
    quiet = KVCache.create(CONFIG, statistics=False)
    assert append(quiet, 0, *values(np.ones((2, 5)))).counters is None


def test_beams_part_after_a_reordering():
    cache = append(KVCache.create(CONFIG), 0, *values(np.array([[1, 2, 3, 0, 0], [4, 5, 0, 0, 0]])),
                   jnp.array([3, 2]))  # fmt: skip
    cache = reorder(cache, jnp.array([1, 1]))
    cache = append(cache, 0, *values(np.array([[6, 0, 0, 0, 0], [7, 8, 0, 0, 0]])),
                   jnp.array([1, 2]))  # fmt: skip
    assert held(cache, 0) == [{0: 4, 1: 5, 2: 6}, {0: 4, 1: 5, 2: 7, 3: 8}]


def test_operations_compile_once_per_shape():
    traces = 0

    @partial(jax.jit, donate_argnums=0)
    def one(cache, k, v, counts):
        nonlocal traces
        traces += 1
        return cache.append(0, k, v, counts)

    cache = KVCache.create(CONFIG)
    for count in range(4):
        cache = one(cache, *values(np.ones((2, 5))), jnp.array([count, 1]))
    assert traces == 1
