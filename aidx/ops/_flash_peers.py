"""The GPU implementations of flash attention: our Pallas Mosaic kernels, and cuDNN by jax.nn."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from . import _flash_mods, _flash_tuning, _flash_xla
from ._flash_spec import NO_COTANGENTS, FlashOperands, FlashSpec

Array = jax.Array


def _kernels() -> Any:
    """`pallas_kernels.flash_attention`, imported at its first use: it needs Mosaic GPU."""
    try:
        module = importlib.import_module("pallas_kernels.flash_attention")
    except ImportError as missing:
        raise NotImplementedError(f"this JAX cannot import the kernels: {missing}") from missing
    return module


def _mosaic_mask(kernels: Any, spec: FlashSpec, ops: FlashOperands) -> dict[str, Any]:
    """The masks as the kernels take them: a static band, and intervals of what is dynamic."""
    band = kernels.Band(spec.left, spec.right, spec.query_offset or 0)
    dynamic = (ops.q_lens, ops.kv_lens, ops.q_segments, ops.q_positions, ops.key_ranges)
    if all(x is None for x in dynamic):
        return {"band": band, "bounds": None}
    B, T, S = ops.q.shape[0], ops.q.shape[1], ops.k.shape[1]
    bounds = kernels.dynamic_bounds(
        band,
        T,
        S,
        q_lens=ops.q_lens,
        kv_lens=ops.kv_lens,
        segments=None if ops.q_segments is None else (ops.q_segments, ops.kv_segments),
        borders=None if ops.q_borders is None else (ops.q_borders, ops.kv_borders),
        positions=ops.q_positions,
    )
    if ops.key_ranges is not None:
        (key_lo, key_hi), (query_lo, query_hi) = (
            x.swapaxes(0, 1) for x in (ops.key_ranges, ops.query_ranges)
        )
        bounds = type(bounds)(
            jnp.maximum(bounds.key_lo, key_lo),
            jnp.minimum(bounds.key_hi, key_hi),
            jnp.maximum(bounds.query_lo, query_lo),
            jnp.minimum(bounds.query_hi, query_hi),
        )
    return {
        "band": band,
        "bounds": type(bounds)(*(jnp.broadcast_to(x, (B, x.shape[1])) for x in bounds)),
    }


def _mosaic_options(
    kernels: Any, spec: FlashSpec, ops: FlashOperands, backward: bool
) -> tuple[dict[str, Any], Any]:
    """(keyword arguments of the kernels, the score's modifier with its gradients or None)."""
    if ops.sinks is not None and ops.sinks.shape[0] != 1:
        raise NotImplementedError("sinks that differ over a vmapped axis")
    # the gradient of the slopes is that of an array which a score_mod loads
    own_alibi = not backward and _flash_mods.builtin_alibi(spec, ops)
    alibi = ops.alibi_slopes is not None and not own_alibi
    score = _flash_mods.score(kernels, spec, ops, alibi)
    given = {
        **_mosaic_mask(kernels, spec, ops),
        "scale": spec.scale,
        "soft_cap": spec.soft_cap,
        "alibi_slopes": None if ops.alibi_slopes is None or not own_alibi else ops.alibi_slopes[0],
        "sinks": None if ops.sinks is None else ops.sinks[0],
        "score": None if score is None else score.modifier,
        "mask": _flash_mods.mask(kernels, spec, ops),
        "blocks": _flash_mods.blocks(kernels, spec, ops),
        "dropout": _flash_mods.dropout(kernels, spec, ops),
    }
    return given, score


def _mosaic_tiles(kernels: Any, spec: FlashSpec) -> Any:
    """The forward's tiles as asked: 64 to 192 queries by a multiple of 64 keys, or the table's."""
    config = spec.config
    if config.block_size_q is None and config.block_size_kv is None:
        return None
    q, kv = config.block_size_q or 128, config.block_size_kv or 128
    if q % 64:
        raise NotImplementedError(f"query tiles are multiples of 64, not {q}")
    try:
        return kernels.ForwardConfig(block_kv=kv, consumers=q // 64)
    except ValueError as refusal:
        raise NotImplementedError(str(refusal)) from refusal


def _if_ascending(spec: FlashSpec, ops: FlashOperands, kernel: Any, tiled: Any) -> Any:
    """The kernels read segment ids as intervals: ids that do not ascend take the tiled path.

    cu_seqlens make ids that ascend; those of a caller are looked at when the program runs.
    """
    if ops.q_segments is None or spec.packed:
        return kernel()
    ascending = jnp.array(True)
    for ids in (ops.q_segments, ops.kv_segments):
        # Negative ids at the end belong to no sequence for the kernels, but match each other here.
        ascending &= jnp.all((ids[:, 1:] >= ids[:, :-1]) & (ids[:, :-1] >= 0)) & jnp.all(ids >= 0)
    return jax.lax.cond(ascending, kernel, tiled)


def run_forward(spec: FlashSpec, ops: FlashOperands, config: Any) -> tuple[Array, Array]:
    """(out, lse) by the Hopper kernel in this configuration (None: its own choice)."""
    kernels = _kernels()
    options, _ = _mosaic_options(kernels, spec, ops, backward=False)
    return kernels.flash_attention_fwd(ops.q, ops.k, ops.v, config=config, **options)


def mosaic_forward(spec: FlashSpec, ops: FlashOperands) -> tuple[Array, Array]:
    """(out, lse) by the Hopper kernel."""

    def kernel() -> tuple[Array, Array]:
        asked = _mosaic_tiles(_kernels(), spec)
        config = _flash_tuning.forward_config(spec, ops) if asked is None else asked
        return run_forward(spec, ops, config)

    return _if_ascending(spec, ops, kernel, lambda: _flash_xla.forward(spec, ops))


def run_backward(
    spec: FlashSpec, ops: FlashOperands, outputs: Any, cotangents: Any, config: Any
) -> FlashOperands:
    """Cotangents by the Hopper kernels in this configuration (None: their own choice)."""
    kernels = _kernels()
    options, score = _mosaic_options(kernels, spec, ops, backward=True)
    grads = kernels.flash_attention_bwd(
        ops.q,
        ops.k,
        ops.v,
        *outputs,
        cotangents[0],
        cotangents[1] if spec.return_lse else None,
        deterministic=spec.deterministic,
        wanted=() if score is None else score.wanted,
        config=config,
        **options,
    )
    d_sinks = None if ops.sinks is None else grads.sinks[None]
    found = _flash_xla.no_gradients(ops)._replace(q=grads.q, k=grads.k, v=grads.v)
    more = {} if score is None else score.pull(grads.score)
    return found._replace(sinks=d_sinks, **more)


def mosaic_backward(
    spec: FlashSpec, ops: FlashOperands, outputs: Any, cotangents: Any
) -> FlashOperands:
    """Cotangents by the Hopper kernels."""

    def kernel() -> FlashOperands:
        config = _flash_tuning.backward_config(spec, ops, outputs, cotangents[0])
        return run_backward(spec, ops, outputs, cotangents, config)

    return _if_ascending(
        spec, ops, kernel, lambda: _flash_xla.backward(spec, ops, outputs, cotangents)
    )


def _refuse_unless_plain(spec: FlashSpec, ops: FlashOperands) -> None:
    """cuDNN through jax.nn: plain, causal, windowed, lengths of keys; no row may be empty."""
    T, S, H = ops.q.shape[1], ops.k.shape[1], ops.q.shape[3]
    if ops.q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"takes bf16 and f16, not {ops.q.dtype}")
    if ops.v.shape[3] != H or H % 8 or H > 256:
        raise NotImplementedError(f"takes one head_dim, a multiple of 8 up to 256: {H}")
    given = [name for name in REFUSED if getattr(ops, name) is not None]
    if spec.soft_cap is not None:
        given.append("logits_soft_cap")
    if spec.dropout_rate:
        given.append("dropout")
    if spec.score_mod or spec.mask_mod or spec.block_mask:
        given.append("score_mod, mask_mod or block_mask")
    if spec.return_lse:
        given.append("return_lse")  # its residual comes back rounded to bf16
    if spec.deterministic:
        given.append("deterministic")
    if given:
        raise NotImplementedError(f"does not take {', '.join(given)}")
    if spec.config.block_size_q or spec.config.block_size_kv:
        raise NotImplementedError("chooses its own tiles")
    bounded = spec.left is not None or spec.right is not None
    if bounded and (spec.right != 0 or spec.query_offset != 0 or T > S):
        raise NotImplementedError("takes causal masks and left windows aligned at the top left")


REFUSED = (
    "bias",
    "alibi_slopes",
    "sinks",
    "mask",
    "q_lens",
    "q_segments",
    "q_positions",
    "q_borders",
)


def _cudnn(spec: FlashSpec, ops: FlashOperands, q: Array, k: Array, v: Array) -> Array:
    causal = spec.right == 0
    window = None if spec.left is None else (spec.left, 0)
    # cuDNN gives NaN where a row has no key at all: let it see one, and blank it afterwards.
    lens = None if ops.kv_lens is None else jnp.maximum(ops.kv_lens, 1)
    if ops.kv_lens is not None:  # its masked P is zero, but 0 * NaN is NaN
        exists = jnp.arange(k.shape[1])[None] < ops.kv_lens[:, None]
        k, v = (jnp.where(exists[:, :, None, None], x, 0) for x in (k, v))
    try:
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            is_causal=causal,
            scale=spec.scale,
            key_value_seq_lengths=lens,
            local_window_size=window,
            implementation="cudnn",
        )
    except (RuntimeError, ValueError) as refusal:
        raise NotImplementedError(f"jax.nn refuses: {refusal}") from refusal
    if ops.kv_lens is not None:
        out = jnp.where((ops.kv_lens > 0)[:, None, None, None], out, 0)
    return out


def cudnn_forward(spec: FlashSpec, ops: FlashOperands) -> tuple[Array, Array]:
    """(out, NaN): its own backward does not need lse, and no caller sees it."""
    _refuse_unless_plain(spec, ops)
    if ops.kv_lens is not None and ops.kv_lens.shape[0] != ops.q.shape[0]:
        raise NotImplementedError("takes kv_lens of every row")
    out = _cudnn(spec, ops, ops.q, ops.k, ops.v)
    return out, jnp.full(ops.q.shape[:3], jnp.nan, jnp.float32)


def cudnn_backward(
    spec: FlashSpec, ops: FlashOperands, outputs: Any, cotangents: Any
) -> FlashOperands:
    """Cotangents of q, k and v; cuDNN's residual is its own, so its forward runs again."""
    _refuse_unless_plain(spec, ops)
    _, pull = jax.vjp(lambda q, k, v: _cudnn(spec, ops, q, k, v), ops.q, ops.k, ops.v)
    dq, dk, dv = pull(cotangents[0])
    return NO_COTANGENTS._replace(q=dq, k=dk, v=dv)
