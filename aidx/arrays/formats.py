"""`COO`, `CSR`, `CSC`, `BSR`, `BSC`: sparse matrices as frozen pytrees of static size.

The arrays hold `nse` entries ("number of stored entries"), a capacity fixed when the array is made;
entries that are not used are padding: row M, column N, value 0, always behind the used ones in the
compressed formats.  A coordinate may be stored more than once; the matrix is the sum.  Every field
is a leaf, so a sparse matrix goes through `jit`, `vmap` and `scan` like any pytree; a stack of
matrices is one whose leaves have leading axes.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from .base import Array as Array
from .base import SparseMatrix as SparseMatrix


@struct.dataclass
class COO(SparseMatrix):
    """Coordinates: entry e adds `data[e]` at `(row[e], col[e])`.

    >>> import jax.numpy as jnp
    >>> a = COO.from_dense(jnp.array([[0.0, 2.0], [3.0, 0.0]]))
    >>> a.row.tolist(), a.col.tolist(), a.data.tolist()
    ([0, 1], [1, 0], [2.0, 3.0])
    >>> (a @ jnp.array([1.0, 10.0])).tolist()
    [20.0, 3.0]
    """

    data: Array  # [nse], any dtype
    row: Array  # [nse] i32; M in padding
    col: Array  # [nse] i32; N in padding
    shape: tuple[int, int] = struct.field(pytree_node=False)

    @classmethod
    def from_parts(cls, data: Any, row: Any, col: Any, shape: tuple[int, int]) -> COO:
        """COO of these arrays, checked.

        Raises:
          ValueError: lengths that differ, or a coordinate outside `shape` that is not padding.
        """
        data, row, col = jnp.asarray(data), _indices(row), _indices(col)
        shape = _static_shape(shape)
        if not data.shape == row.shape == col.shape:
            raise ValueError(f"{data.shape=}, {row.shape=} and {col.shape=} must be equal")
        return checked(cls(data, row, col, shape))

    @classmethod
    def from_dense(cls, x: Any, *, nse: int | None = None, tolerance: float = 0.0) -> COO:
        """Entries of x whose magnitude exceeds `tolerance`; see `aidx.arrays.from_dense`."""
        from .convert import from_dense

        return from_dense(x, cls, nse=nse, tolerance=tolerance)

    @classmethod
    def from_scipy(cls, matrix: Any, *, nse: int | None = None) -> COO:
        """A scipy.sparse matrix or array of any format; `nse` pads."""
        from .interop import from_scipy

        return from_scipy(matrix, cls, nse=nse)

    @property
    def nnz(self) -> Array:
        """i32 `[*batch]`, used entries."""
        return jnp.sum(self.row < self.shape[0], axis=-1, dtype=jnp.int32)

    @property
    def T(self) -> COO:
        """The transpose; the arrays are shared."""
        return COO(self.data, self.col, self.row, (self.shape[1], self.shape[0]))

    def coordinates(self) -> tuple[Array, Array]:
        """(rows, columns) of every stored value."""
        return self.row, self.col


@struct.dataclass
class CSR(SparseMatrix):
    """Compressed rows: row i owns entries `indptr[i]:indptr[i + 1]`.

    `row_ids` is `coordinates()[0]`, kept because most operations outside the CPU's and cuSPARSE's
    products need it; None means: derive it when needed.

    >>> import jax.numpy as jnp
    >>> a = CSR.from_dense(jnp.array([[0.0, 2.0], [3.0, 4.0]]))
    >>> a.indptr.tolist(), a.indices.tolist()
    ([0, 1, 3], [1, 0, 1])
    >>> (a @ a).to_dense().tolist()
    [[6.0, 8.0], [12.0, 22.0]]
    """

    data: Array  # [nse], any dtype
    indices: Array  # [nse] i32, columns; N in padding
    indptr: Array  # [M + 1] i32, from 0
    shape: tuple[int, int] = struct.field(pytree_node=False)
    row_ids: Array | None = None  # [nse] i32; M in padding

    @classmethod
    def from_parts(cls, data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> CSR:
        """CSR of these arrays, checked; what lies past `indptr[-1]` is padding.

        Raises:
          ValueError: an indptr that does not ascend from 0 to at most nse, a column outside
            `shape`, or lengths that do not fit.
        """
        return _compressed(cls, data, indices, indptr, shape, _static_shape(shape)[0])

    @classmethod
    def from_dense(cls, x: Any, *, nse: int | None = None, tolerance: float = 0.0) -> CSR:
        """Entries of x whose magnitude exceeds `tolerance`; see `aidx.arrays.from_dense`."""
        from .convert import from_dense

        return from_dense(x, cls, nse=nse, tolerance=tolerance)

    @classmethod
    def from_scipy(cls, matrix: Any, *, nse: int | None = None) -> CSR:
        """A scipy.sparse matrix or array of any format; `nse` pads."""
        from .interop import from_scipy

        return from_scipy(matrix, cls, nse=nse)

    @property
    def nnz(self) -> Array:
        """i32 `[*batch]`, used entries."""
        return self.indptr[..., -1]

    @property
    def T(self) -> CSC:
        """The transpose; the arrays are shared."""
        return CSC(
            self.data, self.indices, self.indptr, (self.shape[1], self.shape[0]), self.row_ids
        )

    def coordinates(self) -> tuple[Array, Array]:
        """(rows, columns) of every stored value."""
        return _major_ids(self, self.row_ids), self.indices


@struct.dataclass
class CSC(SparseMatrix):
    """Compressed columns: column j owns entries `indptr[j]:indptr[j + 1]`.

    >>> import jax.numpy as jnp
    >>> CSC.from_dense(jnp.array([[0.0, 2.0], [3.0, 4.0]])).indices.tolist()
    [1, 0, 1]
    """

    data: Array  # [nse], any dtype
    indices: Array  # [nse] i32, rows; M in padding
    indptr: Array  # [N + 1] i32, from 0
    shape: tuple[int, int] = struct.field(pytree_node=False)
    col_ids: Array | None = None  # [nse] i32; N in padding

    @classmethod
    def from_parts(cls, data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> CSC:
        """CSC of these arrays, checked; what lies past `indptr[-1]` is padding.

        Raises:
          ValueError: as `CSR.from_parts`.
        """
        return _compressed(cls, data, indices, indptr, shape, _static_shape(shape)[1])

    @classmethod
    def from_dense(cls, x: Any, *, nse: int | None = None, tolerance: float = 0.0) -> CSC:
        """Entries of x whose magnitude exceeds `tolerance`; see `aidx.arrays.from_dense`."""
        from .convert import from_dense

        return from_dense(x, cls, nse=nse, tolerance=tolerance)

    @classmethod
    def from_scipy(cls, matrix: Any, *, nse: int | None = None) -> CSC:
        """A scipy.sparse matrix or array of any format; `nse` pads."""
        from .interop import from_scipy

        return from_scipy(matrix, cls, nse=nse)

    @property
    def nnz(self) -> Array:
        """i32 `[*batch]`, used entries."""
        return self.indptr[..., -1]

    @property
    def T(self) -> CSR:
        """The transpose; the arrays are shared."""
        return CSR(
            self.data, self.indices, self.indptr, (self.shape[1], self.shape[0]), self.col_ids
        )

    def coordinates(self) -> tuple[Array, Array]:
        """(rows, columns) of every stored value."""
        return self.indices, _major_ids(self, self.col_ids)


@struct.dataclass
class BSR(SparseMatrix):
    """Compressed rows of dense blocks `[bh, bw]`; M and N are multiples of the block's sides.

    >>> import jax.numpy as jnp
    >>> a = BSR.from_dense(jnp.eye(4), block_size=(2, 2))
    >>> a.data.shape, a.indices.tolist()
    ((2, 2, 2), [0, 1])
    """

    data: Array  # [nse, bh, bw], any dtype
    indices: Array  # [nse] i32, block columns; N // bw in padding
    indptr: Array  # [M // bh + 1] i32, from 0
    shape: tuple[int, int] = struct.field(pytree_node=False)
    core_ndim: ClassVar[int] = 3

    @classmethod
    def from_parts(cls, data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> BSR:
        """BSR of these arrays, checked; what lies past `indptr[-1]` is padding.

        Raises:
          ValueError: as `CSR.from_parts`, or blocks that do not divide `shape`.
        """
        data, (M, N) = jnp.asarray(data), _static_shape(shape)
        if data.ndim < 3 or 0 in data.shape[-2:] or M % data.shape[-2] or N % data.shape[-1]:
            raise ValueError(f"blocks of {data.shape=} do not divide {shape=}")
        return _compressed(cls, data, indices, indptr, shape, M // data.shape[-2])

    @classmethod
    def from_dense(
        cls,
        x: Any,
        *,
        block_size: tuple[int, int],
        nse: int | None = None,
        tolerance: float = 0.0,
    ) -> BSR:
        """Blocks of x that hold a magnitude above `tolerance`; `nse` blocks."""
        from .convert import bsr_from_dense

        return bsr_from_dense(x, block_size, nse=nse, tolerance=tolerance)

    @classmethod
    def from_scipy(
        cls, matrix: Any, *, block_size: tuple[int, int] | None = None, nse: int | None = None
    ) -> BSR:
        """A scipy.sparse matrix or array; `block_size` is needed unless it is BSR."""
        from .interop import bsr_from_scipy

        return bsr_from_scipy(matrix, block_size=block_size, nse=nse)

    @property
    def block_size(self) -> tuple[int, int]:
        """(bh, bw)."""
        return self.data.shape[-2], self.data.shape[-1]

    @property
    def nnz(self) -> Array:
        """i32 `[*batch]`, used blocks."""
        return self.indptr[..., -1]

    @property
    def T(self) -> BSC:
        """The transpose; the arrays are shared."""
        return BSC(self.data, self.indices, self.indptr, (self.shape[1], self.shape[0]))

    def block_coordinates(self) -> tuple[Array, Array]:
        """(block rows, block columns) i32 `[nse]`; padding is (M // bh, N // bw)."""
        return _major_ids(self, None), self.indices

    def coordinates(self) -> tuple[Array, Array]:
        """(rows `[nse, bh, 1]`, columns `[nse, 1, bw]`) of every stored value."""
        (bh, bw), (rows, cols) = self.block_size, self.block_coordinates()
        inside = lambda n: jnp.arange(n, dtype=jnp.int32)
        lead = (1,) * (rows.ndim)
        row = rows[..., None, None] * bh + inside(bh).reshape(*lead, bh, 1)
        col = cols[..., None, None] * bw + inside(bw).reshape(*lead, 1, bw)
        return row, col


@struct.dataclass
class BSC(SparseMatrix):
    """Compressed columns of dense blocks: the transpose of a BSR, sharing its arrays.

    A block is stored as it stands there: entry e adds `data[e].T`.

    >>> import jax.numpy as jnp
    >>> a = BSR.from_dense(jnp.arange(8.0).reshape(2, 4), block_size=(1, 2)).T
    >>> type(a).__name__, a.shape, a.block_size, a.data.shape
    ('BSC', (4, 2), (2, 1), (4, 1, 2))
    >>> a.to_dense().tolist()
    [[0.0, 4.0], [1.0, 5.0], [2.0, 6.0], [3.0, 7.0]]
    """

    data: Array  # [nse, bw, bh], any dtype
    indices: Array  # [nse] i32, block rows; M // bh in padding
    indptr: Array  # [N // bw + 1] i32, from 0
    shape: tuple[int, int] = struct.field(pytree_node=False)
    core_ndim: ClassVar[int] = 3

    @classmethod
    def from_parts(cls, data: Any, indices: Any, indptr: Any, shape: tuple[int, int]) -> BSC:
        """BSC of these arrays, checked; what lies past `indptr[-1]` is padding.

        Raises:
          ValueError: as `BSR.from_parts`.
        """
        M, N = _static_shape(shape)
        return BSR.from_parts(data, indices, indptr, (N, M)).T

    @classmethod
    def from_dense(
        cls,
        x: Any,
        *,
        block_size: tuple[int, int],
        nse: int | None = None,
        tolerance: float = 0.0,
    ) -> BSC:
        """Blocks of x that hold a magnitude above `tolerance`; `nse` blocks."""
        turned = jnp.asarray(x).swapaxes(-1, -2)
        options: Any = dict(block_size=block_size[::-1], nse=nse, tolerance=tolerance)
        return BSR.from_dense(turned, **options).T

    @classmethod
    def from_scipy(
        cls, matrix: Any, *, block_size: tuple[int, int] | None = None, nse: int | None = None
    ) -> BSC:
        """A scipy.sparse matrix or array; `block_size` is needed unless it is BSR."""
        turned = None if block_size is None else (block_size[1], block_size[0])
        return BSR.from_scipy(matrix.T, block_size=turned, nse=nse).T

    @property
    def block_size(self) -> tuple[int, int]:
        """(bh, bw)."""
        return self.data.shape[-1], self.data.shape[-2]

    @property
    def nnz(self) -> Array:
        """i32 `[*batch]`, used blocks."""
        return self.indptr[..., -1]

    @property
    def T(self) -> BSR:
        """The transpose; the arrays are shared."""
        return BSR(self.data, self.indices, self.indptr, (self.shape[1], self.shape[0]))

    def block_coordinates(self) -> tuple[Array, Array]:
        """(block rows, block columns) i32 `[nse]`; padding is (M // bh, N // bw)."""
        col, row = self.T.block_coordinates()
        return row, col

    def coordinates(self) -> tuple[Array, Array]:
        """(rows `[nse, 1, bh]`, columns `[nse, bw, 1]`) of every stored value."""
        col, row = self.T.coordinates()
        return row, col


# --- checks --------------------------------------------------------------------------------------


def checked[A: SparseMatrix](a: A) -> A:
    """`a`, once its pattern is seen to be consistent (what is traced cannot be seen).

    Raises:
      ValueError: the first inconsistency, with its place.

    >>> import jax.numpy as jnp
    >>> checked(COO(jnp.ones(1), jnp.array([5]), jnp.array([0]), (2, 2)))
    Traceback (most recent call last):
        ...
    ValueError: entry 0 is at (5, 0), outside (2, 2)
    """
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(a)):
        return a
    (M, N), blocks = a.shape, a.block_size if isinstance(a, BSR | BSC) else (1, 1)
    M, N = M // blocks[0], N // blocks[1]
    if isinstance(a, COO):
        row, col = np.asarray(a.row), np.asarray(a.col)
        inside = (row >= 0) & (row < M) & (col >= 0) & (col < N)
        wrong = ~inside & ~((row == M) & (col == N))
        if wrong.any():
            at = int(np.argmax(wrong.ravel()))
            place = (int(row.ravel()[at]), int(col.ravel()[at]))
            raise ValueError(f"entry {at} is at {place}, outside {a.shape}")
        return a
    assert isinstance(a, CSR | CSC | BSR | BSC)
    indptr = np.asarray(a.indptr).reshape(-1, a.indptr.shape[-1])
    indices = np.asarray(a.indices).reshape(len(indptr), -1)
    minor = M if isinstance(a, CSC | BSC) else N
    for pointers, ids in zip(indptr, indices, strict=True):
        if pointers[0] != 0 or (np.diff(pointers) < 0).any() or pointers[-1] > a.nse:
            raise ValueError(f"indptr must ascend from 0 to at most nse={a.nse}: {pointers}")
        used = ids[: pointers[-1]]
        if used.size and (used.min() < 0 or used.max() >= minor):
            raise ValueError(
                f"indices must be in [0, {minor}); they span [{used.min()}, {used.max()}]"
            )
    return a


def _compressed(
    cls: Any, data: Any, indices: Any, indptr: Any, shape: tuple[int, int], major: int
) -> Any:
    """The checked array of class `cls` with its padding brought to the house's form."""
    data, indices, indptr = jnp.asarray(data), _indices(indices), _indices(indptr)
    shape = _static_shape(shape)
    lead = data.shape[: data.ndim - cls.core_ndim]
    if indices.shape != data.shape[: len(lead) + 1]:
        raise ValueError(f"{indices.shape=} must match {data.shape=}")
    if indptr.shape != (*lead, major + 1):
        raise ValueError(f"{indptr.shape=} must be {(*lead, major + 1)} for {shape=}")
    a = checked(cls(data, indices, indptr, shape))
    minor = shape[0] if cls is CSC else shape[1] // (a.block_size[1] if cls is BSR else 1)
    used = jnp.arange(a.nse, dtype=jnp.int32) < indptr[..., -1:]
    values = used.reshape(*used.shape, *(1,) * (cls.core_ndim - 1))
    return a.replace(data=jnp.where(values, data, 0), indices=jnp.where(used, indices, minor))


def _static_shape(shape: Any) -> tuple[int, int]:
    M, N = (int(n) for n in shape)
    if M < 0 or N < 0 or max(M, N) >= 2**31 - 1:
        raise ValueError(f"shape={tuple(shape)} must be two sizes below 2^31 - 1")
    return M, N


def _indices(x: Any) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"indices must be integers, not {x.dtype}")
    return x.astype(jnp.int32)


def _major_ids(a: Any, kept: Array | None) -> Array:
    """The row (CSR, BSR) or column (CSC) of every entry."""
    if kept is not None:
        return kept
    derive = lambda p: major_ids(p, a.nse)
    for _ in a.batch_shape:
        derive = jax.vmap(derive)
    return derive(a.indptr)


def major_ids(indptr: Array, nse: int) -> Array:
    """i32 `[nse]`: which of the compressed rows owns each entry; their number in padding.

    >>> import jax.numpy as jnp
    >>> major_ids(jnp.array([0, 2, 2, 3]), 5).tolist()
    [0, 0, 2, 3, 3]
    """
    starts = jnp.zeros(nse + 1, jnp.int32).at[indptr[1:]].add(1, mode="drop")
    return jnp.cumsum(starts[:nse], dtype=jnp.int32)


def offsets_of(ids: Array, count: int) -> Array:
    """i32 `[count + 1]`: the offsets of ascending ids; ids of `count` and more are padding.

    >>> import jax.numpy as jnp
    >>> offsets_of(jnp.array([0, 0, 2, 3, 3]), 3).tolist()
    [0, 2, 2, 3]
    """
    sizes = jnp.zeros(count, jnp.int32).at[ids].add(1, mode="drop")
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(sizes, dtype=jnp.int32)])
