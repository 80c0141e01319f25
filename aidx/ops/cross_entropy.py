"""Softmax cross-entropy of logits, with its gradient written out so that nothing is made twice."""

import jax
import jax.numpy as jnp


def softmax_cross_entropy(
    logits: jax.Array, targets: jax.Array, *, label_smoothing: float = 0.0, z_loss: float = 0.0
) -> tuple[jax.Array, jax.Array]:
    """The loss of every row and its log-normaliser, for target y, smoothing e and weight z:

        loss = (1 - e) * (lse - l_y) + e * (lse - mean(l)) + z * lse^2,   lse = log sum exp(l)

    Args:
      logits: `[..., V]`, any float dtype; the arithmetic is float32.
      targets: i32 `[...]`; where one is outside of 0 to V - 1 the loss is 0.
      label_smoothing: e in [0, 1), the share of the target spread over all of V (Szegedy 2016).
      z_loss: z, keeps the normaliser near one (PaLM 2022: 1e-4).

    Returns:
      `(loss, lse)`, float32 `[...]`.

    Raises:
      ValueError: shapes that do not go together, or an option out of range.

    >>> loss, lse = softmax_cross_entropy(jnp.zeros((2, 4)), jnp.array([0, -1]))
    >>> [f"{x:.4f}" for x in loss], f"{lse[1]:.4f}"
    (['1.3863', '0.0000'], '1.3863')
    """
    check(logits, targets, label_smoothing, z_loss)
    with jax.named_scope("cross_entropy"):
        x = logits.astype(jnp.float32)
        lse = jax.nn.logsumexp(x, axis=-1)
        picked = jnp.sum(jnp.where(_hits(logits, targets), x, 0), axis=-1)
        total = jnp.sum(x, axis=-1) if label_smoothing else None
        V = logits.shape[-1]
        return loss_of(V, targets, lse, picked, total, label_smoothing, z_loss), lse


def loss_of(V, targets, lse, picked, total, label_smoothing: float, z_loss: float) -> jax.Array:
    """The loss of rows from their log-normaliser, the target's logit and the sum of all.

    >>> float(loss_of(2, jnp.array(1), jnp.array(3.0), jnp.array(1.0), None, 0.0, 0.0))
    2.0
    """
    loss = lse - (1 - label_smoothing) * picked + z_loss * lse**2
    if total is not None:
        loss = loss - label_smoothing / V * total
    return jnp.where((targets >= 0) & (targets < V), loss, 0.0)


def gradient_factors(V, targets, lse, cotangents, label_smoothing: float, z_loss: float):
    """`(power, hit, every)`, float32 `[...]` (every None without smoothing), so that

        d l = power * exp(l - lse) - hit * onehot(y) - every

    >>> d = jnp.array(1.0), jnp.array(0.0)  # of the loss and of lse
    >>> power, hit, every = gradient_factors(2, jnp.array(1), 0.0, d, 0.5, 0.0)
    >>> float(power), float(hit), float(every)
    (1.0, 0.5, 0.25)
    """
    d_loss, d_lse = cotangents
    d_loss = jnp.where((targets >= 0) & (targets < V), d_loss, 0.0)
    power = d_loss * (1 + 2 * z_loss * lse) + d_lse
    every = d_loss * (label_smoothing / V) if label_smoothing else None
    return power, d_loss * (1 - label_smoothing), every


def softmax_cross_entropy_backward(operands, outputs, cotangents, *, label_smoothing, z_loss):
    """The cotangents of (logits, targets), from the saved log-normaliser: one read of the logits.

    >>> logits, targets = jnp.zeros((1, 2)), jnp.array([0])
    >>> outputs = softmax_cross_entropy(logits, targets)
    >>> given = dict(label_smoothing=0.0, z_loss=0.0)
    >>> one = jnp.ones(1)
    >>> softmax_cross_entropy_backward((logits, targets), outputs, (one, 0 * one), **given)[0]
    Array([[-0.5,  0.5]], dtype=float32)
    """
    (logits, targets), (_, lse) = operands, outputs
    with jax.named_scope("cross_entropy_backward"):
        factors = gradient_factors(
            logits.shape[-1], targets, lse, cotangents, label_smoothing, z_loss
        )
        column = lambda x: x[..., None]
        power, hit, *every = (column(x) for x in factors if x is not None)
        d = power * jnp.exp(logits.astype(jnp.float32) - column(lse))
        d = d - jnp.where(_hits(logits, targets), hit, 0.0)
        d = d - every[0] if every else d
        return d.astype(logits.dtype), None


def _hits(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Where a logit is its row's target's: a comparison fuses with what reads it, a gather not."""
    index = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return index == targets[..., None]


def check(logits: jax.Array, targets: jax.Array, label_smoothing: float, z_loss: float) -> None:
    """Raise ValueError for arguments that do not go together.

    >>> check(jnp.zeros((2, 4)), jnp.zeros(2, jnp.int32), 0.1, 1e-4)
    """
    if targets.shape != logits.shape[:-1] or not jnp.issubdtype(targets.dtype, jnp.integer):
        given = f"{targets.dtype}{targets.shape}"
        raise ValueError(f"{logits.shape=} needs integers {logits.shape[:-1]}, not {given}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{label_smoothing=} must lie in [0, 1)")
    if not z_loss >= 0:
        raise ValueError(f"{z_loss=} must not be negative")
