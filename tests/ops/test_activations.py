"""Gated activations against float64 written out, and what they refuse."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.ops.activations import gated

X = np.random.default_rng(0).normal(size=(2, 3, 2, 8)) * 3


def phi(x):
    return np.vectorize(lambda v: 0.5 * (1 + math.erf(v / math.sqrt(2))))(x)


def tanh_phi(x):
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTS = {"silu": lambda x: x / (1 + np.exp(-x)), "gelu": lambda x: x * phi(x)}
ACTS["gelu_tanh"] = lambda x: x * tanh_phi(x)


@pytest.mark.smoke
@pytest.mark.parametrize("activation", ACTS)
def test_float32_equals_float64(activation):
    want = ACTS[activation](X[..., 0, :]) * X[..., 1, :]
    got = gated(jnp.asarray(X, jnp.float32), activation=activation)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)


def test_low_precision_is_the_rounding_of_float32():
    """Rounded once, at the end: not between the activation and the product."""
    x = jnp.asarray(X, jnp.bfloat16)
    want = gated(x.astype(jnp.float32)).astype(jnp.bfloat16)
    np.testing.assert_array_equal(gated(x).astype(np.float32), want.astype(np.float32))


def test_the_projection_is_linear_in_up():
    x = jnp.asarray(X, jnp.float32)
    doubled = x.at[..., 1, :].multiply(2)
    np.testing.assert_allclose(gated(doubled), 2 * gated(x), rtol=1e-6)
    assert float(jnp.abs(jax.grad(lambda x: gated(x).sum())(x)).max()) > 0


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="relu"):
        gated(jnp.ones((2, 8)), activation="relu")
    with pytest.raises(ValueError, match=r"\[..., 2, F\]"):
        gated(jnp.ones((3, 8)))
