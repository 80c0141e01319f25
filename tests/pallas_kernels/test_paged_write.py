"""The kernel that writes keys and values gives the bits of the XLA scatter, in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.ops.write_kv import write_kv as xla_write
from pallas_kernels.paged_attention import write_kv

BLOCKS, SIZE = 5, 16


def operands(tokens, heads, dim, dtype, *, fixed=False, seed=0):
    """Pools full of numbers, distinct slots of which some are -1, and what the options need."""
    rng = np.random.default_rng(seed)
    draw = lambda *s: jnp.asarray(rng.standard_normal(s), jnp.bfloat16)
    k, v = draw(tokens, heads, dim), draw(tokens, heads, dim) * 30
    pools = [(draw(BLOCKS, heads, SIZE, dim) * 20).astype(dtype) for _ in range(2)]
    slots = rng.permutation(BLOCKS * SIZE)[:tokens].astype(np.int32)
    slots[rng.random(tokens) < 0.2] = -1
    options = {}
    if jnp.dtype(dtype).itemsize == 1:
        shape = (heads,) if fixed else (BLOCKS, heads, SIZE)
        scales = rng.uniform(0.02, 0.1, (2, *shape))
        options |= dict(zip(("k_scale", "v_scale"), jnp.asarray(scales, jnp.float32), strict=True))
    return (*pools, k, v, jnp.asarray(slots)), options


def check(args, options, capfd):
    out = jax.jit(functools.partial(write_kv, interpret=True))(*args, **options)
    got = [x for x in out if x is not None]
    want = jax.jit(functools.partial(xla_write, implementation="xla"))(*args, **options)
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        if options:  # a product by 1 / scale is no division
            np.testing.assert_allclose(a, b, rtol=0.13, atol=1.0)
            assert (np.abs(a - b) > 1e-6 * np.abs(b)).mean() <= 0.01
        else:
            np.testing.assert_array_equal(a, b)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.smoke
def test_tokens_go_to_their_slots(capfd):
    """Tokens that fill no whole number of CTAs; -1 writes nothing."""
    check(*operands(12, 8, 64, jnp.bfloat16), capfd)


@pytest.mark.parametrize("tokens,heads,dtype", [(5, 8, jnp.int8), (70, 3, jnp.float8_e4m3fn)])
def test_a_token_is_quantised_as_by_xla(tokens, heads, dtype, capfd):
    """Few tokens, and more than a CTA takes of a head."""
    check(*operands(tokens, heads, 64, dtype), capfd)


def test_fixed_scales_of_heads(capfd):
    check(*operands(20, 4, 64, jnp.int8, fixed=True), capfd)


def test_few_tokens_of_one_head(capfd):
    check(*operands(3, 2, 64, jnp.bfloat16), capfd)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (dict(k=jnp.zeros((4, 3, 64), jnp.bfloat16)), ValueError),
        (dict(slots=jnp.zeros(3, jnp.int32)), ValueError),
        (dict(k_scale=jnp.ones(4), v_scale=jnp.ones(4)), ValueError),
        (dict(k_pool=jnp.zeros((BLOCKS, 4, SIZE, 64))), NotImplementedError),
    ],
)
def test_refusals(change, error):
    args, _ = operands(4, 4, 64, jnp.bfloat16)
    names = ("k_pool", "v_pool", "k", "v", "slots")
    with pytest.raises(error):
        jax.eval_shape(write_kv, **(dict(zip(names, args, strict=True)) | change))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, pytest.param(jnp.int8, marks=pytest.mark.slow)])
def test_lowers_for_cuda_in_place(dtype):
    args, options = operands(64, 8, 128, dtype)
    f = jax.jit(write_kv, donate_argnums=(0, 1))
    text = f.trace(*args, **options).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text
    assert text.count("tf.aliasing_output") == 2
