"""dQ alone, query-stationary: the second half of the deterministic backward.

`backward.py` adds dQ to memory from many CTAs, in an order that differs from run to run.  Here a
consumer keeps Q and dO of 64 query rows and sums dQ in its own registers, block after block:

    S = Q K^T    dP = dO V^T    dS = P * (dP - delta)    dQ += dS K

Together with `backward(dq=False)` that is seven matmuls for five, and every bit repeats.  The walk
over blocks is the forward's: same tiles, same ranges, same ring.
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
from pallas_kernels._mgpu import MASKED, SMEM_BYTES, div, rem
from pallas_kernels.flash_attention import consumer as fwd
from pallas_kernels.flash_attention import query_schedule as schedule
from pallas_kernels.flash_attention import tile
from pallas_kernels.flash_attention.config import ForwardConfig
from pallas_kernels.flash_attention.mask import TILE
from pallas_kernels.flash_attention.problem import (
    Extra,
    Options,
    extra_operands,
    pad_tokens,
    statistics,
)
from pallas_kernels.flash_attention.program import Program


class Refs(NamedTuple):
    """What a CTA works on; names shared with the forward mean the same."""

    q: Any
    k: Any
    v: Any
    do: Any
    stats: Any  # [B, N, 2, T'] f32: lse (base 2) and delta
    extra: Extra
    dq: Any
    q_smem: Any
    do_smem: Any
    k_smem: Any
    v_smem: Any
    q_full: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    landed: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Problem(schedule.Problem):
    """The static side of one call."""

    slope: Program | None = None  # of the score_mod: (value, d value / d score)


@dataclasses.dataclass(frozen=True)
class Consumer(fwd.Consumer):
    """One consumer warpgroup at one tile."""

    p: Problem

    def gradient(self, s_acc, dp_acc, i, masked: str):
        """dS of block i: both matmuls, then what lies between them and dQ."""
        p, r, ops = self.p, self.refs, self.ops
        slot, block = self.slot(i), self.operands(i, bool(masked))
        own = lambda ref: ref.at[ops.opaque(0) + self.wg]  # no descriptors across the loop
        plgpu.barrier_wait(r.k_full.at[slot])
        s_acc = ops.wgmma(s_acc, own(r.q_smem), r.k_smem.at[slot].T)
        plgpu.barrier_wait(r.v_full.at[slot])
        dp_acc = ops.wgmma(dp_acc, own(r.do_smem), r.v_smem.at[slot].T)
        s = ops.load(s_acc, 1)
        s, slack = self.logits_and_slope(s, i, masked, block)
        prob = jnp.exp2(s * p.multiplier - tile.by_row(self.statistic(0), s.shape[1]))
        if p.rate:
            kept = tile.keeps_by_query(block.words, self.key0(i), s.shape[1], p.rate)
            marked = [
                jnp.where(k, x, -x) for (_, x), k in zip(tile.groups(prob), kept, strict=True)
            ]
            prob = lax.concatenate(marked, 1)  # until dP is there
        dp = ops.load(dp_acc, 0)
        plgpu.barrier_arrive(r.v_free.at[slot])
        if p.rate:
            dp, prob = jnp.where(prob < 0.0, 0.0, dp), jnp.abs(prob)
        ds = prob * (dp - tile.by_row(self.statistic(1), dp.shape[1]))
        return (ds if slack is None else ds * slack).astype(p.dtype)

    def logits_and_slope(self, s, i, masked: str, block):
        """The forward's logits, and the factor that soft cap and score_mod put on dS."""
        p, slack, factor = self.p, None, self.p.scale
        if p.soft_cap is not None:
            capped, factor = jnp.tanh(s * (p.scale / p.soft_cap)), p.soft_cap
            slack = 1.0 - capped * capped
        if p.slope is None:
            return self.logits(s, i, masked, block), slack
        natural = s * factor if p.soft_cap is None else capped * factor
        value, slope = self.modified(p.slope, natural, block.score, i)
        value = jnp.maximum(value, MASKED)
        value = self.masked(value, i, block) if masked else value
        if p.slope.additive:
            return value, slack
        return value, slope if slack is None else slack * slope

    def statistic(self, which: int):
        """lse (0) or delta (1) of this warpgroup's rows."""
        at = self.refs.stats.at[self.b, self.head, which, pl.ds(self.base, TILE)]
        return plgpu.load(at, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def step(self, i, carry, oacc, masked: str):
        """dQ += dS K of block i."""
        ops, r, slot = self.ops, self.refs, self.slot(i)
        shape = (TILE, self.p.config.block_kv)
        ds = ops.with_acc(functools.partial(self.gradient, i=i, masked=masked), shape, shape)
        dq = ops.wgmma(ops.uncarry(oacc, carry), ds, r.k_smem.at[slot])
        ops.wait(0)
        plgpu.barrier_arrive(r.k_free.at[slot])
        return ops.carry(dq)

    def attend(self, oacc):
        """dQ of this warpgroup's rows."""
        p, ops = self.p, self.ops
        loop = lambda lo, hi, masked, c: lax.fori_loop(
            lo, hi, functools.partial(self.step, oacc=oacc, masked=masked), c
        )
        c, i = ops.carry(oacc), self.begin_i
        if p.masked_high:
            border = lax.max(i, lax.min(self.full_i, self.end_i))
            c, i = loop(i, border, fwd.BOTH, c), border
        border = lax.max(i, lax.min(self.low_i, self.end_i)) if p.masked_low else self.end_i
        c = loop(i, border, fwd.NONE, c)
        if p.masked_low:
            c = loop(border, self.end_i, fwd.BOTH, c)
        ops.wait(0)
        return ops.load(ops.uncarry(oacc, c))

    def pass_over(self, lo, hi) -> None:
        """Free the blocks that this warpgroup does not see."""

        @pl.loop(lo, hi)
        def _(i):
            slot = self.slot(i)
            for full, free in (
                (self.refs.k_full, self.refs.k_free),
                (self.refs.v_full, self.refs.v_free),
            ):
                plgpu.barrier_wait(full.at[slot])
                plgpu.barrier_arrive(free.at[slot])

    def run(self, blocks) -> None:
        """The whole tile; rows that see nothing get zeros from an empty loop."""
        p, r = self.p, self.refs
        plgpu.barrier_wait(r.q_full.at[self.wg])
        self.pass_over(jnp.int32(0), self.begin_i)
        dq = self.ops.with_acc(self.attend, (TILE, p.head_dim))
        self.pass_over(self.end_i, blocks)
        dst = r.q_smem.at[self.wg]
        dst[...] = (dq * (p.scale / p.kept)).astype(p.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(dst, r.dq.at[self.b, pl.ds(self.base, TILE), self.head])
        plgpu.wait_smem_to_gmem(0)


def produce(p: Problem, refs: Refs, b, head, q_tile, end, blocks) -> None:
    """The warpgroup that loads: Q and dO of every consumer, then K and V block by block."""
    c, ends = p.config, refs.extra
    plgpu.set_max_registers(_mgpu.registers(c.consumers)[1], action="decrease")
    query_end, key_end = (ends.query_end[b], ends.key_end[b]) if p.dynamic else (None, None)

    def load(src, at, ring, slot, full, end):
        if not p.dynamic:
            plgpu.copy_gmem_to_smem(src.at[at], ring.at[slot], full.at[slot])
            return
        live, dst = end - at[1].start, ring.at[pl.ds(slot, 1)]
        to = (full.at[slot], refs.landed)
        _mgpu.load_live([src.at[at]], dst, *to, live, p.interpret)

    for w in range(c.consumers):
        rows = (b, pl.ds(q_tile * c.block_q + w * TILE, TILE), head)
        load(refs.q, rows, refs.q_smem, w, refs.q_full, query_end)
        load(refs.do, rows, refs.do_smem, w, refs.q_full, query_end)
    rings = (
        (refs.k, refs.k_smem, refs.k_full, refs.k_free),
        (refs.v, refs.v_smem, refs.v_full, refs.v_free),
    )

    @pl.loop(0, blocks)
    def _(i):
        slot = rem(i, c.stages)
        block = schedule.block_at(p, refs, b, head, q_tile, end, i)
        at = (b, pl.ds(block * c.block_kv, c.block_kv), div(head, p.group))
        for src, dst, full, free in rings:
            pl.when(i >= c.stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
            load(src, at, dst, slot, full, key_end)

    @pl.loop(lax.max(blocks - c.stages, jnp.int32(0)), blocks)
    def _(i):  # leave no completion unobserved
        for *_, free in rings:
            plgpu.barrier_wait(free.at[rem(i, c.stages)])


def check(p: Problem) -> None:
    """Raises NotImplementedError where the tiles do not fit."""
    c = p.config
    width = p.head_dim + p.head_dim_v
    need = 2 * width * (c.block_q + c.stages * c.block_kv)
    if need > SMEM_BYTES - 1024:
        raise NotImplementedError(f"{c} needs {need} bytes of shared memory for dQ at {width=}")
    if c.persistent or c.release != "mbar":
        raise NotImplementedError(f"dQ alone has no persistent grid and frees by mbar: {c}")


def backward_dq(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    options: Options,
    config: ForwardConfig,
    interpret: Any = None,
) -> jax.Array:
    """dQ `[B, T, N, H]` in q's dtype, scaled; the arguments are those of `backward`.

    Of the config, `block_kv`, `stages` and `consumers` count.
    """
    slope = None if options.score is None else options.score.program.slope()
    p = Problem.of(q, v, options, config, interpret, slope=slope)
    check(p)
    q, k, v, do = (pad_tokens(x) for x in (q, k, v, do))
    stats = statistics(lse, delta, config.block_q)
    extra = extra_operands(
        options, p.batch, config.block_q, config.block_kv, by_query=True, tile_rows=TILE
    )
    leaves, tree = jax.tree.flatten(extra)

    def body(q, k, v, do, stats, *rest):
        given = jax.tree.unflatten(tree, rest[: len(leaves)])
        refs = Refs(q, k, v, do, stats, given, *rest[len(leaves) :])
        wg = lax.axis_index("wg")
        b, head, q_tile = schedule.decode(p, lax.axis_index("cta"))
        first, end = schedule.tile_blocks(p, refs, b, head, q_tile)

        @pl.when(wg < config.consumers)
        def _():
            plgpu.set_max_registers(_mgpu.registers(config.consumers)[0], action="increase")
            place = schedule.place(p, refs, wg, b, head, q_tile, first, end, jnp.int32(0))
            Consumer(*place).run(end - first)

        pl.when(wg == config.consumers)(lambda: produce(p, refs, b, head, q_tile, end, end - first))

    swizzled = _mgpu.swizzled(p.dtype)
    operand = lambda *shape: plgpu.SMEM(shape, p.dtype, transforms=swizzled)
    barrier = lambda n, arrivals=1: plgpu.Barrier(num_arrivals=arrivals, num_barriers=n)
    dq = _mgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=[
            operand(config.consumers, TILE, p.head_dim),
            operand(config.consumers, TILE, p.head_dim_v),
            operand(config.stages, config.block_kv, p.head_dim),
            operand(config.stages, config.block_kv, p.head_dim_v),
            barrier(config.consumers, 2),
            barrier(config.stages),
            barrier(config.stages),
            barrier(config.stages, config.consumers),
            barrier(config.stages, config.consumers),
            plgpu.Barrier(num_arrivals=1) if p.dynamic else None,
        ],
        grid=(p.total,),
        grid_names=("cta",),
        num_warpgroups=config.consumers + 1,
        interpret=interpret,
    )(q, k, v, do, stats, *leaves)
    return dq[:, : p.queries]
