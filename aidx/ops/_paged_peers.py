"""The GPU implementation of paged attention: our Pallas Mosaic kernels."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from ._paged_spec import PagedAttentionConfig, PagedOperands, PagedSpec

REFUSED = ("positions", "tree_mask", "k_scale", "v_scale", "shared_tables")


def mosaic_forward(spec: PagedSpec, ops: PagedOperands) -> tuple[jax.Array, jax.Array]:
    """(out, lse) by the Hopper kernels, imported at their first use: they need Mosaic GPU."""
    try:
        kernels: Any = importlib.import_module("pallas_kernels.paged_attention")
    except ImportError as missing:
        raise NotImplementedError(f"this JAX cannot import the kernels: {missing}") from missing
    given = [name for name in REFUSED if getattr(ops, name) is not None]
    if spec.config != PagedAttentionConfig():
        given.append("config")
    if given:
        raise NotImplementedError(f"does not take {', '.join(given)}")
    result = kernels.paged_attention(
        *ops[:6],
        max_q=spec.max_q,
        scale=spec.scale,
        window=spec.window,
        logits_soft_cap=spec.soft_cap,
        alibi_slopes=ops.alibi_slopes,
        sinks=ops.sinks,
        return_lse=spec.return_lse,
        deterministic=spec.deterministic,
    )
    if spec.return_lse:
        return result
    # Unread: the door drops it, so the kernels need not write it.
    return result, jnp.full(result.shape[:2], -jnp.inf, jnp.float32)
