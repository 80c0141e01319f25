"""Slices and products: NumPy's values where they fit, an error with the numbers where not."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.arrays.slicing import elementwise_multiply, get_slice, slice_along

X = np.arange(12.0, dtype=np.float32).reshape(2, 3, 2)
WIDE = st.integers(-3, 15)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(WIDE, WIDE)
def test_a_flat_slice_is_numpys_or_an_error(start, length):
    if start >= 0 and length >= 0 and start + length <= X.size:
        np.testing.assert_array_equal(
            get_slice(X, start, length), X.reshape(-1)[start : start + length]
        )
    else:
        with pytest.raises(ValueError, match=f"elements {start} to {start + length} of an array"):
            get_slice(X, start, length)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(st.integers(-5, 4), st.integers(-1, 4), st.integers(-1, 4))
def test_a_slice_along_an_axis_is_numpys_or_an_error(axis, start, length):
    fits = -3 <= axis < 3 and start >= 0 and length >= 0 and start + length <= X.shape[axis]
    if fits:
        expected = np.take(X, range(start, start + length), axis)
        np.testing.assert_array_equal(slice_along(X, axis, start, length), expected)
    else:
        with pytest.raises(ValueError, match=r"axis -?\d+"):
            slice_along(X, axis, start, length)


@pytest.mark.smoke
def test_the_edges():
    assert get_slice(X, 12, 0).shape == (0,)  # an empty slice at the end is fine
    with pytest.raises(ValueError, match=r"13 to 13 of an array of 12 \(shape \(2, 3, 2\)\)"):
        get_slice(X, 13, 0)
    assert get_slice(jnp.float32(3), 0, 1).tolist() == [3]
    assert get_slice(jnp.int8([1, 2]), np.int64(1), 1).dtype == jnp.int8
    for bad in (1.0, True, None):
        with pytest.raises(TypeError, match="not an integer"):
            get_slice(X, bad, 1)
    with pytest.raises(TypeError, match=r"start is a .*Tracer"):
        jax.jit(lambda i: get_slice(X, i, 1))(0)


def test_gradients_go_to_the_slice_only():
    grad = jax.grad(lambda x: (get_slice(x, 2, 3) ** 2).sum())(jnp.asarray(X))
    expected = np.zeros(12)
    expected[2:5] = 2 * np.arange(2, 5)
    np.testing.assert_array_equal(grad.reshape(-1), expected)


def test_products_refuse_to_broadcast():
    np.testing.assert_array_equal(elementwise_multiply(X, X), X * X)
    assert elementwise_multiply(jnp.ones(2, jnp.bfloat16), jnp.ones(2)).dtype == jnp.float32
    for other in (X[:1], X[0], X.reshape(-1), np.float32(2)):
        with pytest.raises(ValueError, match=r"shapes \(2, 3, 2\) and .* differ"):
            elementwise_multiply(X, other)
