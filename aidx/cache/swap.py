"""Blocks of a sequence to pinned host memory and back: the device's half of preemption by swapping.

Between steps, as programs of their own.  All layers of some blocks are gathered into one buffer,
which crosses the bus in one transfer; the number of blocks is a power of two, so that a handful of
compiled programs serve every call, and bounded, so that a long sequence takes little memory beside
the pools: it goes in pieces.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from aidx.cache.paged import PagedKVCache

PIECE_BYTES = 128 << 20  # of one transfer: long enough for the bus's full rate
MAX_PIECE = 64  # blocks


@struct.dataclass
class SwappedBlocks:
    """Blocks of all layers in pinned host memory, as `swap_out` left them.

    A piece is `[2 L, n, K, block_size, H]`, K of every layer and then V, and for quantised pools
    the scales `[2 L, n, K, block_size]` with it; n is a power of two.
    """

    pieces: tuple[tuple[jax.Array, ...], ...]
    count: int = struct.field(pytree_node=False)

    @property
    def memory_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(x.nbytes for x in jax.tree.leaves(self.pieces))


def swap_piece(cache: PagedKVCache) -> int:
    """Blocks of the largest piece: a power of two.

    Example:
        >>> swap_piece(PagedKVCache.create(
        ...     num_layers=1, num_blocks=6, block_size=2, num_kv_heads=1, head_dim=2
        ... ))
        64
    """
    fit = PIECE_BYTES // max(cache.memory_bytes // cache.num_blocks, 1)
    return min(MAX_PIECE, 1 << max(fit, 1).bit_length() - 1)


def swap_out(cache: PagedKVCache, blocks: Sequence[int] | np.ndarray) -> SwappedBlocks:
    """Copy `blocks` (of a sequence that is to wait) to pinned host memory; the pools stay.

    Returns once the copies are issued; a later write to the pools waits for them.

    Args:
        cache: the pools.
        blocks: distinct blocks of the pool, in the order in which `swap_in` gives them back.

    Raises:
        ValueError: no block, one named twice, or one outside the pool.

    Example:
        >>> cache = PagedKVCache.create(
        ...     num_layers=1, num_blocks=6, block_size=2, num_kv_heads=1, head_dim=2
        ... )
        >>> swapped = swap_out(cache, [3, 1, 4])
        >>> [values] = swapped.pieces[0]
        >>> swapped.count, values.shape, values.sharding.memory_kind
        (3, (2, 4, 1, 2, 2), 'pinned_host')
    """
    blocks = _checked(cache, blocks)
    pieces = tuple(
        _in_memory(_take(cache, _padded(part, 0)), "pinned_host") for part in _parts(cache, blocks)
    )
    return SwappedBlocks(pieces, len(blocks))


def swap_in(
    cache: PagedKVCache, swapped: SwappedBlocks, blocks: Sequence[int] | np.ndarray
) -> PagedKVCache:
    """Write what `swap_out` took into `blocks`, bit for bit; donates `cache`.

    Args:
        cache: the pools, of the same geometry but for the number of blocks.
        swapped: what `swap_out` gave.
        blocks: as many distinct blocks as were taken, anywhere in the pool; -1 leaves one out.

    Raises:
        ValueError: another number of blocks, one named twice, or one outside the pool.

    Example:
        >>> cache = PagedKVCache.create(
        ...     num_layers=1, num_blocks=6, block_size=2, num_kv_heads=1, head_dim=2
        ... )
        >>> cache = swap_in(cache, swap_out(cache, [3, 1, 4]), [5, -1, 1])
        >>> cache.num_blocks
        6
    """
    blocks = np.asarray(blocks, np.int32).reshape(-1)
    if len(blocks) != swapped.count:
        raise ValueError(f"{swapped.count} blocks were taken, not {blocks.tolist()}")
    wanted = blocks != -1
    if wanted.any():
        _checked(cache, blocks[wanted])
    nowhere = cache.num_blocks  # a destination past the end writes nothing
    places = np.where(wanted, blocks, nowhere).astype(np.int32)
    ends = np.cumsum([piece[0].shape[1] for piece in swapped.pieces])
    parts = zip(swapped.pieces, np.split(places, ends[:-1]), strict=True)
    coming = None
    for piece, part in parts:
        if (part == nowhere).all():
            continue
        # a piece crosses the bus while the one before it is written
        arrived, coming = coming, (_in_memory(piece, "device"), _padded(part, nowhere))
        if arrived is not None:
            cache = _put(cache, *arrived)
    return cache if coming is None else _put(cache, *coming)


def _checked(cache: PagedKVCache, blocks: Sequence[int] | np.ndarray) -> np.ndarray:
    blocks = np.asarray(blocks, np.int32).reshape(-1)
    if not len(blocks) or blocks.min() < 0 or blocks.max() >= cache.num_blocks:
        raise ValueError(f"blocks {blocks.tolist()} in a pool of {cache.num_blocks}")
    if len(np.unique(blocks)) != len(blocks):
        raise ValueError(f"a block is named twice: {blocks.tolist()}")
    return blocks


def _parts(cache: PagedKVCache, blocks: np.ndarray) -> list[np.ndarray]:
    size = swap_piece(cache)
    return [blocks[at : at + size] for at in range(0, len(blocks), size)]


def _padded(blocks: np.ndarray, value: int) -> np.ndarray:
    """`blocks` with `value` behind, up to a power of two."""
    padding = (1 << (len(blocks) - 1).bit_length()) - len(blocks)
    return np.pad(blocks, (0, padding), constant_values=value)


def _in_memory(values: tuple[jax.Array, ...], kind: str) -> tuple[jax.Array, ...]:
    return jax.device_put(values, tuple(x.sharding.with_memory_kind(kind) for x in values))


@jax.jit
def _take(cache: PagedKVCache, blocks: jax.Array) -> tuple[jax.Array, ...]:
    with jax.named_scope("swap_out"):
        taken = (jnp.stack([pool[blocks] for pool in (*cache.k, *cache.v)]),)
        if cache.k_scale is not None and cache.v_scale is not None:
            taken += (jnp.stack([pool[blocks] for pool in (*cache.k_scale, *cache.v_scale)]),)
        return taken


@partial(jax.jit, donate_argnums=0)
def _put(cache: PagedKVCache, piece: tuple[jax.Array, ...], blocks: jax.Array) -> PagedKVCache:
    layers = len(cache.k)

    def written(pools, values):
        return tuple(
            pool.at[blocks].set(x, mode="drop") for pool, x in zip(pools, values, strict=True)
        )

    with jax.named_scope("swap_in"):
        cache = dataclasses.replace(
            cache, k=written(cache.k, piece[0][:layers]), v=written(cache.v, piece[0][layers:])
        )
        if cache.k_scale is not None and cache.v_scale is not None:
            cache = dataclasses.replace(
                cache,
                k_scale=written(cache.k_scale, piece[1][:layers]),
                v_scale=written(cache.v_scale, piece[1][layers:]),
            )
        return cache
