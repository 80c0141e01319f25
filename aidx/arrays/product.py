"""The two bilinear maps behind every sparse product, each the other's gradient.

    spmm:  out[i, :]  = sum_e [row_e = i] data_e x[col_e, :]       a sparse matrix times a dense one
    sddmm: data_e     = sum_n g[row_e, n] x[col_e, n]             a dense product at a pattern

Both are linear in each of their two operands, and the transposes are again one of the two on the
same pattern or its transpose, so derivatives of any order, forward or reverse, keep the pattern and
never form a dense matrix.  That is written once here, as two primitives; what computes them is
chosen by the registry: `mosaic_gpu` and `cusparse` (CUDA), `eigen` and `halves` (CPU), `xla`
(everywhere).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from aidx.ops import registry

from .formats import BSC, BSR, COO, CSC, CSR, Array, SparseMatrix, offsets_of

PART = 2**24  # numbers that an `xla` product may hold between gathering and adding
HALVED = 2**16  # entries from which a vector's product on a CPU is worth two threads
LAYOUTS = {COO: "coo", CSR: "csr", CSC: "csc", BSR: "csr", BSC: "csc"}


@dataclasses.dataclass(frozen=True)
class Spec:
    """What of a pattern is static.

    `shape` is (M, N) of the matrix, `block` the sides of an entry (None: a number); rows ascend in
    a "csr", columns in a "csc", and the operands end with their offsets.  `turned` blocks are
    stored transposed: a transposed product reads the same values.
    """

    shape: tuple[int, int]
    block: tuple[int, int] | None
    layout: str
    turned: bool = False

    @property
    def T(self) -> Spec:
        """The spec of the transpose."""
        turned = {"coo": "coo", "csr": "csc", "csc": "csr"}[self.layout]
        block = None if self.block is None else (self.block[1], self.block[0])
        flipped = self.block is not None and not self.turned
        return Spec((self.shape[1], self.shape[0]), block, turned, flipped)

    @property
    def stored(self) -> tuple[int, ...]:
        """The axes of a stored entry."""
        block = self.block or ()
        return block[::-1] if self.turned else block

    def upright(self, data: Array) -> Array:
        """Stored blocks as they stand in the matrix, or back."""
        return data.swapaxes(-1, -2) if self.turned else data

    @property
    def grid(self) -> tuple[int, int]:
        """(M, N) in entries."""
        bh, bw = self.block or (1, 1)
        return self.shape[0] // bh, self.shape[1] // bw


def pattern_of(a: SparseMatrix) -> tuple[Spec, tuple[Array, ...]]:
    """(spec, (rows, columns[, offsets])) of one matrix; BSR and BSC count in blocks."""
    block = a.block_size if isinstance(a, BSR | BSC) else None
    ids = a.block_coordinates() if isinstance(a, BSR | BSC) else a.coordinates()
    spec = Spec(a.shape, block, LAYOUTS[type(a)], isinstance(a, BSC))
    return spec, ids if isinstance(a, COO) else (*ids, a.indptr)  # pyright: ignore


def spmm(data: Array, x: Array, pattern: Any, spec: Spec, names: tuple[str, ...]) -> Array:
    """The sparse matrix times x `[N, n]`: `[M, n]`, in the common dtype of data and x."""
    data, x = _same_dtype(data, x)
    return _spmm_p.bind(data, x, *pattern, spec=spec, names=names)


def sddmm(g: Array, x: Array, pattern: Any, spec: Spec, names: tuple[str, ...]) -> Array:
    """`g @ x.T` at the pattern's places: g `[M, n]`, x `[N, n]`; zero in padding."""
    g, x = _same_dtype(g, x)
    return _sddmm_p.bind(g, x, *pattern, spec=spec, names=names)


def _same_dtype(a: Array, b: Array) -> tuple[Array, Array]:
    dtype = jnp.result_type(a, b)
    if dtype == jnp.bool_:
        raise TypeError("products of booleans have no dtype to sum in: cast one side")
    return a.astype(dtype), b.astype(dtype)


def flip(pattern: tuple[Array, ...]) -> tuple[Array, ...]:
    """The pattern of the transpose."""
    row, col, *offsets = pattern
    return (col, row, *offsets)


# --- implementations -----------------------------------------------------------------------------


def accumulator(dtype: Any) -> Any:
    """The dtype that sums are kept in: at least f32 for floats, else the dtype itself."""
    floats = jnp.issubdtype(dtype, jnp.floating)
    return jnp.promote_types(dtype, jnp.float32) if floats else dtype


def _spmm_xla(spec: Spec, operands: Any) -> Array:
    """Gather rows of x, multiply, add into rows of the result; some entries at a time."""
    data, x, row, col, *_ = operands
    data = spec.upright(data)
    acc, n = accumulator(data.dtype), x.shape[1]
    (rows, cols), (bh, bw) = spec.grid, spec.block or (1, 1)
    if spec.block is not None:
        x, shape = x.reshape(cols, bw, n), (rows, bh, n)
    elif n == 1:  # scalars are gathered and added much faster than vectors of one
        x, shape = x[:, 0], (rows,)
    else:
        shape = (rows, n)

    def add(out: Array, part: Any) -> tuple[Array, None]:
        data, row, col = part
        # Padding's column is past the end: XLA's gathers clamp, and what it takes is dropped below.
        taken = x.at[col].get(mode="promise_in_bounds")
        if spec.block is not None:
            terms = jnp.einsum("ebc,ecn->ebn", data, taken, preferred_element_type=acc)
        else:
            terms = _column(data, taken.ndim).astype(acc) * taken.astype(acc)
        # Padding has a row past the end, where nothing is added.  To say that rows ascend makes
        # XLA's scatter slower on a GPU (10^6 entries, one column: 67 us for 16) and a CPU's no
        # faster.
        return out.at[row].add(terms, mode="drop"), None

    with jax.named_scope("spmm"):
        parts = _parts((data, row, col), (0, rows, 0), (bh + bw) * n)
        zeros = jnp.zeros(shape, acc)
        out = jax.lax.scan(add, zeros, parts)[0] if parts else add(zeros, (data, row, col))[0]
        return out.reshape(spec.shape[0], n).astype(data.dtype)


def _parts(entries: tuple[Array, ...], fills: tuple[int, ...], width: int) -> Any:
    """Entries as `[parts, each, ...]`, padded, or None where one part holds them.

    `width` is how many numbers an entry becomes on its way.
    """
    count, each = entries[0].shape[0], max(1, PART // max(1, width))
    if count <= each:
        return None
    parts = -(-count // each)
    out = []
    for x, fill in zip(entries, fills, strict=True):
        pad = [(0, parts * each - count), *[(0, 0)] * (x.ndim - 1)]
        out.append(jnp.pad(x, pad, constant_values=fill).reshape(parts, each, *x.shape[1:]))
    return tuple(out)


def _column(data: Array, ndim: int) -> Array:
    return data.reshape(data.shape[0], *(1,) * (ndim - 1))


def _sddmm_xla(spec: Spec, operands: Any) -> Array:
    """Gather both sides and contract; some entries at a time."""
    g, x, row, col, *_ = operands
    acc, n = accumulator(g.dtype), x.shape[1]
    (rows, cols), (bh, bw) = spec.grid, spec.block or (1, 1)
    if spec.block is not None:
        g, x = g.reshape(rows, bh, n), x.reshape(cols, bw, n)
    elif n == 1:
        g, x = g[:, 0], x[:, 0]

    def take(place: Any) -> Array:
        row, col = place
        left, right = (a.at[i].get(mode="promise_in_bounds") for a, i in ((g, row), (x, col)))
        if spec.block is not None:
            return jnp.einsum("ebn,ecn->ebc", left, right, preferred_element_type=acc)
        out = left.astype(acc) * right.astype(acc)
        return out if n == 1 else jnp.sum(out, axis=-1)

    with jax.named_scope("sddmm"):
        parts = _parts((row, col), (rows, 0), (bh + bw) * n)
        out = jax.lax.map(take, parts) if parts else take((row, col))
        if parts:
            out = out.reshape(-1, *out.shape[2:])[: row.shape[0]]
        used = _column((row < rows) & (col < cols), out.ndim)
        return spec.upright(jnp.where(used, out, 0).astype(g.dtype))


def _refuse(spec: Spec, operands: Any, layouts: tuple[str, ...], dtypes: tuple[str, ...]) -> None:
    """NotImplementedError unless a library's product takes this."""
    data, x = operands[:2]
    if spec.layout not in layouts or spec.block is not None:
        raise NotImplementedError(f"{spec.layout} with {spec.block=}; it takes {layouts}")
    if data.dtype.name not in dtypes:
        raise NotImplementedError(f"{data.dtype.name}; it takes {', '.join(dtypes)}")
    if 0 in (*spec.shape, *data.shape, *x.shape):
        raise NotImplementedError(f"an empty side: {spec.shape=}, nse={data.shape[0]}")


def _spmm_eigen(spec: Spec, operands: Any) -> Array:
    """Eigen's threaded CSR product, which jaxlib ships for the CPU and BCSR calls."""
    from jax.experimental import sparse

    wide = ("int32", "int64", "float32", "float64", "complex64", "complex128")
    _refuse(spec, operands, ("csr",), wide)
    data, x, _, col, offsets = operands
    n = x.shape[1]
    if n == 1:
        raise NotImplementedError("one column: it is no faster than eight")

    matrix = sparse.BCSR((data, col, offsets), shape=(offsets.shape[0] - 1, x.shape[0]))
    # Its inner loop is scalar below eight columns: filling up is three times faster.
    x = jnp.pad(x, ((0, 0), (0, max(0, 8 - n))))
    return sparse.bcsr_dot_general(matrix, x, dimension_numbers=(((1,), (0,)), ((), ())))[:, :n]


def _spmm_halves(spec: Spec, operands: Any) -> Array:
    """`xla`, two halves of the entries side by side: a scatter is one thread's on a CPU.

    More parts, or more columns, were no faster.
    """
    data, x, row, col, *_ = operands
    if spec.block is not None or x.shape[1] != 1 or data.shape[0] < HALVED:
        raise NotImplementedError(f"{spec.block=}, {x.shape[1]} columns, nse={data.shape[0]}")
    if accumulator(data.dtype) != data.dtype:
        raise NotImplementedError(f"{data.dtype.name} would be rounded twice")
    half = data.shape[0] // 2
    first, second = (
        _spmm_xla(spec, (data[part], x, row[part], col[part]))
        for part in (slice(half), slice(half, None))
    )
    return first + second


def _spmm_cusparse(spec: Spec, operands: Any) -> Array:
    """cuSPARSE, through the lowering that `jax.experimental.sparse` gives CSR and CSC always.

    (BCOO and BCSR take it only under the switch `jax_bcoo_cusparse_lowering`, off by default.)
    """
    from jax.experimental import sparse

    wide = ("float32", "float64", "complex64", "complex128")
    _refuse(spec, operands, ("csr", "csc"), wide)
    if jax.default_backend() != "gpu":
        raise NotImplementedError("its descriptors are built on the machine that has the GPU")
    data, x, row, col, offsets = operands
    # It reads past the last offset, so the places of padding have to exist: a row of zeros more in
    # x, or a row more of the result, which is cut.
    (M, N), csr = spec.shape, spec.layout == "csr"
    if csr:
        matrix = sparse.CSR((data, col, offsets), shape=(M, N + 1))
        x = jnp.pad(x, ((0, 1), (0, 0)))
    else:
        matrix = sparse.CSC((data, row, offsets), shape=(M + 1, N))
    return ((matrix @ x[:, 0])[:, None] if x.shape[1] == 1 else matrix @ x)[:M]


def _spmm_mosaic(spec: Spec, operands: Any) -> Array:
    """Blocks on the tensor cores, numbers by equal entries a warp.

    Where rows do not ascend, blocks are sorted by their list alone, and numbers are added
    atomically: sums of the latter are not bitwise repeatable.
    """
    from aidx.ops import sparse_kernels

    data, x, row, col, *offsets = operands
    if spec.block is None:
        ordered, rows = spec.layout == "csr", spec.shape[0]
        if x.shape[1] == 1 and ordered:
            return sparse_kernels.vector_matmul(data, x[:, 0], row, col, offsets[0])[:, None]
        if x.shape[1] == 1:
            return sparse_kernels.vector_scatter(data, x[:, 0], row, col, rows=rows)[:, None]
        if ordered:
            return sparse_kernels.row_matmul(data, x, row, col, offsets[0])
        return sparse_kernels.entry_matmul(data, x, row, col, rows=rows)
    turned = spec.turned
    if spec.layout == "csr":
        return sparse_kernels.block_matmul(data, x, col, offsets[0], turned=turned)
    order = jnp.argsort(row, stable=True).astype(jnp.int32)
    indptr = offsets_of(row, spec.grid[0])
    return sparse_kernels.block_matmul(data, x, col[order], indptr, order=order, turned=turned)


def _sddmm_mosaic(spec: Spec, operands: Any) -> Array:
    """Blocks on the tensor cores, numbers eight at a time a warp."""
    from aidx.ops import sparse_kernels

    g, x, row, col, *_ = operands
    if spec.block is None and x.shape[1] == 1:
        raise NotImplementedError("one column: a lane would have one product of a warp")
    if spec.block is None:
        return sparse_kernels.row_sample(g, x, row, col)
    sides = (x, g, col, row) if spec.turned else (g, x, row, col)
    return sparse_kernels.block_sample(*sides, block=spec.stored)  # pyright: ignore


registry.register("spmm", "mosaic_gpu", platforms=("cuda",))(_spmm_mosaic)
registry.register("spmm", "cusparse", platforms=("cuda",))(_spmm_cusparse)
registry.register("spmm", "eigen", platforms=("cpu",))(_spmm_eigen)
registry.register("spmm", "halves", platforms=("cpu",))(_spmm_halves)
registry.register("spmm", "xla")(_spmm_xla)
registry.register("sddmm", "mosaic_gpu", platforms=("cuda",))(_sddmm_mosaic)
registry.register("sddmm", "xla")(_sddmm_xla)


# --- the primitives ------------------------------------------------------------------------------


def _spmm_shape(data: Any, x: Any, *_: Any, spec: Spec, names: Any) -> Any:
    return ShapedArray((spec.shape[0], x.shape[1]), data.dtype)


def _sddmm_shape(g: Any, x: Any, row: Any, *_: Any, spec: Spec, names: Any) -> Any:
    return ShapedArray((*row.shape, *spec.stored), g.dtype)


def _apply(op: str, *operands: Any, spec: Spec, names: tuple[str, ...]) -> Array:
    return registry.dispatch(registry.Call(op, names, spec), operands)


@functools.lru_cache(maxsize=256)
def _applied(op: str, spec: Spec, names: tuple[str, ...]) -> Any:
    return jax.jit(functools.partial(_apply, op, spec=spec, names=names))


def _bilinear(op: str, shape_rule: Any, xla: Any) -> Primitive:
    """A primitive linear in its first two operands, whose other operands are the pattern."""
    p = Primitive(op)
    p.def_abstract_eval(shape_rule)
    p.def_impl(lambda *args, spec, names: _applied(op, spec, names)(*args))
    mlir.register_lowering(p, mlir.lower_fun(functools.partial(_apply, op), multiple_results=False))

    def jvp(primals: Any, tangents: Any, **params: Any) -> Any:
        (a, b, *pattern), (da, db, *_) = primals, tangents
        terms = []
        if not isinstance(da, ad.Zero):
            terms.append(p.bind(da, b, *pattern, **params))
        if not isinstance(db, ad.Zero):
            terms.append(p.bind(a, db, *pattern, **params))
        out = p.bind(a, b, *pattern, **params)
        return out, sum(terms[1:], terms[0])

    def batch(args: Any, axes: Any, *, spec: Spec, names: Any) -> Any:
        a, x, *pattern = args
        if op == "spmm" and all(axis is None for i, axis in enumerate(axes) if i != 1):
            # A batch of right-hand sides is more columns.
            x = jnp.moveaxis(x, axes[1], 1)  # [N, batch, n]
            size, n = x.shape[1:]
            out = p.bind(a, x.reshape(x.shape[0], size * n), *pattern, spec=spec, names=names)
            return out.reshape(out.shape[0], size, n), 1
        # A stack of matrices: no library here takes one.
        f = lambda *operands: xla(spec, operands)
        return jax.vmap(f, in_axes=tuple(axes))(*args), 0

    ad.primitive_jvps[p] = jvp
    batching.primitive_batchers[p] = batch
    return p


_spmm_p = _bilinear("spmm", _spmm_shape, _spmm_xla)
_sddmm_p = _bilinear("sddmm", _sddmm_shape, _sddmm_xla)


def backing(op: str, names: tuple[str, ...]) -> tuple[str, ...]:
    """What a gradient's product may take: the names that were asked for first, then the others.

    A choice is made for one product; its transpose is another case, and may be another op.
    """
    known = [entry.name for entry in registry.implementations(op)]
    return *(n for n in names if n in known), *(n for n in known if n not in names)


def _spmm_transpose(ct: Any, data: Any, x: Any, *pattern: Any, spec: Spec, names: Any) -> Any:
    rest = (None,) * len(pattern)
    if isinstance(ct, ad.Zero):
        return (None, None, *rest)
    if ad.is_undefined_primal(data):
        names = backing("sddmm", names)
        return (_sddmm_p.bind(ct, x, *pattern, spec=spec, names=names), None, *rest)
    names = backing("spmm", names)
    return (None, _spmm_p.bind(data, ct, *flip(pattern), spec=spec.T, names=names), *rest)


def _sddmm_transpose(ct: Any, g: Any, x: Any, *pattern: Any, spec: Spec, names: Any) -> Any:
    rest = (None,) * len(pattern)
    if isinstance(ct, ad.Zero):
        return (None, None, *rest)
    if ad.is_undefined_primal(g):
        names = backing("spmm", names)
        return (_spmm_p.bind(ct, x, *pattern, spec=spec, names=names), None, *rest)
    names = backing("spmm", names)
    return (None, _spmm_p.bind(ct, g, *flip(pattern), spec=spec.T, names=names), *rest)


ad.primitive_transposes[_spmm_p] = _spmm_transpose
ad.primitive_transposes[_sddmm_p] = _sddmm_transpose
