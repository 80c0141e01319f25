"""The consumer of a ring of operands in shared memory."""

from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import Ops, rem


def ring_product(
    ops: Ops, full: Any, free: Any, done: Any, steps: Any, stages: int, operands: Callable
) -> Callable[[Any], Any]:
    """`acc -> acc + sum of a_i @ b_i` over `steps` slots of the ring, for `Ops.with_acc`.

    Args:
      full, free: barriers of the slots; a slot is free when the product after its own has begun,
        so that two are under way.
      done: slots that were taken before.
      operands: slot -> (a, b).
    """

    def multiply(acc):
        def step(i, carry):
            out = ops.uncarry(acc, carry)
            slot = rem(done + i, stages)
            plgpu.barrier_wait(full.at[slot])
            out = ops.wgmma(out, *operands(slot))
            ops.wait(1)

            @pl.when(i > 0)
            def _():
                plgpu.barrier_arrive(free.at[rem(done + i - 1, stages)])

            return ops.carry(out)

        out = lax.fori_loop(jnp.int32(0), steps, step, ops.carry(acc))
        value = ops.load(ops.uncarry(acc, out))

        @pl.when(steps > 0)
        def _():
            plgpu.barrier_arrive(free.at[rem(done + steps - 1, stages)])

        return value

    return multiply
