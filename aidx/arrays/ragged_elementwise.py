"""Functions of ragged and dense operands, value by value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .formats import Array
from .ragged_array import Ragged


def broadcast_rows(x: Any, like: Ragged) -> Array:
    """Dense x over the virtual shape of `like`: what broadcasts to its flat values.

    Args:
      x: broadcasts to `[R, 1, ..., *D]`: a number per row, features, or both; not along a ragged
        axis, whose sizes differ.
      like: gives the rows.

    Returns:
      `[capacity, ...]`, or `[1, ...]` where every row gets the same.

    Raises:
      ValueError: x does not broadcast.

    >>> r = Ragged.from_list([[1.0, 2.0], [3.0]])
    >>> broadcast_rows(jnp.array([[5.0], [7.0]]), r).tolist()
    [5.0, 5.0, 7.0]
    """
    x, tail, rank = jnp.asarray(x), like.flat_values.shape[1:], like.ragged_rank
    shape = (1,) * (like.ndim - x.ndim) + x.shape
    ragged = shape[1 : 1 + rank]
    fits = all(a in (1, b) for a, b in zip(shape[1 + rank :], tail, strict=True))
    if x.ndim > like.ndim or shape[0] not in (1, like.num_rows) or set(ragged) - {1} or not fits:
        raise ValueError(f"{x.shape} does not broadcast to [{like.num_rows}, ragged, {tail}]")
    x = x.reshape(shape[0], *shape[1 + rank :])
    if shape[0] == 1:
        return x
    ids = like.value_rowids
    inner = like.values
    while isinstance(inner, Ragged):
        ids = ids.at[inner.value_rowids].get(mode="fill", fill_value=like.num_rows)
        inner = inner.values
    return x.at[ids].get(mode="fill", fill_value=0)


def elementwise(f: Callable[..., Array], *operands: Any) -> Ragged:
    """`f` of ragged operands with the same rows, and dense ones that broadcast to them.

    Raises:
      ValueError: row lengths that differ (where they can be seen), or no ragged operand.

    >>> r = Ragged.from_list([[1.0, 2.0], [3.0]])
    >>> elementwise(jnp.maximum, r, 2.0).to_list()
    [[2.0, 2.0], [3.0]]
    """
    ragged = [x for x in operands if isinstance(x, Ragged)]
    if not ragged:
        raise ValueError("no operand is ragged")
    first = max(ragged, key=lambda r: r.flat_values.ndim)
    for other in ragged:
        _check_same_rows(first, other)
    ndim = first.flat_values.ndim

    def flat(x: Any) -> Array:
        if isinstance(x, Ragged):
            x = x.flat_values
            return x.reshape(x.shape[0], *(1,) * (ndim - x.ndim), *x.shape[1:])
        x = jnp.asarray(x)
        return broadcast_rows(x, first) if x.ndim else x

    return first.with_flat_values(f(*(flat(x) for x in operands)))


def _check_same_rows(a: Ragged, b: Ragged) -> None:
    if a.ragged_rank != b.ragged_rank or a.num_rows != b.num_rows or a.capacity != b.capacity:
        raise ValueError(
            f"rows differ: {a.num_rows} of rank {a.ragged_rank} and capacity {a.capacity}, "
            f"{b.num_rows} of rank {b.ragged_rank} and capacity {b.capacity}"
        )
    seen = not any(isinstance(x, Tracer) for x in (a.offsets, b.offsets))
    if a.offsets is not b.offsets and seen and not np.array_equal(a.offsets, b.offsets):
        lengths = (np.diff(np.asarray(x.offsets)) for x in (a, b))
        raise ValueError("row lengths differ: {} and {}".format(*lengths))
    if isinstance(a.values, Ragged):
        _check_same_rows(a.values, b.values)
