"""Features of observations, for agents that are linear in them."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from aidx.typing import Array


def one_hot(observation: Array, size: int) -> Array:
    """A discrete observation as a unit vector: a linear agent is then a table.

    Args:
        observation: integers `[*B]`, 0 to size - 1; others give zeros.
        size: how many there are.

    Returns:
        f32 `[*B, size]`.

    Example:
        >>> one_hot(jnp.array([2, 0]), 3).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    return jax.nn.one_hot(observation, size, dtype=jnp.float32)


@dataclasses.dataclass(frozen=True)
class TileCoding:
    """Several grids over a box, each shifted by a part of a tile (Sutton and Barto, 2018, 9.5.4).

    Tiling t of `tilings` is shifted by `t (2 i + 1) / tilings` tiles along dimension i, modulo one
    tile: the shifts of one dimension are not those of another.  One feature per tiling is on.

    Attributes:
        low, high: the box; what lies outside is taken to its border.
        tiles: per dimension, how many tiles cover it.
        tilings: grids.

    Raises:
        ValueError: bounds or numbers that make no box.

    Example:
        >>> coding = TileCoding((0.0, 0.0), (1.0, 1.0), (4, 4), tilings=8)
        >>> coding.size, int(coding(jnp.array([0.3, 0.9])).sum())
        (200, 8)
    """

    low: tuple[float, ...]
    high: tuple[float, ...]
    tiles: tuple[int, ...]
    tilings: int = 8

    def __post_init__(self):
        for name in ("low", "high", "tiles"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.low) == len(self.high) == len(self.tiles) or not self.low:
            raise ValueError(f"{self.low=}, {self.high=} and {self.tiles=} differ in length")
        finite = all(map(math.isfinite, (*self.low, *self.high)))
        if not finite or not all(a < b for a, b in zip(self.low, self.high, strict=True)):
            raise ValueError(f"{self.low=} must lie below {self.high=}, both finite")
        if min(self.tiles) < 1 or self.tilings < 1:
            raise ValueError(f"{self.tiles=} and {self.tilings=} must be positive")

    @property
    def size(self) -> int:
        """F: features in all; a shifted grid needs one more tile per dimension."""
        return self.tilings * math.prod(n + 1 for n in self.tiles)

    def indices(self, observation: Array) -> Array:
        """The features that are on: `[*B, dimensions]` to i32 `[*B, tilings]`."""
        shape = (1,) * (observation.ndim - 1) + (-1,)
        low, high = (jnp.asarray(x, jnp.float32).reshape(shape) for x in (self.low, self.high))
        tiles = jnp.asarray(self.tiles, jnp.float32)
        scaled = jnp.clip((observation.astype(jnp.float32) - low) / (high - low), 0.0, 1.0)
        scaled = scaled * tiles.reshape(shape)
        odd = 2 * jnp.arange(len(self.tiles)) + 1
        shift = (jnp.arange(self.tilings)[:, None] * odd[None, :] / self.tilings) % 1.0
        shift = shift.reshape((1,) * (observation.ndim - 1) + shift.shape)
        cell = jnp.floor(scaled[..., None, :] + shift).astype(jnp.int32)
        cell = jnp.minimum(cell, jnp.asarray(self.tiles).reshape((1,) * observation.ndim + (-1,)))
        index = jnp.zeros(cell.shape[:-1], jnp.int32)
        for d, n in enumerate(self.tiles):
            index = index * (n + 1) + cell[..., d]
        each = self.size // self.tilings
        offsets = jnp.arange(self.tilings, dtype=jnp.int32) * each
        return index + offsets.reshape((1,) * (index.ndim - 1) + (-1,))

    def __call__(self, observation: Array) -> Array:
        """The features, `tilings` ones among zeros: `[*B, dimensions]` to f32 `[*B, F]`."""
        return jax.nn.one_hot(self.indices(observation), self.size, dtype=jnp.float32).sum(-2)
