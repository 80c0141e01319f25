"""Flash attention backward for Hopper: one KV-stationary kernel, five matmuls a tile.

A CTA keeps `64 * consumers` rows of K and V of one KV head in shared memory and walks the query
tiles of every query head of the group, so grouped heads need no partial sums.  With the tile
transposed (rows are keys), P^T and dS^T stay in registers as operands of dV and dK:

    S^T = K Q^T    dP^T = V dO^T    P = exp2(S - lse)    dS = P * (dP - delta)
    dV += P^T dO   dK += dS^T Q     dQ += dS K

dS goes through shared memory once (with `split="columns"`, for wide heads, P does too), and dQ
leaves by TMA reduce-add in f32 (FlashAttention-3, Shah et al. 2024): the order of those additions
is not fixed.  `dq=False` leaves dQ to `backward_dq.py`, which makes both gradients bitwise
repeatable at the price of two more matmuls.
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
from pallas_kernels._mgpu import Ops, cdiv, div, rem
from pallas_kernels.flash_attention import tile
from pallas_kernels.flash_attention.config import BackwardConfig
from pallas_kernels.flash_attention.forward import LOG2E, pad_tokens
from pallas_kernels.flash_attention.mask import FAR, Band, Bounds, pad_rows, tile_ranges

DS_BARRIER = 5  # and 6: named barriers between the consumers (0..4 are Mosaic's)


@dataclasses.dataclass(frozen=True)
class Problem:
    """The static side of one call."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: Any
    band: Band
    dynamic: bool
    scale: float
    soft_cap: float | None
    alibi: bool
    dq: bool  # whether this kernel computes dQ
    config: BackwardConfig
    interpret: bool

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def kv_tiles(self) -> int:
        """KV tiles of one head."""
        return cdiv(self.keys, self.config.block_kv)

    @property
    def ragged_keys(self) -> bool:
        """Whether the last KV tile hangs over the end."""
        return self.keys % self.config.block_kv != 0

    @property
    def masked_low(self) -> bool:
        """Whether query tiles at the low end of a range may need a mask."""
        return self.dynamic or self.ragged_keys or self.band.right is not None

    @property
    def masked_high(self) -> bool:
        """Whether query tiles at the high end of a range may need a mask."""
        return self.dynamic or self.band.left is not None


class Refs(NamedTuple):
    """What a CTA works on."""

    q: Any
    k: Any
    v: Any
    do: Any
    stats: Any  # [B, N, 2, T'] f32: lse (base 2) and delta
    rows: Any  # [B, 2, S'] i32 or None
    ranges: Any  # [B, S' / block_kv, 4] i32 or None
    slopes: Any  # [N] f32 or None
    dq: Any  # f32, added to; None without
    dk: Any
    dv: Any
    k_smem: Any
    v_smem: Any
    q_smem: Any
    do_smem: Any
    stats_smem: Any
    ds_smem: Any
    p_smem: Any  # split="columns" only
    dq_smem: Any
    k_full: Any
    v_full: Any
    q_full: Any
    do_full: Any
    q_free: Any
    do_free: Any
    ds_ready: Any
    k_done: Any


def head_group(p: Problem) -> int:
    """(batch, KV head) pairs whose tiles run together, so that Q, dO and dQ stay in L2."""
    pairs = p.batch * p.kv_heads
    per_pair = p.queries * p.group * (2 * (p.head_dim + p.head_dim_v) + 4 * p.head_dim)
    most = max(1, (32 << 20) // per_pair)
    return max(x for x in range(1, pairs + 1) if pairs % x == 0 and x <= most)


def decode(p: Problem, t):
    """Flat tile number to (batch, KV head, KV tile); causal starts with the longest, the first."""
    if not p.dynamic and p.band.right is not None and p.band.left is None:
        size = head_group(p)
        group, r = div(t, size * p.kv_tiles), rem(t, size * p.kv_tiles)
        kv_tile, pair = div(r, size), group * size + rem(r, size)
    else:
        pair, kv_tile = div(t, p.kv_tiles), rem(t, p.kv_tiles)
    return div(pair, p.kv_heads), rem(pair, p.kv_heads), kv_tile


def query_ranges(p: Problem, refs: Refs, b, kv_tile):
    """Query tiles that a KV tile meets: `(first, end, full_first, full_end)`, as in the forward."""
    bq, bk = p.config.block_q, p.config.block_kv
    if p.dynamic:
        any_lo, any_hi, all_lo, all_hi = (refs.ranges[b, kv_tile, i] for i in range(4))
    else:
        base = kv_tile * bk
        last = lax.min(base + (bk - 1), jnp.int32(p.keys - 1))
        zero, queries, band = jnp.int32(0), jnp.int32(p.queries), p.band
        any_lo = all_lo = zero
        any_hi = all_hi = queries
        if band.right is not None:
            any_lo = lax.max(base - (band.offset + band.right), zero)
            all_lo = lax.max(last - (band.offset + band.right), zero)
        if band.left is not None:
            reach = band.left - band.offset + 1
            clip = lambda x: lax.max(lax.min(x + reach, queries), zero)
            any_hi, all_hi = clip(last), clip(base)
        if p.ragged_keys:  # rows past the end are masked in every query tile
            all_hi = jnp.where(base + bk > p.keys, 0, all_hi)
    some = any_lo < any_hi
    first = jnp.where(some, div(any_lo, bq), 0)
    end = jnp.where(some, div(any_hi + (bq - 1), bq), 0)
    full_first = lax.min(div(all_lo + (bq - 1), bq), end)
    # a query tile that hangs over the end needs no mask: its missing rows have P = 0 by their lse
    all_hi = jnp.where(all_hi >= p.queries, end * bq, all_hi)
    full_end = lax.min(div(all_hi, bq), end)
    if not p.masked_high:
        # nothing but the low loop masks, so it takes the tiles that have no unmasked part at all
        full_first = jnp.where(full_end <= full_first, end, full_first)
        full_end = end
    return first, end, full_first, lax.max(full_end, full_first)


@dataclasses.dataclass(frozen=True)
class Consumer:
    """One consumer warpgroup: 64 key rows."""

    p: Problem
    refs: Refs
    wg: Any
    b: Any
    kv_head: Any
    kv_tile: Any
    first: Any  # first query tile
    count: Any  # query tiles of one head

    @property
    def ops(self) -> Ops:
        """Accumulators."""
        return Ops(self.p.interpret)

    @property
    def rows(self):
        """This warpgroup's rows of the KV tile."""
        start = 0 if self.p.config.parts > 1 else pl.multiple_of(self.wg * 64, 64)
        return pl.ds(start, 64)

    @property
    def part(self):
        """This warpgroup's column part of the operands."""
        return self.wg if self.p.config.parts > 1 else 0

    @property
    def key0(self):
        """This warpgroup's first key."""
        return self.kv_tile * self.p.config.block_kv + self.rows.start

    def row_bounds(self, query0):
        """`(lo, hi)` for `tile.mask` on the query tile that starts at query0."""
        p = self.p
        column = tile.iota(64, 1) + query0
        if p.dynamic:
            at = pl.ds(self.key0, 64)
            load = lambda x: plgpu.load(
                self.refs.rows.at[self.b, x, at],
                layout=plgpu.Layout.WGMMA.reduce(1),
                optimized=False,
            )
            return tuple(tile.by_row(load(x), tile.GROUP) - column for x in (0, 1))
        key = tile.iota(64, 0) + self.key0
        distance = key - column - p.band.offset
        lo = None if p.band.right is None else distance - p.band.right
        hi = None if p.band.left is None else distance + (p.band.left + 1)
        if p.ragged_keys:
            # FAR for a key inside, 0 for one past the end
            inside = jnp.clip(p.keys - key, 0, 1) * FAR - column
            hi = inside if hi is None else jnp.minimum(hi, inside)
        return lo, hi

    def statistic(self, slot, which: int):
        """lse (0) or delta (1) of a query tile."""
        return plgpu.load(
            self.refs.stats_smem.at[slot, which],
            layout=plgpu.Layout.WGMMA.reduce(0),
            optimized=False,
        )

    def scores(self, acc, resident, ring, slot):
        """`acc += resident @ ring^T` of this warpgroup's rows, over all column parts.

        The opaque index keeps the wgmma descriptors of K and V out of the loop's registers.
        """
        for part in range(self.p.config.parts):
            rows = resident.at[self.ops.opaque(part), self.rows]
            acc = self.ops.wgmma(acc, rows, ring.at[slot, part].T)
        return acc

    def probabilities(self, s, slot, head, query0, masked: bool):
        """P^T, and the factor that the soft cap puts on dS (None without one)."""
        p = self.p
        lse = self.statistic(slot, 0)
        multiplier, slack = p.scale * LOG2E, None
        if p.soft_cap is not None:
            s = jnp.tanh(s * (p.scale / p.soft_cap))
            multiplier, slack = p.soft_cap * LOG2E, 1.0 - s * s
        if p.alibi:
            shift = query0 + p.band.offset - self.key0
            distance = (tile.iota(64, 1) - tile.iota(64, 0) + shift).astype(jnp.float32)
            slope = self.refs.slopes[head] * LOG2E
            s = tile.add_distance(s * multiplier, -distance, slope)
            multiplier = 1.0
        if masked:
            s = tile.mask(s, *self.row_bounds(query0))
        return jnp.exp2(s * multiplier - tile.by_column(lse, 64)), slack

    def sync(self, which: int = 0) -> None:
        """All consumers have written what they share; `which` of the two barriers of a step."""
        p, r = self.p, self.refs
        plgpu.commit_smem()
        if p.config.sync == "named" and not p.interpret:
            _mgpu.named_barrier_sync(DS_BARRIER + which, _mgpu.WARPGROUP * p.config.consumers)
        else:
            plgpu.barrier_arrive(r.ds_ready.at[which])
            plgpu.barrier_wait(r.ds_ready.at[which])

    def dq_operands(self, slot, chunk: int):
        """dS and K for this warpgroup's share of dQ."""
        p, r, c = self.p, self.refs, self.p.config
        part = self.ops.opaque(0) + self.part
        rows, columns = c.dq_tile(p.head_dim)
        if c.splits_rows:
            at = pl.ds(pl.multiple_of(self.wg * rows, rows), rows)
            return r.ds_smem.at[slot, :, at].T, r.k_smem.at[part]
        first = chunk * columns + (0 if c.parts > 1 else self.wg * columns * c.dq_chunks)
        at = pl.ds(first if isinstance(first, int) else pl.multiple_of(first, columns), columns)
        return r.ds_smem.at[slot].T, r.k_smem.at[part, :, at]

    def add_dq(self, dq, head, query0, chunk: int) -> None:
        """This warpgroup's share of dQ, added to memory by TMA."""
        p, r, wg, c = self.p, self.refs, self.wg, self.p.config
        staging = r.dq_smem.at[wg]
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        staging[...] = dq
        plgpu.commit_smem()
        rows, columns = c.dq_tile(p.head_dim)
        if c.splits_rows:
            dst = (self.b, pl.ds(query0 + wg * rows, rows), head)
        else:
            first = (wg * c.dq_chunks + chunk) * columns
            at = pl.ds(pl.multiple_of(first, columns), columns)
            dst = (self.b, pl.ds(query0, rows), head, at)
        if p.interpret:  # no reduce-add there: every KV tile has a partial of its own
            plgpu.copy_smem_to_gmem(staging, r.dq.at[(self.kv_tile, *dst)])
        else:
            plgpu.copy_smem_to_gmem(staging, r.dq.at[dst], reduction_op="add")

    def softmax_gradient(self, dp, prob, slack, q_slot):
        """dS = P * (dP - delta), times the factor of the soft cap."""
        ds = prob * (dp - tile.by_column(self.statistic(q_slot, 1), 64))
        return (ds if slack is None else ds * slack).astype(self.p.dtype)

    def own_rows(self, it, head, query0, masked: bool):
        """`split="keys"`: P^T and dS^T of this warpgroup's keys, in registers."""
        p, r, ops, c = self.p, self.refs, self.ops, self.p.config
        q_slot, do_slot = rem(it, c.stages), rem(it, c.do_stages)

        def scores(s_acc, dp_acc):
            plgpu.barrier_wait(r.q_full.at[q_slot])
            s_acc = self.scores(s_acc, r.k_smem, r.q_smem, q_slot)
            plgpu.barrier_wait(r.do_full.at[do_slot])
            dp_acc = self.scores(dp_acc, r.v_smem, r.do_smem, do_slot)
            prob, slack = self.probabilities(ops.load(s_acc, 1), q_slot, head, query0, masked)
            return prob, slack, ops.load(dp_acc, 0)

        shape = (64, c.block_q)
        prob, slack, dp = ops.with_acc(scores, shape, shape)
        return prob.astype(p.dtype), self.softmax_gradient(dp, prob, slack, q_slot)

    def half_each(self, it, head, query0, masked: bool) -> None:
        """`split="columns"`: warpgroup 0 computes P^T, 1 takes it from memory and computes dS^T."""
        p, r, ops, c = self.p, self.refs, self.ops, self.p.config
        q_slot, do_slot, slot = rem(it, c.stages), rem(it, c.do_stages), rem(it, 2)
        # with a soft cap dS takes P times its factor, in a buffer of its own
        for_ds = slot if p.soft_cap is None else 3
        plgpu.barrier_wait(r.q_full.at[q_slot])
        plgpu.barrier_wait(r.do_full.at[do_slot])

        @pl.when(self.wg == 0)
        def _():
            issue = lambda acc: ops.load(self.scores(acc, r.k_smem, r.q_smem, q_slot))
            s = ops.with_acc(issue, (64, c.block_q))
            prob, slack = self.probabilities(s, q_slot, head, query0, masked)
            high = prob.astype(p.dtype)
            r.p_smem[slot] = high
            if slack is not None:
                prob = prob * slack
                high = prob.astype(p.dtype)
                r.p_smem[for_ds] = high
            # dS needs P better than rounded: what rounding took away follows it
            r.p_smem[2] = (prob - high.astype(jnp.float32)).astype(p.dtype)
            self.sync(0)

        @pl.when(self.wg == 1)
        def _():
            issue = lambda acc: ops.load(self.scores(acc, r.v_smem, r.do_smem, do_slot))
            dp = ops.with_acc(issue, (64, c.block_q))
            self.sync(0)
            layout = plgpu.Layout.WGMMA
            read = lambda at: plgpu.load(r.p_smem.at[at], layout=layout, optimized=False)
            prob = read(for_ds).astype(jnp.float32) + read(2).astype(jnp.float32)
            r.ds_smem[0] = self.softmax_gradient(dp, prob, None, q_slot)
            plgpu.commit_smem()

    def step(self, i, carry, head_i, dk_acc, dv_acc, masked: bool):
        """One query tile of one head."""
        p, r, ops, c = self.p, self.refs, self.ops, self.p.config
        dk, dv = ops.uncarry(dk_acc, carry[0]), ops.uncarry(dv_acc, carry[1])
        it = head_i * self.count + (i - self.first)
        head, query0 = self.kv_head * p.group + head_i, i * c.block_q
        q_slot, do_slot, slot = rem(it, c.stages), rem(it, c.do_stages), rem(it, 2)
        if c.parts > 1:
            self.half_each(it, head, query0, masked)
            ds_slot = 0  # written after sync(0), which follows the last reads of the step before
            prob, ds = r.p_smem.at[slot], r.ds_smem.at[ds_slot]
        else:
            ds_slot = slot
            prob, ds = self.own_rows(it, head, query0, masked)
        dv = ops.wgmma(dv, prob, r.do_smem.at[do_slot, self.part])
        if c.parts == 1 and p.dq:
            r.ds_smem[slot, self.rows] = ds
        if c.parts > 1 or p.dq:
            self.sync(1)
        if not p.dq:
            dk = ops.wgmma(dk, ds, r.q_smem.at[q_slot, self.part])
        for chunk in range(c.dq_chunks if p.dq else 0):

            def dq_and_dk(dq_acc, chunk=chunk):
                nonlocal dk
                dq_acc = ops.wgmma(dq_acc, *self.dq_operands(ds_slot, chunk))
                if chunk:
                    return ops.load(dq_acc, 0)
                dk = ops.wgmma(dk, ds, r.q_smem.at[q_slot, self.part])
                return ops.load(dq_acc, 1)

            dq = ops.with_acc(dq_and_dk, c.dq_tile(p.head_dim))
            if chunk == 0:
                plgpu.barrier_arrive(r.do_free.at[do_slot])
            self.add_dq(dq, head, query0, chunk)
        ops.wait(0)
        if not p.dq:
            plgpu.barrier_arrive(r.do_free.at[do_slot])
        plgpu.barrier_arrive(r.q_free.at[q_slot])
        return ops.carry(dk), ops.carry(dv)

    def run(self, end, full_first, full_end) -> None:
        """All query tiles of all heads of the group, then dK and dV."""
        p, r, ops = self.p, self.refs, self.ops
        plgpu.barrier_wait(r.k_full)
        plgpu.barrier_wait(r.v_full)

        def accumulate(dk, dv):
            def one_head(head_i, c):
                step = functools.partial(self.step, head_i=head_i, dk_acc=dk, dv_acc=dv)
                loop = lambda lo, hi, masked, c: lax.fori_loop(
                    lo, hi, functools.partial(step, masked=masked), c
                )
                if p.masked_low:
                    c = loop(self.first, full_first, True, c)
                    c = loop(full_first, full_end, False, c)
                else:
                    c = loop(self.first, full_end, False, c)
                return loop(full_end, end, True, c) if p.masked_high else c

            c = (ops.carry(dk), ops.carry(dv))
            if p.group == 1:
                c = one_head(jnp.int32(0), c)
            else:
                c = lax.fori_loop(jnp.int32(0), jnp.int32(p.group), one_head, c)
            ops.wait(0)
            return ops.load(ops.uncarry(dk, c[0])), ops.load(ops.uncarry(dv, c[1]))

        parts = p.config.parts
        shapes = (64, p.head_dim // parts), (64, p.head_dim_v // parts)
        dk, dv = ops.with_acc(accumulate, *shapes)
        self.store(r.v_smem, dv, r.dv)
        plgpu.barrier_arrive(r.k_done)  # dQ of every consumer reads all rows of K
        plgpu.barrier_wait(r.k_done)
        self.store(r.k_smem, dk * p.scale, r.dk)
        plgpu.wait_smem_to_gmem(0)

    def store(self, staging, value, out) -> None:
        """dK or dV through the shared memory of K or V."""
        p = self.p
        at = (self.b, pl.ds(self.key0, 64), self.kv_head)
        if p.config.parts > 1:
            columns = value.shape[1]
            at = (*at, pl.ds(pl.multiple_of(self.wg * columns, columns), columns))
        staging[self.part, self.rows] = value.astype(p.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(staging.at[self.part, self.rows], out.at[at])


def load_parts(p: Problem, src, at, dst, full) -> None:
    """One tile, column part by column part."""
    columns = dst.shape[-1]
    for part in range(p.config.parts):
        where = (*at, pl.ds(part * columns, columns)) if p.config.parts > 1 else at
        plgpu.copy_gmem_to_smem(src.at[where], dst.at[part], full)


def produce(p: Problem, refs: Refs, b, kv_head, kv_tile, first, count) -> None:
    """The warpgroup that loads: K and V once, then Q, its statistics and dO tile by tile."""
    c = p.config
    plgpu.set_max_registers(32 if c.consumers == 3 else 24, action="decrease")
    kv = (b, pl.ds(kv_tile * c.block_kv, c.block_kv), kv_head)
    load_parts(p, refs.k, kv, refs.k_smem, refs.k_full)
    load_parts(p, refs.v, kv, refs.v_smem, refs.v_full)
    total = count * p.group

    @pl.loop(0, total)
    def _(it):
        head = kv_head * p.group + (lax.div(it, count) if p.group > 1 else 0)
        i = first + (lax.rem(it, count) if p.group > 1 else it)
        rows = pl.ds(i * c.block_q, c.block_q)
        slot, do_slot = rem(it, c.stages), rem(it, c.do_stages)
        pl.when(it >= c.stages)(lambda: plgpu.barrier_wait(refs.q_free.at[slot]))
        q_full = refs.q_full.at[slot]
        load_parts(p, refs.q, (b, rows, head), refs.q_smem.at[slot], q_full)
        plgpu.copy_gmem_to_smem(refs.stats.at[b, head, :, rows], refs.stats_smem.at[slot], q_full)
        pl.when(it >= c.do_stages)(lambda: plgpu.barrier_wait(refs.do_free.at[do_slot]))
        do_full = refs.do_full.at[do_slot]
        load_parts(p, refs.do, (b, rows, head), refs.do_smem.at[do_slot], do_full)

    for stages, free in ((c.stages, refs.q_free), (c.do_stages, refs.do_free)):

        @pl.loop(lax.max(total - stages, jnp.int32(0)), total)
        def _(it, stages=stages, free=free):  # leave no completion unobserved
            plgpu.barrier_wait(free.at[rem(it, stages)])


def scratch_types(p: Problem) -> list:
    """Operands, staging and barriers of a CTA, in the order of `Refs`."""
    c = p.config
    half, full = _mgpu.swizzled(p.dtype), _mgpu.swizzled(jnp.float32)
    operand = lambda *shape: plgpu.SMEM(shape, p.dtype, transforms=half)
    barrier = lambda n=None, arrivals=1: (
        plgpu.Barrier(num_arrivals=arrivals)
        if n is None
        else plgpu.Barrier(num_arrivals=arrivals, num_barriers=n)
    )
    n, shared = c.parts, p.dq or c.parts > 1
    return [
        operand(n, c.block_kv, p.head_dim // n),
        operand(n, c.block_kv, p.head_dim_v // n),
        operand(c.stages, n, c.block_q, p.head_dim // n),
        operand(c.do_stages, n, c.block_q, p.head_dim_v // n),
        plgpu.SMEM((c.stages, 2, c.block_q), jnp.float32),
        operand(2 if n == 1 else 1, c.block_kv, c.block_q) if shared else None,
        operand(3 if p.soft_cap is None else 4, c.block_kv, c.block_q) if n > 1 else None,
        plgpu.SMEM((c.consumers, *c.dq_tile(p.head_dim)), jnp.float32, transforms=full)
        if p.dq
        else None,
        barrier(arrivals=n),
        barrier(arrivals=n),
        barrier(c.stages, n + 1),
        barrier(c.do_stages, n),
        barrier(c.stages, c.consumers),
        barrier(c.do_stages, c.consumers),
        barrier(2, c.consumers),
        barrier(arrivals=c.consumers),
    ]


def statistics(lse: jax.Array, delta: jax.Array, multiple: int) -> jax.Array:
    """[B, N, 2, T'] f32: lse in base 2 and delta; a row that saw nothing gets 1e30, so P = 0."""
    lse = jnp.where(jnp.isneginf(lse), 1e30, lse * LOG2E)
    pad = ((0, 0), (0, 0), (0, -lse.shape[-1] % multiple))
    return jnp.stack([jnp.pad(lse, pad, constant_values=1e30), jnp.pad(delta, pad)], axis=2)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    band: Band,
    bounds: Bounds | None,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    dq: bool = True,
    config: BackwardConfig,
    interpret: Any = None,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """The kernel: `(dq f32 [B, T, N, H] not yet times scale, or None; dk; dv)`.

    lse and delta are `[B, N, T]` f32; delta is `rowsum(do * out)` less what comes in through lse.
    """
    (batch, queries, heads, head_dim), (_, keys, kv_heads, head_dim_v) = q.shape, v.shape
    p = Problem(
        batch, queries, keys, heads, kv_heads, head_dim, head_dim_v, q.dtype, band,
        bounds is not None, scale, soft_cap, alibi_slopes is not None, dq, config, bool(interpret),
    )  # fmt: skip
    config.check(head_dim, head_dim_v, soft_cap is not None)
    q, k, v, do = (pad_tokens(x) for x in (q, k, v, do))
    stats = statistics(lse, delta, config.block_q)
    optional: dict[str, jax.Array] = {}
    if bounds is not None:
        rows = pad_rows(bounds.query_lo, bounds.query_hi, config.block_kv)
        rows = jnp.broadcast_to(rows, (batch, *rows.shape[1:]))
        optional["rows"], optional["ranges"] = rows, tile_ranges(rows, config.block_kv)
    if alibi_slopes is not None:
        optional["slopes"] = alibi_slopes.astype(jnp.float32)
    names = tuple(optional)
    outs = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in (("dk", k), ("dv", v))}
    dq_out = None
    if dq and interpret:
        outs["dq"] = jax.ShapeDtypeStruct((p.kv_tiles, *q.shape), jnp.float32)
    elif dq:
        dq_out = jax.new_ref(jnp.zeros(q.shape, jnp.float32))

    def body(q, k, v, do, stats, *rest):
        extra: dict[str, Any] = dict.fromkeys(("rows", "ranges", "slopes", "dq"))
        given = (*names, *(() if dq_out is None else ("dq",)), *outs)
        extra.update(zip(given, rest[: len(given)], strict=True))
        scratch = dict(zip(Refs._fields[11:], rest[len(given) :], strict=True))
        refs = Refs(q, k, v, do, stats, **extra, **scratch)
        wg = lax.axis_index("wg")
        b, kv_head, kv_tile = decode(p, lax.axis_index("cta"))
        first, end, full_first, full_end = query_ranges(p, refs, b, kv_tile)

        @pl.when(wg < config.consumers)
        def _():
            registers = {1: 240, 2: 240, 3: 160}[config.consumers]
            plgpu.set_max_registers(registers, action="increase")
            consumer = Consumer(p, refs, wg, b, kv_head, kv_tile, first, end - first)
            consumer.run(end, full_first, full_end)

        @pl.when(wg == config.consumers)
        def _():
            produce(p, refs, b, kv_head, kv_tile, first, end - first)

    results = _mgpu.kernel(
        body,
        out_type=tuple(outs.values()),
        scratch_types=scratch_types(p),
        grid=(batch * kv_heads * p.kv_tiles,),
        grid_names=("cta",),
        num_warpgroups=config.consumers + 1,
        interpret=interpret,
    )(q, k, v, do, stats, *optional.values(), *(() if dq_out is None else (dq_out,)))
    dk, dv = results[0][:, :keys], results[1][:, :keys]
    if not dq:
        return None, dk, dv
    if dq_out is not None:
        return dq_out[...][:, :queries], dk, dv
    # the interpreter leaves the partials of skipped tiles unwritten (zero, see `interpret_params`)
    return results[2].sum(0)[:, :queries], dk, dv
