"""Who holds which block: free list, reference counts and prefix cache, on the host and immutable.

A block of the pool is in one of three states:

    held    somebody's table points at it (`refs > 0`); it may be published in the prefix cache;
    idle    nobody holds it, but its content is published: a hit takes it back, and it is the first
            thing to be evicted, least recently used first, when blocks are wanted;
    unused  nobody holds it and its content is worth nothing.

Every operation returns a new pool and leaves the old one as it was, so a caller may try something,
look at the outcome and keep either.  The arrays are versioned (`persistent.py`): an operation costs
what it changes, not the size of the pool.  Block 0 is the null block: never handed out, never
counted; a table entry that stands for nothing points at it.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Sequence

import numpy as np

from aidx.cache.config import KVCacheConfig
from aidx.cache.persistent import PersistentArray, PersistentMap

NULL_BLOCK = 0


class OutOfBlocks(RuntimeError):
    """More blocks were asked for than are unused or idle; the pool is as it was."""


class BlockKey:
    """What a full block holds: its tokens, and through `parent` all tokens before it.

    The hash is chained, so that it stands for the whole prefix; equality compares the tokens of the
    whole chain, so that two prefixes with one hash are still two keys.  `extra` separates contents
    that are not told apart by tokens: an adapter, a cache salt.

    Example:
        >>> a = BlockKey(None, np.array([1, 2], np.int32).tobytes())
        >>> b = BlockKey(a, np.array([1, 2], np.int32).tobytes())
        >>> a == b, b == BlockKey(a, b.tokens)
        (False, True)
    """

    __slots__ = ("_hash", "extra", "parent", "tokens")

    def __init__(self, parent: "BlockKey | None", tokens: bytes, extra: Hashable = None):
        self.parent = parent
        self.tokens = tokens
        self.extra = extra
        self._hash = hash((parent and parent._hash, tokens, extra))

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockKey):
            return NotImplemented
        ours, theirs = self, other
        equal = []
        while ours is not theirs:
            if ours is None or theirs is None or ours._hash != theirs._hash:
                return False
            if ours.tokens != theirs.tokens or ours.extra != theirs.extra:
                return False
            equal.append((ours, theirs))
            ours, theirs = ours.parent, theirs.parent
        # Equal chains become one chain: the comparison of a child then stops at its parent, and a
        # walk along a prefix of n blocks costs n, not n^2.
        for ours, theirs in equal:
            theirs.parent = ours.parent
        return True

    def __repr__(self) -> str:
        return f"BlockKey({np.frombuffer(self.tokens, np.int32).tolist()}, {self.extra!r})"


def block_keys(
    tokens: Sequence[int] | np.ndarray,
    block_size: int,
    *,
    parent: BlockKey | None = None,
    extra: Hashable = None,
) -> list[BlockKey]:
    """The keys of the full blocks of `tokens`; a last block that is not full has none.

    Args:
        tokens: token ids; with `parent`, those that come after the parent's block.
        block_size: tokens per block.
        parent: the key of the block before, None at the start of a sequence.
        extra: anything hashable besides tokens that the content depends on.

    Example:
        >>> [key.tokens == b"" for key in block_keys([5, 6, 7, 8, 9], 2)]
        [False, False]
    """
    tokens = np.ascontiguousarray(tokens, np.int32)
    data, step = tokens.tobytes(), 4 * block_size
    keys = []
    for start in range(0, len(data) - step + 1, step):
        parent = BlockKey(parent, data[start : start + step], extra)
        keys.append(parent)
    return keys


@dataclasses.dataclass(frozen=True)
class BlockPoolStats:
    """Where the blocks are, and what the prefix cache did since the pool was made.

    All counts are in blocks; the null block is not counted.  `queries` is the number of keys that
    `match_prefix` was asked for, `hits` those that it found, `misses` the rest.  `evictions`
    counts published blocks whose content was given up for an allocation, `copies` those that `cow`
    had to copy.
    """

    num_blocks: int
    held: int
    idle: int
    unused: int
    queries: int
    hits: int
    evictions: int
    copies: int

    @property
    def misses(self) -> int:
        """Keys asked for and not found."""
        return self.queries - self.hits

    @property
    def hit_rate(self) -> float:
        """Hits / queries; 0 before the first query."""
        return self.hits / self.queries if self.queries else 0.0

    @property
    def utilization(self) -> float:
        """Held / num_blocks."""
        return self.held / self.num_blocks


@dataclasses.dataclass(frozen=True, eq=False)
class BlockPool:
    """The state of all blocks; made by `BlockPool.create`, changed only by what its methods return.

    Example:
        >>> pool = BlockPool.create(num_blocks=5, block_size=2)
        >>> pool, blocks = pool.allocate(3)
        >>> blocks.tolist(), pool.num_free
        ([1, 2, 3], 1)
        >>> keys = block_keys([7, 8, 9, 10], 2)
        >>> pool = pool.publish(blocks[:2], keys).free(blocks)
        >>> pool, again = pool.match_prefix(keys)
        >>> again.tolist()
        [1, 2]
    """

    block_size: int
    refs: PersistentArray  # [P] i32, holders of the block
    keys: PersistentArray  # [P] object, the BlockKey that the block is published under, or None
    index: PersistentMap  # BlockKey -> block
    stack: PersistentArray  # [P] i32, the first `num_unused` entries are the unused blocks
    num_unused: int
    # Idle blocks in the order in which they were let go.  A hit takes a block out of the middle by
    # clearing its place, so `queue[head:tail]` has holes: entry i counts if place[queue[i]] == i.
    queue: PersistentArray  # [2 P] i32
    place: PersistentArray  # [P] i32, -1 when not idle
    head: int
    tail: int
    num_idle: int
    queries: int = 0
    hits: int = 0
    evictions: int = 0
    copies: int = 0

    @classmethod
    def create(cls, num_blocks: int, block_size: int) -> "BlockPool":
        """A pool of `num_blocks` blocks of `block_size` tokens, block 0 being the null block.

        Raises:
            ValueError: num_blocks < 2 (nothing but the null block) or block_size < 1.
        """
        if num_blocks < 2 or block_size < 1:
            raise ValueError(
                f"{num_blocks=} must be at least 2 (block 0 is the null block), {block_size=} 1"
            )
        stack = np.zeros(num_blocks, np.int32)
        stack[:-1] = np.arange(num_blocks - 1, 0, -1)
        return cls(
            block_size=block_size,
            refs=PersistentArray(np.zeros(num_blocks, np.int32)),
            keys=PersistentArray(np.full(num_blocks, None, object)),
            index=PersistentMap({}),
            stack=PersistentArray(stack),
            num_unused=num_blocks - 1,
            queue=PersistentArray(np.zeros(2 * num_blocks, np.int32)),
            place=PersistentArray(np.full(num_blocks, -1, np.int32)),
            head=0,
            tail=0,
            num_idle=0,
        )

    @classmethod
    def from_memory_size(
        cls, memory_bytes: int, config: KVCacheConfig, *, block_size: int = 16
    ) -> "BlockPool":
        """The pool whose blocks fill `memory_bytes` on the device, for the geometry of `config`.

        Raises:
            ValueError: fewer than two blocks fit.

        Example:
            >>> config = KVCacheConfig.for_model("llama-3-8b")
            >>> BlockPool.from_memory_size(1 << 30, config, block_size=16).num_blocks
            512
        """
        per_block = config.bytes_per_token() * block_size
        num_blocks = memory_bytes // per_block
        if num_blocks < 2:
            raise ValueError(
                f"{memory_bytes=} holds {num_blocks} blocks of {per_block} bytes; 2 are the least"
            )
        return cls.create(num_blocks, block_size)

    @classmethod
    def for_model(cls, name: str, memory_bytes: int, *, block_size: int = 16) -> "BlockPool":
        """`from_memory_size` with the geometry of a known model (`KVCacheConfig.for_model`).

        Example:
            >>> BlockPool.for_model("gpt2", 64 << 20).num_blocks
            113
        """
        return cls.from_memory_size(
            memory_bytes, KVCacheConfig.for_model(name), block_size=block_size
        )

    @property
    def num_blocks(self) -> int:
        """All blocks, the null block included: the leading dimension of the device pool."""
        return len(self.refs)

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out: unused ones and idle ones."""
        return self.num_unused + self.num_idle

    def stats(self) -> BlockPoolStats:
        """The counts of `BlockPoolStats` now."""
        usable = self.num_blocks - 1
        return BlockPoolStats(
            num_blocks=usable,
            held=usable - self.num_free,
            idle=self.num_idle,
            unused=self.num_unused,
            queries=self.queries,
            hits=self.hits,
            evictions=self.evictions,
            copies=self.copies,
        )

    # Holding and letting go.

    def allocate(self, n: int) -> tuple["BlockPool", np.ndarray]:
        """`n` blocks with one holder each: unused ones first, then the least recently used idle.

        Raises:
            OutOfBlocks: n > num_free.
        """
        if n < 0:
            raise ValueError(f"cannot allocate {n=} blocks")
        if n > self.num_free:
            raise OutOfBlocks(
                f"{n} blocks wanted, {self.num_free} free ({self.num_unused} unused, "
                f"{self.num_idle} idle in the prefix cache) of {self.num_blocks - 1}"
            )
        pool = self
        if n > self.num_unused:
            pool = self._evict(n - self.num_unused)
        left = pool.num_unused - n
        blocks = pool.stack[left : pool.num_unused][::-1]
        return pool._with(num_unused=left, refs=pool.refs.set(blocks, 1)), blocks

    def fork(self, blocks: Sequence[int] | np.ndarray) -> "BlockPool":
        """One more holder for each of `blocks` (twice for a block named twice).

        Raises:
            ValueError: a block is not held by anybody.
        """
        return self._hold(self._real(blocks), allow_idle=False)

    def free(self, blocks: Sequence[int] | np.ndarray) -> "BlockPool":
        """One holder less for each of `blocks`; null blocks are passed over.

        A block without holders becomes idle when it is published, else unused.  Blocks named later
        are evicted earlier: the end of a prefix is worth less than its beginning.

        Raises:
            ValueError: a block has fewer holders than times named (a double free); nothing changes.
        """
        blocks = self._real(blocks)
        if not len(blocks):
            return self
        unique, last, counts = _occurrences(blocks)
        refs = self.refs[unique] - counts
        if refs.min() < 0:
            raise ValueError(
                f"double free: blocks {unique[refs < 0].tolist()} have fewer holders than frees"
            )
        gone = refs == 0
        dead = unique[gone][np.argsort(-last[gone])]
        published = np.array([key is not None for key in self.keys[dead].tolist()], bool)
        pool = self._with(refs=self.refs.set(unique, refs))
        return pool._push_unused(dead[~published])._push_idle(dead[published])

    def cow(self, blocks: Sequence[int] | np.ndarray) -> tuple["BlockPool", np.ndarray]:
        """Make `blocks` writable: copy on write.

        A block with one holder stays (and leaves the prefix cache: its content is about to change);
        for a shared one the caller's hold moves to a new block.  Where the result differs from
        `blocks`, the content must be copied on the device, `copy_blocks(blocks, result)`, before
        anything is written.  Of several holders in one call the last keeps the block if no other
        holder is left.

        Raises:
            OutOfBlocks: not enough blocks for the copies.
            ValueError: a block has fewer holders than times named.
        """
        blocks = np.array(blocks, np.int32).reshape(-1)
        self._real(blocks, null="refuse")
        unique, last, counts = _occurrences(blocks)
        holders = self.refs[unique]
        if len(unique) and (holders < counts).any():
            raise ValueError(f"blocks {unique[holders < counts].tolist()} have too few holders")
        keeps = np.zeros(len(blocks), bool)
        keeps[last[holders == counts]] = True
        pool, fresh = self.allocate(int((~keeps).sum()))
        result = blocks.copy()
        result[~keeps] = fresh
        pool = pool.free(blocks[~keeps])._unpublish(blocks[keeps])
        return pool._with(copies=pool.copies + len(fresh)), result

    # The prefix cache.

    def match_prefix(self, keys: Iterable[BlockKey]) -> tuple["BlockPool", np.ndarray]:
        """The blocks of the longest published prefix of `keys`, with the caller as a holder.

        To have a logit, at least the last token must be computed: ask with the keys of
        `tokens[:-1]`.  The number of cached tokens is `len(blocks) * block_size`.
        """
        keys = list(keys)
        blocks = []
        for key in keys:
            block = self.index.get(key)
            if block is None:
                break
            blocks.append(block)
        pool = self._hold(np.array(blocks, np.int32), allow_idle=True)
        return pool._with(queries=self.queries + len(keys), hits=self.hits + len(blocks)), np.array(
            blocks, np.int32
        )

    def publish(self, blocks: Sequence[int] | np.ndarray, keys: Sequence[BlockKey]) -> "BlockPool":
        """Let others find `blocks` under `keys`; each must be full, written and held.

        A key that is published already keeps its block, and the new one stays private.  Blocks of
        many sequences may be published in one call.

        Raises:
            ValueError: lengths differ, a block is not held, or it holds something else already.
        """
        blocks = self._real(blocks, null="refuse")
        if len(blocks) != len(keys):
            raise ValueError(f"{len(blocks)} blocks and {len(keys)} keys")
        if (self.refs[blocks] < 1).any():
            raise ValueError(f"blocks {blocks[self.refs[blocks] < 1].tolist()} are not held")
        fresh: dict[BlockKey, int] = {}
        owner: dict[int, BlockKey] = {}
        known = self.index.get_all(keys)
        held = self.keys[blocks].tolist()
        for block, key, old, taken in zip(blocks.tolist(), keys, held, known, strict=True):
            old = owner.get(block, old)
            if old is not None and old != key:
                raise ValueError(f"{block=} is published as {old}, not {key}")
            if old is None and taken is None and fresh.setdefault(key, block) == block:
                owner[block] = key
        named = np.fromiter(owner, np.int32, len(owner))
        values = np.empty(len(owner), object)
        values[:] = list(owner.values())
        return self._with(keys=self.keys.set(named, values), index=self.index.update(fresh))

    def clear_prefix_cache(self) -> "BlockPool":
        """Forget every published content (the parameters changed); held blocks stay held."""
        published = np.fromiter(self.index.to_dict().values(), np.int32)
        return self._evict(self.num_idle, count=False)._unpublish(published)

    # Geometry.

    def defragment(self) -> tuple["BlockPool", np.ndarray]:
        """Move what is held or idle to the front, with as few copies as there can be.

        Returns:
            The pool, and `moves` `[P]` i32: block b is now block `moves[b]`.  Tables become
            `moves[table]`, and the device copies b to `moves[b]` wherever they differ; sources and
            destinations are disjoint.
        """
        refs, keys, place = self.refs.to_numpy(), self.keys.to_numpy(), self.place.to_numpy()
        live = (refs > 0) | (place >= 0)
        count = int(live.sum())
        ids = np.arange(self.num_blocks, dtype=np.int32)
        sources = ids[live & (ids > count)]
        holes = ids[~live & (ids > 0) & (ids <= count)]
        moves = ids.copy()
        moves[sources] = holes
        order = self._idle_in_order()
        fresh = BlockPool.create(self.num_blocks, self.block_size)
        new_refs, new_keys = np.zeros_like(refs), np.full_like(keys, None)
        new_refs[moves[live]] = refs[live]
        new_keys[moves[live]] = keys[live]
        index = {key: int(moves[block]) for key, block in self.index.to_dict().items()}
        return self._with(
            refs=PersistentArray(new_refs),
            keys=PersistentArray(new_keys),
            index=PersistentMap(index),
            stack=fresh.stack,
            num_unused=self.num_unused,
            queue=fresh.queue,
            place=fresh.place,
            head=0,
            tail=0,
            num_idle=0,
        )._push_idle(moves[order]), moves

    def resize(self, num_blocks: int) -> "BlockPool":
        """The pool with `num_blocks` blocks; those given up must be unused (see `defragment`).

        Raises:
            ValueError: a block beyond the new end is held or idle.
        """
        fresh = BlockPool.create(num_blocks, self.block_size)
        refs, keys, place = self.refs.to_numpy(), self.keys.to_numpy(), self.place.to_numpy()
        live = np.flatnonzero((refs > 0) | (place >= 0))
        if len(live) and live[-1] >= num_blocks:
            raise ValueError(
                f"block {live[-1]} is in use beyond {num_blocks=}; defragment moves the "
                f"{len(live)} blocks in use to the front"
            )
        size = min(num_blocks, self.num_blocks)
        unused = np.setdiff1d(np.arange(1, num_blocks, dtype=np.int32), live)[::-1]
        stack = np.zeros(num_blocks, np.int32)
        stack[: len(unused)] = unused
        return self._with(
            refs=fresh.refs.set(slice(0, size), refs[:size]),
            keys=fresh.keys.set(slice(0, size), keys[:size]),
            stack=PersistentArray(stack),
            num_unused=len(unused),
            queue=fresh.queue,
            place=fresh.place,
            head=0,
            tail=0,
            num_idle=0,
        )._push_idle(self._idle_in_order())

    # Below: the moves between the three states.

    def _with(self, **changes) -> "BlockPool":
        new = object.__new__(BlockPool)
        new.__dict__.update(self.__dict__)
        new.__dict__.update(changes)
        return new

    def _real(self, blocks: Sequence[int] | np.ndarray, null: str = "drop") -> np.ndarray:
        """`blocks` as i32 without null blocks; ids outside the pool are an error."""
        blocks = np.asarray(blocks, np.int32).reshape(-1)
        if not len(blocks):
            return blocks
        lowest = blocks.min()
        if lowest < 0 or blocks.max() >= self.num_blocks:
            bad = blocks[(blocks < 0) | (blocks >= self.num_blocks)]
            raise ValueError(f"blocks {bad.tolist()} are outside the pool of {self.num_blocks}")
        if lowest > NULL_BLOCK:
            return blocks
        if null == "refuse":
            raise ValueError(f"the null block ({NULL_BLOCK}) holds nothing and cannot be shared")
        return blocks[blocks != NULL_BLOCK]

    def _hold(self, blocks: np.ndarray, *, allow_idle: bool) -> "BlockPool":
        if not len(blocks):
            return self
        unique, _, counts = _occurrences(blocks)
        refs = self.refs[unique]
        idle = unique[refs == 0]
        if len(idle) and not allow_idle:
            raise ValueError(f"blocks {idle.tolist()} are held by nobody and cannot be shared")
        return self._with(
            refs=self.refs.set(unique, refs + counts),
            place=self.place.set(idle, -1),
            num_idle=self.num_idle - len(idle),
        )

    def _push_unused(self, blocks: np.ndarray) -> "BlockPool":
        top = self.num_unused + len(blocks)
        return self._with(stack=self.stack.set(slice(self.num_unused, top), blocks), num_unused=top)

    def _push_idle(self, blocks: np.ndarray) -> "BlockPool":
        if not len(blocks):
            return self
        pool = self
        if self.tail + len(blocks) > len(self.queue):  # once every `num_blocks` pushes
            order = self._idle_in_order()
            pool = self._with(head=0, tail=0, num_idle=0)._push_idle(order)
        tail = pool.tail + len(blocks)
        return pool._with(
            queue=pool.queue.set(slice(pool.tail, tail), blocks),
            place=pool.place.set(blocks, np.arange(pool.tail, tail, dtype=np.int32)),
            tail=tail,
            num_idle=pool.num_idle + len(blocks),
        )

    def _idle_in_order(self) -> np.ndarray:
        """The idle blocks, least recently used first."""
        queue = self.queue[self.head : self.tail]
        return queue[self.place[queue] == np.arange(self.head, self.tail)]

    def _evict(self, n: int, *, count: bool = True) -> "BlockPool":
        """The `n` least recently used idle blocks become unused."""
        head, found = self.head, [np.empty(0, np.int32)]
        missing, chunk = n, max(2 * n, 64)
        while missing:
            queue = self.queue[head : min(head + chunk, self.tail)]
            valid = np.flatnonzero(self.place[queue] == np.arange(head, head + len(queue)))
            valid = valid[:missing]
            missing -= len(valid)
            head += int(valid[-1]) + 1 if not missing else len(queue)
            found.append(queue[valid])
        blocks = np.concatenate(found)
        pool = self._with(
            head=head,
            place=self.place.set(blocks, -1),
            num_idle=self.num_idle - n,
            evictions=self.evictions + (n if count else 0),
        )
        # The least recently used on top: it is the one to be handed out.
        return pool._unpublish(blocks)._push_unused(blocks[::-1])

    def _unpublish(self, blocks: np.ndarray) -> "BlockPool":
        keys = [key for key in self.keys[blocks] if key is not None]
        if not keys:
            return self
        return self._with(keys=self.keys.set(blocks, None), index=self.index.delete(keys))


def _occurrences(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct blocks, where each stands last, and how often it is named."""
    if len(set(blocks.tolist())) == len(blocks):  # as nearly always; a tenth of the time of a sort
        return blocks, np.arange(len(blocks)), np.ones(len(blocks), np.int32)
    unique, first, counts = np.unique(blocks[::-1], return_index=True, return_counts=True)
    return unique, len(blocks) - 1 - first, counts.astype(np.int32)
