"""Sums, means, extremes and softmax of sparse matrices, by axis."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from .convert import coalesce
from .elementwise import used_places
from .formats import Array, SparseMatrix
from .product import accumulator


def sum(a: SparseMatrix, axis: int | None = None) -> Array:
    """Sum over rows (axis 0), over columns (axis 1, -1) or of everything (None).

    Returns:
      `[*batch, N]`, `[*batch, M]` or `[*batch]`, accumulated in f32 at least, in a's dtype (i32 of
      booleans).

    Raises:
      ValueError: another axis.

    >>> import jax.numpy as jnp
    >>> from aidx.arrays import CSR
    >>> sum(CSR.from_dense(jnp.array([[1.0, 2.0], [0.0, 3.0]])), axis=0).tolist()
    [1.0, 5.0]
    """
    return _over(_sum, a, _axis(axis))


def mean(a: SparseMatrix, axis: int | None = None) -> Array:
    """Mean over rows (axis 0), columns (axis 1, -1) or all, zeros that are not stored included.

    Integers and booleans give f32.

    >>> import jax.numpy as jnp
    >>> from aidx.arrays import CSR
    >>> mean(CSR.from_dense(jnp.array([[1.0, 2.0], [0.0, 3.0]]))).tolist()
    1.5
    """
    axis = _axis(axis)
    count = a.shape[0] * a.shape[1] if axis is None else a.shape[axis]
    inexact = jnp.issubdtype(a.dtype, jnp.inexact)
    wide = accumulator(a.dtype) if inexact else jnp.float32
    out = _over(_sum, a.replace(data=a.data.astype(wide)), axis) / count  # pyright: ignore
    return out.astype(a.dtype if inexact else wide)


def max(a: SparseMatrix, axis: int | None = None) -> Array:
    """Maximum over rows (axis 0), columns (axis 1, -1) or all, zeros that are not stored included.

    The gradient is shared equally among equals, as `jax.numpy.max` does.

    >>> import jax.numpy as jnp
    >>> from aidx.arrays import CSR
    >>> max(CSR.from_dense(jnp.array([[-1.0, 0.0], [-2.0, -3.0]])), axis=1).tolist()
    [0.0, -2.0]
    """
    _ordered(a)
    return _over(_max, a, _axis(axis))


def min(a: SparseMatrix, axis: int | None = None) -> Array:
    """Minimum over rows (axis 0), columns (axis 1, -1) or all, zeros that are not stored included.

    >>> import jax.numpy as jnp
    >>> from aidx.arrays import CSR
    >>> min(CSR.from_dense(jnp.array([[1.0, 0.0], [2.0, 3.0]])), axis=1).tolist()
    [0.0, 2.0]
    """
    _ordered(a)
    return _over(_min, a, _axis(axis))


def softmax[A: SparseMatrix](a: A, axis: int = -1) -> A:
    r"""Softmax over the stored values of every row (axis 1, -1) or column (axis 0).

    $$p_e = e^{a_e} / \sum_{f \in row(e)} e^{a_f}$$

    What is not stored counts as -inf (a masked logit), so a row without entries stays empty.  Each
    stored value is one logit: coalesce first where coordinates repeat.

    >>> import jax.numpy as jnp
    >>> from aidx.arrays import CSR
    >>> softmax(CSR.from_dense(jnp.array([[0.0, 5.0], [3.0, 3.0]]))).data.tolist()
    [1.0, 0.5, 0.5]
    """
    _floating(a)
    return _over(_softmax, a, _axis(axis))


def log_softmax[A: SparseMatrix](a: A, axis: int = -1) -> A:
    """The logarithm of `softmax`, of stored values.

    >>> import jax.numpy as jnp
    >>> from aidx.arrays import CSR
    >>> log_softmax(CSR.from_dense(jnp.array([[0.0, 5.0]]))).data.tolist()
    [0.0]
    """
    _floating(a)
    return _over(_log_softmax, a, _axis(axis))


# --- one matrix ----------------------------------------------------------------------------------


def _lines(a: SparseMatrix, axis: int | None) -> tuple[Array, int]:
    """(the line that every stored value is reduced into, their number); padding is past it."""
    row, col = a.coordinates()
    if axis is None:
        ids, count = jnp.where((row < a.shape[0]) & (col < a.shape[1]), 0, 1), 1
    else:
        ids, count = (row, a.shape[0]) if axis == 1 else (col, a.shape[1])
    return jnp.broadcast_to(ids, a.data.shape), count


def _sum(a: SparseMatrix, axis: int | None) -> Array:
    dtype = jnp.int32 if a.dtype == jnp.bool_ else a.dtype
    data = a.data.astype(accumulator(dtype))
    if axis is None:
        return jnp.sum(jnp.where(used_places(a), data, 0)).astype(dtype)
    lines, count = _lines(a, axis)
    return jnp.zeros(count, data.dtype).at[lines].add(data, mode="drop").astype(dtype)


def _max(a: Any, axis: int | None) -> Array:
    return _extreme(a, axis, largest=True)


def _min(a: Any, axis: int | None) -> Array:
    return _extreme(a, axis, largest=False)


def _extreme(a: Any, axis: int | None, largest: bool) -> Array:
    a = coalesce(a, nse=a.nse)
    lines, count = _lines(a, axis)
    width = a.shape[0] * a.shape[1] if axis is None else a.shape[axis]
    if width == 0:
        raise ValueError(f"an extreme along an empty axis of {a.shape}")
    used = jnp.broadcast_to(used_places(a), a.data.shape)
    stored = jnp.zeros(count, jnp.int32).at[lines].add(used.astype(jnp.int32), mode="drop")
    top = _line_extreme(a.data, lines, count, largest)
    with_zero = jnp.maximum(top, 0) if largest else jnp.minimum(top, 0)
    top = jnp.where(stored < width, with_zero, top)
    if not jnp.issubdtype(a.dtype, jnp.floating):
        return top if axis is not None else top[0]
    # top is a constant; its gradient is that of the mean of the values that reach it.
    data = jnp.where(used, a.data, 0)
    reach = used & (a.data == top.at[lines].get(mode="clip"))
    ties = jnp.zeros(count, jnp.int32).at[lines].add(reach.astype(jnp.int32), mode="drop")
    ties = ties + jnp.where(top == 0, width - stored, 0)
    share = jnp.where(reach, data - jax.lax.stop_gradient(data), 0)
    moved = jnp.zeros(count, a.dtype).at[lines].add(share, mode="drop")
    out = top + moved / jnp.maximum(ties, 1).astype(a.dtype)
    return out if axis is not None else out[0]


def _line_extreme(data: Array, lines: Array, count: int, largest: bool = True) -> Array:
    """The largest (smallest) value of every line, the other end where it is empty; no gradient."""
    data = jax.lax.stop_gradient(data)
    floats = jnp.issubdtype(data.dtype, jnp.floating)
    least, most = (-jnp.inf, jnp.inf) if floats else (_info(data).min, _info(data).max)
    start = jnp.full(count, least if largest else most, data.dtype).at[lines]
    return start.max(data, mode="drop") if largest else start.min(data, mode="drop")


def _info(data: Array) -> Any:
    return jnp.iinfo(data.dtype)


def _log_softmax(a: Any, axis: int | None, exponentiate: bool = False) -> Any:
    with jax.named_scope("softmax"):
        lines, count = _lines(a, axis)
        x = a.data.astype(accumulator(a.dtype))
        top = _line_extreme(x, lines, count)
        top = jnp.where(jnp.isfinite(top), top, 0)
        x = x - top.at[lines].get(mode="clip")
        total = jnp.zeros(count, x.dtype).at[lines].add(jnp.exp(x), mode="drop")
        total = jnp.where(total > 0, total, 1).at[lines].get(mode="clip")
        out = jnp.exp(x) / total if exponentiate else x - jnp.log(total)
        return a.replace(data=jnp.where(used_places(a), out, 0).astype(a.dtype))


def _softmax(a: Any, axis: int | None) -> Any:
    return _log_softmax(a, axis, exponentiate=True)


def _axis(axis: int | None) -> int | None:
    if axis not in (None, 0, 1, -1, -2):
        raise ValueError(f"{axis=} must be 0, 1, -1, -2 or None: axes of the matrix, not the stack")
    return None if axis is None else axis % 2


def _ordered(a: SparseMatrix) -> None:
    if jnp.issubdtype(a.dtype, jnp.complexfloating) or a.dtype == jnp.bool_:
        raise TypeError(f"{a.dtype} has no order to take an extreme of")


def _floating(a: SparseMatrix) -> None:
    if not jnp.issubdtype(a.dtype, jnp.floating):
        raise TypeError(f"softmax of {a.dtype}: cast to a float dtype")


def _over(f: Any, a: Any, axis: int | None) -> Any:
    g = jax.jit(f, static_argnums=1)
    apply = lambda a: g(a, axis)
    for _ in a.batch_shape:
        apply = jax.vmap(apply)
    return apply(a)
