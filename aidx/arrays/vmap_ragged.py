"""Rows of a `Ragged` under `vmap`: buckets of like length out, packed rows in again.

A row of length l runs padded to the next power of two, together with the other rows of that bucket,
whose number is filled up to a power of two as well: work is at most a few times that of the
values, and log(R) log(L) programs are compiled whatever the lengths.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .formats import Array
from .ragged_array import Ragged, _offsets_of_lengths


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Rows that run together: their numbers (None: all, in order) and how many are real.

    `lengths` is the padded length of each ragged argument.
    """

    rows: np.ndarray | None
    count: int
    lengths: tuple[int, ...]


def buckets_of(arrays: Sequence[Ragged], max_length: int | None, traced: bool) -> list[Bucket]:
    """The buckets of rows of arrays that are mapped together; one for all when lengths are traced.

    >>> x = Ragged.from_list([[1], [1, 2, 3], [1], [1]])
    >>> [(b.rows.tolist(), b.count, b.lengths) for b in buckets_of([x], None, False)]
    [([0, 2, 3, 3], 3, (1,)), ([1], 1, (4,))]
    """
    if traced:
        assert max_length is not None
        return [Bucket(None, arrays[0].num_rows, (max_length,) * len(arrays))]
    lengths = np.stack([np.diff(np.asarray(x.offsets)) for x in arrays])
    if max_length is not None:
        lengths = np.minimum(lengths, max_length)
    padded = np.vectorize(_power_of_two, otypes=[np.int64])(lengths) if lengths.size else lengths
    keys, place = np.unique(padded, axis=1, return_inverse=True)
    out = []
    for i in range(keys.shape[1]):
        rows = np.flatnonzero(place.ravel() == i)
        filled = np.pad(rows, (0, _power_of_two(len(rows)) - len(rows)), mode="edge")
        out.append(Bucket(filled, len(rows), tuple(int(n) for n in keys[:, i])))
    return out


def rows_as_stack(x: Ragged, rows: np.ndarray | None, length: int) -> Ragged:
    """Rows of x as a stack of one-row arrays of capacity `length`.

    >>> rows_as_stack(Ragged.from_list([[1], [2, 3]]), np.array([1]), 4).values.tolist()
    [[2, 3, 0, 0]]
    """
    starts, lengths = x.row_starts, x.row_lengths
    if rows is not None:
        starts, lengths = starts[rows], lengths[rows]
    lengths = jnp.minimum(lengths, length)
    place = jnp.arange(length, dtype=jnp.int32)[None, :]
    inside = place < lengths[:, None]
    values = x.values.at[starts[:, None] + place].get(mode="clip")
    inside = inside.reshape(*inside.shape, *(1,) * (values.ndim - 2))
    values = jnp.where(inside, values, jnp.zeros((), values.dtype))
    return Ragged(values, jnp.stack([jnp.zeros_like(lengths), lengths], axis=1))


def merge_outputs(buckets: Sequence[Bucket], outputs: Sequence[Any], like: Ragged) -> Any:
    """What the buckets gave, in the order of the rows: arrays stacked, one-row `Ragged`s packed."""
    if not buckets:
        raise ValueError("a Ragged of no rows has nothing to map")
    is_row = lambda x: isinstance(x, Ragged)
    units = [jax.tree.leaves(out, is_leaf=is_row) for out in outputs]
    tree = jax.tree.structure(outputs[0], is_leaf=is_row)
    merged = [_merge(buckets, parts, like) for parts in zip(*units, strict=True)]
    return jax.tree.unflatten(tree, merged)


def _merge(buckets: Sequence[Bucket], parts: Sequence[Any], like: Ragged) -> Any:
    if isinstance(parts[0], Ragged):
        return _pack(buckets, parts, like)
    if buckets[0].rows is None:
        return parts[0]
    joined = jnp.concatenate([p[: b.count] for b, p in zip(buckets, parts, strict=True)])
    order = np.concatenate([b.rows[: b.count] for b in buckets if b.rows is not None])
    return joined[np.argsort(order)]


def _pack(buckets: Sequence[Bucket], parts: Sequence[Ragged], like: Ragged) -> Ragged:
    """Stacks of one-row arrays as one array; its capacity is that of `like` where that holds."""
    for part in parts:
        if part.offsets.shape[-1] != 2 or isinstance(part.values, Ragged):
            raise ValueError("a mapped function returns dense arrays or a Ragged of one row")
    R = sum(b.count for b in buckets)
    lengths = jnp.zeros(R, jnp.int32)
    rows = [np.arange(b.count) if b.rows is None else b.rows[: b.count] for b in buckets]
    for row, bucket, part in zip(rows, buckets, parts, strict=True):
        lengths = lengths.at[row].set(part.offsets[: bucket.count, 1])
    offsets = _offsets_of_lengths(lengths)
    capacity = like.capacity
    if not isinstance(offsets, Tracer):
        capacity = max(capacity, int(offsets[-1]))
    offsets = jnp.minimum(offsets, capacity)
    values: Array = jnp.zeros((capacity, *parts[0].values.shape[2:]), parts[0].dtype)
    for row, bucket, part in zip(rows, buckets, parts, strict=True):
        place = jnp.arange(part.values.shape[1], dtype=jnp.int32)[None, :]
        inside = place < lengths[row][:, None]
        target = jnp.where(inside, offsets[row][:, None] + place, capacity)
        values = values.at[target].set(part.values[: bucket.count], mode="drop")
    return Ragged(values, offsets)


def _power_of_two(n: int) -> int:
    return 1 << max(0, int(n) - 1).bit_length()
