"""Norms and gated activations as a model calls them: the fused kernels, where they pay.

Functions of `aidx.ops` of these names.  A large call that is differentiated takes the kernel of
`aidx.kernels.fused`, forward and backward; all others are the plain function, which XLA fuses with
its neighbours, so inference and small models are what they would be without this module.  What
stands in for a kernel (`REGISTRY.replace`) is called always.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from . import fused
from .kernel import CustomKernel, current


def _of(kernel: CustomKernel, x: jax.Array) -> Callable[..., Any]:
    if current(kernel) is not kernel:
        return kernel
    large = x.size * x.dtype.itemsize >= fused.SMALL
    return kernel.differentiated if large else kernel.reference


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """`aidx.ops.norm.rms_norm`.

    >>> import jax.numpy as jnp
    >>> [f"{y:.4f}" for y in rms_norm(jnp.array([3.0, 4.0]), jnp.ones(2), eps=0.0)]
    ['0.8485', '1.1314']
    """
    return _of(fused.rms_norm, x)(x, scale, eps=eps)


def residual_rms_norm(
    x: jax.Array, residual: jax.Array, scale: jax.Array, *, eps: float = 1e-6
) -> tuple[jax.Array, jax.Array]:
    """`aidx.ops.norm.residual_rms_norm`: the norm of x + residual, and that sum.

    >>> import jax.numpy as jnp
    >>> y, h = residual_rms_norm(jnp.ones(2), jnp.ones(2), jnp.ones(2), eps=0.0)
    >>> y.tolist(), h.tolist()
    ([1.0, 1.0], [2.0, 2.0])
    """
    return _of(fused.residual_rms_norm, x)(x, residual, scale, eps=eps)


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, *, eps: float = 1e-5
) -> jax.Array:
    """`aidx.ops.norm.layer_norm`.

    >>> import jax.numpy as jnp
    >>> layer_norm(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.ones(2), eps=0.0).tolist()
    [0.0, 2.0]
    """
    return _of(fused.layer_norm, x)(x, scale, bias, eps=eps)


def residual_layer_norm(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """`aidx.ops.norm.residual_layer_norm`: the norm of x + residual, and that sum.

    >>> import jax.numpy as jnp
    >>> y, h = residual_layer_norm(jnp.array([0.0, 1.0]), jnp.ones(2), jnp.ones(2), eps=0.0)
    >>> y.tolist(), h.tolist()
    ([-1.0, 1.0], [1.0, 2.0])
    """
    return _of(fused.residual_layer_norm, x)(x, residual, scale, bias, eps=eps)


def gated(gate_up: jax.Array, *, activation: str = "silu") -> jax.Array:
    """`aidx.ops.activations.gated`: `act(gate) * up` of `[..., 2, F]`.

    >>> import jax.numpy as jnp
    >>> [f"{y:.4f}" for y in gated(jnp.array([[1.0, 0.0], [2.0, 3.0]]))]
    ['1.4621', '0.0000']
    """
    return _of(fused.gated, gate_up)(gate_up, activation=activation)
