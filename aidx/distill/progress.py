"""Teachers that follow the student's progress: adaptive, online and curriculum.

They are pytrees as the others are (`teachers`); what they learn is in the values that their
methods return.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from aidx.distill.aggregate import is_correct
from aidx.distill.distributions import entropy
from aidx.distill.divergence import cross_entropy, log_softmax, weighted_mean
from aidx.distill.options import AdaptiveMetric, CurriculumOrder, OnlineUpdate
from aidx.distill.outputs import Outputs
from aidx.distill.teachers import Apply, Teacher, _copy, as_outputs
from aidx.typing import Array, Params


def difficulty(
    student_logits: Array,
    labels: Array | None = None,
    *,
    metric: AdaptiveMetric | str = AdaptiveMetric.CONFIDENCE_BASED,
) -> Array:
    """How hard the student finds an example, 0 (easy) to 1 (hard).

        accuracy_based    1 if the prediction is wrong, 0 if it is right
        confidence_based  1 - max_v s_v
        entropy_based     H(s) / log V

    Args:
        student_logits: `[*B, V]`.
        labels: as `is_correct`; only accuracy_based takes them.
        metric: which of the three.

    Returns:
        f32 `[*B]`.

    Raises:
        ValueError: accuracy without labels, or labels that would have no effect.

    Example:
        >>> logits = jnp.log(jnp.array([[0.75, 0.25]]))
        >>> [round(difficulty(logits, metric=m).item(), 3) for m in list(AdaptiveMetric)[1:]]
        [0.25, 0.811]
        >>> difficulty(logits, jnp.array([0]), metric="accuracy_based").item()
        0.0
    """
    metric = AdaptiveMetric(metric)
    if metric is AdaptiveMetric.ACCURACY_BASED:
        if labels is None:
            raise ValueError("accuracy needs labels")
        return 1.0 - is_correct(student_logits, labels).astype(jnp.float32)
    if labels is not None:
        raise ValueError(f"labels have no effect on {metric}")
    if metric is AdaptiveMetric.CONFIDENCE_BASED:
        return 1 - jnp.exp(log_softmax(student_logits).max(-1))
    return entropy(student_logits) / jnp.log(float(max(2, student_logits.shape[-1])))


@struct.dataclass
class AdaptiveTeacher:
    """A teacher that speaks more softly where its student has difficulties (`adaptive`).

        T_b = T_min + (T_max - T_min) d_b,  d = difficulty(student)       (Li et al., 2023, CTKD)

    The temperature comes with the outputs, per example, and takes the place of the loss's.
    Without the student's logits (or without labels, for accuracy) d is the running mean.

    Example:
        >>> from aidx.distill.teachers import network_teacher
        >>> base = network_teacher(lambda w, x: x, 0)
        >>> teacher = adaptive_teacher(base, min_temperature=1.0, max_temperature=5.0)
        >>> student = jnp.array([[0.0, 0.0], [99.0, 0.0]])
        >>> teacher(student, student_logits=student).temperature.tolist()
        [3.0, 1.0]
    """

    base: Any
    running: Array  # [] f32: the running mean of the difficulty
    metric: AdaptiveMetric = struct.field(pytree_node=False)
    min_temperature: float = struct.field(pytree_node=False)
    max_temperature: float = struct.field(pytree_node=False)
    decay: float = struct.field(pytree_node=False)

    def __call__(
        self, inputs: Any, *, student_logits: Array | None = None, labels: Array | None = None
    ) -> Outputs:
        """What the base says, with a temperature per example."""
        out = self.base(inputs)
        d = jnp.broadcast_to(self.running, out.logits.shape[:-1])
        needs_labels = self.metric is AdaptiveMetric.ACCURACY_BASED
        if student_logits is not None and (labels is not None or not needs_labels):
            d = difficulty(student_logits, labels if needs_labels else None, metric=self.metric)
        T = self.min_temperature + (self.max_temperature - self.min_temperature) * d
        return as_outputs(out.replace(temperature=T))

    def observe(
        self, student_logits: Array, labels: Array | None = None, weights: Array | None = None
    ) -> "AdaptiveTeacher":
        """The teacher after it has seen how the student does: `running = decay running + ... d`."""
        needs_labels = self.metric is AdaptiveMetric.ACCURACY_BASED
        d = difficulty(student_logits, labels if needs_labels else None, metric=self.metric)
        mean = weighted_mean(jax.lax.stop_gradient(d), weights)
        return self.replace(running=self.decay * self.running + (1 - self.decay) * mean)  # pyright: ignore


def adaptive_teacher(
    base: Teacher,
    *,
    metric: AdaptiveMetric | str = AdaptiveMetric.CONFIDENCE_BASED,
    min_temperature: float = 1.0,
    max_temperature: float = 5.0,
    decay: float = 0.9,
) -> AdaptiveTeacher:
    """An `AdaptiveTeacher` that expects difficulties of 1/2 before it has seen any.

    Raises:
        ValueError: temperatures out of order, or decay outside [0, 1).

    Example:
        >>> adaptive_teacher(lambda x: x, min_temperature=3.0, max_temperature=2.0)
        Traceback (most recent call last):
        ValueError: temperatures 3.0 to 2.0 must be positive and ascending
    """
    if not 0 < min_temperature <= max_temperature:
        raise ValueError(
            f"temperatures {min_temperature} to {max_temperature} must be positive and ascending"
        )
    if not 0 <= decay < 1:
        raise ValueError(f"{decay=} must lie in [0, 1)")
    start = jnp.float32(0.5)
    return AdaptiveTeacher(
        base, start, AdaptiveMetric(metric), min_temperature, max_temperature, decay
    )


@struct.dataclass
class OnlineTeacher:
    """A teacher that learns while it teaches (`online`).

        ema             p = decay p + (1 - decay) student         (Tarvainen and Valpola, 2017)
        gradient_based  p = p - rate dL/dp                        (Zhang et al., 2018, mutual
                        learning: L is the teacher's own loss with its divergence from the student)
        momentum_based  v = decay v + (student - p);  p = p + rate v

    Example:
        >>> teacher = online_teacher(lambda w, x: x * w, jnp.float32(1.0), decay=0.75)
        >>> teacher.update(student_params=jnp.float32(2.0)).params.item()
        1.25
    """

    params: Params
    velocity: Params | None
    steps: Array  # [] i32
    apply: Apply = struct.field(pytree_node=False)
    how: OnlineUpdate = struct.field(pytree_node=False)
    decay: float = struct.field(pytree_node=False)
    rate: float = struct.field(pytree_node=False)

    def __call__(self, inputs: Any) -> Outputs:
        """What the teacher says now."""
        return as_outputs(self.apply(self.params, inputs))

    def update(
        self, *, student_params: Params | None = None, grads: Params | None = None
    ) -> "OnlineTeacher":
        """The teacher after a step of the student.

        Args:
            student_params: for ema and momentum_based.
            grads: of the teacher's loss by its params, for gradient_based.

        Raises:
            ValueError: the one that is needed is absent, or the other is given.
        """
        by_gradient = self.how is OnlineUpdate.GRADIENT_BASED
        if (grads is not None) != by_gradient or (student_params is not None) == by_gradient:
            raise ValueError(f"{self.how} takes {'grads' if by_gradient else 'student_params'}")
        new: dict[str, Any] = {"steps": self.steps + 1}
        with jax.named_scope("online_teacher"):
            if by_gradient:
                new["params"] = jax.tree.map(lambda p, g: p - self.rate * g, self.params, grads)
            elif self.how is OnlineUpdate.EMA:
                blend = lambda p, s: self.decay * p + (1 - self.decay) * s
                new["params"] = jax.tree.map(blend, self.params, student_params)
            else:
                pull = lambda v, p, s: self.decay * v + (s - p)
                new["velocity"] = jax.tree.map(pull, self.velocity, self.params, student_params)
                step = lambda p, v: p + self.rate * v
                new["params"] = jax.tree.map(step, self.params, new["velocity"])
        return self.replace(**new)  # pyright: ignore


def online_teacher(
    apply: Apply,
    params: Params,
    *,
    how: OnlineUpdate | str = OnlineUpdate.EMA,
    decay: float | None = None,
    rate: float | None = None,
) -> OnlineTeacher:
    """An `OnlineTeacher` that starts with a copy of params.

    Args:
        apply: of the teacher.
        params: of the teacher.
        how: which update.
        decay: of ema (0.999) and of the velocity (0.9).
        rate: of gradient_based and momentum_based (0.01).

    Raises:
        ValueError: a number out of range, or one that has no effect.

    Example:
        >>> online_teacher(lambda w, x: x, 0.0, how="ema", rate=0.1)
        Traceback (most recent call last):
        ValueError: rate=0.1 has no effect on ema
    """
    how = OnlineUpdate(how)
    if how is OnlineUpdate.EMA and rate is not None:
        raise ValueError(f"{rate=} has no effect on {how}")
    if how is OnlineUpdate.GRADIENT_BASED and decay is not None:
        raise ValueError(f"{decay=} has no effect on {how}")
    decay = (0.999 if how is OnlineUpdate.EMA else 0.9) if decay is None else decay
    rate = 0.01 if rate is None else rate
    if not 0 <= decay < 1 or not rate > 0:
        raise ValueError(f"{decay=} must lie in [0, 1) and {rate=} be positive")
    moving = how is OnlineUpdate.MOMENTUM_BASED
    velocity = jax.tree.map(jnp.zeros_like, params) if moving else None
    return OnlineTeacher(_copy(params), velocity, jnp.int32(0), apply, how, decay, rate)


def curriculum_order(
    difficulties: Array, order: CurriculumOrder | str = CurriculumOrder.EASY_TO_HARD
) -> Array:
    """The order in which to learn: a permutation `[n]`, stable among equals.

    Example:
        >>> [curriculum_order(jnp.array([2.0, 0.0, 1.0]), o).tolist() for o in CurriculumOrder]
        [[1, 2, 0], [0, 2, 1]]
    """
    order = CurriculumOrder(order)
    signed = difficulties if order is CurriculumOrder.EASY_TO_HARD else -difficulties
    return jnp.argsort(signed, stable=True)


@struct.dataclass
class CurriculumTeacher:
    """A teacher that decides which examples are learned from (`curriculum`).

        share(step) = min(1, start + (1 - start) step / total_steps)

    of the examples, the easiest or the hardest first (Bengio et al., 2009; pacing as Hacohen and
    Weinshall, 2019).  An example's difficulty is the teacher's cross-entropy with its label, or
    the entropy of its prediction without labels.  The outputs carry weights: 1 for what is learned
    now, 0 for what is to come.

    Example:
        >>> from aidx.distill.teachers import network_teacher
        >>> teacher = curriculum_teacher(network_teacher(lambda w, x: x, 0), total_steps=10)
        >>> logits = jnp.array([[0.0, 0.0], [9.0, 0.0], [1.0, 0.0]])  # hard, easy, in between
        >>> teacher.replace(step=jnp.int32(3))(logits).weights.tolist()
        [0.0, 1.0, 1.0]
    """

    base: Any
    step: Array  # [] i32
    order: CurriculumOrder = struct.field(pytree_node=False)
    total_steps: int = struct.field(pytree_node=False)
    start: float = struct.field(pytree_node=False)

    def __call__(self, inputs: Any, *, labels: Array | None = None) -> Outputs:
        """What the base says, with weights: `share` of the batch, first in order."""
        out = self.base(inputs)
        keep = self.available(self.difficulties(out.logits, labels))
        shape = out.logits.shape[:-1]
        weights = jnp.broadcast_to(keep.reshape((-1,) + (1,) * (len(shape) - 1)), shape)
        return as_outputs(out.replace(weights=weights.astype(jnp.float32)))

    def difficulties(self, logits: Array, labels: Array | None = None) -> Array:
        """How hard the teacher finds each example: `[B, ..., V]` to `[B]`."""
        hard = entropy(logits) if labels is None else cross_entropy(logits, labels)
        return hard.reshape(hard.shape[0], -1).mean(-1)

    def share(self) -> Array:
        """Of the examples, how much is learned from at this step."""
        return jnp.minimum(1.0, self.start + (1 - self.start) * self.step / self.total_steps)

    def available(self, difficulties: Array) -> Array:
        """bool `[n]`: the first `ceil(share n)` in order, of a batch or of a whole data set."""
        n = difficulties.shape[0]
        rank = jnp.argsort(curriculum_order(difficulties, self.order))
        return rank < jnp.ceil(self.share() * n - 1e-6)

    def advance(self, steps: int = 1) -> "CurriculumTeacher":
        """The teacher some steps later."""
        return self.replace(step=self.step + steps)  # pyright: ignore


def curriculum_teacher(
    base: Teacher,
    *,
    order: CurriculumOrder | str = CurriculumOrder.EASY_TO_HARD,
    total_steps: int,
    start: float = 0.2,
) -> CurriculumTeacher:
    """A `CurriculumTeacher` at step 0.

    Args:
        base: who teaches.
        order: easy_to_hard or hard_to_easy.
        total_steps: after which all examples are learned from.
        start: the share of the first step, above 0.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> float(curriculum_teacher(lambda x: x, total_steps=4).advance(2).share())
        0.6000000238418579
    """
    if total_steps < 1 or not 0 < start <= 1:
        raise ValueError(f"{total_steps=} must be positive and {start=} in (0, 1]")
    return CurriculumTeacher(base, jnp.int32(0), CurriculumOrder(order), total_steps, start)
