"""The doors on a Hopper GPU (sm_90): what is chosen, and that it equals the tiled path in f32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.ops import registry
from aidx.ops.flash_attention import flash_attention
from aidx.ops.paged_attention import paged_attention

pytestmark = pytest.mark.gpu

B, T, N, K, H = 2, 1000, 8, 2, 128


@functools.cache
def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(key, (B, T, N, H), jnp.bfloat16) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, K, H), jnp.bfloat16) for key in keys[2:])
    return q, k, v, d_out


def results(implementation, dtype, **options):
    """out and the gradients of q, k and v."""
    *inputs, d_out = (x.astype(dtype) for x in arrays())
    attend = functools.partial(flash_attention, implementation=implementation, **options)

    @jax.jit
    def run(*inputs):
        out, pull = jax.vjp(attend, *inputs)
        return out, *pull(d_out)

    return run(*inputs)


def assert_close(got, expected, error=0.01):
    """Root mean square error relative to that of the expected values."""
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all()
        assert np.sqrt(np.mean((a - b) ** 2)) < error * np.sqrt(np.mean(b**2))


def options(name):
    ids = jnp.repeat(jnp.arange(4), T // 4)[None].repeat(B, 0)
    return {
        "full": {},
        "causal": {"causal": True, "query_offset": 0},
        "window": {"causal": True, "window": 200, "query_offset": 0},
        "kv_lens": {"kv_lens": jnp.array([700, 0])},
        "segments": {"causal": True, "segment_ids": ids},
        "unsorted_segments": {"segment_ids": ids[:, ::-1]},
        "sinks": {"causal": True, "sinks": jnp.ones(N)},
        "bias": {"bias": jnp.ones((T, T), jnp.bfloat16)},
    }[name]


CUDNN = ("full", "causal", "window", "kv_lens")
KERNEL = (*CUDNN, "segments", "unsorted_segments", "sinks")


@pytest.mark.parametrize(
    ("implementation", "name"),
    [("cudnn", n) for n in CUDNN] + [("mosaic_gpu", n) for n in KERNEL] + [(None, "bias")],
)
def test_the_door_equals_the_tiles_in_f32(implementation, name):
    given = options(name)
    assert_close(
        results(implementation, jnp.bfloat16, **given), results("xla", jnp.float32, **given)
    )


def test_the_default_is_the_kernel():
    q, k, v, _ = arrays()
    chosen = [e.name for e in registry.explain("flash_attention", q, k, v, causal=True) if e.chosen]
    assert chosen == ["mosaic_gpu"]


def test_a_folded_vmap_of_a_gradient_is_the_gradient():
    q, k, v, _ = arrays()
    grad = jax.grad(lambda *a: jnp.sum(flash_attention(*a, causal=True), dtype=jnp.float32))
    folded = jax.jit(jax.vmap(grad))(q[:, None], k[:, None], v[:, None])
    assert_close([folded[:, 0]], [jax.jit(grad)(q, k, v)], 1e-3)


@pytest.mark.parametrize(
    "rows",
    [
        [(1, 1024)] * 64,
        [(1, 32768)] + [(1, 512)] * 31,
        [(6, 2048)] * 8,
        [(1, 2048)] * 16 + [(300, 4000)],
        [(512, 8704)],
    ],
    ids=["decode", "skewed", "verify", "mixed", "chunk"],
)
def test_paged_attention_equals_its_tiles_in_f32(rows, block_size=16, blocks=9000):
    rng = np.random.default_rng(0)
    indptr = np.cumsum([0] + [n for n, _ in rows]).astype(np.int32)
    tables = np.zeros((len(rows), max(-(-s // block_size) for _, s in rows)), np.int32)
    free = list(rng.permutation(blocks))
    for r, (_, length) in enumerate(rows):
        needed = -(-length // block_size)
        tables[r, :needed], free = free[:needed], free[needed:]
    keys = jax.random.split(jax.random.key(1), 3)
    pools = [jax.random.normal(k, (blocks, 8, block_size, H), jnp.bfloat16) for k in keys[:2]]
    q = jax.random.normal(keys[2], (indptr[-1], 32, H), jnp.bfloat16)
    rest = (tables, np.array([s for _, s in rows], np.int32), indptr)
    attend = functools.partial(paged_attention, max_q=max(n for n, _ in rows))
    out = jax.jit(attend)(q, *pools, *rest)
    wide = [x.astype(jnp.float32) for x in (q, *pools)]
    assert_close([out], [jax.jit(functools.partial(attend, implementation="xla"))(*wide, *rest)])
