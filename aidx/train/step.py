"""`make_train_step`: one pure, jitted, donated function from (state, batch) to (state, metrics).

    loss = sum_i total_i / sum_i weight_i            over the microbatches i
    g    = d loss / d params                         in f32, clipped by its global norm
    u, o = optimizer(g);  params += u;  step += 1

A loss function returns a sum and its weight (usually the number of target tokens) instead of a
mean.  So N microbatches are one batch exactly, whatever their token counts.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ..typing import Array, Params, PyTree
from .state import TrainState

LossFn = Callable[..., tuple]
"""`loss_fn(params, batch, key, *rest) -> (total, weight)` or `(total, weight, sums)`, all f32
scalars; sums is a dict of what is reported, each divided by the weight of the whole batch."""


@flax.struct.dataclass
class Metrics:
    """What a step measured; all f32 or i32 scalars on the device, read when they are needed."""

    loss: Array  # total / weight
    weight: Array  # of the loss: target tokens
    grad_norm: Array  # of the gradient before clipping
    bad_leaf: Array  # i32, the first leaf of the gradient that is not finite; -1: all are
    param_norm: Array | None = None  # after the update
    update_norm: Array | None = None
    learning_rate: Array | None = None  # where the optimiser injects it as a hyperparameter
    loss_scale: Array | None = None  # that this step used
    extra: dict[str, Array] = flax.struct.field(default_factory=dict)  # sums / weight


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    microbatches: int = 1,
    clip_norm: float | None = None,
    compute_dtype: Any = None,
    ema_decay: float | None = None,
    skip_nonfinite: bool = True,
    norms: bool = True,
    update_args: Callable[[PyTree], Mapping[str, Any]] | None = None,
    on_gradients: Callable[[Params, Array], None] | None = None,
    jit: bool = True,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """`step(state, batch, *rest) -> (state, metrics)`; state is donated.

    Args:
      loss_fn: `loss_fn(params, batch, key, *rest) -> (total, weight)` or `(total, weight, sums)`.
        `rest` is what the step is given beyond its batch and is neither trained, split nor
        donated: a teacher's parameters, the base of a LoRA.  `key` is `fold_in(fold_in(state.key,
        state.step), microbatch)`.
      optimizer: of optax.  With `optax.inject_hyperparams` the metrics tell the learning rate.
      microbatches: N; the leading axis of every leaf of the batch is split into N parts which are
        computed one after another.  Part i has the rows `i::N`, so that an axis sharded over
        devices stays where it is.
      clip_norm: the global norm that the gradient is scaled down to (Pascanu et al., 2013).
      compute_dtype: the parameters are cast to it for the loss (bfloat16, float16); gradients are
        accumulated, and the update made, in the state's own dtype.  float16 wants a loss scale.
      ema_decay: d of `ema = d * ema + (1 - d) * params`; the state must have been made with ema.
      skip_nonfinite: leave parameters and optimiser as they were where a gradient is not finite.
        A loss scale always does.
      norms: tell the norms of the parameters and of the update.  They cost 12 bytes of memory
        traffic a parameter, where an AdamW step has some 40 (XLA writes the update down for them).
      update_args: makes of the batch keyword arguments for `optimizer.update`.
      on_gradients: called while tracing with the clipped gradient and the step's number: what it
        stages (a histogram's callback) runs with every step.
      jit: compile, and donate the state.

    Raises:
      ValueError: microbatches below 1, a clip_norm that is not positive, an ema_decay outside
        [0, 1); when traced: a batch that microbatches does not divide, or a state with an average
        but no decay or the other way round.
      TypeError: compute_dtype is not floating-point; when traced: what loss_fn returns.

    References:
      Micikevicius et al., Mixed Precision Training, 2018.

    >>> from aidx.train import init_state
    >>> def loss_fn(params, batch, key):
    ...     error = batch["x"] @ params["w"] - batch["y"]
    ...     return (error**2).sum(), error.size
    >>> optimizer = optax.sgd(0.1)
    >>> step = make_train_step(loss_fn, optimizer, microbatches=2, clip_norm=1.0)
    >>> state = init_state({"w": jnp.zeros(2)}, optimizer, jax.random.key(0))
    >>> state, metrics = step(state, {"x": jnp.eye(2), "y": jnp.ones(2)})
    >>> int(state.step), metrics.loss.item()
    (1, 1.0)
    """
    if microbatches < 1:
        raise ValueError(f"{microbatches=} must be positive")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"{clip_norm=} must be positive")
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"{ema_decay=} must lie in [0, 1)")
    if compute_dtype is not None and not jnp.issubdtype(compute_dtype, jnp.floating):
        raise TypeError(f"{compute_dtype=} is not a floating-point dtype")
    optimizer = optax.with_extra_args_support(optimizer)

    def train_step(state: TrainState, batch: PyTree, *rest: Any) -> tuple[TrainState, Metrics]:
        if (state.ema is None) != (ema_decay is None):
            raise ValueError(f"{ema_decay=} but the state has ema={state.ema is not None}")
        scale = state.loss_scale.scale if state.loss_scale else jnp.float32(1)
        with jax.named_scope("gradient"):
            grads, total, weight, sums = weighted_gradients(
                loss_fn,
                cast_floating(state.params, compute_dtype),
                batch,
                jax.random.fold_in(state.key, state.step),
                rest,
                microbatches=microbatches,
                scale=scale,
                like=state.params,
            )
        with jax.named_scope("clip"):
            grads, grad_norm, bad = clip(grads, clip_norm)
        if on_gradients is not None:
            on_gradients(grads, state.step)
        with jax.named_scope("optimizer"):
            extra = update_args(batch) if update_args else {}
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra)
            params = optax.apply_updates(state.params, updates)
        new = dataclasses.replace(state, params=params, opt_state=opt_state)
        if ema_decay is not None:
            ema: Any = optax.incremental_update(params, cast(Any, state.ema), 1 - ema_decay)
            new = dataclasses.replace(new, ema=ema)
        if skip_nonfinite or state.loss_scale:
            new = jax.tree.map(lambda a, b: jnp.where(bad < 0, a, b), new, state)
        if state.loss_scale:
            new = dataclasses.replace(new, loss_scale=state.loss_scale.adjust(bad < 0))
        safe = jnp.where(weight > 0, weight, 1)
        with jax.named_scope("metrics"):
            metrics = Metrics(
                loss=total / safe,
                weight=weight,
                grad_norm=grad_norm,
                bad_leaf=bad,
                param_norm=global_norm(new.params) if norms else None,
                update_norm=global_norm(updates) if norms else None,
                learning_rate=learning_rate_of(opt_state),
                loss_scale=scale if state.loss_scale else None,
                extra=jax.tree.map(lambda s: s / safe, sums),
            )
        return dataclasses.replace(new, step=state.step + 1), metrics

    return jax.jit(train_step, donate_argnums=0) if jit else train_step


def weighted_gradients(
    loss_fn: LossFn,
    params: Params,
    batch: PyTree,
    key: Array,
    rest: tuple = (),
    *,
    microbatches: int = 1,
    scale: Array | float = 1.0,
    like: Params | None = None,
) -> tuple[Params, Array, Array, dict[str, Array]]:
    """`d(sum_i total_i / sum_i weight_i) / d params`, and the sums.

    A microbatch is differentiated as its own mean times `scale`: with f16 gradients the sum over
    tokens would overflow.  It then counts with its share of the weight, in f32.

    Args:
      loss_fn: see `make_train_step`.
      params: what is differentiated, in the dtype of the computation.
      batch: pytree of arrays `[B, ...]`.
      key: of this step.
      rest: further arguments of loss_fn.
      microbatches: N, divides B.
      scale: of the loss.
      like: the tree whose dtypes the gradients take; None is params.

    Returns:
      `(gradients, total, weight, sums)`, the gradients unscaled.

    Raises:
      ValueError: N does not divide B.
      TypeError: what loss_fn returns.

    >>> loss_fn = lambda w, x, key: (((w * x) ** 2).sum(), (x > 0).sum())
    >>> grads, total, weight, _ = weighted_gradients(
    ...     loss_fn, jnp.array(1.0), jnp.array([1.0, 2.0, 0.0, 3.0]), jax.random.key(0),
    ...     microbatches=2)
    >>> f"{grads.item():.3f}", total.item(), weight.item()
    ('9.333', 14.0, 3.0)
    """
    like = params if like is None else like

    def scaled(p, part, i):
        total, weight, sums = checked(loss_fn(p, part, jax.random.fold_in(key, i), *rest))
        weight = jax.lax.stop_gradient(weight)
        mean = total / jnp.where(weight > 0, weight, 1)
        return mean * scale, (total, weight, sums)

    gradient = jax.grad(scaled, has_aux=True)
    if microbatches == 1:
        grads, (total, weight, sums) = gradient(params, batch, 0)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype) / scale, grads, like)
        return grads, total, weight, sums

    parts = split_batch(batch, microbatches)
    shapes = jax.eval_shape(gradient, params, jax.tree.map(lambda x: x[0], parts), 0)
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)

    def add(carry, indexed):
        g, (total, weight, sums) = gradient(params, *indexed)
        term = jax.tree.map(lambda x: x.astype(jnp.float32) * (weight / scale), g)
        return jax.tree.map(jnp.add, carry, (term, (total, weight, sums))), None

    indexed = (parts, jnp.arange(microbatches, dtype=jnp.int32))
    (grads, (total, weight, sums)), _ = jax.lax.scan(add, zeros, indexed)
    safe = jnp.where(weight > 0, weight, 1)
    grads = jax.tree.map(lambda g, p: (g / safe).astype(p.dtype), grads, like)
    return grads, total, weight, sums


def checked(returned: Any) -> tuple[Array, Array, dict[str, Array]]:
    """What a loss function returned, as (total, weight, sums) in f32.

    >>> checked((jnp.ones(()), 3))[1].item()
    3.0
    """
    if not isinstance(returned, tuple) or len(returned) not in (2, 3):
        raise TypeError(
            f"loss_fn must return (total, weight) or (total, weight, sums), not {type(returned)}"
        )
    total, weight, sums = (*returned, {})[:3]
    total, weight = jnp.asarray(total, jnp.float32), jnp.asarray(weight, jnp.float32)
    if total.shape or weight.shape:
        raise TypeError(f"loss_fn must return scalars: {total.shape=}, {weight.shape=}")
    if not isinstance(sums, Mapping):
        raise TypeError(f"the sums of loss_fn must be a dict, not {type(sums)}")
    return total, weight, {name: jnp.asarray(s, jnp.float32) for name, s in sums.items()}


def split_batch(batch: PyTree, n: int) -> PyTree:
    """Every leaf `[B, ...]` as `[n, B / n, ...]`; part i has the rows `i::n`.

    Raises:
      ValueError: n does not divide B.

    >>> split_batch(jnp.arange(4), 2).tolist()
    [[0, 2], [1, 3]]
    """

    def split(path, x):
        if not x.shape or x.shape[0] % n:
            raise ValueError(
                f"batch{jax.tree_util.keystr(path)} of shape {x.shape} is not {n} microbatches"
            )
        return jnp.swapaxes(x.reshape(x.shape[0] // n, n, *x.shape[1:]), 0, 1)

    return jax.tree_util.tree_map_with_path(split, batch)


def cast_floating(tree: PyTree, dtype: Any) -> PyTree:
    """The tree with its floating-point leaves in another dtype; None leaves it as it is.

    >>> {k: str(v.dtype) for k, v in cast_floating(
    ...     {"w": jnp.ones(2), "i": jnp.arange(2)}, jnp.bfloat16).items()}
    {'i': 'int32', 'w': 'bfloat16'}
    """
    if dtype is None:
        return tree
    cast = lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x
    return jax.tree.map(cast, tree)


def clip(grads: Params, max_norm: float | None) -> tuple[Params, Array, Array]:
    """`g * min(1, max_norm / |g|)`; with it |g| and the first leaf that is not finite, or -1.

    The norm is the root of per-leaf sums of squares, so looking for NaN and Inf costs nothing.

    >>> grads, norm, bad = clip({"a": jnp.array([3.0]), "b": jnp.array([4.0])}, 1.0)
    >>> f"{grads['b'].item():.2f}", norm.item(), bad.item()
    ('0.80', 5.0, -1)
    """
    squares = leaf_squares(grads)
    odd = ~jnp.isfinite(squares)
    bad = jnp.where(odd.any(), jnp.argmax(odd).astype(jnp.int32), -1)
    norm = jnp.sqrt(squares.sum())
    if max_norm is None:
        return grads, norm, bad
    factor = jnp.minimum(1.0, max_norm / jnp.maximum(norm, 1e-30))
    return jax.tree.map(lambda g: g * factor.astype(g.dtype), grads), norm, bad


def leaf_squares(tree: PyTree) -> Array:
    """Each leaf's sum of squares, f32 `[leaves]`.

    >>> leaf_squares([jnp.array([3.0, 4.0]), jnp.ones(2)]).tolist()
    [25.0, 2.0]
    """
    return jnp.stack([jnp.sum(jnp.square(x.astype(jnp.float32))) for x in jax.tree.leaves(tree)])


def global_norm(tree: PyTree) -> Array:
    """The Euclidean norm of all leaves together, accumulated in f32.

    >>> global_norm([jnp.array([3.0]), jnp.array([4.0], jnp.bfloat16)]).item()
    5.0
    """
    return jnp.sqrt(leaf_squares(tree).sum())


def learning_rate_of(opt_state: PyTree) -> Array | None:
    """The learning rate that `optax.inject_hyperparams` left in an optimiser's state, or None.

    >>> optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.5)
    >>> learning_rate_of(optimizer.init({"w": jnp.ones(2)})).item()
    0.5
    """
    for node in jax.tree.leaves(opt_state, is_leaf=lambda n: hasattr(n, "hyperparams")):
        rate = getattr(node, "hyperparams", {}).get("learning_rate")
        if rate is not None:
            return rate
    return None


def leaf_name(tree: PyTree, index: int) -> str:
    """The name of leaf `index` of a tree, as `Metrics.bad_leaf` counts them.

    >>> leaf_name({"a": 1, "layers": ({"w": 2},)}, 1)
    'layers/0/w'
    """
    path, _ = jax.tree_util.tree_leaves_with_path(tree)[index]
    return jax.tree_util.keystr(path, simple=True, separator="/")
