"""Rotary position embedding and the ways in which it is stretched past its training length.

Frequencies are computed once, on the host in float64, from static configuration; the angles of a
step's positions are computed once per step and shared by all layers:

    inv_freq, factor = rope_frequencies(head_dim, rope)
    cos, sin = rope_angles(positions, inv_freq, factor)
    q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

ROPE_TYPES = ("default", "linear", "dynamic", "llama3", "yarn")


@dataclasses.dataclass(frozen=True)
class Rope:
    """Static description of a rotary embedding; the names are those of Hugging Face's config.json.

    Attributes:
      theta: base of the wavelengths.
      type: `default`; `linear` (Chen 2023: positions divided by factor); `dynamic` (NTK-aware, the
        base grows with the context); `llama3` (long wavelengths divided by factor, short ones
        kept); `yarn` (Peng 2023: the same split by rotations, and warmer attention).
      factor: how many times the original context is stretched.
      original_max_position_embeddings: the context of training; needed by all but `default` and
        `linear`.
      low_freq_factor, high_freq_factor: of `llama3`: the wavelengths between
        `original / high` and `original / low` are interpolated.
      beta_fast, beta_slow: of `yarn`: rotations within the original context above which a
        frequency is kept, below which it is divided by factor.
      attention_factor: of `yarn`: multiplies cos and sin; None derives it from factor and mscale.
      mscale, mscale_all_dim: of `yarn`, as DeepSeek uses them.
      truncate: of `yarn`: whether the borders of the ramp are rounded outwards.

    Raises:
      ValueError: unknown type, or a value that the type cannot use.

    >>> Rope(type="linear", factor=4.0).theta
    10000.0
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self):
        if self.type not in ROPE_TYPES:
            raise ValueError(f"rope type {self.type!r} is not one of {', '.join(ROPE_TYPES)}")
        if not self.theta > 0:
            raise ValueError(f"rope theta={self.theta} must be positive")
        if not self.factor >= 1:
            raise ValueError(f"rope factor={self.factor} must be at least 1")
        needs_original = self.type in ("dynamic", "llama3", "yarn")
        if needs_original and not self.original_max_position_embeddings:
            raise ValueError(f"rope type {self.type!r} needs original_max_position_embeddings")
        if self.type == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError(f"rope {self.low_freq_factor=} must be below {self.high_freq_factor=}")

    def longest_context(self, max_position_embeddings: int) -> int:
        """Tokens that the rotation can tell apart as training showed it, as vLLM derives them.

        `linear` and `dynamic` stretch the context that config.json says, `yarn` that of its
        training; with `llama3`, config.json says the stretched one.

        >>> Rope(type="linear", factor=4.0).longest_context(64)
        256
        """
        if self.type in ("linear", "dynamic"):
            return int(max_position_embeddings * self.factor)
        if self.type == "yarn":
            return int((self.original_max_position_embeddings or 0) * self.factor)
        return max_position_embeddings


def rope_frequencies(
    head_dim: int, rope: Rope, *, max_len: int | None = None
) -> tuple[np.ndarray, float]:
    """Radians per position of each pair of features, and the factor on cos and sin.

    `default`: `inv_freq[i] = theta^(-2i / H)`, factor 1; the other types change these as `Rope`
    says.

    Args:
      head_dim: H, even.
      rope: the static description.
      max_len: the longest context that will be served; only `dynamic` uses it (at most
        original_max_position_embeddings means unscaled), so that the frequencies stay fixed and
        keys in a cache stay right.

    Returns:
      `(inv_freq [H/2] float32, factor)`, on the host.

    Raises:
      ValueError: head_dim is odd or not positive.

    References:
      Su et al., RoFormer, 2021; Chen et al., Position Interpolation, 2023; Peng et al., YaRN, 2023.

    >>> inv_freq, factor = rope_frequencies(4, Rope(theta=100.0))
    >>> [f"{f:.2f}" for f in inv_freq], factor
    (['1.00', '0.10'], 1.0)
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"rope rotates pairs of features: {head_dim=} must be even and positive")
    theta, factor = rope.theta, 1.0
    if rope.type == "dynamic":
        original = rope.original_max_position_embeddings or 0
        stretch = max(max_len or 0, original) / original
        growth = rope.factor * stretch - (rope.factor - 1)
        theta = theta * growth ** (head_dim / (head_dim - 2)) if growth != 1 else theta
    inv_freq = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.type == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.type == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    elif rope.type == "yarn":
        inv_freq, factor = _yarn(inv_freq, rope, head_dim), _yarn_factor(rope)
    return inv_freq.astype(np.float32), factor


def _llama3(inv_freq: np.ndarray, rope: Rope) -> np.ndarray:
    """Long waves are stretched, short ones kept, those between weighted by rotations."""
    rotations = (rope.original_max_position_embeddings or 0) * inv_freq / (2 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    keep = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return keep * inv_freq + (1 - keep) * inv_freq / rope.factor


def _yarn(inv_freq: np.ndarray, rope: Rope, head_dim: int) -> np.ndarray:
    """A linear ramp over the feature index between the two rotation borders."""

    original = rope.original_max_position_embeddings or 0

    def index_of(rotations: float) -> float:
        wavelength = original / rotations
        return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = index_of(rope.beta_fast), index_of(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # the reference's guard against an empty ramp
    stretch = np.clip((np.arange(head_dim // 2) - low) / (high - low), 0.0, 1.0)
    return (1 - stretch) * inv_freq + stretch * inv_freq / rope.factor


def _yarn_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return float(rope.attention_factor)

    def scale(m: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * m * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def rope_angles(
    positions: jax.Array, inv_freq: np.ndarray | jax.Array, factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """`(factor * cos(p * inv_freq), factor * sin(p * inv_freq))` of every position.

    Args:
      positions: `[*B, T]` integers.
      inv_freq: `[H/2]` radians per position, from `rope_frequencies`.
      factor: multiplies both.

    Returns:
      cos and sin, float32 `[*B, T, H/2]`.

    >>> cos, sin = rope_angles(jnp.arange(3), np.ones(2, np.float32))
    >>> cos.shape, float(sin[0, 0])
    ((3, 2), 0.0)
    """
    with jax.named_scope("rope_angles"):
        row = jnp.asarray(inv_freq, jnp.float32).reshape((1,) * positions.ndim + (-1,))
        angles = positions[..., None].astype(jnp.float32) * row
        return factor * jnp.cos(angles), factor * jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate feature i with feature i + H/2 (the pairing of Hugging Face's checkpoints).

    `(x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin)` in float32.

    Args:
      x: `[*B, T, N, H]` queries or keys.
      cos, sin: `[*B, T, H/2]` from `rope_angles`.

    Returns:
      `[*B, T, N, H]` in the dtype of x.

    Raises:
      ValueError: the shapes do not go together.

    >>> x = jnp.array([[[1.0, 0.0]]])  # T = N = 1, H = 2
    >>> cos, sin = rope_angles(jnp.array([1]), np.ones(1, np.float32))
    >>> [f"{y:.4f}" for y in apply_rope(x, cos, sin).ravel()]
    ['0.5403', '0.8415']
    """
    if x.ndim < 3 or cos.shape != (*x.shape[:-2], x.shape[-1] // 2) or sin.shape != cos.shape:
        raise ValueError(f"{x.shape=} needs cos and sin [*B, T, H/2]: {cos.shape=}, {sin.shape=}")
    with jax.named_scope("rope"):
        x1, x2 = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = cos[..., None, :], sin[..., None, :]
        return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x.dtype)
