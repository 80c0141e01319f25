"""The entry: validation, padding to what the kernels take, what surrounds them in the gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._mgpu import cdiv
from pallas_kernels.flash_attention import heuristics
from pallas_kernels.flash_attention.backward import backward
from pallas_kernels.flash_attention.backward_dq import backward_dq
from pallas_kernels.flash_attention.backward_scores import backward_scores
from pallas_kernels.flash_attention.config import BackwardConfig, ForwardConfig
from pallas_kernels.flash_attention.forward import forward
from pallas_kernels.flash_attention.mask import Band, BlockKinds, Bounds
from pallas_kernels.flash_attention.problem import Dropout, Modifier, Options

MAX_HEAD_DIM = 256


class Gradients(NamedTuple):
    """What `flash_attention_bwd` returns; `sinks` is None without sinks.

    `score` holds the gradients of the score_mod's arrays that were asked for, f32, in their shapes.
    """

    q: jax.Array
    k: jax.Array
    v: jax.Array
    sinks: jax.Array | None
    score: tuple[jax.Array, ...] = ()


def validate(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    options: Options,
) -> None:
    """Raises ValueError for what is wrong and NotImplementedError for what the kernels cannot do.

    >>> x = jnp.zeros((1, 8, 2, 64))
    >>> validate(x, x, x, Options(Band(), 0.125))
    Traceback (most recent call last):
        ...
    NotImplementedError: q.dtype=dtype('float32') is neither bfloat16 nor float16
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name}.shape={x.shape} is not [batch, tokens, heads, head_dim]")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{k.shape=} and {v.shape=} differ in batch, keys or heads")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"{q.shape=} and {k.shape=} differ in batch or head_dim")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are no multiple of {k.shape[2]} KV heads")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{q.dtype=}, {k.dtype=} and {v.dtype=} differ")
    scale, soft_cap = options.scale, options.soft_cap
    alibi_slopes, bounds = options.alibi_slopes, options.bounds
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", options.sinks)):
        if x is not None and x.shape != (q.shape[2],):
            raise ValueError(f"{name}.shape={x.shape} is not ({q.shape[2]},)")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{q.dtype=} is neither bfloat16 nor float16")
    if max(q.shape[3], v.shape[3]) > MAX_HEAD_DIM:
        raise NotImplementedError(f"{q.shape[3]=} or {v.shape[3]=} is above {MAX_HEAD_DIM}")
    if 0 in q.shape or 0 in k.shape or v.shape[3] == 0:
        raise NotImplementedError(f"{q.shape=} or {k.shape=} is empty")
    if not scale > 0:
        raise NotImplementedError(f"{scale=} is not positive")
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{soft_cap=} is not positive")
    if alibi_slopes is not None and (bounds is not None or options.score is not None):
        raise NotImplementedError("alibi_slopes with bounds or a score_mod: put them into that")
    if options.dropout is not None:
        rate, words = options.dropout
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"dropout rate {rate} is not in [0, 1)")
        if words.shape != (q.shape[0], q.shape[2], q.shape[1]) or words.dtype != jnp.uint32:
            raise ValueError(f"dropout words {words.dtype}{words.shape} do not fit {q.shape=}")
    for name, modifier in (("score", options.score), ("mask", options.mask)):
        if modifier is not None:
            _check_arrays(name, modifier, q.shape, k.shape[1])


def _check_arrays(name: str, modifier: Modifier, q_shape: tuple[int, ...], keys: int) -> None:
    batch, queries, heads, _ = q_shape
    rest = {"scalar": (), "query": (queries,), "key": (keys,), "tile": (queries, keys)}
    kinds = modifier.program.kinds
    if len(kinds) != len(modifier.arrays):
        raise ValueError(f"{name}: {len(modifier.arrays)} arrays for {kinds}")
    for x, kind in zip(modifier.arrays, kinds, strict=True):
        fits = x.shape[2:] == rest[kind] and x.shape[0] in (1, batch) and x.shape[1] in (1, heads)
        if x.ndim < 2 or not fits:
            raise ValueError(f"{name}: an array of {x.shape} is no {kind!r} value of {q_shape}")


def _pad_heads(x: jax.Array, width: int) -> jax.Array:
    extra = width - x.shape[-1]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, extra))) if extra else x


def forward_widths(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """What the forward computes with: multiples of 64, the value width not above the key width.

    >>> forward_widths(80, 128)
    (128, 128)
    """
    wide, wide_v = (cdiv(x, 64) * 64 for x in (head_dim, head_dim_v))
    return max(wide, wide_v), wide_v


def backward_widths(head_dim: int, head_dim_v: int) -> tuple[int, int]:
    """What the backward computes with; above 128 split by columns, which come in halves of 128.

    >>> backward_widths(160, 128)
    (256, 128)
    """
    wide, wide_v = forward_widths(head_dim, head_dim_v)
    return (256, cdiv(wide_v, 128) * 128) if wide > 128 else (wide, wide_v)


def flash_attention_fwd(
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
    config: ForwardConfig | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Attention and its row log-sums on Hopper (FlashAttention-3, Shah et al. 2024).

    `out = softmax(scale * q k^T, masked) v`, with a soft cap, ALiBi and a sink in the denominator
    where given.  Accumulates in f32.

    Args:
      q: `[B, T, N, H]` bf16 or f16, any T, H up to 256.
      k: `[B, S, K, H]`, N a multiple of K.
      v: `[B, S, K, Hv]`.
      band: causal mask and window.
      bounds: intervals that only the device knows (`dynamic_bounds`); they include the band.
      scale: of the scores, positive.
      soft_cap: `c * tanh(x / c)` of the scaled scores.
      alibi_slopes: `[N]`, adds `-slope * |t + offset - s|`.
      sinks: `[N]`, a logit that takes part in the denominator only.
      dropout: rate and words (`pallas_kernels.dropout`); lse stays that of the softmax.
      score: a score_mod, applied after the soft cap (`program.split`).
      mask: a mask_mod, True where the key is seen, in addition to band and bounds.
      blocks: kinds of the tiles of `mask`; empty ones are not visited, full ones not masked.
      config: tiles; None takes `heuristics.forward_config`.
      interpret: True runs the GPU interpreter with race detection.

    Returns:
      `out [B, T, N, Hv]` and `lse [B, T, N]` f32, natural logarithm, without the sink.  A row that
      sees no key gives zeros and -inf.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: what this kernel cannot do.

    >>> q = jnp.zeros((1, 9, 2, 64), jnp.bfloat16)
    >>> call = lambda q: flash_attention_fwd(q, q, q, band=Band(right=0), scale=0.125)
    >>> [x.shape for x in jax.eval_shape(call, q)]
    [(1, 9, 2, 64), (1, 9, 2)]
    """
    options = Options(
        band, scale, bounds, soft_cap, alibi_slopes, sinks, dropout, score, mask, blocks
    )
    validate(q, k, v, options)
    head_dim_v = v.shape[-1]
    wide, wide_v = forward_widths(q.shape[-1], head_dim_v)
    if config is None:
        config = heuristics.forward_config(wide, wide_v, options, k.shape[1])
    with jax.named_scope("flash_attention_fwd"):
        out, lse = forward(
            _pad_heads(q, wide), _pad_heads(k, wide), _pad_heads(v, wide_v),
            options=options, config=config, interpret=interpret,
        )  # fmt: skip
    return out[..., :head_dim_v], lse.transpose(0, 2, 1)


def flash_attention_bwd(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array | None = None,
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
    wanted: tuple[int, ...] = (),
    deterministic: bool = False,
    config: BackwardConfig | None = None,
    interpret: Any = None,
) -> Gradients:
    """Gradients of `flash_attention_fwd`; out and lse are what it returned.

    `d_lse` may be None.  dQ is summed in f32 in an order that is not fixed, unless `deterministic`:
    then a second kernel computes it, and every bit repeats.  `wanted` are the places of the arrays
    of `score` that get gradients; `alibi_slopes` get theirs as a score_mod only.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: what this kernel cannot do.

    >>> q = jnp.zeros((1, 9, 2, 64), jnp.bfloat16)
    >>> lse = jnp.zeros((1, 9, 2))
    >>> grad = lambda q: flash_attention_bwd(q, q, q, q, lse, q, band=Band(right=0), scale=0.125)
    >>> jax.eval_shape(grad, q).k.shape
    (1, 9, 2, 64)
    """
    options = Options(
        band, scale, bounds, soft_cap, alibi_slopes, sinks, dropout, score, mask, blocks
    )
    validate(q, k, v, options)
    if d_out.shape != out.shape or lse.shape != out.shape[:3]:
        raise ValueError(f"{d_out.shape=}, {out.shape=} and {lse.shape=} do not fit together")
    if alibi_slopes is not None:
        raise NotImplementedError("the gradient of alibi_slopes")
    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    wide, wide_v = backward_widths(head_dim, head_dim_v)
    if config is None:
        config = heuristics.backward_config(wide, wide_v, options)
    rows = lambda x: x.transpose(0, 2, 1)  # [B, T, N] -> [B, N, T]
    with jax.named_scope("flash_attention_bwd"):
        product = d_out.astype(jnp.float32) * out.astype(jnp.float32)
        # XLA would fuse the row sums into the concatenation with lse, reading uncoalesced
        delta = rows(jax.lax.optimization_barrier(product.sum(-1)))
        lse = rows(lse)
        total, d_sinks = lse, None
        if sinks is not None:
            logit = sinks.astype(jnp.float32)[None, :, None]
            total = jnp.where(jnp.isneginf(lse), -jnp.inf, jnp.logaddexp(lse, logit))
            share = jnp.where(jnp.isneginf(lse), 0.0, jnp.exp(logit - total))
            d_sinks = -(share * delta).sum((0, 2)).astype(sinks.dtype)
        if d_lse is not None:
            # d lse / d score is the softmax without the sink, exp(total - lse) times P
            growth = 1.0 if sinks is None else jnp.where(jnp.isneginf(lse), 0, jnp.exp(total - lse))
            delta = delta - rows(d_lse) * growth
        kept = 1.0 if dropout is None else 1.0 - dropout.rate
        operands = (
            _pad_heads(q, wide), _pad_heads(k, wide), _pad_heads(v, wide_v),
            _pad_heads(d_out.astype(q.dtype), wide_v), total, delta * kept,
        )  # fmt: skip
        call: dict[str, Any] = dict(options=options, interpret=interpret)
        dq, dk, dv = backward(*operands, config=config, dq=not deterministic, **call)
        if dq is None:
            dq = backward_dq(*operands, config=heuristics.dq_config(wide, wide_v), **call)
        else:
            dq = (dq * (scale / kept)).astype(q.dtype)
        d_score = backward_scores(*operands, wanted=wanted, **call) if wanted else ()
        dq = dq[..., :head_dim]
    return Gradients(dq, dk[..., :head_dim], dv[..., :head_dim_v], d_sinks, d_score)
