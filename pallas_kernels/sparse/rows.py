"""Sparse rows of numbers times a dense matrix, and dense products sampled at numbers.

    row_matmul:   out[i, :] = sum of data_e x[column_e, :] over the entries e of row i
    entry_matmul: the same from entries in any order, by atomic additions
    row_sample:   out_e = g[row_e, :] . x[column_e, :]

A warp takes `chunk` consecutive entries whatever rows they are of, so a row of a million entries
costs what a million rows of one entry do (Dalton, Olson & Bell, 2015, merge-based SpMV, cut by
entries alone).  Its lanes hold neighbouring columns of x, and rows of x for `AHEAD` entries are on
their way at once.  A row that goes on into a later chunk leaves partial sums there, at most one a
chunk, which a second pass adds; or, where the result is small enough to begin as zeros, it is added
atomically, which saves the pass.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import HOPPER_SMS, cdiv, zeros_for

from . import _warp as w

WARPS = 4  # of a CTA
SMALL = 2**21  # numbers of a result that are zeroed faster than a second pass is made
AHEAD = 8  # entries whose rows of x are being loaded
DTYPES = ("float32", "bfloat16")


@dataclasses.dataclass(frozen=True)
class RowConfig:
    """How a kernel over entries is laid out.

    Attributes:
      chunk: entries of a warp, a multiple of 32.
      vector: neighbouring columns of a lane (1, 2 or 4); a warp covers 32 times as many.
      zeroed: the result of `row_matmul` begins as zeros, and cut rows are added atomically.

    >>> RowConfig(chunk=100)
    Traceback (most recent call last):
        ...
    ValueError: chunk=100 is not a positive multiple of 32
    """

    chunk: int = 128
    vector: int = 1
    zeroed: bool = False

    def __post_init__(self):
        if self.chunk < 1 or self.chunk % w.LANES:
            raise ValueError(f"chunk={self.chunk} is not a positive multiple of {w.LANES}")
        if self.vector not in (1, 2, 4):
            raise ValueError(f"vector={self.vector} is not 1, 2 or 4")

    @classmethod
    def of(cls, nse: int, columns: int, rows: int | None = None) -> "RowConfig":
        """Enough chunks for every SM, and vectors that `columns` fill; small results are zeroed.

        >>> RowConfig.of(10**4, 32, 1000)
        RowConfig(chunk=32, vector=1, zeroed=True)
        >>> RowConfig.of(10**7, 256, 10**6)
        RowConfig(chunk=512, vector=4, zeroed=False)
        """
        vector = max(v for v in (1, 2, 4) if columns % v == 0 and (v == 1 or columns > 16 * v))
        warps = nse / (HOPPER_SMS * 32)
        chunk = 32 if warps < 64 else 64 if warps < 128 else 128 if warps < 1024 else 512
        return cls(chunk, vector, rows is not None and rows * columns <= SMALL)


@dataclasses.dataclass(frozen=True)
class Rows:
    """One call: `nse` entries of an `[M, N]` matrix and `columns` of x."""

    shape: tuple[int, int]
    nse: int
    columns: int
    dtype: str
    config: RowConfig

    @property
    def chunks(self) -> int:
        """Of the entries."""
        return cdiv(self.nse, self.config.chunk)

    @property
    def width(self) -> int:
        """Columns of a warp."""
        return w.LANES * self.config.vector

    @property
    def tiles(self) -> int:
        """Of the columns."""
        return cdiv(self.columns, self.width)

    @property
    def ctas(self) -> int:
        """For one tile of the columns."""
        return cdiv(self.chunks, WARPS)

    @property
    def size(self) -> int:
        """Bytes of an element of x."""
        return 4 if self.dtype == "float32" else 2

    # ------------------------------------------------------------------ emitted: one lane's view

    def place(self, cta: Any, tiled: bool = True) -> tuple[Any, Any, Any, Any]:
        """(lane, chunk, first column of this lane, whether the lane has columns)."""
        lane, warp = w.lane_and_warp()
        if not tiled:
            return lane, w.add(w.mul(cta, WARPS), warp), None, None
        tile, within = (
            w.arith.divui(cta, w.const(self.ctas)),
            w.arith.remui(cta, w.const(self.ctas)),
        )
        chunk = w.add(w.mul(within, WARPS), warp)
        column = w.add(w.mul(tile, self.width), w.mul(lane, self.config.vector))
        return lane, chunk, column, w.less(column, self.columns)

    def entries(self, lane: Any, first: Any, *arrays: Any) -> list[Any]:
        """Row, column (and datum) of the lane's entry of 32; row M past the end."""
        at = w.add(first, lane)
        there, at = w.less(at, self.nse), w.smallest(at, self.nse - 1)
        row, column, *data = arrays
        out = [
            w.select(there, w.load(w.offset(row, at, 4)), w.const(self.shape[0])),
            w.smallest(w.load(w.offset(column, at, 4)), self.shape[1] - 1),
        ]
        if data:
            (datum,) = w.load_floats(w.offset(data[0], at, self.size), 1, self.dtype)
            out.append(w.select(there, datum, w.const(0.0)))
        return out

    def gather(self, x: Any, row: Any, column: Any) -> list[Any]:
        """The lane's columns of one row; `column` is inside."""
        at = w.widened(w.long_product(row, self.columns), column)
        return w.load_floats(w.offset(x, at, self.size), self.config.vector, self.dtype)

    def inside(self, column: Any) -> Any:
        """A column to load from, whatever lane asks."""
        return w.smallest(column, self.columns - self.config.vector)

    def target(self, base: Any, row: Any, column: Any) -> Any:
        """Where `[row, column]` of an f32 array with the columns of x lies."""
        return w.offset(base, w.widened(w.long_product(row, self.columns), column), 4)

    def multiply(self, refs: tuple[Any, ...], cta: Any) -> None:
        """`row_matmul`."""
        zeroed = self.config.zeroed
        if zeroed:
            data, x, row_ids, minor, out = (w.address(r) for r in refs)
            indptr = partial = None
        else:
            data, x, row_ids, minor, indptr, out, partial = (w.address(r) for r in refs)
        lane, chunk, column, mine = self.place(cta)
        first, vector, M = w.mul(chunk, self.config.chunk), self.config.vector, self.shape[0]
        zeros = [w.const(0.0)] * vector
        source = self.inside(column)

        def flush(row: Any, shared: Any, total: list[Any], ends: bool = True) -> None:
            """A row's sum to its place; what began in an earlier chunk to the partial sums."""
            target, there = self.target(out, row, column), w.both(mine, w.less(row, M))
            if zeroed:
                whole = w.both(there, w.neither(shared))
                if ends:
                    w.store_floats(target, total, whole)
                w.add_floats(target, total, w.both(there, shared) if ends else there)
            else:
                target = w.select(shared, self.target(partial, chunk, column), target)
                w.store_floats(target, total, there)

        def next_row(row: Any, state: list[Any]) -> list[Any]:
            """(row, whether it began in an earlier chunk, its sum) before an entry of `row`."""
            current, shared, *total = state
            false = w.arith.constant(shared.type, 0)

            def begin() -> list[Any]:
                flush(current, shared, total)
                return [row, false, *zeros]

            return w.either(w.neither(w.equal(row, current)), begin, state)

        def batch(b: Any, *carry: Any) -> list[Any]:
            mine_of = self.entries(lane, w.add(first, b), row_ids, minor, data)

            def eight(j: Any, *carry: Any) -> list[Any]:
                at = [w.add(j, u) for u in range(AHEAD)]
                row, col, datum = ([w.from_lane(v, a) for a in at] for v in mine_of)
                taken = [self.gather(x, c, source) for c in col]
                state = list(carry)
                for r, v, values in zip(row, datum, taken, strict=True):
                    state = next_row(r, state)
                    state[2:] = [w.fma(v, a, t) for a, t in zip(values, state[2:], strict=True)]
                return state

            some = w.less(w.from_lane(mine_of[0], 0), M)
            return w.either(some, lambda: w.loop(0, w.LANES, AHEAD, eight, *carry), carry)

        def run() -> None:
            before = w.arith.maxsi(w.add(first, -1), w.const(0))
            current = w.load(w.offset(row_ids, first, 4))
            same = w.equal(w.load(w.offset(row_ids, before, 4)), current)
            shared = w.both(same, w.less(0, first))
            carry = w.loop(0, self.config.chunk, w.LANES, batch, current, shared, *zeros)
            flush(carry[0], carry[1], carry[2:], ends=False)
            if not zeroed:
                self.clear(indptr, out, lane, chunk, column, mine)

        w.when(w.less(chunk, self.chunks), run)

    def clear(self, indptr: Any, out: Any, lane: Any, chunk: Any, column: Any, mine: Any) -> None:
        """Zeros to the empty rows among this chunk's equal share of all rows."""
        M, zeros = self.shape[0], [w.const(0.0)] * self.config.vector
        share = cdiv(cdiv(M, self.chunks), w.LANES) * w.LANES
        start = w.long_min(chunk, share, M)
        stop = w.smallest(w.add(start, share), M)

        def step(r: Any) -> None:
            row = w.add(r, lane)
            there, at = w.less(row, M), w.smallest(row, M - 1)
            begin, end = (w.load(w.offset(indptr, w.add(at, i), 4)) for i in (0, 1))
            empty = w.ballot(w.both(there, w.equal(begin, end)))

            def rows() -> None:
                def one(j: Any) -> None:
                    bit = w.arith.andi(w.arith.shrui(empty, j), w.const(1))
                    pointer = self.target(out, w.add(r, j), column)
                    w.store_floats(pointer, zeros, w.both(mine, w.equal(bit, 1)))

                w.loop(0, w.LANES, 1, one)

            w.when(w.arith.cmpi(w.arith.CmpIPredicate.ne, empty, w.const(0)), rows)

        w.loop(start, stop, w.LANES, step)

    def scatter(self, refs: tuple[Any, ...], cta: Any) -> None:
        """`entry_matmul`."""
        data, x, row_ids, minor, out = (w.address(r) for r in refs)
        lane, chunk, column, mine = self.place(cta)
        first, source, M = w.mul(chunk, self.config.chunk), self.inside(column), self.shape[0]

        def batch(b: Any) -> None:
            mine_of = self.entries(lane, w.add(first, b), row_ids, minor, data)

            def eight(j: Any) -> None:
                at = [w.add(j, u) for u in range(AHEAD)]
                row, col, datum = ([w.from_lane(v, a) for a in at] for v in mine_of)
                taken = [self.gather(x, c, source) for c in col]
                for r, v, values in zip(row, datum, taken, strict=True):
                    terms = [w.arith.mulf(v, a) for a in values]
                    where = w.both(mine, w.less(r, M))
                    w.add_floats(self.target(out, r, column), terms, where)

            w.loop(0, w.LANES, AHEAD, eight)

        run = lambda: w.loop(0, self.config.chunk, w.LANES, batch)
        w.when(w.less(chunk, self.chunks), run)

    def sample(self, refs: tuple[Any, ...], cta: Any) -> None:
        """`row_sample`."""
        g, x, row_ids, minor, out = (w.address(r) for r in refs)
        lane, chunk, *_ = self.place(cta, tiled=False)
        first, M = w.mul(chunk, self.config.chunk), self.shape[0]
        vector = self.config.vector

        def batch(b: Any) -> None:
            mine_of = self.entries(lane, w.add(first, b), row_ids, minor)

            def eight(j: Any) -> None:
                at = [w.add(j, u) for u in range(AHEAD)]
                row, col = ([w.from_lane(v, a) for a in at] for v in mine_of)
                left = [w.smallest(r, M - 1) for r in row]

                def tile(t: Any, *sums: Any) -> list[Any]:
                    column = w.add(w.mul(t, self.width), w.mul(lane, vector))
                    mine, source = w.less(column, self.columns), self.inside(column)
                    a = [self.gather(g, r, source) for r in left]
                    c = [self.gather(x, r, source) for r in col]
                    out = []
                    for total, p, q in zip(sums, a, c, strict=True):
                        new = total
                        for u, v in zip(p, q, strict=True):
                            new = w.fma(u, v, new)
                        out.append(w.select(mine, new, total))
                    return out

                sums = w.loop(0, self.tiles, 1, tile, *[w.const(0.0)] * AHEAD)
                total = folded(sums, lane)
                # lane l has the sum of entry l // 4
                entry = w.add(w.add(w.add(first, b), j), w.arith.shrui(lane, w.const(2)))
                own = w.from_lane(mine_of[0], w.add(j, w.arith.shrui(lane, w.const(2))))
                total = w.select(w.less(own, M), total, w.const(0.0))
                leads = w.equal(w.arith.andi(lane, w.const(3)), 0)
                where = w.both(leads, w.less(entry, self.nse))
                w.store_floats(w.offset(out, entry, 4), [total], where)

            w.loop(0, w.LANES, AHEAD, eight)

        run = lambda: w.loop(0, self.config.chunk, w.LANES, batch)
        w.when(w.less(chunk, self.chunks), run)


def folded(sums: list[Any], lane: Any) -> Any:
    """Eight sums over all lanes: lane l has that of `sums[l // 4]`, in nine shuffles."""
    distance = w.LANES // 2
    while len(sums) > 1:
        half = len(sums) // 2
        upper = w.equal(w.arith.andi(lane, w.const(distance)), distance)
        keep = [w.select(upper, b, a) for a, b in zip(sums[:half], sums[half:], strict=True)]
        give = [w.select(upper, a, b) for a, b in zip(sums[:half], sums[half:], strict=True)]
        sums = [w.arith.addf(a, w.across(b, distance)) for a, b in zip(keep, give, strict=True)]
        distance //= 2
    (total,) = sums
    while distance:
        total = w.arith.addf(total, w.across(total, distance))
        distance //= 2
    return total


# --- the calls -----------------------------------------------------------------------------------


def launch(emit: Any, ctas: int, out_type: Any, operands: tuple[Any, ...], *scratch: Any) -> Any:
    """`emit(refs, cta)` by `ctas` CTAs of four warps."""
    count = len(operands) + (len(out_type) if isinstance(out_type, tuple) else 1) + len(scratch)

    def body(*refs):
        types = (*[plgpu.RefType()] * count, plgpu.Layout.WG_SPLAT)

        @plgpu.inline_mgpu(arg_types=types)
        def run(_, *args):
            emit(args[:-1], args[-1].registers.item())

        run(*refs, lax.axis_index("cta"))  # pyright: ignore[reportCallIssue]

    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(ctas,),
        grid_names=("cta",),
        scratch_types=list(scratch),
        compiler_params=plgpu.CompilerParams(),
    )(*operands)


def check(shape: tuple[int, int], row: Any, column: Any, *dense: Any) -> None:
    """Refuse what these kernels lack."""
    if row.shape != column.shape or row.ndim != 1:
        raise ValueError(f"{row.shape=} and {column.shape=} must be equal vectors")
    if len({x.dtype for x in dense}) != 1:
        raise ValueError(f"dtypes differ: {[str(x.dtype) for x in dense]}")
    if dense[0].dtype.name not in DTYPES:
        raise NotImplementedError(f"{dense[0].dtype.name}: it takes {' and '.join(DTYPES)}")
    if 0 in (*shape, *row.shape, *dense[-1].shape):
        raise NotImplementedError(f"an empty side: {shape=}, nse={row.shape[0]}")


def row_matmul(
    data: jax.Array,
    x: jax.Array,
    row: jax.Array,
    column: jax.Array,
    indptr: jax.Array,
    *,
    config: RowConfig | None = None,
) -> jax.Array:
    r"""A matrix of compressed rows times a dense one, accumulated in f32; GPU only.

    $$out_i = \sum_{e = indptr_i}^{indptr_{i+1} - 1} data_e x_{column_e}$$

    Args:
      data: f32 or bf16 `[nse]`.
      x: of data's dtype, `[N, n]`.
      row: i32 `[nse]`, ascending; M in padding, which lies at the end.
      column: i32 `[nse]`.
      indptr: i32 `[M + 1]`, which says the same as row.
      config: chunks and vectors.

    Returns:
      `[M, n]`.

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
      NotImplementedError: a dtype that this kernel lacks, or an empty side.

    >>> s, i = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((9,), jnp.int32)
    >>> f, p = jnp.float32, s((6,), jnp.int32)
    >>> jax.eval_shape(row_matmul, s((9,), f), s((7, 32), f), i, i, p).shape
    (5, 32)
    """
    M, n = indptr.shape[0] - 1, x.shape[1]
    check((M, x.shape[0]), row, column, data, x)
    config = config or RowConfig.of(row.shape[0], n, M)
    call = Rows((M, x.shape[0]), row.shape[0], n, data.dtype.name, config)
    f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    with jax.named_scope("row_matmul"):
        row, ctas = row.astype(jnp.int32), call.ctas * call.tiles
        operands = (data, x, row, column.astype(jnp.int32))
        if config.zeroed:
            total = zeros_for(x, (M, n))
            launch(call.multiply, ctas, (), (*operands, total))
            return total[...].astype(data.dtype)
        shapes = f32(M, n), f32(call.chunks, n)
        operands = (*operands, indptr.astype(jnp.int32))
        out, partial = launch(call.multiply, ctas, shapes, operands)
        out = out.at[continued(row, M, config.chunk)].add(partial, mode="drop")
        return out.astype(data.dtype)


def continued(row: jax.Array, count: int, chunk: int) -> jax.Array:
    """i32 `[chunks]`: the row that goes on into each chunk, or `count`.

    >>> continued(jnp.array([0, 0, 0, 2, 2, 3]), 3, 2).tolist()
    [3, 0, 2]
    """
    starts = row[::chunk]
    before = jnp.concatenate([jnp.full(1, -1, row.dtype), row[chunk - 1 :: chunk]])
    before = before[: starts.shape[0]]
    return jnp.where(before == starts, jnp.minimum(starts, count), count)


def entry_matmul(
    data: jax.Array,
    x: jax.Array,
    row: jax.Array,
    column: jax.Array,
    *,
    rows: int,
    config: RowConfig | None = None,
) -> jax.Array:
    """`row_matmul` from entries in any order, best by column; sums are not bitwise repeatable.

    Args:
      data: f32 or bf16 `[nse]`.
      x: of data's dtype, `[N, n]`.
      row: i32 `[nse]`; `rows` in padding.
      column: i32 `[nse]`.
      rows: M.
      config: chunks and vectors.

    Returns:
      `[rows, n]`.

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
      NotImplementedError: a dtype that this kernel lacks, or an empty side.

    >>> import functools
    >>> s, i = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((9,), jnp.int32)
    >>> call = functools.partial(entry_matmul, rows=5)
    >>> jax.eval_shape(call, s((9,), jnp.float32), s((7, 32), jnp.float32), i, i).shape
    (5, 32)
    """
    n = x.shape[1]
    check((rows, x.shape[0]), row, column, data, x)
    config = config or RowConfig.of(row.shape[0], n)
    call = Rows((rows, x.shape[0]), row.shape[0], n, data.dtype.name, config)
    with jax.named_scope("entry_matmul"):
        out = zeros_for(x, (rows, n))
        operands = (data, x, row.astype(jnp.int32), column.astype(jnp.int32), out)
        launch(call.scatter, call.ctas * call.tiles, (), operands)
        return out[...].astype(data.dtype)


def row_sample(
    g: jax.Array,
    x: jax.Array,
    row: jax.Array,
    column: jax.Array,
    *,
    config: RowConfig | None = None,
) -> jax.Array:
    """`g @ x.T` at places, accumulated in f32; GPU only.

    Args:
      g: f32 or bf16 `[M, n]`.
      x: of g's dtype, `[N, n]`.
      row: i32 `[nse]`; M in padding, whose result is zero.
      column: i32 `[nse]`.
      config: chunks and vectors.

    Returns:
      `[nse]`, in g's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
      NotImplementedError: a dtype that this kernel lacks, or an empty side.

    >>> s, i = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((9,), jnp.int32)
    >>> jax.eval_shape(row_sample, s((5, 32), jnp.float32), s((7, 32), jnp.float32), i, i).shape
    (9,)
    """
    if g.ndim != 2 or x.ndim != 2 or g.shape[1] != x.shape[1]:
        raise ValueError(f"{g.shape=} and {x.shape=} differ in their columns")
    check((g.shape[0], x.shape[0]), row, column, g, x)
    config = config or RowConfig.of(row.shape[0], g.shape[1])
    shape = (g.shape[0], x.shape[0])
    call = Rows(shape, row.shape[0], g.shape[1], g.dtype.name, config)
    out = jax.ShapeDtypeStruct(row.shape, jnp.float32)
    with jax.named_scope("row_sample"):
        operands = (g, x, row.astype(jnp.int32), column.astype(jnp.int32))
        return launch(call.sample, call.ctas, out, operands).astype(g.dtype)
