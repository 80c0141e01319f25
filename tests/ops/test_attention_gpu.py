"""The doors on a Hopper GPU (sm_90): what is chosen, and that it equals the tiled path in f32."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.cache import KVCache, KVCacheConfig, contiguous_attend
from aidx.ops import registry
from aidx.ops.attention_mask import block_mask
from aidx.ops.flash_attention import flash_attention
from aidx.ops.paged_attention import paged_attention
from aidx.ops.write_kv import write_kv

pytestmark = pytest.mark.gpu

B, T, N, K, H = 2, 1000, 8, 2, 128
NO_TUNING = {"xla_gpu_autotune_level": 0}  # the expected values are compiled once and run once


def jitted(run, implementation):
    """jit; what is only the yardstick is not tuned."""
    return jax.jit(run, compiler_options=NO_TUNING if implementation == "xla" else None)


@functools.cache
def arrays():
    keys = jax.random.split(jax.random.key(0), 4)
    q, d_out = (jax.random.normal(key, (B, T, N, H), jnp.bfloat16) for key in keys[:2])
    k, v = (jax.random.normal(key, (B, T, K, H), jnp.bfloat16) for key in keys[2:])
    return q, k, v, d_out


def results(implementation, dtype, **options):
    """out and the gradients of q, k and v."""
    attend = functools.partial(flash_attention, implementation=implementation, **options)

    def run(*inputs):
        *inputs, d_out = (x.astype(dtype) for x in inputs)
        out, pull = jax.vjp(attend, *inputs)
        return out, *pull(d_out)

    return jitted(run, implementation)(*arrays())


def assert_close(got, expected, error=0.01):
    """Root mean square error relative to that of the expected values."""
    for a, b in zip(got, expected, strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        assert np.isfinite(a).all()
        assert np.sqrt(np.mean((a - b) ** 2)) < error * np.sqrt(np.mean(b**2))


SLOPES = 2.0 ** -jnp.arange(1.0, N + 1)


def near(b, n, t, s):
    """A mask_mod that leaves empty, partial and full tiles."""
    return (jnp.abs(t - s) < 100 + 50 * n) | (s < 64)


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
        "bias": {"bias": jax.random.normal(jax.random.key(7), (1, N, T, T)), "causal": True},
        "key_bias": {"bias": jax.random.normal(jax.random.key(8), (B, 1, 1, T))},
        "alibi": {"alibi_slopes": SLOPES, "causal": True},
        "alibi_lens": {"alibi_slopes": SLOPES, "kv_lens": jnp.array([700, 0])},
        "soft_cap": {"logits_soft_cap": 5.0, "causal": True},
        "dropout": {"dropout_rate": 0.2, "dropout_key": jax.random.key(9), "causal": True},
        "score_mod": {
            "score_mod": lambda x, b, n, t, s: jnp.where(
                s <= t + 5, 2.0 * jnp.tanh(x * 0.5) - SLOPES[n] * jnp.abs(t - s), -jnp.inf
            )
        },
        "mask_mod": {"mask_mod": lambda b, n, t, s: (ids[0, t] == ids[0, s]) | (s % (n + 3) == 0)},
        "mask": {"mask": jax.random.bernoulli(jax.random.key(3), 0.5, (1, 1, T, T))},
        "block_mask": {"block_mask": block_mask(near, T, T, num_heads=N), "causal": True},
        "ranges": {"block_mask": block_mask(lambda b, n, t, s: ids[0, t] == ids[0, s], T, T),
                   "causal": True, "kv_lens": jnp.array([700, 0])},
        "deterministic": {"causal": True, "deterministic": True, "logits_soft_cap": 5.0,
                          "dropout_rate": 0.2, "dropout_key": jax.random.key(9)},
    }[name]  # fmt: skip


CUDNN = ("full", "causal", "window", "kv_lens")
KERNEL = (
    *CUDNN, "segments", "unsorted_segments", "sinks", "bias", "key_bias", "alibi", "alibi_lens",
    "soft_cap", "dropout", "score_mod", "mask_mod", "mask", "block_mask", "ranges",
    "deterministic",
)  # fmt: skip


@pytest.mark.parametrize(
    ("implementation", "name"),
    [("cudnn", n) for n in CUDNN] + [("mosaic_gpu", n) for n in KERNEL],
)
def test_the_door_equals_the_tiles_in_f32(implementation, name):
    given = options(name)
    assert_close(
        results(implementation, jnp.bfloat16, **given), results("xla", jnp.float32, **given)
    )


@pytest.mark.parametrize("name", ["alibi", "bias", "score_mod"])
@pytest.mark.parametrize("heads", [64, 256])
def test_other_widths_and_gradients_of_what_a_score_takes(name, heads):
    """dU of a bias, of slopes and of a captured table, by kernels and by tiles."""
    q, k, v, d_out = (x[:, :300, :, :heads] if heads < H else jnp.concatenate([x] * 2, -1)[:, :300]
                      for x in arrays())  # fmt: skip
    table = {
        "alibi": SLOPES,
        "bias": jax.random.normal(jax.random.key(7), (1, N, 300, 300)),
        "score_mod": jax.random.normal(jax.random.key(7), (N, 300)),
    }[name]

    def attend(q, k, v, x, implementation):
        given = {
            "alibi": lambda: {"alibi_slopes": x},
            "bias": lambda: {"bias": x},
            "score_mod": lambda: {"score_mod": lambda z, b, n, t, s: z * 0.9 + x[n, s]},
        }[name]()
        return flash_attention(q, k, v, causal=True, implementation=implementation, **given)

    def run(implementation, dtype, *inputs):
        *inputs, d_out = (x.astype(dtype) for x in inputs)
        f = functools.partial(attend, implementation=implementation)
        out, pull = jax.vjp(f, *inputs, table)
        return out, *pull(d_out)

    values = lambda *how: jitted(functools.partial(run, *how), how[0])(q, k, v, d_out)
    assert_close(values("mosaic_gpu", jnp.bfloat16), values("xla", jnp.float32), 0.015)


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
        [(1, 50), (1, 3), (1, 64)],
        [(1, 32768)] + [(1, 512)] * 31,
        [(6, 2048)] * 8,
        [(1, 2048)] * 16 + [(300, 4000)],
        [(512, 8704)],
    ],
    ids=["decode", "short", "skewed", "verify", "mixed", "chunk"],
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


def paged(rows, block_size, kv_heads, heads, blocks):
    """q, pools in bf16, tables, context lengths and q_indptr of rows of (new tokens, context)."""
    rng = np.random.default_rng(0)
    indptr = np.cumsum([0] + [n for n, _ in rows]).astype(np.int32)
    tables = np.zeros((len(rows), max(-(-s // block_size) for _, s in rows)), np.int32)
    free = list(rng.permutation(blocks))
    for r, (_, length) in enumerate(rows):
        needed = -(-length // block_size)
        tables[r, :needed], free = free[:needed], free[needed:]
    keys = jax.random.split(jax.random.key(1), 3)
    shape = (blocks, kv_heads, block_size, H)
    pools = [jax.random.normal(k, shape, jnp.bfloat16) for k in keys[:2]]
    q = jax.random.normal(keys[2], (indptr[-1], heads, H), jnp.bfloat16)
    return q, *pools, tables, np.array([s for _, s in rows], np.int32), indptr


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("rows", [[(1, 3000)] * 20, [(5, 2048), (1, 17)], [(300, 2000), (1, 90)]])
def test_one_byte_pools_equal_their_tiles_in_f32(rows, dtype):
    q, k, v, *rest = paged(rows, 16, 8, 32, 4000)
    k, v = (x.astype(dtype) if dtype != jnp.int8 else (x * 30).astype(dtype) for x in (k, v))
    scales = [
        jax.random.uniform(jax.random.key(i), k.shape[:3], minval=0.01, maxval=0.1) for i in (0, 1)
    ]
    attend = functools.partial(
        paged_attention, max_q=max(n for n, _ in rows), k_scale=scales[0], v_scale=scales[1]
    )
    out = jax.jit(functools.partial(attend, implementation="mosaic_gpu"))(q, k, v, *rest)
    reference = jax.jit(functools.partial(attend, implementation="xla"))
    assert_close([out], [reference(q.astype(jnp.float32), k, v, *rest)])


def test_a_pool_beyond_two_to_the_31_elements(block_size=64):
    """Blocks at the far end of a pool of 4.4 GB of one-byte keys are read and written."""
    blocks = 2**31 // (8 * block_size * H) + 64
    pool = jnp.zeros((blocks, 8, block_size, H), jnp.int8)
    scale = jnp.full((8,), 1.0, jnp.float32)
    k = jax.random.normal(jax.random.key(0), (128, 8, H), jnp.bfloat16) * 20
    first = (blocks - 2) * block_size
    slots = jnp.arange(first, first + 128, dtype=jnp.int32)
    write = functools.partial(write_kv, k_scale=scale, v_scale=scale, implementation="mosaic_gpu")
    written, _ = jax.jit(write, donate_argnums=0)(pool, jnp.zeros_like(pool), k, k, slots)
    last = np.asarray(written[-2:])
    tables = jnp.array([[blocks - 2, blocks - 1]], jnp.int32)
    q = jax.random.normal(jax.random.key(1), (1, 32, H), jnp.bfloat16) * 0.1
    rows = (jnp.array([128], jnp.int32), jnp.array([0, 1], jnp.int32))
    attend = functools.partial(paged_attention, max_q=1, k_scale=scale, v_scale=scale)
    out = jax.jit(functools.partial(attend, implementation="mosaic_gpu"))
    expected = jax.jit(functools.partial(attend, implementation="xla"))
    assert np.abs(last).sum() > 0
    small = jnp.asarray(last)
    near = expected(q.astype(jnp.float32), small, small, jnp.array([[0, 1]], jnp.int32), *rows)
    assert_close([out(q, written, written, tables, *rows)], [near])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn])
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_the_kernel_writes_what_the_scatter_writes(tokens, dtype, block_size=16, blocks=64):
    k, v = (jax.random.normal(jax.random.key(i), (tokens, 8, H), jnp.bfloat16) for i in (0, 1))
    q = jax.random.normal(jax.random.key(2), (tokens, 32, H), jnp.bfloat16)
    angles = jax.random.uniform(jax.random.key(3), (tokens, H // 2)) * 6
    slots = np.random.default_rng(0).permutation(blocks * block_size)[:tokens].astype(np.int32)
    slots[1::5] = -1
    shape = (blocks, 8, block_size, H)
    pools = [jnp.full(shape, 3, dtype)] * 2
    options = dict(q=q, cos=jnp.cos(angles), sin=jnp.sin(angles))
    if jnp.dtype(dtype).itemsize == 1:
        options |= dict(k_scale=jnp.full(shape[:3], 7.0), v_scale=jnp.full(shape[:3], 7.0))
    run = lambda name: jax.jit(functools.partial(write_kv, implementation=name))(
        *pools, k, v, jnp.asarray(slots), **options
    )
    for a, b in zip(run("mosaic_gpu"), run("xla"), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, rtol=0.13, atol=1.0)  # a step of int8 or fp8, rarely
        assert (np.abs(a - b) > 1e-2 * np.abs(b)).mean() < 0.01


def test_decode_over_a_contiguous_cache_is_the_paged_kernel():
    """A row's buffer read as blocks, tokens first, against flash attention on it."""
    geometry = dict(num_layers=1, num_heads=32, num_kv_heads=8, head_dim=H)
    for dtype in ("bfloat16", "int8"):
        config = KVCacheConfig(**geometry, max_seq_len=1024, max_batch=4, dtype=dtype)
        k, v = (jax.random.normal(jax.random.key(i), (4, 1000, 8, H), jnp.bfloat16) for i in (0, 1))
        cache = KVCache.create(config).append(0, k, v, jnp.array([1000, 1, 77, 500]))
        q = jax.random.normal(jax.random.key(2), (4, 1, 32, H), jnp.bfloat16)
        attend = lambda name: jax.jit(
            lambda cache, q: contiguous_attend(implementation=name)(cache, 0, q, k[:, :1], v[:, :1])
        )
        text = attend(None).lower(cache, q).as_text()
        assert "mosaic_gpu" in text
        assert_close([attend(None)(cache, q)[0]], [attend("xla")(cache, q)[0]], error=0.02)
