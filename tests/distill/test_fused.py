"""Distillation from hidden states: the same loss and gradients, without the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.distill import (
    Divergence,
    cross_entropy,
    linear_divergence,
    linear_response_loss,
    response_loss,
)

B, T, DS, DT, V = 2, 3, 4, 6, 11
LABELS = np.array([[1, -1, 10], [0, 5, 3]], np.int32)
WEIGHTS = np.array([[1.0, 2.0, 0.0], [1.0, 0.5, 1.0]], np.float32)


def operands(dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, DS), (V, DS), (B, T, DT), (V, DT))
    return tuple(jnp.asarray(rng.normal(size=s), dtype) for s in shapes)


def dense(hs, ws, ht, wt, kind, labels=LABELS):
    """The loss over whole logits."""
    return response_loss(
        hs @ ws.T, ht @ wt.T, labels, temperature=2.0, alpha=0.4, kind=kind, beta=0.3,
        weights=WEIGHTS,
    )  # fmt: skip


def fused(hs, ws, ht, wt, kind, labels=LABELS, chunk=4):
    return linear_response_loss(
        hs, ws, ht, wt, labels, temperature=2.0, alpha=0.4, kind=kind, beta=0.3,
        weights=WEIGHTS, chunk=chunk,
    )  # fmt: skip


def program(loss, *options, argnums=(0, 1), **more):
    return jax.jit(jax.value_and_grad(lambda *a: loss(*a, *options, **more), argnums=argnums))


@pytest.mark.parametrize("kind", list(Divergence))
def test_it_is_the_loss_of_the_logits_with_its_gradients(kind):
    args = operands()
    wanted = program(dense, kind)(*args)
    found = program(fused, kind, argnums=(0, 1, 2, 3))(*args)
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for a, b in zip(found[1], wanted[1], strict=False):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert not np.any(found[1][2]) and not np.any(found[1][3])  # the teacher is not taught


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_the_slices_do_not_matter(chunk):
    args = operands()
    value, grads = program(fused, "jsd", chunk=chunk)(*args)
    reference, wanted = program(dense, "jsd")(*args)
    np.testing.assert_allclose(value, reference, rtol=1e-5)
    for a, b in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_bf16_operands_keep_their_dtype_and_accumulate_in_f32():
    args = operands(jnp.bfloat16)
    value, grads = program(fused, "forward_kl")(*args)
    exact, _ = program(dense, "forward_kl")(*(a.astype(jnp.float32) for a in args))
    assert value.dtype == jnp.float32 and all(g.dtype == jnp.bfloat16 for g in grads)
    np.testing.assert_allclose(value, exact, rtol=1e-2)


def test_a_token_without_a_label_has_no_cross_entropy_and_no_gradient_of_it():
    hs, ws, ht, wt = operands()
    loss = lambda h: linear_divergence(h, ws, ht, wt, LABELS, chunk=4)[0]
    ce = lambda h: cross_entropy(h @ ws.T, LABELS)
    np.testing.assert_allclose(jax.jit(loss)(hs), ce(hs), rtol=1e-5)
    grads = [jax.jit(jax.grad(lambda h, f=f: f(h).sum()))(hs) for f in (loss, ce)]
    np.testing.assert_allclose(*grads, rtol=1e-4, atol=1e-6)
    assert not grads[0][0, 1].any() and grads[0][0, 0].any()


def test_equal_models_have_no_loss_and_no_gradient():
    hs, ws, _, _ = operands()
    loss = lambda h, w: linear_response_loss(h, w, hs, ws, chunk=4)
    value, grads = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(hs, ws)
    assert abs(float(value)) < 1e-5
    assert all(np.abs(g).max() < 1e-6 for g in grads)


def test_two_whole_logits_never_coexist():
    """What the program allocates, forward and backward, against what logits alone take."""
    n, V, D, chunk = 512, 8192, 16, 512
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    args = (
        shape(n, D),
        shape(V, D),
        shape(n, D),
        shape(V, D),
        jax.ShapeDtypeStruct((n,), jnp.int32),
    )
    logits = n * V * 4

    def memory(loss):
        grad = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
        return grad.lower(*args).compile().memory_analysis().temp_size_in_bytes

    small = memory(lambda *a: linear_response_loss(*a, chunk=chunk))
    large = memory(lambda hs, ws, ht, wt, y: response_loss(hs @ ws.T, ht @ wt.T, y))
    assert small < 0.75 * logits, f"{small} bytes, one [n, V] takes {logits}"
    assert large > 1.9 * logits  # the test can see them


@pytest.mark.smoke
def test_what_does_not_fit_is_refused():
    hs, ws, ht, wt = operands()
    for bad, match in (
        ((hs[:1], ws, ht, wt), "hidden states"),
        ((hs, ws[:5], ht, wt), "one vocabulary"),
        ((hs, wt, ht, wt), "widths"),
        ((hs, ws, ht, wt, LABELS[0]), "labels"),
        ((hs, ws, ht, wt, LABELS.astype(np.float32)), "labels"),
    ):
        with pytest.raises(ValueError, match=match):
            linear_divergence(*bad)
    for options in (dict(temperature=0.0), dict(chunk=0), dict(beta=1.0)):
        with pytest.raises(ValueError, match=next(iter(options))):
            linear_divergence(hs, ws, ht, wt, **options)
    with pytest.raises(ValueError, match="alpha=2"):
        linear_response_loss(hs, ws, ht, wt, alpha=2)
