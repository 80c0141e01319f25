"""Pools of one byte a value: what the queries, the scales and a tile of keys go through.

A stored key is `k_scale * k`, so `k_scale` joins the columns of the scores and `v_scale` those of
P; a value itself is only converted, in registers.  float8_e4m3fn becomes f16 (one instruction for
two values; there is none to bf16), int8 becomes bf16.  K goes from registers into the matmul; V,
whose transpose must come from shared memory, is written back at 16 bits.

Queries in bf16 may not fit f16.  They are divided by a power of two, one per token and head, which
is exact and comes back as a factor of the scores.
"""

import itertools
import math
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

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
    """The 16-bit type of the matmuls.

    >>> [compute_dtype(jnp.bfloat16, d).name for d in (jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn)]
    ['bfloat16', 'bfloat16', 'float16']
    """
    return jnp.dtype(jnp.float16 if jnp.dtype(pool_dtype) == E4M3 else q_dtype)


def normalised(q: jax.Array, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """`(q / 2^e in dtype, 2^e)` for q `[T, N, H]`; e puts the largest of a token and head near 1.

    2^e is 1 where q fits dtype anyway.

    >>> x, factor = normalised(jnp.array([[[3e38, 1.0]]], jnp.bfloat16), jnp.float16)
    >>> bool(jnp.isfinite(x).all()), jnp.log2(factor).tolist()
    (True, [[127.0]])
    """
    if q.dtype == dtype:
        return q, jnp.ones(q.shape[:2], jnp.float32)
    _, e = jnp.frexp(jnp.max(jnp.abs(q.astype(jnp.float32)), axis=-1))
    e = jnp.clip(e, -120, 127)
    half = e // 2  # 2^-127 is no normal number: two steps
    scaled = q.astype(jnp.float32) * _exp2(-half)[..., None] * _exp2(half - e)[..., None]
    return scaled.astype(dtype), _exp2(half) * _exp2(e - half)


def _exp2(e: jax.Array) -> jax.Array:
    return jnp.ldexp(jnp.float32(1), e)


def convert(x: jax.Array, dtype: Any) -> jax.Array:
    """A tile of stored values in `dtype`, exact."""
    if x.dtype == INT8 and jnp.dtype(dtype) == jnp.float16:
        return x.astype(jnp.bfloat16).astype(jnp.float32).astype(dtype)
    return x.astype(dtype)


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
