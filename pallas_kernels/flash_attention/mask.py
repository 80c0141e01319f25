"""Which keys a query sees, as an interval.

Every structural mask here (causal, window, lengths, packed sequences) lets query t see the keys
`key_lo(t) <= s < key_hi(t)`, and key s be seen by the queries `query_lo(s) <= t < query_hi(s)`.
A kernel then needs two comparisons per score and only on the blocks that a border crosses; the
blocks outside the interval are never visited, in either pass.

`Band` is the part known when the program is traced.  `Bounds` holds arrays for what only the device
knows (lengths, packed sequences); where they are given they include the band.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

TILE = 64  # rows of one warpgroup, the grain of `tile_ranges`
FAR = 1 << 30


@dataclasses.dataclass(frozen=True)
class Band:
    """Query t sees the keys `t + offset - left <= s <= t + offset + right`; None is unbounded.

    >>> Band.make(causal=True, window=(127, None), offset=0)
    Band(left=127, right=0, offset=0)
    """

    left: int | None = None
    right: int | None = None
    offset: int = 0

    @classmethod
    def make(cls, *, causal: bool, window: tuple[int | None, int | None], offset: int) -> "Band":
        """Causal is a right window of zero."""
        left, right = window
        if causal:
            right = 0 if right is None else min(right, 0)
        return cls(left, right, offset)

    @property
    def unbounded(self) -> bool:
        """Whether every query sees every key."""
        return self.left is None and self.right is None

    def key_bounds(self, t, num_keys: int):
        """`(lo, hi)`: the keys that query t sees."""
        lo = jnp.zeros_like(t) if self.left is None else jnp.maximum(t + self.offset - self.left, 0)
        hi = jnp.full_like(t, num_keys)
        if self.right is not None:
            hi = jnp.clip(t + (self.offset + self.right + 1), 0, num_keys)
        return lo, hi

    def query_bounds(self, s, num_queries: int):
        """`(lo, hi)`: the queries that see key s."""
        lo = jnp.zeros_like(s)
        if self.right is not None:
            lo = jnp.maximum(s - (self.offset + self.right), 0)
        hi = jnp.full_like(s, num_queries)
        if self.left is not None:
            hi = jnp.clip(s + (self.left - self.offset + 1), 0, num_queries)
        return lo, hi


class Bounds(NamedTuple):
    """The interval of every query and of every key; `lo >= hi` is empty."""

    key_lo: jax.Array  # [B, T] i32
    key_hi: jax.Array  # [B, T] i32
    query_lo: jax.Array  # [B, S] i32
    query_hi: jax.Array  # [B, S] i32


def lengths_bounds(
    band: Band,
    num_queries: int,
    num_keys: int,
    q_lens: jax.Array | None,
    kv_lens: jax.Array | None,
) -> Bounds:
    """Bounds of padded rows: queries from `q_lens[b]` and keys from `kv_lens[b]` on are absent.

    The band stays aligned to the padded shape (its `offset` does not follow the lengths).

    >>> b = lengths_bounds(Band(right=0), 4, 4, None, jnp.array([2]))
    >>> b.key_hi.tolist(), b.query_hi.tolist()
    ([[1, 2, 2, 2]], [[4, 4, 0, 0]])
    """
    some = q_lens if q_lens is not None else kv_lens
    if some is None:
        raise ValueError("lengths_bounds needs q_lens or kv_lens, both are None")
    batch = some.shape[0]
    n_q = jnp.full((batch, 1), num_queries, jnp.int32) if q_lens is None else q_lens[:, None]
    n_k = jnp.full((batch, 1), num_keys, jnp.int32) if kv_lens is None else kv_lens[:, None]
    t = jnp.arange(num_queries, dtype=jnp.int32)[None]
    s = jnp.arange(num_keys, dtype=jnp.int32)[None]
    key_lo, key_hi = band.key_bounds(t, num_keys)
    query_lo, query_hi = band.query_bounds(s, num_queries)
    key_hi = jnp.where(t < n_q, jnp.minimum(key_hi, n_k), 0)
    query_hi = jnp.where(s < n_k, jnp.minimum(query_hi, n_q), 0)
    key_lo, query_lo = (
        jnp.broadcast_to(x, y.shape) for x, y in ((key_lo, key_hi), (query_lo, query_hi))
    )
    return Bounds(key_lo, key_hi, query_lo, query_hi)


def packed_bounds(
    band: Band, num_queries: int, num_keys: int, cu_q: jax.Array, cu_kv: jax.Array
) -> Bounds:
    """Bounds of sequences packed one after another: sequence i owns queries `cu_q[i]:cu_q[i+1]`.

    The band is aligned inside each sequence, bottom-right: `band.offset` is added to
    `len_kv - len_q` of the sequence.  Tokens after `cu[-1]` see nothing and are seen by nothing.

    >>> cu = jnp.array([0, 2, 3])
    >>> packed_bounds(Band(right=0), 4, 4, cu, cu).key_hi.tolist()
    [[1, 2, 3, 0]]
    """

    def owner(cu, count):
        """Per token: its sequence and whether it has one."""
        at = jnp.arange(count, dtype=jnp.int32)
        seq = jnp.searchsorted(cu, at, side="right").astype(jnp.int32) - 1
        inside = (at >= cu[0]) & (at < cu[-1])
        return at, jnp.clip(seq, 0, cu.shape[0] - 2), inside

    cu_q, cu_kv = cu_q.astype(jnp.int32), cu_kv.astype(jnp.int32)
    # key position - query position of the last tokens of each sequence, in packed coordinates
    shift = cu_kv[1:] - cu_q[1:] + band.offset

    t, seq, inside = owner(cu_q, num_queries)
    lo, hi = cu_kv[seq], cu_kv[seq + 1]
    if band.left is not None:
        lo = jnp.maximum(lo, t + shift[seq] - band.left)
    if band.right is not None:
        hi = jnp.minimum(hi, t + shift[seq] + band.right + 1)
    key_lo, key_hi = lo, jnp.where(inside, jnp.maximum(hi, 0), 0)

    s, seq, inside = owner(cu_kv, num_keys)
    lo, hi = cu_q[seq], cu_q[seq + 1]
    if band.right is not None:
        lo = jnp.maximum(lo, s - shift[seq] - band.right)
    if band.left is not None:
        hi = jnp.minimum(hi, s - shift[seq] + band.left + 1)
    query_lo, query_hi = lo, jnp.where(inside, jnp.maximum(hi, 0), 0)
    return Bounds(*(x[None] for x in (key_lo, key_hi, query_lo, query_hi)))


def pad_rows(lo: jax.Array, hi: jax.Array, multiple: int) -> jax.Array:
    """[B, 2, rows] i32 with empty intervals (lo = FAR, hi = 0) where empty or past the end."""
    rows = lo.shape[1]
    empty = lo >= hi
    lo, hi = jnp.where(empty, FAR, lo), jnp.where(empty, 0, hi)
    pad = ((0, 0), (0, -rows % multiple))
    lo, hi = jnp.pad(lo, pad, constant_values=FAR), jnp.pad(hi, pad)
    return jnp.stack([lo, hi], axis=1).astype(jnp.int32)


def tile_ranges(rows: jax.Array, tile: int = TILE) -> jax.Array:
    """[B, tiles, 4] i32: what the rows of a tile see.

    Columns `[any_lo, any_hi)` are seen by some row, `[all_lo, all_hi)` by every row (so a block in
    there needs no mask).  `rows` is what `pad_rows` gives; an empty row empties the second range.
    """
    b, _, n = rows.shape
    x = rows.reshape(b, 2, n // tile, tile)
    lo, hi = x[:, 0], x[:, 1]
    return jnp.stack([lo.min(-1), hi.max(-1), lo.max(-1), hi.min(-1)], axis=-1)


def visible(band: Band, bounds: Bounds | None, num_queries: int, num_keys: int) -> jax.Array:
    """[B or 1, T, S] bool, for references and tests only: the mask written out.

    >>> visible(Band(right=0, offset=1), None, 2, 3).astype(int).tolist()
    [[[1, 1, 0], [1, 1, 1]]]
    """
    if bounds is None:
        lo, hi = band.key_bounds(jnp.arange(num_queries, dtype=jnp.int32)[None], num_keys)
    else:
        lo, hi = bounds.key_lo, bounds.key_hi
    s = jnp.arange(num_keys, dtype=jnp.int32)[None, None]
    return (s >= lo[:, :, None]) & (s < hi[:, :, None])
