"""All host operations in any order, on a pool with a memory of tokens behind it.

The machine plays the engine: it starts sequences from the prefix cache, writes tokens into the
slots it is given, publishes, forks, truncates, lets windows go, compacts.  The memory tells what no
bookkeeping can hide: whenever two sequences share what they must not, one reads the other's tokens.
"""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aidx.cache import NULL_BLOCK, BlockPool, BlockTable, OutOfBlocks, block_keys
from tests.cache.test_block_pool import snapshot

# Two tokens only: most prefixes have been seen before.
token_lists = st.lists(st.integers(0, 1), min_size=1, max_size=9)
pick = st.integers(0, 10**6)


class Sequence:
    """What the machine knows of a sequence without asking the pool."""

    def __init__(self, tokens, table, extra, first=0):
        self.tokens, self.table, self.extra, self.first = tokens, table, extra, first


class PoolMachine(RuleBasedStateMachine):
    @initialize(blocks=st.integers(3, 14), block_size=st.integers(1, 3))
    def start_empty(self, blocks, block_size):
        self.pool = BlockPool.create(blocks, block_size)
        self.memory = np.full((blocks, block_size), -1)
        self.sequences = []
        self.versions = []

    def choose(self, index):
        return self.sequences[index % len(self.sequences)]

    def write(self, sequence, pool, table, tokens):
        """Store `tokens` at the end of `table`: every block written has one owner, unpublished."""
        start = table.num_tokens - len(tokens)
        slots = table.slots(start, table.num_tokens)
        blocks = np.unique(slots // pool.block_size)
        assert (slots >= pool.block_size).all()
        assert (pool.refs[blocks] == 1).all(), "a writable block has one owner"
        assert all(key is None for key in pool.keys[blocks]), "and nobody can find it"
        self.memory.reshape(-1)[slots] = tokens
        sequence.tokens = sequence.tokens[:start] + tokens
        sequence.table = table
        keys = block_keys(sequence.tokens, pool.block_size, extra=sequence.extra)
        full = slice(start // pool.block_size, len(keys))
        self.pool = pool.publish(table.blocks[full], keys[full])

    def grow(self, sequence, pool, table, tokens):
        """Append, or see that what failed had to fail and changed nothing."""
        before = snapshot(pool)
        idle = pool._idle_in_order().tolist()
        try:
            after, longer, (src, dst) = table.append(pool, len(tokens))
        except OutOfBlocks:
            partial = bool(table.num_tokens % pool.block_size)
            shared = partial and pool.refs[table.blocks[-1:]][0] > 1
            wanted = -(-(table.num_tokens + len(tokens)) // pool.block_size) - len(table.blocks)
            assert wanted + shared > before[-1].idle + before[-1].unused
            assert snapshot(pool) == before
            return False
        evicted = len(idle) - after.num_idle
        assert after._idle_in_order().tolist() == idle[evicted:], "least recently used first"
        self.memory[dst] = self.memory[src]
        self.write(sequence, after, longer, tokens)
        return True

    @rule(tokens=token_lists, extra=st.sampled_from([None, "salt"]))
    def start(self, tokens, extra):
        keys = block_keys(tokens[:-1], self.pool.block_size, extra=extra)
        before = self.pool
        pool, blocks = self.pool.match_prefix(keys)
        cached = len(blocks) * pool.block_size
        assert self.memory[blocks].ravel().tolist() == tokens[:cached], "a match is equal tokens"
        table = BlockTable.of(blocks, cached, pool.block_size)
        sequence = Sequence(tokens[:cached], table, extra)
        if self.grow(sequence, pool, table, tokens[cached:]):
            self.sequences.append(sequence)
        else:
            self.pool = before  # the match is dropped by going on from the version before it

    @precondition(lambda self: self.sequences)
    @rule(index=pick, tokens=token_lists)
    def extend(self, index, tokens):
        sequence = self.choose(index)
        self.grow(sequence, self.pool, sequence.table, tokens)

    @precondition(lambda self: self.sequences)
    @rule(index=pick)
    def fork(self, index):
        parent = self.choose(index)
        self.pool, table = parent.table.fork(self.pool)
        self.sequences.append(Sequence(parent.tokens[:], table, parent.extra, parent.first))

    @precondition(lambda self: self.sequences)
    @rule(index=pick, keep=st.integers(0, 9))
    def truncate(self, index, keep):
        sequence = self.choose(index)
        keep = min(max(keep, sequence.first), len(sequence.tokens))
        self.pool, sequence.table = sequence.table.truncate(self.pool, keep)
        sequence.tokens = sequence.tokens[:keep]

    @precondition(lambda self: self.sequences)
    @rule(index=pick, back=st.integers(0, 5))
    def slide_window(self, index, back):
        sequence = self.choose(index)
        oldest = max(len(sequence.tokens) - back, 0)
        self.pool, sequence.table = sequence.table.evict_before(self.pool, oldest)
        size = self.pool.block_size
        sequence.first = max(sequence.first, oldest // size * size)

    @precondition(lambda self: self.sequences)
    @rule(index=pick)
    def finish(self, index):
        sequence = self.sequences.pop(index % len(self.sequences))
        self.pool = sequence.table.free(self.pool)

    @precondition(lambda self: self.sequences)
    @rule(index=pick)
    def free_twice(self, index):
        blocks = self.choose(index).table.blocks
        holders = self.pool.refs[blocks].max(initial=0)
        before = snapshot(self.pool)
        if (blocks != NULL_BLOCK).any():
            with pytest.raises(ValueError, match="double free"):
                self.pool.free(np.tile(blocks, holders + 1))
        assert snapshot(self.pool) == before

    @rule(shrink=st.booleans())
    def defragment(self, shrink):
        pool, moves = self.pool.defragment()
        live = np.flatnonzero(moves != np.arange(len(moves)))
        self.memory[moves[live]] = self.memory[live]
        if shrink:
            pool = pool.resize(max(pool.num_blocks - pool.num_unused, 2))
            self.memory = self.memory[: pool.num_blocks]
        in_use = pool.num_blocks - 1 - pool.num_unused
        assert pool.num_unused == 0 or pool.stack[0 : pool.num_unused].min() > in_use
        for sequence in self.sequences:
            sequence.table = sequence.table.remap(moves)
        self.pool = pool

    @rule(more=st.integers(1, 4))
    def enlarge(self, more):
        if self.pool.num_blocks > 20:
            return
        self.pool = self.pool.resize(self.pool.num_blocks + more)
        self.memory = np.pad(self.memory, ((0, more), (0, 0)), constant_values=-1)

    @rule()
    def clear_prefix_cache(self):
        self.pool = self.pool.clear_prefix_cache()
        assert len(self.pool.index) == self.pool.num_idle == 0

    @rule(n=st.integers(0, 20))
    def try_and_drop(self, n):
        """A plan that is not kept leaves no trace."""
        before = snapshot(self.pool)
        if n <= self.pool.num_free:
            other, blocks = self.pool.allocate(n)
            assert len(set(blocks.tolist())) == n and NULL_BLOCK not in blocks
            assert other.num_free == self.pool.num_free - n
        else:
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(n)
        assert snapshot(self.pool) == before

    @rule()
    def remember(self):
        self.versions = [*self.versions[-2:], (self.pool, snapshot(self.pool))]

    @invariant()
    def references_are_holders(self):
        holders = np.zeros(self.pool.num_blocks, int)
        for sequence in self.sequences:
            np.add.at(holders, sequence.table.blocks, 1)
        holders[NULL_BLOCK] = 0
        assert self.pool.refs.to_numpy().tolist() == holders.tolist()

    @invariant()
    def nothing_leaks(self):
        pool = self.pool
        held = np.flatnonzero(pool.refs.to_numpy()).tolist()
        unused = pool.stack[0 : pool.num_unused].tolist()
        idle = pool._idle_in_order().tolist()
        assert sorted(held + unused + idle) == list(range(1, pool.num_blocks))
        stats = pool.stats()
        assert (stats.held, stats.idle, stats.unused) == (len(held), len(idle), len(unused))
        assert pool.num_free == len(unused) + len(idle)

    @invariant()
    def published_means_that_content(self):
        pool = self.pool
        index = pool.index.to_dict()
        keys = pool.keys.to_numpy()
        assert {block: key for key, block in index.items()} == {
            block: key for block, key in enumerate(keys) if key is not None
        }
        for key, block in index.items():
            assert np.frombuffer(key.tokens, np.int32).tolist() == self.memory[block].tolist()
        assert all(keys[block] is not None for block in pool._idle_in_order())

    @invariant()
    def every_sequence_reads_its_own_tokens(self):
        for sequence in self.sequences:
            slots = sequence.table.slots(sequence.first, len(sequence.tokens))
            assert (slots >= 0).all()
            read = self.memory.reshape(-1)[slots].tolist()
            assert read == sequence.tokens[sequence.first :]

    @invariant()
    def old_versions_stay_as_they_were(self):
        for pool, before in self.versions:
            assert snapshot(pool) == before

    def teardown(self):
        if not hasattr(self, "pool"):
            return
        for sequence in self.sequences:
            self.pool = sequence.table.free(self.pool)
        assert self.pool.num_free == self.pool.num_blocks - 1


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # ten minutes do not do on a busy machine
class TestPoolAtLength(PoolMachine.TestCase):
    """The same with many more and longer histories."""

    settings = settings(max_examples=1500, stateful_step_count=100, deadline=None)
