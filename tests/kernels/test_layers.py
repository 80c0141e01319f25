"""Models on the fused kernels: the same losses and gradients, and nothing else in inference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.cache import no_cache_attend
from aidx.kernels import REGISTRY, fused, layers
from aidx.models import GPT2Config, LlamaConfig, bind_forward, init_params, stack_layers
from aidx.train import language_model_loss

LLAMA = LlamaConfig(31, 16, 32, 2, 2, 1, 8, tied=True, qk_norm=True, activation="gelu_new")
CONFIGS = {"llama": LLAMA, "gpt2": GPT2Config(31, 16, 32, 2, 2, max_position_embeddings=16)}
RNG = np.random.default_rng(0)
BATCH = {
    name: jnp.asarray(RNG.integers(0, 31, (2, 9)), jnp.int32) for name in ("tokens", "targets")
}


def graded(config, remat="none"):
    """(parameters, `(params) -> (loss, gradients)`), of scanned layers."""
    params = stack_layers(init_params(config, jax.random.key(0)))
    loss = language_model_loss(bind_forward(config), remat=remat, implementation="xla")
    return params, lambda p: jax.value_and_grad(lambda p: loss(p, BATCH, None)[0])(p)


@pytest.mark.parametrize(
    ("name", "remat"), [("llama", "none"), ("llama", "full"), ("gpt2", "dots_attention")]
)
def test_gradients_are_those_of_the_plain_functions(name, remat, monkeypatch):
    params, plain = graded(CONFIGS[name], remat)
    want = jax.jit(plain)(params)
    monkeypatch.setattr(fused, "SMALL", 0)
    _, large = graded(CONFIGS[name], remat)
    got = jax.jit(large)(params)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def lowered(f, *args):
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def test_only_what_is_differentiated_takes_kernels(monkeypatch):
    """On a GPU: inference has none of them whatever its size, small training neither."""
    config = LlamaConfig(31, 64, 64, 1, 2, 1, 8, tied=True)
    params, step = graded(config)
    count = lambda f: lowered(f, params).count("custom_call @mosaic_gpu_v2")
    infer = lambda p: bind_forward(config)(
        p, BATCH["tokens"], BATCH["tokens"], no_cache_attend(implementation="xla"), None
    )[0]
    assert count(infer) == count(step) == 0
    monkeypatch.setattr(fused, "SMALL", 0)
    _, step = graded(config)
    assert count(infer) == 0
    assert count(step) == 6  # two kinds of norm and a gate, forward and backward


def test_a_replacement_is_called_whatever_the_size():
    """A kernel of one's own in every model: `REGISTRY.replace`."""
    halved = lambda x, scale, *, eps=1e-6: 0.5 * fused.rms_norm.reference(x, scale, eps=eps)
    from aidx.kernels import KernelBuilder

    other = KernelBuilder("halved").reference(halved).build(registry=None)
    x = jnp.array([3.0, 4.0])
    want = layers.rms_norm(x, jnp.ones(2))
    with REGISTRY.replace("rms_norm", other):
        np.testing.assert_allclose(layers.rms_norm(x, jnp.ones(2)), 0.5 * want)
    np.testing.assert_allclose(layers.rms_norm(x, jnp.ones(2)), want)
