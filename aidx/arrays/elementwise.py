"""Adding, multiplying and masking; a place that is not stored counts as an exact zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .convert import (
    _count_distinct,
    capacity,
    coalesce,
    distinct,
    exceeds,
    poisoned,
    to_bsr,
    to_coo,
)
from .formats import BSC, BSR, COO, CSC, CSR, Array, SparseMatrix, offsets_of


def used_places(a: SparseMatrix) -> Array:
    """bool, broadcastable to `a.data`: which stored values are not padding.

    >>> import jax.numpy as jnp
    >>> used_places(COO.from_dense(jnp.eye(2), nse=3)).tolist()
    [True, True, False]
    """
    row, col = a.coordinates()
    return (row < a.shape[0]) & (col < a.shape[1])


def map_values[A: SparseMatrix](f: Callable[[Array], Array], a: A) -> A:
    """`f` of every stored value, padding aside; zeros that are not stored stay zero.

    >>> import jax.numpy as jnp
    >>> map_values(jnp.exp, COO.from_dense(jnp.array([[0.0, 1.0]]), nse=2)).data.round(2).tolist()
    [2.7..., 0.0]
    """
    data = f(a.data)
    data = jnp.where(used_places(a), data, jnp.zeros((), data.dtype))
    return a.replace(data=data)  # pyright: ignore[reportAttributeAccessIssue]


# --- multiplying ---------------------------------------------------------------------------------


def multiply[A: SparseMatrix](a: A, b: Any) -> A:
    """The elementwise product, on the pattern of a.

    Args:
      a: sparse.
      b: a scalar, a dense array that broadcasts to `a.shape`, or a sparse matrix of that shape
        (any format; where it stores nothing the result holds a zero).

    Returns:
      a's format and pattern, in the common dtype.  A place that a does not store stays zero even
      where b is infinite.

    Raises:
      ValueError: shapes that do not fit.

    >>> import jax.numpy as jnp
    >>> a = CSR.from_dense(jnp.array([[1.0, 2.0], [0.0, 3.0]]))
    >>> multiply(a, jnp.array([[10.0], [100.0]])).data.tolist()
    [10.0, 20.0, 300.0]
    """
    if isinstance(b, SparseMatrix):
        _same_shape(a, b)
        return _over(_multiply_sparse, a, b)
    if jnp.ndim(b) == 0:
        data = a.data * b
        return a.replace(data=data)  # pyright: ignore[reportAttributeAccessIssue]
    return _over(_multiply_dense, a, _matrix_like(a, b))


def divide[A: SparseMatrix](a: A, b: Any) -> A:
    """The stored values over b, a scalar or a dense array that broadcasts to `a.shape`.

    >>> import jax.numpy as jnp
    >>> divide(COO.from_dense(jnp.array([[0.0, 4.0]])), 2.0).data.tolist()
    [2.0]
    """
    if isinstance(b, SparseMatrix):
        raise TypeError("dividing by a sparse matrix divides by zeros: divide(a, b.to_dense())")
    if jnp.ndim(b) == 0:
        return a.replace(data=a.data / b)  # pyright: ignore[reportAttributeAccessIssue]
    b = sample(_matrix_like(a, b), a)
    return map_values(lambda x: x / jnp.where(used_places(a), b.data, 1), a)


@jax.jit
def _multiply_dense(a: Any, b: Array) -> Any:
    return a.replace(data=a.data * _at(b, a))


@jax.jit
def _multiply_sparse(a: Any, b: Any) -> Any:
    coo, other = to_coo(a), to_coo(b)
    both = jnp.concatenate([coo.row, other.row]), jnp.concatenate([coo.col, other.col])
    size = both[0].shape[0]
    *_, place, _ = distinct(*both, a.shape, size)
    totals = jnp.zeros(size, b.data.dtype).at[place[coo.nse :]].add(other.data, mode="drop")
    factor = totals.at[place[: coo.nse]].get(mode="fill", fill_value=0)
    return a.replace(data=a.data * factor.reshape(a.data.shape))


def sample[A: SparseMatrix](x: Any, pattern: A) -> A:
    """The entries of dense x at the stored places of `pattern`.

    Args:
      x: `[*batch, M, N]`, or what broadcasts to it.
      pattern: its values are not read.

    >>> import jax.numpy as jnp
    >>> sample(jnp.array([[1.0, 2.0]]), COO.from_parts([True], [0], [1], (1, 2))).data.tolist()
    [2.0]
    """
    return _over(_sample, pattern, _matrix_like(pattern, x))


@jax.jit
def _sample(a: Any, x: Array) -> Any:
    return a.replace(data=_at(x, a))


def _at(x: Array, a: SparseMatrix) -> Array:
    """x `[M or 1, N or 1]` at a's places, zero in padding."""
    row, col = a.coordinates()
    row, col = row if x.shape[0] > 1 else 0 * row, col if x.shape[1] > 1 else 0 * col
    values = x.at[row, col].get(mode="clip")
    return jnp.where(used_places(a), values, jnp.zeros((), x.dtype))


def mask[A: SparseMatrix](a: A, keep: Any) -> A:
    """Zeros where dense bool `keep` (broadcastable to the shape) is false; the pattern stays.

    >>> import jax.numpy as jnp
    >>> mask(CSR.from_dense(jnp.ones((2, 2))), jnp.eye(2, dtype=bool)).data.tolist()
    [1.0, 0.0, 0.0, 1.0]
    """
    keep = jnp.asarray(keep)
    if keep.dtype != jnp.bool_:
        raise TypeError(f"keep must be booleans, not {keep.dtype}")
    kept = sample(keep, a).data
    data = jnp.where(kept, a.data, jnp.zeros((), a.dtype))
    return a.replace(data=data)  # pyright: ignore[reportAttributeAccessIssue]


def tril[A: SparseMatrix](a: A, k: int = 0) -> A:
    """Zeros above diagonal k; the pattern stays (`prune` drops the zeros).

    >>> import jax.numpy as jnp
    >>> tril(CSR.from_dense(jnp.ones((2, 2)))).data.tolist()
    [1.0, 0.0, 1.0, 1.0]
    """
    row, col = a.coordinates()
    data = jnp.where(col - row <= k, a.data, jnp.zeros((), a.dtype))
    return a.replace(data=data)  # pyright: ignore[reportAttributeAccessIssue]


def triu[A: SparseMatrix](a: A, k: int = 0) -> A:
    """Zeros below diagonal k; the pattern stays (`prune` drops the zeros).

    >>> import jax.numpy as jnp
    >>> triu(CSR.from_dense(jnp.ones((2, 2))), 1).data.tolist()
    [0.0, 1.0, 0.0, 0.0]
    """
    row, col = a.coordinates()
    data = jnp.where(col - row >= k, a.data, jnp.zeros((), a.dtype))
    return a.replace(data=data)  # pyright: ignore[reportAttributeAccessIssue]


def prune[A: COO | CSR | CSC](a: A, *, tolerance: float = 0.0, nse: int | None = None) -> A:
    """Stored values whose magnitude is at most `tolerance` dropped, the rest sorted.

    Args:
      a: COO, CSR or CSC, one matrix; duplicates are judged one by one (coalesce first).
      tolerance: 0 drops exact zeros.
      nse: the capacity; counted when not given, needed under jit.

    Raises:
      ValueError: nse is missing under jit, or too small.

    >>> import jax.numpy as jnp
    >>> prune(tril(CSR.from_dense(jnp.ones((2, 2))))).data.tolist()
    [1.0, 1.0, 1.0]
    """
    if isinstance(a, CSC):
        return prune(a.T, tolerance=tolerance, nse=nse).T
    kept = exceeds(a.data, tolerance) & used_places(a)
    nse = capacity(nse, jnp.sum(kept))
    return _prune(a, kept, nse=nse)


@functools.partial(jax.jit, static_argnames=("nse",))
def _prune(a: Any, kept: Array, *, nse: int) -> Any:
    (row, col), (M, N) = a.coordinates(), a.shape
    (at,) = jnp.nonzero(kept, size=nse, fill_value=a.nse)
    pick = lambda x, fill: x.at[at].get(mode="fill", fill_value=fill)
    data = poisoned(pick(a.data, 0), jnp.sum(kept) > nse)
    row, col = pick(row, M), pick(col, N)
    if isinstance(a, COO):
        return COO(data, row, col, a.shape)
    return CSR(data, col, offsets_of(row, M), a.shape, row)


# --- adding --------------------------------------------------------------------------------------


def add(a: SparseMatrix, b: Any, *, nse: int | None = None) -> Any:
    """The elementwise sum.

    Args:
      a: sparse.
      b: a dense array that broadcasts to `a.shape` (the result is dense), or a sparse matrix of
        that shape (the result has a's format, sorted, without duplicates).
      nse: capacity of a sparse result; counted when not given, and under jit the two together.

    Raises:
      ValueError: shapes that do not fit, or nse is too small.
      TypeError: a scalar other than 0, whose sum would not be sparse.

    >>> import jax.numpy as jnp
    >>> a = CSR.from_dense(jnp.eye(2))
    >>> add(a, a).data.tolist(), add(a, jnp.ones((2, 2))).tolist()
    ([2.0, 2.0], [[2.0, 1.0], [1.0, 2.0]])
    """
    if not isinstance(b, SparseMatrix):
        if isinstance(b, int) and b == 0:  # what the builtin sum() starts from
            return a
        if jnp.ndim(b) == 0:
            raise TypeError(f"sparse + {b} is not sparse: add a dense array, or map_values")
        if nse is not None:
            raise TypeError("nse= belongs to the sum of two sparse matrices")
        x = jnp.broadcast_to(_matrix_like(a, b), (*a.batch_shape, *a.shape))
        return _over(_add_dense, a, x)
    _same_shape(a, b)
    if isinstance(a, BSC):
        return add(a.T, b.T, nse=nse).T
    if a.batch_shape or b.batch_shape:
        nse = _total_capacity(a, b) if nse is None else nse
        return _over(functools.partial(_add_sparse, nse=nse), a, b)
    return _add_sparse(a, b, nse=nse)


@jax.jit
def _add_dense(a: SparseMatrix, x: Array) -> Array:
    row, col = a.coordinates()
    x = x.astype(jnp.result_type(a.data, x))
    return x.at[row, col].add(a.data.astype(x.dtype), mode="drop")


def _total_capacity(a: Any, b: Any) -> int:
    blocks = isinstance(a, BSR) and isinstance(b, BSR)
    return a.nse + b.nse if blocks else to_coo(a).data.shape[-1] + to_coo(b).data.shape[-1]


def _add_sparse(a: Any, b: Any, *, nse: int | None) -> Any:
    together: Any
    if isinstance(a, BSR):
        b = to_bsr(b, a.block_size, nse=None if _concrete(b) else to_coo(b).nse)
        together = _concatenated_blocks(a, b)
    else:
        a_coo, b_coo = to_coo(a), to_coo(b)
        data = _joined(a_coo.data, b_coo.data)
        row = jnp.concatenate([a_coo.row, b_coo.row])
        col = jnp.concatenate([a_coo.col, b_coo.col])
        together = COO(data, row, col, a.shape)
    if nse is None:
        nse = None if _concrete(together) else together.nse
    if isinstance(a, COO | BSR):
        return coalesce(together, nse=nse)
    turned = together.T if isinstance(a, CSC) else together
    if nse is None:
        nse = int(_count_distinct(turned.row, turned.col, turned.shape[0]))
    out = coalesce(turned, nse=nse)
    csr = CSR(out.data, out.col, offsets_of(out.row, out.shape[0]), out.shape, out.row)
    return csr.T if isinstance(a, CSC) else csr


def _concatenated_blocks(a: BSR, b: BSR) -> BSR:
    """Both matrices' blocks in one, sorted by row; a block may come twice."""
    (row, col), (row_b, col_b) = a.block_coordinates(), b.block_coordinates()
    row, col = jnp.concatenate([row, row_b]), jnp.concatenate([col, col_b])
    order = jnp.argsort(row, stable=True)
    data = _joined(a.data, b.data)[order]
    return BSR(data, col[order], offsets_of(row, a.shape[0] // a.block_size[0]), a.shape)


def _joined(x: Array, y: Array) -> Array:
    dtype = jnp.result_type(x, y)
    return jnp.concatenate([x.astype(dtype), y.astype(dtype)])


# --- shapes --------------------------------------------------------------------------------------


def _concrete(a: SparseMatrix) -> bool:
    return not any(isinstance(x, Tracer) for x in jax.tree.leaves(a))


def _same_shape(a: SparseMatrix, b: SparseMatrix) -> None:
    if a.shape != b.shape or a.batch_shape != b.batch_shape:
        raise ValueError(
            f"shapes differ: {(*a.batch_shape, *a.shape)} and {(*b.batch_shape, *b.shape)}"
        )


def _matrix_like(a: SparseMatrix, x: Any) -> Array:
    """x as `[*batch, M or 1, N or 1]`."""
    x, full = jnp.asarray(x), (*a.batch_shape, *a.shape)
    shape = (1,) * (len(full) - x.ndim) + x.shape
    if x.ndim > len(full) or any(n not in (1, m) for n, m in zip(shape, full, strict=True)):
        raise ValueError(f"{x.shape=} does not broadcast to {full}")
    x = x.reshape(shape)
    return jnp.broadcast_to(x, (*a.batch_shape, *shape[len(a.batch_shape) :]))


def _over(f: Any, a: SparseMatrix, *rest: Any) -> Any:
    for _ in a.batch_shape:
        f = jax.vmap(f)
    return f(a, *rest)
