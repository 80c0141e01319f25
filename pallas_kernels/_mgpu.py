"""The few Mosaic GPU pieces that every kernel here shares.

Calls that move between JAX releases, or that the interpreter lacks, are made in this module only:

* `Ops` - accumulators and asynchronous wgmma on the GPU, plain values in interpret mode.
* `named_barrier_arrive`, `named_barrier_sync` - PTX `bar`, cheaper than an mbarrier.
* `kernel` - `plgpu.kernel` with the compiler parameters of a warp-specialised kernel.
* `store_scalar` - one number of a vector in global memory.
* `lanes` - the numbers in a register.
* `load_live` - a TMA copy of a tile whose last rows may hold anything.
* `in_place`, `taken` - the memory of an array that a kernel writes into.
* `swizzled` - the SMEM transforms that TMA and wgmma agree on.
* `registers` - how warpgroups that compute and one that loads share the registers of a CTA.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

WARPGROUP = 128  # threads
SMEM_BYTES = 232_448  # what one CTA may use on sm_90
REGISTERS = 65_536  # of one SM, 32 bits each
HOPPER_SMS = 132  # H100 SXM and H200; kernels never ask for devices

# A finite "minus infinity": a fully masked block leaves exp2(0) = 1 in the running sums, and the
# next block with a visible key multiplies that by exp2(MASKED - m) = 0 exactly; -inf gives NaN.
# A power of two, so that MASKED * scale is exact: with a rounded product the fused
# s * scale - max(s) * scale leaves a residual of 1e22 where it should be 0, and exp2 of it is inf.
MASKED = -(2.0**100)


def swizzled(dtype: Any, swizzle: int = 128) -> tuple[Any, ...]:
    """The transforms of an SMEM operand: tiles of 8 rows x `swizzle` bytes, swizzled.

    >>> [type(t).__name__ for t in swizzled(jnp.bfloat16)]
    ['TilingTransform', 'SwizzleTransform']
    """
    tiling = (8, swizzle // jnp.dtype(dtype).itemsize)
    transforms: Any = plgpu  # the type checker takes both for abstract
    return (transforms.TilingTransform(tiling), transforms.SwizzleTransform(swizzle))


def registers(consumers: int, producer: int | None = None) -> tuple[int, int]:
    """Registers a thread of (each consumer, the producer), for `plgpu.set_max_registers`.

    A CTA is launched with an equal share for each of its `consumers + 1` warpgroups, in steps of 8
    and at most 255 a thread.  What the producer gives back is all that there is to take: a consumer
    that asks for more waits for ever, which neither the interpreter nor ptxas can see.  None leaves
    the producer the least that costs the consumers nothing.

    >>> registers(2), registers(2, producer=40), registers(3), registers(1, producer=40)
    ((240, 24), (232, 40), (160, 32), (240, 40))
    """
    if producer is None:
        producer = 32 if consumers == 3 else 24
    warpgroups = consumers + 1
    launch = min(REGISTERS // (WARPGROUP * warpgroups), 255) // 8 * 8
    share = (launch * warpgroups - producer) // consumers // 8 * 8
    return min(share, 240), producer


@dataclasses.dataclass(frozen=True)
class Ops:
    """Accumulators and matmuls of one kernel body, for the GPU and for the interpreter.

    On the GPU an accumulator is a ref in registers that wgmma writes asynchronously; the
    interpreter has none, so there it is a value.  A body written for both carries `carry(acc)`
    through its loops and takes `acc = uncarry(acc, carried)` inside.
    """

    interpret: bool

    def with_acc(self, f: Callable, *shapes: tuple[int, int], dtype: Any = jnp.float32) -> Any:
        """`f(*accumulators)`, zeroed; i32 for products of int8."""
        if self.interpret:
            return f(*[jnp.zeros(s, dtype) for s in shapes])
        return pl.run_scoped(f, *[plgpu.ACC(s, dtype) for s in shapes])

    def carry(self, acc):
        """What a loop must carry so that `acc` survives an iteration."""
        return acc if self.interpret else None

    def uncarry(self, acc, carried):
        """The inverse of `carry` inside the loop."""
        return carried if self.interpret else acc

    def wgmma(self, acc, a, b):
        """`acc += a @ b`, issued but not awaited; a is a tile in registers or SMEM, b in SMEM."""
        if not self.interpret:
            plgpu.wgmma(acc, a, b)
            return acc
        a, b = (x if isinstance(x, jax.Array) else x[...] for x in (a, b))
        plgpu.commit_smem()  # the interpreter's stand-in for "the async proxy reads SMEM here"
        return acc + jnp.dot(a, b, preferred_element_type=acc.dtype)

    def load(self, acc, wait_n: int = 0):
        """The value of `acc` once at most `wait_n` younger wgmma groups are in flight."""
        return acc if self.interpret else plgpu.wgmma_accumulator_load(acc, wait_n=wait_n)

    def store(self, acc, value):
        """Overwrite `acc`."""
        if self.interpret:
            return value
        acc[...] = value
        return acc

    def wait(self, n: int = 0) -> None:
        """Wait until at most `n` wgmma groups are in flight."""
        if not self.interpret:
            plgpu.wgmma_wait(n)

    def store_plain(self, ref, value, *, transpose: bool = False) -> None:
        """`ref[...] = value` (or `value.T`) where ref is GMEM, or SMEM without transforms.

        Such stores of a WGMMA layout touch partial cache lines, or conflict on SMEM banks; newer
        releases of JAX want to be told that this is meant.
        """
        if self.interpret:
            ref[...] = value.T if transpose else value
            return
        if transpose:
            ref, value = ref.T, plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)
        if hasattr(plgpu, "store"):
            plgpu.store(ref, value, optimized=False)
        else:
            ref[...] = value

    def store_transposed(self, ref, value) -> None:
        """`ref[...] = value.T`."""
        if self.interpret:
            ref[...] = value.T
        else:
            ref.T[...] = plgpu.layout_cast(value, plgpu.Layout.WGMMA_TRANSPOSED)

    def opaque(self, x):
        """A static scalar that LLVM cannot see through, made anew at each use.

        Indexing a loop-invariant SMEM operand with it keeps the operand's wgmma descriptors (one
        64-bit register pair per instruction) out of the loop's live registers.  A traced scalar is
        left as it is.
        """
        hide = isinstance(x, int) and not self.interpret
        return lax.optimization_barrier(jnp.int32(x)) if hide else x


def store_scalar(ref, at, value, interpret: bool) -> None:
    """`ref[at] = value`, f32, by one thread."""
    if interpret:
        ref[at] = value
        return

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[plgpu.Layout.WG_SPLAT] * 2))
    def store(_, target, place, number):
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, memref, scf

        branch = scf.IfOp(mgpu.single_thread_predicate(mgpu.ThreadSubset.WARPGROUP))
        with ir.InsertionPoint(branch.then_block):
            index = arith.index_cast(ir.IndexType.get(), place.registers.item())
            memref.store(number.registers.item(), target, [index])
            scf.yield_([])

    store(ref, jnp.asarray(at, jnp.int32), value)  # pyright: ignore[reportCallIssue]


def lanes(register: Any) -> list[Any]:
    """The numbers in a register that is a vector, or the number itself (inside `inline_mgpu`)."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    if not isinstance(register.type, ir.VectorType):
        return [register]
    (count,) = ir.VectorType(register.type).shape
    at = lambda i: vector.extract(register, dynamic_position=[], static_position=[i])
    return [at(i) for i in range(count)]


def _named_barrier(op: str, barrier_id, num_threads: int) -> None:
    from jax.experimental.mosaic import gpu as mgpu

    @plgpu.inline_mgpu(arg_types=(plgpu.Layout.WG_SPLAT,))
    def emit(_, bid):
        ptx = f"bar.{op} $0, {num_threads};"
        mgpu.utils.inline_ptx(ptx, bid.registers[()], has_side_effects=True)

    emit(jnp.asarray(barrier_id, jnp.int32))  # pyright: ignore[reportCallIssue]


def named_barrier_arrive(barrier_id, num_threads: int) -> None:
    """PTX `bar.arrive`: the calling warpgroup signals and goes on (GPU only, ids 0..15)."""
    _named_barrier("arrive", barrier_id, num_threads)


def named_barrier_sync(barrier_id, num_threads: int) -> None:
    """PTX `bar.sync`: the calling warpgroup waits until `num_threads` have arrived (GPU only)."""
    _named_barrier("sync", barrier_id, num_threads)


# Swizzling moves 16 bytes within a row of 128: a whole row is cleared without knowing where to.
_CLEAR_ROWS = """
{{
    .reg .pred done, dead;
    .reg .b32 at, row, low, zero;
    mov.b32 zero, 0;
    and.b32 at, $2, 127;
    shl.b32 at, at, 4;
NEXT:
    setp.ge.u32 done, at, {total};
    @done bra LAST;
    div.u32 row, at, {group};
    shl.b32 row, row, 3;
    bfe.u32 low, at, {shift}, 3;
    add.u32 row, row, low;
    rem.u32 row, row, {rows};
    setp.ge.s32 dead, row, $1;
    {also}
    add.u32 low, $0, at;
    @dead st.shared.v4.b32 [low], {{zero, zero, zero, zero}};
    add.u32 at, at, 2048;
    bra NEXT;
LAST:
}}
"""


def clear_rows(tile, live, interpret: bool, before=None) -> None:
    """A warpgroup zeroes the rows from `live` on of `[..., rows, columns]` in shared memory.

    And those before `before`, unless that is None.  The tiles are `swizzled` by 128 bytes, or by 64
    where those do not divide a row.
    """
    *parts, rows, columns = tile.shape
    if interpret:
        row = lax.broadcasted_iota(jnp.int32, tile.shape, len(parts))
        kept = row < live if before is None else (row < live) & (row >= before)
        tile[...] = jnp.where(kept, tile[...], jnp.zeros((), tile.dtype))
        return
    from jax.experimental.mosaic import gpu as mgpu

    row_bytes = columns * jnp.dtype(tile.dtype).itemsize
    swizzle, group = 128 if row_bytes % 128 == 0 else 64, 8 * row_bytes
    total = math.prod(parts) * rows // 8 * group
    shift = swizzle.bit_length() - 1
    bounds = [jnp.asarray(x, jnp.int32) for x in (live, before) if x is not None]
    also = "" if before is None else "@!dead setp.lt.s32 dead, row, $3;"
    ptx = _CLEAR_ROWS.format(group=group, rows=rows, total=total, shift=shift, also=also)
    types = (plgpu.RefType(swizzled(tile.dtype, swizzle)), *[plgpu.Layout.WG_SPLAT] * len(bounds))

    @plgpu.inline_mgpu(arg_types=types)
    def emit(_, ref, *bounds):
        live, *rest = (x.registers[()] for x in bounds)
        args = [mgpu.utils.memref_ptr(ref), live, mgpu.utils.thread_idx(), *rest]
        mgpu.utils.inline_ptx(ptx, *args, has_side_effects=True)

    emit(tile, *bounds)  # pyright: ignore[reportCallIssue]


def load_live(sources, tile, barrier, landed, live, interpret: bool) -> None:
    """Copies every part of `[parts, rows, columns]`; rows from `live` on arrive as zeros.

    Memory may hold anything there: a masked P is zero, but 0 * NaN is NaN.  The warpgroup that
    loads waits for such a tile on `landed`, clears the rows and passes it on; others go straight to
    `barrier`.  Both barriers expect an arrival for every part.
    """
    whole = live >= tile.shape[1]

    def load(to):
        for part, source in enumerate(sources):
            plgpu.copy_gmem_to_smem(source, tile.at[part], to)

    pl.when(whole)(lambda: load(barrier))

    @pl.when(jnp.logical_not(whole))
    def _():
        load(landed)
        plgpu.barrier_wait(landed)
        clear_rows(tile, live, interpret)
        plgpu.commit_smem()
        for _ in sources:
            plgpu.barrier_arrive(barrier)


def in_place(x: jax.Array) -> Any:
    """A ref to x's memory, for a kernel that writes into it (a donated x is not copied).

    In a loop XLA (jaxlib 0.11 and 0.12) fuses a custom call with the slice that its operand comes
    from and with the one that its result goes to, and forgets that these were one buffer: the call
    writes into the loop's input, and the result keeps what it held.  A barrier on either side keeps
    the slices apart from the call; `taken` is the other one.
    """
    return jax.new_ref(lax.optimization_barrier(x))


def taken(ref: Any) -> jax.Array:
    """What a ref of `in_place` holds after the kernel."""
    return lax.optimization_barrier(ref[...])


def zeros_for(x: jax.Array, shape: tuple[int, ...]) -> Any:
    """A ref to f32 zeros that a kernel adds to; `x` is what is its own among the kernel's operands.

    Plain zeros are one array for all calls of a program: XLA makes them once and copies, which
    reads as much as it writes.
    """
    zero, _ = lax.optimization_barrier((jnp.float32(0), x))
    return jax.new_ref(jnp.broadcast_to(zero, shape))


def div(a, b: int):
    """`a // b` of a non-negative i32 scalar by a static positive integer."""
    return lax.div(a, jnp.int32(b))


def rem(a, b: int):
    """`a % b` of a non-negative i32 scalar; a mask where b is a power of two."""
    return (a & (b - 1)) if b & (b - 1) == 0 else lax.rem(a, jnp.int32(b))


def rolled_loop(begin: int, end, body: Callable, interpret: bool) -> None:
    """`body(i)` for `begin <= i < end`, never unrolled: how often it runs is hidden."""
    step = Ops(interpret).opaque(1)

    def once(i):
        body(i)
        return i + step

    lax.while_loop(lambda i: i < end, once, jnp.int32(begin))


def ring_slot(i, slots: int):
    """The slot of step i of a ring; static where there is but one (see `Ops.opaque`)."""
    return rem(i, slots) if slots > 1 else 0


def cdiv(a: int, b: int) -> int:
    """Ceiling of a / b.

    >>> cdiv(5, 4)
    2
    """
    return -(-a // b)


def interpret_params(interpret: Any) -> Any:
    """`interpret=True` means the GPU interpreter with race detection; other values pass through."""
    if interpret is True:
        return plgpu.InterpretGPUParams(
            detect_races=True, out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
        )
    return interpret or None


def kernel(
    body: Callable,
    *,
    out_type: Any,
    scratch_types: Sequence[Any],
    grid: tuple[int, ...],
    grid_names: tuple[str, ...],
    num_warpgroups: int,
    interpret: Any = None,
) -> Callable:
    """`plgpu.kernel` for a body that places its own barriers; the warpgroup axis is named `wg`."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        scratch_types=list(scratch_types),
        grid=grid,
        grid_names=grid_names,
        num_threads=num_warpgroups,
        thread_name="wg",
        interpret=interpret_params(interpret),
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
    )
