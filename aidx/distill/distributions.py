"""Losses on distributions: of features over the batch, of latents, and of a model's own exits."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from aidx.distill.divergence import (
    divergence,
    forward_terms,
    hard_loss,
    log_softmax,
    same_shape,
    weighted_mean,
)
from aidx.distill.features import example_weights, feature_loss, per_layer
from aidx.distill.options import Divergence
from aidx.distill.outputs import Gaussian
from aidx.typing import Array


def moment_loss(
    student: Array, teacher: Array, *, moments: int = 2, weights: Array | None = None
) -> Array:
    """The moments of each feature over the batch (Zellinger et al., 2017, CMD, squared).

        c_1 = mean(x),  c_k = mean((x - c_1)^k)
        L   = sum_{k=1}^K 1/D ||c_k(s) - c_k(t)||^2

    Args:
        student: `[*B, D]`.
        teacher: `[*B', D]`; need not be the same examples when there are no weights.
        moments: K.
        weights: `[*B]`.

    Raises:
        ValueError: the widths differ, or moments is below 1.

    Example:
        >>> float(moment_loss(jnp.array([[0.0], [2.0]]), jnp.array([[1.0], [1.0]])))
        1.0
    """
    if student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"{student.shape=} and {teacher.shape=} differ in width")
    if moments < 1:
        raise ValueError(f"{moments=} must be positive")

    def central(x):
        x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
        w = jnp.ones(x.shape[0]) if weights is None else weights.astype(jnp.float32).reshape(-1)
        x = jnp.where(w[:, None] > 0, x, 0.0)
        mean = jnp.einsum("n,nd->d", w, x) / w.sum()
        centred = x - mean[None]
        return [mean] + [
            jnp.einsum("n,nd->d", w, centred**k) / w.sum() for k in range(2, moments + 1)
        ]

    pairs = zip(central(student), central(teacher), strict=True)
    return sum(((a - b) ** 2).mean() for a, b in pairs) + jnp.float32(0)


def mmd_loss(
    student: Array,
    teacher: Array,
    *,
    bandwidth: float | None = None,
    weights: Array | None = None,
) -> Array:
    """Maximum mean discrepancy with a Gaussian kernel (Gretton et al., 2012, eq. 5, V-statistic).

        k(x, y) = exp(-|x - y|^2 / (2 h^2))
        L = mean k(s, s') + mean k(t, t') - 2 mean k(s, t)

    Huang and Wang (2017) distil with it.  At 0 the two batches are equal as sets.

    Args:
        student: `[n, D]`.
        teacher: `[m, D]`; m = n where there are weights.
        bandwidth: h; None is the median distance between the teacher's examples.
        weights: `[n]`.

    Raises:
        ValueError: shapes.

    Example:
        >>> x = jnp.array([[0.0], [1.0]])
        >>> float(mmd_loss(x, x[::-1])), round(float(mmd_loss(x, x + 9, bandwidth=1.0)), 4)
        (0.0, 1.6065)
    """
    if student.ndim != 2 or teacher.ndim != 2 or student.shape[-1] != teacher.shape[-1]:
        raise ValueError(f"{student.shape=} and {teacher.shape=} are not [n, D] and [m, D]")
    s, t = student.astype(jnp.float32), teacher.astype(jnp.float32)
    square = lambda a, b: ((a[:, None, :] - b[None, :, :]) ** 2).sum(-1)
    w = None if weights is None else weights.astype(jnp.float32)
    if w is not None:
        s, t = (jnp.where(w[:, None] > 0, x, 0.0) for x in (s, t))
    if bandwidth is None:
        two_h2 = 2 * jax.lax.stop_gradient(_median_square(square(t, t), w))
    else:
        two_h2 = jnp.float32(2 * bandwidth**2)
    pairs = None if w is None else w[:, None] * w[None, :]
    kernel = lambda a, b: weighted_mean(jnp.exp(-square(a, b) / two_h2), pairs)
    return kernel(s, s) + kernel(t, t) - 2 * kernel(s, t)


def _median_square(square: Array, w: Array | None) -> Array:
    n = square.shape[0]
    counted = ~jnp.eye(n, dtype=bool)
    if w is not None:
        counted &= (w[:, None] > 0) & (w[None, :] > 0)
    median = jnp.nanmedian(jnp.where(counted, square, jnp.nan)) if n > 1 else jnp.float32(1)
    return jnp.where(median > 0, median, 1.0)  # equal examples, or one, have no scale


def entropy_loss(
    student_logits: Array,
    teacher_logits: Array,
    *,
    weights: Array | None = None,
) -> Array:
    """As sure as the teacher, example by example (after Pereyra et al., 2017).

        H(p) = -sum_v p_v log p_v,   L = mean_b (H(s_b) - H(t_b))^2

    Args:
        student_logits: `[*B, V]`.
        teacher_logits: `[*B, V']`.
        weights: `[*B]`.

    Raises:
        ValueError: shapes.

    Example:
        >>> float(entropy_loss(jnp.array([[1.0, 3.0]]), jnp.array([[4.0, 2.0]]))) < 1e-12
        True
    """
    return weighted_mean((entropy(student_logits) - entropy(teacher_logits)) ** 2, weights)


def entropy(logits: Array) -> Array:
    """`-sum_v p log p` in nats: `[*B, V]` to f32 `[*B]`.

    Example:
        >>> round(float(entropy(jnp.zeros(4))), 4)
        1.3863
    """
    log_p = log_softmax(logits)
    return forward_terms(log_p, jnp.zeros_like(log_p)).sum(-1) * -1


def gaussian_nll(q: Gaussian, target: Array) -> Array:
    """`1/D sum_d 1/2 (log_var + (target - mean)^2 / var)` per example, without the constant.

    Example:
        >>> gaussian_nll(Gaussian(jnp.zeros((1, 2)), jnp.zeros((1, 2))), jnp.ones((1, 2))).tolist()
        [0.5]
    """
    same_shape(q.mean, target, "a Gaussian and its target")
    mean, log_var = q.mean.astype(jnp.float32), q.log_var.astype(jnp.float32)
    return 0.5 * (log_var + (target.astype(jnp.float32) - mean) ** 2 * jnp.exp(-log_var)).mean(-1)


def gaussian_kl(p: Gaussian, q: Gaussian | None = None) -> Array:
    """`1/D KL(p || q)` per example, q None being N(0, 1) (Kingma and Welling, 2014, appendix B).

        KL = 1/2 sum_d ( var_p/var_q + (mean_q - mean_p)^2 / var_q - 1 + log_var_q - log_var_p )

    Example:
        >>> gaussian_kl(Gaussian(jnp.ones((1, 2)), jnp.zeros((1, 2)))).tolist()
        [0.5]
    """
    mean, log_var = p.mean.astype(jnp.float32), p.log_var.astype(jnp.float32)
    other = Gaussian(jnp.zeros_like(mean), jnp.zeros_like(mean)) if q is None else q
    same_shape(other.mean, mean, "two Gaussians")
    gap = other.log_var.astype(jnp.float32) - log_var
    shift = (other.mean.astype(jnp.float32) - mean) ** 2 * jnp.exp(-other.log_var)
    return 0.5 * (jnp.exp(-gap) + shift - 1 + gap).mean(-1)


def elbo_loss(
    reconstruction: Gaussian,
    teacher: Array,
    latent: Gaussian | None = None,
    *,
    prior_weight: float = 1e-3,
    weights: Array | None = None,
) -> Array:
    """The variational bound on the information shared with the teacher's features.

        L = -E[log q(t | s)] + prior_weight KL(q(z | x) || N(0, 1))     (both per feature)

    Without a latent it is variational information distillation (Ahn et al., 2019, eq. 5 and 6),
    with one the negative evidence bound (Kingma and Welling, 2014).

    Args:
        reconstruction: q(t | s), from the student: mean and log-variance `[*B, D]`.
        teacher: features t, `[*B, D]`.
        latent: q(z | x), `[*B, Z]` or one per example, `[B, Z]`; None leaves the second term out.
        prior_weight: of the second term.
        weights: `[*B]`.

    Example:
        >>> q = Gaussian(jnp.zeros((1, 2)), jnp.zeros((1, 2)))
        >>> float(elbo_loss(q, jnp.ones((1, 2))))
        0.5
    """
    nll = weighted_mean(gaussian_nll(reconstruction, teacher), weights)
    if latent is None:
        return nll
    prior = gaussian_kl(latent)
    if weights is not None and weights.shape != prior.shape:
        weights = example_weights(weights)
    return nll + prior_weight * weighted_mean(prior, weights)


def bottleneck_loss(
    student_logits: Array,
    teacher_logits: Array,
    latent: Gaussian,
    *,
    prior_weight: float = 1e-3,
    temperature: float | Array = 1.0,
    weights: Array | None = None,
) -> Array:
    """The information bottleneck with the teacher's prediction in the place of the label.

        L = T^2 KL(t || s) + prior_weight 1/Z KL(q(z | x) || N(0, 1))   (Alemi et al., 2017, eq. 17)

    Args:
        student_logits: predicted from a sample of the latent, `[*B, V]`.
        teacher_logits: `[*B, V]`.
        latent: q(z | x), `[*B, Z]`.
        prior_weight: the price of a nat.
        temperature: T.
        weights: `[*B]`.

    Example:
        >>> z, logits = Gaussian(jnp.ones((1, 2)), jnp.zeros((1, 2))), jnp.zeros((1, 3))
        >>> float(bottleneck_loss(logits, logits, z, prior_weight=0.5))
        0.25
    """
    T = jnp.asarray(temperature, jnp.float32)
    per_example = T**2 * divergence(student_logits, teacher_logits, temperature=T)
    return weighted_mean(per_example + prior_weight * gaussian_kl(latent), weights)


def latent_loss(student: Gaussian, teacher: Gaussian, weights: Array | None = None) -> Array:
    """`mean_b 1/D KL(teacher's latent || student's latent)`: see `gaussian_kl`.

    Example:
        >>> q = Gaussian(jnp.ones((1, 2)), jnp.ones((1, 2)))
        >>> float(latent_loss(q, q))
        0.0
    """
    return weighted_mean(gaussian_kl(teacher, student), weights)


def self_distillation_loss(
    exits: Sequence[Array],
    teacher_logits: Array,
    labels: Array | None = None,
    *,
    features: Sequence[Array] = (),
    teacher_features: Array | None = None,
    feature_weight: float = 0.03,
    alpha: float = 0.3,
    temperature: float | Array = 3.0,
    kind: Divergence | str = Divergence.FORWARD_KL,
    beta: float = 0.5,
    weights: Array | None = None,
    feature_weights: Array | None = None,
) -> Array:
    """Shallow classifiers learn from the deepest of their own model (Zhang et al., 2019, eq. 1-4).

        L = mean_e alpha CE(exit_e, labels) + (1 - alpha) T^2 D(deepest || exit_e)
                 + feature_weight 1/D ||feature_e - deepest feature||^2

    With one exit, the model's own output, and an earlier generation of the model as the teacher it
    is Furlanello et al. (2018), born-again networks.

    Args:
        exits: logits of the shallow classifiers, each `[*B, V]`.
        teacher_logits: of the deepest, `[*B, V]`; no gradient passes through it.
        labels: as `cross_entropy`; None leaves the hard part out, as in `response_loss`.
        features: of the exits, each `[*B, D]`; empty leaves the third term out.
        teacher_features: of the deepest, `[*B, D]`.
        feature_weight: of the third term.
        alpha: share of the labels.
        temperature, kind, beta, weights: as `response_loss`.
        feature_weights: `[*B]` as the features; None takes `weights`.

    Raises:
        ValueError: no exits, or features without the teacher's.

    Example:
        >>> logits = jnp.array([[2.0, 0.0]])
        >>> float(self_distillation_loss([logits, logits], logits))
        0.0
    """
    if not exits:
        raise ValueError("self-distillation needs the logits of at least one exit")
    if bool(features) != (teacher_features is not None):
        raise ValueError(f"{len(features)} features of exits, {teacher_features is not None=}")
    teacher_logits = jax.lax.stop_gradient(teacher_logits)
    T = jnp.asarray(temperature, jnp.float32)

    def loss(student, teacher):
        soft = divergence(student, teacher, kind=kind, temperature=T, beta=beta)
        soft = weighted_mean(T**2 * soft, weights)
        if labels is None:
            return soft
        return alpha * hard_loss(student, labels, weights) + (1 - alpha) * soft

    total = per_layer(loss, exits, [teacher_logits] * len(exits))
    if teacher_features is None:
        return total
    fixed = [jax.lax.stop_gradient(teacher_features)] * len(features)
    held = weights if feature_weights is None else feature_weights
    hint = per_layer(lambda s, t: feature_loss(s, t, held), features, fixed)
    return total + feature_weight * hint
