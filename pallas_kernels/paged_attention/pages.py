"""Blocks of the pool as tiles of keys: which blocks a tile needs, and their copies into SMEM."""

import dataclasses

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import div, rem

from .geometry import Geometry


@dataclasses.dataclass(frozen=True)
class PageTiles:
    """A tile of `tile` keys is several blocks (one TMA box each), one block, or a part of one."""

    geom: Geometry
    tile: int

    def __post_init__(self):
        block, tile = self.geom.block_size, self.tile
        if (block % tile and tile % block) or block % 8:
            raise NotImplementedError(f"blocks of {block} keys do not make up tiles of {tile}")

    @property
    def box(self) -> int:
        """Keys of one copy."""
        return min(self.geom.block_size, self.tile)

    @property
    def per_tile(self) -> int:
        """Copies of K (and of V) in a tile."""
        return self.tile // self.box

    def block_ids(self, table_ref, row, tile, position, context, window):
        """The blocks of key tile `tile`, an i32 scalar each.

        Entries of the table outside the blocks that the row sees are not followed: the tile's part
        there repeats a block inside (masked later, and never a block that may hold another's NaN).
        """
        size = self.geom.block_size
        last = jnp.int32(self.geom.blocks_per_row - 1)
        if size >= self.tile:
            return (table_ref[row, lax.min(div(tile, size // self.tile), last)],)
        last = lax.max(lax.min(div(context - 1, size), last), 0)
        first = 0
        if window is not None:
            first = div(lax.max(position - window + 1, 0), size)
        index = [tile * self.per_tile + j for j in range(self.per_tile)]
        return tuple(table_ref[row, lax.max(lax.min(j, last), first)] for j in index)

    def peek(self, table_ref, row, tile):
        """As `block_ids`, read before the row's length is known (no window); then `settle`."""
        last, size = jnp.int32(self.geom.blocks_per_row - 1), self.geom.block_size
        if size >= self.tile:
            return (table_ref[row, lax.min(div(tile, size // self.tile), last)],)
        index = [tile * self.per_tile + j for j in range(self.per_tile)]
        return tuple(table_ref[row, lax.min(j, last)] for j in index)

    def settle(self, ids, tile, context):
        """Replace the ids of `peek` that lie past the context; tile's first block is inside."""
        last = div(context - 1, self.geom.block_size)
        inside = lambda j: tile * self.per_tile + j <= last
        return (ids[0], *(jnp.where(inside(j), ids[j], ids[0]) for j in range(1, self.per_tile)))

    def fetch(self, tile, ids, head, pairs, barrier):
        """Start the copies of key tile `tile`, the four warps of the warpgroup side by side."""
        part = rem(tile, max(self.geom.block_size // self.tile, 1)) * self.tile

        def copy(source, target, j, block):
            if self.geom.block_size > self.tile:
                source = source.at[block, head, pl.ds(part, self.tile)]
            else:
                source = source.at[block, head]
            if self.per_tile > 1:
                target = target.at[pl.ds(j * self.box, self.box)]
            plgpu.copy_gmem_to_smem(source, target, barrier)

        copies = [(s, t, j, block) for j, block in enumerate(ids) for s, t in pairs]

        def issue(warp):
            for w in range(4):
                mine = copies[w::4]
                if mine:
                    pl.when(warp == w)(lambda mine=mine: [copy(*c) for c in mine] and None)  # pyright: ignore

        plgpu.warp_map(issue)
