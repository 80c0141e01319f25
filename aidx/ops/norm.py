"""Normalisation over the last axis, accumulated in float32."""

import jax
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, *, eps: float = 1e-6) -> jax.Array:
    """Root-mean-square normalisation: `x / sqrt(mean(x^2) + eps) * scale`.

    Args:
      x: `[..., D]`, any float dtype; the arithmetic is float32.
      scale: `[D]`.
      eps: added to the mean square.

    Returns:
      `[..., D]` in the dtype of x.

    Raises:
      ValueError: scale is not `[D]`.

    References:
      Zhang & Sennrich, Root Mean Square Layer Normalization, 2019.

    >>> import jax.numpy as jnp
    >>> [f"{y:.4f}" for y in rms_norm(jnp.array([3.0, 4.0]), jnp.ones(2), eps=0.0)]
    ['0.8485', '1.1314']
    """
    _check_vector("scale", scale, x)
    with jax.named_scope("rms_norm"):
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
        return (y * _row(scale, x.ndim)).astype(x.dtype)


def residual_rms_norm(
    x: jax.Array, residual: jax.Array, scale: jax.Array, *, eps: float = 1e-6
) -> tuple[jax.Array, jax.Array]:
    """`h = x + residual` and `rms_norm(h)`, what every block of a decoder begins with.

    Args:
      x: `[..., D]`.
      residual: of the same shape and dtype.
      scale: `[D]`.
      eps: added to the mean square.

    Returns:
      `(y, h)`, `[..., D]` in the dtype of x; y is of the rounded h.

    Raises:
      ValueError: x and residual differ, or scale is not `[D]`.

    >>> import jax.numpy as jnp
    >>> y, h = residual_rms_norm(jnp.ones(2), jnp.ones(2), jnp.ones(2), eps=0.0)
    >>> y.tolist(), h.tolist()
    ([1.0, 1.0], [2.0, 2.0])
    """
    _check_residual(x, residual)
    h = x + residual
    return rms_norm(h, scale, eps=eps), h


def layer_norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None = None, *, eps: float = 1e-5
) -> jax.Array:
    """Layer normalisation: `(x - mean(x)) / sqrt(var(x) + eps) * scale + bias`.

    Args:
      x: `[..., D]`, any float dtype; the arithmetic is float32.
      scale: `[D]`.
      bias: `[D]`, or None for none.
      eps: added to the variance.

    Returns:
      `[..., D]` in the dtype of x.

    Raises:
      ValueError: scale or bias is not `[D]`.

    References:
      Ba, Kiros & Hinton, Layer Normalization, 2016.

    >>> import jax.numpy as jnp
    >>> layer_norm(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.ones(2), eps=0.0).tolist()
    [0.0, 2.0]
    """
    _check_vector("scale", scale, x)
    with jax.named_scope("layer_norm"):
        y = x.astype(jnp.float32)
        y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
        y = y * _row(scale, x.ndim)
        if bias is not None:
            _check_vector("bias", bias, x)
            y = y + _row(bias, x.ndim)
        return y.astype(x.dtype)


def residual_layer_norm(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None = None,
    *,
    eps: float = 1e-5,
) -> tuple[jax.Array, jax.Array]:
    """`h = x + residual` and `layer_norm(h)`.

    Args:
      x: `[..., D]`.
      residual: of the same shape and dtype.
      scale: `[D]`.
      bias: `[D]`, or None for none.
      eps: added to the variance.

    Returns:
      `(y, h)`, `[..., D]` in the dtype of x; y is of the rounded h.

    Raises:
      ValueError: x and residual differ, or scale or bias is not `[D]`.

    >>> import jax.numpy as jnp
    >>> y, h = residual_layer_norm(jnp.array([0.0, 1.0]), jnp.ones(2), jnp.ones(2), eps=0.0)
    >>> y.tolist(), h.tolist()
    ([-1.0, 1.0], [1.0, 2.0])
    """
    _check_residual(x, residual)
    h = x + residual
    return layer_norm(h, scale, bias, eps=eps), h


def _check_residual(x: jax.Array, residual: jax.Array) -> None:
    if (x.shape, x.dtype) != (residual.shape, residual.dtype):
        raise ValueError(
            f"residual is {residual.dtype}{residual.shape}, not as x {x.dtype}{x.shape}"
        )


def _row(vector: jax.Array, ndim: int) -> jax.Array:
    """`[D]` as float32 `[1, ..., D]`: ranks are never promoted silently."""
    return vector.astype(jnp.float32).reshape((1,) * (ndim - 1) + vector.shape)


def _check_vector(name: str, vector: jax.Array, x: jax.Array) -> None:
    if vector.shape != x.shape[-1:]:
        raise ValueError(
            f"{name}.shape={vector.shape} must be the last axis of {x.shape=}: {x.shape[-1:]}"
        )
