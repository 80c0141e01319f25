"""Softmax cross-entropy: its gradient written out, its invariances, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.ops.cross_entropy import softmax_cross_entropy, softmax_cross_entropy_backward

LOGITS = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 11)) * 4, jnp.float32)
TARGETS = jnp.array([[0, 10, -1], [4, 11, 5]])
OPTIONS = dict(label_smoothing=0.1, z_loss=0.01)


@pytest.mark.smoke
def test_float32_equals_float64():
    x = np.asarray(LOGITS, np.float64)
    lse = np.log(np.exp(x).sum(-1))
    known = (np.asarray(TARGETS) >= 0) & (np.asarray(TARGETS) < 11)
    picked = np.take_along_axis(x, np.where(known, TARGETS, 0)[..., None], -1)[..., 0]
    want = lse - 0.9 * picked - 0.1 * x.mean(-1) + 0.01 * lse**2
    loss, normaliser = softmax_cross_entropy(LOGITS, TARGETS, **OPTIONS)
    np.testing.assert_allclose(loss, np.where(known, want, 0), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(normaliser, lse, rtol=2e-6)


@pytest.mark.parametrize("options", [dict(label_smoothing=0.0, z_loss=0.0), OPTIONS])
def test_the_gradient_written_out_is_the_derivative(options):
    """Of the loss and of the log-normaliser alike."""
    f = functools.partial(softmax_cross_entropy, targets=TARGETS, **options)
    outputs, pull = jax.vjp(f, LOGITS)
    cotangents = jax.random.normal(jax.random.key(0), (2, *TARGETS.shape))
    cotangents = cotangents[0], cotangents[1]
    own, nothing = softmax_cross_entropy_backward((LOGITS, TARGETS), outputs, cotangents, **options)
    np.testing.assert_allclose(own, pull(cotangents)[0], rtol=1e-5, atol=1e-6)
    assert nothing is None


def test_a_shift_of_the_logits_changes_the_normaliser_only():
    loss, lse = softmax_cross_entropy(LOGITS, TARGETS)
    shifted, moved = softmax_cross_entropy(LOGITS + 8.0, TARGETS)
    np.testing.assert_allclose(shifted, loss, atol=2e-5)
    np.testing.assert_allclose(moved, lse + 8, rtol=1e-6)


def test_the_gradient_has_the_dtype_of_the_logits():
    x = LOGITS.astype(jnp.bfloat16)
    slope = jax.grad(lambda x: softmax_cross_entropy(x, TARGETS)[0].sum())(x)
    assert slope.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("targets", "options"),
    [
        (TARGETS[0], {}),
        (TARGETS.astype(jnp.float32), {}),
        (TARGETS, dict(label_smoothing=1.0)),
        (TARGETS, dict(z_loss=-1.0)),
    ],
)
def test_wrong_arguments_are_refused(targets, options):
    with pytest.raises(ValueError):
        softmax_cross_entropy(LOGITS, targets, **options)
