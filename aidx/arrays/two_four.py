"""2:4 semi-structured matrices: of every four neighbours along the first axis two are stored.

A weight takes half its bytes plus 2 bits per stored value.  It is spread out again a tile at a time
inside the product, so the dense matrix never exists; what is promised is memory, not speed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from aidx.ops import registry

from .formats import Array
from .product import accumulator

TILE = 1024  # rows of the weight that are spread out at a time


@struct.dataclass
class TwoFour:
    """`[D, F]` as two of every four values along D, and their places.

    >>> import jax.numpy as jnp
    >>> w = TwoFour.from_dense(jnp.array([[1.0], [-4.0], [2.0], [0.5]]))
    >>> w.to_dense().ravel().tolist()
    [0.0, -4.0, 2.0, 0.0]
    >>> (jnp.ones((1, 4)) @ w).tolist()
    [[-2.0]]
    """

    values: Array  # [D // 4, 2, F]
    places: Array  # [ceil(D // 8), F] u8: two groups of two 2-bit places in a byte
    shape: tuple[int, int] = struct.field(pytree_node=False)
    __array_ufunc__ = None

    @classmethod
    def from_dense(cls, w: Any) -> TwoFour:
        """The two largest magnitudes of every four; see `two_four`."""
        return two_four(w)

    @property
    def dtype(self) -> Any:
        """The dtype of the values."""
        return self.values.dtype

    @property
    def nbytes(self) -> int:
        """Bytes that are stored."""
        return self.values.nbytes + self.places.nbytes

    def to_dense(self) -> Array:
        """`[D, F]` with zeros where nothing is stored."""
        return _spread(self.values, unpack_places(self.places, self.values.shape[0]))

    def with_values(self, values: Array) -> TwoFour:
        """The same places with other values.

        Raises:
          ValueError: another shape.
        """
        if values.shape != self.values.shape:
            raise ValueError(f"{values.shape=} for places of {self.values.shape}")
        return self.replace(values=values)  # pyright: ignore[reportAttributeAccessIssue]

    def __rmatmul__(self, x: Any) -> Array:
        return two_four_matmul(jnp.asarray(x), self)


def two_four(w: Any) -> TwoFour:
    """The two largest magnitudes of every four neighbours along the first axis of w `[D, F]`.

    Equal magnitudes keep the first; the gradient goes to the values that are kept.

    Raises:
      ValueError: w is not a matrix, or 4 does not divide D.

    Mishra et al., Accelerating Sparse Deep Neural Networks, 2021.

    >>> import jax.numpy as jnp
    >>> two_four(jnp.arange(8.0).reshape(8, 1)).values.ravel().tolist()
    [2.0, 3.0, 6.0, 7.0]
    """
    w = jnp.asarray(w)
    if w.ndim != 2 or w.shape[0] % 4:
        raise ValueError(f"2:4 takes [D, F] with D a multiple of 4, not {w.shape}")
    return _two_four(w)


@jax.jit
def _two_four(w: Array) -> TwoFour:
    D, F = w.shape
    groups = w.reshape(D // 4, 4, F)
    order = jnp.argsort(-jnp.abs(groups), axis=1, stable=True)[:, :2]
    places = jnp.sort(order, axis=1)
    values = jnp.take_along_axis(groups, places, axis=1)
    return TwoFour(values, pack_places(places), (D, F))


def pack_places(places: Array) -> Array:
    """Places `[groups, 2, F]` in 0..3 as u8 `[ceil(groups / 2), F]`.

    >>> import jax.numpy as jnp
    >>> pack_places(jnp.array([[[1], [3]], [[0], [2]]])).tolist()
    [[141]]
    """
    p = places.astype(jnp.uint8)
    p = jnp.pad(p, ((0, p.shape[0] % 2), (0, 0), (0, 0)))
    nibble = p[:, 0] | (p[:, 1] << 2)
    return nibble[0::2] | (nibble[1::2] << 4)


def unpack_places(packed: Array, groups: int) -> Array:
    """i32 `[groups, 2, F]`: what `pack_places` packed.

    >>> import jax.numpy as jnp
    >>> unpack_places(jnp.array([[141]], jnp.uint8), 2).ravel().tolist()
    [1, 3, 0, 2]
    """
    shifts = jnp.array([0, 2, 4, 6], jnp.uint8).reshape(1, 4, 1)
    fields = (packed[:, None] >> shifts) & 3
    return fields.reshape(-1, 2, packed.shape[-1])[:groups].astype(jnp.int32)


def two_four_matmul(
    x: Array, w: TwoFour, *, implementation: registry.ImplementationChoice = None
) -> Array:
    r"""`x @ w` for dense x `[..., D]`: `[..., F]`, accumulated in f32 at least.

    w is spread out a tile at a time: in shared memory by `mosaic_gpu` (CUDA; bf16 and f16, D a
    multiple of 512 and F of 64), 1024 rows at once by `xla`, which also computes the gradients.
    The gradient of w is a `TwoFour` with the same places.

    Args:
      x: `[..., D]`.
      w: `[D, F]`.
      implementation: None, a name or a sequence of names of op "two_four".

    Raises:
      ValueError: sizes that do not fit.

    >>> import jax.numpy as jnp
    >>> two_four_matmul(jnp.ones((2, 4)), two_four(jnp.eye(4))).shape
    (2, 4)
    """
    if x.ndim == 0 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"sizes differ: {x.shape=} @ {w.shape=}")
    names = tuple(entry.name for entry in registry.resolve("two_four", implementation))
    return _matmul(x, w, names)


@functools.partial(jax.jit, static_argnames=("names",))
def _matmul(x: Array, w: TwoFour, names: tuple[str, ...]) -> Array:
    dtype = jnp.result_type(x, w.values)
    flat = x.reshape(-1, x.shape[-1]).astype(dtype)
    out = _product(flat, w.values.astype(dtype), w.places, names)
    return out.reshape(*x.shape[:-1], w.shape[1])


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _product(x: Array, values: Array, places: Array, names: tuple[str, ...]) -> Array:
    """`x [T, D] @ w`; linear in x and in the values, with XLA's product for tangents."""

    @jax.custom_batching.custom_vmap
    def apply(x: Array, values: Array, places: Array) -> Array:
        return registry.dispatch(registry.Call("two_four", names, None), (x, values, places))

    @apply.def_vmap
    def _(size: int, batched: Any, x: Array, values: Array, places: Array) -> tuple[Array, bool]:
        if tuple(batched) == (True, False, False):  # more rows of x
            return apply(x.reshape(-1, x.shape[-1]), values, places).reshape(
                size, x.shape[1], -1
            ), True
        axes = tuple(0 if b else None for b in batched)
        return jax.vmap(_by_tiles, in_axes=axes)(x, values, places), True

    return apply(x, values, places)


@functools.partial(_product.defjvp, symbolic_zeros=True)
def _product_jvp(names: tuple[str, ...], primals: Any, tangents: Any) -> tuple[Array, Array]:
    (x, values, places), (dx, dvalues, _) = primals, tangents
    out = _product(x, values, places, names)
    terms = []
    if not isinstance(dx, jax.custom_derivatives.SymbolicZero):
        terms.append(_by_tiles(dx, values, places))
    if not isinstance(dvalues, jax.custom_derivatives.SymbolicZero):
        terms.append(_by_tiles(x, dvalues, places))
    return out, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(out)


def _by_tiles(x: Array, values: Array, places: Array) -> Array:
    """The product in `jax.numpy`."""
    dtype, (D, F) = x.dtype, (x.shape[1], values.shape[-1])
    acc = accumulator(dtype)
    # D in as few equal tiles of at most TILE rows as bytes of places allow (8 rows each).
    tiles = max(1, -(-D // TILE))
    rows = -(-D // (8 * tiles)) * 8
    missing = tiles * rows - D
    x = jnp.pad(x, ((0, 0), (0, missing))).reshape(-1, tiles, rows).swapaxes(0, 1)
    values = jnp.pad(values, ((0, missing // 4), (0, 0), (0, 0)))
    packed = jnp.pad(places, ((0, tiles * rows // 8 - places.shape[0]), (0, 0)))
    values = values.reshape(tiles, rows // 4, 2, F)
    packed = packed.reshape(tiles, rows // 8, F)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # the spread tile is not remembered
    def add_tile(out: Array, tile: Any) -> tuple[Array, None]:
        x, values, packed = tile
        dense = _spread(values, unpack_places(packed, rows // 4))
        return out + jnp.matmul(x, dense, preferred_element_type=acc), None

    with jax.named_scope("two_four_matmul"):
        zero = jnp.zeros((x.shape[1], F), acc)
        out, _ = jax.lax.scan(add_tile, zero, (x, values, packed))
        return out.astype(dtype)


def _two_four_mosaic(spec: None, operands: Any) -> Array:
    from aidx.ops import sparse_kernels

    return sparse_kernels.two_four_matmul(*operands)


def _two_four_xla(spec: None, operands: Any) -> Array:
    return _by_tiles(*operands)


registry.register("two_four", "mosaic_gpu", platforms=("cuda",))(_two_four_mosaic)
registry.register("two_four", "xla")(_two_four_xla)


def _spread(values: Array, places: Array) -> Array:
    """`[4 * groups, F]` of values and places `[groups, 2, F]`."""
    inside = jnp.arange(4, dtype=jnp.int32).reshape(1, 4, 1)
    zero = jnp.zeros((), values.dtype)
    pick = lambda i: jnp.where(places[:, i : i + 1] == inside, values[:, i : i + 1], zero)
    return (pick(0) + pick(1)).reshape(-1, values.shape[-1])
