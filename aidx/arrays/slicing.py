"""Slices and products that refuse what does not fit, where NumPy would clip or broadcast."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from aidx.typing import Array

Tensor = Array | np.ndarray | Sequence


def get_slice(x: Tensor, start: int, length: int) -> Array:
    """`length` elements of the flattened array from `start` on: `x.reshape(-1)[start:][:length]`.

    Args:
        x: `[...]`, read in row-major order.
        start: 0 to x.size; x.size itself only for an empty slice.
        length: not negative.

    Returns:
        `[length]`, of x's dtype.

    Raises:
        ValueError: the slice does not lie inside the array.
        TypeError: start or length is no integer; a traced one cannot be checked
            (`jax.lax.dynamic_slice` clamps instead).

    Example:
        >>> x = jnp.arange(6).reshape(2, 3)
        >>> get_slice(x, 2, 3).tolist(), get_slice(x, 6, 0).tolist()
        ([2, 3, 4], [])
        >>> get_slice(x, 4, 3)
        Traceback (most recent call last):
        ValueError: elements 4 to 7 of an array of 6 (shape (2, 3))
    """
    x = jnp.asarray(x)
    start, length = _integer(start, "start"), _integer(length, "length")
    if start < 0 or length < 0 or start + length > x.size:
        raise ValueError(
            f"elements {start} to {start + length} of an array of {x.size} (shape {x.shape})"
        )
    return jax.lax.slice(x.reshape(-1), (start,), (start + length,))


def slice_along(x: Tensor, axis: int, start: int, length: int) -> Array:
    """`length` entries of one axis from `start` on; the other axes stay whole.

    Args:
        x: `[...]`.
        axis: negative ones count from the end.
        start: 0 to the axis's size.
        length: not negative.

    Raises:
        ValueError: there is no such axis, or the slice does not lie inside it.
        TypeError: as `get_slice`.

    Example:
        >>> slice_along(jnp.arange(6).reshape(2, 3), -1, 1, 2).tolist()
        [[1, 2], [4, 5]]
        >>> slice_along(jnp.zeros((2, 3)), 0, 1, 2)
        Traceback (most recent call last):
        ValueError: entries 1 to 3 of axis 0, which has 2 (shape (2, 3))
    """
    x = jnp.asarray(x)
    axis, start, length = (
        _integer(v, n) for v, n in ((axis, "axis"), (start, "start"), (length, "length"))
    )
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} of an array of {x.ndim} axes (shape {x.shape})")
    size = x.shape[axis]
    if start < 0 or length < 0 or start + length > size:
        raise ValueError(
            f"entries {start} to {start + length} of axis {axis}, which has {size} "
            f"(shape {x.shape})"
        )
    return jax.lax.slice_in_dim(x, start, start + length, axis=axis)


def elementwise_multiply(x: Tensor, y: Tensor) -> Array:
    """`x_i y_i` of two arrays of one shape; nothing broadcasts.

    Args:
        x: `[...]`.
        y: of x's shape.

    Returns:
        Of their common dtype, as JAX promotes it.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> elementwise_multiply(jnp.array([2.0, 3.0]), jnp.array([4.0, 5.0])).tolist()
        [8.0, 15.0]
        >>> elementwise_multiply(jnp.ones((2, 1)), jnp.ones((2, 3)))
        Traceback (most recent call last):
        ValueError: shapes (2, 1) and (2, 3) differ
    """
    x, y = jnp.asarray(x), jnp.asarray(y)
    if x.shape != y.shape:
        raise ValueError(f"shapes {x.shape} and {y.shape} differ")
    return x * y


def _integer(value: int, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise TypeError(f"{name} is a {type(value).__name__}, not an integer")
    return int(value)
