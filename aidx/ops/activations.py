"""Gated activations, in float32 inside."""

import functools

import jax
import jax.numpy as jnp

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


def gated(gate_up: jax.Array, *, activation: str = "silu") -> jax.Array:
    """`act(gate) * up`: SwiGLU (`silu`) and GEGLU (`gelu`, `gelu_tanh`).

    Args:
      gate_up: `[..., 2, F]`, gate and up as one projection makes them; any float dtype.
      activation: `silu`, `gelu` or `gelu_tanh`.

    Returns:
      `[..., F]` in the dtype of gate_up.

    Raises:
      ValueError: an unknown activation, or gate_up is not `[..., 2, F]`.

    References:
      Shazeer, GLU Variants Improve Transformer, 2020.

    >>> [f"{y:.4f}" for y in gated(jnp.array([[1.0, 0.0], [2.0, 3.0]]))]
    ['1.4621', '0.0000']
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"{activation=} is not one of {', '.join(ACTIVATIONS)}")
    if gate_up.ndim < 2 or gate_up.shape[-2] != 2:
        raise ValueError(f"{gate_up.shape=} must be [..., 2, F]")
    with jax.named_scope("gated"):
        # Split: its transpose is one concatenation; that of two slices pads twice and adds.
        halves = jnp.split(gate_up, 2, axis=-2)
        gate, up = (half[..., 0, :].astype(jnp.float32) for half in halves)
        return (ACTIVATIONS[activation](gate) * up).astype(gate_up.dtype)
