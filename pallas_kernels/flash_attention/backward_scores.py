"""Gradients of what a score_mod loads: bias, slopes, tables.

    S = Q K^T    dP = dO V^T    dS = P * (dP - delta)    dU = sum of dS * d score / d U

The sum runs over what U does not depend on.  Three walks serve every kind of U:

* rows of a query ("query", "scalar"): 64 query rows stay, key blocks pass;
* rows of a key ("key"): the same with the roles exchanged, 64 key rows stay;
* a whole tile ("tile"): one tile of scores stays, the (batch, head) pairs that share it pass.

What is left to sum is summed by XLA, so every bit repeats.  Two matmuls a tile; every block is
masked, since speed matters less here than having one kernel.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mgpu
from pallas_kernels._mgpu import MASKED, SMEM_BYTES, Ops, cdiv, div, rem, ring_slot
from pallas_kernels.flash_attention import problem as common
from pallas_kernels.flash_attention import tile
from pallas_kernels.flash_attention.mask import TILE
from pallas_kernels.flash_attention.problem import (
    LOG2E,
    Extra,
    Options,
    extra_operands,
    load_values,
    pad_tokens,
    run_program,
    statistics,
)
from pallas_kernels.flash_attention.program import Program

COLUMNS = 64


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of a CTA are `64 * consumers`, a block has 64 columns, `stages` of them in flight."""

    consumers: int
    stages: int

    @property
    def rows(self) -> int:
        """Rows of a CTA."""
        return TILE * self.consumers

    def smem_bytes(self, width: int, whole: bool) -> int:
        """Shared memory of the operands, `width` numbers a token."""
        return 2 * width * ((self.stages if whole else 1) * self.rows + self.stages * COLUMNS)


@dataclasses.dataclass(frozen=True, eq=False)
class Problem(common.Problem):
    """The static side of one walk; rows are queries, or keys where `by_query` is False."""

    partials: Program  # (value, d value / d U for every U of this walk)
    count: int  # of them
    by_query: bool
    whole: bool  # a tile of scores stays
    shared: tuple[bool, bool]  # whole: whether U is the same for all b, for all n

    @property
    def row_tiles(self) -> int:
        """Row tiles of one head."""
        return cdiv(self.queries if self.by_query else self.keys, self.config.rows)

    @property
    def column_blocks(self) -> int:
        """Column blocks of one head."""
        return cdiv(self.keys if self.by_query else self.queries, COLUMNS)

    @property
    def fixed(self) -> tuple[int, int]:
        """Batches and heads that a CTA does not walk over."""
        if not self.whole:
            return self.batch, self.heads
        return (1 if self.shared[0] else self.batch), (1 if self.shared[1] else self.heads)


class Refs(NamedTuple):
    """What a CTA works on; `row_*` are the operands that lie along the rows of the tile."""

    q: Any
    k: Any
    v: Any
    do: Any
    stats: Any  # [B, N, 2, T'] f32
    extra: Extra
    out: Any  # one [b, n, rows] or [b, n, T', S'] f32 for every U
    row_smem: Any  # Q or K
    row_smem2: Any  # dO or V
    column_smem: Any  # K or Q
    column_smem2: Any  # V or dO
    row_full: Any
    column_full: Any
    row_free: Any
    column_free: Any


class Place(NamedTuple):
    """One step of a walk."""

    b: Any
    head: Any
    row0: Any  # first row of the CTA's tile
    column0: Any


def decode(p: Problem, t) -> tuple[Any, Any, Any, Any]:
    """Flat CTA number to (b, head, row tile, column block); the last is 0 where blocks pass."""
    blocks = p.column_blocks if p.whole else 1
    _, heads = p.fixed
    t, block = div(t, blocks), rem(t, blocks)
    t, row_tile = div(t, p.row_tiles), rem(t, p.row_tiles)
    return div(t, heads), rem(t, heads), row_tile, block


def steps(p: Problem) -> int:
    """Steps of every walk."""
    if not p.whole:
        return p.column_blocks
    return (p.batch if p.shared[0] else 1) * (p.heads if p.shared[1] else 1)


def place(p: Problem, cta, i) -> Place:
    """Where step i of a CTA is."""
    b, head, row_tile, block = cta
    if not p.whole:
        return Place(b, head, row_tile * p.config.rows, i * COLUMNS)
    walked = p.heads if p.shared[1] else 1
    b = div(i, walked) if p.shared[0] else b
    head = rem(i, walked) if p.shared[1] else head
    return Place(b, head, row_tile * p.config.rows, block * COLUMNS)


@dataclasses.dataclass(frozen=True)
class Consumer:
    """One consumer warpgroup: 64 rows."""

    p: Problem
    refs: Refs
    wg: Any
    cta: Any

    @property
    def ops(self) -> Ops:
        """Accumulators."""
        return Ops(self.p.interpret)

    def at(self, where: Place):
        """(b, head, first query, first key) of this warpgroup's tile."""
        row0 = where.row0 + self.wg * TILE
        first = (row0, where.column0) if self.p.by_query else (where.column0, row0)
        return where.b, where.head, *first

    def statistic(self, where: Place, which: int):
        """lse (0) or delta (1), spread over the tile."""
        b, head, query0, _ = self.at(where)
        by_query = self.p.by_query
        layout = plgpu.Layout.WGMMA.reduce(1 if by_query else 0)
        x = plgpu.load(
            self.refs.stats.at[b, head, which, pl.ds(query0, TILE if by_query else COLUMNS)],
            layout=layout,
            optimized=False,
        )
        return tile.by_row(x, COLUMNS) if by_query else tile.by_column(x, TILE)

    def row_bounds(self, where: Place):
        """`(lo, hi)` for `tile.mask`; the ends of queries and keys included."""
        p, refs = self.p, self.refs
        b, _, query0, key0 = self.at(where)
        row0, column0 = (query0, key0) if p.by_query else (key0, query0)
        column = tile.iota(TILE, 1) + column0
        if p.dynamic:
            load = lambda x: plgpu.load(
                refs.extra.rows.at[b, x, pl.ds(row0, TILE)],
                layout=plgpu.Layout.WGMMA.reduce(1),
                optimized=False,
            )
            return tuple(tile.by_row(load(x), tile.GROUP) - column for x in (0, 1))
        row = tile.iota(TILE, 0) + row0
        band = p.band
        before, after, shift = (
            (band.left, band.right, band.offset)
            if p.by_query
            else (band.right, band.left, -band.offset)
        )
        distance = row - column + shift
        lo = None if before is None else distance - before
        hi = (p.keys if p.by_query else p.queries) - column
        if after is not None:
            hi = jnp.minimum(hi, distance + (after + 1))
        return lo, hi

    def step(self, i, sums):
        """One tile: its dS, times the derivative of the score by every U."""
        p, r, ops = self.p, self.refs, self.ops
        where, slot = place(p, self.cta, i), ring_slot(i, p.config.stages)
        row_slot = slot if p.whole else 0
        b, head, query0, key0 = self.at(where)
        at = (b, head, query0, key0, COLUMNS)
        load = lambda program, refs: load_values(program, refs, *at, by_query=p.by_query)
        values = load(p.partials, r.extra.score)
        hidden = None if p.mask is None else load(p.mask, r.extra.mask)

        def products(s_acc, dp_acc):
            if p.whole:
                plgpu.barrier_wait(r.row_full.at[row_slot])
            plgpu.barrier_wait(r.column_full.at[slot])
            rows = pl.ds(pl.multiple_of(self.wg * TILE, TILE), TILE)
            own = lambda ref: ref.at[ops.opaque(row_slot), rows]
            passing = lambda ref: ref.at[ops.opaque(slot)].T
            s_acc = ops.wgmma(s_acc, own(r.row_smem), passing(r.column_smem))
            dp_acc = ops.wgmma(dp_acc, own(r.row_smem2), passing(r.column_smem2))
            return ops.load(s_acc, 1), ops.load(dp_acc, 0)

        s, dp = ops.with_acc(products, (TILE, COLUMNS), (TILE, COLUMNS))
        plgpu.barrier_arrive(r.column_free.at[slot])
        if p.whole:
            plgpu.barrier_arrive(r.row_free.at[row_slot])
        if p.soft_cap is not None:
            s = p.soft_cap * jnp.tanh(s * (p.scale / p.soft_cap))
        else:
            s = s * p.scale
        run = functools.partial(run_program, query0=query0, key0=key0, by_query=p.by_query)
        value, *slopes = run(p.partials, s, values)
        value = jnp.maximum(value, MASKED)
        if p.mask is not None:
            (value,) = run(p.mask, value, hidden or [], hide=True)
        value = tile.mask(value, *self.row_bounds(where))
        prob = jnp.exp2(value * LOG2E - self.statistic(where, 0))
        if p.rate:
            dp = tile.dropped(self.kept(where), dp)
        if p.dynamic:  # V past the end may hold NaN
            dp = jnp.where(prob > 0.0, dp, 0.0)
        ds = prob * (dp - self.statistic(where, 1)) * (1.0 / p.kept)
        fresh = [ds * slope for slope in slopes]
        if not p.whole:
            fresh = [tile.fold(x) for x in fresh]
        return tuple(a + x for a, x in zip(sums, fresh, strict=True))

    def kept(self, where: Place):
        """Which scores dropout keeps, in groups of 8 columns."""
        p = self.p
        b, head, query0, key0 = self.at(where)
        words = plgpu.load(
            self.refs.extra.words.at[b, head, pl.ds(query0, TILE if p.by_query else COLUMNS)],
            layout=plgpu.Layout.WGMMA.reduce(1 if p.by_query else 0),
            optimized=False,
        )
        if p.by_query:
            return tile.keeps_by_query(words, key0, COLUMNS, p.rate)
        word = tile.by_column(words, TILE)
        return tile.keeps_by_key((x for _, x in tile.groups(word)), key0, TILE, p.rate)

    def run(self) -> None:
        """The whole walk, and its sums."""
        p, r = self.p, self.refs
        if not p.whole:
            plgpu.barrier_wait(r.row_full.at[0])
        columns = COLUMNS if p.whole else tile.GROUP
        zeros = lambda: plgpu.layout_cast(
            jnp.zeros((TILE, columns), jnp.float32), plgpu.Layout.WGMMA
        )
        sums = tuple(zeros() for _ in range(p.count))
        sums = lax.fori_loop(jnp.int32(0), jnp.int32(steps(p)), self.step, sums)
        b, head, row_tile, block = self.cta
        rows = pl.ds(row_tile * p.config.rows + self.wg * TILE, TILE)
        for x, out in zip(sums, r.out, strict=True):
            if p.whole:
                where = out.at[b, head, rows, pl.ds(block * COLUMNS, COLUMNS)]
                self.ops.store_plain(where, x)
            else:
                self.ops.store_plain(out.at[b, head, rows], x.sum(axis=1))


def produce(p: Problem, refs: Refs, cta) -> None:
    """The warpgroup that loads both operands of the rows and of the columns."""
    plgpu.set_max_registers(_mgpu.registers(p.config.consumers)[1], action="decrease")
    queries, keys = (refs.q, refs.do), (refs.k, refs.v)
    along_rows, along_columns = (queries, keys) if p.by_query else (keys, queries)

    def load(sources, of_query: bool, where: Place, row0, rows, targets, full):
        head = where.head if of_query else div(where.head, p.group)
        for src, dst in zip(sources, targets, strict=True):
            plgpu.copy_gmem_to_smem(src.at[where.b, pl.ds(row0, rows), head], dst, full)

    def load_rows(where: Place, slot):
        targets = (refs.row_smem.at[slot], refs.row_smem2.at[slot])
        full = refs.row_full.at[slot]
        load(along_rows, p.by_query, where, where.row0, p.config.rows, targets, full)

    if not p.whole:
        load_rows(place(p, cta, jnp.int32(0)), 0)

    @pl.loop(0, steps(p))
    def _(i):
        where, slot = place(p, cta, i), rem(i, p.config.stages)
        if p.whole:
            pl.when(i >= p.config.stages)(lambda: plgpu.barrier_wait(refs.row_free.at[slot]))
            load_rows(where, slot)
        pl.when(i >= p.config.stages)(lambda: plgpu.barrier_wait(refs.column_free.at[slot]))
        targets = (refs.column_smem.at[slot], refs.column_smem2.at[slot])
        full = refs.column_full.at[slot]
        load(along_columns, not p.by_query, where, where.column0, COLUMNS, targets, full)

    for g in range(max(0, steps(p) - p.config.stages), steps(p)):  # leave no completion unobserved
        if p.whole:
            plgpu.barrier_wait(refs.row_free.at[g % p.config.stages])
        plgpu.barrier_wait(refs.column_free.at[g % p.config.stages])


def walk(
    operands: tuple[jax.Array, ...],
    lse: jax.Array,
    delta: jax.Array,
    *,
    options: Options,
    chosen: tuple[int, ...],
    by_query: bool,
    whole: bool,
    interpret: Any,
) -> list[jax.Array]:
    """The sums of one walk for the chosen arrays of the score_mod, cut to the caller's sizes."""
    q, _, v, _ = operands
    assert options.score is not None  # the caller has chosen arrays of it
    shape = options.score.arrays[chosen[0]].shape
    width = q.shape[-1] + v.shape[-1]
    sizes = [Tiles(2, 2), Tiles(1, 2), Tiles(1, 1)]
    config = next(c for c in sizes if c.smem_bytes(width, whole) <= SMEM_BYTES - 1024)
    p = Problem.of(
        q, v, options, config, interpret,
        partials=options.score.program.partials(chosen), count=len(chosen), by_query=by_query,
        whole=whole, shared=(shape[0] == 1, shape[1] == 1),
    )  # fmt: skip
    consumers, stages = config.consumers, config.stages
    rows, columns = p.config.rows, COLUMNS
    block_q, block_kv = (rows, columns) if by_query else (columns, rows)
    # lists of blocks are not walked here, and words are wanted whatever the rows are
    plain = dataclasses.replace(options, blocks=None)
    extra = extra_operands(plain, p.batch, block_q, block_kv, by_query=by_query, tile_rows=TILE)
    if options.dropout is not None:
        pad = ((0, 0), (0, 0), (0, -p.queries % block_q))
        extra = extra._replace(words=jnp.pad(options.dropout.words, pad))
    stats = statistics(lse, delta, block_q)
    leaves, tree = jax.tree.flatten(extra)
    b, n = p.fixed
    if whole:
        padded = (b, n, p.row_tiles * rows, p.column_blocks * columns)
    else:
        padded = (b, n, p.row_tiles * rows)

    def body(q, k, v, do, stats, *rest):
        given, rest = jax.tree.unflatten(tree, rest[: len(leaves)]), rest[len(leaves) :]
        refs = Refs(q, k, v, do, stats, given, rest[: p.count], *rest[p.count :])
        wg, cta = lax.axis_index("wg"), decode(p, lax.axis_index("cta"))

        @pl.when(wg < consumers)
        def _():
            plgpu.set_max_registers(_mgpu.registers(consumers)[0], action="increase")
            Consumer(p, refs, wg, cta).run()

        pl.when(wg == consumers)(lambda: produce(p, refs, cta))

    operand = lambda *s: plgpu.SMEM(s, p.dtype, transforms=_mgpu.swizzled(p.dtype))
    barrier = lambda n, arrivals=1: plgpu.Barrier(num_arrivals=arrivals, num_barriers=n)
    first, second = p.head_dim, p.head_dim_v
    row_slots = stages if whole else 1
    sums = _mgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(padded, jnp.float32) for _ in chosen),
        scratch_types=[
            operand(row_slots, rows, first),
            operand(row_slots, rows, second),
            operand(stages, columns, first),
            operand(stages, columns, second),
            barrier(row_slots, 2),
            barrier(stages, 2),
            barrier(row_slots, consumers),
            barrier(stages, consumers),
        ],
        grid=(b * n * p.row_tiles * (p.column_blocks if whole else 1),),
        grid_names=("cta",),
        num_warpgroups=consumers + 1,
        interpret=interpret,
    )(*(pad_tokens(x) for x in operands), stats, *leaves)
    length = p.queries if by_query else p.keys
    return [x[:, :, :length, : p.keys] if whole else x[:, :, :length] for x in sums]


def backward_scores(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    options: Options,
    wanted: tuple[int, ...],
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Gradients f32 of `options.score.arrays[i] for i in wanted`, in their shapes.

    The other arguments are those of `backward`.
    """
    assert options.score is not None  # the caller checks `wanted` against it
    kinds, found = options.score.program.kinds, {}
    arrays = options.score.arrays
    run = functools.partial(walk, (q, k, v, do), lse, delta, options=options, interpret=interpret)
    for by_query, served in ((True, ("query", "scalar")), (False, ("key",))):
        chosen = tuple(i for i in wanted if kinds[i] in served)
        if not chosen:
            continue
        for i, x in zip(chosen, run(chosen=chosen, by_query=by_query, whole=False), strict=True):
            if kinds[i] == "scalar":
                x = x.sum(-1)
            axes = tuple(a for a in (0, 1) if arrays[i].shape[a] == 1)
            found[i] = x.sum(axes, keepdims=True)
    for i in wanted:
        if kinds[i] == "tile":
            (found[i],) = run(chosen=(i,), by_query=True, whole=True)
    return tuple(found[i] for i in wanted)
