"""Rotary position embedding: a CTA turns all heads of a token, in one read and one write."""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import cdiv, interpret_params

from ._vectors import Vectors, checked_rows

LARGEST = 32_768  # bytes of a token


def rope(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interpret: Any = None) -> jax.Array:
    """`(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)`, feature i with feature i + H/2.

    Its gradient is `rope(dy, cos, -sin)`.

    Args:
      x: `[T, N, H]` bf16, f16 or f32, H a multiple of 16.
      cos: f32 `[T, H / 2]`.
      sin: f32 `[T, H / 2]`.
      interpret: True runs the GPU interpreter.

    Returns:
      `[T, N, H]` in x's dtype; the arithmetic is f32.

    Raises:
      ValueError: shapes that do not go together.
      NotImplementedError: what this kernel cannot do.

    References:
      Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021.

    >>> x, angles = jnp.ones((4, 2, 64), jnp.bfloat16), jnp.ones((4, 32))
    >>> jax.eval_shape(rope, x, angles, angles).shape
    (4, 2, 64)
    """
    T, N, H = x.shape
    if cos.shape != (T, H // 2) or sin.shape != cos.shape or H % 2:
        raise ValueError(f"{x.shape=} needs cos and sin [T, H/2]: {cos.shape=}, {sin.shape=}")
    if H % 16 or N * H * x.dtype.itemsize > LARGEST:
        raise NotImplementedError(
            f"{x.shape=}: takes H of multiples of 16, {LARGEST} bytes a token"
        )
    checked_rows(x=x)
    tile = Vectors.piece(x.dtype, interpret)
    halves = x.reshape(T, N, 2, H // 2)

    def body(x_ref, cos_ref, sin_ref, y_ref):
        token = lax.axis_index("token")
        half = lambda ref, i: ref.at[token, :, i, :]
        for j in range(cdiv(N * H // 2, tile.size)):
            at = j * tile.size
            c, s = (tile.load(ref.at[token], at, repeat=N) for ref in (cos_ref, sin_ref))
            x1, x2 = (tile.load(half(x_ref, i), at) for i in range(2))
            tile.store(half(y_ref, 0), x1 * c - x2 * s, at)
            tile.store(half(y_ref, 1), x2 * c + x1 * s, at)

    with jax.named_scope("rope"):
        y = plgpu.kernel(
            body,
            out_type=jax.ShapeDtypeStruct(halves.shape, x.dtype),
            grid=(T,),
            grid_names=("token",),
            interpret=interpret_params(interpret),
        )(halves, cos.astype(jnp.float32), sin.astype(jnp.float32))
    return y.reshape(x.shape)
