"""Queries that stand anywhere: explicit positions, trees and parts of a row's keys.

The kernels place query i of a row at `context - n + i` and mask by comparing positions.  Where that
does not hold, every query column brings its position, and every new key of the row (from `old` on)
its own and one bit per query token of the tile: whether it is seen.  Keys before `old` are seen by
all, as far as a window reaches.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import worklist as wl
from .geometry import Geometry

ALL = -1  # i32 with every bit set


class Explicit(NamedTuple):
    """What a call brings for its query tiles u and rows r."""

    query_positions: jax.Array  # [U, cols] i32
    new_keys: jax.Array  # [U, 1 + words, tile + max_q + tile] i32: position - index, then bits
    old: jax.Array  # [R] i32, first new key of a row
    first: Any = None  # [R] i32, first key of a row that this call reads


def pack_new_keys(
    tiles: jax.Array,
    context_lens: jax.Array,
    q_indptr: jax.Array,
    geom: Geometry,
    key_tile: int,
    *,
    positions: jax.Array | None,
    tree_mask: jax.Array | None,
    first: jax.Array | None = None,
) -> Explicit:
    """`Explicit` of the query tiles `[U, 8]`: causal without a `tree_mask` u32 `[T, words]`.

    Entry x of `new_keys` is the row's new key `x - key_tile`: before are old keys, seen by all,
    after the row's last are none.
    """
    t, per, most = geom.num_tokens, geom.q_tokens, geom.max_q
    row, begin = tiles[:, wl.ROW], tiles[:, wl.FIRST_TOKEN]
    start = q_indptr.astype(jnp.int32)[:-1]
    count = jnp.diff(q_indptr.astype(jnp.int32))
    old = context_lens.astype(jnp.int32) - count
    token = jnp.clip(begin[:, None] + jnp.arange(per, dtype=jnp.int32)[None], 0, t - 1)  # [U, per]
    stands = (
        (old - start)[row][:, None] + token
        if positions is None
        else positions.astype(jnp.int32)[token]
    )
    j = jnp.arange(most, dtype=jnp.int32)[None]  # [1, max_q]
    is_new = j < count[row][:, None]
    moved = jnp.zeros((row.shape[0], most), jnp.int32)
    if positions is not None:
        at = jnp.clip(start[row][:, None] + j, 0, t - 1)
        moved = jnp.where(is_new, positions.astype(jnp.int32)[at] - old[row][:, None] - j, 0)
    if tree_mask is None:
        seen = j[:, None] <= (token - start[row][:, None])[:, :, None]  # [U, per, max_q]
    else:
        word = jnp.minimum(j[0] // 32, tree_mask.shape[1] - 1)
        seen = (tree_mask[token][:, :, word] >> (j % 32).astype(jnp.uint32)[None]) & 1
        seen = (seen == 1) & (j[:, None] < 32 * tree_mask.shape[1])
    seen = seen & is_new[:, None]
    parts = [moved]
    for low in range(0, per, 32):
        bit = jnp.uint32(1) << jnp.arange(min(32, per - low), dtype=jnp.uint32)
        bits = jnp.where(seen[:, low : low + 32], bit[None, :, None], jnp.uint32(0))
        parts.append(lax.bitcast_convert_type(jnp.sum(bits, axis=1, dtype=jnp.uint32), jnp.int32))
    new_keys = jnp.stack(parts, axis=1)
    before = jnp.full((row.shape[0], len(parts), key_tile), ALL, jnp.int32).at[:, 0].set(0)
    after = jnp.zeros((row.shape[0], len(parts), key_tile), jnp.int32)
    new_keys = jnp.concatenate([before, new_keys, after], axis=2)
    return Explicit(_columns(stands, geom), new_keys, old, first)


def pack_old_keys(
    tiles: jax.Array, context_lens: jax.Array, geom: Geometry, key_tile: int, positions: jax.Array
) -> Explicit:
    """`Explicit` of query tiles that see every key of their row: the queries of a shared prefix."""
    index = tiles[:, wl.FIRST_TOKEN, None] + jnp.arange(geom.q_tokens, dtype=jnp.int32)[None]
    columns = _columns(positions[jnp.clip(index, 0, geom.num_tokens - 1)], geom)
    words = 1 + -(-geom.q_tokens // 32)
    seen = jnp.full((tiles.shape[0], words, key_tile), ALL, jnp.int32).at[:, 0].set(0)
    new_keys = jnp.concatenate([seen, jnp.zeros_like(seen)], axis=2)
    return Explicit(columns, new_keys, context_lens.astype(jnp.int32))


def _columns(stands: jax.Array, geom: Geometry) -> jax.Array:
    """Positions of tokens `[U, q_tokens]` as those of their columns `[U, cols]`."""
    if geom.q_tokens == 1:  # a group may lie in any of the columns (`Geometry.packed`)
        return jnp.repeat(stands, geom.cols, axis=1)
    columns = jnp.repeat(stands, geom.group, axis=1)
    return jnp.pad(columns, ((0, 0), (0, geom.cols - columns.shape[1])))
