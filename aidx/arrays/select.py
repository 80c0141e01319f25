"""Rows, columns and elements of sparse matrices."""

from __future__ import annotations

import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .convert import capacity, poisoned, to_csc, to_csr
from .formats import BSC, BSR, COO, CSC, CSR, Array, SparseMatrix, major_ids, offsets_of


def slice_rows[A: SparseMatrix](a: A, start: int, stop: int, *, nse: int | None = None) -> A:
    """Rows `start..stop` (Python's slice, step 1), in a's format and order.

    Args:
      a: one matrix; BSR and BSC are cut between blocks.
      start: static; negative ones count from the end.
      stop: as start.
      nse: the capacity; counted when not given, and a's under jit.

    Raises:
      ValueError: nse is too small, or a cut through blocks.

    >>> a = CSR.from_dense(jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
    >>> slice_rows(a, 1, 3).to_dense().tolist()
    [[0.0, 2.0], [3.0, 4.0]]
    """
    _single(a)
    start, stop, _ = slice(start, stop).indices(a.shape[0])
    blocks = isinstance(a, BSR | BSC)
    height = a.block_size[0] if blocks else 1
    if start % height or stop % height:
        raise ValueError(f"rows {start}..{stop} cut through blocks of {height}")
    row, col = a.block_coordinates() if blocks else a.coordinates()
    grid = a.shape[1] // a.block_size[1] if blocks else a.shape[1]
    kept = (row >= start // height) & (row < stop // height) & (col < grid)
    count = jnp.sum(kept)
    if nse is None and isinstance(count, Tracer):
        nse = a.nse
    rows = max(0, stop - start)
    return _cut(a, kept, start // height, rows=rows, nse=capacity(nse, count))


@functools.partial(jax.jit, static_argnames=("rows", "nse"))
def _cut(a: Any, kept: Array, start: int, *, rows: int, nse: int) -> Any:
    shape = (rows, a.shape[1])
    (at,) = jnp.nonzero(kept, size=nse, fill_value=a.nse)
    pick = lambda x, fill: x.at[at].get(mode="fill", fill_value=fill)
    data = poisoned(pick(a.data, 0), jnp.sum(kept) > nse)
    if isinstance(a, BSR | BSC):
        (bh, bw), (row, col) = a.block_size, a.block_coordinates()
        row = jnp.where(at < a.nse, pick(row, 0) - start, rows // bh)
        col = pick(col, a.shape[1] // bw)
        if isinstance(a, BSC):
            return BSC(data, row, offsets_of(col, a.shape[1] // bw), shape)
        return BSR(data, col, offsets_of(row, rows // bh), shape)
    row, col = a.coordinates()
    row = jnp.where(at < a.nse, pick(row, 0) - start, rows)
    col = pick(col, a.shape[1])
    if isinstance(a, COO):
        return COO(data, row, col, shape)
    if isinstance(a, CSC):
        return CSC(data, row, offsets_of(col, a.shape[1]), shape, col)
    return CSR(data, col, offsets_of(row, rows), shape, row)


def slice_columns[A: SparseMatrix](a: A, start: int, stop: int, *, nse: int | None = None) -> A:
    """Columns `start..stop`; as `slice_rows`.

    >>> a = CSR.from_dense(jnp.array([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]))
    >>> slice_columns(a, 1, 2).to_dense().tolist()
    [[0.0], [2.0], [4.0]]
    """
    return slice_rows(a.T, start, stop, nse=nse).T  # pyright: ignore[reportReturnType]


def take_rows[A: COO | CSR | CSC](a: A, rows: Any, *, nse: int | None = None) -> A:
    """Rows of a in the order of `rows` i32 `[n]`, repeats allowed; a row outside a is empty.

    Args:
      a: one COO, CSR or CSC.
      rows: may be traced; negative ones do not count from the end.
      nse: the capacity; counted when not given, needed under jit.

    Raises:
      ValueError: nse is missing under jit, or too small.

    >>> a = CSR.from_dense(jnp.array([[1.0, 0.0], [0.0, 2.0]]))
    >>> take_rows(a, jnp.array([1, 1, 0])).to_dense().tolist()
    [[0.0, 2.0], [0.0, 2.0], [1.0, 0.0]]
    """
    _single(a)
    if isinstance(a, BSR | BSC):
        name = type(a).__name__
        raise TypeError(f"rows of a {name} come in blocks: slice_rows, or .to_csr() first")
    rows = jnp.asarray(rows, jnp.int32)
    if rows.ndim != 1:
        raise ValueError(f"rows must be a vector, not {rows.shape}")
    csr = to_csr(a)
    lengths = _lengths(csr, rows)
    out = _take(csr, rows, nse=capacity(nse, jnp.sum(lengths)))
    if isinstance(a, COO):
        return out.to_coo()  # pyright: ignore[reportReturnType]
    return to_csc(out) if isinstance(a, CSC) else out  # pyright: ignore[reportReturnType]


def _lengths(a: CSR, rows: Array) -> Array:
    there = (rows >= 0) & (rows < a.shape[0])
    return jnp.where(there, jnp.diff(a.indptr).at[rows].get(mode="clip"), 0)


@functools.partial(jax.jit, static_argnames=("nse",))
def _take(a: CSR, rows: Array, *, nse: int) -> CSR:
    n = rows.shape[0]
    ends = jnp.cumsum(_lengths(a, rows), dtype=jnp.int32)
    wanted = ends[-1] if n else jnp.int32(0)
    offsets = jnp.minimum(jnp.concatenate([jnp.zeros(1, jnp.int32), ends]), nse)
    row = major_ids(offsets, nse)
    shift = a.indptr.at[rows].get(mode="clip") - offsets[:-1]
    at = jnp.arange(nse, dtype=jnp.int32) + shift.at[row].get(mode="clip")
    used = row < n
    data = jnp.where(used, a.data.at[at].get(mode="clip"), jnp.zeros((), a.dtype))
    indices = jnp.where(used, a.indices.at[at].get(mode="clip"), a.shape[1])
    data = poisoned(data, wanted > nse)
    return CSR(data, indices, offsets, (n, a.shape[1]), row)


def getitem(a: SparseMatrix, key: Any) -> Any:
    """`a[key]`: an int gives a dense row, a pair of ints an element, slices and rows a matrix.

    Slices are those of Python with step 1; a vector of integers takes rows.

    Raises:
      TypeError: another key.
      IndexError: an int out of range.

    >>> a = CSR.from_dense(jnp.array([[1.0, 0.0], [0.0, 2.0]]))
    >>> a[1].tolist(), float(a[1, 1]), a[:1].to_dense().tolist()
    ([0.0, 2.0], 2.0, [[1.0, 0.0]])
    """
    _single(a)
    row_key: Any
    row_key, col_key = key if isinstance(key, tuple) and len(key) == 2 else (key, slice(None))
    if isinstance(row_key, slice):
        out = slice_rows(a, *_bounds(row_key, a.shape[0]))
    elif jnp.ndim(row_key) == 1:
        out = take_rows(a, row_key)  # pyright: ignore[reportArgumentType]
    else:
        out = _dense_row(a, _index(row_key, a.shape[0]))
    if isinstance(col_key, slice):
        if isinstance(out, jax.Array):
            return out[col_key]
        whole = _bounds(col_key, a.shape[1]) == (0, a.shape[1])
        return out if whole else slice_columns(out, *_bounds(col_key, a.shape[1]))
    at = _index(col_key, a.shape[1])
    return out[at] if isinstance(out, jax.Array) else _dense_row(out.T, at)


@jax.jit
def _dense_row(a: SparseMatrix, i: Array) -> Array:
    row, col = a.coordinates()
    data = jnp.where(row == i, a.data, jnp.zeros((), a.dtype))
    col = jnp.broadcast_to(col, data.shape)
    return jnp.zeros(a.shape[1], a.dtype).at[col].add(data, mode="drop")


def _bounds(key: slice, size: int) -> tuple[int, int]:
    start, stop, step = key.indices(size)
    if step != 1:
        raise TypeError(f"slices of sparse matrices have step 1, not {step}")
    return start, max(start, stop)


def _index(key: Any, size: int) -> Any:
    if isinstance(key, Tracer):
        return key
    i = operator.index(key)
    if not -size <= i < size:
        raise IndexError(f"{i} of {size}")
    return i % size


def _single(a: SparseMatrix) -> None:
    if a.batch_shape:
        raise ValueError(f"a stack of {a.batch_shape} matrices: unstack it, or use vmap")
