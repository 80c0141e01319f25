"""The block pool by example: sharing, eviction, and what is refused."""

import numpy as np
import pytest

from aidx.cache import (
    BlockKey,
    BlockPool,
    BlockTable,
    KVCacheConfig,
    OutOfBlocks,
    block_keys,
    pad_tables,
)


def snapshot(pool):
    """Everything that can be seen of a pool."""
    return (
        pool.refs.to_numpy().tolist(),
        pool.index.to_dict(),
        pool.stack[0 : pool.num_unused].tolist(),
        pool._idle_in_order().tolist(),
        pool.stats(),
    )


def published(pool, tokens):
    """A pool in which `tokens` were computed, published and let go; their blocks and keys."""
    keys = block_keys(tokens, pool.block_size)
    pool, blocks = pool.allocate(len(keys))
    return pool.publish(blocks, keys).free(blocks), blocks, keys


@pytest.mark.smoke
def test_out_of_blocks_changes_nothing_and_says_what_there_is():
    pool = BlockPool.create(5, 2)
    pool, _, _ = published(pool, [1, 2, 3, 4])
    pool, held = pool.allocate(1)
    before = snapshot(pool)
    with pytest.raises(OutOfBlocks, match=r"4 blocks wanted, 3 free \(1 unused, 2 idle"):
        pool.allocate(4)
    with pytest.raises(OutOfBlocks):
        BlockTable.of(held, 2, 2).append(pool, 8)
    assert snapshot(pool) == before


def test_a_failed_copy_on_write_changes_nothing():
    pool, blocks = BlockPool.create(3, 2).allocate(2)
    pool = pool.fork(blocks)
    before = snapshot(pool)
    with pytest.raises(OutOfBlocks):
        pool.cow(blocks[:1])
    assert snapshot(pool) == before


@pytest.mark.smoke
@pytest.mark.parametrize("frees", [[1, 1], [2], [1, 2, 2, 1]])
def test_a_double_free_is_an_error_and_changes_nothing(frees):
    pool, _ = BlockPool.create(4, 2).allocate(1)
    before = snapshot(pool)
    with pytest.raises(ValueError, match="double free"):
        pool.free(frees)
    assert snapshot(pool) == before


def test_one_call_may_free_a_block_as_often_as_it_is_held():
    pool, [block] = BlockPool.create(4, 2).allocate(1)
    assert pool.fork([block, block]).free([block, block, block]).num_free == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda p: p.fork([2]),
        lambda p: p.cow([2]),
        lambda p: p.cow([1, 1]),
        lambda p: p.cow([0]),
        lambda p: p.publish([2], block_keys([1, 2], 2)),
        lambda p: p.publish([0], block_keys([1, 2], 2)),
        lambda p: p.publish([1], []),
        lambda p: p.publish([1], block_keys([1, 2], 2)).publish([1], block_keys([1, 3], 2)),
        lambda p: p.free([9]),
        lambda p: p.free([-1]),
        lambda p: p.allocate(-1),
        lambda p: p.resize(1),
        lambda p: BlockPool.create(1, 4),
        lambda p: BlockPool.create(4, 0),
    ],
)
def test_misuse_is_refused(call):
    pool, _ = BlockPool.create(4, 2).allocate(1)
    with pytest.raises(ValueError, match=r"\d"):
        call(pool)


def test_unused_blocks_go_before_cached_ones_and_those_in_the_order_of_their_last_use():
    pool = BlockPool.create(8, 2)
    pool, first, first_keys = published(pool, [1, 2, 3, 4])
    pool, second, _ = published(pool, [5, 6])
    pool, hit = pool.match_prefix(first_keys)  # used again: now younger than `second`
    pool = pool.free(hit)
    pool, fresh = pool.allocate(4)
    assert not set(fresh) & {*first.tolist(), *second.tolist()}
    pool, [a] = pool.allocate(1)
    assert a == second[0]
    pool, [b] = pool.allocate(1)
    assert b == first[1], "the end of a prefix goes before its beginning"
    assert pool.stats().evictions == 2
    assert len(pool.match_prefix(first_keys)[1]) == 1


def test_the_order_of_eviction_survives_any_number_of_hits():
    pool, order, rng = BlockPool.create(6, 1), [], np.random.default_rng(0)
    for token in range(5):
        pool, _, _ = published(pool, [token])
        order.append(token)
    for token in rng.integers(0, 5, 100).tolist():
        pool, hit = pool.match_prefix(block_keys([token], 1))
        pool = pool.free(hit)
        order.remove(token)
        order.append(token)
        keys = [pool.keys[np.array([block])][0] for block in pool._idle_in_order()]
        assert keys == [block_keys([other], 1)[0] for other in order]


def test_a_match_holds_its_blocks_and_counts():
    pool, blocks, _ = published(BlockPool.create(8, 2), [1, 2, 3, 4])
    asked = block_keys([1, 2, 3, 4, 5, 6], 2)
    pool, matched = pool.match_prefix(asked)
    assert matched.tolist() == blocks.tolist()
    stats = pool.stats()
    assert (stats.queries, stats.hits, stats.misses, stats.held) == (3, 2, 1, 2)
    assert stats.hit_rate == pytest.approx(2 / 3)
    with pytest.raises(OutOfBlocks):
        pool.allocate(6)


@pytest.mark.smoke
def test_equal_hashes_of_unequal_prefixes_never_match(monkeypatch):
    monkeypatch.setattr(BlockKey, "__hash__", lambda self: 7)
    init = BlockKey.__init__

    def same_hash(self, *args):
        init(self, *args)
        self._hash = 7

    monkeypatch.setattr(BlockKey, "__init__", same_hash)
    pool, _, _ = published(BlockPool.create(20, 2), [1, 2, 3, 4])
    pool, other, _ = published(pool, [9, 9, 3, 4])
    assert len(pool.match_prefix(block_keys([3, 4], 2))[1]) == 0, "not the same position"
    assert len(pool.match_prefix(block_keys([1, 2, 3, 5], 2))[1]) == 1
    assert pool.match_prefix(block_keys([9, 9, 3, 4], 2))[1].tolist() == other.tolist()
    assert len(pool.match_prefix(block_keys([9, 9, 3, 4], 2, extra="salt"))[1]) == 0


def test_extra_separates_equal_tokens():
    keys = [block_keys([1, 2], 2, extra=extra) for extra in (None, "lora-1", ("salt", 2))]
    pool, blocks = BlockPool.create(8, 2).allocate(3)
    pool = pool.publish(blocks, [key for [key] in keys])
    for block, key in zip(blocks, keys, strict=True):
        assert pool.match_prefix(key)[1].tolist() == [block]


def test_keys_continue_from_a_parent():
    whole = block_keys([1, 2, 3, 4, 5], 2)
    [first] = block_keys([1, 2], 2)
    assert [first, *block_keys([3, 4, 5], 2, parent=first)] == whole
    assert block_keys([3, 4], 2) != whole[1:]


def test_long_chains_compare_in_linear_time(monkeypatch):
    steps = 0
    hashes = BlockKey.__eq__

    def counted(self, other):
        nonlocal steps
        ours, theirs = self, other
        while ours is not theirs and ours is not None:
            steps += 1
            ours, theirs = ours.parent, theirs.parent
        return hashes(self, other)

    tokens = list(range(2000))
    pool, blocks, _ = published(BlockPool.create(1001, 2), tokens)
    monkeypatch.setattr(BlockKey, "__eq__", counted)
    _, matched = pool.match_prefix(block_keys(tokens, 2))
    assert matched.tolist() == blocks.tolist()
    assert steps <= 3 * len(blocks)


def test_the_first_to_publish_a_content_keeps_it():
    keys = block_keys([1, 2], 2)
    pool, [a, b] = BlockPool.create(4, 2).allocate(2)
    pool = pool.publish([a], keys).publish([b], keys)
    assert pool.match_prefix(keys)[1].tolist() == [a]
    pool = pool.free([a, b])
    assert (pool.num_idle, pool.num_unused) == (1, 2)


def test_a_sole_writer_keeps_its_block_but_not_its_place_in_the_cache():
    keys = block_keys([1, 2], 2)
    pool, [block] = BlockPool.create(4, 2).allocate(1)
    pool, [same] = pool.publish([block], keys).cow([block])
    assert same == block
    assert len(pool.match_prefix(keys)[1]) == 0


def test_of_all_holders_in_one_call_the_last_keeps_the_block():
    pool, [block] = BlockPool.create(6, 2).allocate(1)
    pool = pool.fork([block, block])
    pool, [a, b, c] = pool.cow([block, block, block])
    assert c == block and len({a, b, c}) == 3
    assert pool.refs[np.array([a, b, c])].tolist() == [1, 1, 1]
    assert pool.stats().copies == 2


def test_clearing_the_prefix_cache_keeps_what_is_held():
    pool, _, keys = published(BlockPool.create(8, 2), [1, 2, 3, 4])
    pool, held = pool.match_prefix(keys[:1])
    pool = pool.clear_prefix_cache()
    stats = pool.stats()
    assert (stats.held, stats.idle, stats.evictions) == (1, 0, 0)
    assert len(pool.match_prefix(keys)[1]) == 0
    assert pool.free(held).num_unused == 7


def test_defragment_moves_the_fewest_blocks_and_the_cache_follows():
    pool = BlockPool.create(10, 2)
    pool, junk = pool.allocate(4)
    pool, idle, keys = published(pool, [1, 2, 3, 4])
    pool, held = pool.allocate(2)
    pool = pool.free(junk)
    pool, moves = pool.defragment()
    moved = np.flatnonzero(moves != np.arange(10))
    used = sorted({*moves[idle].tolist(), *moves[held].tolist()})
    assert used == [1, 2, 3, 4]
    assert len(moved) == 4 and not set(moved) & set(moves[moved].tolist())
    pool = pool.resize(5)
    assert pool.num_unused == 0
    assert pool.match_prefix(keys)[1].tolist() == moves[idle].tolist()
    with pytest.raises(ValueError, match="in use beyond"):
        pool.resize(4)
    grown, more = pool.resize(8).allocate(3)
    assert sorted(more) == [5, 6, 7]
    assert grown.num_unused == 0


def test_defragment_and_resize_keep_the_order_of_eviction():
    pool = BlockPool.create(10, 2)
    pool, junk = pool.allocate(3)
    for tokens in ([1, 2], [3, 4], [5, 6]):
        pool, _, _ = published(pool, tokens)
    pool = pool.free(junk)
    order = [pool.keys[np.array([b])][0] for b in pool._idle_in_order()]
    compact = pool.defragment()[0].resize(6)
    assert [compact.keys[np.array([b])][0] for b in compact._idle_in_order()] == order


def test_window_eviction_frees_only_what_lies_wholly_outside():
    pool = BlockPool.create(10, 4)
    pool, table, _ = BlockTable.empty(4).append(pool, 14)
    pool, table = table.evict_before(pool, 7)
    assert table.blocks.tolist() == [0, 2, 3, 4]
    assert table.slots(3, 5).tolist() == [-1, 8]
    assert pool.num_free == 6
    same, again = table.evict_before(pool, 7)
    assert same is pool and again is table
    assert table.free(pool).num_free == 9


def test_truncate_frees_whole_blocks_and_the_next_write_does_not_reach_sharers():
    pool = BlockPool.create(10, 4)
    pool, table, _ = BlockTable.empty(4).append(pool, 8)
    pool, child = table.fork(pool)
    pool, child = child.truncate(pool, 6)
    pool, child, (src, dst) = child.append(pool, 1)
    assert src.tolist() == [table.blocks[1]] and dst.tolist() == [child.blocks[1]]
    assert table.blocks[1] != child.blocks[1]
    with pytest.raises(ValueError, match="truncate 8 tokens to 9"):
        table.truncate(pool, 9)


def test_a_table_is_immutable_and_checks_its_arguments():
    table = BlockTable.of([3, 4], 5, 4)
    with pytest.raises(ValueError, match="read-only"):
        table.blocks[0] = 1
    with pytest.raises(ValueError, match=r"2 blocks .* for num_tokens=9"):
        BlockTable.of([3, 4], 9, 4)
    with pytest.raises(IndexError):
        table.slots(0, 9)
    with pytest.raises(ValueError, match="n=-1"):
        table.append(BlockPool.create(4, 4), -1)
    with pytest.raises(ValueError, match="2 blocks in"):
        pad_tables([table], 1)
    with pytest.raises(ValueError, match="2 tables"):
        pad_tables([table, table], 4, rows=1)
    assert pad_tables([table], 3, rows=2).tolist() == [[3, 4, 0], [0, 0, 0]]


def test_a_pool_fills_the_memory_it_is_given():
    config = KVCacheConfig.for_model("llama-3-8b")
    per_block = 16 * 2 * 32 * 8 * 128 * 2
    assert BlockPool.from_memory_size(10 * per_block + 1, config).num_blocks == 10
    assert BlockPool.for_model("llama-3-8b", 10 * per_block - 1).num_blocks == 9
    with pytest.raises(ValueError, match="holds 1 blocks"):
        BlockPool.from_memory_size(per_block, config)


@pytest.mark.smoke
def test_old_pools_stay_as_they_were():
    pool = BlockPool.create(12, 2)
    seen = [(pool, snapshot(pool))]
    for step in range(40):
        pool, _, keys = published(pool, [step, step + 1, step, step])
        pool, hit = pool.match_prefix(keys)
        seen.append((pool, snapshot(pool)))
        pool = pool.free(hit)
        seen.append((pool, snapshot(pool)))
    for old, before in reversed(seen):
        assert snapshot(old) == before
