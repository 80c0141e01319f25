"""Dense attention over gathered blocks in float32: what every kernel here has to give."""

import jax
import jax.numpy as jnp


def _scaled(pool: jax.Array, scale: jax.Array | None) -> jax.Array:
    """The pool's values in f32; `scale` is `[K]` or `[P, K, block_size]`."""
    pool = pool.astype(jnp.float32)
    if scale is None:
        return pool
    scale = scale.astype(jnp.float32)
    return pool * (scale[None, :, None, None] if scale.ndim == 1 else scale[..., None])


def paged_attention_reference(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    q_indptr: jax.Array,
    *,
    scale: float | None = None,
    window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    positions: jax.Array | None = None,
    tree_mask: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Output f32 `[T, N, Hv]` and log-sum-exp f32 `[T, N]` (without sinks), one token at a time.

    >>> import numpy as np
    >>> q = jnp.ones((2, 4, 8)); pool = jnp.ones((3, 2, 16, 8))
    >>> out, lse = paged_attention_reference(
    ...     q, pool, pool, jnp.array([[2]]), jnp.array([5]), jnp.array([0, 1]), scale=0.0)
    >>> print(np.round(out[:, 0, 0], 3), np.exp(lse[:, 0]).round(3))
    [1. 0.] [5. 0.]
    """
    t, n, h = q.shape
    kv_heads, block_size = k_pool.shape[1:3]
    group = n // kv_heads
    factor = h**-0.5 if scale is None else scale
    token = jnp.arange(t, dtype=jnp.int32)
    row = jnp.sum(q_indptr[None, 1:] <= token[:, None], axis=1)
    owned = row < context_lens.shape[0]
    row = jnp.minimum(row, context_lens.shape[0] - 1)
    old = context_lens[row] - (q_indptr[row + 1] - q_indptr[row])
    index = token - q_indptr[row]
    position = old + index if positions is None else positions
    words = jnp.zeros((t, 1), jnp.uint32) if tree_mask is None else tree_mask
    keys = jnp.arange(block_tables.shape[1] * block_size, dtype=jnp.int32)
    head = jnp.arange(n) // group

    def one(q_t, r, pos, ok, old, i, words):
        live = keys < context_lens[r]
        j, where = keys - old, keys
        if positions is not None:
            at = jnp.clip(q_indptr[r] + j, 0, t - 1)
            where = jnp.where((j >= 0) & live, positions[at], keys)
        blocks = jnp.where(live[::block_size], block_tables[r], 0)

        def gather(pool, scale):
            x = jnp.moveaxis(_scaled(pool[blocks], None if scale is None else scale), 1, 0)
            x = x.reshape(kv_heads, -1, pool.shape[-1])
            return jnp.where(live[None, :, None], x, 0.0)[head]

        pick = lambda s: s if s is None or s.ndim == 1 else s[blocks]
        k, v = gather(k_pool, pick(k_scale)), gather(v_pool, pick(v_scale))
        s = jnp.einsum("nh,nsh->ns", q_t.astype(jnp.float32), k, precision="highest") * factor
        if logits_soft_cap is not None:
            s = logits_soft_cap * jnp.tanh(s / logits_soft_cap)
        if alibi_slopes is not None:
            s = s - alibi_slopes[:, None] * jnp.abs(where - pos)[None, :].astype(jnp.float32)
        bit = (words[jnp.clip(j // 32, 0, words.shape[0] - 1)] >> (j % 32).astype(jnp.uint32)) & 1
        bit = (bit == 1) & (j < 32 * words.shape[0])
        seen = live & ok & (j < 0) | (live & ok & ((j <= i) if tree_mask is None else bit))
        if window is not None:
            seen = seen & (where > pos - window)
        s = jnp.where(seen[None, :], s, -jnp.inf)
        lse = jax.nn.logsumexp(s, axis=1)
        total = lse if sinks is None else jnp.logaddexp(lse, sinks.astype(jnp.float32))
        p = jnp.where(seen[None, :], jnp.exp(s - total[:, None]), 0.0)
        return jnp.einsum("ns,nsh->nh", p, v, precision="highest"), lse

    return jax.lax.map(lambda a: one(*a), (q, row, position, owned, old, index, words))
