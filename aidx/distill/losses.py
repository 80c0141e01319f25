"""`make_loss`: from `KnowledgeDistillationOptions` to one pure loss over `Outputs`.

`TERMS` is the table from strategy to function; the hybrid strategy is a weighted sum of its rows.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from aidx.distill.distributions import (
    bottleneck_loss,
    elbo_loss,
    entropy_loss,
    latent_loss,
    mmd_loss,
    moment_loss,
    self_distillation_loss,
)
from aidx.distill.divergence import hard_loss, response_loss
from aidx.distill.features import (
    attention_loss,
    example_weights,
    factor_loss,
    feature_loss,
    flow_loss,
    per_layer,
    selectivity_loss,
)
from aidx.distill.options import (
    DistillationStrategy,
    KnowledgeDistillationOptions,
    ProbabilisticMode,
    VariationalMode,
)
from aidx.distill.outputs import Outputs, embedding_of
from aidx.distill.relations import contrastive_loss, relation_loss, similarity_loss
from aidx.typing import Array

Options = KnowledgeDistillationOptions
Loss = Callable[..., Array]


def make_loss(options: KnowledgeDistillationOptions) -> Loss:
    """The loss that the options describe.

        L = alpha CE(student, labels) + (1 - alpha) L_strategy     (without labels: L_strategy)

    Returns:
        `loss(student: Outputs, teacher: Outputs, labels=None, *, weights=None) -> f32 scalar`,
        pure and differentiable in the student.  labels as `cross_entropy`; weights `[*B]` as the
        logits, for example 0 for padding (`[B]` where there are no logits).  No gradient passes
        through the teacher, and its temperature and weights, if it has any, apply.

    Raises:
        ValueError: when called, for outputs that the strategy needs and does not get.

    Example:
        >>> loss = make_loss(KnowledgeDistillationOptions("hybrid", hybrid=(
        ...     ("response_based", 1.0), ("feature_based", 0.5))))
        >>> student = Outputs(logits=jnp.zeros((2, 3)), features=(jnp.zeros((2, 4)),))
        >>> teacher = student.replace(features=(jnp.ones((2, 4)),))
        >>> float(loss(student, teacher))
        0.5
    """
    pairs = options.hybrid or ((options.strategy, 1.0),)
    terms = [(str(s), TERMS[DistillationStrategy(s)], weight) for s, weight in pairs]

    def loss(
        student: Outputs,
        teacher: Outputs,
        labels: Array | None = None,
        *,
        weights: Array | None = None,
    ) -> Array:
        teacher = jax.lax.stop_gradient(teacher)
        if teacher.weights is not None:
            weights = teacher.weights if weights is None else weights * teacher.weights
        total = jnp.float32(0)
        for name, term, weight in terms:
            with jax.named_scope(name):
                total += weight * term(options, student, teacher, weights)
        if labels is None:
            return total
        with jax.named_scope("hard"):
            logits = _need(student.logits, "logits", "the labels")
            hard = hard_loss(logits, labels, weights)
        return options.alpha * hard + (1 - options.alpha) * total

    return loss


def distill_loss(
    options: KnowledgeDistillationOptions,
    student: Outputs,
    teacher: Outputs,
    labels: Array | None = None,
    *,
    weights: Array | None = None,
) -> Array:
    """`make_loss(options)(student, teacher, labels, weights=weights)`.

    Example:
        >>> same = Outputs(logits=jnp.ones((2, 3)))
        >>> float(distill_loss(KnowledgeDistillationOptions(), same, same))
        0.0
    """
    return make_loss(options)(student, teacher, labels, weights=weights)


def _need(value: Any, field: str, who: Any) -> Any:
    if value is None or (isinstance(value, tuple) and not value):
        raise ValueError(f"{who} needs {field}, which the outputs do not have")
    return value


def _both(student: Outputs, teacher: Outputs, field: str, who: Any) -> tuple[Any, Any]:
    return (
        _need(getattr(student, field), f"the student's {field}", who),
        _need(getattr(teacher, field), f"the teacher's {field}", who),
    )


def _temperature(options: Options, teacher: Outputs) -> Any:
    return options.temperature if teacher.temperature is None else teacher.temperature


def _fitting(weights: Array | None, features: Array) -> Array | None:
    """Weights for features `[*B, D]`: of positions, or of examples if these have been pooled."""
    if weights is None or weights.ndim == features.ndim - 1:
        return weights
    if weights.ndim < features.ndim - 1:  # of examples, and every position counts
        shape = weights.shape + (1,) * (features.ndim - 1 - weights.ndim)
        return jnp.broadcast_to(weights.reshape(shape), features.shape[:-1])
    return example_weights(weights)


def _embeddings(student: Outputs, teacher: Outputs, weights: Array | None):
    pooled = weights if weights is not None and weights.ndim > 1 else None
    examples = None if weights is None else example_weights(weights)
    return embedding_of(student, pooled), embedding_of(teacher, pooled), examples


def _response(o: Options, student: Outputs, teacher: Outputs, weights: Array | None) -> Array:
    s, t = _both(student, teacher, "logits", o.strategy)
    return response_loss(
        s,
        t,
        temperature=_temperature(o, teacher),
        kind=o.divergence,
        beta=o.jsd_beta,
        weights=weights,
    )


def _feature(o: Options, student: Outputs, teacher: Outputs, weights: Array | None) -> Array:
    layers = _both(student, teacher, "features", o.strategy)
    loss = lambda s, t: feature_loss(s, t, _fitting(weights, s))
    return per_layer(loss, *layers, o.layer_weights)


def _attention(o: Options, student: Outputs, teacher: Outputs, weights: Array | None) -> Array:
    layers = _both(student, teacher, "attention", o.strategy)

    def loss(s: Array, t: Array) -> Array:
        w = weights
        if w is not None and w.ndim == 1:
            w = jnp.broadcast_to(w[:, None], (s.shape[0], s.shape[2]))
        return attention_loss(s, t, matching=o.attention_matching, weights=w)

    return per_layer(loss, *layers, o.layer_weights)


def _relation(o: Options, student: Outputs, teacher: Outputs, weights: Array | None) -> Array:
    s, t, w = _embeddings(student, teacher, weights)
    return relation_loss(
        s,
        t,
        distance=o.relational_distance,
        distance_weight=o.distance_weight,
        angle_weight=o.angle_weight,
        weights=w,
    )


def _contrastive(o: Options, student: Outputs, teacher: Outputs, weights: Array | None) -> Array:
    s, t, w = _embeddings(student, teacher, weights)
    return contrastive_loss(
        s,
        t,
        mode=o.contrastive_mode,
        temperature=o.contrastive_temperature,
        margin=o.margin,
        weights=w,
    )


def _similarity(o: Options, student: Outputs, teacher: Outputs, weights: Array | None) -> Array:
    layers = _both(student, teacher, "features", o.strategy)
    examples = None if weights is None else example_weights(weights)

    def masked(x: Array) -> Array:
        if weights is None or weights.ndim == 1:
            return x
        w = _fitting(weights, x)
        return x if w is None or w.ndim == 1 else jnp.where(w[..., None] > 0, x, 0.0)

    loss = lambda s, t: similarity_loss(masked(s), masked(t), examples)
    return per_layer(loss, *layers, o.layer_weights)


def _flow(o: Options, student: Outputs, teacher: Outputs, weights: Array | None) -> Array:
    s, t = _both(student, teacher, "features", o.strategy)
    if weights is not None:
        weights = _fitting(weights, s[0])
    return flow_loss(s, t, pair_weights=o.layer_weights, weights=weights)


def _probabilistic(o: Options, student: Outputs, teacher: Outputs, weights: Array | None) -> Array:
    if o.probabilistic_mode is ProbabilisticMode.ENTROPY_TRANSFER:
        s, t = _both(student, teacher, "logits", o.probabilistic_mode)
        return entropy_loss(s, t, weights=weights)
    s, t, w = _embeddings(student, teacher, weights)
    if o.probabilistic_mode is ProbabilisticMode.MOMENT_MATCHING:
        return moment_loss(s, t, moments=o.moments, weights=w)
    return mmd_loss(s, t, bandwidth=o.bandwidth, weights=w)


def _variational(o: Options, student: Outputs, teacher: Outputs, weights: Array | None) -> Array:
    who = o.variational_mode
    if who is VariationalMode.ELBO:
        q = _need(student.reconstruction, "the student's reconstruction", who)
        t = _need(teacher.features, "the teacher's features", who)[-1]
        w = _fitting(weights, t)
        return elbo_loss(q, t, student.latent, prior_weight=o.prior_weight, weights=w)
    latent = _need(student.latent, "the student's latent", who)
    if who is VariationalMode.LATENT_SPACE_KL:
        theirs = _need(teacher.latent, "the teacher's latent", who)
        return latent_loss(latent, theirs, _fitting(weights, latent.mean))
    s, t = _both(student, teacher, "logits", who)
    return bottleneck_loss(
        s,
        t,
        latent,
        prior_weight=o.prior_weight,
        temperature=_temperature(o, teacher),
        weights=weights,
    )


def _flat(student: Outputs, teacher: Outputs, weights: Array | None, who: Any):
    s, t = (layers[-1] for layers in _both(student, teacher, "features", who))
    return s, t, _fitting(weights, s)


def _factor(o: Options, student: Outputs, teacher: Outputs, weights: Array | None) -> Array:
    s, t, w = _flat(student, teacher, weights, o.strategy)
    return factor_loss(s, t, mode=o.factor_mode, rank=o.rank, norm_order=o.norm_order, weights=w)


def _selectivity(o: Options, student: Outputs, teacher: Outputs, weights: Array | None) -> Array:
    s, t, w = _flat(student, teacher, weights, o.strategy)
    return selectivity_loss(s, t, metric=o.selectivity_metric, weights=w)


def _self(o: Options, student: Outputs, teacher: Outputs, weights: Array | None) -> Array:
    """Exits learn from the teacher; a student without exits learns with its output (born again)."""
    exits: Sequence[Array] = student.exits or (_need(student.logits, "logits", o.strategy),)
    features, deepest = (), None
    if o.feature_weight:
        features = student.exit_features if student.exits else student.features[-1:]
        features = _need(features, "the student's features of its exits", o.strategy)
        deepest = _need(teacher.features, "the teacher's features", o.strategy)[-1]
        if len(features) != len(exits):
            raise ValueError(f"{len(exits)} exits and features of {len(features)}")
    return self_distillation_loss(
        exits,
        _need(teacher.logits, "the teacher's logits", o.strategy),
        features=features,
        teacher_features=deepest,
        feature_weight=o.feature_weight,
        temperature=_temperature(o, teacher),
        kind=o.divergence,
        beta=o.jsd_beta,
        weights=weights,
        feature_weights=None if deepest is None else _fitting(weights, deepest),
    )


S = DistillationStrategy
TERMS: dict[DistillationStrategy, Callable[[Options, Outputs, Outputs, Array | None], Array]] = {
    S.RESPONSE_BASED: _response,
    S.FEATURE_BASED: _feature,
    S.ATTENTION_BASED: _attention,
    S.RELATION_BASED: _relation,
    S.CONTRASTIVE: _contrastive,
    S.SIMILARITY_PRESERVING: _similarity,
    S.FLOW_BASED: _flow,
    S.PROBABILISTIC_TRANSFER: _probabilistic,
    S.VARIATIONAL_INFORMATION: _variational,
    S.FACTOR_TRANSFER: _factor,
    S.NEURON_SELECTIVITY: _selectivity,
    S.SELF_DISTILLATION: _self,
}
"""Every strategy but hybrid, which is a sum of these."""
