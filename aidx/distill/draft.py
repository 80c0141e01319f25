"""Drafts for speculative decoding: how many of their tokens the target would take.

A drafted token is accepted with probability `min(1, p/q)`, hence a position accepts

    alpha = sum_v min(p_v, q_v) = 1 - TV(p, q)          (Leviathan et al., 2023, theorem 3.5)
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from aidx.cache import no_cache_attend
from aidx.distill.divergence import log_softmax, same_shape
from aidx.models import Model
from aidx.typing import Array


def acceptance(draft_logits: Array, target_logits: Array, *, temperature: float = 1.0) -> Array:
    """`sum_v min(p_v, q_v)` per position; at temperature 0, whether the two argmaxes are equal.

    Args:
        draft_logits: `[*B, V]`.
        target_logits: `[*B, V]`.
        temperature: of both.

    Returns:
        f32 `[*B]`.

    Raises:
        ValueError: shapes, or a negative temperature.

    Example:
        >>> draft, target = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.9, 0.1]))
        >>> round(float(acceptance(draft, target)), 3)
        0.6
    """
    same_shape(draft_logits, target_logits, "logits")
    if temperature < 0:
        raise ValueError(f"{temperature=} must not be negative")
    if temperature == 0:
        return (draft_logits.argmax(-1) == target_logits.argmax(-1)).astype(jnp.float32)
    p, q = (jnp.exp(log_softmax(x, temperature)) for x in (target_logits, draft_logits))
    return jnp.minimum(p, q).sum(-1)


def expected_tokens(alpha: float, drafted: int) -> float:
    """Tokens per verification of `drafted` tokens: `(1 - alpha^(k+1)) / (1 - alpha)`.

    Leviathan et al. (2023), eq. 1, if positions accepted independently.

    Raises:
        ValueError: alpha outside [0, 1] or drafted negative.

    Example:
        >>> round(expected_tokens(0.8, 4), 3), expected_tokens(1.0, 4)
        (3.362, 5.0)
    """
    if not 0 <= alpha <= 1 or drafted < 0:
        raise ValueError(f"{alpha=} must lie in [0, 1] and {drafted=} not be negative")
    return float(sum(alpha**i for i in range(drafted + 1)))


def measure_acceptance(
    draft: Model, target: Model, windows: Array | np.ndarray, *, temperatures=(0.0, 1.0)
) -> dict[float, float]:
    """The mean acceptance over held-out text, for each temperature.

    Both models read the text itself, so every position counts alike.

    Args:
        draft: its vocabulary is the target's.
        target: who verifies.
        windows: tokens i32 `[W, T]`, each window by itself.
        temperatures: of both models.

    Raises:
        ValueError: two vocabularies, or windows of another rank.

    Example:
        >>> from aidx.models import LlamaConfig, init_params
        >>> config = LlamaConfig(97, 32, 64, 1, 4, 2, 8)
        >>> model = Model(config, init_params(config, jax.random.key(0)))
        >>> {t: round(a, 3) for t, a in measure_acceptance(model, model, np.ones((2, 4))).items()}
        {0.0: 1.0, 1.0: 1.0}
    """
    if draft.vocab_size != target.vocab_size:
        raise ValueError(f"{draft.vocab_size=} differs from {target.vocab_size=}")
    windows = jnp.asarray(windows, jnp.int32)
    if windows.ndim != 2:
        raise ValueError(f"{windows.shape=} is not [W, T]")
    models = ((draft.forward, draft.params), (target.forward, target.params))
    forwards = tuple(f for f, _ in models)
    measured = _mean_acceptance(
        forwards, tuple(temperatures), tuple(params for _, params in models), windows
    )
    return {t: float(a) for t, a in zip(temperatures, measured, strict=True)}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _mean_acceptance(forwards, temperatures, params, windows):
    positions = jnp.arange(windows.shape[1], dtype=jnp.int32)[None]

    def one(window):
        logits = [
            f(p, window[None], positions, no_cache_attend(), None)[0]
            for f, p in zip(forwards, params, strict=True)
        ]
        return jnp.stack([acceptance(*logits, temperature=t).mean() for t in temperatures])

    return jax.lax.map(one, windows).mean(0)
