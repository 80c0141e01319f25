"""Types inside `jax.shard_map`, where the axes over which devices differ are part of an array's."""

from __future__ import annotations

from typing import Any

import jax


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
