"""The work list of a ragged call, built on the device from the lengths: no host sync.

A *query tile* is up to `q_tokens` consecutive tokens of one row; with one KV head it is a
*segment*, whose keys lie in `count` consecutive tiles of `key_tile` keys.  All segments' tiles form
one flat sequence (query tile slowest, then KV head, then key tile) of which every CTA takes an
equal contiguous *share*; a segment cut by a border leaves partial results that are merged.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .geometry import Geometry

# columns of WorkList.tiles
FIRST_TOKEN, NUM_TOKENS, POSITION, KEY_TILE, COUNT, CONTEXT, ROW, NEXT = range(8)
# columns of WorkList.shares; from FACTS on, the row of `tiles` that TILE names
LENGTH, TILE, HEAD, OFFSET, MERGE_FROM = range(5)
FACTS = 8


class WorkList(NamedTuple):
    """Depends on lengths only: one work list serves every layer of a step."""

    tiles: jax.Array  # [U, 8] i32, the query tiles; COUNT = 0: nothing to attend to
    shares: jax.Array  # [ctas, 16] i32
    dead: jax.Array  # [T] i32, 1 = no row owns the token or it sees no key: its output is zero


def _exclusive_cumsum(x: jax.Array) -> jax.Array:
    """Sum of the entries before each one; for short x one fused reduction, not a scan's kernels."""
    if x.shape[0] > 2048:
        return jnp.cumsum(x, dtype=jnp.int32) - x
    index = jnp.arange(x.shape[0], dtype=jnp.int32)
    before = index[None, :] < index[:, None]
    return jnp.sum(jnp.where(before, x[None, :], 0), axis=1, dtype=jnp.int32)


def _next_nonempty(count: jax.Array) -> jax.Array:
    """For every entry the index of the first later one with a count (the last index if none)."""
    index = jnp.arange(count.shape[0], dtype=jnp.int32)
    index = jnp.where(count > 0, index, count.shape[0] - 1)
    later = jnp.concatenate([index[1:], index[-1:]])
    return lax.cummin(later, reverse=True)


def query_tiles(
    context_lens: jax.Array,
    q_indptr: jax.Array,
    geom: Geometry,
    *,
    key_tile: int,
    window: int | None,
    min_tokens: int = 0,
    max_tokens: int | None = None,
    first: jax.Array | None = None,
    whole: bool = False,
) -> jax.Array:
    """The query tiles `[U, 8]` of the rows that own `min_tokens < n <= max_tokens` tokens.

    Query i of row r stands at position `context_lens[r] - n_r + i` and sees the keys at or before
    its position, with a window only the last `window` of them.  `whole`: a query may see any key
    of its row.  `first` `[R]`: keys before it are left out.
    """
    n = jnp.diff(q_indptr.astype(jnp.int32))
    if min_tokens:
        n = jnp.where(n > min_tokens, n, 0)
    if max_tokens is not None:
        n = jnp.where(n <= max_tokens, n, 0)
    step, num = geom.q_tokens, geom.num_q_tiles
    if num == geom.num_rows:
        row = jnp.arange(num, dtype=jnp.int32)
        offset = jnp.zeros((num,), jnp.int32)
    else:
        per_row = (n + (step - 1)) // step
        base = _exclusive_cumsum(per_row)
        index = jnp.arange(num, dtype=jnp.int32)
        row = jnp.searchsorted(base + per_row, index, side="right", method="compare_all")
        row = row.astype(jnp.int32)
        offset = jnp.where(row < geom.num_rows, index, 0)
        row = jnp.minimum(row, geom.num_rows - 1)
        offset = jnp.where(index < jnp.sum(per_row), (offset - base[row]) * step, n[row])
    context = context_lens.astype(jnp.int32)[row]
    position = context - n[row] + offset
    tokens = jnp.clip(n[row] - offset, 0, step)
    first_key = jnp.maximum(position - window + 1, 0) if window else jnp.zeros_like(position)
    last_key = context - 1 if whole else position + tokens - 1
    if first is not None:
        first_key = jnp.maximum(first_key, first.astype(jnp.int32)[row])
    first_tile = first_key // key_tile
    some = (tokens > 0) & (last_key >= (0 if first is None else first_key))
    count = jnp.where(some, last_key // key_tile + 1 - first_tile, 0)
    first_token = q_indptr.astype(jnp.int32)[row] + offset
    after = _next_nonempty(count)
    columns = (first_token, tokens, position, first_tile, count, context, row, after)
    return jnp.stack(columns, axis=1)


def dead_tokens(
    context_lens: jax.Array,
    q_indptr: jax.Array,
    num_tokens: int,
    first: jax.Array | None = None,
    whole: bool = False,
) -> jax.Array:
    """`[T]` i32: 1 for the tokens that no row owns and for those whose query tile sees no key.

    >>> dead_tokens(jnp.array([3, 0]), jnp.array([0, 1, 2]), 3).tolist()
    [0, 1, 1]
    """
    indptr = q_indptr.astype(jnp.int32)
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    row = jnp.sum(indptr[None, 1:] <= token[:, None], axis=1, dtype=jnp.int32)
    owned = row < context_lens.shape[0]
    row = jnp.minimum(row, context_lens.shape[0] - 1)
    context = context_lens.astype(jnp.int32)[row]
    last_key = context - 1 if whole else context - (indptr[row + 1] - token)
    first_key = jnp.zeros_like(row) if first is None else first.astype(jnp.int32)[row]
    return jnp.logical_not(owned & (last_key >= first_key)).astype(jnp.int32)


def shares(tiles: jax.Array, kv_heads: int, *, ctas: int) -> jax.Array:
    """Equal contiguous parts of the flat sequence of key tiles, one per CTA.

    MERGE_FROM is, for a share that ends a segment which earlier shares began, the first of them;
    else -1.  Lengths differ by at most one key tile.

    >>> t = jnp.zeros((2, 8), jnp.int32).at[:, COUNT].set(jnp.array([5, 1]))
    >>> shares(t, 1, ctas=3)[:, :5].tolist()
    [[2, 0, 0, 0, -1], [2, 0, 0, 2, -1], [2, 0, 0, 4, 0]]
    """
    count = tiles[:, COUNT]
    base = _exclusive_cumsum(count * kv_heads)
    end = base + count * kv_heads
    total = end[-1]
    each, more = total // ctas, total % ctas
    cta = jnp.arange(ctas, dtype=jnp.int32)
    start = cta * each + jnp.minimum(cta, more)
    length = each + (cta < more).astype(jnp.int32)

    def owner(flat):
        """Whose share holds flat tile `flat`."""
        large = more * (each + 1)
        in_small = more + (flat - large) // jnp.maximum(each, 1)
        return jnp.where(flat < large, flat // (each + 1), in_small)

    tile = jnp.sum(end[None, :] <= start[:, None], axis=1, dtype=jnp.int32)
    tile = jnp.minimum(tile, tiles.shape[0] - 1)
    within = start - base[tile]
    per_head = jnp.maximum(count[tile], 1)
    head = within // per_head
    offset = within - head * per_head
    ends_it = (length > 0) & (offset > 0) & (per_head - offset <= length)
    merge_from = jnp.where(ends_it, owner(start - offset), -1)
    zero = jnp.zeros_like(start)
    own = jnp.stack((length, tile, head, offset, merge_from, zero, zero, zero), axis=1)
    return jnp.concatenate((own, tiles[tile]), axis=1)  # one read tells a CTA how to begin


def whole_shares(tiles: jax.Array, kv_heads: int, *, ctas: int) -> jax.Array:
    """As `shares`, every border moved to the nearest border of a segment: nothing is left to merge.

    A share is longer than an equal one by the tiles of one segment at most.

    >>> t = jnp.zeros((2, 8), jnp.int32).at[:, COUNT].set(jnp.array([2, 5])).at[0, NEXT].set(1)
    >>> whole_shares(t, 2, ctas=3)[:, :5].tolist()
    [[4, 0, 0, 0, -1], [5, 1, 0, 0, -1], [5, 1, 1, 0, -1]]
    """
    count = tiles[:, COUNT]
    base = _exclusive_cumsum(count * kv_heads)
    end = base + count * kv_heads
    total = end[-1]
    cta = jnp.arange(ctas + 1, dtype=jnp.int32)
    start = total // ctas * cta + total % ctas * cta // ctas
    tile = jnp.sum(end[None, :] <= start[:, None], axis=1, dtype=jnp.int32)
    tile = jnp.minimum(tile, tiles.shape[0] - 1)
    each = jnp.maximum(count[tile], 1)
    head = (start - base[tile] + each // 2) // each
    start = jnp.where(cta < ctas, base[tile] + head * each, total)
    wrap = head == kv_heads
    tile, head = jnp.where(wrap, tiles[tile, NEXT], tile)[:-1], jnp.where(wrap, 0, head)[:-1]
    zero = jnp.zeros_like(tile)
    own = (jnp.diff(start), tile, head, zero, zero - 1, zero, zero, zero)
    return jnp.concatenate((jnp.stack(own, axis=1), tiles[tile]), axis=1)


def fixed_shares(tiles: jax.Array, kv_heads: int, *, chunk: int, ctas: int) -> jax.Array:
    """One share per chunk of `chunk` key tiles of a segment, cut at multiples of `chunk`.

    What a share holds depends on its own row alone.  `ctas` bounds the number of chunks.

    >>> t = jnp.zeros((2, 8), jnp.int32).at[:, COUNT].set(jnp.array([5, 1]))
    >>> fixed_shares(t, 1, chunk=2, ctas=5)[:, :5].tolist()
    [[2, 0, 0, 0, -1], [2, 0, 0, 2, -1], [1, 0, 0, 4, 0], [1, 1, 0, 0, -1], [0, 1, 0, 0, -1]]
    """
    count, skipped = tiles[:, COUNT], tiles[:, KEY_TILE] // chunk
    last = tiles[:, KEY_TILE] + count - 1
    chunks = jnp.where(count > 0, last // chunk + 1 - skipped, 0)
    base = _exclusive_cumsum(chunks * kv_heads)
    end = base + chunks * kv_heads
    cta = jnp.arange(ctas, dtype=jnp.int32)
    tile = jnp.sum(end[None, :] <= cta[:, None], axis=1, dtype=jnp.int32)
    busy = tile < tiles.shape[0]
    tile = jnp.minimum(tile, tiles.shape[0] - 1)
    within = jnp.where(busy, cta - base[tile], 0)
    per_head = jnp.maximum(chunks[tile], 1)
    head, index = within // per_head, within % per_head
    first = tiles[tile, KEY_TILE]
    begin = jnp.maximum((skipped[tile] + index) * chunk, first)
    stop = jnp.minimum((skipped[tile] + index + 1) * chunk, last[tile] + 1)
    length = jnp.where(busy, stop - begin, 0)
    ends_it = busy & (index > 0) & (index == per_head - 1)
    merge_from = jnp.where(ends_it, cta - index, -1)
    zero = jnp.zeros_like(cta)
    own = (length, tile, head, jnp.where(busy, begin - first, 0), merge_from, zero, zero, zero)
    return jnp.concatenate((jnp.stack(own, axis=1), tiles[tile]), axis=1)


def make_work_list(
    context_lens: jax.Array,
    q_indptr: jax.Array,
    geom: Geometry,
    *,
    key_tile: int,
    ctas: int,
    window: int | None = None,
    max_tokens: int | None = None,
    chunk: int | None = None,
    first: jax.Array | None = None,
    whole: bool = False,
    uncut: bool = False,
) -> WorkList:
    """The work list of the split-KV kernel; equal calls in one program are merged by XLA.

    Shares are equal, with `uncut` as equal as whole segments are, with `chunk` (keys) at fixed
    positions of every row.
    """
    with jax.named_scope("paged_attention.work_list"):
        tiles = query_tiles(
            context_lens,
            q_indptr,
            geom,
            key_tile=key_tile,
            window=window,
            max_tokens=max_tokens,
            first=first,
            whole=whole,
        )
        if uncut:
            parts = whole_shares(tiles, geom.num_kv_heads, ctas=ctas)
        elif chunk is None:
            parts = shares(tiles, geom.num_kv_heads, ctas=ctas)
        else:
            parts = fixed_shares(tiles, geom.num_kv_heads, chunk=chunk // key_tile, ctas=ctas)
        return WorkList(
            tiles,
            parts,
            dead_tokens(context_lens, q_indptr, geom.num_tokens, first, whole),
        )
