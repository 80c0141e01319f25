"""What the sparse formats share: properties, conversions and operators as methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Self

import jax
import jax.numpy as jnp

if TYPE_CHECKING:
    from .formats import BSR, COO, CSC, CSR

Array = jax.Array


class SparseMatrix:
    """What the formats share: properties and operators; the maths is in sibling modules."""

    data: Array
    shape: tuple[int, int]
    core_ndim: ClassVar[int] = 1  # axes of `data` that belong to one matrix
    __array_ufunc__ = None  # numpy_array @ sparse asks __rmatmul__

    @property
    def dtype(self) -> Any:
        """The dtype of the values."""
        return self.data.dtype

    @property
    def ndim(self) -> int:
        """2, and the batch axes of a stack."""
        return 2 + len(self.batch_shape)

    @property
    def batch_shape(self) -> tuple[int, ...]:
        """Leading axes of a stack of matrices; () for one matrix."""
        return self.data.shape[: self.data.ndim - self.core_ndim]

    @property
    def nse(self) -> int:
        """The capacity: entries (blocks of BSR and BSC) that there is room for."""
        return self.data.shape[len(self.batch_shape)]

    @property
    def nnz(self) -> Array:
        """i32, used entries (blocks, for BSR and BSC); duplicates and stored zeros count."""
        raise NotImplementedError

    @property
    def T(self) -> SparseMatrix:
        """The transpose."""
        raise NotImplementedError

    def coordinates(self) -> tuple[Array, Array]:
        """(rows, columns) i32 of every stored value, broadcastable to `data`; padding is (M, N)."""
        raise NotImplementedError

    def with_data(self, data: Any) -> Self:
        """The same pattern with other values.

        Raises:
          ValueError: the shape is not that of `data`.
        """
        data = jnp.asarray(data)
        if data.shape != self.data.shape:
            raise ValueError(f"values of shape {data.shape} for a pattern of {self.data.shape}")
        return self.replace(data=data)  # pyright: ignore[reportAttributeAccessIssue]

    def astype(self, dtype: Any) -> Self:
        """The same matrix with values of another dtype."""
        return self.with_data(self.data.astype(dtype))

    def to_dense(self) -> Array:
        """`[*batch, M, N]`."""
        from .convert import to_dense

        return to_dense(self)

    def to_coo(self) -> COO:
        """As COO; the order of the entries stays."""
        from .convert import to_coo

        return to_coo(self)

    def to_csr(self) -> CSR:
        """As CSR, sorted by row, then column."""
        from .convert import to_csr

        return to_csr(self)

    def to_csc(self) -> CSC:
        """As CSC, sorted by column, then row."""
        from .convert import to_csc

        return to_csc(self)

    def to_bsr(self, block_size: tuple[int, int], *, nse: int | None = None) -> BSR:
        """As BSR; `nse` blocks, counted when not given."""
        from .convert import to_bsr

        return to_bsr(self, block_size, nse=nse)

    def to_scipy(self) -> Any:
        """As the scipy.sparse array of the same format, padding dropped."""
        from .interop import to_scipy

        return to_scipy(self)

    def to_jax(self) -> Any:
        """As `jax.experimental.sparse` BCSR (CSR; CSC gives that of the transpose) or BCOO."""
        from .interop import to_jax

        return to_jax(self)

    def coalesce(self, *, nse: int | None = None) -> Self:
        """Sorted, every coordinate once; see `aidx.arrays.coalesce`."""
        from .convert import coalesce

        return coalesce(self, nse=nse)

    def sum(self, axis: int | None = None) -> Array:
        """Sum over rows (axis 0), columns (axis 1) or all."""
        from .reduce import sum

        return sum(self, axis)

    def mean(self, axis: int | None = None) -> Array:
        """Mean over rows (axis 0), columns (axis 1) or all, zeros included."""
        from .reduce import mean

        return mean(self, axis)

    def max(self, axis: int | None = None) -> Array:
        """Maximum over rows (axis 0), columns (axis 1) or all, zeros included."""
        from .reduce import max

        return max(self, axis)

    def diagonal(self, k: int = 0) -> Array:
        """The k-th diagonal, dense."""
        from .construct import diagonal

        return diagonal(self, k)

    def __getitem__(self, key: Any) -> Any:
        """Rows, columns, elements; see `aidx.arrays.select`."""
        from .select import getitem

        return getitem(self, key)

    def __iter__(self) -> Any:
        raise TypeError("a sparse matrix has no cheap iteration over rows: index it, or to_scipy()")

    def __matmul__(self, other: Any) -> Any:
        from .matmul import matmul

        return matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        from .matmul import matmul

        return matmul(other, self)

    def __add__(self, other: Any) -> Any:
        from .elementwise import add

        return add(self, other)

    def __radd__(self, other: Any) -> Any:
        return self + other

    def __sub__(self, other: Any) -> Any:
        return self + (-other)

    def __rsub__(self, other: Any) -> Any:
        return (-self) + other

    def __mul__(self, other: Any) -> Any:
        from .elementwise import multiply

        return multiply(self, other)

    def __rmul__(self, other: Any) -> Any:
        return self * other

    def __truediv__(self, other: Any) -> Any:
        from .elementwise import divide

        return divide(self, other)

    def __neg__(self) -> Self:
        return self.with_data(-self.data)

    def __abs__(self) -> Self:
        from .elementwise import map_values

        return map_values(jnp.abs, self)
