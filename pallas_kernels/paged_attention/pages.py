"""Blocks of the pool as tiles of keys: which blocks a tile needs, and their copies into SMEM."""

import dataclasses

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import div, rem

from .geometry import Geometry
from .quantised import SCALES_PER_ROW, gather


def scale_words(geom: Geometry, tile: int) -> int:
    """f32 that the scales of a tile of keys take in shared memory."""
    return tile * max(1, SCALES_PER_ROW // geom.block_size)


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

    @property
    def scale_heads(self) -> int:
        """KV heads whose scales of a block make up one copy."""
        return max(1, SCALES_PER_ROW // self.geom.block_size)

    def pack_scales(self, scale):
        """Scales `[P, K, block_size]` as rows of at least 32: `[P, K / heads, heads * block_size]`.

        Raises:
          NotImplementedError: blocks of so few keys that heads share a copy, and K is no multiple.
        """
        p, k, size = scale.shape
        if k % self.scale_heads:
            raise NotImplementedError(
                f"{k} KV heads: a copy of scales holds {self.scale_heads} of them at {size=}"
            )
        return scale.reshape(p, k // self.scale_heads, self.scale_heads * size)

    def block_ids(self, table_ref, row, tile, context, first_key=None):
        """The blocks of key tile `tile`, an i32 scalar each.

        Entries of the table outside the blocks that the row sees are not followed: the tile's part
        there repeats a block inside (masked later, and never a block that may hold another's NaN).
        `first_key` is the first key seen, None for 0.
        """
        size = self.geom.block_size
        last = jnp.int32(self.geom.blocks_per_row - 1)
        if size >= self.tile:
            return (table_ref[row, lax.min(div(tile, size // self.tile), last)],)
        last = lax.max(lax.min(div(context - 1, size), last), 0)
        first = 0 if first_key is None else div(first_key, size)
        index = [tile * self.per_tile + j for j in range(self.per_tile)]
        return tuple(table_ref[row, lax.max(lax.min(j, last), first)] for j in index)

    def blocks_of_keys(self, table_ref, row, tile, context, first_key, interpret: bool):
        """As `block_ids`, the block of every key of the tile, one per row of a WGMMA tile."""
        size = jnp.int32(self.geom.block_size)
        last = lax.min(div(context - 1, self.geom.block_size), self.geom.blocks_per_row - 1)
        key = plgpu.broadcasted_iota(
            jnp.int32, (self.tile,), 0, layout=plgpu.Layout.WGMMA.reduce(1)
        )
        block = jnp.minimum(lax.div(key + tile * self.tile, size), lax.max(last, 0))
        if first_key is not None:
            block = jnp.maximum(block, lax.div(first_key, size))
        return gather(table_ref, row, block, interpret=interpret)

    def scales_of_keys(self, ref, blocks, head, tile, interpret: bool):
        """The scales of the keys of a tile, whose `blocks_of_keys` are given."""
        key = plgpu.broadcasted_iota(
            jnp.int32, (self.tile,), 0, layout=plgpu.Layout.WGMMA.reduce(1)
        )
        if self.geom.block_size > self.tile:
            key = key + rem(tile, self.geom.block_size // self.tile) * self.tile
        offset = lax.rem(key, jnp.int32(self.geom.block_size))
        return gather(ref, blocks, head, offset, interpret=interpret)

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

    def fetch(self, tile, ids, head, pairs, barrier, scales=()):
        """Start the copies of key tile `tile`, the four warps of the warpgroup side by side.

        `pairs` are pools and their tiles in SMEM, `scales` those of packed scales.
        """
        part = rem(tile, max(self.geom.block_size // self.tile, 1)) * self.tile

        def copy(source, target, j, block):
            tokens = pl.ds(part, self.tile) if self.geom.block_size > self.tile else slice(None)
            where = (tokens, head) if self.geom.tokens_first else (head, tokens)
            source = source.at[(block, *where)]
            if self.per_tile > 1:
                target = target.at[pl.ds(j * self.box, self.box)]
            plgpu.copy_gmem_to_smem(source, target, barrier)

        def copy_scales(source, target, j, block):
            source = source.at[block, div(head, self.scale_heads)]
            if self.geom.block_size > self.tile:
                source = source.at[pl.ds(part, self.tile)]
            if self.per_tile > 1:
                size = max(self.box, SCALES_PER_ROW)
                target = target.at[pl.ds(j * size, size)]
            plgpu.copy_gmem_to_smem(source, target, barrier)

        numbered = list(enumerate(ids))
        copies = [(copy, s, t, j, block) for j, block in numbered for s, t in pairs]
        copies += [(copy_scales, s, t, j, block) for j, block in numbered for s, t in scales]

        def issue(warp):
            for w in range(4):
                mine = copies[w::4]
                if mine:
                    pl.when(warp == w)(lambda mine=mine: [c(*x) for c, *x in mine] and None)  # pyright: ignore

        plgpu.warp_map(issue)
