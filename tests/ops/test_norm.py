"""Norms against float64, their invariances, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.ops.norm import layer_norm, residual_layer_norm, residual_rms_norm, rms_norm

X = np.random.default_rng(0).normal(size=(2, 3, 16)) * 3 + 1
SCALE = np.random.default_rng(1).normal(size=16)
BIAS = np.random.default_rng(2).normal(size=16)


def rms_reference(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def layer_reference(x, scale, bias, eps):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


@pytest.mark.smoke
def test_float32_equals_float64():
    x, scale, bias = (jnp.asarray(a, jnp.float32) for a in (X, SCALE, BIAS))
    np.testing.assert_allclose(
        rms_norm(x, scale, eps=1e-3), rms_reference(X, SCALE, 1e-3), rtol=2e-6, atol=1e-6
    )
    np.testing.assert_allclose(
        layer_norm(x, scale, bias, eps=1e-3),
        layer_reference(X, SCALE, BIAS, 1e-3),
        rtol=2e-6,
        atol=2e-6,
    )
    np.testing.assert_allclose(
        layer_norm(x, scale, eps=1e-3), layer_reference(X, SCALE, 0, 1e-3), rtol=2e-6, atol=2e-6
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_the_rounding_of_float32(dtype):
    """Statistics in the input's own dtype would miss by many roundings, or overflow in float16."""
    x = jnp.asarray(X * 300, dtype)
    scale = jnp.asarray(SCALE, dtype)
    want = rms_norm(x.astype(jnp.float32), scale.astype(jnp.float32)).astype(dtype)
    got = rms_norm(x, scale)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))
    want = layer_norm(x.astype(jnp.float32), scale.astype(jnp.float32)).astype(dtype)
    np.testing.assert_array_equal(layer_norm(x, scale).astype(np.float32), want.astype(np.float32))


def test_invariances():
    x, one = jnp.asarray(X, jnp.float32), jnp.ones(16)
    np.testing.assert_allclose(rms_norm(4 * x, one, eps=0.0), rms_norm(x, one, eps=0.0), rtol=1e-6)
    np.testing.assert_allclose(layer_norm(x + 5, one), layer_norm(x, one), atol=1e-5)


def test_a_zero_row_has_finite_value_and_gradient():
    zero, one = jnp.zeros((1, 8)), jnp.ones(8)
    for norm in (rms_norm, layer_norm):
        assert np.isfinite(norm(zero, one)).all()
        assert np.isfinite(jax.grad(lambda x, f=norm: f(x, one).sum())(zero)).all()


def test_a_residual_is_added_rounded_and_normalised():
    x, r = jnp.asarray(X, jnp.bfloat16), jnp.asarray(X[::-1], jnp.bfloat16)
    scale, bias = jnp.asarray(SCALE, jnp.bfloat16), jnp.asarray(BIAS, jnp.bfloat16)
    h = (x.astype(jnp.float32) + r.astype(jnp.float32)).astype(jnp.bfloat16)
    equal = lambda a, b: np.testing.assert_array_equal(a.astype(np.float32), b.astype(np.float32))
    y, found = residual_rms_norm(x, r, scale)
    equal(found, h)
    equal(y, rms_norm(h, scale))
    y, found = residual_layer_norm(x, r, scale, bias)
    equal(found, h)
    equal(y, layer_norm(h, scale, bias))
    with pytest.raises(ValueError, match="residual is"):
        residual_rms_norm(x, r[:1], scale)


def test_wrong_shapes_are_refused():
    x = jnp.ones((3, 8))
    with pytest.raises(ValueError, match=r"scale.shape=\(7,\)"):
        rms_norm(x, jnp.ones(7))
    with pytest.raises(ValueError, match=r"scale.shape=\(1,\)"):
        layer_norm(x, jnp.ones(1))
    with pytest.raises(ValueError, match=r"bias.shape=\(3, 8\)"):
        layer_norm(x, jnp.ones(8), x)
