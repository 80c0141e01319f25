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


def dynamic_bounds(
    band: Band,
    num_queries: int,
    num_keys: int,
    *,
    q_lens: jax.Array | None = None,
    kv_lens: jax.Array | None = None,
    segments: tuple[jax.Array, jax.Array] | None = None,
    borders: tuple[jax.Array, jax.Array] | None = None,
    positions: jax.Array | None = None,
) -> Bounds:
    """The intervals of what only the device knows; a leading `b` below is 1 or the batch.

    Args:
      band: the static part; its offset is not used where `positions` are given.
      num_queries: T.
      num_keys: S.
      q_lens: `[b]`, queries from there on see nothing.
      kv_lens: `[b]`, keys from there on are seen by nothing.
      segments: ids `[b, T]` and `[b, S]`, ascending; a query sees keys of its own id.  Negative ids
        may follow at the end: they match nothing.
      borders: `cu_seqlens` of queries and keys `[b, sequences + 1]` where there are any; taken
        before `segments`, since a short search is cheaper than one over all tokens.
      positions: `[b, T]`, where each query stands on the keys' axis; consecutive queries of a
        segment stand at consecutive positions.

    >>> b = dynamic_bounds(Band(right=0), 4, 4, kv_lens=jnp.array([2]))
    >>> b.key_hi.tolist(), b.query_hi.tolist()
    ([[1, 2, 2, 2]], [[4, 4, 0, 0]])
    >>> ids = jnp.array([[0, 0, 1, -1]])
    >>> dynamic_bounds(Band(right=0), 4, 4, segments=(ids, ids)).key_lo.tolist()
    [[0, 0, 2, 3]]
    """
    t = jnp.arange(num_queries, dtype=jnp.int32)[None]
    s = jnp.arange(num_keys, dtype=jnp.int32)[None]
    key_lo, key_hi = jnp.zeros_like(t), jnp.full_like(t, num_keys)
    query_lo, query_hi = jnp.zeros_like(s), jnp.full_like(s, num_queries)
    if borders is not None:
        key_lo, key_hi = _between(borders[0], borders[1], num_queries)
        query_lo, query_hi = _between(borders[1], borders[0], num_keys)
    elif segments is not None:
        # two different ids past all others, so that the tails stay sorted and match nothing
        q_ids = jnp.where(segments[0] < 0, FAR, segments[0])
        kv_ids = jnp.where(segments[1] < 0, FAR + 1, segments[1])
        key_lo, key_hi = _search(kv_ids, q_ids)
        query_lo, query_hi = _search(q_ids, kv_ids)
    if positions is None:
        at, shift = t + band.offset, jnp.full_like(s, band.offset)
    else:
        at = positions.astype(jnp.int32)
        # position - index of the first query of this key's segment, and so of all of them
        start = jnp.minimum(query_lo, num_queries - 1)
        start = jnp.broadcast_to(start, (at.shape[0], num_keys)) if start.shape[0] == 1 else start
        source = jnp.broadcast_to(at, (start.shape[0], num_queries))
        shift = jnp.take_along_axis(source, start, axis=1) - start
    if band.left is not None:
        key_lo = jnp.maximum(key_lo, at - band.left)
        query_hi = jnp.minimum(query_hi, s - shift + (band.left + 1))
    if band.right is not None:
        key_hi = jnp.minimum(key_hi, at + (band.right + 1))
        query_lo = jnp.maximum(query_lo, s - shift - band.right)
    if kv_lens is not None:
        key_hi = jnp.minimum(key_hi, kv_lens[:, None])
        query_hi = jnp.where(s < kv_lens[:, None], query_hi, 0)
    if q_lens is not None:
        query_hi = jnp.minimum(query_hi, q_lens[:, None])
        key_hi = jnp.where(t < q_lens[:, None], key_hi, 0)
    bounds = [jnp.maximum(x, 0) for x in (key_lo, key_hi, query_lo, query_hi)]
    batch = max(x.shape[0] for x in bounds)
    return Bounds(*(jnp.broadcast_to(x, (batch, x.shape[1])).astype(jnp.int32) for x in bounds))


def _between(own: jax.Array, other: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """`(lo, hi)` of the other side's tokens of the sequence that each token belongs to."""
    at = jnp.arange(length, dtype=jnp.int32)
    method = "compare_all" if own.shape[1] <= 1024 else "scan_unrolled"

    def one(own, other):
        number = jnp.searchsorted(own, at, side="right", method=method).astype(jnp.int32) - 1
        inside = (at >= own[0]) & (at < own[-1])
        number = jnp.clip(number, 0, own.shape[0] - 2)
        return jnp.where(inside, other[number], 0), jnp.where(inside, other[number + 1], 0)

    own, other = (x.astype(jnp.int32) for x in (own, other))
    lo, hi = jax.vmap(one)(own, other)
    return lo, hi


def _search(ids: jax.Array, wanted: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`(lo, hi)` per wanted id: where it stands in the sorted ids."""
    batch = max(ids.shape[0], wanted.shape[0])
    ids, wanted = (jnp.broadcast_to(x, (batch, x.shape[1])) for x in (ids, wanted))
    find = lambda side: jax.vmap(
        lambda a, w: jnp.searchsorted(a, w, side=side, method="scan_unrolled").astype(jnp.int32)
    )(ids, wanted)
    return find("left"), find("right")


def packed_segments(cu: jax.Array, length: int, outside: int = -1) -> jax.Array:
    """[1, length] segment ids of `cu_seqlens`: sequence i owns the tokens `cu[i]:cu[i+1]`.

    >>> packed_segments(jnp.array([0, 2, 2, 3]), 4).tolist()
    [[0, 0, 2, -1]]
    """
    at = jnp.arange(length, dtype=cu.dtype)
    ids = jnp.searchsorted(cu, at, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    return jnp.where((at >= cu[0]) & (at < cu[-1]), ids, outside)[None]


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


class BlockKinds(NamedTuple):
    """A block mask over tiles of the caller's size; 0 empty, 1 partial, 2 full."""

    kinds: jax.Array  # [b, n, T tiles, S tiles] i8
    block_q: int
    block_kv: int
    queries: int
    keys: int


def _regrid(kinds: jax.Array, axis: int, size: int, length: int, tile: int) -> jax.Array:
    """Tiles of `size` along an axis to tiles of `tile`: the least and the most of what they meet.

    Returns [2, ...]: minimum and maximum of the kinds that a new tile touches.
    """
    if size == tile:
        return jnp.stack([kinds, kinds])
    first = jnp.arange(-(-length // tile)) * tile
    last = jnp.minimum(first + tile, length) - 1
    most = (tile - 1) // size + 2
    index = jnp.minimum(first[:, None] // size + jnp.arange(most)[None], last[:, None] // size)
    met = jnp.moveaxis(jnp.take(kinds, index, axis=axis, mode="clip"), axis + 1, 0)
    return jnp.stack([met.min(0), met.max(0)])


def _bounded(
    band: Band, bounds: Bounds | None, T: int, S: int, tile_q: int, tile_kv: int
) -> tuple[jax.Array, jax.Array]:
    """[B or 1, T tiles, S tiles] bool: of which some row sees a key; which all rows see whole."""
    if bounds is None:
        lo, hi = band.key_bounds(jnp.arange(T, dtype=jnp.int32)[None], S)
    else:
        lo, hi = bounds.key_lo, bounds.key_hi
    rows = pad_rows(lo, hi, tile_q)
    seen = full = tile_ranges(rows, tile_q)
    if T % tile_q:  # rows past the end need no mask of their own: nothing of them is kept
        beyond = jnp.arange(rows.shape[2]) >= T
        inside = rows.at[:, 0].set(jnp.where(beyond, 0, rows[:, 0]))
        inside = inside.at[:, 1].set(jnp.where(beyond, FAR, rows[:, 1]))
        full = tile_ranges(inside, tile_q)
    any_lo, any_hi = (seen[:, :, i, None] for i in (0, 1))
    all_lo, all_hi = (full[:, :, i, None] for i in (2, 3))
    first = jnp.arange(-(-S // tile_kv), dtype=jnp.int32)[None, None] * tile_kv
    met = (first < any_hi) & (first + tile_kv > any_lo)
    return met, (first >= all_lo) & (first + tile_kv <= all_hi)


def block_lists(
    blocks: BlockKinds, band: Band, bounds: Bounds | None, tile_q: int, tile_kv: int, *,
    by_query: bool,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """What each tile visits: `(order [b, n, tiles, blocks], counts [b, n, tiles, 2])` i32.

    The block mask is brought to the kernel's tiles and joined with the band or the bounds.  Blocks
    that need a mask come first, counts are (those, all); `by_query` lists key blocks of query
    tiles, otherwise query blocks of key tiles.

    >>> kinds = jnp.array([[[[2, 0], [1, 2]]]], jnp.int8)
    >>> mask = BlockKinds(kinds, 64, 64, 128, 128)
    >>> order, counts = block_lists(mask, Band(), None, 64, 64, by_query=True)
    >>> order[0, 0, 1].tolist(), counts[0, 0].tolist()
    ([0, 1], [[0, 1], [1, 2]])
    """
    T, S = blocks.queries, blocks.keys
    low, high = _regrid(blocks.kinds, 2, blocks.block_q, T, tile_q)
    low = _regrid(low, 3, blocks.block_kv, S, tile_kv)[0]
    high = _regrid(high, 3, blocks.block_kv, S, tile_kv)[1]
    some, every = high > 0, low == 2
    if bounds is not None or not band.unbounded or S % tile_kv:
        met, inside = _bounded(band, bounds, T, S, tile_q, tile_kv)
        some, every = some & met[:, None], every & inside[:, None]
    kinds = jnp.where(some, 1 + every.astype(jnp.int32), 0)
    if not by_query:
        kinds = kinds.swapaxes(2, 3)
    order = jnp.argsort(jnp.where(kinds == 0, 3, kinds), axis=-1, stable=True).astype(jnp.int32)
    which = jnp.arange(2)[:, None]  # one reduction for both
    counts = jnp.where(which == 0, kinds[..., None, :] == 1, kinds[..., None, :] > 0).sum(-1)
    return order, counts.astype(jnp.int32)


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
