"""A sparse matrix times a vector: `row_matmul` and `entry_matmul` for one column.

    vector_matmul:  out_i = sum of data_e x[column_e] over the entries e of row i
    vector_scatter: the same from entries in any order, by atomic additions

A warp takes `chunk` consecutive entries whatever rows they are of, as in `rows.py`; but its lanes
hold entries, since there is one column.  Values and places come sixteen bytes a lane, and all
numbers of x that they meet are on their way at once.  The products go to the warp's part of shared
memory, where each lane adds up a row of its own (Greathouse & Daga, 2014, CSR-stream, cut by
entries).  Rows of more than `long` entries are added by all lanes.  The result begins as zeros: a
row that lies in one chunk is stored, a cut one is added atomically.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels._mgpu import HOPPER_SMS, cdiv, zeros_for

from . import _warp as w
from .rows import WARPS, check, launch

EACH = 4  # neighbouring entries of a lane


@dataclasses.dataclass(frozen=True)
class VectorConfig:
    """How the kernel is laid out.

    Attributes:
      chunk: entries of a warp, a multiple of 128.
      long: entries of a row from which all lanes add it together.
      once: values and places pass L1 by, which is left to x.

    >>> VectorConfig(chunk=64)
    Traceback (most recent call last):
        ...
    ValueError: chunk=64 is not a positive multiple of 128
    """

    chunk: int = 256
    long: int = 32
    once: bool = True

    def __post_init__(self):
        step = w.LANES * EACH
        if self.chunk < 1 or self.chunk % step:
            raise ValueError(f"chunk={self.chunk} is not a positive multiple of {step}")
        if self.long < 1:
            raise ValueError(f"long={self.long} is not positive")

    @classmethod
    def of(cls, nse: int) -> "VectorConfig":
        """Longer chunks where they leave every SM 32 warps.

        >>> VectorConfig.of(10**5).chunk, VectorConfig.of(10**7).chunk
        (128, 256)
        """
        return cls(128 if nse < HOPPER_SMS * 32 * 256 else 256)


@dataclasses.dataclass(frozen=True)
class Vector:
    """One call: `nse` entries of an `[M, N]` matrix."""

    shape: tuple[int, int]
    nse: int
    dtype: str
    config: VectorConfig

    @property
    def chunks(self) -> int:
        """Of the entries."""
        return cdiv(self.nse, self.config.chunk)

    @property
    def ctas(self) -> int:
        """Of the launch."""
        return cdiv(self.chunks, WARPS)

    @property
    def size(self) -> int:
        """Bytes of a value."""
        return 4 if self.dtype == "float32" else 2

    @property
    def scratch(self) -> Any:
        """Every warp's products."""
        return plgpu.SMEM((WARPS * self.config.chunk,), jnp.float32)

    # ------------------------------------------------------------------ emitted: one lane's view

    def place(self, cta: Any) -> tuple[Any, Any, Any, Any]:
        """(lane, warp, first entry of the chunk, the entry past its last)."""
        lane, warp = w.lane_and_warp()
        chunk, each = w.add(w.mul(cta, WARPS), warp), self.config.chunk
        first, last = (w.long_min(w.add(chunk, i), each, self.nse) for i in (0, 1))
        return lane, warp, first, last

    def multiply(self, refs: tuple[Any, ...], cta: Any) -> None:
        """The kernel; refs are data, x, rows, columns, offsets, the result and shared memory."""
        *arrays, room = refs
        data, x, row_ids, minor, indptr, out = (w.address(r) for r in arrays)
        lane, warp, first, last = self.place(cta)
        room = w.add(w.shared_address(room), w.mul(warp, 4 * self.config.chunk))

        def run() -> None:
            start = w.load(w.offset(row_ids, first, 4))
            final = w.load(w.offset(row_ids, w.add(last, -1), 4))
            final = w.smallest(final, self.shape[0] - 1)

            def used() -> None:
                self.products((data, x, minor), room, lane, (first, last))
                self.sums((row_ids, indptr, out), room, lane, (first, last), (start, final))

            w.when(w.less(start, self.shape[0]), used)

        w.when(w.less(first, last), run)

    def loaded(
        self, arrays: tuple[Any, ...], lane: Any, entries: tuple[Any, Any], use: Any
    ) -> None:
        """`use(offset in the chunk, entries' columns, values, ...)` of four entries at a time.

        The arrays are of values and i32; past the end stand copies of the last entry.
        """
        values, *integers = arrays
        (first, last), step = entries, w.LANES * EACH

        def together(at: Any) -> list[Any]:
            once = self.config.once
            ints = [w.load_ints(w.offset(v, at, 4), EACH, once) for v in integers]
            data = w.load_floats(w.offset(values, at, self.size), EACH, self.dtype, once)
            return [*ints, data]

        def apart(at: Any) -> list[Any]:
            places = [w.smallest(w.add(at, i), self.nse - 1) for i in range(EACH)]
            ints = [[w.load(w.offset(v, p, 4)) for p in places] for v in integers]
            data = [w.load_floats(w.offset(values, p, self.size), 1, self.dtype)[0] for p in places]
            return [*ints, data]

        def all_of(load: Any) -> None:
            own = w.mul(lane, EACH)
            offsets = [w.add(own, i) for i in range(0, self.config.chunk, step)]
            for o, found in [(o, load(w.add(first, o))) for o in offsets]:
                use(o, *found)

        whole = w.equal(w.minus(last, first), self.config.chunk)
        w.when(whole, lambda: all_of(together))
        w.when(w.neither(whole), lambda: all_of(apart))

    def terms(self, x: Any, column: list[Any], values: list[Any]) -> list[Any]:
        """data_e x[column_e]."""
        column = [w.smallest(c, self.shape[1] - 1) for c in column]
        taken = [w.load_floats(w.offset(x, c, self.size), 1, self.dtype)[0] for c in column]
        return [w.arith.mulf(v, t) for v, t in zip(values, taken, strict=True)]

    def products(
        self, arrays: tuple[Any, ...], room: Any, lane: Any, entries: tuple[Any, Any]
    ) -> None:
        """The chunk's products into shared memory; anything past the end."""
        data, x, minor = arrays

        def keep(at: Any, column: list[Any], values: list[Any]) -> None:
            w.keep(w.add(room, w.mul(at, 4)), self.terms(x, column, values))

        self.loaded((data, minor), lane, entries, keep)
        w.meet()

    def scatter(self, refs: tuple[Any, ...], cta: Any) -> None:
        """`vector_scatter`; refs are data, x, rows, columns and the result."""
        data, x, row_ids, minor, out = (w.address(r) for r in refs)
        lane, _, first, last = self.place(cta)

        def add(at: Any, row: list[Any], column: list[Any], values: list[Any]) -> None:
            for i, (r, term) in enumerate(zip(row, self.terms(x, column, values), strict=True)):
                there = w.less(w.add(w.add(first, at), i), last)
                target = w.offset(out, w.smallest(r, self.shape[0] - 1), 4)
                w.add_floats(target, [term], w.both(there, w.less(r, self.shape[0])))

        run = lambda: self.loaded((data, row_ids, minor), lane, (first, last), add)
        w.when(w.less(first, last), run)

    def sums(
        self,
        arrays: tuple[Any, ...],
        room: Any,
        lane: Any,
        entries: tuple[Any, Any],
        rows: tuple[Any, Any],
    ) -> None:
        """Every row's sum over the chunk to its place.

        Lanes go from row to row; where most rows are empty, from entry to entry, of which those
        count that begin a row.
        """
        row_ids, indptr, out = arrays
        (first, last), (start, final) = entries, rows
        M, few = self.shape[0], w.less(w.minus(final, start), 2 * self.config.chunk)

        def of_rows(i: Any) -> tuple[Any, Any]:
            row = w.add(w.add(start, i), lane)
            return row, w.less(row, w.add(final, 1))

        def of_entries(i: Any) -> tuple[Any, Any]:
            at = w.add(w.add(first, i), lane)
            there, at = w.less(at, last), w.smallest(at, w.add(last, -1))
            row = w.load(w.offset(row_ids, at, 4))
            before = w.load(w.offset(row_ids, w.greatest(w.add(at, -1), 0), 4))
            head = w.arith.ori(w.equal(at, first), w.neither(w.equal(row, before)))
            return row, w.both(w.both(there, head), w.less(row, M))

        def walk(place: Any, count: Any) -> None:
            def step(i: Any) -> None:
                row, there = place(i)
                self.add_rows((indptr, out), room, lane, entries, row, there)

            w.loop(0, count, w.LANES, step)

        w.when(few, lambda: walk(of_rows, w.add(w.minus(final, start), 1)))
        w.when(w.neither(few), lambda: walk(of_entries, w.minus(last, first)))

    def add_rows(
        self,
        arrays: tuple[Any, Any],
        room: Any,
        lane: Any,
        entries: tuple[Any, Any],
        row: Any,
        there: Any,
    ) -> None:
        """A row a lane, where it is `there`."""
        (indptr, out), (first, last) = arrays, entries
        at = w.smallest(row, self.shape[0] - 1)
        begin, end = (w.load(w.offset(indptr, w.add(at, i), 4)) for i in (0, 1))
        low, high = w.greatest(begin, first), w.smallest(end, last)
        high = w.select(there, high, low)
        length = w.minus(high, low)
        long = w.less(self.config.long, length)
        product = lambda e: w.kept(w.add(room, w.mul(w.minus(e, first), 4)))
        zero = w.const(0.0)

        def four(e: Any, *sums: Any) -> list[Any]:
            places = [w.add(e, i) for i in range(EACH)]
            taken = [product(w.smallest(p, w.add(high, -1))) for p in places]
            inside = [w.less(p, high) for p in places]
            terms = [w.select(i, t, zero) for i, t in zip(inside, taken, strict=True)]
            return [w.arith.addf(s, t) for s, t in zip(sums, terms, strict=True)]

        parts = w.loop(low, w.select(long, low, high), EACH, four, *[zero] * EACH)
        total = w.arith.addf(w.arith.addf(parts[0], parts[2]), w.arith.addf(parts[1], parts[3]))

        def together(_: Any, left: Any, total: Any) -> list[Any]:
            """The lowest lane's long row by all lanes."""
            rest = w.arith.andi(left, w.add(left, -1))
            owner = w.ones(w.add(w.arith.xori(left, rest), -1))
            low_, high_ = (w.from_lane(v, owner) for v in (low, high))
            one = lambda e, s: [w.arith.addf(s, product(e))]
            (part,) = w.loop(w.add(low_, lane), high_, w.LANES, one, zero)
            for distance in (16, 8, 4, 2, 1):
                part = w.arith.addf(part, w.across(part, distance))
            return [rest, w.select(w.equal(lane, owner), part, total)]

        left = w.ballot(long)
        _, total = w.loop(0, w.ones(left), 1, together, left, total)
        whole = w.both(w.less(first, w.add(begin, 1)), w.less(end, w.add(last, 1)))
        some, target = w.less(0, length), w.offset(out, at, 4)
        w.store_floats(target, [total], w.both(some, whole))
        w.add_floats(target, [total], w.both(some, w.neither(whole)))


def vector_matmul(
    data: jax.Array,
    x: jax.Array,
    row: jax.Array,
    column: jax.Array,
    indptr: jax.Array,
    *,
    config: VectorConfig | None = None,
) -> jax.Array:
    r"""A matrix of compressed rows times a vector, accumulated in f32; GPU only.

    $$out_i = \sum_{e = indptr_i}^{indptr_{i+1} - 1} data_e x_{column_e}$$

    Sums of rows that lie in more than two chunks are not bitwise repeatable.

    Args:
      data: f32 or bf16 `[nse]`.
      x: of data's dtype, `[N]`.
      row: i32 `[nse]`, ascending; M in padding, which lies at the end.
      column: i32 `[nse]`.
      indptr: i32 `[M + 1]`, which says the same as row.
      config: chunks.

    Returns:
      `[M]`.

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
      NotImplementedError: a dtype that this kernel lacks, or an empty side.

    >>> s, i = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((9,), jnp.int32)
    >>> f, p = jnp.float32, s((6,), jnp.int32)
    >>> jax.eval_shape(vector_matmul, s((9,), f), s((7,), f), i, i, p).shape
    (5,)
    """
    M = indptr.shape[0] - 1
    call = _call(data, x, row, column, M, config)
    with jax.named_scope("vector_matmul"):
        out = zeros_for(x, (M,))
        whole = (v.astype(jnp.int32) for v in (row, column, indptr))
        launch(call.multiply, call.ctas, (), (data, x, *whole, out), call.scratch)
        return out[...].astype(data.dtype)


def vector_scatter(
    data: jax.Array,
    x: jax.Array,
    row: jax.Array,
    column: jax.Array,
    *,
    rows: int,
    config: VectorConfig | None = None,
) -> jax.Array:
    """`vector_matmul` from entries in any order; sums are not bitwise repeatable.

    Args:
      data: f32 or bf16 `[nse]`.
      x: of data's dtype, `[N]`.
      row: i32 `[nse]`; `rows` in padding.
      column: i32 `[nse]`.
      rows: M.
      config: chunks.

    Returns:
      `[rows]`.

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
      NotImplementedError: a dtype that this kernel lacks, or an empty side.

    >>> import functools
    >>> s, i = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((9,), jnp.int32)
    >>> call = functools.partial(vector_scatter, rows=5)
    >>> jax.eval_shape(call, s((9,), jnp.float32), s((7,), jnp.float32), i, i).shape
    (5,)
    """
    call = _call(data, x, row, column, rows, config)
    with jax.named_scope("vector_scatter"):
        out = zeros_for(x, (rows,))
        operands = (data, x, row.astype(jnp.int32), column.astype(jnp.int32), out)
        launch(call.scatter, call.ctas, (), operands)
        return out[...].astype(data.dtype)


def _call(
    data: jax.Array, x: jax.Array, row: jax.Array, column: jax.Array, rows: int, config: Any
) -> Vector:
    if x.ndim != 1:
        raise ValueError(f"{x.shape=} is no vector")
    shape = rows, x.shape[0]
    check(shape, row, column, data, x)
    config = config or VectorConfig.of(row.shape[0])
    return Vector(shape, row.shape[0], data.dtype.name, config)
