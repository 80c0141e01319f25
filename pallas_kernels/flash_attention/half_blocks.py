"""A window whose borders cut blocks of 128 keys in half.

Two consumers share a tile of 128 rows.  Where the window and the diagonal begin at multiples of 128
the lower 64 rows see nothing of the upper half of the tile's first block (the diagonal's), and the
upper 64 rows nothing of the lower half of its last.  Either consumer leaves its half out: of the
9 blocks that a window of 1024 touches it computes 8.5, where 8 are visible.
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
        plgpu.barrier_wait(self.refs.q_full.at[self.q_slot])
        shape = (TILE, self.p.head_dim_v)
        pl.when(self.wg == 0)(lambda: self.ops.with_acc(self.lower_rows, shape))
        pl.when(self.wg == 1)(lambda: self.ops.with_acc(self.upper_rows, shape))

    def whole(self, lo, hi, c, oacc, masked):
        """Blocks lo <= i < hi."""
        return lax.fori_loop(lo, hi, lambda i, c: self.step(i, c, oacc, masked), c)

    def lower_rows(self, oacc) -> None:
        """Half of the first block, then the others; only the last may need the low border."""
        one, end = jnp.int32(1), self.end_i
        c = self.first_block(oacc, LOWER)

        @pl.when(end == one)
        def _():
            self.finish(*self.last(c, oacc, LOWER))

        @pl.when(end > one)
        def _():
            after = self.step(one, c, oacc, NONE, before=LOWER)
            after = self.whole(one + 1, self.low_i, after, oacc, NONE)
            after = self.whole(lax.max(self.low_i, one + 1), end, after, oacc, LOW)
            self.finish(*self.last(after, oacc))

    def upper_rows(self, oacc) -> None:
        """All blocks, half of the last where the low border crosses it."""
        border = self.low_i
        c = self.first_block(oacc)
        c = self.whole(jnp.int32(1), border, c, oacc, NONE)

        @pl.when(border == self.end_i)
        def _():
            self.finish(*self.last(c, oacc))

        @pl.when(border < self.end_i)
        def _():
            half = dataclasses.replace(self, shift=TILE)
            self.finish(*half.last(half.step(border, c, oacc, LOW, part=UPPER), oacc, UPPER))
