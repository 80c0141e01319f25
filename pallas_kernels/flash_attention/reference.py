"""Attention written out in f32: the oracle of the kernels' tests."""

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.mask import Band, Bounds, visible


def reference(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    band: Band,
    bounds: Bounds | None = None,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`(out [B, T, N, Hv] f32, lse [B, T, N] f32)`, with the whole score matrix in memory.

    >>> q = k = v = jnp.ones((1, 2, 1, 8))
    >>> out, lse = reference(q, k, v, band=Band(right=0), scale=0.125)
    >>> print(out[0, :, 0, 0], (lse[0, :, 0] * 1000).astype(int))
    [1. 1.] [1000 1693]
    """
    with jax.default_matmul_precision("highest"):
        q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
        (_, queries, heads, _), (_, keys, kv_heads, _) = q.shape, k.shape
        k, v = (jnp.repeat(x, heads // kv_heads, axis=2) for x in (k, v))
        s = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
        if soft_cap is not None:
            s = soft_cap * jnp.tanh(s / soft_cap)
        if alibi_slopes is not None:
            t = jnp.arange(queries)[:, None] + band.offset
            distance = jnp.abs(t - jnp.arange(keys)[None]).astype(jnp.float32)
            s = s - alibi_slopes[None, :, None, None] * distance[None, None]
        seen = visible(band, bounds, queries, keys)[:, None]
        s = jnp.where(seen, s, -jnp.inf)
        # a shift that cancels: cut from every gradient, or none would be right
        peak = jax.lax.stop_gradient(jnp.max(s, axis=-1, initial=-1e30))
        weight = jnp.where(seen, jnp.exp(s - peak[..., None]), 0.0)
        total = weight.sum(-1)
        some = total > 0
        lse = jnp.where(some, jnp.log(jnp.where(some, total, 1.0)) + peak, -jnp.inf)
        if sinks is not None:
            total = total + jnp.exp(sinks[None, :, None] - peak)
        prob = weight / jnp.where(some, total, 1.0)[..., None]
        return jnp.einsum("bnts,bsnh->btnh", prob, v), lse.transpose(0, 2, 1)
