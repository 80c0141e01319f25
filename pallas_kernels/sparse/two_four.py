"""A dense matrix times a 2:4 one, whose tiles are spread out in shared memory.

    out = x @ w,  w[4 g + places[g, i, f], f] = values[g, i, f],  i = 0, 1

HBM sees half the weight's bytes and two bits a value.  A CTA has 64 rows of x and 64 columns of the
weight; of every 512 rows of the weight it reads 64 bytes of places a column and the four arrays of
values that belong to them, writes eight planes of 64 rows - one for each place of a byte's two
groups - and multiplies them by the columns of x in the same order, in which x comes.
"""

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mgpu
from pallas_kernels._mgpu import Ops, cdiv

SIDE = 64  # rows of x, and columns of the weight, of a CTA
PLANES = 8  # a byte of places stands for two groups of four rows
DEPTH = PLANES * SIDE  # rows of the weight that are spread out at a time
DTYPES = ("bfloat16", "float16")


def two_four_matmul(
    x: jax.Array, values: jax.Array, places: jax.Array, *, interpret: Any = None
) -> jax.Array:
    """`x @ w`, accumulated in f32.

    Args:
      x: bf16 or f16 `[T, D]`, D a multiple of 512.
      values: of x's dtype, `[D / 4, 2, F]`, F a multiple of 64.
      places: u8 `[D / 8, F]`: two bits for each of the four values of two neighbouring groups.
      interpret: True runs the GPU interpreter.

    Returns:
      `[T, F]`.

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
      NotImplementedError: a dtype or a size that this kernel lacks.

    >>> s, b = jax.ShapeDtypeStruct, jnp.bfloat16
    >>> w = s((128, 2, 192), b), s((64, 192), jnp.uint8)
    >>> jax.eval_shape(two_four_matmul, s((5, 512), b), *w).shape
    (5, 192)
    """
    (T, D), F = x.shape, values.shape[-1]
    if values.shape != (D // 4, 2, F) or places.shape != (cdiv(D, 8), F) or D % 4:
        raise ValueError(f"{x.shape=}, {values.shape=} and {places.shape=} do not fit")
    if x.dtype != values.dtype or places.dtype != jnp.uint8:
        raise ValueError(f"dtypes do not fit: {x.dtype}, {values.dtype}, {places.dtype}")
    if x.dtype.name not in DTYPES:
        raise NotImplementedError(f"{x.dtype.name}: it takes {' and '.join(DTYPES)}")
    if D % DEPTH or F % SIDE or 0 in (T, D, F):
        raise NotImplementedError(f"[{T}, {D}] @ [{D}, {F}]: D is in {DEPTH}s and F in {SIDE}s")
    steps, rows = D // DEPTH, cdiv(T, SIDE)
    ops = Ops(bool(interpret))
    with jax.named_scope("two_four_matmul"):
        # columns of x by (step, place in a byte's two groups, byte): the order of the planes
        x = jnp.pad(x, ((0, rows * SIDE - T), (0, 0))).reshape(-1, steps, SIDE, PLANES)
        x = x.swapaxes(2, 3).reshape(rows * SIDE, D)
        values = values.reshape(D // 8, 4, F)

        def body(x, values, places, out, x_smem, w_smem, o_smem, full):
            row, column = lax.axis_index("row"), pl.ds(lax.axis_index("column") * SIDE, SIDE)

            def step(i, carry, acc):
                part = ops.uncarry(acc, carry)
                for p in range(PLANES):
                    source = x.at[pl.ds(row * SIDE, SIDE), pl.ds(i * DEPTH + p * SIDE, SIDE)]
                    plgpu.copy_gmem_to_smem(source, x_smem.at[p], full)
                spread(values, places, pl.ds(i * SIDE, SIDE), column, w_smem, ops.interpret)
                plgpu.commit_smem()
                plgpu.barrier_wait(full)
                for p in range(PLANES):
                    part = ops.wgmma(part, x_smem.at[p], w_smem.at[p])
                ops.wait(0)
                return ops.carry(part)

            def multiply(acc):
                f = lambda i, carry: step(i, carry, acc)
                carry = lax.fori_loop(jnp.int32(0), jnp.int32(steps), f, ops.carry(acc))
                return ops.load(ops.uncarry(acc, carry))

            o_smem[...] = ops.with_acc(multiply, (SIDE, SIDE)).astype(x.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(o_smem, out.at[pl.ds(row * SIDE, SIDE), column])
            plgpu.wait_smem_to_gmem(0)

        swizzled = _mgpu.swizzled(x.dtype)
        smem = lambda *shape: plgpu.SMEM(shape, x.dtype, transforms=swizzled)
        out = plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct((rows * SIDE, F), x.dtype),
            scratch_types=[
                smem(PLANES, SIDE, SIDE),
                smem(PLANES, SIDE, SIDE),
                smem(SIDE, SIDE),
                plgpu.Barrier(num_arrivals=PLANES),
            ],
            grid=(rows, F // SIDE),
            grid_names=("row", "column"),
            interpret=_mgpu.interpret_params(interpret),
            compiler_params=plgpu.CompilerParams(),
        )(x, values, places)
        return out[:T]


def spread(values: Any, places: Any, rows: Any, column: Any, planes: Any, interpret: bool) -> None:
    """64 bytes of places a column, and their values, as eight planes of 64 rows."""
    if interpret:
        load = lambda ref: ref[...]
    else:
        load = lambda ref: plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)
    packed = load(places.at[rows, column]).astype(jnp.int32)
    for group in (0, 1):
        stored = [load(values.at[rows, 2 * group + i, column]) for i in (0, 1)]
        at = [(packed >> (4 * group + 2 * i)) & 3 for i in (0, 1)]
        for place in range(4):
            zero = jnp.zeros_like(stored[0])
            first = jnp.where(at[0] == place, stored[0], zero)
            planes[4 * group + place] = jnp.where(at[1] == place, stored[1], first)
