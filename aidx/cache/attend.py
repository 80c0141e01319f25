"""Where models and caches meet: each function here makes an `Attend` (`aidx/typing.py`).

An `Attend` writes a layer's new keys and values and attends with its queries.  What it attends to
is what the cache has stored: a token that went through int8 or bf16 is seen so by its own chunk
too, hence how a prompt is cut into chunks changes nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp

from aidx.cache.contiguous import KVCache, dequantize
from aidx.cache.paged import PagedKVCache
from aidx.ops.flash_attention import flash_attention
from aidx.ops.paged_attention import Cascade, paged_attention
from aidx.ops.registry import ImplementationChoice
from aidx.ops.write_kv import quantise
from aidx.typing import Array, Attend, Cache


def no_cache_attend(
    *,
    segment_ids: Array | None = None,
    cu_seqlens: Array | None = None,
    implementation: ImplementationChoice = None,
) -> Attend:
    """Causal attention within the call; the cache goes through untouched (training, scoring).

    Args:
        segment_ids: `[*B, T]`: a token sees only those of its own id.
        cu_seqlens: `[sequences + 1]`: borders of sequences packed along T of a `[T]` call.
        implementation: of `flash_attention`.

    Example:
        >>> q = jnp.ones((3, 2, 4))
        >>> out, cache = no_cache_attend()(None, 0, q, q, q)
        >>> out.shape, cache
        ((3, 2, 4), None)
    """

    def attend(cache, layer, q, k, v, *, window=None, scale=None, soft_cap=None, sinks=None):
        del layer  # every layer attends alike
        out = flash_attention(
            q,
            k,
            v,
            causal=True,
            window=window,
            segment_ids=segment_ids,
            cu_seqlens=cu_seqlens,
            scale=scale,
            logits_soft_cap=soft_cap,
            sinks=sinks,
            implementation=implementation,
        )
        return out, cache

    return attend


def contiguous_attend(
    counts: Array | None = None, *, implementation: ImplementationChoice = None
) -> Attend:
    """Append to a `KVCache` and attend to what each row holds: prefill, decode, anything between.

    Query t of row b stands at position `lengths[b] + t`.  A layer sees the narrower of its own
    window and the cache's.

    Args:
        counts: `[B]` i32: row b's first `counts[b]` of T tokens count, the others are padding (not
            stored; their output is zero).  None: all T.
        implementation: of `flash_attention`.

    Raises:
        CacheOverflow, ValueError: as `KVCache.append`.

    Example:
        >>> from aidx.cache import KVCacheConfig
        >>> config = KVCacheConfig(
        ...     num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, max_seq_len=8
        ... )
        >>> q, kv = jnp.ones((1, 3, 2, 4)), jnp.ones((1, 3, 1, 4))
        >>> out, cache = contiguous_attend()(KVCache.create(config), 0, q, kv, kv)
        >>> out.shape, cache.lengths.tolist()
        ((1, 3, 2, 4), [[3]])
    """

    def attend(
        cache: KVCache, layer, q, k, v, *, window=None, scale=None, soft_cap=None, sinks=None
    ) -> tuple[Array, Cache]:
        before, tokens = cache, q.shape[1]
        cache = cache.append(layer, k, v, counts)
        own = cache.windows[layer]
        options = dict(scale=scale, logits_soft_cap=soft_cap, sinks=sinks)
        if own is None and tokens == 1 and implementation is None and _is_pool(cache, layer, q):
            seen = lambda f: lambda: f(cache, layer, q, counts, window=window, **options)
            out = jax.lax.platform_dependent(cuda=seen(_decode_as_pool), default=seen(_decode))
            return out, cache
        if own is None:
            keys, values = (x.astype(q.dtype) for x in cache.get(layer)[:2])
            where: dict[str, Any] = dict(
                causal=True,
                window=window,
                query_offset=before.lengths[layer],
                kv_lens=jnp.minimum(cache.lengths[layer], cache.capacity(layer)),
            )
        elif tokens == 1:
            # The ring as it lies: softmax does not ask for an order, so a mask is enough.
            keys, values, positions = cache.get(layer)
            keys, values = keys.astype(q.dtype), values.astype(q.dtype)
            oldest = cache.lengths[layer][:, None] - min(own, window or own)
            seen = (positions >= 0) & (positions >= oldest)
            where = dict(mask=seen[:, None, None, :])
        else:
            held = before.lengths[layer] - before.starts[layer]
            total = held + (tokens if counts is None else counts)
            keys, values = _unrolled(before, layer, k, v, total, q.dtype)
            window = min(own, window or own)
            where = dict(causal=True, window=window, query_offset=held, kv_lens=total)
        out = flash_attention(
            q,
            keys,
            values,
            q_lens=counts,
            implementation=implementation,
            **options,
            **where,
        )
        return out, cache

    return attend


POOL_BLOCKS = (64, 128, 32, 16, 8)  # tokens: sizes of blocks that a row is cut into


def _is_pool(cache: KVCache, layer: int, q: Array) -> bool:
    """Whether a layer's buffers, reshaped, are pools that the paged kernels read."""
    capacity, head_dim = cache.capacity(layer), q.shape[-1]
    stored = cache.k[layer].dtype
    return (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and (stored == q.dtype or cache.k_scale is not None)
        and head_dim in (64, 128, 192, 256)
        and any(capacity % size == 0 for size in POOL_BLOCKS)
    )


def _decode_as_pool(cache: KVCache, layer: int, q: Array, counts: Array | None, **options) -> Array:
    """One query a row: a row's buffer is so many blocks, and its table counts them."""
    rows, capacity = q.shape[0], cache.capacity(layer)
    size = next(size for size in POOL_BLOCKS if capacity % size == 0)
    pool = lambda x: x.reshape(-1, size, *x.shape[2:])
    scales = {}
    if cache.k_scale is not None and cache.v_scale is not None:
        by_head = lambda x: jnp.swapaxes(pool(x), 1, 2)  # a 32nd of what is read
        scales = dict(k_scale=by_head(cache.k_scale[layer]), v_scale=by_head(cache.v_scale[layer]))
    out = paged_attention(
        q[:, 0],
        pool(cache.k[layer]),
        pool(cache.v[layer]),
        jnp.arange(rows * capacity // size, dtype=jnp.int32).reshape(rows, -1),
        jnp.clip(cache.lengths[layer], 1, capacity),  # a row without a token is masked below
        jnp.arange(rows + 1, dtype=jnp.int32),
        max_q=1,
        tokens_first=True,
        **scales,
        **options,
    )
    if counts is not None:
        out = jnp.where(counts[:, None, None] > 0, out, 0)
    return out[:, None]


def _decode(cache: KVCache, layer: int, q: Array, counts: Array | None, **options) -> Array:
    """One query a row, by `flash_attention`."""
    lengths = cache.lengths[layer]
    keys, values = (x.astype(q.dtype) for x in cache.get(layer)[:2])
    return flash_attention(
        q,
        keys,
        values,
        causal=True,
        query_offset=lengths - (1 if counts is None else counts),
        kv_lens=jnp.minimum(lengths, cache.capacity(layer)),
        q_lens=counts,
        **options,
    )


def paged_attend(
    block_tables: Array,
    context_lens: Array,
    q_indptr: Array,
    slots: Array,
    *,
    max_q: int | None = None,
    positions: Array | None = None,
    tree_mask: Array | None = None,
    cascade: Cascade | None = None,
    deterministic: bool = False,
    implementation: ImplementationChoice = None,
) -> Attend:
    """Write into the slots of a `PagedKVCache` and attend through the rows' block tables.

    Args:
        block_tables: `[R, M]` i32.
        context_lens: `[R]` i32, keys of a row with those of this call; 0 for a padding row.
        q_indptr: `[R + 1]` i32: row r owns tokens `q_indptr[r]:q_indptr[r + 1]` of `[T]`.
        slots: `[T]` i32: where each token is stored; -1 for padding.
        max_q: static bound on a row's tokens, 1 for pure decode; None is T.
        positions, tree_mask, cascade, deterministic, implementation: of `paged_attention`.

    A pool that is neither quantised nor of q's dtype lends its dtype to the computation; the output
    is q's again.

    Example:
        >>> cache = PagedKVCache.create(
        ...     num_layers=1, num_blocks=4, block_size=2, num_kv_heads=1, head_dim=4
        ... )
        >>> attend = paged_attend(
        ...     jnp.array([[2, 1]]), jnp.array([3]), jnp.array([0, 3]), jnp.array([4, 5, 2])
        ... )
        >>> q, kv = jnp.ones((3, 2, 4)), jnp.ones((3, 1, 4))
        >>> out, cache = attend(cache, 0, q, kv, kv)
        >>> out.shape, cache.k[0][1, 0, :, 0].tolist()
        ((3, 2, 4), [1.0, 0.0])
    """

    def attend(
        cache: PagedKVCache, layer, q, k, v, *, window=None, scale=None, soft_cap=None, sinks=None
    ) -> tuple[Array, Cache]:
        cache = cache.write(layer, k, v, slots)
        k_scale = None if cache.k_scale is None else cache.k_scale[layer]
        v_scale = None if cache.v_scale is None else cache.v_scale[layer]
        out = paged_attention(
            q.astype(cache.k[layer].dtype) if k_scale is None else q,
            cache.k[layer],
            cache.v[layer],
            block_tables,
            context_lens,
            q_indptr,
            max_q=max_q,
            positions=positions,
            window=window,
            logits_soft_cap=soft_cap,
            sinks=sinks,
            tree_mask=tree_mask,
            cascade=cascade,
            scale=scale,
            k_scale=k_scale,
            v_scale=v_scale,
            deterministic=deterministic,
            implementation=implementation,
        )
        return out.astype(q.dtype), cache

    return attend


def _unrolled(
    cache: KVCache, layer: int, k: Array, v: Array, total: Array, out_dtype: jax.typing.DTypeLike
) -> tuple[Array, Array]:
    """`[B, S + T, K, H]`: what a ring holds, oldest first, behind it the new tokens, then zeros.

    The early queries of a chunk see keys that its late tokens push out of the ring, so a chunk
    cannot be attended to after it has been written.
    """
    size, tokens = cache.capacity(layer), k.shape[1]
    starts = cache.starts[layer][:, None]
    held = cache.lengths[layer][:, None] - starts
    index = jnp.arange(size + tokens, dtype=jnp.int32)[None]
    old = (starts + index) % size
    new = jnp.clip(index - held, 0, tokens - 1)
    past_k, past_v, _ = cache.get(layer)

    def join(past, values):
        dtype = cache.k[layer].dtype
        scaled = cache.k_scale is not None
        stored = dequantize(*quantise(values, dtype)) if scaled else values.astype(dtype)
        take = lambda x, at: jnp.take_along_axis(x, at[..., None, None], axis=1)
        where = lambda condition, x, y: jnp.where(condition[..., None, None], x, y)
        joined = where(index < held, take(past, old), take(stored, new))
        return where(index < total[:, None], joined, 0).astype(out_dtype)

    return join(past_k, k), join(past_v, v)
