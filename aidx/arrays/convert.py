"""From dense and back, one format into another, sorting and summing duplicates.

Capacities are static.  Where a result's size depends on data, `nse=` names the capacity; outside
`jit` it may be left out and the entries are counted.  A capacity that is too small is a ValueError
where the values can be seen; under `jit` nothing can be raised, so floating values become NaN.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .formats import BSC, BSR, COO, CSC, CSR, Array, SparseMatrix, offsets_of


def to_dense(a: SparseMatrix) -> Array:
    """`[*batch, M, N]`: duplicates are summed.

    >>> to_dense(COO.from_parts([1.0, 2.0], [0, 0], [1, 1], (1, 2))).tolist()
    [[0.0, 3.0]]
    """
    return _over_batch(_to_dense, a)


@jax.jit
def _to_dense(a: SparseMatrix) -> Array:
    with jax.named_scope("to_dense"):
        row, col = a.coordinates()
        x = jnp.zeros(a.shape, a.data.dtype)
        if a.data.dtype == jnp.bool_:
            return x.at[row, col].max(a.data, mode="drop")
        return x.at[row, col].add(a.data, mode="drop")


def from_dense[A: COO | CSR | CSC](
    x: Any, cls: type[A] = CSR, *, nse: int | None = None, tolerance: float = 0.0
) -> A:
    """The entries of x whose magnitude exceeds `tolerance`, as `cls`.

    Args:
      x: `[*batch, M, N]`; leading axes give a stack of one capacity.
      cls: COO, CSR or CSC.
      nse: the capacity; counted when not given.
      tolerance: 0 keeps all that is not zero, NaN included.

    Returns:
      `cls`, sorted; the gradient of its values goes to these entries of x.

    Raises:
      ValueError: nse is missing under jit, or too small.

    >>> import jax.numpy as jnp
    >>> from_dense(jnp.array([[0.1, 0.0], [2.0, 3.0]]), tolerance=0.5).data.tolist()
    [2.0, 3.0]
    """
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"a matrix has two axes; {x.shape=}")
    if tolerance < 0:
        raise ValueError(f"{tolerance=} must not be negative")
    keep = exceeds(x, tolerance)
    nse = capacity(nse, jnp.sum(keep, axis=(-2, -1)))
    make = functools.partial(_from_dense, cls=cls, nse=nse)
    for _ in x.shape[:-2]:
        make = jax.vmap(make)
    return make(x, keep)


def exceeds(x: Array, tolerance: float) -> Array:
    """bool: magnitudes above `tolerance`, NaN included.

    >>> import jax.numpy as jnp
    >>> exceeds(jnp.array([-2, 0, 1]), 1).tolist()
    [True, False, False]
    """
    if tolerance == 0:
        return x != 0  # exact for every dtype; |x| overflows at the least integer
    return ~(jnp.abs(x) <= tolerance)


@functools.partial(jax.jit, static_argnames=("cls", "nse"))
def _from_dense(x: Array, keep: Array, *, cls: Any, nse: int) -> Any:
    with jax.named_scope("from_dense"):
        M, N = x.shape
        shape = (M, N)
        if cls is CSC:
            return _from_dense(x.T, keep.T, cls=CSR, nse=nse).T
        row, col = jnp.nonzero(keep, size=nse, fill_value=(M, N))
        row, col = row.astype(jnp.int32), col.astype(jnp.int32)
        data = x.at[row, col].get(mode="fill", fill_value=0)
        data = poisoned(data, jnp.sum(keep) > nse)
        if cls is COO:
            return COO(data, row, col, shape)
        return CSR(data, col, offsets_of(row, M), shape, row)


def bsr_from_dense(
    x: Any, block_size: tuple[int, int], *, nse: int | None = None, tolerance: float = 0.0
) -> BSR:
    """The blocks of x that hold a magnitude above `tolerance`.

    Args:
      x: `[*batch, M, N]`.
      block_size: (bh, bw), dividing M and N.
      nse: the capacity in blocks; counted when not given.
      tolerance: 0 keeps every block that is not all zero.

    Returns:
      BSR, sorted; kept blocks are kept whole.

    Raises:
      ValueError: blocks that do not divide x; nse missing under jit or too small.

    >>> import jax.numpy as jnp
    >>> bsr_from_dense(jnp.eye(6), (3, 3)).data.shape
    (2, 3, 3)
    """
    x, (bh, bw) = jnp.asarray(x), block_size
    if x.ndim < 2 or bh < 1 or bw < 1 or x.shape[-2] % bh or x.shape[-1] % bw:
        raise ValueError(f"blocks of {block_size} do not divide {x.shape=}")
    M, N = x.shape[-2:]
    grid = x.reshape(*x.shape[:-2], M // bh, bh, N // bw, bw).swapaxes(-3, -2)
    keep = jnp.any(exceeds(grid, tolerance), axis=(-2, -1))
    nse = capacity(nse, jnp.sum(keep, axis=(-2, -1)))

    @jax.jit
    def make(grid: Array, keep: Array) -> BSR:
        row, col = jnp.nonzero(keep, size=nse, fill_value=keep.shape)
        data = grid.at[row, col].get(mode="fill", fill_value=0)
        data = poisoned(data, jnp.sum(keep) > nse)
        return BSR(data, col.astype(jnp.int32), offsets_of(row, M // bh), (M, N))

    for _ in x.shape[:-2]:
        make = jax.vmap(make)
    return make(grid, keep)


# --- between formats -----------------------------------------------------------------------------


def to_coo(a: SparseMatrix) -> COO:
    """As COO; entries stay in their order (blocks are spelled out as they are stored).

    >>> import jax.numpy as jnp
    >>> to_coo(CSR.from_dense(jnp.eye(2))).row.tolist()
    [0, 1]
    """
    if isinstance(a, COO):
        return a
    row, col = a.coordinates()
    if isinstance(a, BSR | BSC):
        M, N = a.shape
        lead = a.batch_shape
        padding = (row >= M) | (col >= N)
        flat = lambda x: jnp.broadcast_to(x, a.data.shape).reshape(*lead, -1)
        row, col = flat(jnp.where(padding, M, row)), flat(jnp.where(padding, N, col))
        return COO(a.data.reshape(*lead, -1), row, col, a.shape)
    return COO(a.data, row, col, a.shape)


def to_csr(a: SparseMatrix) -> CSR:
    """As CSR, sorted by row, then column; duplicates stay.

    >>> to_csr(COO.from_parts([1.0, 2.0], [1, 0], [0, 1], (2, 2))).data.tolist()
    [2.0, 1.0]
    """
    if isinstance(a, CSR):
        return a
    return _over_batch(_coo_to_csr, to_coo(a))


def to_csc(a: SparseMatrix) -> CSC:
    """As CSC, sorted by column, then row; duplicates stay.

    >>> to_csc(COO.from_parts([1.0, 2.0], [0, 1], [1, 0], (2, 2))).data.tolist()
    [2.0, 1.0]
    """
    if isinstance(a, CSC):
        return a
    return to_csr(to_coo(a).T).T


@jax.jit
def _coo_to_csr(a: COO) -> CSR:
    with jax.named_scope("to_csr"):
        row, col, order = sorted_order(a.row, a.col)
        data = a.data.at[order].get(mode="promise_in_bounds", unique_indices=True)
        return CSR(data, col, offsets_of(row, a.shape[0]), a.shape, row)


def sorted_order(row: Array, col: Array) -> tuple[Array, Array, Array]:
    """(rows, columns, permutation) in row-major order; equal coordinates keep their order.

    >>> import jax.numpy as jnp
    >>> sorted_order(jnp.array([1, 0, 0]), jnp.array([0, 1, 0]))[2].tolist()
    [2, 1, 0]
    """
    order = jnp.arange(row.shape[0], dtype=jnp.int32)
    row, col, order = jax.lax.sort((row, col, order), num_keys=2)
    return row, col, order


def to_bsr(a: SparseMatrix, block_size: tuple[int, int], *, nse: int | None = None) -> BSR:
    """As BSR with blocks (bh, bw); duplicates are summed.

    Args:
      a: one matrix (use `jax.vmap` with `nse=` over a stack).
      block_size: (bh, bw), dividing M and N.
      nse: the capacity in blocks; counted when not given.

    Raises:
      ValueError: blocks that do not divide the shape; nse missing under jit or too small.

    >>> import jax.numpy as jnp
    >>> to_bsr(CSR.from_dense(jnp.eye(4)), (2, 2)).data.shape
    (2, 2, 2)
    """
    bh, bw = block_size
    if bh < 1 or bw < 1 or a.shape[0] % bh or a.shape[1] % bw:
        raise ValueError(f"blocks of {block_size} do not divide {a.shape=}")
    if isinstance(a, BSR) and a.block_size == (bh, bw) and nse in (None, a.nse):
        return a
    if isinstance(a, BSC) and a.block_size == (bh, bw) and nse in (None, a.nse):
        return transpose_bsr(a.T)
    coo = to_coo(a)
    count = _count_distinct(coo.row // bh, coo.col // bw, a.shape[0] // bh)
    return _coo_to_bsr(coo, bh=bh, bw=bw, nse=capacity(nse, count))


@functools.partial(jax.jit, static_argnames=("bh", "bw", "nse"))
def _coo_to_bsr(a: COO, *, bh: int, bw: int, nse: int) -> BSR:
    M, N = a.shape[0] // bh, a.shape[1] // bw
    block_row, block_col = a.row // bh, a.col // bw
    row, col, segment, count = distinct(block_row, block_col, (M, N), nse)
    data = jnp.zeros((nse, bh, bw), a.data.dtype)
    data = data.at[segment, a.row % bh, a.col % bw].add(a.data, mode="drop")
    return BSR(poisoned(data, count > nse), col, offsets_of(row, M), a.shape)


def transpose_bsr(a: BSR) -> BSR:
    """The transpose as a BSR: blocks transposed, in row-major order again (`a.T` copies none).

    >>> import jax.numpy as jnp
    >>> x = jnp.arange(8.0).reshape(2, 4)
    >>> bool((transpose_bsr(bsr_from_dense(x, (1, 2))).to_dense() == x.T).all())
    True
    """
    return _over_batch(_transpose_bsr, a)


@jax.jit
def _transpose_bsr(a: BSR) -> BSR:
    row, col = a.block_coordinates()
    col, row, order = sorted_order(col, row)
    data = a.data.at[order].get(mode="promise_in_bounds", unique_indices=True)
    pointers = offsets_of(col, a.shape[1] // a.block_size[1])
    return BSR(data.swapaxes(-2, -1), row, pointers, (a.shape[1], a.shape[0]))


# --- sorting, duplicates -------------------------------------------------------------------------


def sort[A: SparseMatrix](a: A) -> A:
    """Entries in order: by row then column (CSC, BSC: by column then row); duplicates stay.

    >>> sort(COO.from_parts([1.0, 2.0], [1, 0], [0, 1], (2, 2))).row.tolist()
    [0, 1]
    """
    if isinstance(a, BSR):
        return transpose_bsr(transpose_bsr(a))  # pyright: ignore[reportReturnType]
    if isinstance(a, CSC | BSC):
        return sort(a.T).T  # pyright: ignore[reportReturnType]
    csr = _over_batch(_coo_to_csr, to_coo(a))
    return csr if isinstance(a, CSR) else to_coo(csr)  # pyright: ignore[reportReturnType]


def coalesce[A: SparseMatrix](a: A, *, nse: int | None = None) -> A:
    """Sorted, with every coordinate stored once: duplicates are summed; stored zeros stay.

    Args:
      a: one matrix (use `jax.vmap` with `nse=` over a stack).
      nse: the capacity; counted when not given.  `nse=a.nse` always suffices.

    Raises:
      ValueError: nse is missing under jit, or too small.

    >>> coalesce(COO.from_parts([1.0, 2.0, 4.0], [1, 0, 1], [0, 1, 0], (2, 2))).data.tolist()
    [2.0, 5.0]
    """
    if isinstance(a, CSC | BSC):
        return coalesce(a.T, nse=nse).T  # pyright: ignore[reportReturnType]
    if isinstance(a, BSR):
        row, col = a.block_coordinates()
        rows = a.shape[0] // a.block_size[0]
    else:
        (row, col), rows = a.coordinates(), a.shape[0]
    return _coalesce(a, nse=capacity(nse, _count_distinct(row, col, rows)))


@functools.partial(jax.jit, static_argnames=("nse",))
def _coalesce(a: Any, *, nse: int) -> Any:
    with jax.named_scope("coalesce"):
        block = isinstance(a, BSR)
        bh, bw = a.block_size if block else (1, 1)
        grid = (a.shape[0] // bh, a.shape[1] // bw)
        row, col = a.block_coordinates() if block else a.coordinates()
        row, col, segment, count = distinct(row, col, grid, nse)
        data = jnp.zeros((nse, *a.data.shape[1:]), a.data.dtype)
        data = data.at[segment].add(a.data, mode="drop")
        data = poisoned(data, count > nse)
        if isinstance(a, COO):
            return COO(data, row, col, a.shape)
        pointers = offsets_of(row, grid[0])
        if block:
            return BSR(data, col, pointers, a.shape)
        return CSR(data, col, pointers, a.shape, row)


def distinct(
    row: Array, col: Array, grid: tuple[int, int], nse: int
) -> tuple[Array, Array, Array, Array]:
    """The distinct coordinates inside `grid`, in row-major order.

    Returns:
      (rows `[nse]`, columns `[nse]`, padded with `grid`; for every entry its place among them,
      `nse` and more for padding and for what does not fit; how many there are).

    >>> import jax.numpy as jnp
    >>> row, col, place, count = distinct(jnp.array([1, 0, 1]), jnp.array([0, 2, 0]), (2, 3), 3)
    >>> row.tolist(), col.tolist(), place.tolist(), int(count)
    ([0, 1, 2], [2, 0, 3], [1, 0, 1], 2)
    """
    M, N = grid
    size = row.shape[0]
    sorted_row, sorted_col, order = sorted_order(row, col)
    first = (
        jnp.ones(size, bool)
        .at[1:]
        .set((sorted_row[1:] != sorted_row[:-1]) | (sorted_col[1:] != sorted_col[:-1]))
    )
    used = (sorted_row < M) & (sorted_col < N)
    place = jnp.cumsum(first, dtype=jnp.int32) - 1
    place = jnp.where(used, place, max(nse, size))
    rows = jnp.full(nse, M, jnp.int32).at[place].set(sorted_row, mode="drop")
    cols = jnp.full(nse, N, jnp.int32).at[place].set(sorted_col, mode="drop")
    segment = jnp.zeros(size, jnp.int32).at[order].set(place, unique_indices=True)
    return rows, cols, segment, jnp.sum(first & used, dtype=jnp.int32)


@functools.partial(jax.jit, static_argnames=("rows",))
def _count_distinct(row: Array, col: Array, rows: int) -> Array:
    row, col, _ = sorted_order(row, col)
    changes = (row[1:] != row[:-1]) | (col[1:] != col[:-1])
    return jnp.sum(changes & (row[1:] < rows), dtype=jnp.int32) + jnp.sum(row[:1] < rows)


def capacity(nse: int | None, needed: Array, name: str = "nse") -> int:
    """The capacity asked for, or, when None, the largest count.

    Raises:
      ValueError: None although `needed` is traced; or fewer than needed.

    >>> import jax.numpy as jnp
    >>> capacity(None, jnp.array([2, 5])), capacity(8, jnp.array(3))
    (5, 8)
    """
    if isinstance(needed, Tracer):
        if nse is None:
            raise ValueError(f"{name}= must be given under jit: the result's size depends on data")
        return int(nse)
    most = int(needed.max()) if needed.size else 0
    if nse is None:
        return most
    if nse < most:
        raise ValueError(f"{name}={nse} is too small: {most} entries are needed")
    return int(nse)


def poisoned(data: Array, overflow: Array) -> Array:
    """`data`, NaN where it floats and `overflow` is true: an error that jit cannot raise.

    >>> import jax.numpy as jnp
    >>> poisoned(jnp.ones(2), jnp.array(True)).tolist()
    [nan, nan]
    """
    if not jnp.issubdtype(data.dtype, jnp.inexact):
        return data
    return jnp.where(overflow, jnp.asarray(jnp.nan, data.dtype), data)


def _over_batch(f: Any, a: SparseMatrix) -> Any:
    for _ in a.batch_shape:
        f = jax.vmap(f)
    return f(a)
