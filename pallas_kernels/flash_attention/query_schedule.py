"""Which query tile a CTA computes, and which key blocks it visits: forward and `backward_dq.py`.

A tile walks its key blocks from the last to the first, since the diagonal and the ragged end lie
there: they are masked first, and the main loop then has no mask in it.  Every consumer has its own
range of blocks (see `mask.py`).
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import cdiv, div, rem
from pallas_kernels.flash_attention import problem as common
from pallas_kernels.flash_attention.mask import TILE
from pallas_kernels.flash_attention.problem import LOG2E, at_index


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
        return always or self.band.right is not None or self.keys % self.config.block_kv != 0

    @property
    def one_high_block(self) -> bool:
        """Whether at most one block at the high end needs a mask, known statically.

        The 64 rows of a consumer stay in one block where the diagonal enters at a multiple of 64;
        a ragged end is in the last block, which is that one or the only one to mask.
        """
        right = self.band.right
        aligned = right is None or (self.band.offset + right) % 64 == 0
        return not self.dynamic and not self.lists and self.mask is None and aligned


def head_group(p: Problem) -> int:
    """(batch, head) pairs whose tiles run together, so that their K and V stay in L2."""
    pairs, group = p.pairs, p.group
    if p.config.persistent:
        return pairs
    per_head = p.keys * (p.head_dim + p.head_dim_v) * 2
    most = max(group, (32 << 20) // max(per_head, 1) * group)
    return max(x for x in range(1, pairs + 1) if pairs % x == 0 and (x <= most or x == 1))


def longest_first(p: Problem) -> bool:
    """Whether tiles differ in length by their place, so that long ones should start first."""
    return not p.dynamic and p.band.right is not None and p.band.left is None


def decode(p: Problem, t):
    """Flat tile number to (batch, head, query tile) of this CTA."""
    if longest_first(p):
        size = head_group(p)
        group, r = div(t, size * p.q_tiles), rem(t, size * p.q_tiles)
        pair = group * size + rem(r, size)
        q_tile = p.q_tiles - 1 - div(r, size)
    else:
        pair, q_tile = div(t, p.q_tiles), rem(t, p.q_tiles)
    return div(pair, p.heads), rem(pair, p.heads), q_tile


def tile_of(p: Problem, cta, j):
    """The j-th tile of a CTA; zigzag over the SMs evens out tiles sorted by length."""
    if not p.config.persistent:
        return cta
    n = p.programs
    if not longest_first(p):
        return j * n + cta
    return j * n + jnp.where(rem(j, 2) == 1, n - 1 - cta, cta)


def over_tiles(p: Problem, f):
    """`f(j, tile, blocks so far) -> blocks so far` over the tiles of this CTA."""
    cta = lax.axis_index("cta")
    if not p.config.persistent:
        return f(jnp.int32(0), cta, jnp.int32(0))
    n = p.programs
    full, part = divmod(p.total, n)
    count = jnp.int32(full)
    if part:
        position = n - 1 - cta if longest_first(p) and full % 2 else cta
        count = count + (position < part).astype(jnp.int32)
    body = lambda j, done: f(j, tile_of(p, cta, j), done)
    return lax.fori_loop(jnp.int32(0), count, body, jnp.int32(0))


def row_ranges(p: Problem, refs: Any, b, base):
    """Blocks that the 64 rows from `base` touch: `(first, end, full_first, full_end)`.

    Blocks in `[full_first, full_end)` are seen by every row.  Without a row, all are zero.
    """
    bk = p.config.block_kv
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
    some = any_lo < any_hi
    first = jnp.where(some, div(any_lo, bk), 0)
    end = jnp.where(some, div(any_hi + (bk - 1), bk), 0)
    full_first = lax.min(div(all_lo + (bk - 1), bk), end)
    full_end = lax.max(div(all_hi, bk), full_first)
    return first, end, full_first, full_end


def block_at(p: Problem, refs: Any, b, head, q_tile, end, i):
    """The number of the i-th block of a tile: from the last to the first, or as listed."""
    if not p.lists:
        return end - 1 - i
    order = refs.extra.order
    return order[(*at_index(order, b, head), q_tile, i)]


def tile_blocks(p: Problem, refs: Any, b, head, q_tile):
    """`(first, end)` of the blocks that some consumer of the tile touches; or of the list."""
    if p.lists:
        counts = refs.extra.counts
        return jnp.int32(0), counts[(*at_index(counts, b, head), q_tile, 1)]
    bases = [q_tile * p.tile_rows + row for row in range(0, p.tile_rows, TILE)]
    if not p.dynamic and p.band.unbounded:
        return jnp.int32(0), jnp.int32(cdiv(p.keys, p.config.block_kv))
    ranges = [row_ranges(p, refs, b, base) for base in bases]
    end = functools.reduce(lax.max, [r[1] for r in ranges])
    # an empty consumer reports (0, 0) and must not pull the start down
    starts = [jnp.where(r[1] > 0, r[0], end) for r in ranges]
    return functools.reduce(lax.min, starts), end


def place(p: Problem, refs: Any, wg, b, head, q_tile, first, end, done) -> tuple:
    """The fields of a `Consumer` whose tile has the blocks `first..end`."""
    base = q_tile * p.config.block_q + wg * TILE
    where = (p, refs, wg, b, head, q_tile, base, end, done)
    if p.lists:
        counts = refs.extra.counts
        partial = counts[(*at_index(counts, b, head), q_tile, 0)]
        return *where, jnp.int32(0), end, partial, end
    lo, hi, full_lo, full_hi = row_ranges(p, refs, b, base)
    none, blocks = hi == 0, end - first
    # an empty consumer passes over every block of the tile
    begin_i = jnp.where(none, blocks, end - hi)
    end_i = jnp.where(none, blocks, end - lo)
    if p.mask is not None:  # every block takes the mask_mod
        return *where, begin_i, end_i, end_i, end_i
    return *where, begin_i, end_i, end - full_hi, end - full_lo
