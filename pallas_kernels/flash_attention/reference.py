"""Attention written out in f32: the oracle of the kernels' tests."""

import jax
import jax.numpy as jnp

from pallas_kernels.dropout import dropout_keeps
from pallas_kernels.flash_attention.mask import Band, BlockKinds, Bounds, visible
from pallas_kernels.flash_attention.problem import Dropout, Modifier


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
    dropout: Dropout | None = None,
    score: Modifier | None = None,
    mask: Modifier | None = None,
    blocks: BlockKinds | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`(out [B, T, N, Hv] f32, lse [B, T, N] f32)`, with the whole score matrix in memory.

    `blocks` is what a kernel may skip: here it only must agree with `mask`.

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
        seen = jnp.broadcast_to(visible(band, bounds, queries, keys)[:, None], s.shape)
        if score is not None:
            s = everywhere(score, s)
        if mask is not None:
            seen = seen & everywhere(mask, s)
        if blocks is not None:
            grown = jnp.repeat(blocks.kinds, blocks.block_q, 2)[:, :, :queries]
            seen = seen & (jnp.repeat(grown, blocks.block_kv, 3)[..., :keys] > 0)
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
        if dropout is not None:
            keep = dropout_keeps(
                dropout.words[..., None], jnp.arange(keys)[None, None, None], dropout.rate
            )
            prob = jnp.where(keep, prob / (1.0 - dropout.rate), 0.0)
        return jnp.einsum("bnts,bsnh->btnh", prob, v), lse.transpose(0, 2, 1)


def everywhere(modifier: Modifier, s: jax.Array) -> jax.Array:
    """What a modifier makes of all scores [B, N, T, S], one scalar at a time."""
    program, arrays = modifier
    shapes = {"scalar": (1, 1), "query": (-1, 1), "key": (1, -1), "tile": s.shape[2:]}
    values = []
    for x, kind in zip(arrays, program.kinds, strict=True):
        x = x.reshape(*x.shape[:2], *shapes[kind]).astype(_wide(x.dtype))
        values.append(jnp.broadcast_to(x, s.shape).ravel())
    t = jnp.broadcast_to(jnp.arange(s.shape[2])[None, None, :, None], s.shape).ravel()
    key = jnp.broadcast_to(jnp.arange(s.shape[3])[None, None, None], s.shape).ravel()
    scores = (s.ravel(),) if program.scored else ()
    (out,) = jax.vmap(program)(*scores, t, key, *values)
    return out.reshape(s.shape)


def _wide(dtype):
    return jnp.float32 if jnp.issubdtype(dtype, jnp.floating) else dtype
