"""Reductions over runs of a packed axis: what rows of a ragged array are made of."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .formats import Array
from .product import accumulator


def segment_sum(x: Array, ids: Array, count: int) -> Array:
    """`out[s] = sum_e [ids_e = s] x[e]`: `[count, *D]`; ids of `count` and more are dropped.

    ids ascend.  Accumulates in f32 at least.

    >>> import jax.numpy as jnp
    >>> segment_sum(jnp.array([1.0, 2.0, 4.0]), jnp.array([0, 0, 2]), 2).tolist()
    [3.0, 0.0]
    """
    zeros = jnp.zeros((count, *x.shape[1:]), accumulator(x.dtype))
    out = zeros.at[ids].add(x.astype(zeros.dtype), mode="drop", indices_are_sorted=True)
    return out.astype(x.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def segment_max(x: Array, ids: Array, count: int) -> Array:
    """`out[s] = max_e x[e]` over `ids_e = s`; -inf (the least integer) where there is none.

    The gradient is shared equally among equals, as `jax.numpy.max` does.

    >>> import jax.numpy as jnp
    >>> segment_max(jnp.array([1.0, 2.0, 4.0]), jnp.array([0, 0, 1]), 3).tolist()
    [2.0, 4.0, -inf]
    """
    if jnp.iscomplexobj(x):
        raise TypeError(f"{x.dtype} has no order")
    floats = jnp.issubdtype(x.dtype, jnp.floating)
    least = -jnp.inf if floats else False if x.dtype == jnp.bool_ else jnp.iinfo(x.dtype).min
    start = jnp.full((count, *x.shape[1:]), least, x.dtype)
    return start.at[ids].max(x, mode="drop", indices_are_sorted=True)


@segment_max.defjvp
def _segment_max_jvp(count: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, ids), (dx, _) = primals, tangents
    top = segment_max(x, ids, count)
    reach = (x == top.at[ids].get(mode="clip")) & _inside(ids, count, x.ndim)
    ties = segment_sum(reach.astype(dx.dtype), ids, count)
    moved = segment_sum(jnp.where(reach, dx, 0), ids, count)
    return top, moved / jnp.maximum(ties, 1)


def segment_log_softmax(x: Array, ids: Array, count: int) -> Array:
    """`x - log(sum_f exp(x_f))` over the run of each element, in f32 at least; zero in padding.

    >>> import jax.numpy as jnp
    >>> segment_log_softmax(jnp.array([0.0, 0.0, 5.0]), jnp.array([0, 0, 1]), 2).round(3).tolist()
    [-0.693..., -0.693..., 0.0]
    """
    shifted, total = _exponents(x, ids, count)
    inside = _inside(ids, count, x.ndim)
    return jnp.where(inside, shifted - jnp.log(total), 0).astype(x.dtype)


def segment_softmax(x: Array, ids: Array, count: int) -> Array:
    """Softmax over the run of each element, in f32 at least; zero in padding.

    >>> import jax.numpy as jnp
    >>> segment_softmax(jnp.array([0.0, 0.0, 5.0]), jnp.array([0, 0, 1]), 2).tolist()
    [0.5, 0.5, 1.0]
    """
    shifted, total = _exponents(x, ids, count)
    inside = _inside(ids, count, x.ndim)
    return jnp.where(inside, jnp.exp(shifted) / total, 0).astype(x.dtype)


def _exponents(x: Array, ids: Array, count: int) -> tuple[Array, Array]:
    """(x - the largest of its run, sum of their exponentials over the run)."""
    x = x.astype(accumulator(x.dtype))
    top = segment_max(jax.lax.stop_gradient(x), ids, count)
    top = jnp.where(jnp.isfinite(top), top, 0)
    x = x - top.at[ids].get(mode="clip")
    total = segment_sum(jnp.exp(x), ids, count).at[ids].get(mode="clip")
    return x, jnp.where(_inside(ids, count, x.ndim) & (total > 0), total, 1)


def _inside(ids: Array, count: int, ndim: int) -> Array:
    return (ids < count).reshape(-1, *(1,) * (ndim - 1))
