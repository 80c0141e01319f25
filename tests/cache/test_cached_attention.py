"""The Flax module: with a cache it computes what it computes without."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.cache import CachedMultiHeadAttention, KVCache
from aidx.ops.rope import Rope

FEATURES, TOKENS = 12, 11


def module(**changes):
    from flax import nnx

    options = dict(num_kv_heads=2, head_dim=8, rope=Rope(theta=100.0), rngs=nnx.Rngs(0))
    return CachedMultiHeadAttention(FEATURES, 4, **{**options, **changes})


@pytest.fixture(scope="module")
def x():
    return jax.random.normal(jax.random.key(1), (2, TOKENS, FEATURES))


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(window=4),
        dict(rope=None, num_kv_heads=None, head_dim=None, use_bias=True),
    ],
    ids=["gqa_rope", "window_after_eviction", "plain"],
)
def test_prefill_and_decode_equal_the_call_without_a_cache(x, options):
    attention = module(**options)
    whole, nothing = jax.jit(attention)(x)
    assert nothing is None
    config = attention.cache_config(max_seq_len=TOKENS, max_batch=2, dtype="float32")
    cache = KVCache.create(config)
    assert cache.capacity(0) == options.get("window", TOKENS)
    call = jax.jit(lambda x, cache, counts: attention(x, cache, counts=counts))
    prefilled, cache = call(x[:, :7], cache, jnp.array([7, 5]))
    rows = [[prefilled[0, :7]], [prefilled[1, :5]]]
    fed = [7, 5]
    while min(fed) < TOKENS:
        counts = [min(1, TOKENS - n) for n in fed]
        new = jnp.stack([x[row, min(n, TOKENS - 1)][None] for row, n in enumerate(fed)])
        out, cache = call(new, cache, jnp.array(counts))
        for row, count in enumerate(counts):
            rows[row] += [out[row]] * count
            fed[row] += count
    for row in range(2):
        np.testing.assert_allclose(np.concatenate(rows[row]), whole[row], atol=3e-6)


def test_rotation_matters(x):
    """So the test above would see a wrong position."""
    rotated, plain = (jax.jit(module(rope=rope))(x)[0] for rope in (Rope(theta=100.0), None))
    assert np.abs(rotated - plain).max() > 0.01


def test_layers_share_a_cache_and_gradients_flow(x):
    from flax import nnx

    attention = module()
    config = attention.cache_config(num_layers=2, max_seq_len=16, max_batch=2, dtype="float32")

    @nnx.jit
    def loss(attention, x):
        cache = KVCache.create(config)
        y, cache = attention(x, cache, layer=0)
        y, cache = attention(y, cache, layer=1)
        return jnp.sum(y**2), cache

    grads, cache = nnx.grad(loss, has_aux=True)(attention, x)
    assert cache.lengths.tolist() == [[TOKENS] * 2] * 2
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(grads))


def test_misuse_is_refused(x):
    from flax import nnx

    with pytest.raises(ValueError, match="num_heads=4 is not a multiple of num_kv_heads=3"):
        module(num_kv_heads=3)
    with pytest.raises(ValueError, match="features=10 is not a multiple of num_heads=4"):
        CachedMultiHeadAttention(10, 4, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="counts needs a cache"):
        module()(x, counts=jnp.array([1, 1]))


def test_the_room_does_not_import_nnx():
    code = "import sys, aidx.cache; assert 'flax.nnx' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
