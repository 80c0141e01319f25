"""The GPU implementation of paged attention: our Pallas Mosaic kernels."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from . import _paged_tuning
from ._paged_spec import PagedAttentionConfig, PagedOperands, PagedSpec


def mosaic_forward(spec: PagedSpec, ops: PagedOperands) -> tuple[jax.Array, jax.Array]:
    """(out, lse) by the Hopper kernels."""
    if spec.config != PagedAttentionConfig():
        raise NotImplementedError(f"brings its own tile sizes, not {spec.config}")
    return run(spec, ops, _paged_tuning.config(spec, ops))


def _kernels() -> Any:
    """`pallas_kernels.paged_attention`, imported at its first use: it needs Mosaic GPU."""
    try:
        kernels: Any = importlib.import_module("pallas_kernels.paged_attention")
    except ImportError as missing:
        raise NotImplementedError(f"this JAX cannot import the kernels: {missing}") from missing
    return kernels


def run(spec: PagedSpec, ops: PagedOperands, config: Any) -> tuple[jax.Array, jax.Array]:
    """(out, lse) by the Hopper kernels in this configuration (None: their own choice)."""
    kernels = _kernels()
    cascade = (ops.shared_tables, ops.shared_lens, ops.shared_group)
    result = kernels.paged_attention(
        *ops[:6],
        max_q=spec.max_q,
        scale=spec.scale,
        window=spec.window,
        logits_soft_cap=spec.soft_cap,
        alibi_slopes=ops.alibi_slopes,
        sinks=ops.sinks,
        positions=ops.positions,
        tree_mask=ops.tree_mask,
        cascade=None if ops.shared_tables is None else cascade,
        k_scale=ops.k_scale,
        v_scale=ops.v_scale,
        return_lse=spec.return_lse,
        deterministic=spec.deterministic,
        tokens_first=spec.tokens_first,
        config=config,
    )
    if spec.return_lse:
        return result
    # Unread: the door drops it, so the kernels need not write it.
    return result, jnp.full(result.shape[:2], -jnp.inf, jnp.float32)
