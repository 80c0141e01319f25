"""Code for one warp, where Pallas' tiles of a whole warpgroup do not fit: gathers of short rows.

The functions emit MLIR inside `plgpu.inline_mgpu`; values are scalars of one lane.  Pointers are
i64 addresses of global memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf

LANES = 32


def i32() -> Any:
    """The type."""
    return ir.IntegerType.get_signless(32)


def f32() -> Any:
    """The type."""
    return ir.F32Type.get()


def const(x: int | float) -> Any:
    """An i32 or f32."""
    return arith.constant(f32() if isinstance(x, float) else i32(), x)


def add(a: Any, b: Any) -> Any:
    """i32 sum; Python integers are constants."""
    return arith.addi(*_both(a, b))


def mul(a: Any, b: Any) -> Any:
    """i32 product."""
    return arith.muli(*_both(a, b))


def smallest(a: Any, b: Any) -> Any:
    """i32 minimum."""
    return arith.minsi(*_both(a, b))


def greatest(a: Any, b: Any) -> Any:
    """i32 maximum."""
    return arith.maxsi(*_both(a, b))


def minus(a: Any, b: Any) -> Any:
    """i32 difference."""
    return arith.subi(*_both(a, b))


def less(a: Any, b: Any) -> Any:
    """a < b, signed."""
    return arith.cmpi(arith.CmpIPredicate.slt, *_both(a, b))


def equal(a: Any, b: Any) -> Any:
    """a == b."""
    return arith.cmpi(arith.CmpIPredicate.eq, *_both(a, b))


def both(a: Any, b: Any) -> Any:
    """a and b, of i1."""
    return arith.andi(a, b)


def neither(a: Any) -> Any:
    """not a, of i1."""
    return arith.xori(a, arith.constant(a.type, 1))


def select(condition: Any, a: Any, b: Any) -> Any:
    """a where the condition holds, else b."""
    return arith.select(condition, a, b)


def _both(a: Any, b: Any) -> tuple[Any, Any]:
    value = lambda x: const(x) if isinstance(x, int) else x
    return value(a), value(b)


def fma(a: Any, b: Any, c: Any) -> Any:
    """a * b + c in f32, rounded once."""
    return utils.inline_ptx("fma.rn.f32 $0, $1, $2, $3;", a, b, c, result_types=f32())


def lane_and_warp() -> tuple[Any, Any]:
    """(lane, warp of the block)."""
    thread = utils.thread_idx()
    return arith.andi(thread, const(LANES - 1)), arith.shrui(thread, const(5))


def address(ref: Any) -> Any:
    """Where a global array begins."""
    return llvm.ptrtoint(ir.IntegerType.get_signless(64), utils.memref_ptr(ref))


def offset(base: Any, index: Any, size: int) -> Any:
    """`base + index * size` bytes; the product may pass 2^31."""
    i64 = ir.IntegerType.get_signless(64)
    wide = arith.extsi(i64, index) if index.type == i32() else index
    return arith.addi(base, arith.muli(wide, arith.constant(i64, size)))


def long_product(a: Any, b: int) -> Any:
    """a * b as i64."""
    i64 = ir.IntegerType.get_signless(64)
    return arith.muli(arith.extsi(i64, a), arith.constant(i64, b))


def long_min(a: Any, b: int, most: int) -> Any:
    """The i32 `min(a * b, most)`, whose product may pass 2^31."""
    i64 = ir.IntegerType.get_signless(64)
    return arith.trunci(i32(), arith.minsi(long_product(a, b), arith.constant(i64, most)))


def widened(a: Any, b: Any) -> Any:
    """An i64 and an i32, added."""
    return arith.addi(a, arith.extsi(ir.IntegerType.get_signless(64), b))


def load(pointer: Any, kind: Callable[[], Any] = i32) -> Any:
    """One i32 or f32 that no one writes."""
    suffix = "f32" if kind is f32 else "b32"
    return utils.inline_ptx(f"ld.global.nc.{suffix} $0, [$1];", pointer, result_types=kind())


def load_ints(pointer: Any, count: int, once: bool = False) -> list[Any]:
    """`count` (1, 2, 4) neighbours as i32, as `load_floats` does."""
    return _read(pointer, i32(), count, once)


def load_floats(pointer: Any, count: int, dtype: str, once: bool = False) -> list[Any]:
    """`count` (1, 2, 4) neighbours as f32, in one instruction; the pointer is aligned to them.

    What is read `once` leaves L1 to the rest.
    """
    if dtype == "float32":
        return _read(pointer, f32(), count, once)
    if count == 1:
        asm = "{ .reg .b16 h, z; mov.b16 z, 0; ld.global.nc.b16 h, [$1]; mov.b32 $0, {z, h}; }"
        return [arith.bitcast(f32(), utils.inline_ptx(asm, pointer, result_types=i32()))]
    bits = _read(pointer, i32(), count // 2, once)
    low = lambda x: arith.bitcast(f32(), arith.shli(x, const(16)))
    high = lambda x: arith.bitcast(f32(), arith.andi(x, const(-65536)))
    return [half(x) for x in bits for half in (low, high)]


def _read(pointer: Any, kind: Any, count: int, once: bool) -> list[Any]:
    way = ".L1::no_allocate" if once else ""
    suffix = "f32" if kind == f32() else "b32"
    if count == 1:
        asm = f"ld.global.nc{way}.{suffix} $0, [$1];"
        return [utils.inline_ptx(asm, pointer, result_types=kind)]
    names = ", ".join(f"${i}" for i in range(count))
    asm = f"ld.global.nc{way}.v{count}.{suffix} {{{names}}}, [${count}];"
    return list(utils.inline_ptx(asm, pointer, result_types=[kind] * count))


def store_floats(pointer: Any, values: Sequence[Any], where: Any) -> None:
    """Neighbouring f32 in one instruction, by the lanes where i1 `where` holds."""
    _put("st.global", pointer, values, where)


def add_floats(pointer: Any, values: Sequence[Any], where: Any) -> None:
    """As `store_floats`, atomically added to what is there; the order is not fixed."""
    _put("red.global.add", pointer, values, where)


def _put(op: str, pointer: Any, values: Sequence[Any], where: Any) -> None:
    count = len(values)
    if count == 1:
        utils.inline_ptx(f"{op}.f32 [$0], $1;", pointer, *values, predicate=where)
        return
    kind = f".v{count}.f32"
    names = ", ".join(f"${i + 1}" for i in range(count))
    utils.inline_ptx(f"{op}{kind} [$0], {{{names}}};", pointer, *values, predicate=where)


def shared_address(ref: Any) -> Any:
    """Where an array in shared memory begins, i32."""
    return llvm.ptrtoint(i32(), utils.memref_ptr(ref))


def keep(address: Any, values: Sequence[Any]) -> None:
    """Four neighbouring f32 to shared memory, in one instruction."""
    asm = "st.shared.v4.f32 [$0], {$1, $2, $3, $4};"
    utils.inline_ptx(asm, address, *values)


def kept(address: Any) -> Any:
    """One f32 of shared memory."""
    asm = "ld.shared.f32 $0, [$1];"
    return utils.inline_ptx(asm, address, result_types=f32(), has_side_effects=True)


def meet() -> None:
    """All lanes are here, and see what each has kept."""
    utils.inline_ptx("bar.warp.sync 0xffffffff;", has_side_effects=True, convergent=True)


def ones(bits: Any) -> Any:
    """How many bits of an i32 are set."""
    return utils.inline_ptx("popc.b32 $0, $1;", bits, result_types=i32())


def from_lane(x: Any, lane: Any) -> Any:
    """x of another lane (i32 or f32)."""
    lane = const(lane) if isinstance(lane, int) else lane
    asm = "shfl.sync.idx.b32 $0, $1, $2, 0x1f, 0xffffffff;"
    return _shuffled(asm, x, lane)


def across(x: Any, distance: int) -> Any:
    """x of the lane whose number differs in one bit."""
    return _shuffled("shfl.sync.bfly.b32 $0, $1, $2, 0x1f, 0xffffffff;", x, const(distance))


def _shuffled(asm: str, x: Any, lane: Any) -> Any:
    kind = x.type
    bits = x if kind == i32() else arith.bitcast(i32(), x)
    out = utils.inline_ptx(
        asm, bits, lane, result_types=i32(), has_side_effects=True, convergent=True
    )
    return out if kind == i32() else arith.bitcast(kind, out)


def ballot(condition: Any) -> Any:
    """i32: bit l is lane l's condition."""
    flag = select(condition, const(1), const(0))
    asm = "{ .reg .pred p; setp.ne.b32 p, $1, 0; vote.sync.ballot.b32 $0, p, 0xffffffff; }"
    return utils.inline_ptx(asm, flag, result_types=i32(), has_side_effects=True, convergent=True)


def loop(start: Any, stop: Any, step: int, f: Callable, *carried: Any) -> list[Any]:
    """`carried = f(i, *carried)` for i in range(start, stop, step)."""
    start, stop = _both(start, stop)
    op = scf.ForOp(start, stop, const(step), list(carried))
    with ir.InsertionPoint(op.body):
        scf.YieldOp(list(f(op.induction_variable, *op.inner_iter_args) or ()))
    return list(op.results)


def when(condition: Any, f: Callable[[], Any]) -> None:
    """f() where the condition holds."""
    op = scf.IfOp(condition)
    with ir.InsertionPoint(op.then_block):
        f()
        scf.YieldOp([])


def either(condition: Any, f: Callable[[], Sequence[Any]], other: Sequence[Any]) -> list[Any]:
    """f() where the condition holds, else `other`."""
    op: Any = scf.IfOp(condition, [x.type for x in other], has_else=True)
    with ir.InsertionPoint(op.then_block):
        scf.YieldOp(list(f()))
    with ir.InsertionPoint(op.else_block):
        scf.YieldOp(list(other))
    return list(op.results)
