"""scipy.sparse and `jax.experimental.sparse`, both ways."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .formats import BSC, BSR, COO, CSC, CSR, Array, SparseMatrix


def from_scipy(matrix: Any, cls: Any = CSR, *, nse: int | None = None) -> Any:
    """A scipy.sparse matrix or array as COO, CSR or CSC.

    Args:
      matrix: any scipy.sparse format.
      cls: COO, CSR or CSC.
      nse: the capacity; the matrix's own number of entries when not given.

    Raises:
      ValueError: nse is too small.

    >>> import scipy.sparse
    >>> from_scipy(scipy.sparse.eye_array(2), CSR).indices.tolist()
    [0, 1]
    """
    if cls is BSR:
        return bsr_from_scipy(matrix, nse=nse)
    M, N = matrix.shape
    if cls is COO:
        source = matrix.tocoo()
        row, col = _padded(source.row, nse, M), _padded(source.col, nse, N)
        return COO(_padded(source.data, nse, 0), row, col, (M, N))
    source = matrix.tocsr() if cls is CSR else matrix.tocsc()
    major, minor = (M, N) if cls is CSR else (N, M)
    ids = np.repeat(np.arange(major, dtype=np.int32), np.diff(source.indptr))
    return cls(
        _padded(source.data, nse, 0),
        _padded(source.indices, nse, minor),
        jnp.asarray(source.indptr, jnp.int32),
        (M, N),
        _padded(ids, nse, major),
    )


def bsr_from_scipy(
    matrix: Any, *, block_size: tuple[int, int] | None = None, nse: int | None = None
) -> BSR:
    """A scipy.sparse matrix or array as BSR; `nse` counts blocks.

    Raises:
      ValueError: no block_size and the matrix is not BSR; nse is too small.

    >>> import scipy.sparse
    >>> bsr_from_scipy(scipy.sparse.eye_array(4), block_size=(2, 2)).indices.tolist()
    [0, 1]
    """
    if block_size is None and matrix.format != "bsr":
        raise ValueError(f"block_size= must be given for a scipy matrix of format {matrix.format}")
    source = matrix.tobsr(block_size) if block_size else matrix
    M, N = source.shape
    return BSR(
        _padded(source.data, nse, 0),
        _padded(source.indices, nse, N // source.blocksize[1]),
        jnp.asarray(source.indptr, jnp.int32),
        (M, N),
    )


def to_scipy(a: SparseMatrix) -> Any:
    """The scipy.sparse array of the same format, without the padding (needs scipy).

    Raises:
      ValueError: a stack of matrices, which scipy has no form for.

    >>> import jax.numpy as jnp
    >>> to_scipy(CSR.from_dense(jnp.eye(2))).toarray().tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """
    import scipy.sparse

    if a.batch_shape:
        raise ValueError(f"scipy has no stack of matrices; {a.batch_shape=}")
    if isinstance(a, COO):
        row, col, data = (np.asarray(x) for x in (a.row, a.col, a.data))
        used = row < a.shape[0]
        return scipy.sparse.coo_array((data[used], (row[used], col[used])), a.shape)
    if isinstance(a, BSC):  # which scipy lacks
        return to_scipy(a.T).T
    make = {
        CSR: scipy.sparse.csr_array,
        CSC: scipy.sparse.csc_array,
        BSR: scipy.sparse.bsr_array,
    }[type(a)]
    indptr = np.asarray(a.indptr)  # pyright: ignore[reportAttributeAccessIssue]
    indices = np.asarray(a.indices)  # pyright: ignore[reportAttributeAccessIssue]
    return make((np.asarray(a.data)[: indptr[-1]], indices[: indptr[-1]], indptr), a.shape)


def to_jax(a: SparseMatrix) -> Any:
    """`jax.experimental.sparse`: BCOO of COO, BSR and BSC, BCSR of CSR, BCSR of CSC's transpose.

    CSR and CSC share their arrays with the result; COO's index vectors are stacked.

    >>> import jax.numpy as jnp
    >>> type(to_jax(CSR.from_dense(jnp.eye(2)))).__name__
    'BCSR'
    """
    from jax.experimental import sparse

    if isinstance(a, CSC):
        return to_jax(a.T)
    if isinstance(a, CSR):
        shape = (*a.batch_shape, *a.shape)
        return sparse.BCSR((a.data, a.indices, a.indptr), shape=shape)
    coo = a.to_coo()
    indices = jnp.stack([coo.row, coo.col], axis=-1)
    return sparse.BCOO((coo.data, indices), shape=(*a.batch_shape, *a.shape))


def from_jax(matrix: Any) -> COO | CSR:
    """BCOO as COO, BCSR as CSR; batch axes become a stack.

    A BCSR without padding shares its arrays with the result.

    Raises:
      TypeError: something else.
      ValueError: dense axes, a matrix of another rank, or a BCOO with broadcast batch axes.

    >>> import jax.numpy as jnp
    >>> from jax.experimental import sparse
    >>> from_jax(sparse.BCOO.fromdense(jnp.eye(2))).row.tolist()
    [0, 1]
    """
    from jax.experimental import sparse

    if not isinstance(matrix, sparse.BCOO | sparse.BCSR):
        raise TypeError(f"a BCOO or BCSR is needed, not {type(matrix).__name__}")
    shape, batch = matrix.shape, matrix.n_batch
    if matrix.n_dense or len(shape) - batch != 2:
        raise ValueError(f"two sparse axes and no dense ones are needed: {matrix}")
    lead = shape[:batch]
    if matrix.data.shape[:batch] != lead or matrix.indices.shape[:batch] != lead:
        raise ValueError(f"batch axes must be spelled out: {matrix.data.shape=} for {shape=}")
    M, N = shape[batch:]
    if isinstance(matrix, sparse.BCSR):
        ends = matrix.indptr[..., -1]
        if not isinstance(ends, Tracer) and bool((ends == matrix.nse).all()):
            return CSR(matrix.data, matrix.indices, matrix.indptr, (M, N))
        return CSR.from_parts(matrix.data, matrix.indices, matrix.indptr, (M, N))
    row, col = matrix.indices[..., 0], matrix.indices[..., 1]
    # A BCOO may pad along one axis only; here padding is outside along both.
    padding = (row >= M) | (col >= N)
    outside = lambda ids, size: jnp.where(padding, size, ids).astype(jnp.int32)
    data = jnp.where(padding, jnp.zeros((), matrix.data.dtype), matrix.data)
    return COO(data, outside(row, M), outside(col, N), (M, N))


def _padded(x: Any, nse: int | None, fill: int) -> Array:
    x = np.asarray(x)
    size = len(x) if nse is None else nse
    if size < len(x):
        raise ValueError(f"nse={nse} is too small: {len(x)} entries are needed")
    widths = [(0, size - len(x)), *[(0, 0)] * (x.ndim - 1)]
    return jnp.asarray(np.pad(x, widths, constant_values=fill))
