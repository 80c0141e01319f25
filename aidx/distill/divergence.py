"""Losses on logits: divergences between two softmaxes, cross-entropy, and their weighted sum.

Everything is computed in log space in f32, per example, and reduced by `weighted_mean`.  Gradients
are autodiff's: the famous factor T^2 is in the loss, so no gradient can lack it.
"""

import jax
import jax.numpy as jnp

from aidx.distill.options import Divergence
from aidx.typing import Array


def forward_terms(log_t: Array, log_s: Array, beta: float = 0.5) -> Array:
    """`t (log t - log s)`, elementwise; zero where t is zero."""
    del beta
    t = jnp.exp(log_t)
    return jnp.where(t > 0, t * jnp.where(t > 0, log_t - log_s, 0.0), 0.0)


def reverse_terms(log_t: Array, log_s: Array, beta: float = 0.5) -> Array:
    """`s (log s - log t)`, elementwise."""
    return forward_terms(log_s, log_t, beta)


def jsd_terms(log_t: Array, log_s: Array, beta: float = 0.5) -> Array:
    """`beta t (log t - log m) + (1 - beta) s (log s - log m)`, `m = beta t + (1 - beta) s`."""
    log_m = jnp.logaddexp(log_t + jnp.log(beta), log_s + jnp.log1p(-beta))
    return beta * forward_terms(log_t, log_m) + (1 - beta) * forward_terms(log_s, log_m)


def variation_terms(log_t: Array, log_s: Array, beta: float = 0.5) -> Array:
    """`|t - s| / 2`, elementwise."""
    del beta
    return 0.5 * jnp.abs(jnp.exp(log_t) - jnp.exp(log_s))


TERMS = {
    Divergence.FORWARD_KL: forward_terms,
    Divergence.REVERSE_KL: reverse_terms,
    Divergence.JSD: jsd_terms,
    Divergence.TOTAL_VARIATION: variation_terms,
}
"""The summands over the vocabulary of each divergence: `(log_teacher, log_student, beta)`."""


def divergence(
    student_logits: Array,
    teacher_logits: Array,
    *,
    kind: Divergence | str = Divergence.FORWARD_KL,
    temperature: float | Array = 1.0,
    beta: float = 0.5,
) -> Array:
    """How far the student's distribution is from the teacher's, per example, in nats.

    With `t = softmax(teacher / T)` and `s = softmax(student / T)`:

        forward_kl  sum_v t (log t - log s)          covers every mode of the teacher
        reverse_kl  sum_v s (log s - log t)          seeks one (Gu et al., 2024, MiniLLM)
        jsd         beta KL(t || m) + (1 - beta) KL(s || m),  m = beta t + (1 - beta) s
                                                     (Agarwal et al., 2024, GKD, eq. 3)
        total_variation  1/2 sum_v |t - s| = 1 - sum_v min(t, s)
                                                     (Zhou et al., 2024, DistillSpec)

    The last is the share of a draft's tokens that speculative decoding rejects.

    Args:
        student_logits: `[*B, V]`.
        teacher_logits: `[*B, V]`; -inf where the teacher excludes a class.
        kind: which divergence.
        temperature: T, one for all or `[*B]`.
        beta: of jsd, strictly between 0 and 1.

    Returns:
        f32 `[*B]`, not multiplied by T^2.

    Raises:
        ValueError: the shapes differ, or beta is out of range.

    Example:
        >>> student, teacher = jnp.array([[0.0, 0.0]]), jnp.array([[jnp.log(3.0), 0.0]])
        >>> [round(float(divergence(student, teacher, kind=k)[0]), 4) for k in Divergence]
        [0.1308, 0.1438, 0.0338, 0.25]
    """
    kind = Divergence(kind)
    same_shape(student_logits, teacher_logits, "logits")
    if not 0 < beta < 1:
        raise ValueError(f"{beta=} must lie strictly between 0 and 1")
    log_s = log_softmax(student_logits, temperature)
    log_t = log_softmax(teacher_logits, temperature)
    return TERMS[kind](log_t, log_s, beta).sum(-1)


def log_softmax(logits: Array, temperature: float | Array = 1.0) -> Array:
    """`log softmax(logits / T)` in f32: logits `[*B, V]`, T a scalar or `[*B]`.

    Example:
        >>> round(log_softmax(jnp.zeros((1, 4)), 2.0).tolist()[0][0], 4)
        -1.3863
    """
    T = jnp.asarray(temperature, jnp.float32)
    if T.ndim:
        if T.shape != logits.shape[:-1]:
            raise ValueError(f"temperature of shape {T.shape} for logits of {logits.shape}")
        T = T[..., None]
    return jax.nn.log_softmax(logits.astype(jnp.float32) / T, axis=-1)


def cross_entropy(logits: Array, labels: Array) -> Array:
    """`-sum_v y log softmax(logits)` per example, in nats; 0 where an integer label is negative.

    Args:
        logits: `[*B, V]`.
        labels: class ids, integers `[*B]`, or probabilities `[*B, V]`.

    Returns:
        f32 `[*B]`.

    Raises:
        ValueError: labels of another shape.

    Example:
        >>> [round(x, 4) for x in cross_entropy(jnp.zeros((2, 4)), jnp.array([1, -1])).tolist()]
        [1.3863, 0.0]
    """
    log_p = log_softmax(logits)
    if labels.shape == logits.shape and jnp.issubdtype(labels.dtype, jnp.floating):
        return jnp.where(labels > 0, -labels * log_p, 0.0).sum(-1)
    if labels.shape != logits.shape[:-1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise ValueError(
            f"labels {labels.dtype}{list(labels.shape)} for logits {list(logits.shape)}: class ids "
            f"are integers {list(logits.shape[:-1])}, probabilities floats {list(logits.shape)}"
        )
    picked = jnp.take_along_axis(log_p, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(labels >= 0, -picked, 0.0)


def response_loss(
    student_logits: Array,
    teacher_logits: Array,
    labels: Array | None = None,
    *,
    temperature: float | Array = 3.0,
    alpha: float = 0.3,
    kind: Divergence | str = Divergence.FORWARD_KL,
    beta: float = 0.5,
    weights: Array | None = None,
) -> Array:
    """Soft targets and hard labels (Hinton, Vinyals and Dean, 2015, section 2).

        L = alpha CE(student, labels) + (1 - alpha) T^2 D(teacher / T, student / T)

    Args:
        student_logits: `[*B, V]`.
        teacher_logits: `[*B, V]`.
        labels: as `cross_entropy`; None: the soft part alone, with weight one.
        temperature: T, one for all or `[*B]`.
        alpha: share of the hard labels.
        kind: D; Hinton's is forward_kl.
        beta: of jsd.
        weights: `[*B]`; None weighs all alike.  Negative labels leave the mean of the hard part.

    Returns:
        A f32 scalar.

    Raises:
        ValueError: shapes, or alpha outside [0, 1].

    Example:
        >>> logits = jnp.array([[2.0, 0.0, -1.0]])
        >>> float(response_loss(logits, logits))
        0.0
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"{alpha=} must lie between 0 and 1")
    T = jnp.asarray(temperature, jnp.float32)
    soft = T**2 * divergence(student_logits, teacher_logits, kind=kind, temperature=T, beta=beta)
    soft = weighted_mean(soft, weights)
    if labels is None:
        return soft
    return alpha * hard_loss(student_logits, labels, weights) + (1 - alpha) * soft


def hard_loss(logits: Array, labels: Array, weights: Array | None = None) -> Array:
    """The mean `cross_entropy` of the examples that have a label.

    Example:
        >>> round(float(hard_loss(jnp.zeros((2, 4)), jnp.array([1, -1]))), 4)
        1.3863
    """
    per_example = cross_entropy(logits, labels)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        labelled = (labels >= 0).astype(jnp.float32)
        weights = labelled if weights is None else weights * labelled
    return weighted_mean(per_example, weights)


def weighted_mean(values: Array, weights: Array | None = None) -> Array:
    """`sum(w x) / sum(w)` over all axes; 0 where every weight is 0.

    Values under a zero weight may be anything, NaN included.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> float(weighted_mean(jnp.array([1.0, jnp.nan]), jnp.array([2.0, 0.0])))
        1.0
    """
    values = values.astype(jnp.float32)
    if weights is None:
        return values.mean()
    if weights.shape != values.shape:
        raise ValueError(f"{weights.shape=} and {values.shape=} differ")
    weights = weights.astype(jnp.float32)
    total = weights.sum()
    summed = jnp.where(weights != 0, weights * values, 0.0).sum()
    return summed / jnp.where(total != 0, total, 1.0)


def same_shape(student: Array, teacher: Array, what: str) -> None:
    """Refuse outputs of two shapes.

    Raises:
        ValueError: with both shapes.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"{what}: student {student.shape} and teacher {teacher.shape} differ")
