"""Gated activations `act(gate) * up` of a packed projection, forward and backward: one pass.

A CTA is one warpgroup and takes some elements of a row: both halves come in 16 bytes a thread and
access, and nothing but the result goes out.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import cdiv, div, interpret_params, rem

from ._vectors import Vectors, checked_rows
from .config import GATED, GatedConfig

ROOT = math.sqrt(2 / math.pi)
CUBIC = 0.044715
# erfc(z) = exp(-z^2) * polynomial(1 / (1 + p z)): p / sqrt(2), then from the highest power down.
TAIL = (0.3275911 / math.sqrt(2), 1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592)


def silu(x) -> tuple[Any, Any]:
    """(x sigmoid(x), its derivative).

    >>> [float(y) for y in silu(jnp.float32(0.0))]
    [0.0, 0.5]
    """
    s = 1.0 / (1.0 + jnp.exp(-x))
    return x * s, s * (1.0 + x * (1.0 - s))


def gelu_tanh(x) -> tuple[Any, Any]:
    """(x Phi(x), its derivative) with the normal distribution Phi approximated by tanh.

    >>> [float(y) for y in gelu_tanh(jnp.float32(0.0))]
    [0.0, 0.5]
    """
    t = 1.0 - 2.0 / (1.0 + jnp.exp(2 * ROOT * (x + CUBIC * x * x * x)))
    slope = (1.0 - t * t) * (ROOT * (1.0 + 3 * CUBIC * x * x))
    return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * slope


def gelu(x) -> tuple[Any, Any]:
    """(x Phi(x), its derivative) with the normal distribution Phi, to 1.5e-7.

    References:
      Abramowitz & Stegun, Handbook of Mathematical Functions, 7.1.26, 1964.

    >>> [round(float(y), 5) for y in gelu(jnp.float32(1.0))]
    [0.84134, 1.08332]
    """
    bell = jnp.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + TAIL[0] * jnp.abs(x))
    tail = functools.reduce(lambda sum, c: sum * t + c, TAIL[1:], 0.0 * t) * t * bell
    phi = jnp.where(x < 0, 0.5 * tail, 1.0 - 0.5 * tail)
    return x * phi, phi + x * bell / math.sqrt(2 * math.pi)


ACTIVATIONS: dict[str, Callable] = {"silu": silu, "gelu_tanh": gelu_tanh, "gelu": gelu}


def gated(
    gate_up: jax.Array,
    *,
    activation: str = "silu",
    config: GatedConfig = GATED,
    interpret: Any = None,
) -> jax.Array:
    """`act(gate) * up`, f32 inside.

    Args:
      gate_up: `[rows, 2, F]` bf16, f16 or f32, F a multiple of 8: gate, then up.
      activation: `silu` (SwiGLU), `gelu` or `gelu_tanh` (GEGLU).
      config: how much a CTA takes.
      interpret: True runs the GPU interpreter.

    Returns:
      `[rows, F]` in the same dtype.

    Raises:
      NotImplementedError: what this kernel cannot do.

    References:
      Shazeer, GLU Variants Improve Transformer, 2020.

    >>> jax.eval_shape(gated, jnp.ones((4, 2, 64), jnp.bfloat16)).shape
    (4, 64)
    """
    act = _check(gate_up, activation)
    rows, _, width = gate_up.shape

    def body(tile: Vectors, row, begin, inside, in_ref, y_ref):
        part = lambda half: tile.load(in_ref.at[row, half], begin, inside=inside)
        tile.store(y_ref.at[row], act(part(0))[0] * part(1), begin, inside=inside)

    like = jax.ShapeDtypeStruct((rows, width), gate_up.dtype)
    return _elementwise(body, gate_up, (gate_up,), like, config, interpret)


def gated_backward(
    gate_up: jax.Array,
    dy: jax.Array,
    *,
    activation: str = "silu",
    config: GatedConfig = GATED,
    interpret: Any = None,
) -> jax.Array:
    """The gradient of `gated`: `(dy * up * act'(gate), dy * act(gate))`.

    Args:
      gate_up: `[rows, 2, F]`.
      dy: `[rows, F]`.
      activation, config, interpret: of `gated`.

    Returns:
      `[rows, 2, F]`.

    Raises:
      NotImplementedError: what this kernel cannot do.

    >>> x = jnp.ones((4, 2, 64), jnp.bfloat16)
    >>> jax.eval_shape(gated_backward, x, x[:, 0]).shape
    (4, 2, 64)
    """
    act = _check(gate_up, activation)
    rows, _, width = gate_up.shape
    if (dy.shape, dy.dtype) != ((rows, width), gate_up.dtype):
        raise ValueError(f"dy is {dy.shape} {dy.dtype}, not {(rows, width)} {gate_up.dtype}")

    def body(tile: Vectors, row, begin, inside, in_ref, dy_ref, d_ref):
        part = lambda ref: tile.load(ref, begin, inside=inside)
        value, slope = act(part(in_ref.at[row, 0]))
        dy, up = part(dy_ref.at[row]), part(in_ref.at[row, 1])
        tile.store(d_ref.at[row, 0], dy * up * slope, begin, inside=inside)
        tile.store(d_ref.at[row, 1], dy * value, begin, inside=inside)

    return _elementwise(body, gate_up, (gate_up, dy), gate_up, config, interpret)


def _elementwise(body, x, inputs, like, config: GatedConfig, interpret: Any):
    """A CTA for every tile of every row of x `[rows, 2, F]`."""
    rows, _, width = x.shape
    tile = Vectors.piece(x.dtype, interpret)
    tile = dataclasses.replace(tile, size=tile.size * config.vectors)
    tiles = cdiv(width, tile.size)

    def one(*refs):
        cta = lax.axis_index("cta")
        begin = rem(cta, tiles) * tile.size
        body(tile, div(cta, tiles), begin, width % tile.size == 0, *refs)

    with jax.named_scope("gated"):
        return plgpu.kernel(
            one,
            out_type=jax.ShapeDtypeStruct(like.shape, like.dtype),
            grid=(rows * tiles,),
            grid_names=("cta",),
            interpret=interpret_params(interpret),
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(*inputs)


def _check(gate_up, activation: str) -> Callable:
    """The activation, once shapes and dtypes are seen to be right."""
    if activation not in ACTIVATIONS:
        raise NotImplementedError(f"{activation=}: takes {', '.join(ACTIVATIONS)}")
    checked_rows(gate_up=gate_up)
    if gate_up.ndim != 3 or gate_up.shape[1] != 2:
        raise ValueError(f"{gate_up.shape=} must be [rows, 2, F]")
    return ACTIVATIONS[activation]
