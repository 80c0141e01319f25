"""Distillation from hidden states: the same loss and gradients, without the logits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.cache import no_cache_attend
from aidx.distill import (
    Divergence,
    cross_entropy,
    linear_divergence,
    linear_response_loss,
    linear_top_k,
    linear_top_k_loss,
    lm_top_k_loss_fn,
    response_loss,
    top_k_loss,
    top_k_of,
)
from aidx.models import LlamaConfig, Model, init_params

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


# --- top-k ---------------------------------------------------------------------------------------

K = 4


def top_k_operands():
    hs, ws, ht, wt = operands()
    return hs, ws, *top_k_of(ht @ wt.T, K)


@pytest.mark.parametrize(("tail", "temperature"), [("bucket", 1.0), ("renormalise", 2.0)])
@pytest.mark.parametrize("chunk", [7, 11])  # with 7 the label 5 lies in two slices
def test_top_k_from_hidden_states_is_the_loss_of_the_logits(tail, temperature, chunk):
    hs, ws, indices, log_probs = top_k_operands()
    options = dict(tail=tail, temperature=temperature, weights=WEIGHTS)

    def dense(h, w):
        z = h @ w.T
        labelled = WEIGHTS * (LABELS >= 0)
        hard = (cross_entropy(z, LABELS) * labelled).sum() / labelled.sum()
        return 0.4 * hard + 0.6 * top_k_loss(z, indices, log_probs, **options)

    fused = lambda h, w: linear_top_k_loss(
        h, w, indices, log_probs, LABELS, alpha=0.4, chunk=chunk, **options
    )
    wanted, found = (program(f)(hs, ws) for f in (dense, fused))
    np.testing.assert_allclose(found[0], wanted[0], rtol=1e-5)
    for a, b in zip(found[1], wanted[1], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    alone = linear_top_k_loss(hs, ws, indices, log_probs, chunk=chunk, **options)
    np.testing.assert_allclose(
        alone, top_k_loss(hs @ ws.T, indices, log_probs, **options), rtol=1e-5
    )


@pytest.mark.parametrize("chunk", [1, 4, 11])
def test_the_teachers_top_k_needs_no_logits(chunk):
    _, _, ht, wt = operands()
    wt = wt.at[7].set(wt[2])  # equal logits: the smaller token comes first, in every slicing
    indices, log_probs = jax.jit(lambda h, w: linear_top_k(h, w, K, chunk=chunk))(ht, wt)
    wanted = top_k_of(ht @ wt.T, K)
    np.testing.assert_array_equal(indices, wanted[0])
    np.testing.assert_allclose(log_probs, wanted[1], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="k=12"):
        linear_top_k(ht, wt, 12)


def test_no_array_of_top_k_training_is_as_wide_as_the_vocabulary():
    n, D, wide = 6, 4, 640
    h, W = jnp.ones((n, D)), jnp.ones((wide, D))
    indices, log_probs = jnp.zeros((n, K), jnp.int32), jnp.zeros((n, K))
    loss = lambda h, w: linear_top_k_loss(h, w, *linear_top_k(h, w, K, chunk=64), chunk=64)
    train = lambda h, w: linear_top_k_loss(h, w, indices, log_probs, chunk=64)
    texts = (jax.jit(loss).lower(h, W), jax.jit(jax.grad(train, argnums=(0, 1))).lower(h, W))
    for text in (lowered.as_text() for lowered in texts):
        assert f"tensor<{n}x64x" in text and f"tensor<{n}x{wide}x" not in text


def test_a_decoder_learns_from_stored_top_k():
    config = LlamaConfig(V, 8, 16, 1, 2, 1, 8, tied=True)
    student, teacher = (Model(config, init_params(config, jax.random.key(i))) for i in range(2))
    tokens = jnp.asarray([[1, 2, 3, 4, 5]], jnp.int32)
    inputs, places = tokens[:, :-1], jnp.arange(4, dtype=jnp.int32)[None]
    logits, _ = teacher.forward(teacher.params, inputs, places, no_cache_attend(), None)
    indices, log_probs = top_k_of(logits, K)
    batch = {"tokens": tokens, "indices": indices, "log_probs": log_probs}
    loss_fn = lm_top_k_loss_fn(student.forward, alpha=0.5, chunk=4)
    total, weight, sums = loss_fn(student.params, batch, jax.random.key(0))
    theirs, _ = student.forward(student.params, inputs, places, no_cache_attend(), None)
    soft = top_k_loss(theirs, indices, log_probs)
    hard = cross_entropy(theirs, tokens[:, 1:]).mean()
    assert float(weight) == 4 and set(sums) == {"soft", "hard"}
    np.testing.assert_allclose(total / weight, 0.5 * soft + 0.5 * hard, rtol=1e-5)
    batch["weights"] = jnp.array([[1.0, 0.0, 0.0, 1.0]])
    assert float(loss_fn(student.params, batch, jax.random.key(0))[1]) == 2
    with pytest.raises(ValueError, match="alpha"):
        lm_top_k_loss_fn(student.forward, alpha=2.0)
