"""Pools of one byte a value: what the queries, the scales and a tile of keys go through.

A stored key is `k_scale * k`, so `k_scale` joins the columns of the scores and `v_scale` those of
P.  K is multiplied as it lies: tensor cores take one-byte operands if both are, so the queries
become sums of terms of K's type, q = factor * (q_0 + q_1 / b + ...).  A bf16 has 8 significant bits
and an e4m3 holds 4, so two terms say it all; two of int8 say 15 bits of the largest of a token and
head.  The terms are more columns of a matmul that has columns to spare.

V is multiplied as it lies by the split-KV kernel (`onebyte`).  The prefill kernel converts both:
float8_e4m3fn to f16 (one instruction for two values; there is none to bf16), int8 to bf16.
"""

import itertools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

E4M3 = jnp.dtype(jnp.float8_e4m3fn)
INT8 = jnp.dtype(jnp.int8)
SCALES_PER_ROW = 32  # f32 scales of one copy: TMA moves 128 bytes at least
SMALLEST = 2.0**-60  # a scale below counts as this much: its values are zeros


def is_quantised(dtype: Any) -> bool:
    """Whether a pool of `dtype` has scales.

    >>> is_quantised(jnp.int8), is_quantised(jnp.bfloat16)
    (True, False)
    """
    return jnp.dtype(dtype) in (E4M3, INT8)


def compute_dtype(q_dtype: Any, pool_dtype: Any) -> Any:
    """The 16-bit type that stored values are converted to.

    >>> [compute_dtype(jnp.bfloat16, d).name for d in (jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn)]
    ['bfloat16', 'bfloat16', 'float16']
    """
    return jnp.dtype(jnp.float16 if jnp.dtype(pool_dtype) == E4M3 else q_dtype)


def num_terms(q_dtype: Any, pool_dtype: Any) -> int:
    """Terms that a query is split into: f16 has three bits more than bf16.

    >>> num_terms(jnp.bfloat16, E4M3), num_terms(jnp.float16, E4M3), num_terms(jnp.float16, INT8)
    (2, 3, 2)
    """
    return 3 if jnp.dtype(q_dtype) == jnp.float16 and jnp.dtype(pool_dtype) == E4M3 else 2


def base(pool_dtype: Any) -> float:
    """A term counts so many times the next one."""
    return 16.0 if jnp.dtype(pool_dtype) == E4M3 else 128.0


def factor_of(top: jax.Array, pool_dtype: Any) -> tuple[jax.Array, jax.Array]:
    """(factor, 1 / factor) by which queries of at most `top` become numbers that terms hold.

    Of e4m3 a power of two, so that nothing is lost.

    >>> [float(x) for x in factor_of(jnp.float32(3.0), jnp.float8_e4m3fn)]
    [0.0625, 16.0]
    """
    if jnp.dtype(pool_dtype) == INT8:
        top = jnp.maximum(top, 2.0**-110)
        return top * (1.0 / 127.0), 127.0 / top
    one = 1 << 23  # the exponent's unit
    bits = lax.bitcast_convert_type(top, jnp.int32) & (255 * one)
    bits = jnp.minimum(jnp.maximum(bits + one, 8 * one), 253 * one)
    number = lambda x: lax.bitcast_convert_type(x, jnp.float32)
    return number(bits) * (1.0 / 64.0), number(254 * one - bits) * 64.0


def convert(x: jax.Array, dtype: Any) -> jax.Array:
    """A tile of stored values in `dtype`, exact."""
    if x.dtype == INT8 and jnp.dtype(dtype) == jnp.float16:
        return x.astype(jnp.bfloat16).astype(jnp.float32).astype(dtype)
    return x.astype(dtype)


def gather(ref: Any, *index: Any, interpret: bool) -> jax.Array:
    """`ref[index]` from GMEM, one value per row of a WGMMA tile; some indices may be scalars."""
    if interpret:
        return ref[...][tuple(index)]
    rows, splat = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WG_SPLAT
    index = tuple(jnp.asarray(x, jnp.int32) for x in index)
    (shape,) = {x.shape for x in index if x.ndim}
    types = (plgpu.RefType(), *(rows if x.ndim else splat for x in index))
    result = plgpu.ShapeDtypeStruct(shape, jnp.dtype(ref.dtype), layout=rows)

    @plgpu.inline_mgpu(arg_types=types, return_type=result)
    def emit(_, source, *index):
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, memref, vector

        layout, kind = mgpu.WGMMA_ROW_LAYOUT, ir.MemRefType(source.type).element_type
        (many,) = {x.registers.shape for x in index if x.registers.size > 1 or x.shape}
        registers = index[0].registers.reshape(-1)[:1].repeat(math.prod(many)).reshape(many)
        scalar = lambda x: vector.extract(x, [], [0]) if isinstance(x.type, ir.VectorType) else x
        for at in itertools.product(*map(range, many)):
            own = [x.registers[at] if x.shape else x.registers.item() for x in index]
            where = [arith.index_cast(ir.IndexType.get(), scalar(x)) for x in own]
            value = memref.load(source, where)
            registers[at] = vector.broadcast(ir.VectorType.get((1,), kind), value)
        signed = True if isinstance(kind, ir.IntegerType) else None
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)

    return emit(ref, *index)  # pyright: ignore


def load_rows(ref: Any, block_size: int, offset: Any, size: int, interpret: bool) -> jax.Array:
    """The `size` scales of a tile from SMEM, one per row of a WGMMA tile.

    Blocks of fewer than 32 keys come with their neighbours' scales: row r lies in copy
    `r // block_size`, `offset` after its beginning.
    """
    rows = plgpu.Layout.WGMMA.reduce(1)
    if block_size >= SCALES_PER_ROW:
        return ref[...] if interpret else plgpu.load(ref, layout=rows, optimized=False)
    if interpret:
        index = jnp.arange(size, dtype=jnp.int32)
        index = index // block_size * SCALES_PER_ROW + offset + index % block_size
        return ref[...][index]
    result = plgpu.ShapeDtypeStruct((size,), jnp.dtype(jnp.float32), layout=rows)

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=result)
    def gather(_, source, begin):
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, memref, vector

        layout = mgpu.WGMMA_ROW_LAYOUT
        index = ir.IndexType.get()
        const = lambda x: arith.constant(index, x)
        start = arith.index_cast(index, begin.registers.item())
        sizes = layout.registers_shape((size,))
        registers = begin.registers.reshape(-1).repeat(math.prod(sizes)).reshape(sizes)
        where = zip(itertools.product(*map(range, sizes)), layout.thread_idxs((size,)), strict=True)
        for at, (row,) in where:
            copy = arith.muli(arith.divui(row, const(block_size)), const(SCALES_PER_ROW))
            inside = arith.addi(arith.remui(row, const(block_size)), start)
            value = memref.load(source, [arith.addi(copy, inside)])
            registers[at] = vector.broadcast(ir.VectorType.get((1,), value.type), value)
        return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)

    return gather(ref, jnp.asarray(offset, jnp.int32))  # pyright: ignore[reportCallIssue]
