"""Making sparse matrices: identity, diagonals, random, and putting matrices together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .convert import sorted_order, to_coo
from .formats import BSC, BSR, COO, CSC, CSR, Array, SparseMatrix


def eye(M: int, N: int | None = None, *, k: int = 0, dtype: Any = None, cls: Any = CSR) -> Any:
    """Ones on the k-th diagonal of `[M, N]` (N is M when not given), as `cls` (COO, CSR or CSC).

    >>> eye(2, 3, k=1).to_dense().tolist()
    [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    N = M if N is None else N
    length = max(0, min(M + min(k, 0), N - max(k, 0)))
    return diags([jnp.ones(length, dtype)], [k], (M, N), cls=cls)


def diags(
    diagonals: Sequence[Any],
    offsets: Sequence[int] = (0,),
    shape: tuple[int, int] | None = None,
    *,
    cls: Any = CSR,
) -> Any:
    """Dense diagonals at these offsets (positive above the main one), as COO, CSR or CSC.

    Args:
      diagonals: one vector per offset, of the length the diagonal has in `shape`.
      offsets: distinct.
      shape: the smallest square that fits when not given.
      cls: COO, CSR or CSC.

    Raises:
      ValueError: offsets that repeat, or a vector of another length.

    >>> diags([[1.0, 2.0], [5.0]], [0, 1]).to_dense().tolist()
    [[1.0, 5.0], [0.0, 2.0]]
    """
    vectors = [jnp.asarray(d) for d in diagonals]
    if len(vectors) != len(offsets) or len(set(offsets)) != len(offsets) or not vectors:
        raise ValueError(f"{len(vectors)} diagonals at {offsets=}: one each, no offset twice")
    if shape is None:
        side = len(vectors[0]) + abs(offsets[0])
        shape = (side, side)
    M, N = shape
    rows, cols = [], []
    for vector, k in zip(vectors, offsets, strict=True):
        length = max(0, min(M + min(k, 0), N - max(k, 0)))
        if vector.shape != (length,):
            raise ValueError(f"diagonal {k} of {shape} is [{length}], not {vector.shape}")
        along = jnp.arange(length, dtype=jnp.int32)
        rows.append(along - min(k, 0))
        cols.append(along + max(k, 0))
    dtype = jnp.result_type(*vectors)
    data = jnp.concatenate([v.astype(dtype) for v in vectors])
    return _as(cls, COO(data, jnp.concatenate(rows), jnp.concatenate(cols), (M, N)))


def diagonal(a: SparseMatrix, k: int = 0) -> Array:
    """The k-th diagonal `[*batch, length]`, dense; the gradient goes to the entries on it.

    >>> import jax.numpy as jnp
    >>> diagonal(CSR.from_dense(jnp.array([[1.0, 2.0], [0.0, 3.0]]))).tolist()
    [1.0, 3.0]
    """
    length = max(0, min(a.shape[0] + min(k, 0), a.shape[1] - max(k, 0)))
    f = functools.partial(_diagonal, k=k, length=length)
    for _ in a.batch_shape:
        f = jax.vmap(f)
    return f(a)


@functools.partial(jax.jit, static_argnames=("k", "length"))
def _diagonal(a: SparseMatrix, *, k: int, length: int) -> Array:
    row, col = a.coordinates()
    place = jnp.where(col - row == k, row + min(k, 0), length)
    place = jnp.where(col < a.shape[1], place, length)  # padding lies on a diagonal too
    return jnp.zeros(length, a.dtype).at[place].add(a.data, mode="drop")


def random(
    key: Array,
    shape: tuple[int, int],
    *,
    nse: int | None = None,
    density: float | None = None,
    dtype: Any = jnp.float32,
    values: Callable[..., Array] = jax.random.uniform,
    cls: Any = CSR,
) -> Any:
    """`nse` distinct places drawn uniformly, with values from `values(key, (nse,), dtype)`.

    Args:
      key: a JAX key.
      shape: (M, N).
      nse: how many entries; or
      density: their share of M * N.
      dtype: of the values.
      values: a sampler with the signature of `jax.random.normal`.
      cls: COO, CSR or CSC.

    Raises:
      ValueError: neither or both of nse and density, or more entries than places.

    >>> import jax
    >>> random(jax.random.key(0), (3, 4), nse=5).nnz.tolist()
    5
    """
    M, N = shape
    if (nse is None) == (density is None):
        raise ValueError(f"one of {nse=} and {density=} must be given")
    nse = round(density * M * N) if density is not None else nse
    assert nse is not None
    if not 0 <= nse <= M * N:
        raise ValueError(f"{nse=} entries do not fit {shape=}")
    place_key, value_key = jax.random.split(key)
    row, col = _random_places(place_key, M=M, N=N, nse=nse)
    return _as(cls, COO(values(value_key, (nse,), dtype), row, col, (M, N)))


@functools.partial(jax.jit, static_argnames=("M", "N", "nse"))
def _random_places(key: Array, *, M: int, N: int, nse: int) -> tuple[Array, Array]:
    """`nse` distinct places, sorted by row and column."""
    size = M * N
    if size <= 2**24 or nse * 8 > size:
        if size >= 2**31:
            raise ValueError(f"{nse=} of {size} places is too dense to draw: at most an eighth")
        flat = jax.random.permutation(key, size)[:nse].astype(jnp.int32)
        flat = jnp.sort(flat)
        return flat // N, flat % N
    # Twice as many draws as needed, of which at most an eighth repeat; the first nse distinct
    # ones, taken in random order, are uniform.
    keys = jax.random.split(key, 3)
    row = jax.random.randint(keys[0], (2 * nse,), 0, M, jnp.int32)
    col = jax.random.randint(keys[1], (2 * nse,), 0, N, jnp.int32)
    row, col, _ = sorted_order(row, col)
    repeats = jnp.zeros(2 * nse, bool).at[1:].set((row[1:] == row[:-1]) & (col[1:] == col[:-1]))
    rank = jnp.where(repeats, jnp.inf, jax.random.uniform(keys[2], (2 * nse,)))
    chosen = jnp.sort(jnp.argsort(rank)[:nse])
    return row[chosen], col[chosen]


# --- putting together ----------------------------------------------------------------------------


def vstack(matrices: Sequence[SparseMatrix], *, cls: Any = None) -> Any:
    """Matrices of equal width above one another; as `cls`, the first one's format by default.

    >>> vstack([eye(1), eye(1)]).to_dense().tolist()
    [[1.0], [1.0]]
    """
    _check(matrices)
    widths = {m.shape[1] for m in matrices}
    if len(widths) != 1:
        raise ValueError(f"widths differ: {[m.shape for m in matrices]}")
    return _placed(matrices, along_rows=True, along_cols=False, cls=cls)


def hstack(matrices: Sequence[SparseMatrix], *, cls: Any = None) -> Any:
    """Matrices of equal height side by side; as `cls`, the first one's format by default.

    >>> hstack([eye(1), eye(1)]).to_dense().tolist()
    [[1.0, 1.0]]
    """
    _check(matrices)
    heights = {m.shape[0] for m in matrices}
    if len(heights) != 1:
        raise ValueError(f"heights differ: {[m.shape for m in matrices]}")
    return _placed(matrices, along_rows=False, along_cols=True, cls=cls)


def block_diag(matrices: Sequence[SparseMatrix], *, cls: Any = None) -> Any:
    """Matrices along the diagonal; as `cls`, the first one's format by default.

    >>> block_diag([eye(1), 2 * eye(1)]).to_dense().tolist()
    [[1.0, 0.0], [0.0, 2.0]]
    """
    _check(matrices)
    return _placed(matrices, along_rows=True, along_cols=True, cls=cls)


def _check(matrices: Sequence[SparseMatrix]) -> None:
    if not matrices or any(m.batch_shape for m in matrices):
        raise ValueError("one or more single matrices are needed (stacks: use jax.vmap)")


def _placed(matrices: Any, *, along_rows: bool, along_cols: bool, cls: Any) -> Any:
    cls = cls or (CSR if isinstance(matrices[0], BSR | BSC) else type(matrices[0]))
    heights, widths = ([m.shape[i] for m in matrices] for i in (0, 1))
    M = sum(heights) if along_rows else heights[0]
    N = sum(widths) if along_cols else widths[0]
    rows, cols, top, left = [], [], 0, 0
    for m in matrices:
        coo = to_coo(m)
        padding = coo.row >= m.shape[0]
        rows.append(jnp.where(padding, M, coo.row + top))
        cols.append(jnp.where(padding, N, coo.col + left))
        top += m.shape[0] * along_rows
        left += m.shape[1] * along_cols
    dtype = jnp.result_type(*[m.data for m in matrices])
    data = jnp.concatenate([to_coo(m).data.astype(dtype) for m in matrices])
    return _as(cls, COO(data, jnp.concatenate(rows), jnp.concatenate(cols), (M, N)))


def stack[A: SparseMatrix](matrices: Sequence[A]) -> A:
    """Matrices of one format and shape as a stack along a new leading axis, padded to the longest.

    >>> s = stack([eye(2), 0.5 * eye(2)])
    >>> s.batch_shape, (s @ jnp.ones((2, 2))).tolist()
    ((2,), [[1.0, 1.0], [0.5, 0.5]])
    """
    if len({(type(m), m.shape, m.batch_shape, m.data.shape[m.ndim - 1 :]) for m in matrices}) != 1:
        raise ValueError(f"a stack takes one format and shape: {[_describe(m) for m in matrices]}")
    most = max(m.nse for m in matrices)
    padded = [resize(m, most) for m in matrices]
    kept = [_with_ids(m) for m in padded]
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *kept)


def unstack[A: SparseMatrix](a: A) -> list[A]:
    """The matrices of a stack, along its first axis.

    >>> [m.batch_shape for m in unstack(stack([eye(2), eye(2)]))]
    [(), ()]
    """
    if not a.batch_shape:
        raise ValueError(f"a single {type(a).__name__} of {a.shape} is no stack")
    return [jax.tree.map(lambda leaf, i=i: leaf[i], a) for i in range(a.batch_shape[0])]


def resize[A: SparseMatrix](a: A, nse: int) -> A:
    """The same matrix with another capacity.

    Raises:
      ValueError: the entries in use do not fit (traced, only a larger capacity is taken).

    >>> resize(eye(2), 5).data.tolist()
    [1.0, 1.0, 0.0, 0.0, 0.0]
    """
    if nse < a.nse:
        if isinstance(a.nnz, Tracer):
            raise ValueError(f"{nse=} is less than {a.nse}, and what is in use is traced")
        if isinstance(a, COO):
            last = jnp.where(a.row < a.shape[0], jnp.arange(a.nse) + 1, 0).max(initial=0)
        else:
            last = a.nnz.max(initial=0)
        if int(last) > nse:
            raise ValueError(f"{nse=} is too small: entries up to {int(last)} are in use")
    M, N = a.shape
    lead = len(a.batch_shape)
    if isinstance(a, COO):
        fill = {"data": 0, "row": M, "col": N}
    elif isinstance(a, CSC):
        fill = {"data": 0, "indices": M, "col_ids": N}
    elif isinstance(a, CSR):
        fill = {"data": 0, "indices": N, "row_ids": M}
    else:
        assert isinstance(a, BSR | BSC)
        padding = M // a.block_size[0] if isinstance(a, BSC) else N // a.block_size[1]
        fill = {"data": 0, "indices": padding}
    fields = {}
    for name, value in fill.items():
        x = getattr(a, name)
        if x is not None:
            widths = [(0, 0)] * x.ndim
            widths[lead] = (0, max(0, nse - a.nse))
            x = jnp.pad(x, widths, constant_values=value)
            fields[name] = jax.lax.slice_in_dim(x, 0, nse, axis=lead)
    return a.replace(**fields)  # pyright: ignore[reportAttributeAccessIssue]


def _with_ids(a: Any) -> Any:
    """CSR and CSC with their ids derived, so that all of a stack have the same leaves."""
    if isinstance(a, CSR):
        return CSR(a.data, a.indices, a.indptr, a.shape, a.coordinates()[0])
    if isinstance(a, CSC):
        return CSC(a.data, a.indices, a.indptr, a.shape, a.coordinates()[1])
    return a


def _describe(a: SparseMatrix) -> str:
    return f"{type(a).__name__}{(*a.batch_shape, *a.shape)}"


def _as(cls: Any, a: COO) -> Any:
    if cls not in (COO, CSR, CSC):
        raise TypeError(f"cls must be COO, CSR or CSC, not {cls}; BSR: .to_bsr(block_size)")
    return {COO: to_coo, CSR: COO.to_csr, CSC: COO.to_csc}[cls](a)
