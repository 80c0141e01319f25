"""Distillation from hidden states: logits exist for a slice of the vocabulary at a time.

    z_s = h_s W_s^T, z_t = h_t W_t^T                                   [n, V], never whole
    pass 1   logsumexp of z_s, z_s / T and z_t / T, and z_s[label]     over slices of V
    pass 2   D = sum_v d(log t_v, log s_v),  c = sum_v d'_v            d' = dd / d log s
    backward dD/dz_s = (d'_v - c s_v) / T                              slice by slice again

d is a summand of a divergence (`divergence.TERMS`); its derivative is autodiff's, elementwise.
The memory is `[n, chunk]` where logits would take two `[n, V]` and their gradient a third.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from aidx.distill.divergence import TERMS, weighted_mean
from aidx.distill.options import Divergence
from aidx.typing import Array


def linear_response_loss(
    student_hidden: Array,
    student_table: Array,
    teacher_hidden: Array,
    teacher_table: Array,
    labels: Array | None = None,
    *,
    temperature: float = 3.0,
    alpha: float = 0.3,
    kind: Divergence | str = Divergence.FORWARD_KL,
    beta: float = 0.5,
    weights: Array | None = None,
    chunk: int = 4096,
) -> Array:
    """`response_loss` of two unembeddings, without their logits.

    Args:
        student_hidden: `[*B, Ds]`, final-normed (`forward(..., hidden=True)`).
        student_table: `[V, Ds]`, the unembedding.
        teacher_hidden: `[*B, Dt]`; no gradient passes to it.
        teacher_table: `[V, Dt]`; no gradient passes to it.
        labels: integers `[*B]`, negative where there is none; None: the soft part alone.
        temperature: T, one for all.
        alpha: share of the hard labels.
        kind: which divergence.
        beta: of jsd.
        weights: `[*B]`.
        chunk: columns of the vocabulary at a time.

    Returns:
        A f32 scalar.

    Raises:
        ValueError: shapes that do not go together, or a number out of range.

    Example:
        >>> h, W = jnp.ones((2, 3)), jnp.eye(5, 3)
        >>> abs(float(linear_response_loss(h, W, 2 * h, W / 2, chunk=2))) < 1e-6
        True
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"{alpha=} must lie between 0 and 1")
    ce, soft = linear_divergence(
        student_hidden,
        student_table,
        teacher_hidden,
        teacher_table,
        labels,
        kind=kind,
        temperature=temperature,
        beta=beta,
        chunk=chunk,
    )
    return mixed(ce, soft, labels, weights, alpha=alpha, temperature=temperature)


def mixed(
    ce: Array,
    soft: Array,
    labels: Array | None,
    weights: Array | None,
    *,
    alpha: float,
    temperature: float,
) -> Array:
    """`alpha CE + (1 - alpha) T^2 D` of values per token `[*B]`; without labels `T^2 D`.

    Example:
        >>> ce, soft = jnp.array([1.0, 9.0]), jnp.array([2.0, 2.0])
        >>> float(mixed(ce, soft, jnp.array([3, -1]), None, alpha=0.5, temperature=1.0))
        1.5
    """
    soft = temperature**2 * weighted_mean(soft, weights)
    if labels is None:
        return soft
    labelled = (labels >= 0).astype(jnp.float32)
    hard = weighted_mean(ce, labelled if weights is None else labelled * weights)
    return alpha * hard + (1 - alpha) * soft


def mixed_sums(
    ce: Array, soft: Array, weights: Array | None, *, alpha: float, temperature: float
) -> tuple[Array, Array, dict[str, Array]]:
    """The same as a loss of `make_train_step` wants it: (sum, sum of the weights, its parts).

    Example:
        >>> loss, weight, parts = mixed_sums(
        ...     jnp.ones(2), jnp.ones(2), None, alpha=0.0, temperature=2.0)
        >>> float(loss), float(weight), sorted(parts)
        (8.0, 2.0, ['soft'])
    """
    weights = jnp.ones(ce.shape, jnp.float32) if weights is None else weights
    total = lambda x: jnp.where(weights != 0, weights * x, 0.0).sum()
    hard, soft = total(ce), temperature**2 * total(soft)
    sums = {"soft": soft} | ({"hard": hard} if alpha else {})
    return alpha * hard + (1 - alpha) * soft, weights.sum(), sums


def linear_divergence(
    student_hidden: Array,
    student_table: Array,
    teacher_hidden: Array,
    teacher_table: Array,
    labels: Array | None = None,
    *,
    kind: Divergence | str = Divergence.FORWARD_KL,
    temperature: float = 1.0,
    beta: float = 0.5,
    chunk: int = 4096,
) -> tuple[Array, Array]:
    """Cross-entropy and divergence per token, from hidden states; see this module.

    Args:
        student_hidden, student_table, teacher_hidden, teacher_table, labels, kind, temperature,
            beta, chunk: as `linear_response_loss`.

    Returns:
        `(cross_entropy, divergence)`, both f32 `[*B]`; the first is 0 where there is no label.

    Raises:
        ValueError: shapes that do not go together, or a number out of range.

    Example:
        >>> h, W = jnp.zeros((1, 3)), jnp.ones((4, 3))
        >>> ce, kl = linear_divergence(h, W, h, W, jnp.array([2]), chunk=4)
        >>> round(float(ce[0]), 4), float(kl[0])
        (1.3863, 0.0)
    """
    _check(student_hidden, student_table, teacher_hidden, teacher_table, labels)
    if not temperature > 0 or not 0 < beta < 1 or chunk < 1:
        raise ValueError(f"{temperature=}, {chunk=} must be positive and {beta=} in (0, 1)")
    shape = student_hidden.shape[:-1]
    V = student_table.shape[0]
    flat_labels = jnp.full(shape, -1, jnp.int32) if labels is None else labels
    static = (Divergence(kind), float(temperature), float(beta), min(chunk, V))
    ce, soft = _fused(
        static,
        student_hidden.reshape(-1, student_hidden.shape[-1]),
        student_table,
        jax.lax.stop_gradient(teacher_hidden.reshape(-1, teacher_hidden.shape[-1])),
        jax.lax.stop_gradient(teacher_table),
        flat_labels.reshape(-1),
    )
    return ce.reshape(shape), soft.reshape(shape)


def _check(hs: Array, ws: Array, ht: Array, wt: Array, labels: Array | None) -> None:
    if hs.shape[:-1] != ht.shape[:-1]:
        raise ValueError(f"hidden states: student {hs.shape} and teacher {ht.shape} differ")
    if ws.ndim != 2 or wt.ndim != 2 or ws.shape[0] != wt.shape[0]:
        raise ValueError(f"unembeddings {ws.shape} and {wt.shape} are not [V, D] of one vocabulary")
    if hs.shape[-1] != ws.shape[1] or ht.shape[-1] != wt.shape[1]:
        raise ValueError(
            f"widths: student {hs.shape} with {ws.shape}, teacher {ht.shape} with {wt.shape}"
        )
    if labels is not None and (
        labels.shape != hs.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer)
    ):
        raise ValueError(f"labels {labels.dtype}{labels.shape} for hidden states {hs.shape}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(static, hs, ws, ht, wt, labels):
    return _forward(static, hs, ws, ht, wt, labels)[0]


def _slices(V: int, chunk: int):
    """(number of slices, `i -> (start, valid [chunk])`): the last one overlaps, masked."""

    def at(i):
        start = jnp.minimum(i * chunk, V - chunk)
        return start, start + jnp.arange(chunk) >= i * chunk

    return -(-V // chunk), at


def _logits(h: Array, table: Array, start: Array, chunk: int) -> Array:
    rows = jax.lax.dynamic_slice_in_dim(table, start, chunk)
    return jnp.einsum("nd,vd->nv", h, rows, preferred_element_type=jnp.float32)


def _forward(static, hs, ws, ht, wt, labels):
    kind, T, beta, chunk = static
    count, at = _slices(ws.shape[0], chunk)
    n = hs.shape[0]

    def first(i, carry):
        (start, valid), (lse1, lse_s, lse_t, own) = at(i), carry
        mask = lambda z: jnp.where(valid[None], z, -jnp.inf)
        zs, zt = _logits(hs, ws, start, chunk), _logits(ht, wt, start, chunk)
        add = lambda lse, z: jnp.logaddexp(lse, jax.nn.logsumexp(mask(z), axis=-1))
        hit = valid[None] & (labels[:, None] == (start + jnp.arange(chunk))[None])
        return (
            add(lse1, zs),
            add(lse_s, zs / T),
            add(lse_t, zt / T),
            own + jnp.where(hit, zs, 0.0).sum(-1),
        )

    empty = jnp.full((n,), -jnp.inf, jnp.float32)
    with jax.named_scope("normalisers"):
        lse1, lse_s, lse_t, own = jax.lax.fori_loop(
            0, count, first, (empty, empty, empty, jnp.zeros((n,), jnp.float32))
        )

    def second(i, carry):
        (start, valid), (total, slope) = at(i), carry
        log_s = _logits(hs, ws, start, chunk) / T - lse_s[:, None]
        log_t = _logits(ht, wt, start, chunk) / T - lse_t[:, None]
        d, dd = _terms(kind, beta, log_t, log_s)
        keep = lambda x: jnp.where(valid[None], x, 0.0).sum(-1)
        return total + keep(d), slope + keep(dd)

    with jax.named_scope("divergence"):
        zero = jnp.zeros((n,), jnp.float32)
        total, slope = jax.lax.fori_loop(0, count, second, (zero, zero))
    ce = jnp.where(labels >= 0, lse1 - own, 0.0)
    return (ce, total), (hs, ws, ht, wt, labels, lse1, lse_s, lse_t, slope)


def _terms(kind, beta, log_t, log_s):
    """A divergence's summands and their derivatives by log_s."""
    d = lambda s: TERMS[kind](log_t, s, beta)
    return jax.jvp(d, (log_s,), (jnp.ones_like(log_s),))


def _backward(static, residuals, cotangents):
    kind, T, beta, chunk = static
    hs, ws, ht, wt, labels, lse1, lse_s, lse_t, slope = residuals
    g_ce, g_soft = (g[:, None] for g in cotangents)
    g_ce = jnp.where(labels[:, None] >= 0, g_ce, 0.0)
    count, at = _slices(ws.shape[0], chunk)

    def body(i, carry):
        (start, valid), (dh, dw) = at(i), carry
        zs = _logits(hs, ws, start, chunk)
        log_s = zs / T - lse_s[:, None]
        log_t = _logits(ht, wt, start, chunk) / T - lse_t[:, None]
        _, dd = _terms(kind, beta, log_t, log_s)
        onehot = labels[:, None] == (start + jnp.arange(chunk))[None]
        dz = g_ce * (jnp.exp(zs - lse1[:, None]) - onehot)
        dz += g_soft * (dd - slope[:, None] * jnp.exp(log_s)) / T
        dz = jnp.where(valid[None], dz, 0.0).astype(hs.dtype)  # matmuls run in the inputs' dtype
        rows = jax.lax.dynamic_slice_in_dim(ws, start, chunk)
        dh += jnp.einsum("nv,vd->nd", dz, rows, preferred_element_type=jnp.float32)
        part = jnp.einsum("nv,nd->vd", dz, hs, preferred_element_type=jnp.float32)
        held = jax.lax.dynamic_slice_in_dim(dw, start, chunk)
        part = jnp.where(valid[:, None], part.astype(dw.dtype), held)  # the overlap stays
        return dh, jax.lax.dynamic_update_slice_in_dim(dw, part, start, 0)

    with jax.named_scope("divergence_backward"):
        dh, dw = jax.lax.fori_loop(
            0, count, body, (jnp.zeros(hs.shape, jnp.float32), jnp.zeros_like(ws))
        )
    none = np.zeros(labels.shape, jax.dtypes.float0)
    return dh.astype(hs.dtype), dw, jnp.zeros_like(ht), jnp.zeros_like(wt), none


_fused.defvjp(_forward, _backward)
