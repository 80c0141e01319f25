"""Top-k distillation from hidden states: logits exist for a slice of the vocabulary at a time.

    teacher   the k best of z = h W^T and their log-probabilities     one pass over slices of V
    student   z at the teacher's k tokens, and logsumexp z            one pass
    backward  dz_v = g_lse softmax_v + sum_{i: token_i = v} g_i       slice by slice again

Between the two the loss is that of k + 1 events (`top_k`), of which autodiff knows the slope.
Memory is `[n, chunk]` and `[n, k]` where logits and their gradient would take two `[n, V]`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aidx.cache import no_cache_attend
from aidx.distill.fused import _logits, _slices, mixed, mixed_sums
from aidx.distill.top_k import check_top_k, event_divergence
from aidx.typing import Array, Forward, Params


def linear_top_k(hidden: Array, table: Array, k: int, *, chunk: int = 4096) -> tuple[Array, Array]:
    """`top_k_of` of an unembedding: what a teacher writes to the disk, without its logits.

    Args:
        hidden: `[*B, D]`, final-normed.
        table: `[V, D]`.
        k: how many tokens.
        chunk: columns of the vocabulary at a time.

    Returns:
        `(indices i32 [*B, k], log_probs f32 [*B, k])`, most probable first; of equal ones the
        smaller index.

    Raises:
        ValueError: shapes, or k outside 1 to V.

    Example:
        >>> indices, log_probs = linear_top_k(jnp.ones((1, 1)), jnp.array([[0.0], [2.0], [1.0]]), 2)
        >>> indices.tolist()
        [[1, 2]]
    """
    _check_linear(hidden, table, chunk)
    V = table.shape[0]
    if not 1 <= k <= V:
        raise ValueError(f"{k=} must lie between 1 and {V} tokens")
    h = jax.lax.stop_gradient(hidden.reshape(-1, hidden.shape[-1]))
    W = jax.lax.stop_gradient(table)
    chunk = min(chunk, V)
    count, at = _slices(V, chunk)

    def body(i, carry):
        (start, valid), (best, where, lse) = at(i), carry
        z = jnp.where(valid[None], _logits(h, W, start, chunk), -jnp.inf)
        lse = jnp.logaddexp(lse, jax.nn.logsumexp(z, axis=-1))
        # What is held comes first: its indices are smaller, and top_k keeps the first of equals.
        tokens = jnp.broadcast_to((start + jnp.arange(chunk, dtype=jnp.int32))[None], z.shape)
        best, order = jax.lax.top_k(jnp.concatenate([best, z], axis=-1), k)
        where = jnp.take_along_axis(jnp.concatenate([where, tokens], axis=-1), order, axis=-1)
        return best, where, lse

    n = h.shape[0]
    empty = jnp.full((n, k), -jnp.inf, jnp.float32)
    begin = (empty, jnp.zeros((n, k), jnp.int32), empty[:, 0])
    with jax.named_scope("top_k"):
        best, where, lse = jax.lax.fori_loop(0, count, body, begin)
    shape = (*hidden.shape[:-1], k)
    return where.reshape(shape), (best - lse[:, None]).reshape(shape)


def linear_top_k_loss(
    student_hidden: Array,
    student_table: Array,
    indices: Array,
    log_probs: Array,
    labels: Array | None = None,
    *,
    temperature: float = 1.0,
    tail: str = "bucket",
    alpha: float = 0.3,
    weights: Array | None = None,
    chunk: int = 4096,
) -> Array:
    """`top_k_loss` of an unembedding, without its logits; with labels, and cross-entropy to them.

        L = alpha CE(student, labels) + (1 - alpha) L_top_k        (without labels: L_top_k)

    Args:
        student_hidden: `[*B, D]`, final-normed (`forward(..., hidden=True)`).
        student_table: `[V, D]`, the unembedding.
        indices: of the teacher's tokens, i32 `[*B, k]`.
        log_probs: of the teacher at temperature 1, f32 `[*B, k]`.
        labels: integers `[*B]`, negative where there is none.
        temperature, tail: as `top_k_loss`.
        alpha: share of the labels.
        weights: `[*B]`.
        chunk: columns of the vocabulary at a time.

    Raises:
        ValueError: shapes, or what `top_k_loss` refuses.

    Example:
        >>> h, W = jnp.ones((1, 2)), jnp.arange(6.0).reshape(3, 2)
        >>> abs(float(linear_top_k_loss(h, W, *linear_top_k(h, W, 2), chunk=2))) < 1e-6
        True
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"{alpha=} must lie between 0 and 1")
    ce, soft = linear_top_k_divergence(
        student_hidden,
        student_table,
        indices,
        log_probs,
        labels,
        temperature=temperature,
        tail=tail,
        chunk=chunk,
    )
    return mixed(ce, soft, labels, weights, alpha=alpha, temperature=temperature)


def linear_top_k_divergence(
    student_hidden: Array,
    student_table: Array,
    indices: Array,
    log_probs: Array,
    labels: Array | None = None,
    *,
    temperature: float = 1.0,
    tail: str = "bucket",
    chunk: int = 4096,
) -> tuple[Array, Array]:
    """Cross-entropy and divergence per token of `linear_top_k_loss`, both f32 `[*B]`.

    The first is 0 where there is no label.

    Raises:
        ValueError: as `linear_top_k_loss`.

    Example:
        >>> h, W = jnp.zeros((1, 2)), jnp.ones((4, 2))
        >>> ce, soft = linear_top_k_divergence(h, W, *linear_top_k(h, W, 2), jnp.array([3]))
        >>> round(float(ce[0]), 4), round(float(soft[0]), 4)
        (1.3863, 0.0)
    """
    _check_linear(student_hidden, student_table, chunk)
    check_top_k(student_hidden.shape[:-1], indices, log_probs, temperature, tail)
    shape, k = student_hidden.shape[:-1], indices.shape[-1]
    if labels is not None and (
        labels.shape != shape or not jnp.issubdtype(labels.dtype, jnp.integer)
    ):
        raise ValueError(f"labels {labels.dtype}{labels.shape} for hidden states {shape}")
    own = jnp.full(shape, -1, jnp.int32) if labels is None else labels.astype(jnp.int32)
    tokens = jnp.concatenate([indices.astype(jnp.int32), own[..., None]], axis=-1)
    picked, lse = _picked(
        min(chunk, student_table.shape[0]),
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_table,
        tokens.reshape(-1, k + 1),
    )
    picked, lse = picked.reshape(*shape, k + 1), lse.reshape(shape)
    ce = jnp.where(own >= 0, lse - picked[..., k], 0.0)
    log_t = jax.lax.stop_gradient(log_probs)
    return ce, event_divergence(picked[..., :k], lse, log_t, temperature, tail)


def lm_top_k_loss_fn(
    student: Forward,
    *,
    temperature: float = 1.0,
    tail: str = "bucket",
    alpha: float = 0.0,
    chunk: int = 4096,
    attend: Any = None,
) -> Callable[..., tuple]:
    """A decoder's loss against stored top-k logits, for `make_train_step`.

    Args:
        student: its forward.
        temperature, tail, alpha, chunk: as `linear_top_k_loss`.
        attend: None is `no_cache_attend()`.

    Returns:
        `loss_fn(params, batch, key) -> (total, weight, sums)`; batch is a mapping with `tokens` i32
        `[B, T + 1]`, what the teacher said of each of the first T positions: `indices` i32 and
        `log_probs` f32 `[B, T, k]` (`TopK`), and optional `weights` `[B, T]` of the targets.

    Raises:
        ValueError: alpha outside [0, 1], or what `linear_top_k_loss` refuses.

    Example:
        >>> from aidx.models import LlamaConfig, Model, init_params
        >>> config = LlamaConfig(97, 32, 64, 1, 4, 2, 8)
        >>> model = Model(config, init_params(config, jax.random.key(0)))
        >>> batch = {"tokens": jnp.ones((1, 5), jnp.int32), "indices": jnp.ones((1, 4, 2), int),
        ...          "log_probs": jnp.full((1, 4, 2), -1.0)}
        >>> total, weight, sums = lm_top_k_loss_fn(model.forward)(
        ...     model.params, batch, jax.random.key(0))
        >>> float(total) > 0, float(weight), list(sums)
        (True, 4.0, ['soft'])
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"{alpha=} must lie between 0 and 1")
    attend = no_cache_attend() if attend is None else attend

    def loss_fn(params: Params, batch: Any, key: Array) -> tuple:
        del key
        tokens, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        hidden, _ = student(params, tokens, positions, attend, None, hidden=True)
        ce, soft = linear_top_k_divergence(
            hidden,
            params.get("lm_head", params["embed"]),
            batch["indices"],
            batch["log_probs"],
            targets if alpha else None,
            temperature=temperature,
            tail=tail,
            chunk=chunk,
        )
        return mixed_sums(ce, soft, batch.get("weights"), alpha=alpha, temperature=temperature)

    return loss_fn


def _check_linear(hidden: Array, table: Array, chunk: int) -> None:
    if table.ndim != 2 or hidden.shape[-1] != table.shape[1]:
        raise ValueError(f"hidden states {hidden.shape} and unembedding {table.shape}, not [V, D]")
    if chunk < 1:
        raise ValueError(f"{chunk=} must be positive")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _picked(chunk, h, W, tokens):
    """The logits at `tokens` `[n, m]` (0 at a negative one) and the logsumexp of all `[n]`."""
    return _forward(chunk, h, W, tokens)[0]


def _forward(chunk, h, W, tokens):
    count, at = _slices(W.shape[0], chunk)

    def body(i, carry):
        (start, valid), (picked, lse) = at(i), carry
        z = jnp.where(valid[None], _logits(h, W, start, chunk), -jnp.inf)
        place, here = _place(tokens, start, i, chunk)
        found = jnp.take_along_axis(z, place, axis=-1)
        return jnp.where(here, found, picked), jnp.logaddexp(lse, jax.nn.logsumexp(z, axis=-1))

    begin = (jnp.zeros(tokens.shape, jnp.float32), jnp.full(h.shape[:1], -jnp.inf, jnp.float32))
    with jax.named_scope("picked_logits"):
        picked, lse = jax.lax.fori_loop(0, count, body, begin)
    return (picked, lse), (h, W, tokens, lse)


def _place(tokens, start, i, chunk):
    """Where tokens lie in a slice, and which of them do (the last slice begins inside another)."""
    here = (tokens >= i * chunk) & (tokens < start + chunk)
    return jnp.where(here, tokens - start, 0), here


def _backward(chunk, residuals, cotangents):
    h, W, tokens, lse = residuals
    g_picked, g_lse = cotangents
    count, at = _slices(W.shape[0], chunk)
    rows = jnp.arange(h.shape[0])[:, None]

    def body(i, carry):
        (start, valid), (dh, dW) = at(i), carry
        z = _logits(h, W, start, chunk)
        dz = jnp.where(valid[None], g_lse[:, None] * jnp.exp(z - lse[:, None]), 0.0)
        place, here = _place(tokens, start, i, chunk)
        dz = dz.at[rows, place].add(jnp.where(here, g_picked, 0.0)).astype(h.dtype)
        held = jax.lax.dynamic_slice_in_dim(W, start, chunk)
        dh += jnp.einsum("nv,vd->nd", dz, held, preferred_element_type=jnp.float32)
        part = jnp.einsum("nv,nd->vd", dz, h, preferred_element_type=jnp.float32)
        there = jax.lax.dynamic_slice_in_dim(dW, start, chunk)
        part = jnp.where(valid[:, None], part.astype(dW.dtype), there)  # the overlap stays
        return dh, jax.lax.dynamic_update_slice_in_dim(dW, part, start, 0)

    with jax.named_scope("picked_logits_backward"):
        dh, dW = jax.lax.fori_loop(
            0, count, body, (jnp.zeros(h.shape, jnp.float32), jnp.zeros_like(W))
        )
    return dh.astype(h.dtype), dW, np.zeros(tokens.shape, jax.dtypes.float0)


_picked.defvjp(_forward, _backward)
