"""Which query tile a CTA computes, and which key blocks it visits: forward and `backward_dq.py`.

A tile walks its key blocks from the last to the first, since the diagonal and the ragged end lie
there: they are masked first, and the main loop then has no mask in it.  Every consumer has its own
range of blocks (see `mask.py`).
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import cdiv, div, rem
from pallas_kernels.flash_attention import problem as common
from pallas_kernels.flash_attention.mask import FAR, TILE
from pallas_kernels.flash_attention.problem import LOG2E, at_index, sorted_tiles


@dataclasses.dataclass(frozen=True, eq=False)
class Problem(common.Problem):
    """The static side of one call, in query tiles."""

    @property
    def tile_rows(self) -> int:
        """Query rows of one tile."""
        return self.config.block_q

    @property
    def q_tiles(self) -> int:
        """Tiles of one head."""
        return cdiv(self.queries, self.tile_rows)

    @property
    def pairs(self) -> int:
        """(batch, head) pairs of the call."""
        return self.batch * self.heads

    @property
    def sorted(self) -> bool:
        """Whether `Extra.work` lists the tiles."""
        return (self.dynamic or self.lists) and self.config.longest_first

    @property
    def total(self) -> int:
        """Tiles of the call."""
        return self.pairs * self.q_tiles

    @property
    def programs(self) -> int:
        """CTAs of the grid."""
        if not self.config.persistent:
            return self.total
        return min(self.config.num_sms, self.total)

    @property
    def multiplier(self) -> float:
        """Takes what `_Consumer.logits` returns to base-2 logits."""
        if self.score is not None:
            return LOG2E
        if self.alibi:
            return 1.0
        return (self.scale if self.soft_cap is None else self.soft_cap) * LOG2E

    @property
    def masked_low(self) -> bool:
        """Whether blocks at the low end of a range may need a mask."""
        return not self.lists and (self.dynamic or self.band.left is not None)

    @property
    def masked_high(self) -> bool:
        """Whether blocks at the high end of a range may need a mask."""
        always = self.dynamic or self.lists or self.mask is not None
        return always or self.band.right is not None or self.ragged_keys

    @property
    def slides(self) -> bool:
        """Whether the blocks of a tile begin at its own first key, see `origin`."""
        static = not self.dynamic and not self.lists
        return self.config.sliding_blocks and static and self.band.left is not None

    @property
    def ragged_keys(self) -> bool:
        """Whether a row that sees keys up to the last may have a block that hangs over the end."""
        right = self.band.right
        if self.slides:
            return right is None or self.queries + self.band.offset + right > self.keys
        return self.keys % self.config.block_kv != 0

    @property
    def one_high_block(self) -> bool:
        """Whether at most one block at the high end needs a mask, known statically.

        The 64 rows of a consumer stay in one block where the diagonal enters at a multiple of 64;
        a ragged end is in the last block, which is that one or the only one to mask.
        """
        right, c = self.band.right, self.config
        aligned = right is None or (self.band.offset + right) % TILE == 0
        if c.chained and right is not None:  # the last block of a tile is that of every consumer
            aligned = aligned and (self.band.offset + right) % self.tile_rows == 0
            aligned = aligned and c.block_kv % self.tile_rows == 0
        return not self.dynamic and not self.lists and self.mask is None and aligned

    @property
    def low_in_high(self) -> bool:
        """Whether the first block, which the diagonal crosses, may need the low border as well."""
        left, right = self.band.left, self.band.right
        if not self.config.tight_masks or not self.one_high_block or left is None or right is None:
            return self.masked_low
        clipped = self.queries + self.band.offset + right > self.keys
        return clipped or left + right < self.config.block_kv + self.config.block_q


def head_group(p: Problem) -> int:
    """(batch, head) pairs whose tiles run together, so that their K and V stay in L2."""
    pairs = p.pairs
    if p.config.persistent:
        return pairs
    per_head = p.keys * (p.head_dim + p.head_dim_v) * 2
    most = max(p.group, (32 << 20) // max(per_head, 1) * p.group)
    return max(x for x in range(1, pairs + 1) if pairs % x == 0 and (x <= most or x == 1))


def longest_first(p: Problem) -> bool:
    """Whether tiles differ in length by their place, so that long ones should start first."""
    dealt = p.band.left is None or p.config.deal != "turns"
    return not p.dynamic and p.band.right is not None and dealt


def decode(p: Problem, t):
    """Flat tile number to (batch, first head, query tile) of this CTA."""
    if longest_first(p):
        size = head_group(p)
        group, r = div(t, size * p.q_tiles), rem(t, size * p.q_tiles)
        pair = group * size + rem(r, size)
        q_tile = p.q_tiles - 1 - div(r, size)
    elif p.config.row_major and p.band.left is not None:
        pair, q_tile = rem(t, p.pairs), div(t, p.pairs)
    else:
        pair, q_tile = div(t, p.q_tiles), rem(t, p.q_tiles)
    return div(pair, p.heads), rem(pair, p.heads), q_tile


class Work(NamedTuple):
    """One tile: scalars, so that they can be read long before they are used."""

    b: Any
    head: Any  # the first of the tile
    q_tile: Any
    first: Any  # block
    end: Any
    ranges: Any = ()  # where a table has them: `row_ranges` of the consumer that asks, or how many
    # of listed blocks are partial


def find(p: Problem, refs: Any, t, wg=None) -> Work:
    """Flat tile number to the tile; `wg` is the consumer that asks, None the one that loads."""
    if p.sorted:
        item, work, head = div(t, p.heads), refs.extra.work, rem(t, p.heads)
        if p.lists:
            b, q_tile = work[item, 0], work[item, 1]
            count = counts_of(refs, b, head, q_tile)
            if work.shape[1] > 2:
                count = lambda i: work[item, 2 + i]
            return Work(b, head, q_tile, jnp.int32(0), count(1), (count(0),))
        b, q_tile, first, end = (work[item, i] for i in range(4))
        ranges = ()
        if wg is not None:
            ranges = tuple(work[item, 4 + 4 * wg + i] for i in range(4))
        return Work(b, head, q_tile, first, end, ranges)
    b, head, q_tile = decode(p, t)
    first, end = tile_blocks(p, refs, b, head, q_tile)
    if p.config.chained or p.config.o_in_ring:
        end = lax.max(end, first + 1)
    return Work(b, head, q_tile, first, end)


def work_table(p: Problem, extra: Any) -> jax.Array:
    """`Extra.work`: (b, query tile, first, end) and each consumer's row range, longest first.

    Of listed blocks (b, query tile, `Extra.counts`), these only where the heads share their lists.
    """
    if p.lists:
        whole = lambda x: jnp.broadcast_to(x, (p.batch, p.q_tiles))
        shared = extra.counts[:, 0] if extra.counts.shape[1] == 1 else extra.counts[:, 0, :, :0]
        columns = [whole(shared[..., i]) for i in range(shared.shape[-1])]
        return sorted_tiles(whole(extra.counts[..., 1].max(1)), columns)
    ranges = extra.ranges
    wgs = p.tile_rows // TILE
    ranges = ranges.reshape(p.batch, p.q_tiles, wgs, 4)
    lo, end, full_lo, full_hi = blocks_of(p, *(ranges[..., i] for i in range(4)))
    first = jnp.where(end > 0, lo, FAR).min(-1)
    last = end.max(-1)
    first = jnp.minimum(first, last)
    if p.config.chained or p.config.o_in_ring:
        last = jnp.maximum(last, first + 1)
    parts = [x[..., i] for i in range(wgs) for x in (lo, end, full_lo, full_hi)]
    return sorted_tiles(last - first, [first, last, *parts])


def tile_of(p: Problem, cta, j):
    """The j-th tile of a CTA; zigzag over the SMs evens out tiles sorted by length."""
    if not p.config.persistent:
        return cta
    n = p.programs
    if p.config.deal == "zigzag back" and p.band.left is not None:
        j = tile_count(p, cta) - 1 - j
    if not longest_first(p) and not p.sorted:
        return j * n + cta
    return j * n + jnp.where(rem(j, 2) == 1, n - 1 - cta, cta)


def tile_count(p: Problem, cta):
    """Tiles of a CTA."""
    if not p.config.persistent:
        return jnp.int32(1)
    n = p.programs
    full, part = divmod(p.total, n)
    count = jnp.int32(full)
    if part:
        zigzag = (longest_first(p) or p.sorted) and full % 2
        position = n - 1 - cta if zigzag else cta
        count = count + (position < part).astype(jnp.int32)
    return count


def over_tiles(p: Problem, f):
    """`f(j, tile, blocks so far) -> blocks so far` over the tiles of this CTA."""
    cta = lax.axis_index("cta")
    if not p.config.persistent:
        return f(jnp.int32(0), cta, jnp.int32(0))
    body = lambda j, done: f(j, tile_of(p, cta, j), done)
    return lax.fori_loop(jnp.int32(0), tile_count(p, cta), body, jnp.int32(0))


def row_ranges(p: Problem, refs: Any, b, base):
    """Blocks that the 64 rows from `base` touch: `(first, end, full_first, full_end)`.

    Blocks in `[full_first, full_end)` are seen by every row.  Without a row, all are zero.
    """
    if p.dynamic:
        r = lambda i: refs.extra.ranges[b, div(base, TILE), i]
        any_lo, any_hi, all_lo, all_hi = r(0), r(1), r(2), r(3)
    else:
        last = lax.min(base + (TILE - 1), jnp.int32(p.queries - 1))
        zero, keys, band = jnp.int32(0), jnp.int32(p.keys), p.band
        any_lo = all_lo = zero
        any_hi = all_hi = keys
        if band.left is not None:
            any_lo = lax.max(base + (band.offset - band.left), zero)
            all_lo = lax.max(last + (band.offset - band.left), zero)
        if band.right is not None:
            reach = band.offset + band.right + 1
            clip = lambda x: lax.max(lax.min(x + reach, keys), zero)
            any_hi, all_hi = clip(last), clip(base)
        any_hi = jnp.where(base < p.queries, any_hi, 0)
    if p.slides:
        start = origin(p, div(base, p.tile_rows))
        ends = (lax.max(x - start, jnp.int32(0)) for x in (any_lo, any_hi, all_lo, all_hi))
        return blocks_of(p, *ends)
    return blocks_of(p, any_lo, any_hi, all_lo, all_hi)


def origin(p: Problem, q_tile):
    """The key at which block 0 of a tile begins.

    A window whose length is a multiple of 64 then ends where a block ends: of 1024 keys 128 rows
    meet 1151, exactly 6 blocks of 192 where 7 or 8 would lie if they began at multiples of 192.
    """
    left = p.band.left
    if not p.slides or left is None:
        return jnp.int32(0)
    first = lax.max(q_tile * p.tile_rows + (p.band.offset - left), jnp.int32(0))
    return div(first, TILE) * TILE


def blocks_of(p: Problem, any_lo, any_hi, all_lo, all_hi) -> tuple:
    """`row_ranges` of key ranges."""
    bk = p.config.block_kv
    whole = lambda x: div(x, bk) if jnp.ndim(x) == 0 else x // bk
    some = any_lo < any_hi
    first = jnp.where(some, whole(any_lo), 0)
    end = jnp.where(some, whole(any_hi + (bk - 1)), 0)
    full_first = jnp.minimum(whole(all_lo + (bk - 1)), end)
    full_end = whole(all_hi)
    if p.config.tight_masks:  # blocks from there on take the high border's comparison, no others
        full_end = jnp.minimum(full_end, end)
    else:
        full_end = jnp.maximum(full_end, full_first)
    return first, end, full_first, full_end


def block_at(p: Problem, refs: Any, b, head, q_tile, end, i):
    """The number of the i-th block of a tile: from the last to the first, or as listed."""
    if not p.lists:
        return end - 1 - i
    order = refs.extra.order
    return order[(*at_index(order, b, head), q_tile, i)]


def counts_of(refs: Any, b, head, q_tile):
    """`f(i)`: column i of a tile's `Extra.counts`."""
    counts = refs.extra.counts
    return lambda i: counts[(*at_index(counts, b, head), q_tile, i)]


def tile_blocks(p: Problem, refs: Any, b, head, q_tile):
    """`(first, end)` of the blocks that some consumer of the tile touches; or of the list."""
    if p.lists:
        return jnp.int32(0), counts_of(refs, b, head, q_tile)(1)
    bases = [q_tile * p.tile_rows + row for row in range(0, p.tile_rows, TILE)]
    if not p.dynamic and p.band.unbounded:
        return jnp.int32(0), jnp.int32(cdiv(p.keys, p.config.block_kv))
    ranges = [row_ranges(p, refs, b, base) for base in bases]
    end = functools.reduce(lax.max, [r[1] for r in ranges])
    # an empty consumer reports (0, 0) and must not pull the start down
    starts = [jnp.where(r[1] > 0, r[0], end) for r in ranges]
    return functools.reduce(lax.min, starts), end


def place(p: Problem, refs: Any, wg, b, head, q_tile, first, end, done, ranges=()) -> tuple:
    """The fields of a `Consumer` whose tile has the blocks `first..end`."""
    base = q_tile * p.tile_rows + wg * TILE
    where = (p, refs, wg, b, head, q_tile, base, end, done)
    if p.lists:
        (partial,) = ranges or (counts_of(refs, b, head, q_tile)(0),)
        return *where, jnp.int32(0), end, partial, end
    lo, hi, full_lo, full_hi = ranges or row_ranges(p, refs, b, base)
    none, blocks = hi == 0, end - first
    if p.config.chained and p.mask is not None:
        return *where, jnp.int32(0), blocks, blocks, blocks
    if p.config.chained:
        return *where, jnp.int32(0), blocks, end - full_hi, end - full_lo
    # an empty consumer passes over every block of the tile
    begin_i = jnp.where(none, blocks, end - hi)
    end_i = blocks if p.config.o_in_ring else jnp.where(none, blocks, end - lo)
    if p.mask is not None:  # every block takes the mask_mod
        return *where, begin_i, end_i, end_i, end_i
    return *where, begin_i, end_i, end - full_hi, end - full_lo
