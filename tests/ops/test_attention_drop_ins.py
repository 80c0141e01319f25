"""The drop-ins give what the functions that they replace give; the layer, its parts."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from aidx.ops.attention_drop_ins import attention_fn, dot_product_attention
from aidx.ops.attention_layer import FlashAttentionLayer, alibi_slopes
from tests.ops import dense

B, T, S, N, K, H = 2, 6, 9, 4, 2, 8


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


q, k, v = normal(0, B, T, N, H), normal(1, B, S, K, H), normal(2, B, S, K, H)
seen = jax.random.bernoulli(jax.random.key(3), 0.7, (B, 1, T, S)).at[..., 0].set(True)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(is_causal=True),
        dict(bias=normal(4, 1, N, T, S), scale=0.3),
        dict(mask=seen, is_causal=True),
        dict(local_window_size=2),
        dict(local_window_size=(3, 1), is_causal=True),
        dict(query_seq_lengths=jnp.array([6, 2]), key_value_seq_lengths=jnp.array([9, 4])),
    ],
    ids=lambda o: "-".join(o) or "plain",
)
def test_it_is_jax_nn(options):
    got = dot_product_attention(q, k, v, **options)
    want = jax.nn.dot_product_attention(q, k, v, **options)
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_ranks_and_the_residual_are_jax_nn_s():
    out, lse = dot_product_attention(q[0], k[0], v[0], is_causal=True, return_residual=True)
    want = jax.nn.dot_product_attention(q[0], k[0], v[0], is_causal=True, return_residual=True)
    chex.assert_trees_all_close((out, lse), want, atol=2e-5)
    with pytest.raises(ValueError, match="bias must have 4 axes"):
        dot_product_attention(q, k, v, bias=jnp.zeros((T, S)))


def both_layers(**call):
    """Outputs of an nnx layer with flax's own attention and with ours."""
    x, graph = normal(5, B, T, 16), {}
    for name, fn in (("flax", nnx.dot_product_attention), ("aidx", attention_fn)):
        layer = nnx.MultiHeadAttention(
            4, 16, decode=False, attention_fn=fn, rngs=nnx.Rngs(0, dropout=1)
        )
        graph[name] = layer(x, **call)
    return graph["aidx"], graph["flax"]


@pytest.mark.smoke
@pytest.mark.parametrize("causal", [False, True])
def test_nnx_attention_is_the_same_with_ours(causal):
    mask = jax.random.bernoulli(jax.random.key(6), 0.6, (B, 1, T, T)).at[..., 0].set(True)
    np.testing.assert_allclose(*both_layers(is_causal=causal, mask=mask), atol=2e-5)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
def test_nnx_sows_the_weights():
    x, found = normal(5, B, T, 16), []
    for fn in (nnx.dot_product_attention, attention_fn):
        layer = nnx.MultiHeadAttention(4, 16, decode=False, attention_fn=fn, rngs=nnx.Rngs(0))
        layer(x, sow_weights=True)
        found.append(nnx.pop(layer, nnx.Intermediate)["attention_weights"].get_value()[0])
    np.testing.assert_allclose(*found, atol=2e-5)


def test_nnx_decodes_with_ours():
    x, found = normal(5, B, 3, 16), []
    for fn in (nnx.dot_product_attention, attention_fn):
        layer = nnx.MultiHeadAttention(4, 16, decode=True, attention_fn=fn, rngs=nnx.Rngs(0))
        layer.init_cache((B, 3, 16))
        found.append(jnp.concatenate([layer(x[:, i : i + 1]) for i in range(3)], 1))
    np.testing.assert_allclose(*found, atol=2e-5)


def test_linen_attention_is_the_same_with_ours():
    x, found = normal(5, B, T, 16), []
    mask = linen.make_causal_mask(jnp.ones((B, T)), dtype=jnp.bool_)
    for fn in (linen.dot_product_attention, attention_fn):
        layer = linen.MultiHeadDotProductAttention(4, attention_fn=fn)
        params = layer.init(jax.random.key(0), x)
        out, sown = layer.apply(params, x, mask=mask, sow_weights=True, mutable="intermediates")
        found.append((out, sown["intermediates"]["attention_weights"]))
    chex.assert_trees_all_close(*found, atol=2e-5)


def test_dropout_is_broadcast_or_not_as_flax_says():
    ones = jnp.ones((B, T, N, H))
    run = functools.partial(
        attention_fn, ones, ones, jnp.broadcast_to(jnp.eye(T, H)[:, None], (B, T, N, H)),
        dropout_rng=jax.random.key(1), dropout_rate=0.5,
    )  # fmt: skip
    one = run(broadcast_dropout=True)  # out shows which keys were kept
    assert (one == one[:1, :, :1]).all() and len(np.unique(one)) == 2
    assert not (run(broadcast_dropout=False) == one).all()
    plain = run(deterministic=True)
    np.testing.assert_allclose(plain[..., :T], 1 / T, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(qk_attn_weights_einsum=jnp.einsum), "einsum"),
        (dict(precision=jax.lax.Precision.HIGH), "precision"),
        (dict(dropout_rate=0.1), "dropout_key"),
    ],
)
def test_attention_fn_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        attention_fn(q, k, v, **change)


# --- the layer -----------------------------------------------------------------------------------

X = normal(7, B, T, 16)


def layer(**options):
    return FlashAttentionLayer(16, N, num_kv_heads=K, rngs=nnx.Rngs(0, dropout=3), **options)


def test_the_layer_is_its_projections_and_dense_attention():
    f = layer(positions="alibi", window=4)
    heads = dense.attend(
        f.query(X), f.key(X), f.value(X), causal=True, left=3, alibi_slopes=alibi_slopes(N)
    )
    np.testing.assert_allclose(f(X), f.out(heads[0]), atol=2e-5)
    out, seen = f(X, diagnostics=True)
    p = heads[2]
    np.testing.assert_allclose(out, f(X), atol=1e-6)
    np.testing.assert_allclose(seen.lse, heads[1], atol=2e-5)
    entropy = -(p * jnp.log(jnp.maximum(p, 1e-30))).sum(-1).mean((0, 2))
    np.testing.assert_allclose(seen.entropy, entropy, atol=1e-4)
    np.testing.assert_allclose(seen.largest, p.max(-1).mean((0, 2)), atol=1e-5)
    back = (jnp.arange(T)[:, None] - jnp.arange(T)[None])[None, None]
    np.testing.assert_allclose(seen.distance, (p * back).sum(-1).mean((0, 2)), atol=1e-4)


def test_rotary_positions_are_relative():
    f = layer(positions="rotary")
    np.testing.assert_allclose(
        f(X), f(X, token_positions=jnp.broadcast_to(jnp.arange(T) + 100, (B, T))), atol=1e-4
    )
    spread = f(X, token_positions=jnp.broadcast_to(2 * jnp.arange(T), (B, T)))
    assert jnp.abs(spread - f(X)).max() > 1e-3


def test_the_layer_trains_and_drops():
    f = layer(dropout_rate=0.5)
    grads = nnx.grad(lambda f: (f(X) ** 2).sum())(f)
    assert all(jnp.abs(g).max() > 0 for g in jax.tree.leaves(grads))
    kept = f(X, deterministic=False, dropout_key=jax.random.key(0))
    chex.assert_trees_all_equal(kept, f(X, deterministic=False, dropout_key=jax.random.key(0)))
    assert not (f(X, deterministic=False) == f(X, deterministic=False)).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(positions="sine"), "positions must be"),
        (dict(num_kv_heads=3), "no multiple"),
        (dict(num_heads=5, num_kv_heads=5), "give head_dim"),
        (dict(positions="rotary", head_dim=3), "even head_dim"),
        (dict(precision="low"), "precision"),
    ],
)
def test_the_layer_refuses(change, message):
    given = dict(features=16, num_heads=N, num_kv_heads=K) | change
    with pytest.raises(ValueError, match=message):
        FlashAttentionLayer(**given, rngs=nnx.Rngs(0))


def test_token_positions_need_rotary():
    with pytest.raises(ValueError, match="token_positions"):
        layer()(X, token_positions=jnp.zeros((B, T), int))


@pytest.mark.parametrize(("heads", "last"), [(8, 2**-8), (12, 2**-3.5)])
def test_slopes_are_those_of_the_paper(heads, last):
    slopes = alibi_slopes(heads)
    assert slopes.shape == (heads,)
    np.testing.assert_allclose(slopes[-1], last, rtol=1e-6)
    np.testing.assert_allclose(slopes[7], 2**-8, rtol=1e-6)
