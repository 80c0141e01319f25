"""The fused loss against the plain one, and against float64."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.cache import no_cache_attend
from aidx.models import LlamaConfig, bind_forward, init_params, stack_layers
from aidx.train import cross_entropy, fused_cross_entropy, language_model_loss, remat

N, D, V = 23, 8, 31


def case(dtype=jnp.float32):
    rng = np.random.default_rng(1)
    x, table = rng.normal(size=(N, D)) * 2, rng.normal(size=(V, D))
    y = rng.integers(0, V, N)
    y[5] = -1
    w = rng.uniform(size=N) * (rng.uniform(size=N) > 0.3)
    return jnp.asarray(x, dtype), jnp.asarray(table, dtype), jnp.asarray(y), jnp.asarray(w)


def formula(x, table, y, w, e, z):
    """The module's equations and their gradients in NumPy float64."""
    x, table, w = (np.asarray(a, np.float64) for a in (x, table, w))
    y, w = np.asarray(y), np.where(np.asarray(y) >= 0, w, 0)
    logits = x @ table.T
    lse = np.log(np.exp(logits).sum(-1))
    own = logits[np.arange(N), y]
    total = (w * ((1 - e) * (lse - own) + e * (lse - logits.mean(-1)) + z * lse**2)).sum()
    p = np.exp(logits - lse[:, None])
    d = p * (1 + 2 * z * lse)[:, None] - (1 - e) * np.eye(V)[y] - e / V
    d = d * w[:, None]
    return total, d @ table, d.T @ x


@functools.partial(jax.jit, static_argnums=(4, 5, 6))
def fused(x, table, y, w, e, z, chunk):
    loss = lambda x, t: fused_cross_entropy(
        x, t, y, w, label_smoothing=e, z_loss=z, chunk_tokens=chunk
    )[0]
    return jax.value_and_grad(loss, (0, 1))(x, table)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("e", "z", "chunk"), [(0.0, 0.0, 5), (0.1, 1e-2, 23), (0.2, 0.0, 1), (0.0, 1e-1, 100)]
)
def test_loss_and_gradients_are_the_formulas(e, z, chunk):
    total, (d_x, d_table) = fused(*case(), e, z, chunk)
    wanted, d_x_64, d_table_64 = formula(*case(), e, z)
    assert total == pytest.approx(wanted, rel=1e-5)
    np.testing.assert_allclose(d_x, d_x_64, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_table, d_table_64, rtol=1e-4, atol=1e-5)


def test_plain_and_fused_agree_in_value_sums_and_gradient():
    x, table, y, w = case()
    options = {"label_smoothing": 0.1, "z_loss": 1e-3}
    plain = cross_entropy(x @ table.T, y, w, **options)
    chex.assert_trees_all_close(plain, fused_cross_entropy(x, table, y, w, **options), rtol=1e-5)
    d = jax.grad(lambda x: cross_entropy(x @ table.T, y, w, **options)[0])(x)
    np.testing.assert_allclose(d, formula(x, table, y, w, 0.1, 1e-3)[1], rtol=1e-4, atol=1e-5)
    _, weight, sums = plain
    live = np.asarray(y) >= 0
    assert weight == pytest.approx(float(np.asarray(w)[live].sum()))
    best = np.asarray(x @ table.T).argmax(-1) == np.asarray(y)
    assert sums["accuracy"] == pytest.approx(float((np.asarray(w) * best).sum()), rel=1e-6)


def test_the_cotangent_scales_and_weights_have_no_gradient():
    x, table, y, w = case()
    one = lambda x, w: fused_cross_entropy(x, table, y, w, chunk_tokens=8)[0]
    d_x, d_w = jax.grad(lambda x, w: 3.0 * one(x, w), (0, 1))(x, w)
    np.testing.assert_allclose(d_x, 3 * jax.grad(one)(x, w), rtol=1e-6)
    assert not np.asarray(d_w).any()


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.bfloat16, 2e-2), (jnp.float16, 3e-3)])
def test_half_precision_accumulates_in_f32(dtype, tolerance):
    total, (d_x, d_table) = fused(*case(dtype), 0.0, 0.0, 5)
    wanted, d_x_64, d_table_64 = formula(*case(dtype), 0.0, 0.0)
    assert (d_x.dtype, d_table.dtype) == (dtype, dtype)
    assert total == pytest.approx(wanted, rel=1e-3)
    for got, right in ((d_x, d_x_64), (d_table, d_table_64)):
        np.testing.assert_allclose(
            np.asarray(got, np.float64), right, atol=tolerance * np.abs(right).max()
        )


@pytest.mark.smoke
def test_the_logits_are_never_whole():
    """Temporary memory of value and gradient: near one chunk's logits, far below [N, V]."""
    tokens, V, D, chunk = 1024, 4096, 16, 64
    shapes = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (
            ((tokens, D), jnp.float32), ((V, D), jnp.float32), ((tokens,), jnp.int32),
            ((tokens,), jnp.float32),
        )
    ]  # fmt: skip
    temporaries = lambda f: f.lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    whole = 4 * tokens * V
    plain = jax.jit(jax.grad(lambda x, t, y, w: cross_entropy(x @ t.T, y, w)[0], (0, 1)))
    ours = jax.jit(jax.grad(lambda *a: fused_cross_entropy(*a, chunk_tokens=chunk)[0], (0, 1)))
    assert temporaries(plain) >= whole
    assert temporaries(ours) < whole / 5
    only = jax.jit(lambda *a: fused_cross_entropy(*a, chunk_tokens=chunk)[0])
    assert temporaries(only) < whole / 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing": 1.0}, "label_smoothing=1.0"),
        ({"z_loss": -1.0}, "z_loss=-1.0"),
        ({"chunk_tokens": 0}, "chunk_tokens=0"),
    ],
)
def test_wrong_options_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        fused_cross_entropy(*case(), **change)


def test_wrong_shapes_are_refused():
    x, table, y, w = case()
    with pytest.raises(ValueError, match="differ in D"):
        fused_cross_entropy(x[:, :4], table, y, w)
    with pytest.raises(ValueError, match=r"\(23,\)"):
        fused_cross_entropy(x, table, y[:4], w)
    with pytest.raises(ValueError, match="go together"):
        cross_entropy(x @ table.T, y[:4])


CONFIG = LlamaConfig(V, 16, 32, 2, 4, 2, 8, tied=True)


@functools.cache
def model():
    return init_params(CONFIG, jax.random.key(0), std=0.3)


def lm(params, batch, **options):
    loss_fn = language_model_loss(bind_forward(CONFIG), chunk_tokens=7, **options)
    return jax.jit(jax.value_and_grad(lambda p, b: loss_fn(p, b, None)[0]))(params, batch)


def packed():
    """Two documents in one row, and the same two in rows of their own."""
    rng = np.random.default_rng(2)
    a, b = rng.integers(0, V, 7), rng.integers(0, V, 5)
    row = lambda *parts: jnp.asarray(np.concatenate(parts)[None], jnp.int32)
    together = {
        "tokens": row(a[:-1], b[:-1]),
        "targets": row(a[1:], b[1:]),
        "positions": row(np.arange(6), np.arange(4)),
        "segment_ids": row(np.zeros(6), np.ones(4)),
    }
    pad = np.full(2, -1)
    stack = lambda x, y: jnp.asarray(np.stack([x, y]), jnp.int32)
    apart = {
        "tokens": stack(a[:-1], np.concatenate([b[:-1], pad * 0])),
        "targets": stack(a[1:], np.concatenate([b[1:], pad])),
    }
    return together, apart


@pytest.mark.smoke
def test_packed_documents_are_the_documents_apart():
    together, apart = packed()
    one, d_one = lm(model(), together)
    two, d_two = lm(model(), apart)
    assert one == pytest.approx(float(two), rel=1e-5)
    chex.assert_trees_all_close(d_one, d_two, rtol=1e-3, atol=1e-4)
    blind, _ = lm(model(), {k: v for k, v in together.items() if k != "segment_ids"})
    assert abs(float(blind) - float(one)) > 1e-2


def test_the_loss_is_the_models_logits_through_cross_entropy():
    _, apart = packed()
    positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (2, 6))
    logits, _ = bind_forward(CONFIG)(model(), apart["tokens"], positions, no_cache_attend(), None)
    wanted = cross_entropy(logits, apart["targets"])[0]
    assert lm(model(), apart)[0] == pytest.approx(float(wanted), rel=1e-5)


def test_the_gradient_of_a_frequent_token_is_accumulated_in_f32():
    tokens = jnp.full((1, 512), 3, jnp.int32)  # one token in a model that tells no others apart
    batch = {"tokens": tokens, "targets": (tokens + 1).at[:, ::2].set(5)}
    untied = init_params(dataclasses.replace(CONFIG, tied=False), jax.random.key(0), std=0.3)
    _, exact = lm(untied, batch)
    _, half = lm(jax.tree.map(lambda x: x.astype(jnp.bfloat16), untied), batch)
    wanted, found = (np.asarray(g["embed"][3], np.float32) for g in (exact, half))
    assert np.linalg.norm(found - wanted) < 0.05 * np.linalg.norm(wanted)


@pytest.mark.parametrize("policy", ["full", "dots_attention"])
def test_remat_changes_no_gradient(policy):
    _, apart = packed()
    wanted = lm(model(), apart)
    chex.assert_trees_all_close(lm(model(), apart, remat=policy), wanted, rtol=1e-4, atol=1e-5)


def test_layers_scanned_or_unrolled_are_the_same():
    _, apart = packed()
    loss, grads = lm(model(), apart)
    scanned, d_stacked = lm(stack_layers(model()), apart, remat="full")
    assert loss == pytest.approx(float(scanned), rel=1e-5)
    chex.assert_trees_all_close(stack_layers(grads), d_stacked, rtol=1e-4, atol=1e-5)


def test_remat_keeps_less():
    """What is live between forward and backward: everything > the policy's > the inputs."""
    loss_fn = lambda policy: language_model_loss(bind_forward(CONFIG), remat=policy)
    _, apart = packed()

    def size(policy):
        backward = lambda p: jax.vjp(lambda p: loss_fn(policy)(p, apart, None)[0], p)[1]
        return sum(np.prod(x.shape) for x in jax.tree.leaves(jax.eval_shape(backward, model())))

    assert size("full") < size("attention") < size("dots_attention") < size("none")
    assert remat("none") is None
