"""A window whose borders cut blocks of 128 keys in half.

Two consumers share a tile of 128 rows.  Where the window and the diagonal begin at multiples of 128
the lower 64 rows see nothing of the upper half of the tile's first block (the diagonal's), and the
upper 64 rows nothing of the lower half of its last.  Either consumer leaves its half out: of the
9 blocks that a window of 1024 touches it computes 8.5, where 8 are visible.

Both consumers run one loop over the blocks between, since code of their own for these was slower
than the halves are worth.  Tiles that the first key cuts short take the usual way.
"""

import dataclasses

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.flash_attention.consumer import LOW, NONE, Consumer
from pallas_kernels.flash_attention.mask import TILE

LOWER, UPPER = slice(0, TILE), slice(TILE, 2 * TILE)


@dataclasses.dataclass(frozen=True)
class HalfBlocks(Consumer):
    """A consumer that computes half of its tile's first block, or of its last."""

    def run(self, blocks) -> None:
        """The whole tile; both consumers visit all `blocks` of it."""
        band, block = self.p.band, self.p.config.block_kv
        most = (band.left + band.right + 1) // block + 1
        shape = (TILE, self.p.head_dim_v)
        whole = super().run
        pl.when(blocks < most)(lambda: whole(blocks))
        pl.when(blocks == most)(lambda: self.ops.with_acc(lambda o: self.halves(most, o), shape))

    def halves(self, blocks: int, oacc) -> None:
        """A tile of so many blocks, the first and the last without a half."""
        plgpu.barrier_wait(self.refs.q_full.at[self.q_slot])
        one, last = jnp.int32(1), jnp.int32(blocks - 1)
        lower = (self.wg == 0).astype(jnp.int32)

        def begin_lower(_, c):
            c = self.first_block(oacc, LOWER)
            return self.step(one, c, oacc, NONE, before=LOWER)

        # branches whose results have the layouts of a loop's
        c = lax.fori_loop(jnp.int32(0), lower, begin_lower, self.nothing(oacc))
        c = lax.fori_loop(lower, one, lambda _, c: self.first_block(oacc), c)
        c = lax.fori_loop(one + lower, last, lambda i, c: self.step(i, c, oacc, NONE), c)

        @pl.when(self.wg == 0)
        def _():
            self.finish(*self.last(self.step(last, c, oacc, LOW), oacc))

        @pl.when(self.wg == 1)
        def _():
            half = dataclasses.replace(self, shift=TILE)
            self.finish(*half.last(half.step(last, c, oacc, LOW, part=UPPER), oacc, UPPER))

    def nothing(self, oacc):
        """What a loop may begin with in the place of a block's results."""
        p, layout = self.p, plgpu.Layout.WGMMA

        def zeros(shape, layout):
            x = jnp.zeros(shape, jnp.float32)
            return x if p.interpret else plgpu.layout_cast(x, layout)

        rows = zeros((TILE,), layout.reduce(1))
        total = zeros((TILE, 8), layout) if p.config.late_sum else rows
        prob = zeros((TILE, p.config.block_kv), layout).astype(p.dtype)
        return rows, total, prob, self.ops.carry(oacc)
