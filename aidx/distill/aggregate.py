"""Several predictions into one: ensembles, modalities, votes.  Logits in, log-probabilities out."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.core import Tracer

from aidx.distill.divergence import log_softmax
from aidx.distill.options import DistributedAggregation, EnsembleAggregation
from aidx.typing import Array


def ensemble_logits(
    logits: Array,
    weights: Array | Sequence[float] | None = None,
    *,
    aggregation: EnsembleAggregation | str = EnsembleAggregation.WEIGHTED_AVERAGE,
) -> Array:
    """One distribution of k teachers' (Hinton et al., 2015; You et al., 2017).

        weighted_average  p = sum_i w_i p_i
        geometric_mean    p ~ prod_i p_i^{w_i}     (Hinton, 2002, products of experts)
        maximum           p ~ max_i p_i
        median            p ~ median_i p_i, or the average where every median is 0

    with `sum_i w_i = 1` and `~` up to normalising.

    Args:
        logits: `[k, *B, V]`.
        weights: `[k]`, not negative, normalised here; None: all alike.
        aggregation: which of the four; the last two take no weights.

    Returns:
        Log-probabilities `[*B, V]` in f32, -inf where the probability is zero.

    Raises:
        ValueError: weights of another shape, or where they would have no effect.

    Example:
        >>> logits = jnp.log(jnp.array([[0.9, 0.1], [0.5, 0.5], [0.5, 0.5]]))
        >>> [f"{jnp.exp(ensemble_logits(logits, aggregation=a))[0]:.3f}"
        ...  for a in EnsembleAggregation]
        ['0.633', '0.675', '0.643', '0.500']
    """
    aggregation = EnsembleAggregation(aggregation)
    k = logits.shape[0]
    w = normalised_weights(weights, k)
    log_p = log_softmax(logits)
    if aggregation in (EnsembleAggregation.MAXIMUM, EnsembleAggregation.MEDIAN):
        if weights is not None:
            raise ValueError(f"weights have no effect on the {aggregation}")
        if aggregation is EnsembleAggregation.MAXIMUM:
            return jax.nn.log_softmax(log_p.max(0), axis=-1)
        return _median(log_p)
    each = (k,) + (1,) * (logits.ndim - 1)
    if aggregation is EnsembleAggregation.WEIGHTED_AVERAGE:
        return jax.nn.logsumexp(log_p + jnp.log(w).reshape(each), axis=0)
    weighted = jnp.where(w.reshape(each) > 0, w.reshape(each) * log_p, 0.0)
    return jax.nn.log_softmax(weighted.sum(0), axis=-1)


def _median(log_p: Array) -> Array:
    p = jnp.exp(log_p)
    median = jnp.median(p, axis=0)
    total = median.sum(-1, keepdims=True)
    return jnp.log(jnp.where(total > 0, median / jnp.where(total > 0, total, 1.0), p.mean(0)))


def normalised_weights(weights: Array | Sequence[float] | None, k: int) -> Array:
    """`[k]` f32 that sum to one.

    Raises:
        ValueError: another number of them, or, where they are no tracers, a negative one or all 0.

    Example:
        >>> normalised_weights([1.0, 3.0], 2).tolist()
        [0.25, 0.75]
    """
    if weights is None:
        return jnp.full((k,), 1 / k, jnp.float32)
    w = jnp.asarray(weights, jnp.float32)
    if w.shape != (k,):
        raise ValueError(f"weights of shape {w.shape} for {k} teachers")
    if not isinstance(w, Tracer) and not (bool((w >= 0).all()) and float(w.sum()) > 0):
        raise ValueError(f"weights {w.tolist()} must not be negative, nor all zero")
    return w / w.sum()


def count_or_mean(logits: Array, aggregation: DistributedAggregation | str) -> Array:
    """What a teacher contributes to the sum over teachers: its distribution, or its one vote.

    Args:
        logits: `[*B, V]`.
        aggregation: `average` or `voting`; a vote goes to the first of equal logits.

    Returns:
        f32 `[*B, V]`, sums to one.

    Example:
        >>> logits = jnp.log(jnp.array([0.25, 0.75]))
        >>> [count_or_mean(logits, a).round(2).tolist() for a in DistributedAggregation]
        [[0.25, 0.75], [0.0, 1.0]]
    """
    if DistributedAggregation(aggregation) is DistributedAggregation.VOTING:
        return jax.nn.one_hot(logits.argmax(-1), logits.shape[-1], dtype=jnp.float32)
    return jnp.exp(log_softmax(logits))


def is_correct(
    logits: Array, labels: Array, weights: Array | None = None, *, sequence: bool = False
) -> Array:
    """Whether predictions are right: of classifiers, of tokens, or of whole sequences.

    Args:
        logits: `[*B, V]`; V = 1 is a binary classifier whose class 1 has a positive logit.
        labels: class ids `[*B]` (negative ones are no tokens), or probabilities `[*B, V]`, whose
            largest is the class.
        weights: `[*B]`; positions of weight 0 do not count.
        sequence: a sequence `[B, T]` is right if all its tokens that count are.

    Returns:
        bool `[*B]`, or `[*B][:-1]` for sequences.

    Raises:
        ValueError: shapes, or sequences without an axis of tokens.

    Example:
        >>> logits = jnp.array([[[0.0, 1.0], [1.0, 0.0]]])
        >>> is_correct(logits, jnp.array([[1, 1]])).tolist()
        [[True, False]]
        >>> is_correct(logits, jnp.array([[1, -1]]), sequence=True).tolist()
        [True]
    """
    counted = jnp.ones(logits.shape[:-1], bool) if weights is None else weights > 0
    if jnp.issubdtype(labels.dtype, jnp.floating):
        if labels.shape != logits.shape:
            raise ValueError(f"probabilities {labels.shape} for logits {logits.shape}")
        target = labels[..., 0] > 0.5 if labels.shape[-1] == 1 else labels.argmax(-1)
    elif labels.shape != logits.shape[:-1]:
        raise ValueError(f"labels {labels.shape} for logits {logits.shape}")
    else:
        target, counted = labels, counted & (labels >= 0)
    predicted = logits[..., 0] > 0 if logits.shape[-1] == 1 else logits.argmax(-1)
    right = (predicted == target) & counted
    if not sequence:
        return right
    if right.ndim < 2:
        raise ValueError(f"logits {logits.shape} have no axis of tokens")
    return (right | ~counted).all(-1) & counted.any(-1)
