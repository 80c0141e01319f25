"""Dense products at the places of blocks (SDDMM), on Hopper's tensor cores.

    out_e = g[row_e, :] @ x[column_e, :]^T

One persistent CTA walks blocks in the order they are stored: neighbours share rows of g, which L2
keeps.  A block is a matmul of its own, as deep as g and x are wide.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mgpu
from pallas_kernels._mgpu import HOPPER_SMS, SMEM_BYTES, Ops, cdiv, rem

from ._ring import ring_product
from .block_matmul import DTYPES, ROWS, SIDES

DEPTH = 64  # of a stage


@dataclasses.dataclass(frozen=True)
class SampleConfig:
    """How `block_sample` is laid out.

    Attributes:
      stages: slices of g and x in flight.
      num_ctas: CTAs of the persistent grid.

    >>> SampleConfig(stages=1)
    Traceback (most recent call last):
        ...
    ValueError: stages=1 is below 2: nothing would overlap
    """

    stages: int = 5
    num_ctas: int = HOPPER_SMS

    def __post_init__(self):
        if self.stages < 2:
            raise ValueError(f"stages={self.stages} is below 2: nothing would overlap")
        if self.num_ctas < 1:
            raise ValueError(f"num_ctas={self.num_ctas} is below 1")


class Refs(NamedTuple):
    """What the body works on."""

    g: Any
    x: Any
    row: Any
    column: Any
    out: Any
    a: Any  # [stages, height, DEPTH]
    b: Any  # [stages, width, DEPTH]
    o: Any  # [consumers, ROWS, width]
    full: Any
    free: Any


@dataclasses.dataclass(frozen=True)
class BlockSample:
    """One call."""

    block: tuple[int, int]
    count: int
    rows: int  # in blocks
    features: int
    dtype: Any
    config: SampleConfig
    interpret: bool

    @property
    def consumers(self) -> int:
        """Warpgroups that multiply, 64 rows each."""
        return max(1, self.block[0] // ROWS)

    @property
    def steps(self) -> int:
        """Stages of a block."""
        return cdiv(self.features, DEPTH)

    @property
    def ctas(self) -> int:
        """CTAs of the grid."""
        return min(self.config.num_ctas, self.count)

    def scratch(self) -> list[Any]:
        """Ring, staging and barriers, in the order of `Refs`."""
        c, (height, width) = self.config, self.block
        swizzled = _mgpu.swizzled(self.dtype)
        high = max(height, ROWS)
        size = c.stages * (high + width) * DEPTH + self.consumers * ROWS * width
        if 2 * size > SMEM_BYTES - 1024:
            raise NotImplementedError(f"{2 * size} bytes of shared memory with {c}")
        operand = lambda *shape: plgpu.SMEM(shape, self.dtype, transforms=swizzled)
        staging = _mgpu.swizzled(self.dtype, 2 * min(width, 64))
        return [
            operand(c.stages, high, DEPTH),
            operand(c.stages, width, DEPTH),
            plgpu.SMEM((self.consumers, ROWS, width), self.dtype, transforms=staging),
            plgpu.Barrier(num_arrivals=2, num_barriers=c.stages),
            plgpu.Barrier(num_arrivals=self.consumers, num_barriers=c.stages),
        ]

    def walk(self, refs: Refs, f: Any) -> Any:
        """`f(stages done, entry, stages) -> stages done`; padding has no stages."""
        cta = lax.axis_index("cta")

        def step(j, done):
            entry = j * self.ctas + cta
            steps = jnp.where(refs.row[entry] < self.rows, self.steps, 0)
            return f(done, entry, steps)

        full, part = divmod(self.count, self.ctas)
        mine = jnp.int32(full)
        if part:
            mine = mine + (cta < part).astype(jnp.int32)
        return lax.fori_loop(jnp.int32(0), mine, step, jnp.int32(0))

    def produce(self, refs: Refs) -> None:
        """Bring every stage of every block."""
        if self.consumers > 1:
            plgpu.set_max_registers(_mgpu.registers(self.consumers)[1], action="decrease")
        (height, width), stages = self.block, self.config.stages

        def one(done, entry, steps):
            row, column = refs.row[entry], refs.column[entry]

            @pl.loop(0, steps)
            def _(i):
                stage = done + i
                slot = rem(stage, stages)
                pl.when(stage >= stages)(lambda: plgpu.barrier_wait(refs.free.at[slot]))
                deep = pl.ds(i * DEPTH, DEPTH)
                source = refs.g.at[pl.ds(row * height, height), deep]
                target = refs.a.at[slot]
                if height < ROWS:  # the rows below are of no block and are not stored
                    target = refs.a.at[slot, pl.ds(0, height)]
                plgpu.copy_gmem_to_smem(source, target, refs.full.at[slot])
                source = refs.x.at[pl.ds(column * width, width), deep]
                plgpu.copy_gmem_to_smem(source, refs.b.at[slot], refs.full.at[slot])

            return done + steps

        total = self.walk(refs, one)

        @pl.loop(lax.max(total - stages, jnp.int32(0)), total)
        def _(stage):  # leave no completion unobserved
            plgpu.barrier_wait(refs.free.at[rem(stage, stages)])

    def consume(self, refs: Refs, wg) -> None:
        """Multiply 64 rows of every block."""
        if self.consumers > 1:
            plgpu.set_max_registers(_mgpu.registers(self.consumers)[0], action="increase")
        ops, stages, width = Ops(self.interpret), self.config.stages, self.block[1]

        def one(done, entry, steps):
            operands = lambda slot: (refs.a.at[slot, pl.ds(wg * ROWS, ROWS)], refs.b.at[slot].T)
            multiply = ring_product(ops, refs.full, refs.free, done, steps, stages, operands)
            value = ops.with_acc(multiply, (ROWS, width)).astype(self.dtype)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            refs.o[wg] = value
            plgpu.commit_smem()
            high = min(self.block[0], ROWS)
            source = refs.o.at[wg] if high == ROWS else refs.o.at[wg, pl.ds(0, high)]
            plgpu.copy_smem_to_gmem(source, refs.out.at[entry, pl.ds(wg * ROWS, high)])
            return done + steps

        self.walk(refs, one)
        plgpu.wait_smem_to_gmem(0)

    def body(self, *refs) -> None:
        """The kernel."""
        r, wg = Refs(*refs), lax.axis_index("wg")
        pl.when(wg < self.consumers)(lambda: self.consume(r, wg))
        pl.when(wg == self.consumers)(lambda: self.produce(r))


def block_sample(
    g: jax.Array,
    x: jax.Array,
    row: jax.Array,
    column: jax.Array,
    *,
    block: tuple[int, int],
    config: SampleConfig | None = None,
    interpret: Any = None,
) -> jax.Array:
    """`g @ x.T` at blocks, accumulated in f32.

    Args:
      g: bf16 or f16 `[M, n]`.
      x: of g's dtype, `[N, n]`.
      row: i32 `[nse]`, block rows; `M // bh` in padding, whose result is zero.
      column: i32 `[nse]`, block columns.
      block: (bh, bw), sides of 32, 64 or 128.
      config: tiles.
      interpret: True runs the GPU interpreter.

    Returns:
      `[nse, bh, bw]`.

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
      NotImplementedError: a dtype or a block size that this kernel lacks.

    >>> import functools
    >>> s, f = jax.ShapeDtypeStruct, functools.partial(block_sample, block=(64, 128))
    >>> x, i = s((640, 96), jnp.bfloat16), s((9,), jnp.int32)
    >>> jax.eval_shape(f, x, x, i, i).shape
    (9, 64, 128)
    """
    if g.dtype != x.dtype or g.ndim != 2 or x.ndim != 2 or g.shape[1] != x.shape[1]:
        raise ValueError(f"{g.shape=} {g.dtype} and {x.shape=} {x.dtype} do not fit")
    if g.dtype.name not in DTYPES:
        raise NotImplementedError(f"{g.dtype.name}: it takes {' and '.join(DTYPES)}")
    if not set(block) <= set(SIDES):
        raise NotImplementedError(f"blocks of {block}: sides are {SIDES}")
    if g.shape[0] % block[0] or x.shape[0] % block[1] or row.shape != column.shape:
        raise ValueError(f"{block=} does not divide {g.shape=} and {x.shape=}, or {row.shape=}")
    count, n = row.shape[0], g.shape[1]
    if 0 in (count, n, *g.shape, *x.shape):
        raise NotImplementedError(f"an empty side: {g.shape=}, {x.shape=}, nse={count}")
    config = config or SampleConfig()
    features = cdiv(n, DEPTH) * DEPTH
    rows = g.shape[0] // block[0]
    call = BlockSample(block, count, rows, features, g.dtype, config, bool(interpret))
    fill = lambda v: jnp.pad(v, ((0, 0), (0, features - n)))
    with jax.named_scope("block_sample"):
        return _mgpu.kernel(
            call.body,
            out_type=jax.ShapeDtypeStruct((count, *block), g.dtype),
            scratch_types=call.scratch(),
            grid=(call.ctas,),
            grid_names=("cta",),
            num_warpgroups=call.consumers + 1,
            interpret=interpret,
        )(fill(g), fill(x), row.astype(jnp.int32), column.astype(jnp.int32))
