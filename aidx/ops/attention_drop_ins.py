"""`flash_attention` behind the signatures that other libraries call.

* `dot_product_attention` for `jax.nn.dot_product_attention`.
* `attention_fn` for the argument of that name of `flax.nnx.MultiHeadAttention` and
  `flax.linen.MultiHeadDotProductAttention`.

Both keep the causal alignment of what they replace: query 0 stands at key 0.  What differs is a
row that sees no key: zeros here, the mean of all values there.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from .flash_attention import FlashAttentionConfig, flash_attention
from .registry import ImplementationChoice

Array = jax.Array


def dot_product_attention(
    query: Any,
    key: Any,
    value: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Any = None,
    key_value_seq_lengths: Any = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: ImplementationChoice = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention`, its arguments and its alignment, by `flash_attention`.

    Args:
      query: `[B, T, N, H]` or `[T, N, H]`.
      key: `[B, S, K, H]` or `[S, K, H]`, N a multiple of K.
      value: as key.
      bias: float, four axes that broadcast to `[B, N, T, S]`.
      mask: bool, likewise; True where the key is seen.
      scale: 1 / sqrt(H) by default.
      is_causal: query t sees the keys s <= t, whatever T and S.
      query_seq_lengths: i32 `[B]`; queries past the end give zeros.
      key_value_seq_lengths: i32 `[B]`.
      local_window_size: (left, right) around s = t; an int is both.
      implementation: of `flash_attention`.
      return_residual: also the log-sum-exp `[B, T, N]` or `[T, N]`, f32.

    Raises:
      TypeError, ValueError: arguments that do not fit.

    >>> x = jnp.ones((1, 4, 2, 8))
    >>> bool((dot_product_attention(x, x, x, is_causal=True) == 1).all())
    True
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None and jnp.ndim(x) != 4:
            raise ValueError(f"{name} must have 4 axes, not {jnp.shape(x)}")
    single = query.ndim == 3
    if single:
        query, key, value = query[None], key[None], value[None]
    window = local_window_size
    if isinstance(window, int):
        window = (window, window)
    lengths = lambda x: None if x is None else jnp.asarray(x).reshape(query.shape[0])
    results = flash_attention(
        query,
        key,
        value,
        causal=is_causal,
        window=window,
        mask=mask,
        bias=bias,
        q_lens=lengths(query_seq_lengths),
        kv_lens=lengths(key_value_seq_lengths),
        query_offset=0,
        scale=scale,
        return_lse=return_residual,
        implementation=implementation,
    )
    return jax.tree.map(lambda x: x[0], results) if single else results


PRECISIONS: dict[Any, str] = {
    None: "highest",
    "highest": "highest",
    "float32": "highest",
    jax.lax.Precision.HIGHEST: "highest",
    "default": "default",
    "fastest": "default",
    jax.lax.Precision.DEFAULT: "default",
}


def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = True,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    *,
    implementation: ImplementationChoice = None,
) -> Array:
    """The `attention_fn` of flax's multi-head attention, nnx and linen, by `flash_attention`.

    Args:
      query: `[*B, T, N, H]`; cast with key and value to `dtype`, or to what they promote to.
      key: `[*B, S, K, H]`, N a multiple of K.
      value: `[*B, S, K, Hv]`.
      bias: broadcastable to `[*B, N, T, S]`.
      mask: bool or numbers, likewise; nonzero where the key is seen.
      broadcast_dropout: one dropout mask for all batches and heads.
      dropout_rng: a key; needed where dropout is active.
      dropout_rate: share of the weights dropped.
      deterministic: True turns dropout off.
      dtype: of the computation and of the result.
      precision: of f32 products; None is "highest" here.
      module: an nnx or linen module that sows the weights (memory of T x S).
      is_causal: query t sees the keys s <= t.
      force_fp32_for_softmax: of linen; the softmax is in f32 either way.
      qk_attn_weights_einsum: of linen, refused: no product of the whole matrix is made.
      attn_weights_value_einsum: of linen, refused likewise.
      implementation: of `flash_attention`; `functools.partial` binds it.

    Raises:
      ValueError: an einsum is given, a precision is unknown, or a dropout key is missing.

    >>> from flax import nnx
    >>> layer = nnx.MultiHeadAttention(
    ...     2, 8, decode=False, attention_fn=attention_fn, rngs=nnx.Rngs(0))
    >>> layer(jnp.ones((1, 4, 8))).shape
    (1, 4, 8)
    """
    del force_fp32_for_softmax  # accumulation is f32 in every implementation
    if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        raise ValueError("flash attention makes no weights that an einsum of the caller could take")
    if not isinstance(precision, str | jax.lax.Precision | None) or precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {list(PRECISIONS)}, not {precision!r}")
    dtype = dtype or jnp.result_type(query, key, value)
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    active = dropout_rate > 0 and not deterministic
    attend = functools.partial(
        flash_attention,
        query,
        key,
        value,
        causal=is_causal,
        query_offset=0,
        bias=bias,
        mask=None if mask is None else jnp.asarray(mask) != 0,  # flax makes float masks too
        dropout_rate=dropout_rate if active else 0.0,
        dropout_key=dropout_rng if active else None,
        dropout_broadcast=broadcast_dropout and active,
        config=FlashAttentionConfig(precision=PRECISIONS[precision]),
        implementation=implementation,
    )
    if module is None:
        return attend()
    out, weights = attend(return_weights=True)
    _sow(module, weights.astype(dtype))
    return out


def _sow(module: Any, weights: Array) -> None:
    from flax import nnx

    if isinstance(module, nnx.Module):
        module.sow(nnx.Intermediate, "attention_weights", weights)
    else:
        module.sow("intermediates", "attention_weights", weights)
