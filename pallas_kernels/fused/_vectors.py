"""A warpgroup's view of a row: 16 bytes a thread and access, whatever the row's length.

Memory-bound kernels want every byte once, in the widest accesses there are, and enough of them in
flight.  A tile is 1-D and in registers: of every piece of `128 * vec` elements thread t holds
`[t * vec, (t + 1) * vec)`.  A piece that reaches past the end of the row is clamped where it is
loaded, replaced by a value that changes nothing, and not stored.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels._mgpu import WARPGROUP, lanes

SCALAR = plgpu.Layout.WG_SPLAT
ONE_EACH = plgpu.Layout.WG_STRIDED((WARPGROUP,), 1)  # a number for every thread
BYTES = 16  # of the widest access
DTYPES = ("bfloat16", "float16", "float32")


def vector_of(dtype: Any) -> int:
    """Elements in 16 bytes.

    >>> vector_of(jnp.bfloat16), vector_of(jnp.float32)
    (8, 4)
    """
    return BYTES // jnp.dtype(dtype).itemsize


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Tiles of `size` elements, a multiple of `128 * vec`; `piece` makes the smallest.

    >>> Vectors.piece(jnp.bfloat16, None).size
    1024
    """

    size: int
    vec: int
    interpret: bool

    @classmethod
    def piece(cls, dtype: Any, interpret: Any):
        """One vector a thread."""
        return cls(WARPGROUP * vector_of(dtype), vector_of(dtype), bool(interpret))

    @property
    def layout(self) -> Any:
        """Of a tile in registers."""
        return plgpu.Layout.WG_STRIDED((self.size,), self.vec)

    def load(self, ref, begin: Any = 0, *, inside=False, repeat=1, fill=0.0):
        """The elements of ref (flattened) from `begin` on, in f32, `fill` past the end.

        Args:
          ref: a row, or a tile of several dimensions.
          begin: an int, or an i32 scalar that is a multiple of vec.
          inside: promises that nothing lies past the end.
          repeat: ref is read that many times over.
          fill: what stands past the end.
        """
        return self.raw(ref, begin, inside=inside, repeat=repeat, fill=fill).astype(jnp.float32)

    def raw(self, ref, begin: Any = 0, *, inside=False, repeat=1, fill=0.0):
        """As `load`, in ref's dtype."""
        if self.interpret:
            row = jnp.tile(ref[...].reshape(-1), repeat)
            row = jnp.pad(row, (0, self.size), constant_values=fill)
            return jax.lax.dynamic_slice(row, (begin,), (self.size,))
        kind = plgpu.ShapeDtypeStruct((self.size,), ref.dtype, layout=self.layout)
        static = begin if isinstance(begin, int) else None

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR), return_type=kind)
        def gather(_, source, first):
            from jax.experimental.mosaic import gpu as mgpu
            from jaxlib.mlir import ir
            from jaxlib.mlir.dialects import arith, vector

            kind = ir.VectorType.get((self.vec,), ir.MemRefType(source.type).element_type)
            registers = []
            for at, past in self._places(source, first, static, inside, repeat):
                value = vector.load(kind, source, at)
                if past is not None:
                    empty = mgpu.c(fill, kind.element_type)
                    value = arith.select(past, vector.broadcast(kind, empty), value)
                registers.append(value)
            layout = mgpu.WGStridedFragLayout((self.size,), self.vec)
            packed = first.registers.reshape(-1).repeat(len(registers))
            packed[:] = registers
            return mgpu.FragmentedArray(_registers=packed, _layout=layout, _is_signed=None)

        return gather(ref, jnp.asarray(begin, jnp.int32))  # pyright: ignore[reportCallIssue]

    def store(self, ref, value, begin: Any = 0, *, inside=False) -> None:
        """The tile into ref (flattened) from `begin` on, in ref's dtype; nothing past the end."""
        value = value.astype(ref.dtype)
        length, static = math.prod(ref.shape), begin if isinstance(begin, int) else None
        if self.interpret:
            self._store_interpreted(ref, value, begin, length, inside)
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, self.layout))
        def scatter(_, target, first, tile):
            from jaxlib.mlir import ir
            from jaxlib.mlir.dialects import arith, scf, vector

            places = self._places(target, first, static, inside, 1)
            for register, (at, past) in zip(tile.registers.flat, places, strict=True):
                if past is None:
                    vector.store(register, target, at)
                    continue
                here = arith.xori(past, arith.constant(past.type, 1))
                branch = scf.IfOp(here)
                with ir.InsertionPoint(branch.then_block):
                    vector.store(register, target, at)
                    scf.yield_([])

        scatter(ref, jnp.asarray(begin, jnp.int32), value)  # pyright: ignore[reportCallIssue]

    def _store_interpreted(self, ref, value, begin, length: int, inside: bool) -> None:
        tail = length % self.size
        if isinstance(begin, int):
            part = slice(begin, min(begin + self.size, length))
            value = value[: part.stop - part.start]
            if len(ref.shape) > 1:
                row = ref[...].reshape(-1)
                row = jnp.concatenate([row[:begin], value, row[part.stop :]])
                ref[...] = row.reshape(ref.shape)
            else:
                ref[part] = value
            return
        if inside or not tail:
            ref[pl.ds(begin, self.size)] = value
            return

        @pl.when(begin + self.size <= length)
        def _():
            ref[pl.ds(begin, self.size)] = value

        @pl.when(begin + self.size > length)
        def _():
            ref[pl.ds(begin, tail)] = value[:tail]

    def _places(self, ref, first, static: int | None, inside: bool, repeat: int):
        """(indices into ref, whether they are past its end or None) of this thread's vectors."""
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith

        index = ir.IndexType.get()
        shape = ir.MemRefType(ref.type).shape
        length, piece = math.prod(shape) * repeat, WARPGROUP * self.vec
        layout = mgpu.WGStridedFragLayout((self.size,), self.vec)
        begin = mgpu.c(static, index) if static is not None else None
        if begin is None:
            begin = arith.index_cast(index, first.registers.item())
        for i, place in enumerate(layout.linear_thread_idxs()):
            place = place if static == 0 else arith.addi(place, begin)
            end = None if static is None else static + (i + 1) * piece
            past = None
            if not inside and (end is None or end > length):
                past = arith.cmpi(arith.CmpIPredicate.uge, place, mgpu.c(length, index))
                place = arith.minui(place, mgpu.c(length - self.vec, index))
            yield _unravelled(place, shape, repeat), past

    def folded(self, value, onto=None):
        """What each thread holds of an f32 tile added up, on top of `onto`: f32 `[128]`."""
        if self.interpret:
            sums = value.reshape(WARPGROUP, -1).sum(1)
            return sums if onto is None else onto + sums
        kind = plgpu.ShapeDtypeStruct((WARPGROUP,), jnp.dtype(jnp.float32), layout=ONE_EACH)
        given = (value,) if onto is None else (value, onto)

        @plgpu.inline_mgpu(arg_types=(self.layout, ONE_EACH)[: len(given)], return_type=kind)
        def fold(_, tile, *onto):
            from jax.experimental.mosaic import gpu as mgpu
            from jaxlib.mlir.dialects import vector

            start = [lanes(x.registers.flat[0])[0] for x in onto]
            numbers = [*start, *itertools.chain(*map(lanes, tile.registers.flat))]
            total = functools.reduce(_add, numbers)
            layout = mgpu.WGStridedFragLayout((WARPGROUP,), 1)
            registers = tile.registers[:1].copy()
            registers[:] = vector.from_elements(_vector_of_one(), [total])
            return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

        return fold(*given)  # pyright: ignore[reportCallIssue]

    def totals(self, sums: Sequence[Any], scratch, at: Any) -> list[Any]:
        """The sums over a warpgroup of what its threads hold, with one barrier for all of them.

        Args:
          sums: f32 `[128]`, see `folded`.
          scratch: f32 SMEM `[2, len(sums) or more, 4]` of this warpgroup.
          at: which half of it: calls that follow one another must take turns.
        """
        if self.interpret:
            return [jnp.sum(x) for x in sums]
        scalar = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.float32), layout=SCALAR)
        types = (plgpu.RefType(), SCALAR, *[ONE_EACH] * len(sums))

        @plgpu.inline_mgpu(arg_types=types, return_type=(scalar,) * len(sums))
        def reduce(_, shared, half, *sums):
            parts = [_over_lanes(lanes(x.registers.flat[0])[0]) for x in sums]
            return _of_warps(shared, half, parts)

        return list(reduce(scratch, jnp.asarray(at, jnp.int32), *sums))  # pyright: ignore

    def beginning(self, ref):
        """The mean of the first elements of ref, 32 vectors of them, f32: without a barrier."""
        count = min(math.prod(ref.shape), 32 * self.vec)
        if self.interpret:
            return jnp.mean(ref[...].reshape(-1)[:count].astype(jnp.float32))
        kind = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.float32), layout=SCALAR)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=kind)
        def mean(_, source):
            from jax.experimental.mosaic import gpu as mgpu
            from jaxlib.mlir import ir
            from jaxlib.mlir.dialects import arith, vector

            index, f32 = ir.IndexType.get(), ir.F32Type.get()
            place = arith.muli(
                arith.remui(_thread_and_warp()[0], mgpu.c(32, index)), mgpu.c(self.vec, index)
            )
            past = None
            if count < 32 * self.vec:
                past = arith.cmpi(arith.CmpIPredicate.uge, place, mgpu.c(count, index))
                place = arith.minui(place, mgpu.c(count - self.vec, index))
            stored = ir.MemRefType(source.type).element_type
            value = vector.load(ir.VectorType.get((self.vec,), stored), source, [place])
            if stored != f32:
                value = arith.extf(ir.VectorType.get((self.vec,), f32), value)
            part = functools.reduce(_add, lanes(value))
            if past is not None:
                part = arith.select(past, mgpu.c(0.0, f32), part)
            total = arith.mulf(_over_lanes(part), mgpu.c(1 / count, f32))
            return mgpu.FragmentedArray.splat(total, ())

        return mean(ref)  # pyright: ignore[reportCallIssue]

    def total(self, value, scratch, op: str = "add"):
        """The sum (op "max": the largest) of a tile; scratch: this warpgroup's SMEM of 4 f32."""
        if self.interpret:
            return jnp.sum(value) if op == "add" else jnp.max(value)
        kind = plgpu.ShapeDtypeStruct((), jnp.dtype(jnp.float32), layout=SCALAR)

        @plgpu.inline_mgpu(arg_types=(self.layout, plgpu.RefType()), return_type=kind)
        def reduce(_, tile, shared):
            return tile.reduce(op, 0, shared)

        return reduce(value, scratch)  # pyright: ignore[reportCallIssue]

    def zeros(self):
        """An f32 tile of zeros."""
        zero = jnp.zeros((self.size,), jnp.float32)
        return zero if self.interpret else plgpu.layout_cast(zero, self.layout)

    def indices(self):
        """0, 1, ... as an i32 tile."""
        if self.interpret:
            return jnp.arange(self.size, dtype=jnp.int32)
        return plgpu.broadcasted_iota(jnp.int32, (self.size,), 0, layout=self.layout)


def _unravelled(place, shape, repeat: int):
    """Indices of a flat place in an array of `shape`, read `repeat` times over."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    index = ir.IndexType.get()
    if len(shape) == 1 and repeat == 1:
        return [place]
    found = []
    for extent in itertools.islice(reversed(shape), len(shape) - (repeat == 1)):
        found.append(arith.remui(place, mgpu.c(extent, index)))
        place = arith.divui(place, mgpu.c(extent, index))
    if repeat == 1:
        found.append(place)
    return found[::-1]


def _add(a, b):
    """`a + b`, which may become half of a fused multiply-add."""
    from jaxlib.mlir.dialects import arith

    return arith.addf(a, b, fastmath=arith.FastMathFlags.contract)


def _vector_of_one():
    from jaxlib.mlir import ir

    return ir.VectorType.get((1,), ir.F32Type.get())


def _over_lanes(part):
    """The sum over the lanes of a warp, in all of them."""
    from jax.experimental.mosaic import gpu as mgpu

    for distance in (16, 8, 4, 2, 1):
        part = _add(part, mgpu.utils.shfl_bfly(part, distance))
    return part


def _thread_and_warp() -> tuple[Any, Any]:
    """Places in the warpgroup."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, gpu

    index = ir.IndexType.get()
    thread = arith.remui(gpu.thread_id(gpu.Dimension.x), mgpu.c(WARPGROUP, index))
    return thread, arith.divui(thread, mgpu.c(32, index))


def _of_warps(shared, half, parts) -> tuple[Any, ...]:
    """The sum of each of some parts over the four warps, through SMEM and one barrier."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref, scf, vector

    index, f32 = ir.IndexType.get(), ir.F32Type.get()
    thread, warp = _thread_and_warp()
    first = arith.cmpi(
        arith.CmpIPredicate.eq, arith.remui(thread, mgpu.c(32, index)), mgpu.c(0, index)
    )
    half = arith.index_cast(index, half.registers.item())
    row = lambda k: [half, mgpu.c(k, index)]
    branch = scf.IfOp(first)
    with ir.InsertionPoint(branch.then_block):
        for k, part in enumerate(parts):
            memref.store(part, shared, [*row(k), warp])
        scf.yield_([])
    mgpu.warpgroup_barrier()
    kind = ir.VectorType.get((4,), f32)
    four = [vector.load(kind, shared, [*row(k), mgpu.c(0, index)]) for k in range(len(parts))]
    return tuple(mgpu.FragmentedArray.splat(functools.reduce(_add, lanes(x)), ()) for x in four)


def checked_rows(**arrays: Any) -> None:
    """Rows that the tiles can take.

    Raises:
      NotImplementedError: another dtype, no rows, or rows that are no multiple of 8 elements.

    >>> checked_rows(x=jax.ShapeDtypeStruct((2, 8), jnp.bfloat16))
    """
    for name, x in arrays.items():
        if x.dtype.name not in DTYPES:
            raise NotImplementedError(f"{name} of {x.dtype}: takes {', '.join(DTYPES)}")
        if x.size == 0 or x.shape[-1] % 8:
            raise NotImplementedError(f"{name} of {x.shape}: takes rows of multiples of 8 elements")
