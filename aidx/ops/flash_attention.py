"""`flash_attention`: exact attention without the attention matrix, one door for every platform.

The door checks the call, brings it to one canonical form (`_flash_spec.py`) and wraps it once in
`jax.custom_vjp` and `jax.custom_batching`; implementations only compute.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.core import Tracer
from jax.custom_batching import custom_vmap

from . import _flash_peers, _flash_xla, registry
from ._flash_spec import (
    BATCHED_FIELDS,
    CAPTURED_FIELDS,
    FlashAttentionConfig,
    FlashOperands,
    FlashSpec,
)
from ._loops import one_by_one, varying_like
from .attention_mask import (
    BlockMask,
    MaskMod,
    ScoreMod,
    normalise_window,
    packed_positions,
    segments_of,
    trace_mask_mod,
    trace_score_mod,
)

Array = jax.Array
PairOrOne = Array | tuple[Array, Array]


def flash_attention(
    q: Array,
    k: Array,
    v: Array,
    *,
    causal: bool = False,
    window: int | tuple[int, int] | None = None,
    mask: Array | None = None,
    q_lens: Array | None = None,
    kv_lens: Array | None = None,
    segment_ids: PairOrOne | None = None,
    cu_seqlens: PairOrOne | None = None,
    query_offset: int | Array | None = None,
    scale: float | None = None,
    logits_soft_cap: float | None = None,
    bias: Array | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    dropout_rate: float = 0.0,
    dropout_key: Array | None = None,
    dropout_broadcast: bool = False,
    score_mod: ScoreMod | None = None,
    mask_mod: MaskMod | None = None,
    block_mask: BlockMask | None = None,
    num_heads: int | None = None,
    return_lse: bool = False,
    return_weights: bool = False,
    deterministic: bool = False,
    implementation: registry.ImplementationChoice = None,
    config: FlashAttentionConfig | None = None,
) -> Any:
    r"""Softmax attention of q over k and v, computed tile by tile.

    $$out_t = \sum_s p_{ts} v_s, \quad p_{ts} = e^{x_{ts}} / (\sum_s e^{x_{ts}} + e^{sink})$$

    with x = scale * q . k, then the soft cap, + bias, - slope * distance and score_mod, in this
    order.  Accumulates in f32; a row that sees no key gives zeros and lse = -inf.

    Args:
      q: `[*B, T, N, H]`, or `[T, N, H]`, or with `num_heads` `[B, T, N * H]`; bf16, f16 or f32.
      k: `[*B, S, K, H]`; query head n reads key head n // (N // K).
      v: `[*B, S, K, Hv]`.
      causal: a query at position p sees keys up to p; query t stands at t + query_offset.
      window: keys a causal query sees, its own included (Hugging Face's sliding_window), or
        (left, right) as FlashAttention's, -1 unbounded.
      mask: bool, broadcastable to `[*B, N, T, S]`, True where the key is seen.
      q_lens: i32 `[*B]`, queries that exist; the others give zeros.
      kv_lens: i32 `[*B]`, keys that exist; what lies past them may be anything, NaN included.
      segment_ids: i32 `[*B, T]`, or a pair with `[*B, S]`: a query sees keys of its own id.
        Ids that ascend from 0 or more, or cu_seqlens, are the fast form on a GPU.
      cu_seqlens: i32 `[sequences + 1]`, or a (q, kv) pair: borders of sequences packed along T and
        S, ascending from 0; tokens after the last belong to none.  Causality is aligned at the
        end of each sequence.
      query_offset: position of query 0 on the keys' axis, an int or i32 `[*B]`; S - T by default
        (the last query sees the last key).
      scale: 1 / sqrt(H) by default.
      logits_soft_cap: c in c * tanh(x / c).
      bias: float, broadcastable to `[*B, N, T, S]`.
      alibi_slopes: f32 `[N]`: subtracts slope * |p - s| (Press et al. 2022).
      sinks: f32 `[N]`, a learned logit of the denominator (Xiao et al. 2024, gpt-oss).
      dropout_rate: share of probabilities dropped; the others are divided by 1 - rate.
      dropout_key: a JAX key; the mask is a hash of (key, b, n, t, s), whatever the tiles.
      dropout_broadcast: the same mask for all b and n (flax's broadcast_dropout).
      score_mod: `(score, b, n, t, s) -> score` on scalars; captured float arrays get gradients.
      mask_mod: `(b, n, t, s) -> bool` on scalars; t and s count from 0.
      block_mask: `aidx.block_mask(...)` of this T and S; its empty tiles are skipped.  One of runs
        (documents, windows, prefixes: see `BlockMask`) goes to the Hopper kernels as bounds.
      num_heads: N of rank-3 `[B, T, N * H]` arguments; K follows from k's last axis.
      return_lse: also the natural log-sum-exp `[*B, T, N]` f32, the sink left out.
      return_weights: also the probabilities `[*B, N, T, S]` f32 (needs memory of T x S).
      deterministic: gradients are bitwise the same in every run.
      implementation: None, a name or a sequence of names (see `aidx.ops.registry`).
      config: tile sizes and defaults.

    Returns:
      out `[*B, T, N, Hv]` in q's dtype (`[B, T, N * Hv]` with `num_heads`), then lse and weights
      where asked for.

    Raises:
      TypeError, ValueError: arguments that do not fit, with their values.
      ExceptionGroup: no implementation can do this; one NotImplementedError for each.

    FlashAttention: Dao et al. 2022; Dao 2023; Shah et al. 2024.

    >>> q = jnp.ones((1, 4, 2, 8)); kv = jnp.ones((1, 4, 1, 8))
    >>> flash_attention(q, kv, kv, causal=True).shape
    (1, 4, 2, 8)
    """
    arguments = {name: x for name, x in locals().items() if name != "implementation"}
    spec, operands, form = _prepare(**arguments)
    names = tuple(entry.name for entry in registry.resolve("flash_attention", implementation))
    if form.weights:
        if "xla" not in names:
            raise NotImplementedError(f"return_weights needs implementation 'xla', not {names}")
        out, lse, probabilities = _jit_weights(spec, operands)
        results = [form.restore(out), *[form.unfold(lse)] * return_lse]
        results.append(form.unfold(probabilities))
        return tuple(results)
    out, lse = _attend(names, spec, varying_like(operands, operands))
    return (form.restore(out), form.unfold(lse)) if return_lse else form.restore(out)


# --- from arguments to the canonical form --------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Form:
    """How the results go back to the caller's rank."""

    lead: tuple[int, ...]
    packed_heads: bool
    weights: bool

    def unfold(self, x: Array) -> Array:
        return x.reshape(*self.lead, *x.shape[1:])

    def restore(self, out: Array) -> Array:
        out = self.unfold(out)
        return out.reshape(*out.shape[:-2], -1) if self.packed_heads else out


def _prepare(
    *,
    q: Array,
    k: Array,
    v: Array,
    causal: bool,
    window: Any,
    mask: Any,
    q_lens: Any,
    kv_lens: Any,
    segment_ids: Any,
    cu_seqlens: Any,
    query_offset: Any,
    scale: float | None,
    logits_soft_cap: float | None,
    bias: Any,
    alibi_slopes: Any,
    sinks: Any,
    dropout_rate: float,
    dropout_key: Any,
    dropout_broadcast: bool,
    score_mod: Any,
    mask_mod: Any,
    block_mask: Any,
    num_heads: int | None,
    return_lse: bool,
    return_weights: bool,
    deterministic: bool,
    config: FlashAttentionConfig | None,
) -> tuple[FlashSpec, FlashOperands, _Form]:
    """Validate a call and bring it to `(FlashSpec, FlashOperands, _Form)`."""
    config = config or FlashAttentionConfig()
    causal = causal or config.causal
    scale = config.scale if scale is None else scale
    dropout_rate = dropout_rate or config.dropout_rate
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    if num_heads is not None:
        q, k, v = _split_heads(q, k, v, num_heads)
    _check_shapes(q, k, v)
    lead, (T, N, H) = q.shape[:-3], q.shape[-3:]
    S, B = k.shape[-3], math.prod(lead)
    left, right = normalise_window(window, causal)
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap must be positive, not {logits_soft_cap}")
    fold = lambda x: x.reshape(B, *x.shape[len(lead) :])
    positional = left is not None or right is not None or alibi_slopes is not None
    (segments, kv_segments), borders, positions = _packing(
        segment_ids, cu_seqlens, query_offset, lead, T, S, positional
    )
    offset, positions = _offsets(query_offset, positions, lead, T, S)
    score_program, score_captured = trace_score_mod(score_mod) if score_mod else (None, ())
    mask_program, mask_captured = trace_mask_mod(mask_mod) if mask_mod else (None, ())
    if block_mask is not None:
        _check_block_mask(block_mask, B, N, T, S)
    spec = FlashSpec(
        left=left,
        right=right,
        query_offset=offset,
        scale=1.0 / math.sqrt(H) if scale is None else float(scale),
        soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        dropout_rate=_check_rate(dropout_rate, dropout_key),
        dropout_broadcast=bool(dropout_broadcast and dropout_rate),
        score_mod=score_program,
        mask_mod=mask_program,
        block_mask=None if block_mask is None else (block_mask.block_q, block_mask.block_kv),
        block_mask_mod=None if block_mask is None else block_mask.program,
        deterministic=bool(deterministic),
        config=config,
        causal=bool(causal),
        return_lse=bool(return_lse),
        packed=cu_seqlens is not None,
    )
    operands = FlashOperands(
        q=fold(q),
        k=fold(k),
        v=fold(v),
        bias=_broadcastable("bias", bias, lead, (N, T, S), jnp.floating),
        alibi_slopes=_per_head("alibi_slopes", alibi_slopes, N),
        sinks=_per_head("sinks", sinks, N),
        mask=_broadcastable("mask", mask, lead, (N, T, S), jnp.bool_),
        q_lens=_lengths("q_lens", q_lens, lead),
        kv_lens=_lengths("kv_lens", kv_lens, lead),
        q_segments=segments,
        kv_segments=kv_segments,
        q_positions=positions,
        q_borders=borders[0],
        kv_borders=borders[1],
        dropout_key=_key_words(dropout_key) if spec.dropout_rate else None,
        block_kinds=None if block_mask is None else block_mask.kinds,
        key_ranges=None if block_mask is None else block_mask.key_ranges,
        query_ranges=None if block_mask is None else block_mask.query_ranges,
        score_captured=score_captured,
        mask_captured=mask_captured,
        block_captured=() if block_mask is None else block_mask.captured,
    )
    weights = return_weights or config.return_attention_weights
    return spec, operands, _Form(lead, num_heads is not None, weights)


def _split_heads(q: Array, k: Array, v: Array, num_heads: int) -> tuple[Array, Array, Array]:
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        raise ValueError(
            f"num_heads={num_heads} takes [B, T, N * H] arguments, not {q.shape=} {k.shape=} "
            f"{v.shape=}"
        )
    if num_heads < 1 or q.shape[-1] % num_heads:
        raise ValueError(f"{q.shape=} does not split into {num_heads} heads")
    head_dim = q.shape[-1] // num_heads
    if head_dim == 0 or k.shape[-1] % head_dim:
        raise ValueError(f"{k.shape=} does not split into heads of {q.shape=} / {num_heads}")
    kv_heads = k.shape[-1] // head_dim
    if kv_heads == 0 or v.shape[-1] % kv_heads:
        raise ValueError(f"{v.shape=} does not split into the {kv_heads} heads of {k.shape=}")
    split = lambda x, heads: x.reshape(*x.shape[:-1], heads, -1)
    return split(q, num_heads), split(k, kv_heads), split(v, kv_heads)


def _check_shapes(q: Array, k: Array, v: Array) -> None:
    if q.ndim < 3 or q.ndim != k.ndim or k.ndim != v.ndim:
        raise ValueError(
            f"q, k and v must have one rank of at least 3, not {q.shape=} {k.shape=} {v.shape=}"
        )
    if q.shape[:-3] != k.shape[:-3] or k.shape[:-3] != v.shape[:-3]:
        raise ValueError(f"leading axes differ: {q.shape=} {k.shape=} {v.shape=}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"{q.shape=} and {k.shape=} differ in head_dim")
    if k.shape[-3:-1] != v.shape[-3:-1]:
        raise ValueError(f"{k.shape=} and {v.shape=} differ in length or heads")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        raise ValueError(f"query heads of {q.shape=} are no multiple of key heads of {k.shape=}")
    if q.shape[-1] == 0:
        raise ValueError(f"head_dim must be positive: {q.shape=}")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(f"q must be a float array, not {q.dtype}")
    if q.dtype != k.dtype or k.dtype != v.dtype:
        raise TypeError(f"dtypes differ: {q.dtype=} {k.dtype=} {v.dtype=}")


def _packing(
    segment_ids: Any,
    cu_seqlens: Any,
    query_offset: Any,
    lead: tuple[int, ...],
    T: int,
    S: int,
    positional: bool,
) -> tuple[tuple[Any, Any], tuple[Any, Any], Any]:
    """(segments [b, T] and [b, S], cu_seqlens [1, n + 1] twice, positions [1, T]); None without."""
    no = (None, None)
    if segment_ids is not None and cu_seqlens is not None:
        raise ValueError("segment_ids and cu_seqlens exclude each other")
    if segment_ids is not None:
        pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
        for name, ids, size in zip(("q", "kv"), pair, (T, S), strict=True):
            if jnp.shape(ids) != (*lead, size):
                raise ValueError(
                    f"segment_ids of {name} must be {(*lead, size)}, not {jnp.shape(ids)}"
                )
        q_ids, kv_ids = (_integers("segment_ids", x).reshape(-1, x.shape[-1]) for x in pair)
        return (q_ids, kv_ids), no, None
    if cu_seqlens is None:
        return no, no, None
    one = not isinstance(cu_seqlens, tuple)
    cu_q, cu_kv = (_integers("cu_seqlens", x) for x in ((cu_seqlens,) * 2 if one else cu_seqlens))
    if cu_q.ndim != 1 or cu_q.shape != cu_kv.shape or cu_q.shape[0] < 2:
        raise ValueError(
            f"cu_seqlens must be [sequences + 1] for q and kv alike, not {cu_q.shape} and "
            f"{cu_kv.shape}"
        )
    if math.prod(lead) != 1:
        raise ValueError(f"cu_seqlens packs one sequence axis; leading axes {lead} must be 1")
    if query_offset is not None:
        raise ValueError("cu_seqlens aligns every sequence by its own lengths; drop query_offset")
    if one and T != S:
        raise ValueError(f"one cu_seqlens for q and kv needs T == S, not {T} and {S}; pass a pair")
    _check_borders(cu_q, T, "T")
    _check_borders(cu_kv, S, "S")
    positions = None if one or not positional else packed_positions(cu_q, cu_kv, T)[None]
    segments = segments_of(cu_q, T, -1)[None], segments_of(cu_kv, S, -2)[None]
    return segments, (cu_q[None], cu_kv[None]), positions


def _check_borders(cu: Array, length: int, axis: str) -> None:
    if isinstance(cu, Tracer):
        return
    borders = np.asarray(cu)
    if borders[0] != 0 or (np.diff(borders) < 0).any() or borders[-1] > length:
        raise ValueError(f"cu_seqlens must ascend from 0 to at most {axis}={length}: {borders}")


def _offsets(
    query_offset: Any, positions: Any, lead: tuple[int, ...], T: int, S: int
) -> tuple[int | None, Any]:
    """A static offset, or None and positions [b, T]."""
    if positions is not None:
        return None, positions
    if query_offset is None:
        return S - T, None
    if isinstance(query_offset, int | np.integer):
        return int(query_offset), None
    offset = _integers("query_offset", query_offset)
    if offset.shape not in ((), lead):
        raise ValueError(f"query_offset must be a scalar or {lead}, not {offset.shape}")
    return None, offset.reshape(-1, 1) + jnp.arange(T, dtype=jnp.int32)[None]


def _integers(name: str, x: Any) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, not {x.dtype}")
    return x.astype(jnp.int32)


def _lengths(name: str, x: Any, lead: tuple[int, ...]) -> Any:
    if x is None:
        return None
    x = _integers(name, x)
    if x.shape != lead:
        raise ValueError(f"{name} must be {lead}, not {x.shape}")
    return x.reshape(-1)


def _per_head(name: str, x: Any, N: int) -> Any:
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape != (N,):
        raise ValueError(f"{name} must be [{N}], not {x.shape}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{name} must be floats, not {x.dtype}")
    return x.astype(jnp.float32)[None]


def _broadcastable(
    name: str, x: Any, lead: tuple[int, ...], last: tuple[int, int, int], kind: Any
) -> Any:
    """[b, n, t, s] of an array that broadcasts to [*lead, *last]."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, kind):
        raise TypeError(f"{name} must be {kind.__name__.rstrip('_')}, not {x.dtype}")
    full = (*lead, *last)
    shape = (1,) * (len(full) - x.ndim) + x.shape
    if x.ndim > len(full) or any(a not in (1, b) for a, b in zip(shape, full, strict=True)):
        raise ValueError(f"{name} of {x.shape} does not broadcast to {full}")
    head = shape[: len(lead)]
    x = x.reshape(shape)
    if any(size != 1 for size in head):
        x = jnp.broadcast_to(x, (*lead, *shape[len(lead) :]))
        return x.reshape(-1, *shape[len(lead) :])
    return x.reshape(1, *shape[len(lead) :])


def _check_rate(rate: float, key: Any) -> float:
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout_rate must be in [0, 1), not {rate}")
    if rate and key is None:
        raise ValueError(f"dropout_rate={rate} needs a dropout_key")
    return float(rate)


def _key_words(key: Array) -> Array:
    """Two u32 words of a key: [1, 2]."""
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.key_data(key)
    if key.ndim != 1 or key.dtype != jnp.uint32 or key.shape[0] < 2:
        raise TypeError(f"dropout_key must be one JAX key, not {key.dtype}{key.shape}")
    return key[None, -2:]


def _check_block_mask(mask: BlockMask, B: int, N: int, T: int, S: int) -> None:
    if (mask.q_length, mask.kv_length) != (T, S):
        raise ValueError(
            f"block_mask is of {mask.q_length} x {mask.kv_length} tokens; this call of {T} x {S}"
        )
    if mask.kinds.shape[0] not in (1, B) or mask.kinds.shape[1] not in (1, N):
        raise ValueError(f"block_mask {mask.kinds.shape=} does not fit batch {B} and heads {N}")


# --- gradients, batching, dispatch ---------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(names: tuple[str, ...], spec: FlashSpec, operands: FlashOperands) -> Any:
    return _jit_call("forward", names, spec, operands)


def _attend_fwd(names: tuple[str, ...], spec: FlashSpec, operands: FlashOperands) -> Any:
    out, lse = _jit_call("residual", names, spec, operands)
    # A remat policy that saves these two names never runs the forward twice.
    out, lse = (
        checkpoint_name(out, "flash_attention_out"),
        checkpoint_name(lse, "flash_attention_lse"),
    )
    return (out, lse), (operands, (out, lse))


def _attend_bwd(names: tuple[str, ...], spec: FlashSpec, saved: Any, cotangents: Any) -> Any:
    operands, outputs = saved
    return (_jit_call("backward", names, spec, operands, outputs, cotangents),)


_attend.defvjp(_attend_fwd, _attend_bwd)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _jit_call(direction: Any, names: tuple[str, ...], spec: FlashSpec, *args: Any) -> Any:
    """Dispatch inside jit (equal layers share one trace) and fold vmapped axes into the batch."""
    return _folding(direction, names, spec)(*args)


_jit_weights = jax.jit(_flash_xla.weights, static_argnums=0)


def _folding(direction: Any, names: tuple[str, ...], spec: FlashSpec) -> Any:
    call = registry.Call("flash_attention", names, spec, direction)

    @custom_vmap
    def apply(*args: Any) -> Any:
        return registry.dispatch(call, *args)

    @apply.def_vmap
    def rule(axis_size: int, in_batched: Any, *args: Any) -> Any:
        operands, batched = args[0], in_batched[0]
        if _own_programs(direction, operands, batched):
            results = one_by_one(apply, tuple(in_batched), args)
            return results, jax.tree.map(lambda _: True, results)
        B = operands.q.shape[1] if batched.q else operands.q.shape[0]
        folded = _fold_operands(direction, operands, batched, axis_size, B)
        rest = jax.tree.map(
            lambda x, lifted: _fold(x, lifted, axis_size, B),
            tuple(args[1:]),
            tuple(in_batched[1:]),
        )
        period = spec.batch_period or B
        inner = dataclasses.replace(
            spec,
            batch_period=period,
            score_mod=_periodic(spec.score_mod, period),
            mask_mod=_periodic(spec.mask_mod, period),
            block_mask_mod=_periodic(spec.block_mask_mod, period),
        )
        results = _folding(direction, names, inner)(folded, *rest)
        results = jax.tree.map(lambda x: x.reshape(axis_size, B, *x.shape[1:]), results)
        if direction == "backward":
            results = _sum_broadcast(results, operands, batched)
        return results, jax.tree.map(lambda _: True, results)

    return apply


def _own_programs(direction: str, operands: FlashOperands, batched: FlashOperands) -> bool:
    """Whether captured arrays, or their gradients, differ between elements of a vmapped axis.

    A folded batch has one set of captured arrays, so these run one after the other.
    """
    captured = [getattr(batched, name) for name in CAPTURED_FIELDS]
    gradients = direction == "backward" and any(
        jnp.issubdtype(x.dtype, jnp.inexact) for x in operands.score_captured
    )
    return gradients or any(jax.tree.leaves(captured))


def _fold(x: Array, lifted: bool, size: int, B: int) -> Array:
    """[size, b, ...] or [b, ...] -> [size * B, ...]."""
    if not lifted:
        x = jnp.broadcast_to(x[None], (size, *x.shape))
    if x.shape[1] != B:
        x = jnp.broadcast_to(x, (size, B, *x.shape[2:]))
    return x.reshape(-1, *x.shape[2:])


DIFFERENTIABLE = ("q", "k", "v", "bias", "alibi_slopes", "sinks")


def _fold_operands(
    direction: str, operands: FlashOperands, batched: FlashOperands, size: int, B: int
) -> FlashOperands:
    """What is the same for every row of the folded batch keeps its leading 1."""

    def fold(name: str) -> Any:
        x, lifted = getattr(operands, name), bool(getattr(batched, name))
        per_row = name in "qkv" or (direction == "backward" and name in DIFFERENTIABLE)
        if x is None or (not lifted and x.shape[0] == 1 and not per_row):
            return x
        return _fold(x, lifted, size, B)

    return operands._replace(**{name: fold(name) for name in BATCHED_FIELDS})


def _sum_broadcast(
    gradients: FlashOperands, operands: FlashOperands, batched: FlashOperands
) -> FlashOperands:
    """Gradients [size, B, ...] of operands whose own leading axis was 1: [size, 1, ...]."""

    def cut(name: str) -> Any:
        x, grad = getattr(operands, name), getattr(gradients, name)
        if x is None:
            return None
        own = x.shape[1] if getattr(batched, name) else x.shape[0]
        return grad if own == grad.shape[1] else grad.sum(axis=1, keepdims=True)

    return gradients._replace(**{name: cut(name) for name in DIFFERENTIABLE})


def _periodic(program: Any, period: int) -> Any:
    return None if program is None else dataclasses.replace(program, period=period)


# In order of preference.
registry.register(
    "flash_attention", "mosaic_gpu", backward=_flash_peers.mosaic_backward, platforms=("cuda",)
)(_flash_peers.mosaic_forward)
registry.register(
    "flash_attention", "cudnn", backward=_flash_peers.cudnn_backward, platforms=("cuda",)
)(_flash_peers.cudnn_forward)
registry.register("flash_attention", "xla", backward=_flash_xla.backward)(_flash_xla.forward)


def _explained(*args: Any, **kwargs: Any) -> tuple[FlashSpec, FlashOperands]:
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = {name: x for name, x in bound.arguments.items() if name != "implementation"}
    spec, operands, _ = _prepare(**given)
    return spec, operands


_SIGNATURE = inspect.signature(flash_attention)
registry.register_door("flash_attention", _explained)
