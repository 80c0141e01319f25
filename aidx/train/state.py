"""What a training step needs and leaves: parameters, optimiser, counters, the key."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from ..typing import Array, Params, PyTree

MAX_LOSS_SCALE = 2.0**24


@flax.struct.dataclass
class LossScale:
    """The factor that keeps f16 gradients above underflow, found while training.

    It halves when a gradient is not finite and doubles after `growth_interval` finite steps.

    References:
      Micikevicius et al., Mixed Precision Training, 2018.

    >>> loss_scale(1024.0).adjust(jnp.array(False)).scale.item()
    512.0
    """

    scale: Array  # [] f32
    good_steps: Array  # [] i32, finite steps since the last change
    growth_interval: int = flax.struct.field(pytree_node=False, default=2000)

    def adjust(self, finite: Array) -> "LossScale":
        """The scale for the next step, given whether this step's gradients were finite."""
        grown = self.good_steps + 1 >= self.growth_interval
        larger = jnp.where(grown, jnp.minimum(self.scale * 2, MAX_LOSS_SCALE), self.scale)
        scale = jnp.where(finite, larger, jnp.maximum(self.scale / 2, 1.0))
        good = jnp.where(finite & ~grown, self.good_steps + 1, 0)
        return LossScale(scale, good, self.growth_interval)


def loss_scale(initial: float = 2.0**15, growth_interval: int = 2000) -> LossScale:
    """A dynamic loss scale for float16.

    Args:
      initial: the first factor.
      growth_interval: finite steps after which it doubles.

    Raises:
      ValueError: a scale outside [1, 2^24] or an interval below 1.

    >>> loss_scale().scale.item()
    32768.0
    """
    if not 1 <= initial <= MAX_LOSS_SCALE:
        raise ValueError(f"{initial=} must lie in [1, {MAX_LOSS_SCALE}]")
    if growth_interval < 1:
        raise ValueError(f"{growth_interval=} must be positive")
    return LossScale(jnp.float32(initial), jnp.int32(0), growth_interval)


@flax.struct.dataclass
class TrainState:
    """State of a run: with the data's cursor (a step number), all that resuming needs.

    Every step derives its key by `fold_in(key, step)`, so a run that is resumed draws what the
    uninterrupted one would have drawn.
    """

    params: Params  # master weights, f32 unless the caller chose otherwise
    opt_state: PyTree
    step: Array  # [] i32, steps taken (updates skipped for non-finite gradients included)
    key: Array  # typed PRNG key
    ema: Params | None = None  # moving average of params, in their dtype
    loss_scale: LossScale | None = None


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: Array,
    *,
    ema: bool = False,
    loss_scale: LossScale | None = None,
) -> TrainState:
    """The state before the first step.

    The parameters are copied: the step donates its state, and the caller's arrays stay valid.

    Args:
      params: what is trained; a pytree of float arrays.
      optimizer: of optax; its moments take the parameters' dtype.
      key: typed PRNG key, of `jax.random.key`.
      ema: keep a moving average of the parameters, which starts at them.
      loss_scale: for float16 compute; see `loss_scale`.

    Raises:
      TypeError: the key is not a typed one, or a parameter is not floating-point.

    >>> state = init_state({"w": jnp.ones(3)}, optax.sgd(0.1), jax.random.key(0), ema=True)
    >>> int(state.step), state.ema["w"].shape
    (0, (3,))
    """
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape:
        raise TypeError(f"key is {key.dtype}{key.shape}, not a typed scalar key (jax.random.key)")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise TypeError(f"parameter {jax.tree_util.keystr(path)} has dtype {leaf.dtype}")
    copy = lambda tree: jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
    params = copy(params)
    return TrainState(
        params=params,
        opt_state=jax.jit(optimizer.init)(params),
        step=jnp.zeros((), jnp.int32),
        key=jnp.array(key, copy=True),
        ema=copy(params) if ema else None,
        loss_scale=copy(loss_scale),
    )
