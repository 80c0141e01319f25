"""Layers over the rows of a `Ragged`: the work is that of the values, not of the longest row."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from aidx.ops.flash_attention import flash_attention
from aidx.ops.norm import layer_norm as dense_layer_norm
from aidx.ops.norm import rms_norm as dense_rms_norm

from .formats import Array
from .ragged_array import Ragged
from .segments import segment_log_softmax, segment_softmax


def linear(x: Ragged, w: Array, bias: Array | None = None) -> Ragged:
    """`x @ w + bias` for every value: x `[R, (L), D]`, w `[D, *F]`, bias `[*F]`.

    Raises:
      ValueError: sizes that do not fit.

    >>> x = Ragged.from_list([[[1.0, 2.0]], []])
    >>> linear(x, jnp.ones((2, 1)), jnp.ones(1)).to_list()
    [[[4.0]], []]
    """
    values = x.flat_values
    if values.ndim < 2 or values.shape[-1] != w.shape[0]:
        raise ValueError(f"sizes differ: values {values.shape} and {w.shape=}")
    if bias is not None and bias.shape != w.shape[1:]:
        raise ValueError(f"{bias.shape=} must be {w.shape[1:]}")
    with jax.named_scope("linear"):
        out = jnp.tensordot(values, w, axes=1)
        if bias is not None:
            out = out + bias.reshape((1,) * (out.ndim - bias.ndim) + bias.shape)
        return x.with_flat_values(out)


def matmul(x: Ragged, w: Any) -> Ragged:
    """x `[R, (L), D]` times one matrix `[D, F]`, or times one per row `[R, D, F]`.

    Raises:
      ValueError: sizes that do not fit.

    >>> x = Ragged.from_list([[[1.0], [2.0]], [[3.0]]])
    >>> matmul(x, jnp.array([[[1.0]], [[10.0]]])).to_list()
    [[[1.0], [2.0]], [[30.0]]]
    """
    w = jnp.asarray(w)
    if w.ndim == 2:
        return linear(x, w)
    values = x.flat_values
    if x.ragged_rank != 1 or values.ndim != 2:
        raise ValueError(f"a matrix per row takes rows [L, D], not {values.shape} per value")
    if w.ndim != 3 or w.shape[:2] != (x.num_rows, values.shape[1]):
        raise ValueError(f"{w.shape=} must be [{x.num_rows}, {values.shape[1]}, F]")
    with jax.named_scope("ragged_matmul"):
        dtype = jnp.result_type(values, w)
        out = jax.lax.ragged_dot(values.astype(dtype), w.astype(dtype), x.row_lengths)
        return x.with_values(out)


def layer_norm(x: Ragged, scale: Array, bias: Array | None = None, *, eps: float = 1e-5) -> Ragged:
    """Layer normalisation of every value over its last axis (`aidx.ops.norm`).

    >>> x = Ragged.from_list([[[1.0, 3.0]]])
    >>> layer_norm(x, jnp.ones(2), eps=0.0).to_list()
    [[[-1.0, 1.0]]]
    """
    _features(x)
    return x.map_values(lambda v: dense_layer_norm(v, scale, bias, eps=eps))


def rms_norm(x: Ragged, scale: Array, *, eps: float = 1e-6) -> Ragged:
    """Root-mean-square normalisation of every value over its last axis (`aidx.ops.norm`).

    >>> rms_norm(Ragged.from_list([[[2.0, 2.0]]]), jnp.ones(2), eps=0.0).to_list()
    [[[1.0, 1.0]]]
    """
    _features(x)
    return x.map_values(lambda v: dense_rms_norm(v, scale, eps=eps))


def softmax(x: Ragged, axis: int = -1) -> Ragged:
    """Softmax along the innermost ragged axis or one of the features, in f32 at least.

    Args:
      x: floating.
      axis: of the virtual shape; -1, the last, is the ragged axis where values are scalars.

    Raises:
      ValueError: rows themselves, or a ragged axis that is not the innermost.

    >>> softmax(Ragged.from_list([[0.0, 0.0], [5.0]])).to_list()
    [[0.5, 0.5], [1.0]]
    """
    return _softmax(x, axis, segment_softmax, jax.nn.softmax)


def log_softmax(x: Ragged, axis: int = -1) -> Ragged:
    """The logarithm of `softmax`.

    >>> log_softmax(Ragged.from_list([[5.0], []])).to_list()
    [[0.0], []]
    """
    return _softmax(x, axis, segment_log_softmax, jax.nn.log_softmax)


def gelu(x: Ragged, *, approximate: bool = True) -> Ragged:
    """`jax.nn.gelu` of every value.

    >>> gelu(Ragged.from_list([[0.0]])).to_list()
    [[0.0]]
    """
    return x.map_values(lambda v: jax.nn.gelu(v, approximate=approximate))


def silu(x: Ragged) -> Ragged:
    """`jax.nn.silu` of every value.

    >>> silu(Ragged.from_list([[0.0]])).to_list()
    [[0.0]]
    """
    return x.map_values(jax.nn.silu)


def embedding_lookup(table: Array, ids: Ragged) -> Ragged:
    """Rows of table `[V, D]` for ragged ids; an id outside the table embeds as zeros.

    >>> embedding_lookup(jnp.array([[1.0], [2.0]]), Ragged.from_list([[1], [0, 1]])).to_list()
    [[[2.0]], [[1.0], [2.0]]]
    """
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"ids must be integers, not {ids.dtype}")
    # Out-of-range ids read zeros; negative ones would otherwise count from the end.
    look = lambda i: table.at[jnp.where(i < 0, table.shape[0], i)].get(mode="fill", fill_value=0)
    return ids.map_values(look)


def attention(q: Ragged, k: Ragged, v: Ragged, *, causal: bool = False, **options: Any) -> Ragged:
    """Attention of every row of q over the same row of k and v, packed: no work on padding.

    Args:
      q: values `[capacity, N, H]`.
      k: values `[capacity of keys, K, H]`; rows may be longer or shorter than q's.
      v: as k.
      causal: the last query of a row sees its last key.  Where q, k and v share their offsets
        (`q.with_values(...)`), no position has to be looked up.
      **options: of `aidx.flash_attention`, those that take packed sequences: window, scale,
        logits_soft_cap, sinks, score_mod, mask_mod, dropout, implementation, config.

    Returns:
      `Ragged` with q's rows, values `[capacity, N, Hv]`.

    Raises:
      ValueError: numbers of rows that differ, nested levels, or values of another rank.

    >>> x = Ragged.from_lengths(jnp.ones((4, 1, 8)), jnp.array([1, 3]))
    >>> attention(x, x, x, causal=True).values.shape
    (4, 1, 8)
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ragged_rank != 1 or x.values.ndim != 3:
            raise ValueError(f"{name} needs values [capacity, heads, head_dim], not {x.values}")
    if not q.num_rows == k.num_rows == v.num_rows or k.capacity != v.capacity:
        raise ValueError(
            f"rows differ: {q.num_rows}, {k.num_rows} and {v.num_rows}, "
            f"capacities of k and v {k.capacity} and {v.capacity}"
        )
    same = q.offsets is k.offsets and q.capacity == k.capacity
    borders = q.offsets if same else (q.offsets, k.offsets)
    with jax.named_scope("ragged_attention"):
        out = flash_attention(
            q.values, k.values, v.values, causal=causal, cu_seqlens=borders, **options
        )
        if isinstance(out, tuple):
            raise TypeError("return_lse and return_weights have no ragged form here")
        return Ragged(out, q.offsets)  # a query of no row sees no key, which gives zeros


def _softmax(x: Ragged, axis: int, segments: Any, dense: Any) -> Ragged:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"softmax of {x.dtype}: cast to a float dtype")
    at = axis + x.ndim if axis < 0 else axis
    if not x.ragged_rank <= at < x.ndim:
        raise ValueError(f"{axis=}: the innermost ragged axis is {x.ragged_rank} of {x.ndim}")
    if at > x.ragged_rank:
        wide = jnp.promote_types(x.dtype, jnp.float32)
        f = lambda v: dense(v.astype(wide), axis=at - x.ragged_rank).astype(v.dtype)
        return x.map_values(f)
    inner = x
    while isinstance(inner.values, Ragged):
        inner = inner.values
    with jax.named_scope("ragged_softmax"):
        out = segments(inner.values, inner.value_rowids, inner.num_rows)
        return x.with_flat_values(out)


def _features(x: Ragged) -> None:
    if x.flat_values.ndim < 2:
        raise ValueError(f"a norm needs features: values of {x.flat_values.shape} have none")
