"""`P V` over values of one byte that are never converted.

`O^T = V^T P^T` wants V^T, and one-byte operands cannot be transposed by the tensor core.  They need
not lie in shared memory either: as its first operand wgmma takes registers.  `ldmatrix.trans` moves
pairs of bytes, so a lane gets two neighbouring dims of two keys in a register; two `prmt` of two
such registers give four keys of one dim and four of the next, which is what wgmma asks of rows
`i` and `i + 8`.  Hence two permutations, both of which cost nothing:

* rows: within 16 dims, row i < 8 is dim 2 i and row i + 8 is dim 2 i + 1, until `store_rows` writes
  the output, where a lane's two rows are one word;
* keys: within 16, key i is followed by key i + 8.  A lane holds the scores of both, so that it
  packs them into the 16 bits that `stmatrix.trans` moves.

P is split into terms like the queries (`quantised.split_terms`), relative to the largest of its own
tile of keys: what is small beside another tile's keys loses nothing.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from . import quantised

ROWS = plgpu.Layout.WGMMA


def unit(dtype: Any) -> float:
    """What P = 1 is stored as: e4m3 is coarse below 2^-6 and ends at 448, int8 at 127."""
    return 127.0 if dtype == quantised.INT8 else 256.0


def swizzle_of(row_bytes: int) -> int:
    """Bytes of a swizzled row of tiles whose keys have `row_bytes`."""
    return 128 if row_bytes % 128 == 0 else 64


def split_weights(p: jax.Array, dtype: Any, terms: int) -> list[jax.Array]:
    """P in 0..1 -> terms in `dtype`: p * unit = sum_j term_j / base^j, in plain jnp."""
    rest, out = p * unit(dtype), []
    for _ in range(terms):
        if dtype == quantised.INT8:
            term = jnp.round(rest)
        else:
            term = rest.astype(dtype).astype(jnp.float32)
        out.append(term.astype(dtype))
        rest = (rest - term) * quantised.base(dtype)
    return out


def join_weights(o: jax.Array, cols: int, dtype: Any, terms: int) -> jax.Array:
    """`[Hv, terms * cols]` of `products` -> `[Hv, cols]` f32, still times `unit`."""
    parts = [o[:, j * cols : (j + 1) * cols] for j in range(terms)]
    if terms == 1:
        return parts[0].astype(jnp.float32)
    base = quantised.base(dtype)
    if dtype == quantised.INT8 and terms == 2:  # 64 keys x 127^2 x 128 fit 31 bits
        return (parts[0] * int(base) + parts[1]).astype(jnp.float32) * (1 / base)
    total = parts.pop().astype(jnp.float32)
    while parts:
        total = parts.pop().astype(jnp.float32) + total * (1 / base)
    return total


# ------------------------------------------------------------------------------ on the GPU


def _lane(number: int = 0) -> str:
    """PTX: registers l (lane), w (warp of the warpgroup) from the thread's index, operand $number."""
    return f"and.b32 l, ${number}, 31; shr.u32 w, ${number}, 5; and.b32 w, w, 3;"


def _xor(swizzle: int) -> str:
    """PTX: f, by which row l of a swizzled tile has its 16-byte chunks exchanged."""
    return "and.b32 f, l, 7;" if swizzle == 128 else "bfe.u32 f, l, 1, 2;"


def load_transposed(v: Any) -> jax.Array:
    """V `[tile, Hv]` in swizzled SMEM -> i32 `[Hv, tile / 4]`: wgmma's first operand, `V^T`.

    Four keys a word.  The layout says where registers go, not what they mean.
    """
    tile, hv = v.shape
    swizzle = swizzle_of(hv)
    result = plgpu.ShapeDtypeStruct((hv, tile // 4), jnp.dtype(jnp.int32), layout=ROWS)
    ref_type = plgpu.RefType(_swizzled_type(v.dtype, swizzle))

    @plgpu.inline_mgpu(arg_types=(ref_type,), return_type=result)
    def emit(_, ref):
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        i32 = ir.IntegerType.get_signless(32)
        lines = [".reg .b32 l, w, f, a, t, x<4>;", _lane(_count(hv, tile) + 1), _xor(swizzle)]
        lines += [
            f"xor.b32 f, f, w; shl.b32 f, f, 4; and.b32 a, l, 7; mad.lo.u32 a, a, {swizzle}, f;",
            f"shr.u32 t, l, 3; mad.lo.u32 a, t, {8 * hv}, a; add.u32 a, a, ${_count(hv, tile)};",
        ]
        out = 0
        for dims in range(0, hv, 64):
            across, flip = divmod(dims, swizzle)
            base = "a"
            if flip:
                lines.append("xor.b32 t, a, 64;")
                base = "t"
            for keys in range(0, tile, 32):
                offset = keys * hv + across * 8 * swizzle // swizzle
                offset = keys * hv + across * 8 * swizzle
                lines.append(
                    "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 "
                    f"{{x0, x1, x2, x3}}, [{base}+{offset}];"
                )
                for pair in ("x0, x1", "x2, x3"):
                    for order in ("0x6240", "0x7351"):
                        lines.append(f"prmt.b32 ${out}, {pair}, {order};")
                        out += 1
        ptx = "{\n" + "\n".join(lines) + "\n}"
        types = [i32] * out
        base, lane = mgpu.utils.memref_ptr(ref), mgpu.utils.thread_idx()
        constraints = ",".join(["=&r"] * out + ["r", "r"])
        struct = llvm.StructType.get_literal(types)
        words = llvm.inline_asm(struct, [base, lane], ptx, constraints, has_side_effects=True)
        return _pairs(mgpu, [llvm.extractvalue(i32, words, [i]) for i in range(out)], result, True)

    return emit(v)  # pyright: ignore[reportCallIssue]


def _count(hv: int, tile: int) -> int:
    """Registers a thread of V^T."""
    return hv // 64 * (tile // 32) * 4


def _swizzled_type(dtype: Any, swizzle: int):
    from pallas_kernels._mgpu import swizzled

    return swizzled(dtype, swizzle)


def _pairs(mgpu, values, result, signed=None):
    """Registers `[rows / 64][cols / 8][2 row halves]` of pairs, given one by one."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    layout = mgpu.WGMMA_LAYOUT
    shape = layout.registers_shape(result.shape)
    pair = ir.VectorType.get((2,), values[0].type)
    registers = np.empty(shape, dtype=object)
    for i, at in enumerate(np.ndindex(shape)):
        registers[at] = vector.from_elements(pair, values[2 * i : 2 * i + 2])
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def _singles(registers):
    """The values of pairs of registers, in order."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    at = lambda x, i: vector.extract(
        x, dynamic_position=[], static_position=ir.DenseI64ArrayAttr.get([i])
    )
    return [at(x, i) for x in registers.flat for i in range(2)]


def store_weights(p: jax.Array, ref: Any, dtype: Any, terms: int) -> None:
    """P f32 `[tile, cols]`, times `unit` -> its terms, `[terms * cols, tile]` bytes, swizzled."""
    tile, cols = p.shape
    swizzle = swizzle_of(tile)
    if tile > swizzle:
        raise NotImplementedError(f"tiles of {tile} keys are more than a swizzled row")

    @plgpu.inline_mgpu(arg_types=(ROWS, plgpu.RefType()))
    def emit(_, values, ref):
        from jax.experimental.mosaic import gpu as mgpu

        group = 8 * swizzle
        term = cols // 8 * group
        for at in np.ndindex(tile // 64, cols // 8):
            own = _singles(values.registers[at])  # (row, col), (row, col + 1), (row + 8, col), ...
            lines = [
                ".reg .b32 l, w, f, a, t, u, x<3>, i<4>; .reg .b16 b<2>;",
                ".reg .f32 y<4>, z<4>; .reg .f16 h<4>;",
                _lane(5),
                _xor(swizzle),
                f"xor.b32 f, f, w; shl.b32 f, f, 4; and.b32 a, l, 7; mad.lo.u32 a, a, {swizzle}, f;",
                *([f"xor.b32 a, a, {64 * at[0]};"] if at[0] else []),
                f"bfe.u32 t, l, 3, 1; mad.lo.u32 a, t, {term if terms > 1 else 0}, a;",
                f"add.u32 a, a, $4; add.u32 a, a, {at[1] * group};",
                *(f"mov.f32 y{i}, ${i};" for i in range(4)),
            ]
            for j in range(terms):
                lines += _encode(dtype, f"x{j}", last=j == terms - 1)
            to = "stmatrix.sync.aligned.m8n8.{}.trans.shared.b16 [a+{}], {{{}}};"
            lines.append(to.format("x2", 0, "x0, x1") if terms > 1 else to.format("x1", 0, "x0"))
            if terms == 3:
                lines.append(to.format("x1", 2 * term, "x2"))
            ptx = "{\n" + "\n".join(lines) + "\n}"
            base, lane = mgpu.utils.memref_ptr(ref), mgpu.utils.thread_idx()
            mgpu.utils.inline_ptx(ptx, *own, base, lane, has_side_effects=True)

    emit(p, ref)  # pyright: ignore[reportCallIssue]


def _encode(dtype: Any, word: str, last: bool) -> list[str]:
    """PTX: y0..y3 (two columns of a row, then of the row 8 below) -> `word`; y the rest."""
    base = quantised.base(dtype)
    scale = f"0f{np.float32(base).view(np.uint32):08X}"
    if dtype == quantised.INT8:
        lines = [f"cvt.rni.s32.f32 i{i}, y{i};" for i in range(4)]
        if not last:
            for i in range(4):
                lines.append(f"cvt.rn.f32.s32 z{i}, i{i}; sub.f32 y{i}, y{i}, z{i};")
                lines.append(f"mul.f32 y{i}, y{i}, {scale};")
        lines.append("prmt.b32 t, i0, i2, 0x0040; prmt.b32 u, i1, i3, 0x0040;")
        return [*lines, f"prmt.b32 {word}, t, u, 0x5410;"]
    lines = [f"cvt.rn.satfinite.e4m3x2.f32 b{i}, y{i + 2}, y{i};" for i in range(2)]
    if not last:
        for i in range(2):
            lines.append(f"cvt.rn.f16x2.e4m3x2 t, b{i}; mov.b32 {{h{i}, h{i + 2}}}, t;")
        for i in range(4):
            lines.append(f"cvt.f32.f16 z{i}, h{i}; sub.f32 y{i}, y{i}, z{i};")
            lines.append(f"mul.f32 y{i}, y{i}, {scale};")
    return [*lines, f"mov.b32 {word}, {{b0, b1}};"]


def products(words: jax.Array, ref: Any, dtype: Any, cols: int) -> jax.Array:
    """`V^T P^T [Hv, cols]`, rows permuted, i32 or f32, of `load_transposed` and `store_weights`."""
    hv, tile = words.shape[0], words.shape[1] * 4
    swizzle, integer = swizzle_of(tile), dtype == quantised.INT8
    kind = jnp.dtype(jnp.int32 if integer else jnp.float32)
    result = plgpu.ShapeDtypeStruct((hv, cols), kind, layout=ROWS)

    @plgpu.inline_mgpu(arg_types=(ROWS, plgpu.RefType()), return_type=result)
    def emit(_, words, ref):
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import llvm

        own = _singles(words.registers)
        each, count = cols // 2, hv // 64 * (cols // 2)
        address = count + len(own)
        high = (8 * swizzle >> 4) | ((1 if swizzle == 128 else 2) << 30)
        letter, types = ("r", "s32.s8.s8") if integer else ("f", "f32.e4m3.e4m3")
        tail = "" if integer else ", 1, 1"
        lines = [
            ".reg .pred no; .reg .b32 low, high; .reg .b64 d;",
            "setp.ne.b32 no, 0, 0;",
            f"and.b32 low, ${address}, 0x3FFFF; shr.u32 low, low, 4; mov.b32 high, {high};",
            "wgmma.fence.sync.aligned;",
        ]
        steps = tile // 32
        for k in range(steps):
            lines.append("mov.b64 d, {low, high};")
            for m in range(hv // 64):
                acc = ", ".join(f"${m * each + i}" for i in range(each))
                first = count + (m * steps + k) * 4
                a = ", ".join(f"${first + i}" for i in range(4))
                lines.append(
                    f"wgmma.mma_async.sync.aligned.m64n{cols}k32.{types} "
                    f"{{{acc}}}, {{{a}}}, d, {'1' if k else 'no'}{tail};"
                )
            lines.append("add.u32 low, low, 2;")
        lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
        lines = [x.replace(", 1, 1, 1;", ", yes, 1, 1;") for x in lines]
        lines = [x.replace("d, 1;", "d, yes;") for x in lines]
        lines.insert(2, ".reg .pred yes; setp.eq.b32 yes, 0, 0;")
        ptx = "{\n" + "\n".join(lines) + "\n}"
        scalar = ir.IntegerType.get_signless(32) if integer else ir.F32Type.get()
        constraints = ",".join([f"=&{letter}"] * count + ["r"] * (len(own) + 1))
        struct = llvm.StructType.get_literal([scalar] * count)
        args = [*own, mgpu.utils.memref_ptr(ref)]
        out = llvm.inline_asm(struct, args, ptx, constraints, has_side_effects=True)
        values = [llvm.extractvalue(scalar, out, [i]) for i in range(count)]
        return _pairs(mgpu, values, result, True if integer else None)

    return emit(words, ref)  # pyright: ignore[reportCallIssue]


def store_rows(o: jax.Array, ref: Any) -> None:
    """O `[Hv, cols]` of `products`, rows permuted -> plain SMEM `[cols, Hv]` in order."""

    @plgpu.inline_mgpu(arg_types=(ROWS, plgpu.RefType()))
    def emit(_, values, ref):
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, vector

        hv, cols = o.shape
        index, kind = ir.IndexType.get(), values.mlir_dtype
        thread = arith.index_cast(index, mgpu.utils.thread_idx())
        const = lambda x: arith.constant(index, x)
        lane = arith.remui(thread, const(32))
        warp = arith.remui(arith.divui(thread, const(32)), const(4))
        row = arith.muli(arith.divui(lane, const(4)), const(2))
        row = arith.addi(row, arith.muli(warp, const(16)))
        column = arith.muli(arith.remui(lane, const(4)), const(2))
        pair = ir.VectorType.get((2,), kind)
        for at in np.ndindex(hv // 64, cols // 8):
            own = _singles(values.registers[at])
            for i in range(2):
                words = vector.from_elements(pair, [own[i], own[i + 2]])
                where = [
                    arith.addi(column, const(8 * at[1] + i)),
                    arith.addi(row, const(64 * at[0])),
                ]
                vector.store(words, ref, where)

    emit(o, ref)  # pyright: ignore[reportCallIssue]


del lax
