"""Flash attention forward for Hopper.

One warpgroup loads, `config.consumers` warpgroups compute 64 query rows each.  Inside a consumer
the matmul Q K^T of block i is issued before P V of block i-1, and the softmax of block i runs
under it (FlashAttention-3, Shah et al. 2024); between consumers the matmuls are issued in turn, so
the tensor cores stay busy under every softmax.

Tiles and blocks are those of `query_schedule.py`; for blocks outside its range a consumer only
keeps the barriers in step.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mgpu
from pallas_kernels._mgpu import Ops, div, rem
from pallas_kernels.flash_attention.config import ForwardConfig
from pallas_kernels.flash_attention.consumer import (
    Consumer,
    Refs,
    await_slot,
    free_slot,
    give_turn,
    take_turn,
)
from pallas_kernels.flash_attention.mask import TILE
from pallas_kernels.flash_attention.problem import Options, extra_operands, pad_tokens
from pallas_kernels.flash_attention.query_schedule import (
    Problem,
    Work,
    block_at,
    find,
    origin,
    over_tiles,
    place,
    tile_count,
    tile_of,
    work_table,
)


def consume(p: Problem, refs: Refs, wg) -> None:
    """A consumer warpgroup."""
    c = p.config
    plgpu.set_max_registers(_mgpu.registers(c.consumers)[0], action="increase")
    if c.pingpong and c.consumers > 1:
        pl.when(wg == c.consumers - 1)(lambda: give_turn(p, refs, wg))

    # 192 keys leave few registers: what depends on the warpgroup and where Q lies would be kept in
    # some from the first tile on, and what only the end of a tile needs throughout its loops
    opaque = lax.optimization_barrier if c.o_in_ring else lambda x: x

    def consumer(work: Work, j, done):
        me = opaque(wg)
        slot = me if c.q_stages == 1 else me + rem(j, c.q_stages) * c.consumers
        return Consumer(*place(p, refs, me, *work[:5], done, work.ranges), q_slot=slot)

    def one(j, t, done):
        work = find(p, refs, t, wg)
        work = work._replace(end=opaque(work.end))
        blocks = work.end - work.first
        here = consumer(work, j, done).with_rows()
        if c.o_in_ring:
            here = dataclasses.replace(here, anew=lambda: again(opaque(j), opaque(done)))
        here.run(blocks)
        return done + blocks

    def again(j, done):
        t = tile_of(p, lax.axis_index("cta"), j)
        return consumer(find(p, refs, t, wg), j, done)

    def chain(oacc):
        cta = lax.axis_index("cta")
        count, zero = tile_count(p, cta), jnp.int32(0)
        at = lambda j: find(p, refs, tile_of(p, cta, j), wg)

        def tile_and_next(j, state):
            work, done, state = state
            if not p.sorted:  # cheaper to compute anew than to keep in registers
                work = at(j)
            here = consumer(work, j, done)
            next_work = at(lax.min(j + 1, count - 1)) if p.sorted else work
            done = done + here.end_i
            state = here.with_rows().steps(state, oacc)
            more = j + 1 < count
            pl.when(jnp.logical_not(more))(lambda: here.finish(*here.last(state, oacc)))
            after = lambda: consumer(next_work if p.sorted else at(j + 1), j + 1, done)
            # a branch whose results have the layouts of a loop's
            cross = lambda _, state: here.cross(after(), state, oacc)
            state = lax.fori_loop(zero, more.astype(jnp.int32), cross, state)
            return next_work if p.sorted else (), done, state

        work = at(zero)
        start = consumer(work, zero, zero)
        plgpu.barrier_wait(refs.q_full.at[start.q_slot])
        state = start.with_rows().first_block(oacc)
        lax.fori_loop(zero, count, tile_and_next, (work if p.sorted else (), zero, state))

    if c.chained:
        Ops(p.interpret).with_acc(chain, (TILE, p.head_dim_v))
    else:
        done = over_tiles(p, one)
        if c.o_in_ring:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            free_slot(p, refs, 0, rem(done - 1, c.stages))
    if c.pingpong and c.consumers > 1:
        pl.when(wg == 0)(lambda: take_turn(p, refs, wg))
    plgpu.wait_smem_to_gmem(0)


def produce(p: Problem, refs: Refs) -> None:
    """The warpgroup that loads: Q of every consumer, K and V from the last block to the first."""
    c = p.config
    plgpu.set_max_registers(_mgpu.registers(c.consumers)[1], action="decrease")

    def one(j, t, done):
        b, head, q_tile, first, end, _ = find(p, refs, t)
        blocks = end - first
        kv_head, start = div(head, p.group), origin(p, q_tile)
        key_end = refs.extra.key_end[b] if p.dynamic else None

        def load_q():
            for w in range(c.consumers):
                to = w if c.q_stages == 1 else w + rem(j, c.q_stages) * c.consumers
                if c.persistent:
                    free = refs.q_free.at[to]
                    pl.when(j >= c.q_stages)(lambda free=free: plgpu.barrier_wait(free))
                rows = pl.ds(q_tile * c.block_q + w * TILE, TILE)
                dst = refs.q_smem.at[to]
                plgpu.copy_gmem_to_smem(refs.q.at[b, rows, head], dst, refs.q_full.at[to])

        def load(which, i):
            slot = rem(done + i, c.stages)
            rings: Any = (
                (refs.k, refs.k_smem, refs.k_full),
                (refs.v, refs.v_smem, refs.v_full),
            )
            src, dst, full = rings[which]
            block = block_at(p, refs, b, head, q_tile, end, i)
            rows = pl.ds(block * c.block_kv + start, c.block_kv)
            pl.when(done + i >= c.stages)(lambda: await_slot(p, refs, which, slot))
            source = src.at[b, rows, kv_head]
            if which == 1 and p.dynamic:
                live, tile = key_end - rows.start, dst.at[pl.ds(slot, 1)]
                to = (full.at[slot], refs.landed)
                _mgpu.load_live([source], tile, *to, live, p.interpret)
            else:
                plgpu.copy_gmem_to_smem(source, dst.at[slot], full.at[slot])

        # K of the next tile may start before the consumers have let go of Q
        pl.when(blocks > 0)(lambda: load(0, jnp.int32(0)))
        load_q()
        pl.when(blocks > 0)(lambda: load(1, jnp.int32(0)))

        def both(i):
            load(0, i)
            load(1, i)

        if c.release == "named":  # unrolled it does not fit the registers of this warpgroup
            _mgpu.rolled_loop(1, blocks, both, p.interpret)
        else:
            pl.loop(1, blocks)(both)

        return done + blocks

    total = over_tiles(p, one)

    @pl.loop(lax.max(total - c.stages, jnp.int32(0)), total)
    def _(g):  # leave no completion unobserved
        for which in (0, 1):
            await_slot(p, refs, which, rem(g, c.stages))

    if c.persistent:
        count = tile_count(p, lax.axis_index("cta"))

        @pl.loop(lax.max(count - c.q_stages, jnp.int32(0)), count)
        def _(j):
            for w in range(c.consumers):
                plgpu.barrier_wait(refs.q_free.at[w + rem(j, c.q_stages) * c.consumers])


def scratch_types(p: Problem) -> list:
    """Operands, staging and barriers of a CTA, in the order of `Refs`."""
    c, swizzled = p.config, _mgpu.swizzled(p.dtype)
    operand = lambda *shape: plgpu.SMEM(shape, p.dtype, transforms=swizzled)
    chunks = c.o_chunks(p.head_dim_v)
    o_shape = (c.consumers, chunks, TILE, 64) if chunks else (c.consumers, TILE, p.head_dim_v)
    barrier = lambda n, arrivals=1: plgpu.Barrier(num_arrivals=arrivals, num_barriers=n)
    return [
        operand(c.q_stages * c.consumers, TILE, p.head_dim),
        operand(c.stages, c.block_kv, p.head_dim),
        operand(c.stages, c.block_kv, p.head_dim_v),
        operand(*o_shape) if c.own_o(p.head_dim, p.head_dim_v) else None,
        plgpu.SMEM((c.consumers, TILE), jnp.float32),
        barrier(c.stages),
        barrier(c.stages),
        barrier(c.q_stages * c.consumers),
        barrier(c.stages, c.consumers),
        barrier(c.stages, c.consumers),
        barrier(c.q_stages * c.consumers),
        plgpu.Barrier(num_arrivals=c.consumers) if c.o_in_ring else None,
        barrier(c.consumers),
        plgpu.Barrier(num_arrivals=1) if p.dynamic else None,
    ]


def forward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    options: Options,
    config: ForwardConfig,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """The kernel: `(out [B, T, N, Hv], lse [B, N, T] f32)`.

    T and S are multiples of 8 in memory only where `pad_tokens` made them so: `queries` and `keys`
    of the problem are what the masks use.  H and Hv are multiples of 64 with Hv <= H.
    """
    p = Problem.of(q, v, options, config, interpret)
    config.check(p.head_dim, p.head_dim_v)
    if config.o_in_ring and p.lists:
        raise NotImplementedError("o_in_ring with listed blocks, which may be none")
    q, k, v = (pad_tokens(x) for x in (q, k, v))
    extra = extra_operands(
        options, p.batch, p.tile_rows, config.block_kv, by_query=True, tile_rows=TILE
    )
    extra = extra._replace(query_end=None)
    if p.sorted:
        extra = extra._replace(work=work_table(p, extra), ranges=None)
    leaves, tree = jax.tree.flatten(extra)

    def body(q, k, v, *rest):
        given = jax.tree.unflatten(tree, rest[: len(leaves)])
        refs = Refs(q, k, v, given, *rest[len(leaves) :])
        wg = lax.axis_index("wg")
        pl.when(wg < config.consumers)(lambda: consume(p, refs, wg))
        pl.when(wg == config.consumers)(lambda: produce(p, refs))

    out, lse = _mgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((*q.shape[:3], p.head_dim_v), q.dtype),
            jax.ShapeDtypeStruct((p.batch, p.heads, p.q_tiles * p.tile_rows), jnp.float32),
        ),
        scratch_types=scratch_types(p),
        grid=(p.programs,),
        grid_names=("cta",),
        num_warpgroups=config.consumers + 1,
        interpret=interpret,
    )(q, k, v, *leaves)
    return out[:, : p.queries], lse[:, :, : p.queries]
