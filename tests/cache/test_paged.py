"""The paged cache on the device, driven by the host's tables as an engine would."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.cache import (
    BlockPool,
    BlockTable,
    KVCacheConfig,
    PagedKVCache,
    block_keys,
    defragment,
    pad_tables,
    paged_attend,
)
from tests.cache.test_attend import HEAD_DIM, HEADS, KV_HEADS, dense, sequences

BLOCK_SIZE, NUM_BLOCKS, ROWS, WIDTH, TOKENS = 4, 24, 4, 8, 12


@partial(jax.jit, static_argnames=("max_q", "window"), donate_argnums=0)
def call(cache, q, k, v, tables, lens, indptr, slots, max_q=None, window=None):
    attend = paged_attend(tables, lens, indptr, slots, max_q=max_q)
    return attend(cache, 0, q, k, v, window=window)


def poison(cache, blocks=None):
    """NaN in the given blocks, or in all."""
    at = slice(None) if blocks is None else np.asarray(blocks)
    nan = lambda pools: tuple(pool.at[at].set(jnp.nan) for pool in pools)
    return cache.replace(k=nan(cache.k), v=nan(cache.v))


def empty(dtype="float32", num_layers=1):
    return PagedKVCache.create(
        num_layers=num_layers,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        num_kv_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        dtype=dtype,
    )


class Engine:
    """Rows of one pool; row r's token t is `data[r][:, t]` (a child continues as its own row)."""

    def __init__(self, cache, data, window=None):
        self.cache, self.window = cache, window
        self.pool = BlockPool.create(NUM_BLOCKS, BLOCK_SIZE)
        # Hand out blocks in a scattered order.
        self.pool, blocks = self.pool.allocate(NUM_BLOCKS - 1)
        self.pool = self.pool.free(np.random.default_rng(0).permutation(blocks))
        self.data = data
        self.tables = {}
        self.out = {}

    def add(self, row):
        self.tables[row] = BlockTable.empty(BLOCK_SIZE)
        self.out[row] = np.full((len(self.data[row][0]), HEADS, HEAD_DIM), np.nan, np.float32)

    def fork(self, parent, child):
        self.pool, self.tables[child] = self.tables[parent].fork(self.pool)
        self.out[child] = self.out[parent].copy()

    def step(self, counts):
        """`{row: new tokens}`; copies what must be copied, then one ragged call."""
        begins = {row: self.tables[row].num_tokens for row in counts}
        for row, count in counts.items():
            freed = self.pool
            if self.window:
                oldest = begins[row] - self.window + 1
                before = self.tables[row].blocks
                self.pool, self.tables[row] = self.tables[row].evict_before(self.pool, oldest)
                gone = before[before != self.tables[row].blocks]
                freed = [b for b in gone if self.pool.refs[np.array([b])][0] == 0]
                if freed:
                    self.cache = poison(self.cache, freed)
            self.pool, self.tables[row], pairs = self.tables[row].append(self.pool, count)
            self.cache = self.cache.copy_blocks(*pairs)
        tokens = sum(counts.values())
        decode = max(counts.values()) == 1
        padded = ROWS if decode else TOKENS
        flat = [
            np.full((padded, n, HEAD_DIM), np.nan, np.float32) for n in (HEADS, KV_HEADS, KV_HEADS)
        ]
        slots, indptr, lens = np.full(padded, -1, np.int32), np.zeros(ROWS + 1, np.int32), []
        at = 0
        for index, (row, count) in enumerate(counts.items()):
            part = slice(begins[row], begins[row] + count)
            for whole, new in zip(self.data[row], flat, strict=True):
                new[at : at + count] = whole[part]
            slots[at : at + count] = self.tables[row].slots(part.start, part.stop)
            at += count
            indptr[index + 1 :] = at
            lens.append(part.stop)
        lens = np.array(lens + [0] * (ROWS - len(lens)), np.int32)
        tables = pad_tables([self.tables[row] for row in counts], WIDTH, ROWS)
        out, self.cache = call(
            self.cache, *flat, tables, lens, indptr, slots, 1 if decode else None, self.window
        )
        at = 0
        for row, count in counts.items():
            self.out[row][begins[row] : begins[row] + count] = out[at : at + count]
            at += count
        assert np.all(out[tokens:] == 0)

    def check(self, row, atol=2e-6):
        length = self.tables[row].num_tokens
        q, k, v = (x[:length] for x in self.data[row])
        expected = dense(q, k, v, window=self.window)
        np.testing.assert_allclose(self.out[row][:length], expected, atol=atol)


def family(rows=4, tokens=20, shared=6):
    """Row data of sequences whose first `shared` tokens are equal."""
    q, k, v = (x.copy() for x in sequences(rows=rows, tokens=tokens))
    for x in (q, k, v):
        x[1:, :shared] = x[0, :shared]
    return {row: (q[row], k[row], v[row]) for row in range(rows)}


@pytest.mark.smoke
def test_ragged_rows_in_a_pool_of_nan_equal_full_attention():
    engine = Engine(poison(empty()), family())
    for row in range(3):
        engine.add(row)
    for counts in ({0: 7, 1: 3}, {2: 9, 0: 1, 1: 2}, {0: 1, 1: 1, 2: 1}, {1: 1}, {2: 5, 1: 6}):
        engine.step(counts)
    for row in range(3):
        engine.check(row)


def test_forks_part_where_they_differ():
    engine = Engine(poison(empty()), family(shared=6))
    engine.add(0)
    engine.step({0: 6})
    for child in (1, 2):
        engine.fork(0, child)
    assert engine.pool.stats().held == 2
    engine.step({0: 1, 1: 1, 2: 1})
    engine.step({0: 3, 1: 5, 2: 4})
    for row in range(3):
        engine.check(row)
    stats = engine.pool.stats()
    assert stats.copies == 2
    assert len({engine.tables[row].blocks[0] for row in range(3)}) == 1
    assert len({engine.tables[row].blocks[1] for row in range(3)}) == 3


def test_a_prefix_hit_reads_what_another_sequence_wrote():
    engine = Engine(poison(empty()), family(shared=8))
    engine.add(0)
    engine.step({0: 10})
    keys = block_keys(range(8), BLOCK_SIZE)
    engine.pool = engine.pool.publish(engine.tables[0].blocks[:2], keys)
    engine.pool = engine.tables.pop(0).free(engine.pool)
    engine.add(1)
    engine.pool, blocks = engine.pool.match_prefix(block_keys(range(8), BLOCK_SIZE))
    engine.tables[1] = BlockTable.of(blocks, 8, BLOCK_SIZE)
    engine.out[1][:8] = engine.out[0][:8]
    engine.step({1: 5})
    engine.check(1)


def test_blocks_outside_the_window_are_freed_and_never_read():
    engine = Engine(poison(empty()), family(), window=6)
    engine.add(0)
    for count in (9, 1, 1, 4, 1, 1, 1, 1):
        engine.step({0: count})
    engine.check(0)
    assert engine.pool.stats().held <= 3


def test_taking_tokens_back_and_going_on():
    engine = Engine(poison(empty()), family())
    engine.add(0)
    engine.fork(0, 3)
    engine.data[3] = tuple(x[::-1] for x in engine.data[3])
    engine.step({0: 9, 3: 3})
    engine.pool, engine.tables[0] = engine.tables[0].truncate(engine.pool, 5)
    engine.step({0: 2})
    engine.check(0)


@pytest.mark.smoke
def test_defragmenting_and_shrinking_changes_no_answer():
    engine = Engine(poison(empty()), family())
    for row in range(3):
        engine.add(row)
    engine.step({0: 5, 1: 3, 2: 4})
    engine.step({0: 3, 1: 7, 2: 2})
    engine.pool = engine.tables.pop(1).free(engine.pool)
    rows = list(engine.tables)
    reads = {r: engine.cache.read(0, engine.tables[r].slots(0, 6)) for r in rows}
    engine.cache, engine.pool, tables = defragment(
        engine.cache, engine.pool, engine.tables.values()
    )
    engine.tables = dict(zip(rows, tables, strict=True))
    assert sorted(np.concatenate([t.blocks for t in tables])) == [1, 2, 3, 4]
    engine.step({0: 1, 2: 1})
    for row in rows:
        engine.check(row)
    tables = list(engine.tables.values())
    with pytest.raises(ValueError, match="have other holders than the tables given"):
        defragment(engine.cache, engine.pool, tables[:1])
    engine.cache, engine.pool, tables = defragment(engine.cache, engine.pool, tables, shrink=True)
    assert engine.cache.num_blocks == engine.pool.num_blocks == 6
    for row, table in zip(rows, tables, strict=True):
        for before, after in zip(reads[row], engine.cache.read(0, table.slots(0, 6)), strict=True):
            np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_quantised_pools_are_near_and_chunks_change_nothing(dtype):
    outs = []
    for chunks in ((9, 1, 1), (3, 7, 1)):
        engine = Engine(empty(dtype), family())
        engine.add(0)
        for count in chunks:
            engine.step({0: count})
        engine.check(0, atol=0.05 if dtype == "int8" else 0.15)
        outs.append(engine.out[0][:11])
    np.testing.assert_allclose(*outs, atol=2e-6)
    assert engine.cache.k_scale[0].shape == (NUM_BLOCKS, KV_HEADS, BLOCK_SIZE)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_writes_and_copies_are_in_place_when_donated(dtype):
    cache = PagedKVCache.create(
        num_layers=2, num_blocks=64, block_size=16, num_kv_heads=2, head_dim=64, dtype=dtype
    )
    assert cache.memory_bytes == sum(x.nbytes for x in jax.tree.leaves(cache))
    k = jnp.ones((8, 2, 64))
    slots = jnp.array([16, 17, 40, -1, -1, -1, -1, 1023])

    def write(cache, k, slots):
        for layer in range(2):
            cache = cache.write(layer, k, k, slots)
        return cache

    compiled = jax.jit(write, donate_argnums=0).lower(cache, k, slots).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= cache.memory_bytes
    assert memory.temp_size_in_bytes < cache.k[0].nbytes
    buffers = lambda c: [x.unsafe_buffer_pointer() for x in jax.tree.leaves(c)]
    before = buffers(cache)
    cache = compiled(cache, k, slots)
    cache = cache.copy_blocks([1, 2, 63], [5, 6, 7])
    assert buffers(cache) == before
    got = np.asarray(cache.read(1, jnp.array([16, 80, 81, 96 + 8, 127, 0]))[0], np.float32)
    np.testing.assert_allclose(got[:, 0, 0], [1, 1, 1, 1, 1, 0], atol=0.01)


def test_copies_of_any_number_compile_a_few_programs(monkeypatch):
    from aidx.cache import paged

    sizes = []
    real = paged._copy_blocks
    monkeypatch.setattr(paged, "_copy_blocks", lambda c, p: sizes.append(p.shape[1]) or real(c, p))
    cache = empty()
    mark = jnp.arange(NUM_BLOCKS, dtype=jnp.float32).reshape(-1, 1, 1, 1)
    cache = cache.replace(k=(cache.k[0] + mark,))
    expected = np.arange(NUM_BLOCKS)
    rng = np.random.default_rng(0)
    for count in (0, 1, 2, 3, 5, 23, 24):
        src = rng.integers(0, NUM_BLOCKS, count)
        dst = rng.permutation(np.arange(NUM_BLOCKS))[::-1][:count]
        cache = cache.copy_blocks(src, dst)
        expected[dst] = expected[src]
        assert np.asarray(cache.k[0][:, 0, 0, 0]).astype(int).tolist() == expected.tolist()
    assert sizes == [1, 2, 4, 8, 32, 32]


@pytest.mark.parametrize(
    ("src", "dst"), [([1], [2, 3]), ([1, 2], [3, 3]), ([NUM_BLOCKS], [1]), ([1], [-1])]
)
def test_impossible_copies_are_refused(src, dst):
    with pytest.raises(ValueError, match="block"):
        empty().copy_blocks(src, dst)


def test_sizes_are_checked_and_the_geometry_is_the_pools():
    with pytest.raises(ValueError, match="num_blocks=0"):
        PagedKVCache.create(num_layers=1, num_blocks=0, block_size=2, num_kv_heads=1, head_dim=2)
    with pytest.raises(ValueError, match="dtype='int4' is none of bfloat16"):
        PagedKVCache.create(
            num_layers=1, num_blocks=2, block_size=2, num_kv_heads=1, head_dim=2, dtype="int4"
        )
    config = KVCacheConfig(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, dtype="int8")
    memory = 100_000
    pool = BlockPool.from_memory_size(memory, config, block_size=4)
    cache = PagedKVCache.from_config(config, pool)
    assert (cache.num_blocks, cache.block_size) == (pool.num_blocks, 4)
    per_block = cache.memory_bytes // pool.num_blocks
    assert memory - per_block < cache.memory_bytes <= memory


def test_scales_are_placed_with_their_heads():
    mesh = jax.make_mesh((1,), ("tensor",))
    sharding = jax.NamedSharding(mesh, jax.P(None, "tensor", None, None))
    cache = PagedKVCache.create(
        num_layers=1,
        num_blocks=2,
        block_size=2,
        num_kv_heads=2,
        head_dim=2,
        dtype="int8",
        sharding=sharding,
    )
    assert cache.k[0].sharding.spec[1] == cache.v_scale[0].sharding.spec[1] == "tensor"


def test_a_traced_layer_is_refused():
    with pytest.raises(TypeError, match="Python int"):
        jax.jit(PagedKVCache.write)(
            empty(), 0, jnp.ones((1, 2, 8)), jnp.ones((1, 2, 8)), jnp.array([4])
        )
    for layer in (-1, len(empty().k)):
        with pytest.raises(IndexError, match=f"layer {layer} of a cache of"):
            empty().write(layer, jnp.ones((1, 2, 8)), jnp.ones((1, 2, 8)), jnp.array([4]))


def test_resizing_keeps_the_front():
    cache = poison(empty(), [1])
    larger = cache.resize(NUM_BLOCKS + 3)
    assert larger.num_blocks == NUM_BLOCKS + 3
    assert np.isnan(larger.k[0][1]).all() and np.all(larger.k[0][NUM_BLOCKS:] == 0)
    assert larger.resize(2).k[0].shape[0] == 2
