"""Which block holds which tokens of a sequence: an immutable row of block ids."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from aidx.cache.block_pool import NULL_BLOCK, BlockPool


@dataclasses.dataclass(frozen=True, eq=False)
class BlockTable:
    """A sequence's blocks: token i lies in `blocks[i // block_size]`, at offset `i % block_size`.

    The table is one holder of each of its blocks.  Methods that touch holdings take the pool and
    return the new one beside the new table; on `OutOfBlocks` neither has changed.

    Example:
        >>> pool = BlockPool.create(num_blocks=8, block_size=4)
        >>> table = BlockTable.empty(block_size=4)
        >>> pool, table, copies = table.append(pool, 6)
        >>> table.blocks.tolist(), table.slots(3, 6).tolist()
        ([1, 2], [7, 8, 9])
        >>> pool, child = table.fork(pool)
        >>> pool, child, (src, dst) = child.append(pool, 1)  # block 2 is shared: copied first
        >>> child.blocks.tolist(), src.tolist(), dst.tolist()
        ([1, 3], [2], [3])
        >>> child.free(table.free(pool)).num_free
        7
    """

    blocks: np.ndarray  # [m] i32; NULL_BLOCK where a window has let the block go
    num_tokens: int
    block_size: int

    @classmethod
    def empty(cls, block_size: int) -> "BlockTable":
        """No tokens, no blocks."""
        return cls(_frozen(np.empty(0, np.int32)), 0, block_size)

    @classmethod
    def of(cls, blocks: Sequence[int] | np.ndarray, num_tokens: int, block_size: int):
        """A table of blocks that are held already (those of `match_prefix`, say).

        Raises:
            ValueError: the blocks are not as many as `num_tokens` need.
        """
        blocks = np.array(blocks, np.int32).reshape(-1)
        if len(blocks) != -(-num_tokens // block_size):
            raise ValueError(f"{len(blocks)} blocks of {block_size=} for {num_tokens=}")
        return cls(_frozen(blocks), num_tokens, block_size)

    def slots(self, start: int, stop: int) -> np.ndarray:
        """Slots of tokens start..stop-1, i32: block * block_size + offset; -1 in a null block.

        Raises:
            IndexError: the range is not inside the table.
        """
        if not 0 <= start <= stop <= len(self.blocks) * self.block_size:
            raise IndexError(f"tokens {start}..{stop} of a table of {len(self.blocks)} blocks")
        tokens = np.arange(start, stop, dtype=np.int32)
        blocks = self.blocks[tokens // self.block_size]
        slots = blocks * self.block_size + tokens % self.block_size
        return np.where(blocks == NULL_BLOCK, -1, slots).astype(np.int32)

    def append(
        self, pool: BlockPool, n: int
    ) -> tuple[BlockPool, "BlockTable", tuple[np.ndarray, np.ndarray]]:
        """Room for `n` more tokens that the caller may write.

        Returns:
            The pool, the table and `(src, dst)`: blocks to copy on the device before writing (the
            last block, when it is partly filled and shared).

        Raises:
            OutOfBlocks: the pool has too few blocks.
            ValueError: n is negative.
        """
        if n < 0:
            raise ValueError(f"cannot append {n=} tokens")
        src = dst = np.empty(0, np.int32)
        blocks = self.blocks
        if n and self.num_tokens % self.block_size:
            pool, last = pool.cow(blocks[-1:])
            if last[0] != blocks[-1]:
                src, dst = blocks[-1:], last
                blocks = np.concatenate([blocks[:-1], last])
        missing = -(-(self.num_tokens + n) // self.block_size) - len(blocks)
        pool, fresh = pool.allocate(missing)
        table = self._with(np.concatenate([blocks, fresh]), self.num_tokens + n)
        return pool, table, (src, dst)

    def truncate(self, pool: BlockPool, num_tokens: int) -> tuple[BlockPool, "BlockTable"]:
        """Only the first `num_tokens` tokens; the blocks behind them are let go.

        Raises:
            ValueError: num_tokens is negative or more than there are.
        """
        if not 0 <= num_tokens <= self.num_tokens:
            raise ValueError(f"cannot truncate {self.num_tokens} tokens to {num_tokens}")
        kept = -(-num_tokens // self.block_size)
        return pool.free(self.blocks[kept:]), self._with(self.blocks[:kept], num_tokens)

    def fork(self, pool: BlockPool) -> tuple[BlockPool, "BlockTable"]:
        """A second sequence with the same tokens; blocks are shared until one side appends."""
        return pool.fork(self.blocks), self

    def evict_before(self, pool: BlockPool, token: int) -> tuple[BlockPool, "BlockTable"]:
        """Let go of the blocks that hold only tokens before `token`; null blocks stand for them.

        With a sliding window of W, the query at position p sees keys from p - W + 1 on, so before
        it is computed `evict_before(pool, p - W + 1)` frees what no later query can see.
        """
        gone = min(max(token, 0) // self.block_size, len(self.blocks))
        if not self.blocks[:gone].any():
            return pool, self
        blocks = self.blocks.copy()
        blocks[:gone] = NULL_BLOCK
        return pool.free(self.blocks[:gone]), self._with(blocks, self.num_tokens)

    def free(self, pool: BlockPool) -> BlockPool:
        """The sequence has ended: the pool without its holdings."""
        return pool.free(self.blocks)

    def remap(self, moves: np.ndarray) -> "BlockTable":
        """The table after `BlockPool.defragment` moved block b to `moves[b]`."""
        return self._with(moves[self.blocks], self.num_tokens)

    def _with(self, blocks: np.ndarray, num_tokens: int) -> "BlockTable":
        return BlockTable(_frozen(blocks), num_tokens, self.block_size)


def pad_tables(tables: Sequence[BlockTable], width: int, rows: int | None = None) -> np.ndarray:
    """`[R, M]` i32 for the device: one row per table, null blocks behind its end.

    Args:
        tables: at most `rows` of them.
        width: M; at least the longest table.
        rows: R; `len(tables)` when None.

    Raises:
        ValueError: a table or their number does not fit.

    Example:
        >>> pad_tables([BlockTable.of([3], 2, 4), BlockTable.of([5, 1], 8, 4)], 3)
        array([[3, 0, 0],
               [5, 1, 0]], dtype=int32)
    """
    rows = len(tables) if rows is None else rows
    longest = max((len(table.blocks) for table in tables), default=0)
    if len(tables) > rows or longest > width:
        raise ValueError(f"{len(tables)} tables of up to {longest} blocks in [{rows}, {width}]")
    padded = np.full((rows, width), NULL_BLOCK, np.int32)
    for row, table in zip(padded, tables, strict=False):
        row[: len(table.blocks)] = table.blocks
    return padded


def _frozen(blocks: np.ndarray) -> np.ndarray:
    blocks.setflags(write=False)
    return blocks
