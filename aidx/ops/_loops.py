"""Loops: what cannot be vmapped, and types inside `jax.shard_map`.

In there the axes over which devices differ are part of an array's type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def one_by_one(fn: Callable[..., Any], flags: Any, args: tuple[Any, ...]) -> Any:
    """`fn(*args)` for each element of a vmapped axis in turn; every result has the axis in front.

    `flags` is a pytree of the structure of `args`: True where a leaf has the axis (its first), the
    others are passed whole.

    >>> import jax.numpy as jnp
    >>> print(one_by_one(jnp.dot, (True, False), (jnp.eye(2), jnp.array([3.0, 4.0]))))
    [3. 4.]
    """
    leaves, tree = jax.tree.flatten(args)
    on = jax.tree.leaves(flags)
    moving = [x for x, flag in zip(leaves, on, strict=True) if flag]

    def one(row: list[Any]) -> Any:
        rows = iter(row)
        picked = [next(rows) if flag else x for x, flag in zip(leaves, on, strict=True)]
        return fn(*jax.tree.unflatten(tree, picked))

    return jax.lax.map(one, moving)


def _varying(x: Any) -> frozenset[Any]:
    return jax.typeof(x).manual_axis_type.varying


def varying_like(start: Any, operands: Any) -> Any:
    """`start` with the mesh axes over which any of `operands` varies added to every leaf.

    A loop carry has one type from the first trip on; and what is replicated has to become varying
    before a custom_vjp, so that its gradient is summed over the devices outside.

    >>> print(varying_like(jax.numpy.zeros(2), jax.numpy.ones(3)))
    [0. 0.]
    """
    axes = frozenset().union(*(_varying(x) for x in jax.tree.leaves(operands)))

    def widen(x: Any) -> Any:
        missing = tuple(sorted(axes - _varying(x), key=str))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(widen, start) if axes else start
