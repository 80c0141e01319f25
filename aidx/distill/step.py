"""Distillation as training: loss functions for `aidx.train.make_train_step`, and whole steps.

    step(state, batch, teacher) -> (state, metrics)

The teacher is an argument of the step, not of its closure: it may change from step to step
(online, adaptive, curriculum, self) without a trace, is not donated, and gets no gradient.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

from aidx.cache import no_cache_attend
from aidx.distill.features import project
from aidx.distill.fused import linear_divergence, mixed_sums
from aidx.distill.losses import make_loss
from aidx.distill.options import Divergence, KnowledgeDistillationOptions
from aidx.distill.outputs import Outputs
from aidx.distill.teachers import Apply
from aidx.train import make_train_step
from aidx.typing import Array, Forward, Params


def distill_loss_fn(apply: Apply, options: KnowledgeDistillationOptions) -> Callable[..., tuple]:
    """A loss for `make_train_step` with the teacher as its fourth argument.

    Args:
        apply: of the student: `(params, inputs) -> logits or Outputs`.
        options: the loss.

    Returns:
        `loss_fn(params, batch, key, teacher) -> (total, weight)`; batch is a mapping with
        `inputs`, and `labels` and `weights` where there are any.  The weight is the sum of the
        weights, or the number of examples.

    Example:
        >>> import jax
        >>> from aidx.distill.teachers import network_teacher
        >>> loss_fn = distill_loss_fn(lambda w, x: x * w, KnowledgeDistillationOptions())
        >>> teacher = network_teacher(lambda w, x: x * w, 2.0)
        >>> total, weight = loss_fn(2.0, {"inputs": jnp.ones((3, 4))}, jax.random.key(0), teacher)
        >>> float(total), float(weight)
        (0.0, 3.0)
    """
    loss = make_loss(options)

    def loss_fn(params: Params, batch: Any, key: Array, teacher: Any) -> tuple[Array, Array]:
        del key  # nothing is drawn: a student with dropout draws in its own apply
        said = apply(params, batch["inputs"])
        student = said if isinstance(said, Outputs) else Outputs(logits=said)
        labels, weights = batch.get("labels"), batch.get("weights")
        mean = loss(student, teacher(batch["inputs"]), labels, weights=weights)
        weight = jnp.float32(_count(student)) if weights is None else weights.sum()
        return mean * weight, weight

    return loss_fn


def _count(outputs: Outputs) -> int:
    if outputs.logits is not None:
        return max(1, outputs.logits.size // outputs.logits.shape[-1])
    return (*outputs.features, outputs.embedding)[0].shape[0]  # pyright: ignore


def projected(apply: Apply) -> Apply:
    """A student whose features have another width than its teacher's.

    Its parameters are `{"model": ..., "projections": one per feature}`, trained together; the
    projections (`init_projection`) are dropped with the teacher.

    Example:
        >>> import jax
        >>> from aidx.distill.features import init_projection
        >>> apply = projected(lambda w, x: Outputs(features=(x * w,)))
        >>> params = {"model": 2.0, "projections": [init_projection(jax.random.key(0), 4, 6)]}
        >>> apply(params, jnp.ones((3, 4))).features[0].shape
        (3, 6)
    """

    def with_projections(params: Params, inputs: Any) -> Outputs:
        said = apply(params["model"], inputs)
        if not isinstance(said, Outputs):
            raise ValueError("the student says logits alone: there are no features to project")
        pairs = zip(params["projections"], said.features, strict=True)
        return said.replace(features=tuple(project(p, f) for p, f in pairs))  # pyright: ignore

    return with_projections


def make_distill_step(
    apply: Apply,
    options: KnowledgeDistillationOptions,
    optimizer: optax.GradientTransformation,
    **train_options: Any,
) -> Callable[..., tuple]:
    """`distill_step(state, batch, teacher) -> (state, metrics)`, jitted; state is donated.

    Args:
        apply: of the student.
        options: the loss.
        optimizer: of optax.
        **train_options: of `aidx.train.make_train_step` (microbatches, clip_norm, ...).  With
            microbatches, a loss that compares the examples of a batch compares those of a part.

    Example:
        >>> import jax
        >>> from aidx.distill.teachers import network_teacher
        >>> from aidx.train import init_state
        >>> apply, optimizer = lambda w, x: x @ w, optax.sgd(0.5)
        >>> step = make_distill_step(apply, KnowledgeDistillationOptions(), optimizer)
        >>> state = init_state(jnp.zeros((2, 2)), optimizer, jax.random.key(0))
        >>> teacher = network_teacher(apply, jnp.array([[1.0, 0.0], [0.0, 1.0]]))
        >>> batch = {"inputs": jnp.eye(2)}
        >>> losses = []
        >>> for _ in range(20):
        ...     state, metrics = step(state, batch, teacher)
        ...     losses.append(metrics.loss.item())
        >>> losses[-1] < 0.1 * losses[0]
        True
    """
    return make_train_step(distill_loss_fn(apply, options), optimizer, **train_options)


def lm_distill_loss_fn(
    student: Forward,
    teacher: Forward,
    *,
    temperature: float = 1.0,
    alpha: float = 0.0,
    kind: Divergence | str = Divergence.FORWARD_KL,
    beta: float = 0.5,
    chunk: int = 4096,
    attend: Any = None,
) -> Callable[..., tuple]:
    """A loss between two decoders for `make_train_step`, without their logits (`fused`).

        L = alpha CE(student, next token) + (1 - alpha) T^2 D(teacher, student)

    Args:
        student: forward of the student.
        teacher: forward of the teacher, of one vocabulary with the student.
        temperature, alpha, kind, beta, chunk: as `linear_response_loss`.
        attend: of both; None is `no_cache_attend()`.

    Returns:
        `loss_fn(params, batch, key, teacher_params) -> (total, weight, sums)`; batch is a mapping
        with `tokens` i32 `[B, T + 1]`, and `weights` `[B, T]` of the targets `tokens[:, 1:]` where
        not all count, for example of `on_policy_batch`.  The sums `hard` and `soft` are reported.

    Raises:
        ValueError: alpha outside [0, 1], or what `linear_divergence` refuses.

    Example:
        >>> import jax
        >>> from aidx.models import LlamaConfig, Model, init_params
        >>> config = LlamaConfig(97, 32, 64, 1, 4, 2, 8)
        >>> model = Model(config, init_params(config, jax.random.key(0)))
        >>> loss_fn = lm_distill_loss_fn(model.forward, model.forward)
        >>> batch = {"tokens": jnp.ones((1, 5), jnp.int32)}
        >>> total, weight, _ = loss_fn(model.params, batch, jax.random.key(0), model.params)
        >>> abs(float(total)) < 1e-5, float(weight)
        (True, 4.0)
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"{alpha=} must lie between 0 and 1")
    attend = no_cache_attend() if attend is None else attend

    def loss_fn(params: Params, batch: Any, key: Array, teacher_params: Params) -> tuple:
        del key
        tokens, targets = batch["tokens"][:, :-1], batch["tokens"][:, 1:]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        read = lambda f, p: (
            f(p, tokens, positions, attend, None, hidden=True)[0],
            p.get("lm_head", p["embed"]),
        )
        ce, soft = linear_divergence(
            *read(student, params),
            *read(teacher, teacher_params),
            targets if alpha else None,
            kind=kind,
            temperature=temperature,
            beta=beta,
            chunk=chunk,
        )
        return mixed_sums(ce, soft, batch.get("weights"), alpha=alpha, temperature=temperature)

    return loss_fn
