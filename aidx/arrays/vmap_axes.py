"""Which axis of which array: prefixes spread over trees whose leaves may be matrices or rows."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .formats import SparseMatrix
from .ragged_array import Ragged


def is_axis(x: Any) -> bool:
    """Whether x is an entry of in_axes or out_axes that names one axis, or none."""
    return x is None or isinstance(x, int)


def is_unit(x: Any) -> bool:
    """Whether x is mapped as a whole although it holds several arrays."""
    return isinstance(x, SparseMatrix | Ragged)


def along(name: str, axes: Any, arg: Any) -> list[tuple[str, Any, Any]]:
    """Every unit of one argument with its axis."""
    stop = lambda x: is_axis(x) or is_unit(x)
    units, tree = jax.tree_util.tree_flatten_with_path(arg, is_leaf=is_unit)
    try:
        spread = jax.tree.broadcast(axes, jax.tree.unflatten(tree, [0] * len(units)), is_leaf=stop)
    except ValueError as problem:
        raise ValueError(f"in_axes {axes} is no prefix of {name}: {problem}") from None
    found = jax.tree.leaves(spread, is_leaf=stop)
    path = lambda keys: name + jax.tree_util.keystr(keys)
    return [(path(keys), x, axis) for (keys, x), axis in zip(units, found, strict=True)]


def unit_axes(path: str, x: Any, axis: Any) -> list[int | None]:
    """One non-negative axis (or None) for every array of the unit.

    Raises:
      ValueError: an axis that x does not have.
    """
    count = len(jax.tree.leaves(x))
    if axis is None:
        return [None] * count
    if not isinstance(axis, int):  # a container of axes
        fields = jax.tree.leaves(axis, is_leaf=lambda a: a is None)
        kept = [a for a, field in zip(fields, _fields(x), strict=True) if field is not None]
        return [
            None if a is None else _checked_axis(path, a, jnp.ndim(leaf))
            for a, leaf in zip(kept, jax.tree.leaves(x), strict=True)
        ]
    if isinstance(x, SparseMatrix):
        at = _checked_axis(path, axis, x.ndim)
        if at >= len(x.batch_shape):
            raise ValueError(
                f"{path} is mapped along axis {axis} of a {type(x).__name__}, which is none of its "
                f"{len(x.batch_shape)} stack axes"
            )
        return [at] * count
    if isinstance(x, Ragged):
        if axis != 0 and (x.offsets.ndim != 1 or axis != -x.ndim):
            raise ValueError(f"{path} is ragged: axis 0 is mapped, not {axis}")
        return [0] * count
    return [_checked_axis(path, axis, jnp.ndim(x))]


def _fields(x: Any) -> list[Any]:
    return jax.tree.leaves(x, is_leaf=lambda leaf: leaf is None)


def _checked_axis(path: str, axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ValueError(f"{path} has {ndim} axes; axis {axis} is none of them")
    return axis % ndim
