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
import itertools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mgpu
from pallas_kernels._mgpu import MASKED, Ops, rem, ring_slot
from pallas_kernels.flash_attention import tile
from pallas_kernels.flash_attention.config import BackwardConfig
from pallas_kernels.flash_attention.key_schedule import (
    Problem,
    decode,
    query_tile,
    walk,
    work_table,
)
from pallas_kernels.flash_attention.mask import FAR
from pallas_kernels.flash_attention.problem import (
    LOG2E,
    Extra,
    Options,
    extra_operands,
    group_program,
    load_ranges,
    load_values,
    pad_tokens,
    statistics,
)

NONE, HIGH, BOTH = "", "high", "low and high"  # the borders that may cross a query tile
DS_BARRIER = 5  # and 6: named barriers between the consumers (0..4 are Mosaic's)


class Refs(NamedTuple):
    """What a CTA works on."""

    q: Any
    k: Any
    v: Any
    do: Any
    stats: Any  # [B, N, 2 or 3, T'] f32, see `statistics`
    extra: Extra
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
    landed: Any


class Loaded(NamedTuple):
    """Loaded values of one tile: of the score_mod and of the mask_mod; None without."""

    score: Any
    mask: Any


@dataclasses.dataclass(frozen=True)
class Consumer:
    """One consumer warpgroup: 64 key rows."""

    p: Problem
    refs: Refs
    wg: Any
    b: Any
    kv_head: Any
    kv_tile: Any
    key_rows: Any = None  # the query ranges of this warpgroup's keys, where they are at hand

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

    def load_rows(self):
        """The query ranges of this warpgroup's keys, `(lo, hi)`."""
        return load_ranges(self.refs.extra, self.b, self.key0)

    def with_rows(self):
        """Knows its keys' ranges early, where that is asked for."""
        if not self.p.dynamic or not self.p.config.tight_masks:
            return self
        return dataclasses.replace(self, key_rows=self.load_rows())

    def row_bounds(self, query0):
        """`(lo, hi)` for `tile.mask` on the query tile that starts at query0."""
        p = self.p
        column = tile.iota(64, 1) + query0
        if p.dynamic:
            rows = self.key_rows or self.load_rows()
            return tuple(tile.by_row(x, tile.GROUP) - column for x in rows)
        key, band = tile.iota(64, 0) + self.key0, p.band
        past_end = p.ragged_keys and band.right is not None
        if past_end:  # so far that no query sees it: the comparison with lo serves both
            key += jnp.clip(key - (p.keys - 1), 0, 1) * FAR
        distance = key - column - band.offset
        lo = None if band.right is None else distance - min(band.right, FAR // 2)
        hi = None if band.left is None else distance + (band.left + 1)
        if p.ragged_keys and not past_end:
            # FAR for a key inside, 0 for one past the end
            inside = jnp.clip(p.keys - key, 0, 1) * FAR - column
            hi = inside if hi is None else jnp.minimum(hi, inside)
        return lo, hi

    def load(self, head, query0, masked: str) -> Loaded:
        """What the modifiers need of a query tile, loaded before the matmuls are awaited."""
        p, extra = self.p, self.refs.extra
        at = (self.b, head, query0, self.key0, p.piece)
        lazy = p.piece > 64  # no room for vectors of columns beside S and dP
        load = lambda program, refs: load_values(program, refs, *at, by_query=False, lazy=lazy)
        return Loaded(
            load(p.score, extra.score) if p.score is not None else None,
            load(p.mask, extra.mask) if p.mask is not None and masked else None,
        )

    def statistic(self, slot, which: int, first: int = 0):
        """lse (0), delta (1) or the dropout words (2) of a query tile, `[64, 8]` a group.

        Of a piece whose queries start at `first`.  Where registers are short every group is loaded
        when it is asked for; a vector of 128 queries would take 32 of them.
        """
        ref = self.refs.stats_smem.at[slot, which, pl.ds(first, self.p.piece)]
        layout = plgpu.Layout.WGMMA.reduce(0)
        load = lambda at: plgpu.load(at, layout=layout, optimized=False)
        starts = range(0, self.p.piece, tile.GROUP)
        if self.p.tight:
            return (tile.by_column(load(ref.at[pl.ds(at, tile.GROUP)]), 64) for at in starts)
        whole = tile.by_column(load(ref), 64)
        return [whole[:, at : at + tile.GROUP] for at in starts]

    def kept(self, slot, first: int):
        """Which scores dropout keeps, in groups of 8 queries."""
        as_words = lambda x: lax.bitcast_convert_type(x, jnp.uint32)
        words = (as_words(x) for x in self.statistic(slot, 2, first))
        return tile.keeps_by_key(words, self.key0, 64, self.p.rate)

    def scores(self, acc, resident, ring, slot, first: int = 0):
        """`acc += resident @ ring^T` of this warpgroup's rows, over all column parts.

        Opaque indices keep the wgmma descriptors of what does not move out of the loop's registers.
        """
        for part in range(self.p.config.parts):
            rows = resident.at[self.ops.opaque(part), self.rows]
            queries = pl.ds(first, self.p.piece)
            acc = self.ops.wgmma(acc, rows, ring.at[self.ops.opaque(slot), part, queries].T)
        return acc

    def probabilities(self, s, slot, head, query0, masked: str, loaded: Loaded, first: int = 0):
        """(P^T, factor that soft cap and score_mod put on dS or None, kept or None) a group.

        Each group of 8 queries is carried to its end before the next: whole tiles of what lies
        between would not fit in registers.
        """
        p = self.p
        factor = p.scale if p.soft_cap is None else p.soft_cap
        multiplier = factor * LOG2E
        program = lambda f, values: group_program(f, values, query0, self.key0, by_query=False)
        sloped = None if p.slope is None else program(p.slope, loaded.score)
        hidden = program(p.mask, loaded.mask) if masked and p.mask is not None else None
        lo, hi = self.row_bounds(query0) if masked else (None, None)
        if p.dynamic and p.config.tight_masks and masked == HIGH:
            lo = None
        if p.alibi:
            shift = query0 + p.band.offset - self.key0
            distance = (tile.iota(64, 1) - tile.iota(64, 0) + shift).astype(jnp.float32)
            per_key = self.refs.extra.slopes[head] * LOG2E
        kept = self.kept(slot, first) if p.rate else itertools.repeat(None)
        lses = self.statistic(slot, 0, first)
        for (c, x), lse, keep in zip(tile.groups(s), lses, kept, strict=False):
            slack, times = None, multiplier
            if p.soft_cap is not None:
                x = jnp.tanh(x * (p.scale / p.soft_cap))
                slack = 1.0 - x * x
            if sloped is not None:
                x, slope = sloped(c, x * factor)
                if p.slope is not None and not p.slope.additive:
                    slack = slope if slack is None else slack * slope
                x, times = jnp.maximum(x, MASKED), LOG2E
            elif p.alibi:
                x, times = x * multiplier - jnp.abs(distance + float(c)) * per_key, 1.0
            if hidden is not None:
                x = jnp.where(hidden(c, x)[0], x, MASKED)
            yield jnp.exp2(tile.mask_group(x, c, lo, hi) * times - lse), slack, keep

    def sync(self, which: int = 0) -> None:
        """All consumers have written what they share; `which` of the two barriers of a step."""
        p, r = self.p, self.refs
        plgpu.commit_smem()
        if not p.interpret:
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
        return r.ds_smem.at[self.ops.opaque(slot)].T, r.k_smem.at[part, :, at]

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

    def softmax_gradient(self, dp, prob, q_slot, first: int = 0):
        """dS = P * (dP - delta); P has the factor of soft cap and score_mod."""
        delta = self.statistic(q_slot, 1, first)
        parts = zip(tile.groups(prob), tile.groups(dp), delta, strict=True)
        ds = [x * (y - z) for (_, x), (_, y), z in parts]
        return lax.concatenate(ds, 1).astype(self.p.dtype)

    def own_rows(self, it, head, query0, masked: str, first: int = 0):
        """`split="keys"`: P^T and dS^T of this warpgroup's keys, in registers.

        Of a tile that is taken in pieces, the piece whose queries start at `first`.
        """
        p, r, ops, c = self.p, self.refs, self.ops, self.p.config
        q_slot, do_slot = ring_slot(it, c.stages), ring_slot(it, c.do_stages)
        late = p.brings_tiles and p.piece == c.block_q  # no room for it beside S and dP
        early = None if late else self.load(head, query0, masked)

        def scores(s_acc, dp_acc):
            if first == 0:
                plgpu.barrier_wait(r.q_full.at[q_slot])
            s_acc = self.scores(s_acc, r.k_smem, r.q_smem, q_slot, first)
            if first == 0:
                plgpu.barrier_wait(r.do_full.at[do_slot])
            dp_acc = self.scores(dp_acc, r.v_smem, r.do_smem, do_slot, first)
            s = ops.load(s_acc, 1)
            loaded = early or self.load(head, query0, masked)
            lefts, probs = [], []
            for prob, slack, keep in self.probabilities(
                s, q_slot, head, query0, masked, loaded, first
            ):
                if p.sloped:  # two forms of P wait for dP: narrow for dV, and with the slope
                    left = prob if keep is None else jnp.where(keep, prob, 0.0)
                    lefts.append(left.astype(p.dtype))
                    probs.append(prob if slack is None else prob * slack)
                else:  # one, which marks by its sign what was dropped
                    probs.append(prob if keep is None else jnp.where(keep, prob, -prob))
            left = lax.optimization_barrier(lax.concatenate(lefts, 1)) if lefts else None
            return left, lax.concatenate(probs, 1), ops.load(dp_acc, 0)

        shape = (64, p.piece)
        left, prob, dp = ops.with_acc(scores, shape, shape)
        if p.rate and left is None:
            left, dp = jnp.maximum(prob, 0.0).astype(p.dtype), jnp.where(prob < 0.0, 0.0, dp)
            return left, self.softmax_gradient(dp, jnp.abs(prob), q_slot, first)
        if p.rate:  # what dV does not see was dropped; or its P is below the narrowest number
            dp = jnp.where(left.astype(jnp.float32) == 0.0, 0.0, dp)
        left = prob.astype(p.dtype) if left is None else left
        return left, self.softmax_gradient(dp, prob, q_slot, first)

    def half_each(self, it, head, query0, masked: str) -> None:
        """`split="columns"`: warpgroup 0 computes P^T, 1 takes it from memory and computes dS^T."""
        p, r, ops, c = self.p, self.refs, self.ops, self.p.config
        q_slot, do_slot = ring_slot(it, c.stages), ring_slot(it, c.do_stages)
        slot = rem(it, 2)
        # dS takes P times its factor, in a buffer of its own
        for_ds = 3 if p.apart else slot
        plgpu.barrier_wait(r.q_full.at[q_slot])
        plgpu.barrier_wait(r.do_full.at[do_slot])

        @pl.when(self.wg == 0)
        def _():
            issue = lambda acc: ops.load(self.scores(acc, r.k_smem, r.q_smem, q_slot))
            loaded = self.load(head, query0, masked)
            s = ops.with_acc(issue, (64, c.block_q))
            lefts, highs, lows = [], [], []
            for prob, slack, keep in self.probabilities(s, q_slot, head, query0, masked, loaded):
                high = left = prob if keep is None else jnp.where(keep, prob, 0.0)
                if p.apart:
                    lefts.append(left.astype(p.dtype))
                    high = left if slack is None else left * slack
                    prob = prob if slack is None else prob * slack
                high = high.astype(p.dtype)
                highs.append(high)
                # dS needs P better than rounded, and also where dV has none of it: what is left of
                # it follows
                lows.append((prob - high.astype(jnp.float32)).astype(p.dtype))
            r.p_smem[for_ds] = lax.concatenate(highs, 1)
            r.p_smem[2] = lax.concatenate(lows, 1)
            if p.apart:
                r.p_smem[slot] = lax.concatenate(lefts, 1)
            self.sync(0)

        @pl.when(self.wg == 1)
        def _():
            issue = lambda acc: ops.load(self.scores(acc, r.v_smem, r.do_smem, do_slot))
            dp = ops.with_acc(issue, (64, c.block_q))
            self.sync(0)
            layout = plgpu.Layout.WGMMA
            read = lambda at: plgpu.load(r.p_smem.at[at], layout=layout, optimized=False)
            high = read(for_ds).astype(jnp.float32)
            if p.rate:  # dropped, or its P is below the narrowest number
                dp = jnp.where(high == 0.0, 0.0, dp)
            prob = high + read(2).astype(jnp.float32)
            r.ds_smem[0] = self.softmax_gradient(dp, prob, q_slot)
            plgpu.commit_smem()

    def step(self, i, carry, head, before, dk_acc, dv_acc, masked: str):
        """Step i of one head's walk, `before` + i steps into the ring."""
        p, r, ops, c = self.p, self.refs, self.ops, self.p.config
        dk, dv = ops.uncarry(dk_acc, carry[0]), ops.uncarry(dv_acc, carry[1])
        it = before + i
        query0 = query_tile(p, r, self.b, head, self.kv_tile, i) * c.block_q
        q_slot, do_slot = ring_slot(it, c.stages), ring_slot(it, c.do_stages)
        slot = rem(it, 2)
        whole = p.piece == c.block_q
        if c.parts > 1:
            self.half_each(it, head, query0, masked)
            ds_slot = 0  # written after sync(0), which follows the last reads of the step before
            prob, ds = r.p_smem.at[slot], r.ds_smem.at[ops.opaque(ds_slot)]
            dv = ops.wgmma(dv, prob, r.do_smem.at[ops.opaque(do_slot), self.part])
        else:
            ds_slot = slot
            for first in range(0, c.block_q, p.piece):
                queries = pl.ds(first, p.piece)
                prob, ds = self.own_rows(it, head, query0 + first, masked, first)
                dv = ops.wgmma(dv, prob, r.do_smem.at[ops.opaque(do_slot), self.part, queries])
                if p.dq:
                    r.ds_smem[slot, self.rows, queries] = ds
                if not whole:  # before the next piece needs the registers
                    dk = ops.wgmma(dk, ds, r.q_smem.at[ops.opaque(q_slot), self.part, queries])
        if c.parts > 1 or p.dq:
            self.sync(1)
        if c.early_free:  # dV is done by now: the next dO may be on its way during dQ and dK
            ops.wait(0)
            plgpu.barrier_arrive(r.do_free.at[do_slot])
        if not p.dq and whole:
            dk = ops.wgmma(dk, ds, r.q_smem.at[ops.opaque(q_slot), self.part])
        for chunk in range(c.dq_chunks if p.dq else 0):

            def dq_and_dk(dq_acc, chunk=chunk):
                nonlocal dk
                dq_acc = ops.wgmma(dq_acc, *self.dq_operands(ds_slot, chunk))
                if chunk or not whole:
                    return ops.load(dq_acc, 0)
                dk = ops.wgmma(dk, ds, r.q_smem.at[ops.opaque(q_slot), self.part])
                return ops.load(dq_acc, 1)

            dq = ops.with_acc(dq_and_dk, c.dq_tile(p.head_dim))
            if chunk == 0 and not c.early_free:
                plgpu.barrier_arrive(r.do_free.at[do_slot])
            self.add_dq(dq, head, query0, chunk)
        ops.wait(0)
        if not p.dq and not c.early_free:
            plgpu.barrier_arrive(r.do_free.at[do_slot])
        plgpu.barrier_arrive(r.q_free.at[q_slot])
        return ops.carry(dk), ops.carry(dv)

    def run(self) -> None:
        """All query tiles of all heads of the group, then dK and dV."""
        p, r, ops = self.p, self.refs, self.ops
        plgpu.barrier_wait(r.k_full)
        plgpu.barrier_wait(r.v_full)

        def accumulate(dk, dv):
            def one_head(head_i, state):
                c, before = state
                head = self.kv_head * p.group + head_i
                first, end, full_first, full_end = walk(p, r, self.b, head, self.kv_tile)
                step = functools.partial(
                    self.step, head=head, before=before - first, dk_acc=dk, dv_acc=dv
                )
                loop = lambda lo, hi, masked, c: lax.fori_loop(
                    lo, hi, functools.partial(step, masked=masked), c
                )
                if p.masked_low:
                    c = loop(first, full_first, BOTH, c)
                    c = loop(full_first, full_end, NONE, c)
                else:
                    c = loop(first, full_end, NONE, c)
                if p.masked_high:
                    c = loop(full_end, end, HIGH, c)
                return c, before + (end - first)

            state = (ops.carry(dk), ops.carry(dv)), jnp.int32(0)
            if p.group == 1:
                c, _ = one_head(jnp.int32(0), state)
            else:
                c, _ = lax.fori_loop(jnp.int32(0), jnp.int32(p.group), one_head, state)
            ops.wait(0)
            return ops.load(ops.uncarry(dk, c[0])), ops.load(ops.uncarry(dv, c[1]))

        parts = p.config.parts
        shapes = (64, p.head_dim // parts), (64, p.head_dim_v // parts)
        dk, dv = ops.with_acc(accumulate, *shapes)
        self.store(r.v_smem, dv * (1.0 / p.kept) if p.rate else dv, r.dv)
        plgpu.barrier_arrive(r.k_done)  # dQ of every consumer reads all rows of K
        plgpu.barrier_wait(r.k_done)
        self.store(r.k_smem, dk * (p.scale / p.kept), r.dk)
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


def load_parts(p: Problem, refs: Refs, src, at, dst, full, end) -> None:
    """One tile, column part by column part; with dynamic lengths, rows from `end` on are zeros."""
    c, columns = p.config, dst.shape[-1]
    split = [(pl.ds(part * columns, columns),) for part in range(c.parts)] if c.parts > 1 else [()]
    sources = [src.at[(*at, *part)] for part in split]
    if p.dynamic:
        live = end - at[1].start
        _mgpu.load_live(sources, dst, full, refs.landed, live, p.interpret)
        return
    for part, source in enumerate(sources):
        plgpu.copy_gmem_to_smem(source, dst.at[part], full)


def produce(p: Problem, refs: Refs, b, kv_head, kv_tile) -> None:
    """The warpgroup that loads: K and V once, then Q, its statistics and dO tile by tile."""
    c = p.config
    plgpu.set_max_registers(_mgpu.registers(c.consumers)[1], action="decrease")
    kv = (b, pl.ds(kv_tile * c.block_kv, c.block_kv), kv_head)
    load = functools.partial(load_parts, p, refs)
    query_end = key_end = None
    if p.dynamic:
        query_end, key_end = refs.extra.query_end[b], refs.extra.key_end[b]
    load(refs.k, kv, refs.k_smem, refs.k_full, key_end)
    load(refs.v, kv, refs.v_smem, refs.v_full, key_end)

    def one_head(head_i, before):
        head = kv_head * p.group + head_i
        first, end = walk(p, refs, b, head, kv_tile)[:2]

        @pl.loop(first, end)
        def _(i):
            it = before + (i - first)
            rows = pl.ds(query_tile(p, refs, b, head, kv_tile, i) * c.block_q, c.block_q)
            slot, do_slot = rem(it, c.stages), rem(it, c.do_stages)
            pl.when(it >= c.stages)(lambda: plgpu.barrier_wait(refs.q_free.at[slot]))
            q_full, stats = refs.q_full.at[slot], refs.stats.at[b, head, :, rows]
            load(refs.q, (b, rows, head), refs.q_smem.at[slot], q_full, query_end)
            plgpu.copy_gmem_to_smem(stats, refs.stats_smem.at[slot], q_full)
            pl.when(it >= c.do_stages)(lambda: plgpu.barrier_wait(refs.do_free.at[do_slot]))
            do_full = refs.do_full.at[do_slot]
            load(refs.do, (b, rows, head), refs.do_smem.at[do_slot], do_full, query_end)

        return before + (end - first)

    if p.group == 1:
        total = one_head(jnp.int32(0), jnp.int32(0))
    else:
        total = lax.fori_loop(jnp.int32(0), jnp.int32(p.group), one_head, jnp.int32(0))

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
        plgpu.SMEM((c.stages, 3 if p.rate else 2, c.block_q), jnp.float32),
        operand(2 if n == 1 else 1, c.block_kv, c.block_q) if shared else None,
        operand(4 if p.apart else 3, c.block_kv, c.block_q) if n > 1 else None,
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
        barrier(arrivals=n) if p.dynamic else None,
    ]


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    do: jax.Array,
    lse: jax.Array,
    delta: jax.Array,
    *,
    options: Options,
    dq: bool = True,
    config: BackwardConfig,
    interpret: Any = None,
) -> tuple[jax.Array | None, jax.Array, jax.Array]:
    """The kernel: `(dq f32 [B, T, N, H] not yet times scale / kept, or None; dk; dv)`.

    lse and delta are `[B, N, T]` f32; delta is `rowsum(do * out)` less what comes in through lse,
    times the share that dropout keeps.
    """
    slope = None if options.score is None else options.score.program.slope()
    p = Problem.of(q, v, options, config, interpret, dq=dq, apart=options.apart, slope=slope)
    config.check(p.head_dim, p.head_dim_v, options.apart)
    q, k, v, do = (pad_tokens(x) for x in (q, k, v, do))
    words = None if options.dropout is None else options.dropout.words
    stats = statistics(lse, delta, config.block_q, words)
    extra = extra_operands(
        options, p.batch, config.block_q, p.tile_rows, by_query=False, tile_rows=p.tile_rows,
    )  # fmt: skip
    if p.sorted:
        extra = extra._replace(work=work_table(p, extra.ranges))
    leaves, tree = jax.tree.flatten(extra)
    outs = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in (("dk", k), ("dv", v))}
    dq_out = None
    if dq and interpret:
        outs["dq"] = jax.ShapeDtypeStruct((p.kv_tiles, *q.shape), jnp.float32)
    elif dq:
        dq_out = _mgpu.zeros_for(stats, q.shape)

    def body(q, k, v, do, stats, *rest):
        given = jax.tree.unflatten(tree, rest[: len(leaves)])
        rest = rest[len(leaves) :]
        names = (*(() if dq_out is None else ("dq",)), *outs)
        results = dict(zip(names, rest[: len(names)], strict=True))
        results.setdefault("dq", None)
        scratch = dict(zip(Refs._fields[9:], rest[len(names) :], strict=True))
        refs = Refs(q, k, v, do, stats, given, **results, **scratch)
        wg = lax.axis_index("wg")
        tile_of_cta = lambda: decode(p, lax.axis_index("cta"), refs)
        if p.piece == config.block_q:  # else there are no registers to keep it in
            found = tile_of_cta()
            tile_of_cta = lambda: found

        @pl.when(wg < config.consumers)
        def _():
            plgpu.set_max_registers(_mgpu.registers(config.consumers)[0], action="increase")
            Consumer(p, refs, wg, *tile_of_cta()).with_rows().run()

        @pl.when(wg == config.consumers)
        def _():
            produce(p, refs, *tile_of_cta())

    results = _mgpu.kernel(
        body,
        out_type=tuple(outs.values()),
        scratch_types=scratch_types(p),
        grid=(p.batch * p.kv_heads * p.kv_tiles,),
        grid_names=("cta",),
        num_warpgroups=config.consumers + 1,
        interpret=interpret,
    )(q, k, v, do, stats, *leaves, *(() if dq_out is None else (dq_out,)))
    dk, dv = results[0][:, : p.keys], results[1][:, : p.keys]
    if not dq:
        return None, dk, dv
    if dq_out is not None:
        return dq_out[...][:, : p.queries], dk, dv
    # the interpreter leaves the partials of skipped tiles unwritten (zero, see `interpret_params`)
    return results[2].sum(0)[:, : p.queries], dk, dv
