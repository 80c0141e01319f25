"""Which KV tile a CTA of the backward keeps, and which query tiles pass by it."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import cdiv, div, rem
from pallas_kernels.flash_attention import problem as common
from pallas_kernels.flash_attention.problem import at_index
from pallas_kernels.flash_attention.program import Program


@dataclasses.dataclass(frozen=True, eq=False)
class Problem(common.Problem):
    """The static side of one call, in KV tiles."""

    dq: bool  # whether this kernel computes dQ
    apart: bool  # whether dS takes another P than dV (`Options.apart`)
    slope: Program | None  # of the score_mod: (value, d value / d score)

    @property
    def sloped(self) -> bool:
        """Whether the score is bent between Q K^T and the softmax."""
        return self.soft_cap is not None or (self.slope is not None and not self.slope.additive)

    @property
    def tight(self) -> bool:
        """Whether registers are short."""
        more = self.score is not None or self.mask is not None or self.rate > 0
        return more or self.soft_cap is not None

    @property
    def brings_tiles(self) -> bool:
        """Whether the score_mod loads a number for every score."""
        return self.score is not None and "tile" in self.score.kinds

    @property
    def piece(self) -> int:
        """Queries of a step whose S and dP are in registers at once.

        128 leave no room for a second form of P, nor for numbers that are loaded: dV and dK then
        take their 64 before the next 64 begin.
        """
        return 64 if self.sloped or self.brings_tiles else self.config.block_q

    @property
    def tile_rows(self) -> int:
        """Keys of one tile."""
        return self.config.block_kv

    @property
    def kv_tiles(self) -> int:
        """KV tiles of one head."""
        return cdiv(self.keys, self.tile_rows)

    @property
    def sorted(self) -> bool:
        """Whether `Extra.work` lists the tiles."""
        return self.dynamic and not self.lists and self.config.by_sequence > 0

    @property
    def ragged_keys(self) -> bool:
        """Whether the last KV tile hangs over the end."""
        return self.keys % self.tile_rows != 0

    @property
    def masked_low(self) -> bool:
        """Whether query tiles at the low end of a range may need a mask."""
        always = self.dynamic or self.lists or self.mask is not None
        return always or self.ragged_keys or self.band.right is not None

    @property
    def masked_high(self) -> bool:
        """Whether query tiles at the high end of a range may need a mask."""
        return not self.lists and (self.dynamic or self.band.left is not None)


def head_group(p: Problem) -> int:
    """(batch, KV head) pairs whose tiles run together, so that Q, dO and dQ stay in L2."""
    pairs = p.batch * p.kv_heads
    per_pair = p.queries * p.group * (2 * (p.head_dim + p.head_dim_v) + 4 * p.head_dim)
    most = max(1, (32 << 20) // per_pair)
    return max(x for x in range(1, pairs + 1) if pairs % x == 0 and x <= most)


def decode(p: Problem, t, refs: Any = None):
    """Flat tile number to (batch, KV head, KV tile of this CTA); causal starts with the longest."""
    if p.sorted:
        work, size = refs.extra.work, math.gcd(p.kv_heads, p.config.by_sequence)
        group, r = div(t, size * work.shape[0]), rem(t, size * work.shape[0])
        item = div(r, size)
        at = work[item, 0]
        return div(at, p.kv_tiles), group * size + rem(r, size), rem(at, p.kv_tiles)
    if not p.dynamic and p.band.right is not None and p.band.left is None:
        size = head_group(p)
        group, r = div(t, size * p.kv_tiles), rem(t, size * p.kv_tiles)
        kv_tile, pair = div(r, size), group * size + rem(r, size)
    else:
        pair, kv_tile = div(t, p.kv_tiles), rem(t, p.kv_tiles)
    return div(pair, p.kv_heads), rem(pair, p.kv_heads), kv_tile


def query_ranges(p: Problem, refs: Any, b, kv_tile):
    """Query tiles that a KV tile meets: `(first, end, full_first, full_end)`, as in the forward."""
    bq, bk = p.config.block_q, p.tile_rows
    if p.dynamic:
        any_lo, any_hi, all_lo, all_hi = (refs.extra.ranges[b, kv_tile, i] for i in range(4))
    else:
        base = kv_tile * bk
        last = lax.min(base + (bk - 1), jnp.int32(p.keys - 1))
        zero, queries, band = jnp.int32(0), jnp.int32(p.queries), p.band
        any_lo = all_lo = zero
        any_hi = all_hi = queries
        if band.right is not None:
            any_lo = lax.max(base - (band.offset + band.right), zero)
            all_lo = lax.max(last - (band.offset + band.right), zero)
        if band.left is not None:
            reach = band.left - band.offset + 1
            clip = lambda x: lax.max(lax.min(x + reach, queries), zero)
            any_hi, all_hi = clip(last), clip(base)
        if p.ragged_keys:  # rows past the end are masked in every query tile
            all_hi = jnp.where(base + bk > p.keys, 0, all_hi)
    some = any_lo < any_hi
    first = jnp.where(some, div(any_lo, bq), 0)
    end = jnp.where(some, div(any_hi + (bq - 1), bq), 0)
    full_first = lax.min(div(all_lo + (bq - 1), bq), end)
    # a query tile that hangs over the end needs no mask: its missing rows have P = 0 by their lse
    all_hi = jnp.where(all_hi >= p.queries, end * bq, all_hi)
    full_end = lax.min(div(all_hi, bq), end)
    if not p.masked_high:
        # nothing but the low loop masks, so it takes the tiles that have no unmasked part at all
        full_first = jnp.where(full_end <= full_first, end, full_first)
        full_end = end
    if p.mask is not None:  # every tile takes the mask_mod
        full_first = full_end = end
    return first, end, full_first, lax.max(full_end, full_first)


def work_table(p: Problem, ranges) -> Any:
    """`Extra.work` by sequences, the longest walk first; ranges is `Extra.ranges`.

    A tile belongs to the sequence that its last query ends.  Its row has one number for batch and
    KV tile: what is loaded takes a register as long as it is needed.
    """
    bq = p.config.block_q
    any_lo, any_hi = ranges[..., 0], ranges[..., 1]
    steps = jnp.where(any_lo < any_hi, (any_hi + (bq - 1)) // bq - any_lo // bq, 0)
    same = any_hi[:, :, None] == any_hi[:, None]
    table = common.sorted_tiles(jnp.where(same, steps[:, None], 0).max(-1), [])
    return table[:, :1] * p.kv_tiles + table[:, 1:]


def walk(p: Problem, refs: Any, b, head, kv_tile):
    """The query tiles of one head, as `query_ranges`, or as positions in its list."""
    if not p.lists:
        return query_ranges(p, refs, b, kv_tile)
    counts = refs.extra.counts
    at = (*at_index(counts, b, head), kv_tile)
    partial, total = counts[(*at, 0)], counts[(*at, 1)]
    return jnp.int32(0), total, partial, total


def query_tile(p: Problem, refs: Any, b, head, kv_tile, i):
    """The number of the query tile that step i of a walk visits."""
    if not p.lists:
        return i
    order = refs.extra.order
    return order[(*at_index(order, b, head), kv_tile, i)]
