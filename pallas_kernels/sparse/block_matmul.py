"""A matrix of dense blocks times a dense matrix, on Hopper's tensor cores.

    out[i, :] = sum of block_e @ x[column_e, :] over the blocks e of block row i

One persistent CTA an SM.  A tile of the result is a block row by `tile_n` columns: two warpgroups
multiply, a third brings the blocks of the row and the matching rows of x through a ring in shared
memory, and runs ahead into the next tile while this one is stored.  Columns come a group after
another, so that all CTAs read the same columns of x and L2 serves them; within a group the rows are
dealt by size, shifted and reversed from group to group, so that every CTA gets long and short ones.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mgpu
from pallas_kernels._mgpu import HOPPER_SMS, SMEM_BYTES, Ops, cdiv, div, rem

from ._ring import ring_product

ROWS = 64  # of one wgmma
SIDES = (32, 64, 128)  # of a block
DTYPES = ("bfloat16", "float16")
CONSUMERS = 2
PRODUCER = 40  # registers of a thread that loads: it also computes which tile is next
DEPTH = 64  # of one stage, at most
L2_BYTES = 32 << 20  # of x that all CTAs read at a time
TILE = 64  # what columns in memory are multiples of: the swizzled tiles of TMA


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """How `block_matmul` is laid out.

    Attributes:
      tile_n: columns of x and of the result that a CTA takes at a time (128 or 256).
      stages: slices of a block, and of the rows of x that it meets, in flight.
      num_sms: CTAs at most.

    >>> MatmulConfig(tile_n=100)
    Traceback (most recent call last):
        ...
    ValueError: tile_n=100 is neither 128 nor 256
    """

    tile_n: int = 128
    stages: int = 4
    num_sms: int = HOPPER_SMS

    def __post_init__(self):
        if self.tile_n not in (128, 256):
            raise ValueError(f"tile_n={self.tile_n} is neither 128 nor 256")
        if self.stages < 2:
            raise ValueError(f"stages={self.stages} is below 2: nothing would overlap")
        if self.num_sms < 1:
            raise ValueError(f"num_sms={self.num_sms} is below 1")

    @classmethod
    def of(cls, height: int, columns: int) -> "MatmulConfig":
        """For blocks of `height` rows and a result of `columns`.

        >>> MatmulConfig.of(128, 8192), MatmulConfig.of(64, 100).tile_n
        (MatmulConfig(tile_n=128, stages=4, num_sms=132), 128)
        """
        return cls(128 if height == 128 or columns <= 128 else 256)


def check_blocks(data: Any, *dense: Any) -> None:
    """Refuse dtypes and blocks that the tensor cores' tiles do not fit."""
    if any(x.dtype != data.dtype for x in dense):
        raise ValueError(f"dtypes differ: {data.dtype} and {[str(x.dtype) for x in dense]}")
    if data.dtype.name not in DTYPES:
        raise NotImplementedError(f"{data.dtype.name}: it takes {' and '.join(DTYPES)}")
    if not set(data.shape[1:]) <= set(SIDES):
        raise NotImplementedError(f"blocks of {data.shape[1:]}: sides are {SIDES}")


class Refs(NamedTuple):
    """What the body works on."""

    data: Any
    x: Any
    order: Any
    minor: Any
    rows: Any
    out: Any
    a: Any  # [stages, height, depth] or turned
    b: Any  # [stages, depth, tile_n]
    o: Any  # [CONSUMERS, ROWS, width of a consumer]
    full: Any
    free: Any


@dataclasses.dataclass(frozen=True)
class BlockMatmul:
    """One call."""

    block: tuple[int, int]  # (height, width) as they count in the product
    turned: bool  # stored as (width, height)
    grid: int  # block rows
    depth_of_x: int  # its rows
    columns: int
    dtype: Any
    config: MatmulConfig
    interpret: bool

    @property
    def depth(self) -> int:
        """Of one stage."""
        return min(self.block[1], DEPTH)

    @property
    def split_rows(self) -> bool:
        """Whether the consumers share a tile by rows; else by columns."""
        return self.block[0] == CONSUMERS * ROWS

    @property
    def width(self) -> int:
        """Columns of a consumer."""
        return self.config.tile_n // (1 if self.split_rows else CONSUMERS)

    @property
    def tiles_n(self) -> int:
        """Tiles across the result."""
        return cdiv(self.columns, self.config.tile_n)

    @functools.cached_property
    def deal(self) -> tuple[int, int, int]:
        """(tiles across of a group, tiles that a CTA has of a group, CTAs).

        The narrowest group that gives nearly all SMs the same number of tiles; wide ones leave L2.
        """
        sms, best, found = self.config.num_sms, 0.0, (1, 1, 1)
        for group in (g for g in range(1, self.tiles_n + 1) if self.tiles_n % g == 0):
            size = 2 * group * self.config.tile_n * self.depth_of_x
            if group > 1 and size > L2_BYTES and self.grid * found[0] >= sms:
                break
            each = cdiv(self.grid * group, sms)
            used = self.grid * group / (each * sms)
            if used > best:
                best, found = used, (group, each, cdiv(self.grid * group, each))
            if best >= 0.95:
                break
        return found

    def scratch(self) -> list[Any]:
        """Ring, staging and barriers, in the order of `Refs`."""
        c, (height, _) = self.config, self.block
        swizzled = _mgpu.swizzled(self.dtype, 2 * self.depth)
        high = max(height, ROWS)
        a = (self.depth, high) if self.turned else (high, self.depth)
        b, o = (self.depth, c.tile_n), (ROWS, self.width)
        size = c.stages * (a[0] * a[1] + b[0] * b[1]) + CONSUMERS * o[0] * o[1]
        if 2 * size > SMEM_BYTES - 1024:
            raise NotImplementedError(f"{2 * size} bytes of shared memory with {c}")
        operand = lambda *shape: plgpu.SMEM(shape, self.dtype, transforms=swizzled)
        return [
            operand(c.stages, *a),
            operand(c.stages, *b),
            plgpu.SMEM((CONSUMERS, *o), self.dtype, transforms=_mgpu.swizzled(self.dtype)),
            plgpu.Barrier(num_arrivals=2, num_barriers=c.stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=c.stages),
        ]

    def place(self, group, turn, cta):
        """(rank of the row by size, tile in the group) of a CTA's tile; past the end: rank < 0."""
        width, _, ctas = self.deal
        size, groups = self.grid * width, self.tiles_n // width
        back = (turn & 1) == 1
        at = turn * ctas + jnp.where(back, ctas - 1 - cta, cta)
        shifted = rem(at + div(group, 2) * max(1, 2 * size // groups), size)
        there = jnp.where((group & 1) == 1, size - 1 - shifted, shifted)
        return jnp.where(at < size, div(there, width), -1), rem(there, width)

    def walk(self, refs: Refs, f: Callable) -> Any:
        """`f(stages done, row, first block, blocks, first column) -> stages done` by tile."""
        (width, each, _), cta = self.deal, lax.axis_index("cta")

        def facts(j):
            """Of this CTA's j-th tile, loaded a tile ahead; no blocks and no columns where none."""
            group = div(j, each)
            rank, tile = self.place(group, rem(j, each), cta)
            row, first, count = (refs.rows[lax.max(rank, jnp.int32(0)), i] for i in range(3))
            across = jnp.where(rank < 0, self.tiles_n, group * width + tile)
            return row, first, jnp.where(rank < 0, 0, count), across

        def step(j, carry):
            done, (row, first, count, across) = carry
            ahead = facts(j + 1)
            return f(done, row, first, count, across * self.config.tile_n), ahead

        start = (jnp.int32(0), facts(jnp.int32(0)))
        turns = jnp.int32(self.tiles_n // width * each)
        return lax.fori_loop(jnp.int32(0), turns, step, start)[0]

    def produce(self, refs: Refs) -> None:
        """Bring every stage of every tile."""
        plgpu.set_max_registers(_mgpu.registers(CONSUMERS, PRODUCER)[1], action="decrease")
        (height, width), c = self.block, self.config
        parts, last = width // self.depth, refs.order.shape[0] - 1

        def one(done, row, first, count, column):
            del row
            block = lambda e: (refs.order[e], refs.minor[e])

            def load(i, carry):
                at, minor = carry
                ahead = block(lax.min(first + i + 1, jnp.int32(last)))
                for part in range(parts):
                    stage = done + i * parts + part
                    slot = rem(stage, c.stages)

                    def wait(slot=slot):
                        plgpu.barrier_wait(refs.free.at[slot])

                    pl.when(stage >= c.stages)(wait)
                    deep = pl.ds(part * self.depth, self.depth)
                    source = refs.data.at[at, deep] if self.turned else refs.data.at[at, :, deep]
                    target = refs.a.at[slot]
                    if height < ROWS:  # the rows below are of no block and are not stored
                        target = refs.a.at[slot, pl.ds(0, height)]
                    plgpu.copy_gmem_to_smem(source, target, refs.full.at[slot])
                    rows = pl.ds(minor * width + part * self.depth, self.depth)
                    source = refs.x.at[rows, pl.ds(column, c.tile_n)]
                    plgpu.copy_gmem_to_smem(source, refs.b.at[slot], refs.full.at[slot])
                return ahead

            start = block(lax.min(first, jnp.int32(last)))
            lax.fori_loop(jnp.int32(0), count, load, start)
            return done + count * parts

        total = self.walk(refs, one)

        @pl.loop(lax.max(total - c.stages, jnp.int32(0)), total)
        def _(stage):  # leave no completion unobserved
            plgpu.barrier_wait(refs.free.at[rem(stage, c.stages)])

    def operands(self, refs: Refs, slot, wg) -> tuple[Any, Any]:
        """A and B of a consumer."""
        a, b = refs.a.at[slot], refs.b.at[slot]
        if self.split_rows:
            mine = pl.ds(wg * ROWS, ROWS)
            a = refs.a.at[slot, :, mine] if self.turned else refs.a.at[slot, mine]
        else:
            b = refs.b.at[slot, :, pl.ds(wg * self.width, self.width)]
        return (a.T if self.turned else a), b

    def consume(self, refs: Refs, wg) -> None:
        """Multiply, 64 rows or half the columns of every tile."""
        plgpu.set_max_registers(_mgpu.registers(CONSUMERS, PRODUCER)[0], action="increase")
        ops, stages = Ops(self.interpret), self.config.stages
        parts = self.block[1] // self.depth

        def one(done, row, first, count, column):
            del first
            steps = count * parts

            operands = lambda slot: self.operands(refs, slot, wg)
            multiply = ring_product(ops, refs.full, refs.free, done, steps, stages, operands)
            out = ops.with_acc(multiply, (ROWS, self.width)).astype(self.dtype)
            self.store(refs, wg, out, row, column)
            return done + steps

        self.walk(refs, one)
        plgpu.wait_smem_to_gmem(0)

    def store(self, refs: Refs, wg, value, row, column) -> None:
        """Through shared memory by TMA, which drops the columns past the end."""
        height = self.block[0]
        first = row * height + (wg * ROWS if self.split_rows else 0)
        column = column + (0 if self.split_rows else wg * self.width)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        refs.o[wg] = value
        plgpu.commit_smem()
        high = min(height, ROWS)

        @pl.when(column < self.columns)
        def _():
            target = refs.out.at[pl.ds(first, high), pl.ds(column, self.width)]
            source = refs.o.at[wg] if high == ROWS else refs.o.at[wg, pl.ds(0, high)]
            plgpu.copy_smem_to_gmem(source, target)

    def body(self, *refs) -> None:
        """The kernel."""
        r, wg = Refs(*refs), lax.axis_index("wg")
        pl.when(wg < CONSUMERS)(lambda: self.consume(r, wg))
        pl.when(wg == CONSUMERS)(lambda: self.produce(r))


def block_matmul(
    data: jax.Array,
    x: jax.Array,
    minor: jax.Array,
    indptr: jax.Array,
    *,
    order: jax.Array | None = None,
    turned: bool = False,
    config: MatmulConfig | None = None,
    interpret: Any = None,
) -> jax.Array:
    r"""The product of a block-sparse matrix and a dense one, accumulated in f32.

    $$out_i = \sum_{e = indptr_i}^{indptr_{i+1} - 1} data_{order_e} x_{minor_e}$$

    Args:
      data: bf16 or f16 `[nse, bh, bw]`, sides of 32, 64 or 128.
      x: of data's dtype, `[N, n]`.
      minor: i32 `[nse]`, the block column of entry e; what lies past `indptr[-1]` is not read.
      indptr: i32 `[rows + 1]`, from 0.
      order: i32 `[nse]`, where entry e lies in data; e when not given.
      turned: data holds the blocks transposed.
      config: tiles; `MatmulConfig.of` chooses.
      interpret: True runs the GPU interpreter.

    Returns:
      `[rows * height, n]`, height being bh, or bw when turned.

    Raises:
      ValueError: shapes or dtypes that do not fit each other.
      NotImplementedError: a dtype or a block size that this kernel lacks.

    >>> import functools
    >>> s = jax.ShapeDtypeStruct
    >>> a, x, i = s((9, 64, 64), jnp.bfloat16), s((640, 96), jnp.bfloat16), s((9,), jnp.int32)
    >>> jax.eval_shape(block_matmul, a, x, i, s((6,), jnp.int32)).shape
    (320, 96)
    """
    check_blocks(data, x)
    nse, *block = data.shape
    height, width = block[::-1] if turned else block
    given = minor if order is None else order
    if x.ndim != 2 or minor.shape != (nse,) or given.shape != (nse,) or x.shape[0] % width:
        raise ValueError(f"{data.shape=}, {x.shape=}, {minor.shape=} and {given.shape=} do not fit")
    rows, n = indptr.shape[0] - 1, x.shape[1]
    if 0 in (nse, rows, n):
        raise NotImplementedError(f"an empty side: {data.shape=}, {rows=}, {x.shape=}")
    if turned and height < ROWS:  # a transposed operand cannot be part of a wgmma's rows
        data, turned = data.swapaxes(1, 2), False
    config = config or MatmulConfig.of(height, n)
    columns = cdiv(n, TILE) * TILE
    call = BlockMatmul(
        (height, width), turned, rows, x.shape[0], columns, data.dtype, config, bool(interpret)
    )
    with jax.named_scope("block_matmul"):
        order = jnp.arange(nse, dtype=jnp.int32) if order is None else order.astype(jnp.int32)
        out = _mgpu.kernel(
            call.body,
            out_type=jax.ShapeDtypeStruct((rows * height, columns), data.dtype),
            scratch_types=call.scratch(),
            grid=(call.deal[2],),
            grid_names=("cta",),
            num_warpgroups=CONSUMERS + 1,
            interpret=interpret,
        )(
            data,
            jnp.pad(x, ((0, 0), (0, columns - n))),
            order,
            minor.astype(jnp.int32),
            rows_by_size(indptr),
        )
        return out[:, :n]


def rows_by_size(indptr: jax.Array) -> jax.Array:
    """i32 `[rows, 4]`: (row, first entry, entries, 0), the longest first.

    >>> rows_by_size(jnp.array([0, 1, 1, 3])).tolist()
    [[2, 1, 2, 0], [0, 0, 1, 0], [1, 1, 0, 0]]
    """
    indptr = indptr.astype(jnp.int32)
    count = jnp.diff(indptr)
    row = jnp.argsort(-count, stable=True).astype(jnp.int32)
    return jnp.stack((row, indptr[row], count[row], jnp.zeros_like(row)), axis=1)
