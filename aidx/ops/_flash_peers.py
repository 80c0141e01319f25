"""The GPU implementations of flash attention: our Pallas Mosaic kernels, and cuDNN through jax.nn."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from ._flash_spec import FlashOperands, FlashSpec

Array = jax.Array


def _kernels() -> Any:
    """`pallas_kernels.flash_attention`, imported at its first use: it needs Mosaic GPU."""
    try:
        module = importlib.import_module("pallas_kernels.flash_attention")
    except ImportError as missing:
        raise NotImplementedError(f"this JAX cannot import the kernels: {missing}") from missing
    if not hasattr(module, "flash_attention_fwd"):
        raise NotImplementedError("this build has no flash attention kernels")
    return module


def mosaic_forward(spec: FlashSpec, ops: FlashOperands) -> tuple[Array, Array]:
    """(out, lse) by the Hopper kernel."""
    _kernels()
    raise NotImplementedError("this build has no flash attention kernels")


def mosaic_backward(spec: FlashSpec, ops: FlashOperands, outputs: Any, cotangents: Any) -> Any:
    """Cotangents by the Hopper kernels."""
    _kernels()
    raise NotImplementedError("this build has no flash attention kernels")


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
)


def _cudnn(spec: FlashSpec, ops: FlashOperands, q: Array, k: Array, v: Array) -> Array:
    causal = spec.right == 0
    window = None if spec.left is None else (spec.left, 0)
    # cuDNN gives NaN where a row has no key at all: let it see one, and blank it afterwards.
    lens = None if ops.kv_lens is None else jnp.maximum(ops.kv_lens, 1)
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
    return FlashOperands(*(None,) * 14)._replace(q=dq, k=dk, v=dv)
