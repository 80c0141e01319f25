"""Losses on hidden features and attention maps, layer by layer.

Student and teacher features of one layer have one shape; where their widths differ, `project` the
student's first.  Losses that compare examples with each other are in `relations`.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aidx.distill.divergence import forward_terms, same_shape, weighted_mean
from aidx.distill.options import AttentionMatching, FactorMode, SelectivityMetric
from aidx.typing import Array, Params


def init_projection(key: Array, student_dim: int, teacher_dim: int) -> Params:
    """A linear map from the student's width to the teacher's, trained with the student.

    Raises:
        ValueError: a width below 1.

    Example:
        >>> init_projection(jax.random.key(0), 4, 6)["kernel"].shape
        (4, 6)
    """
    if student_dim < 1 or teacher_dim < 1:
        raise ValueError(f"{student_dim=} and {teacher_dim=} must be positive")
    kernel = jax.random.normal(key, (student_dim, teacher_dim), jnp.float32) * student_dim**-0.5
    return {"kernel": kernel, "bias": jnp.zeros((teacher_dim,), jnp.float32)}


def project(params: Params, x: Array) -> Array:
    """`x @ kernel + bias`, `[..., Ds]` to `[..., Dt]` in f32: FitNets' regressor.

    Example:
        >>> project(init_projection(jax.random.key(0), 4, 6), jnp.ones((2, 3, 4))).shape
        (2, 3, 6)
    """
    y = jnp.einsum("...s,st->...t", x, params["kernel"], preferred_element_type=jnp.float32)
    return y + params["bias"].reshape((1,) * (y.ndim - 1) + (-1,))


def matched_layers(student_layers: int, teacher_layers: int) -> tuple[tuple[int, int], ...]:
    """(student layer, teacher layer) pairs, evenly spread, the last with the last.

    Layer m of M learns from layer `(m + 1) N / M - 1` of N, rounded (Jiao et al., 2020, TinyBERT).

    Raises:
        ValueError: fewer than one layer, or a teacher shallower than its student.

    Example:
        >>> matched_layers(3, 6)
        ((0, 1), (1, 3), (2, 5))
    """
    if not 1 <= student_layers <= teacher_layers:
        raise ValueError(f"{student_layers=} must lie between 1 and {teacher_layers=}")
    ratio = teacher_layers / student_layers
    return tuple((m, round((m + 1) * ratio) - 1) for m in range(student_layers))


def per_layer(
    loss: Callable[..., Array],
    student: Sequence[Any],
    teacher: Sequence[Any],
    layer_weights: Sequence[float] | None = None,
) -> Array:
    """`sum_l w_l loss(student_l, teacher_l) / sum_l w_l`.

    Raises:
        ValueError: no layers, or as many on one side as not on the other.

    Example:
        >>> one, two = jnp.ones((2, 3)), 2 * jnp.ones((2, 3))
        >>> float(per_layer(feature_loss, [one, one], [one, two], [1.0, 3.0]))
        0.75
    """
    weights = [1.0] * len(student) if layer_weights is None else list(layer_weights)
    if not len(student) == len(teacher) == len(weights) or not student:
        raise ValueError(
            f"{len(student)} layers of the student, {len(teacher)} of the teacher and "
            f"{len(weights)} layer_weights"
        )
    losses = [w * loss(s, t) for w, s, t in zip(weights, student, teacher, strict=True)]
    return sum(losses[1:], losses[0]) / sum(weights)


def feature_loss(student: Array, teacher: Array, weights: Array | None = None) -> Array:
    """Hidden features as hints (Romero et al., 2015, FitNets, eq. 3).

        L = mean_b 1/D ||s_b - t_b||^2

    Args:
        student: `[*B, D]`, projected to the teacher's width.
        teacher: `[*B, D]`.
        weights: `[*B]`.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> float(feature_loss(jnp.zeros((2, 3)), jnp.full((2, 3), 2.0)))
        4.0
    """
    same_shape(student, teacher, "features")
    difference = student.astype(jnp.float32) - teacher.astype(jnp.float32)
    return weighted_mean((difference**2).mean(-1), weights)


def attention_loss(
    student: Array,
    teacher: Array,
    *,
    matching: AttentionMatching | str = AttentionMatching.MSE,
    weights: Array | None = None,
) -> Array:
    """Attention maps, row by row.

        mse     mean_{b,n,t} 1/S ||s - t||^2              (Jiao et al., 2020, TinyBERT, eq. 7)
        kl      mean_{b,n,t} sum_k t_k log(t_k / s_k)     (Wang et al., 2020, MiniLM, eq. 5)
        cosine  mean_{b,n,t} 1 - s.t / (||s|| ||t||)

    Where the numbers of heads differ, the maps are averaged over the heads first.

    Args:
        student: probabilities `[B, N, T, S]`, rows sum to one.
        teacher: `[B, N', T, S]`.
        matching: which of the three.
        weights: `[B, T]`, of queries; a row of weight 0 (padding) may be all zero.

    Raises:
        ValueError: shapes that differ in more than heads.

    Example:
        >>> s, t = jnp.array([[[[1.0, 0.0]]]]), jnp.array([[[[0.5, 0.5]]]])
        >>> [round(float(attention_loss(t, s, matching=m)), 4) for m in AttentionMatching]
        [0.25, 0.6931, 0.2929]
    """
    matching = AttentionMatching(matching)
    student, teacher = student.astype(jnp.float32), teacher.astype(jnp.float32)
    if student.ndim == teacher.ndim == 4 and student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdims=True), teacher.mean(1, keepdims=True)
    same_shape(student, teacher, "attention maps")
    if student.ndim != 4:
        raise ValueError(f"attention maps are [B, N, T, S], not {student.shape}")
    if matching is AttentionMatching.MSE:
        rows = ((student - teacher) ** 2).mean(-1)
    elif matching is AttentionMatching.KL:
        rows = forward_terms(safe_log(teacher), safe_log(student)).sum(-1)
    else:
        rows = 1 - (unit(student) * unit(teacher)).sum(-1)
    if weights is None:
        return rows.mean()
    if weights.shape != rows.shape[:1] + rows.shape[2:]:
        raise ValueError(f"{weights.shape=} is not [B, T] of maps {student.shape}")
    return weighted_mean(rows, jnp.broadcast_to(weights[:, None], rows.shape))


def flow_loss(
    student: Sequence[Array],
    teacher: Sequence[Array],
    *,
    pair_weights: Sequence[float] | None = None,
    weights: Array | None = None,
) -> Array:
    """The flow of solution procedure between layers (Yim et al., 2017, eq. 1 and 2).

        G_l = 1/X sum_x F_l[x] F_{l+1}[x]^T      [B, D_l, D_{l+1}]
        L   = mean over pairs and examples of the mean square of G_l(student) - G_l(teacher)

    Args:
        student: at least two layers `[B, D]` or `[B, *X, D]`; X (positions) is equal among them.
        teacher: layers of the same shapes.
        pair_weights: one per pair of adjacent layers.
        weights: `[B]`, of examples, or `[B, *X]`, of positions too.

    Raises:
        ValueError: fewer than two layers, or shapes.

    Example:
        >>> layers = [jnp.ones((2, 5, 3)), jnp.ones((2, 5, 4))]
        >>> float(flow_loss(layers, [2 * layers[0], layers[1]]))
        1.0
    """
    if len(student) < 2:
        raise ValueError(f"a flow needs two layers, not {len(student)}")
    for s, t in zip(student, teacher, strict=False):
        same_shape(s, t, "features")
    flows = lambda layers: [fsp_matrix(a, b, weights) for a, b in zip(layers, layers[1:])]  # noqa: B905, RUF007
    examples = None if weights is None else example_weights(weights)

    def loss(s, t):
        return weighted_mean(((s - t) ** 2).mean((1, 2)), examples)

    return per_layer(loss, flows(student), flows(teacher), pair_weights)


def fsp_matrix(first: Array, second: Array, weights: Array | None = None) -> Array:
    """`1/X sum_x first[x] second[x]^T`: `[B, *X, D1]`, `[B, *X, D2]` to f32 `[B, D1, D2]`.

    Args:
        first: features of a layer.
        second: of the next.
        weights: `[B, *X]` of positions (the mean is weighted), or `[B]` (no effect here).

    Raises:
        ValueError: the layers differ in their positions.

    Example:
        >>> fsp_matrix(jnp.ones((1, 2)), 3 * jnp.ones((1, 1))).tolist()
        [[[3.0], [3.0]]]
    """
    if first.shape[:-1] != second.shape[:-1]:
        raise ValueError(f"{first.shape=} and {second.shape=} differ in their positions")
    B = first.shape[0]
    a, b = (x.astype(jnp.float32).reshape(B, -1, x.shape[-1]) for x in (first, second))
    if weights is None or weights.ndim < 2:
        return jnp.einsum("bxi,bxj->bij", a, b) / a.shape[1]
    w = weights.astype(jnp.float32).reshape(B, -1, 1)
    total = w.sum(1, keepdims=True)
    return jnp.einsum("bxi,bxj->bij", jnp.where(w != 0, w * a, 0.0), b) / jnp.where(total, total, 1)


def factor_loss(
    student: Array,
    teacher: Array,
    *,
    mode: FactorMode | str = FactorMode.FACTOR_MATCHING,
    rank: int = 8,
    norm_order: int = 1,
    weights: Array | None = None,
) -> Array:
    """Factors of the features, with F the `[n, D]` matrix of all examples.

        factor_matching         mean_b |t_b/||t_b|| - s_b/||s_b|||_p^p  (Kim et al., 2018, eq. 3)
        low_rank_approximation  mean_b 1/D ||(s_b - t_b) V_k||^2, V_k the k first right singular
                                vectors of F_t: the teacher's best approximation of rank k is
                                F_t V_k V_k^T (Eckart and Young, 1936; Lee et al., 2018)
        nuclear_norm_matching   (||F_s||_* - ||F_t||_*)^2 / (n D), ||.||_* the sum of singular
                                values (Fazel, 2002)

    V_k is a constant of the teacher: no gradient passes through a decomposition that may be
    degenerate.

    Args:
        student: `[*B, D]`.
        teacher: `[*B, D]`.
        mode: which of the three.
        rank: k, at most D.
        norm_order: p, 1 or 2.
        weights: `[*B]`; the matrices' rows are weighed by their roots.

    Raises:
        ValueError: shapes, a rank above D or a norm_order that is not 1 or 2.

    Example:
        >>> s, t = jnp.eye(2), jnp.eye(2)[::-1]
        >>> [round(float(factor_loss(s, t, mode=m, rank=1)), 4) for m in FactorMode]
        [0.5, 0.0, 2.0]
    """
    mode = FactorMode(mode)
    same_shape(student, teacher, "features")
    D = student.shape[-1]
    s, t = (x.astype(jnp.float32).reshape(-1, D) for x in (student, teacher))
    w = None if weights is None else weights.reshape(-1)
    if mode is FactorMode.FACTOR_MATCHING:
        if norm_order not in (1, 2):
            raise ValueError(f"{norm_order=} must be 1 or 2")
        return weighted_mean((jnp.abs(unit(t) - unit(s)) ** norm_order).sum(-1), w)
    if w is not None:
        s, t = (jnp.where(w[:, None] > 0, jnp.sqrt(w)[:, None] * x, 0.0) for x in (s, t))
    n = jnp.float32(s.shape[0]) if w is None else jnp.maximum(w.sum(), 1e-12)
    if mode is FactorMode.NUCLEAR_NORM_MATCHING:
        norms = [jnp.linalg.svd(x, compute_uv=False).sum() for x in (s, t)]
        return (norms[0] - norms[1]) ** 2 / (n * D)
    if not 1 <= rank <= D:
        raise ValueError(f"{rank=} must lie between 1 and the {D} features")
    _, vectors = jnp.linalg.eigh(jax.lax.stop_gradient(t.T @ t))  # ascending
    difference = (s - t) @ vectors[:, D - rank :]
    return (difference**2).sum() / (n * D)


def selectivity_loss(
    student: Array,
    teacher: Array,
    *,
    metric: SelectivityMetric | str = SelectivityMetric.VARIANCE,
    weights: Array | None = None,
) -> Array:
    """Neurons that select alike (Huang and Wang, 2017, Like What You Like).

        L = 1/D sum_d (m(s_d) - m(t_d))^2,  over the n activations x of neuron d:
        variance         mean(x^2) - mean(x)^2
        sparsity         (sqrt(n) - sum|x| / sqrt(sum x^2)) / (sqrt(n) - 1)    (Hoyer, 2004)
        peak_to_average  max|x| / mean|x|

    Args:
        student: `[*B, D]`.
        teacher: `[*B, D]`.
        metric: m.
        weights: `[*B]`; n is their sum, and the peak is among those above 0.

    Raises:
        ValueError: the shapes differ.

    Example:
        >>> s, t = jnp.array([[1.0], [1.0]]), jnp.array([[0.0], [2.0]])
        >>> [round(float(selectivity_loss(s, t, metric=m)), 4) for m in SelectivityMetric]
        [1.0, 1.0, 1.0]
    """
    same_shape(student, teacher, "features")
    D = student.shape[-1]
    s, t = (x.astype(jnp.float32).reshape(-1, D) for x in (student, teacher))
    w = None if weights is None else weights.reshape(-1)
    measure = lambda x: selectivity(x, metric=metric, weights=w)
    return ((measure(s) - measure(t)) ** 2).mean()


def selectivity(
    x: Array, *, metric: SelectivityMetric | str, weights: Array | None = None
) -> Array:
    """How selective each neuron is, `[n, D]` to `[D]`; see `selectivity_loss`.

    Example:
        >>> x = jnp.array([[0.0, 1.0], [4.0, 1.0]])
        >>> selectivity(x, metric="peak_to_average").tolist()
        [2.0, 1.0]
    """
    metric = SelectivityMetric(metric)
    w = jnp.ones(x.shape[0]) if weights is None else weights.astype(jnp.float32)
    n = w.sum()
    x = jnp.where(w[:, None] > 0, x, 0.0)
    total = lambda y: jnp.einsum("n,nd->d", w, y)
    if metric is SelectivityMetric.VARIANCE:
        centred = x - (total(x) / n)[None]
        return total(centred**2) / n
    if metric is SelectivityMetric.SPARSITY:
        root = jnp.sqrt(n)
        ratio = total(jnp.abs(x)) / safe_sqrt(total(x**2))
        ratio = jnp.where(
            ratio > 0, ratio, 1.0
        )  # a neuron that is never active is as sparse as can be
        return jnp.where(n > 1, (root - ratio) / jnp.where(n > 1, root - 1, 1.0), 0.0)
    mean = total(jnp.abs(x)) / n
    return jnp.abs(x).max(0) / jnp.where(mean > 0, mean, 1.0)


def example_weights(weights: Array) -> Array:
    """Weights of positions `[B, *X]` as weights of examples `[B]`: 1 where any position counts.

    Example:
        >>> example_weights(jnp.array([[0.0, 2.0], [0.0, 0.0]])).tolist()
        [1.0, 0.0]
    """
    if weights.ndim == 1:
        return weights.astype(jnp.float32)
    return (weights.reshape(weights.shape[0], -1) > 0).any(-1).astype(jnp.float32)


def safe_log(x: Array) -> Array:
    """`log x`, -inf at 0 with a gradient of 0 there."""
    return jnp.where(x > 0, jnp.log(jnp.where(x > 0, x, 1.0)), -jnp.inf)


def safe_sqrt(x: Array) -> Array:
    """`sqrt x`, with a gradient of 0 at 0, where it returns a number that may be divided by."""
    return jnp.sqrt(jnp.where(x > 0, x, 1e-24))


def unit(x: Array) -> Array:
    """`x / ||x||` along the last axis; 0 stays 0, with a gradient of 0."""
    square = (x.astype(jnp.float32) ** 2).sum(-1, keepdims=True)
    return jnp.where(square > 0, x / safe_sqrt(square), 0.0)
