"""Rearranging and reducing ragged rows, in tf.RaggedTensor's words.

Capacities are static.  A result that may need another one takes `capacity=`, counted when not given
and needed under jit, where rows that no longer fit are cut off from the end (`offsets` never pass
the capacity).
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .convert import capacity as _capacity
from .formats import Array, major_ids
from .ragged_array import Ragged, _masked, _offsets_of_lengths
from .segments import segment_max, segment_sum


def row(x: Ragged, r: int) -> Any:
    """Row r of a concrete x: an array `[length, *D]`, or a `Ragged` when x is nested.

    Raises:
      IndexError: no such row.
      TypeError: r is no integer, or x is traced (its rows have no static length).

    >>> row(Ragged.from_list([[1, 2], [3]]), 0).tolist()
    [1, 2]
    """
    r = operator.index(r)
    if not -x.num_rows <= r < x.num_rows:
        raise IndexError(f"row {r} of {x.num_rows}")
    if isinstance(x.offsets, Tracer):
        raise TypeError("the length of a row is not static under jit: map over rows instead")
    start, end = (int(n) for n in np.asarray(x.offsets)[r % x.num_rows :][:2])
    if not isinstance(x.values, Ragged):
        return x.values[start:end]
    inner = x.values
    lower, upper = (int(np.asarray(inner.offsets)[n]) for n in (start, end))
    values = inner.values
    if isinstance(values, Ragged):
        return gather(inner, jnp.arange(start, end))
    return Ragged(values[lower:upper], inner.offsets[start : end + 1] - lower)


def merge_dims(x: Ragged, outer: int = 0, inner: int = 1) -> Any:
    """Axes `outer..inner` of the virtual shape as one.

    Merging rows with their first ragged axis gives the values `[capacity, *D]` (or the next level);
    merging ragged axes removes a level.

    Raises:
      ValueError: axes out of order, or beyond the ragged ones.

    >>> x = Ragged.from_list([[[1, 2], []], [[3]]], ragged_rank=2)
    >>> merge_dims(x, 1, 2).to_list()
    [[1, 2], [3]]
    """
    if not 0 <= outer < inner <= x.ragged_rank:
        raise ValueError(f"merge_dims({outer}, {inner}) of {x.ragged_rank} ragged axes")
    if outer > 0:
        if outer > 1:
            return Ragged(merge_dims(x.values, outer - 1, inner - 1), x.offsets)
        for _ in range(inner - outer):
            offsets = x.values.offsets.at[x.offsets].get(mode="clip")
            x = Ragged(x.values.values, offsets)
        return x
    out = x
    for _ in range(inner):
        out = out.values
    return out


def boolean_mask(x: Ragged, keep: Any) -> Ragged:
    """The values of x where `keep`, a ragged bool with x's rows or bool `[capacity]`, is true.

    The capacity stays.

    >>> boolean_mask(Ragged.from_list([[1, 2], [3]]), jnp.array([True, False, True])).to_list()
    [[1], [3]]
    """
    _one_level(x)
    keep = keep.values if isinstance(keep, Ragged) else jnp.asarray(keep)
    if keep.dtype != jnp.bool_ or keep.shape != (x.capacity,):
        raise ValueError(f"keep must be bool [{x.capacity}], not {keep.dtype} {keep.shape}")
    keep = keep & x.used
    (at,) = jnp.nonzero(keep, size=x.capacity, fill_value=x.capacity)
    kept = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(keep, dtype=jnp.int32)])
    values = x.values.at[at].get(mode="fill", fill_value=0)
    return Ragged(values, kept.at[x.offsets].get(mode="clip"))


def gather(x: Ragged, rows: Any, *, capacity: int | Sequence[int] | None = None) -> Ragged:
    """Rows of x in the order of `rows` i32 `[n]`, repeats allowed; a row outside x comes empty.

    Args:
      x: one level or nested.
      rows: see above; negative ones do not count from the end.
      capacity: room for values, or one per level from the outermost; see the module.

    >>> gather(Ragged.from_list([[1, 2], [3]]), jnp.array([1, 0, 1])).to_list()
    [[3], [1, 2], [3]]
    """
    rows = jnp.asarray(rows, jnp.int32)
    if rows.ndim != 1:
        raise ValueError(f"rows must be a vector, not {rows.shape}")
    there = (rows >= 0) & (rows < x.num_rows)
    lengths = jnp.where(there, x.row_lengths.at[rows].get(mode="fill", fill_value=0), 0)
    first, *below = capacity if isinstance(capacity, Sequence) else (capacity,)
    size = _capacity(first, jnp.sum(lengths), "capacity")
    offsets = jnp.minimum(_offsets_of_lengths(lengths), size)
    new = major_ids(offsets, size)
    source = x.row_starts.at[rows].get(mode="clip") - offsets[:-1]
    place = jnp.arange(size, dtype=jnp.int32)
    at, used = place + source.at[new].get(mode="clip"), place < offsets[-1]
    if isinstance(x.values, Ragged):
        inner = gather(x.values, jnp.where(used, at, x.capacity), capacity=below or None)
        return Ragged(inner, offsets)
    values = x.values.at[at].get(mode="clip")
    return Ragged(_masked(used, values), offsets)


def concat(arrays: Sequence[Ragged], axis: int = 0) -> Ragged:
    """Rows after rows (axis 0), or row r of each joined to one row (axis 1).

    The capacity is the sum of the capacities.

    Raises:
      ValueError: nested levels, values that differ in `*D`, or (axis 1) in the number of rows.

    >>> a, b = Ragged.from_list([[1], [2, 3]]), Ragged.from_list([[4], []])
    >>> concat([a, b]).to_list(), concat([a, b], axis=1).to_list()
    ([[1], [2, 3], [4], []], [[1, 4], [2, 3]])
    """
    for x in arrays:
        _one_level(x)
    if axis not in (0, 1) or not arrays:
        raise ValueError(f"{len(arrays)} arrays along {axis=}: 0 and 1 can be joined")
    counts = {x.num_rows for x in arrays}
    if axis == 1 and len(counts) != 1:
        raise ValueError(f"numbers of rows differ: {sorted(counts)}")
    dtype = jnp.result_type(*[x.values for x in arrays])
    tail = {x.values.shape[1:] for x in arrays}
    if len(tail) != 1:
        raise ValueError(f"values differ beyond their rows: {sorted(tail)}")
    values = jnp.zeros((sum(x.capacity for x in arrays), *tail.pop()), dtype)
    if axis == 0:
        lengths = jnp.concatenate([x.row_lengths for x in arrays])
        starts, first = _offsets_of_lengths(lengths), 0
        places = []
        for x in arrays:
            places.append(starts[first : first + x.num_rows])
            first += x.num_rows
    else:
        starts = _offsets_of_lengths(sum(x.row_lengths for x in arrays))
        at, places = starts[:-1], []
        for x in arrays:
            places.append(at)
            at = at + x.row_lengths
    for x, begin in zip(arrays, places, strict=True):
        shift = begin - x.row_starts
        moved = shift.at[x.value_rowids].get(mode="clip") if x.num_rows else jnp.int32(0)
        target = jnp.where(x.used, jnp.arange(x.capacity) + moved, len(values))
        values = values.at[target].set(x.values.astype(dtype), mode="drop")
    return Ragged(values, starts)


def stack(arrays: Sequence[Ragged]) -> Ragged:
    """The arrays as rows of a new outermost level: `[n, (R), (L), *D]`.

    >>> stack([Ragged.from_list([[1], [2, 3]]), Ragged.from_list([[4]])]).to_list()
    [[[1], [2, 3]], [[4]]]
    """
    counts = jnp.array([x.num_rows for x in arrays], jnp.int32)
    return Ragged(concat(arrays), _offsets_of_lengths(counts))


def reverse_rows(x: Ragged) -> Ragged:
    """Every row backwards.

    >>> reverse_rows(Ragged.from_list([[1, 2, 3], [4]])).to_list()
    [[3, 2, 1], [4]]
    """
    _one_level(x)
    ids = x.value_rowids
    mirror = x.row_starts + x.row_limits - 1
    at = mirror.at[ids].get(mode="clip") - jnp.arange(x.capacity, dtype=jnp.int32)
    return x.with_values(x.values.at[at].get(mode="clip"))


# --- reductions ----------------------------------------------------------------------------------


def reduce_sum(x: Ragged, axis: int = 1) -> Any:
    """Sum along an axis of the virtual shape: the innermost ragged one, or one of `*D`.

    Returns:
      Along the innermost ragged axis `[R, *D]`, or for nested x a `Ragged` of one level less; along
      features a `Ragged`.  An empty row sums to 0.

    Raises:
      ValueError: axis 0, or a ragged axis that is not the innermost (merge_dims first).

    >>> reduce_sum(Ragged.from_list([[1.0, 2.0], []])).tolist()
    [3.0, 0.0]
    """
    return _reduce(x, axis, segment_sum, jnp.sum)


def reduce_mean(x: Ragged, axis: int = 1) -> Any:
    """Mean along an axis as `reduce_sum` takes it; an empty row gives 0.

    >>> reduce_mean(Ragged.from_list([[1.0, 2.0], []])).tolist()
    [1.5, 0.0]
    """

    def segments(values: Array, ids: Array, count: int) -> Array:
        ones = jnp.ones(values.shape[0], jnp.float32)
        lengths = jnp.maximum(segment_sum(ones, ids, count), 1)
        wide = values.astype(jnp.promote_types(values.dtype, jnp.float32))
        out = segment_sum(wide, ids, count) / lengths.reshape(-1, *(1,) * (values.ndim - 1))
        return out.astype(values.dtype) if jnp.issubdtype(values.dtype, jnp.inexact) else out

    return _reduce(x, axis, segments, jnp.mean)


def reduce_max(x: Ragged, axis: int = 1) -> Any:
    """Maximum along an axis as `reduce_sum` takes it; an empty row gives the dtype's least value.

    >>> reduce_max(Ragged.from_list([[1.0, 2.0], []])).tolist()
    [2.0, -inf]
    """
    return _reduce(x, axis, segment_max, jnp.max)


def reduce_min(x: Ragged, axis: int = 1) -> Any:
    """Minimum along an axis as `reduce_sum` takes it; an empty row gives the dtype's largest value.

    >>> reduce_min(Ragged.from_list([[1.0, 2.0], []])).tolist()
    [1.0, inf]
    """
    # ~x turns integers around without the overflow that -x has at the least one.
    turn = jnp.negative if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.invert
    segments = lambda values, ids, count: turn(segment_max(turn(values), ids, count))
    return _reduce(x, axis, segments, jnp.min)


def reduce_any(x: Ragged, axis: int = 1) -> Any:
    """Whether any value is true, along an axis as `reduce_sum` takes it.

    >>> reduce_any(Ragged.from_list([[0, 2], []])).tolist()
    [True, False]
    """
    return reduce_max(x.map_values(lambda v: v != 0), axis)


def reduce_all(x: Ragged, axis: int = 1) -> Any:
    """Whether all values are true, along an axis as `reduce_sum` takes it; so for an empty row.

    >>> reduce_all(Ragged.from_list([[0, 2], []])).tolist()
    [False, True]
    """
    return reduce_min(x.map_values(lambda v: v != 0), axis)


def _reduce(x: Ragged, axis: int, segments: Any, dense: Any) -> Any:
    axis = axis + x.ndim if axis < 0 else axis
    if not 1 <= axis < x.ndim:
        raise ValueError(f"{axis=} of {x.ndim} axes: rows themselves are not reduced")
    if axis > x.ragged_rank:
        feature = axis - x.ragged_rank
        return x.map_values(lambda v: dense(v, axis=feature))
    if axis < x.ragged_rank:
        raise ValueError(f"{axis=} lies above a ragged axis: merge_dims(1, {x.ragged_rank}) first")
    if isinstance(x.values, Ragged):
        return x.with_values(_reduce(x.values, axis - 1, segments, dense))
    return segments(x.values, x.value_rowids, x.num_rows)


def _one_level(x: Ragged) -> None:
    if x.ragged_rank != 1:
        raise ValueError(f"one ragged level is taken here, not {x.ragged_rank}: merge_dims first")
