"""Products: sparse and dense in every order, and dense products sampled at a pattern."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from aidx.ops import registry

from .convert import capacity, distinct, poisoned, to_coo, to_csr
from .formats import COO, CSC, CSR, Array, SparseMatrix, major_ids, offsets_of
from .product import accumulator, pattern_of, sddmm, spmm


def matmul(
    a: Any,
    b: Any,
    *,
    nse: int | None = None,
    products: int | None = None,
    implementation: registry.ImplementationChoice = None,
) -> Any:
    r"""`a @ b` where at least one side is sparse.

    $$out_{ij} = \sum_k a_{ik} b_{kj}$$

    Args:
      a: a sparse matrix, or dense `[*batch, n, M]` or `[M]`.
      b: a sparse matrix, or dense `[*batch, N, n]` or `[N]`; a stack of sparse matrices takes dense
        operands with the same leading axes.
      nse: capacity of the result of sparse @ sparse; counted when not given, needed under jit.
      products: capacity for the scalar products of sparse @ sparse, `count_products(a, b)`;
        counted when not given, needed under jit.
      implementation: of the product with a dense side; None, a name or a sequence of names of op
        "spmm" (see `aidx.ops.registry`).

    Returns:
      Dense in the common dtype, accumulated in f32 at least; or for two sparse sides a matrix of
      a's format (CSR for blocks), sorted and without duplicates.

    Raises:
      ValueError: sizes that do not fit, or a capacity that is missing or too small.
      TypeError: an option of the other kind of product.

    >>> import jax.numpy as jnp
    >>> a = CSR.from_dense(jnp.array([[0.0, 2.0], [3.0, 0.0]]))
    >>> matmul(a, jnp.array([1.0, 10.0])).tolist()
    [20.0, 3.0]
    >>> matmul(a, a).to_dense().tolist()
    [[6.0, 0.0], [0.0, 6.0]]
    """
    if isinstance(a, SparseMatrix) and isinstance(b, SparseMatrix):
        if implementation is not None:
            raise TypeError("implementation= chooses the product with a dense side")
        return _sparse_sparse(a, b, nse, products)
    if nse is not None or products is not None:
        raise TypeError("nse= and products= belong to the product of two sparse matrices")
    if isinstance(a, SparseMatrix):
        return _sparse_dense(a, jnp.asarray(b), implementation)
    if not isinstance(b, SparseMatrix):
        raise TypeError(f"neither {type(a).__name__} nor {type(b).__name__} is sparse")
    a = jnp.asarray(a)
    out = _sparse_dense(b.T, a if a.ndim == 1 else a.swapaxes(-1, -2), implementation)
    return out if a.ndim == 1 else out.swapaxes(-1, -2)


def _sparse_dense(a: SparseMatrix, x: Array, implementation: Any) -> Array:
    lead = a.batch_shape
    core = x.shape[len(lead) :]
    if x.ndim == 0 or x.shape[: len(lead)] != lead or len(core) < 1:
        raise ValueError(f"stack of {lead} matrices {a.shape} times an operand of {x.shape}")
    if core[0 if len(core) == 1 else -2] != a.shape[1]:
        raise ValueError(f"sizes differ: {a.shape=} @ {x.shape}")
    names = tuple(entry.name for entry in registry.resolve("spmm", implementation))
    f = functools.partial(_product, names=names)
    for _ in range(max(0, len(core) - 2)):
        f = jax.vmap(f, in_axes=(None, 0))
    for _ in lead:
        f = jax.vmap(f)
    return f(a, x)


@functools.partial(jax.jit, static_argnames=("names",))
def _product(a: SparseMatrix, x: Array, names: tuple[str, ...]) -> Array:
    spec, pattern = pattern_of(a)
    out = spmm(a.data, x if x.ndim == 2 else x[:, None], pattern, spec, names)
    return out if x.ndim == 2 else out[:, 0]


# --- sampled products ----------------------------------------------------------------------------


def sampled_matmul[A: SparseMatrix](
    pattern: A, x: Any, y: Any, *, implementation: registry.ImplementationChoice = None
) -> A:
    r"""The entries of the dense product `x @ y` at the stored places of `pattern` (SDDMM).

    $$out_e = \sum_k x_{row_e, k} y_{k, col_e}$$

    Args:
      pattern: its values are not read; a stack takes x and y with the same leading axes.
      x: `[*batch, M, n]`.
      y: `[*batch, n, N]`.
      implementation: None, a name or a sequence of names of op "sddmm".

    Returns:
      The pattern with these values, in the common dtype of x and y; the `[M, N]` product is never
      formed.

    Raises:
      ValueError: sizes that do not fit.

    >>> import jax.numpy as jnp
    >>> p = COO.from_parts([1.0], [0], [1], (2, 2))
    >>> sampled_matmul(p, jnp.ones((2, 3)), 2 * jnp.ones((3, 2))).data.tolist()
    [6.0]
    """
    x, y, lead = jnp.asarray(x), jnp.asarray(y), pattern.batch_shape
    expected = (*lead, pattern.shape[0], x.shape[-1]), (*lead, x.shape[-1], pattern.shape[1])
    if x.ndim != 2 + len(lead) or (x.shape, y.shape) != expected:
        raise ValueError(f"{x.shape=} @ {y.shape=} does not fill {pattern.shape=} of stack {lead}")
    names = tuple(entry.name for entry in registry.resolve("sddmm", implementation))
    f = functools.partial(_sampled, names=names)
    for _ in lead:
        f = jax.vmap(f)
    return pattern.replace(data=f(pattern, x, y))  # pyright: ignore[reportAttributeAccessIssue]


@functools.partial(jax.jit, static_argnames=("names",))
def _sampled(a: SparseMatrix, x: Array, y: Array, names: tuple[str, ...]) -> Array:
    spec, pattern = pattern_of(a)
    return sddmm(x, y.T, pattern, spec, names)


def sampled_addmm[A: SparseMatrix](c: A, x: Any, y: Any, *, alpha: Any = 1, beta: Any = 1) -> A:
    """`alpha * (x @ y) + beta * c` at the stored places of c (torch.sparse.sampled_addmm).

    Where c stores a coordinate twice, each of the two gets the product: coalesce first.

    >>> import jax.numpy as jnp
    >>> c = COO.from_parts([1.0], [0], [1], (2, 2))
    >>> sampled_addmm(c, jnp.ones((2, 3)), jnp.ones((3, 2)), beta=10.0).data.tolist()
    [13.0]
    """
    sampled = sampled_matmul(c, x, y)
    return sampled.replace(data=alpha * sampled.data + beta * c.data)  # pyright: ignore


# --- sparse times sparse -------------------------------------------------------------------------


def count_products(a: SparseMatrix, b: SparseMatrix) -> int:
    """Scalar products that `a @ b` takes: the `products=` of `matmul` under jit.

    Raises:
      ValueError: more than an i32 can count.

    >>> import jax.numpy as jnp
    >>> a = CSR.from_dense(jnp.ones((2, 3)))
    >>> count_products(a, a.T)
    12
    """
    _, col = to_coo(a).coordinates()
    row, _ = to_coo(b).coordinates()
    lengths = np.bincount(np.asarray(row), minlength=b.shape[0] + 1)[: b.shape[0]]
    uses = np.bincount(np.asarray(col), minlength=a.shape[1] + 1)[: a.shape[1]]
    total = int(np.dot(uses.astype(np.int64), lengths.astype(np.int64)))
    if total >= 2**31:
        raise ValueError(f"{total} scalar products do not fit i32 indices: multiply row blocks")
    return total


def _sparse_sparse(a: Any, b: Any, nse: int | None, products: int | None) -> Any:
    if a.batch_shape or b.batch_shape:
        raise ValueError("sparse @ sparse takes single matrices: use jax.vmap with nse=, products=")
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"sizes differ: {a.shape=} @ {b.shape=}")
    if isinstance(a, CSC):
        return _sparse_sparse(to_csr(b.T), a.T, nse, products).T
    as_coo = isinstance(a, COO)
    a, b = to_coo(a), to_csr(b)
    if any(isinstance(x, Tracer) for x in jax.tree.leaves((a, b))):
        if nse is None or products is None:
            raise ValueError("under jit sparse @ sparse needs nse= and products= (count_products)")
    else:
        needed = count_products(a, b)
        products = capacity(products, np.asarray(needed), "products")  # pyright: ignore
        if nse is None:
            nse = int(_count_result(a, b, products=products))
    out, count = _multiply(a, b, nse=nse, products=products)
    if not isinstance(count, Tracer):
        capacity(nse, count)
    return out.to_coo() if as_coo else out


def _expand(a: COO, b: CSR, products: int) -> tuple[Array, Array, Array, Array, Array]:
    """Every scalar product's (entry of a, entry of b, row, column), and how many there are."""
    row_of_b = jnp.diff(b.indptr)
    each = jnp.where(a.row < a.shape[0], row_of_b.at[a.col].get(mode="fill", fill_value=0), 0)
    ends = jnp.cumsum(each, dtype=jnp.int32)
    starts = jnp.concatenate([jnp.zeros(1, jnp.int32), ends])
    left = major_ids(starts, products)  # past the last product: a.nse, out of range
    slot = jnp.arange(products, dtype=jnp.int32) - starts.at[left].get(mode="clip")
    k = a.col.at[left].get(mode="clip")
    right = b.indptr.at[k].get(mode="clip") + slot
    beyond = left >= a.nse
    row = jnp.where(beyond, a.shape[0], a.row.at[left].get(mode="clip"))
    col = jnp.where(beyond, b.shape[1], b.indices.at[right].get(mode="clip"))
    return left, right, row, col, starts[-1]


@functools.partial(jax.jit, static_argnames=("products",))
def _count_result(a: COO, b: CSR, *, products: int) -> Array:
    *_, row, col, _ = _expand(a, b, products)
    return distinct(row, col, (a.shape[0], b.shape[1]), 0)[3]


@functools.partial(jax.jit, static_argnames=("nse", "products"))
def _multiply(a: COO, b: CSR, *, nse: int, products: int) -> tuple[CSR, Array]:
    """Expand, sort, compress (Bell, Dalton & Olson, 2012)."""
    with jax.named_scope("spgemm"):
        M, N = a.shape[0], b.shape[1]
        left, right, row, col, wanted = _expand(a, b, products)
        row, col, place, count = distinct(row, col, (M, N), nse)
        dtype = jnp.result_type(a.data, b.data)
        acc = accumulator(dtype)
        x = a.data.astype(acc).at[left].get(mode="fill", fill_value=0)
        y = b.data.astype(acc).at[right].get(mode="fill", fill_value=0)
        data = jnp.zeros(nse, acc).at[place].add(x * y, mode="drop").astype(dtype)
        data = poisoned(data, (count > nse) | (wanted > products))
        return CSR(data, col, offsets_of(row, M), (M, N), row), count
