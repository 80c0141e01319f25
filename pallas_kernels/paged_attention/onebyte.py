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

P is split into terms like the queries (`split`), relative to the largest of its own
tile of keys: what is small beside another tile's keys loses nothing.
"""

import itertools
import struct
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import lanes, swizzled

from . import quantised

ROWS = plgpu.Layout.WGMMA


def unit(dtype: Any) -> float:
    """What P = 1 is stored as: e4m3 is coarse below 2^-6 and ends at 448, int8 at 127."""
    return 127.0 if dtype == quantised.INT8 else 256.0


def swizzle_of(row_bytes: int) -> int:
    """Bytes of a swizzled row of tiles whose keys have `row_bytes`."""
    return 128 if row_bytes % 128 == 0 else 64


def split(x: jax.Array, dtype: Any, terms: int) -> list[jax.Array]:
    """x f32 -> terms in `dtype`: x = sum_j term_j / base^j, in plain jnp."""
    out = []
    for _ in range(terms):
        whole = jnp.round(x) if dtype == quantised.INT8 else x
        out.append(lax.optimization_barrier(whole.astype(dtype)))  # XLA may skip cast pairs
        x = (x - out[-1].astype(jnp.float32)) * quantised.base(dtype)
    return out


def join(o: jax.Array, cols: int, dtype: Any, terms: int) -> jax.Array:
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

# l: lane, w: warp of the warpgroup, f: the chunks of 16 bytes of row l are exchanged by it
_PLACE = """.reg .b32 l, w, f, a, t, u, x<4>;
and.b32 l, {thread}, 31; shr.u32 w, {thread}, 5; and.b32 w, w, 3;
{exchange}
xor.b32 f, f, w; shl.b32 f, f, 4; and.b32 a, l, 7; mad.lo.u32 a, a, {swizzle}, f;"""
_EXCHANGE = {128: "and.b32 f, l, 7;", 64: "bfe.u32 f, l, 1, 2;"}


def _place(swizzle: int, thread: str) -> str:
    """PTX: a, where chunk w of row l % 8 lies in a swizzled tile."""
    return _PLACE.format(thread=thread, exchange=_EXCHANGE[swizzle], swizzle=swizzle)


def load_ptx(hv: int, tile: int) -> tuple[str, int]:
    """(PTX, its number of results), of operands base and thread."""
    swizzle = swizzle_of(hv)
    count = hv // 64 * (tile // 32) * 4
    lines = [_place(swizzle, f"${count + 1}")]
    lines += [f"shr.u32 t, l, 3; mad.lo.u32 a, t, {8 * hv}, a; add.u32 a, a, ${count};"]
    lines += ["xor.b32 u, a, 64;"]
    out = 0
    for dims in range(0, hv, 64):
        across, odd = divmod(dims, swizzle)
        for keys in range(0, tile, 32):
            at = f"{'u' if odd else 'a'}+{keys * hv + across * 8 * swizzle}"
            lines.append(
                f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {{x0, x1, x2, x3}}, [{at}];"
            )
            for pair in ("x0, x1", "x2, x3"):
                for order in ("0x6240", "0x7351"):
                    lines.append(f"prmt.b32 ${out}, {pair}, {order};")
                    out += 1
    return "{\n" + "\n".join(lines) + "\n}", count


def store_ptx(width: int, cols: int, dtype: Any, terms: int, row: int, column: int) -> str:
    """PTX: terms of 4 values from row `64 * row` and column `8 * column` on.

    Operands are the values, the base and the thread; a column becomes a row of `width` bytes.
    """
    swizzle = swizzle_of(width)
    across, flip = divmod(64 * row, swizzle)
    offset = across * 8 * swizzle + column * 8 * width
    lines = [
        _place(swizzle, "$5"),
        ".reg .b32 i<4>; .reg .b16 b<2>; .reg .f32 y<4>, z<4>; .reg .f16 h<4>;",
        f"xor.b32 a, a, {flip};",
        f"bfe.u32 t, l, 3, 1; mad.lo.u32 a, t, {cols * width if terms > 1 else 0}, a;",
        f"add.u32 a, a, $4; add.u32 a, a, {offset};",
        *(f"mov.f32 y{i}, ${i};" for i in range(4)),
    ]
    for j in range(terms):
        lines += _encode(dtype, f"x{j}", last=j == terms - 1)
    to = "stmatrix.sync.aligned.m8n8.{}.trans.shared.b16 [a+{}], {{{}}};"
    lines.append(to.format("x2", 0, "x0, x1") if terms > 1 else to.format("x1", 0, "x0"))
    if terms == 3:
        lines.append(to.format("x1", 2 * cols * width, "x2"))
    return "{\n" + "\n".join(lines) + "\n}"


def _encode(dtype: Any, word: str, last: bool) -> list[str]:
    """PTX: y0..y3 (two columns of a row, then of the row 8 below) -> `word`; y the rest."""
    base = "0f" + struct.pack(">f", quantised.base(dtype)).hex().upper()
    rest = lambda i: f"sub.f32 y{i}, y{i}, z{i}; mul.f32 y{i}, y{i}, {base};"
    if dtype == quantised.INT8:
        lines = [f"cvt.rni.s32.f32 i{i}, y{i};" for i in range(4)]
        if not last:
            lines += [f"cvt.rn.f32.s32 z{i}, i{i}; {rest(i)}" for i in range(4)]
        lines.append("prmt.b32 t, i0, i2, 0x0040; prmt.b32 u, i1, i3, 0x0040;")
        return [*lines, f"prmt.b32 {word}, t, u, 0x5410;"]
    lines = [f"cvt.rn.satfinite.e4m3x2.f32 b{i}, y{i + 2}, y{i};" for i in range(2)]
    if not last:
        for i in range(2):
            lines.append(f"cvt.rn.f16x2.e4m3x2 t, b{i}; mov.b32 {{h{i}, h{i + 2}}}, t;")
        lines += [f"cvt.f32.f16 z{i}, h{i}; {rest(i)}" for i in range(4)]
    return [*lines, f"mov.b32 {word}, {{b0, b1}};"]


def product_ptx(hv: int, tile: int, cols: int, dtype: Any) -> tuple[str, int]:
    """(PTX, its number of results), of the words of V^T and the base of P's terms."""
    swizzle, steps, integer = swizzle_of(tile), tile // 32, dtype == quantised.INT8
    each = cols // 2
    count = hv // 64 * each
    words = hv // 64 * steps * 4
    high = (8 * swizzle >> 4) | ((1 if swizzle == 128 else 2) << 30)
    types, tail = ("s32.s8.s8", "") if integer else ("f32.e4m3.e4m3", ", 1, 1")
    lines = [
        ".reg .pred first, later; .reg .b32 low, high; .reg .b64 d;",
        "setp.ne.b32 first, 0, 0; setp.eq.b32 later, 0, 0;",
        f"and.b32 low, ${count + words}, 0x3FFFF; shr.u32 low, low, 4; mov.b32 high, {high};",
        "wgmma.fence.sync.aligned;",
    ]
    for k in range(steps):
        lines.append("mov.b64 d, {low, high};")
        for m in range(hv // 64):
            acc = ", ".join(f"${m * each + i}" for i in range(each))
            a = ", ".join(f"${count + (m * steps + k) * 4 + i}" for i in range(4))
            lines.append(
                f"wgmma.mma_async.sync.aligned.m64n{cols}k32.{types} "
                f"{{{acc}}}, {{{a}}}, d, {'later' if k else 'first'}{tail};"
            )
        lines.append("add.u32 low, low, 2;")
    lines += ["wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned 0;"]
    return "{\n" + "\n".join(lines) + "\n}", count


def _tiles(rows: int, cols: int):
    """Tiles of 64 x 8, of which a thread holds 4 values."""
    return itertools.product(range(rows // 64), range(cols // 8))


def _assemble(ptx: str, count: int, kind: Any, args: list) -> list:
    """`count` results of type `kind` of inline PTX."""
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import llvm

    letter = "f" if kind == ir.F32Type.get() else "r"
    constraints = ",".join([f"=&{letter}"] * count + ["r"] * len(args))
    struct = llvm.StructType.get_literal([kind] * count)
    out = llvm.inline_asm(struct, args, ptx, constraints, has_side_effects=True)
    return [llvm.extractvalue(kind, out, [i]) for i in range(count)]


def _pairs(values, shape, signed):
    """A WGMMA tile of values in the order of its registers."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import vector

    layout = mgpu.WGMMA_LAYOUT
    splat = mgpu.FragmentedArray.splat(values[0], shape, layout, is_signed=signed)
    pair, registers = ir.VectorType.get((2,), values[0].type), splat.registers.copy()
    for i in range(registers.size):
        registers.flat[i] = vector.from_elements(pair, values[2 * i : 2 * i + 2])
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def singles(registers) -> list:
    """The values of registers, in order."""
    return [x for register in registers for x in lanes(register)]


def load_transposed(v: Any) -> jax.Array:
    """V `[tile, Hv]` in swizzled SMEM -> i32 `[Hv, tile / 4]`: wgmma's first operand, `V^T`.

    Four keys a word.  The layout says how many registers there are, not what they mean.
    """
    tile, hv = v.shape
    shape, ref_type = (hv, tile // 4), plgpu.RefType(_transforms(v))
    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(jnp.int32), layout=ROWS)

    @plgpu.inline_mgpu(arg_types=(ref_type,), return_type=result)
    def emit(_, ref):
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir

        args = [utils.memref_ptr(ref), utils.thread_idx()]
        return _pairs(
            _assemble(*load_ptx(hv, tile), ir.IntegerType.get_signless(32), args), shape, True
        )

    return emit(v)  # pyright: ignore[reportCallIssue]


def store_terms(x: jax.Array, ref: Any, dtype: Any, terms: int) -> None:
    """`[rows, cols]` f32 -> `[terms * cols, rows]` bytes in swizzled SMEM, `split`'s terms of it.

    Rows are permuted on the way: those of a lane, i and i + 8, become neighbours.
    """
    rows, cols = x.shape

    @plgpu.inline_mgpu(arg_types=(ROWS, plgpu.RefType(_transforms(ref))))
    def emit(_, values, ref):
        from jax.experimental.mosaic.gpu import utils

        for row, column in _tiles(rows, cols):
            args = [*singles(values.registers[row, column].flat), utils.memref_ptr(ref)]
            ptx = store_ptx(rows, cols, dtype, terms, row, column)
            utils.inline_ptx(ptx, *args, utils.thread_idx(), has_side_effects=True)

    emit(x, ref)  # pyright: ignore[reportCallIssue]


def _transforms(ref: Any) -> tuple[Any, ...]:
    """Those of a tile of bytes."""
    return swizzled(ref.dtype, swizzle_of(ref.shape[-1]))


def products(words: jax.Array, ref: Any, dtype: Any, cols: int) -> jax.Array:
    """`V^T P^T [Hv, cols]`, rows permuted, i32 or f32, of `load_transposed` and `store_terms`."""
    hv, tile = words.shape[0], words.shape[1] * 4
    integer = dtype == quantised.INT8
    kind = jnp.dtype(jnp.int32 if integer else jnp.float32)
    result = plgpu.ShapeDtypeStruct((hv, cols), kind, layout=ROWS)

    @plgpu.inline_mgpu(arg_types=(ROWS, plgpu.RefType(_transforms(ref))), return_type=result)
    def emit(_, words, ref):
        from jax.experimental.mosaic.gpu import utils
        from jaxlib.mlir import ir

        scalar = ir.IntegerType.get_signless(32) if integer else ir.F32Type.get()
        args = [*singles(words.registers.flat), utils.memref_ptr(ref)]
        out = _assemble(*product_ptx(hv, tile, cols, dtype), scalar, args)
        return _pairs(out, (hv, cols), True if integer else None)

    return emit(words, ref)  # pyright: ignore[reportCallIssue]


def load_queries(ref: Any) -> jax.Array:
    """Queries `[cols, H]` of 16 bits in GMEM -> f32 `[H, cols]`, rows permuted as by `products`."""
    cols, h = ref.shape
    result = plgpu.ShapeDtypeStruct((h, cols), jnp.dtype(jnp.float32), layout=ROWS)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),), return_type=result)
    def emit(_, source):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, vector

        pair = ir.VectorType.get((2,), ir.MemRefType(source.type).element_type)
        f32, values = ir.F32Type.get(), []
        for at in _tiles(h, cols):
            own = [singles([vector.load(pair, source, _where(at, i))]) for i in range(2)]
            order = (own[0][0], own[1][0], own[0][1], own[1][1])
            values += [arith.extf(f32, x) for x in order]
        return _pairs(values, (h, cols), None)

    return emit(ref)  # pyright: ignore[reportCallIssue]


def _where(at: tuple[int, ...], column: int) -> list:
    """[column, dim] of the pair of dims that this thread's tile `at` has in its `column` of 2."""
    from jax.experimental.mosaic.gpu import utils
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith

    index = ir.IndexType.get()
    const = lambda x: arith.constant(index, x)
    thread = arith.index_cast(index, utils.thread_idx())
    lane = arith.remui(thread, const(32))
    warp = arith.remui(arith.divui(thread, const(32)), const(4))
    dim = arith.muli(arith.divui(lane, const(4)), const(2))
    dim = arith.addi(dim, arith.muli(warp, const(16)))
    first = arith.muli(arith.remui(lane, const(4)), const(2))
    return [
        arith.addi(first, const(8 * at[1] + column)),
        arith.addi(dim, const(64 * at[0])),
    ]


def store_rows(o: jax.Array, ref: Any) -> None:
    """O `[Hv, cols]` of `products`, rows permuted -> plain SMEM `[cols, Hv]` in order."""
    hv, cols = o.shape

    @plgpu.inline_mgpu(arg_types=(ROWS, plgpu.RefType()))
    def emit(_, values, ref):
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import vector

        pair = ir.VectorType.get((2,), values.mlir_dtype)
        for at in _tiles(hv, cols):
            own = singles(values.registers[at].flat)
            for i in range(2):
                words = vector.from_elements(pair, [own[i], own[i + 2]])
                vector.store(words, ref, _where(at, i))

    emit(o, ref)  # pyright: ignore[reportCallIssue]
