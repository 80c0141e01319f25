"""What a consumer warpgroup of the forward does with its tile: see `forward.py`."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mgpu
from pallas_kernels._mgpu import MASKED, Ops, rem
from pallas_kernels.flash_attention import tile
from pallas_kernels.flash_attention.mask import TILE
from pallas_kernels.flash_attention.problem import (
    LN2,
    LOG2E,
    Extra,
    load_ranges,
    load_values,
    run_program,
)
from pallas_kernels.flash_attention.query_schedule import Problem, block_at, origin

LAZY = 8.0  # powers of two by which P may exceed 1 before sums are rescaled (`lazy_rescale`)
NONE, LOW, HIGH, BOTH = "", "low", "high", "low and high"  # the borders that may cross a block


class Refs(NamedTuple):
    """What a CTA works on."""

    q: Any
    k: Any
    v: Any
    extra: Extra
    o: Any
    lse: Any
    q_smem: Any
    k_smem: Any
    v_smem: Any
    o_smem: Any
    lse_smem: Any
    k_full: Any
    v_full: Any
    q_full: Any
    k_free: Any
    v_free: Any
    q_free: Any
    k_read: Any
    turn: Any
    landed: Any


# --- barriers -------------------------------------------------------------------------------------


def free_slot(p: Problem, refs: Refs, which: int, slot) -> None:
    """A consumer has read K (0) or V (1) of `slot`."""
    c = p.config
    if c.release == "named" and not p.interpret:
        threads = _mgpu.WARPGROUP * (c.consumers + 1)
        _mgpu.named_barrier_arrive(slot + (c.first_named_id + which * c.stages), threads)
    else:
        plgpu.barrier_arrive((refs.k_free, refs.v_free)[which].at[slot])


def await_slot(p: Problem, refs: Refs, which: int, slot) -> None:
    """The producer waits until every consumer has freed `slot`."""
    c = p.config
    if c.release == "named" and not p.interpret:
        threads = _mgpu.WARPGROUP * (c.consumers + 1)
        _mgpu.named_barrier_sync(slot + (c.first_named_id + which * c.stages), threads)
    else:
        plgpu.barrier_wait((refs.k_free, refs.v_free)[which].at[slot])


def _turn_barrier(p: Problem, refs: Refs, op: str, wg) -> None:
    if p.interpret:
        {"sync": plgpu.barrier_wait, "arrive": plgpu.barrier_arrive}[op](refs.turn.at[wg])
    else:
        named = {"sync": _mgpu.named_barrier_sync, "arrive": _mgpu.named_barrier_arrive}[op]
        named(wg + 5, 2 * _mgpu.WARPGROUP)


def take_turn(p: Problem, refs: Refs, wg) -> None:
    """Wait for the tensor cores."""
    if p.config.pingpong and p.config.consumers > 1:
        _turn_barrier(p, refs, "sync", wg)


def give_turn(p: Problem, refs: Refs, wg) -> None:
    """Hand the tensor cores to the next consumer."""
    c = p.config.consumers
    if p.config.pingpong and c > 1:
        _turn_barrier(p, refs, "arrive", jnp.where(wg == c - 1, 0, wg + 1))


# --- the consumer ---------------------------------------------------------------------------------


class Block(NamedTuple):
    """Loaded values of one block: of the score_mod, of the mask_mod, of dropout; None without."""

    score: Any
    mask: Any
    words: Any


@dataclasses.dataclass(frozen=True)
class Consumer:
    """One consumer warpgroup at one tile; blocks are numbered from the high end, i = 0 first."""

    p: Problem
    refs: Any
    wg: Any
    b: Any
    head: Any
    q_tile: Any
    base: Any  # first query row
    end: Any  # past the last block of the tile, see `block_at`
    done: Any  # blocks of earlier tiles, which have used the ring
    begin_i: Any  # this warpgroup's blocks are begin_i <= i < end_i
    end_i: Any
    full_i: Any  # blocks full_i <= i < low_i need no mask
    low_i: Any
    q_slot: Any = None  # of this warpgroup's Q
    rows: Any = None  # the key ranges of this warpgroup's rows, where they are at hand
    anew: Any = None  # makes this object again, where the loops have no registers to keep it

    @property
    def ops(self) -> Ops:
        """Accumulators."""
        return Ops(self.p.interpret)

    def slot(self, i):
        """Ring slot of block i."""
        return rem(self.done + i, self.p.config.stages)

    def key0(self, i):
        """First key of block i."""
        p = self.p
        block = block_at(p, self.refs, self.b, self.head, self.q_tile, self.end, i)
        return block * p.config.block_kv + origin(p, self.q_tile)

    def operands(self, i, masked: bool):
        """What the modifiers and dropout need of block i, loaded before the matmuls are awaited."""
        p, extra = self.p, self.refs.extra
        at = (self.b, self.head, self.base, self.key0(i), p.config.block_kv)
        load = lambda program, refs: load_values(program, refs, *at, by_query=True)
        return Block(
            load(p.score, extra.score) if p.score is not None else None,
            load(p.mask, extra.mask) if p.mask is not None and masked else None,
            plgpu.load(
                extra.words.at[self.b, self.head, pl.ds(self.base, TILE)],
                layout=plgpu.Layout.WGMMA.reduce(1),
                optimized=False,
            )
            if p.rate
            else None,
        )

    def modified(self, program, s, values, i, hide: bool = False):
        """The outputs of a score_mod, or what a mask_mod leaves (`hide`), on block i."""
        return run_program(program, s, values, self.base, self.key0(i), by_query=True, hide=hide)

    def masked(self, s, i, block, borders=BOTH):
        """MASKED where the bounds or the mask_mod hide a key; `borders` may cross the block."""
        if self.p.mask is not None:
            (s,) = self.modified(self.p.mask, s, block.mask, i, hide=True)
        lo, hi = self.row_bounds(self.key0(i))
        if self.p.config.tight_masks and borders == LOW:
            hi = None
        if self.p.config.tight_masks and borders == HIGH:
            lo = None
        return tile.mask(s, lo, hi)

    def load_rows(self):
        """The key ranges of this warpgroup's rows, `(lo, hi)`."""
        return load_ranges(self.refs.extra, self.b, self.base)

    def with_rows(self):
        """Knows its rows' ranges early, where that is asked for."""
        if not self.p.dynamic or not self.p.config.tight_masks:
            return self
        return dataclasses.replace(self, rows=self.load_rows())

    def row_bounds(self, key0):
        """`(lo, hi)` for `tile.mask` on the block whose first key is key0."""
        p = self.p
        column = tile.iota(TILE, 1) + key0
        if p.dynamic:
            rows = self.rows or self.load_rows()
            return tuple(tile.by_row(x, tile.GROUP) - column for x in rows)
        distance = tile.iota(TILE, 0) - column + (self.base + p.band.offset)
        lo = None if p.band.left is None else distance - p.band.left
        hi = None
        if p.band.right is not None:
            hi = distance + (p.band.right + 1)
        if p.ragged_keys:
            inside = p.keys - column
            hi = inside if hi is None else jnp.minimum(hi, inside)
        return lo, hi

    def logits(self, s, i, masked: str, block):
        """Scores as the softmax takes them: times `p.multiplier` they are base-2 logits."""
        p = self.p
        factor = p.scale if p.soft_cap is None else p.soft_cap
        if p.soft_cap is not None:
            s = jnp.tanh(s * (p.scale / p.soft_cap))
        if p.score is not None:
            # a score_mod may hide keys by -inf; MASKED says the same and is finite
            s = jnp.maximum(self.modified(p.score, s * factor, block.score, i)[0], MASKED)
        elif p.alibi:
            distance = tile.iota(TILE, 0) - tile.iota(TILE, 1)
            distance = distance + (self.base + p.band.offset - self.key0(i))
            slope = self.refs.extra.slopes[self.head] * LOG2E
            s = tile.add_distance(s * (factor * LOG2E), distance.astype(jnp.float32), slope)
        return self.masked(s, i, block, masked) if masked else s

    def row_sum(self, x):
        """Row sums, or their 8 columns (`late_sum`)."""
        return tile.fold(x) if self.p.config.late_sum else x.sum(axis=1)

    def softmax(self, s, m, total, i, block):
        """Online softmax step: new maximum (base 2), sum, rescale factor and P after dropout.

        With `lazy_rescale` the maximum stays what it was until one exceeds it by `LAZY`.
        """
        p = self.p
        block_max = s.max(axis=1) * p.multiplier
        if m is None:
            m_new = block_max
        elif p.config.lazy_rescale:
            m_new = jnp.where(block_max > m + LAZY, block_max, m)
        else:
            m_new = jnp.maximum(m, block_max)
        prob = jnp.exp2(s * p.multiplier - tile.by_row(m_new, s.shape[1]))
        fresh = self.row_sum(prob)
        if p.rate:
            kept = tile.keeps_by_query(block.words, self.key0(i), s.shape[1], p.rate)
            prob = tile.dropped(kept, prob)
        if m is None:
            return m_new, fresh, None, prob
        rescale = jnp.exp2(m - m_new)
        old = tile.by_row(rescale, tile.GROUP) if p.config.late_sum else rescale
        return m_new, total * old + fresh, rescale, prob

    def release_q(self, i) -> None:
        """The last Q K^T of the tile has read Q."""
        if self.p.config.persistent:
            free = self.refs.q_free.at[self.q_slot]
            pl.when(i + 1 == self.end_i)(lambda: plgpu.barrier_arrive(free))

    def release_k(self, i) -> None:
        """K of block i has been read; that of the last keeps its slot where O leaves through it."""
        p, r = self.p, self.refs
        if not p.config.o_in_ring:
            free_slot(p, r, 0, self.slot(i))
            return
        last = i + 1 == self.end_i
        pl.when(last)(lambda: plgpu.barrier_arrive(r.k_read))
        pl.when(jnp.logical_not(last))(lambda: free_slot(p, r, 0, self.slot(i)))

    def free_o(self, where) -> None:
        """O of the tile before has left the slot of its last K, if there is one and `where`."""
        p = self.p
        if p.config.o_in_ring:

            @pl.when(where & (self.done > 0))
            def _():
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                free_slot(p, self.refs, 0, self.slot(-1))

    @property
    def first_mask(self) -> str:
        """The borders that may cross the first block."""
        p = self.p
        if p.masked_high:
            return BOTH if p.low_in_high else HIGH
        return LOW if p.masked_low else NONE

    def first_block(self, oacc):
        """Q K^T and softmax of the first block: nothing to overlap with yet."""
        p, r, i = self.p, self.refs, self.begin_i
        slot = self.slot(i)
        block = self.operands(i, bool(self.first_mask))

        def scores(acc):
            plgpu.barrier_wait(r.k_full.at[slot])
            acc = self.ops.wgmma(acc, r.q_smem.at[self.q_slot], r.k_smem.at[slot].T)
            return self.ops.load(acc)

        s = self.ops.with_acc(scores, (TILE, p.config.block_kv))
        self.release_k(i)
        self.release_q(i)
        self.free_o(i == 0)
        s = self.logits(s, i, self.first_mask, block)
        m, total, _, prob = self.softmax(s, None, None, i, block)
        nxt = self.slot(i + 1)
        pl.when(i + 1 < self.end_i)(lambda: plgpu.barrier_wait(r.k_full.at[nxt]))
        return m, total, prob.astype(p.dtype), self.ops.carry(oacc)

    def step(self, i, carry, oacc, masked: str):
        """Block i: issue Q K^T, then P V of block i-1, and run the softmax under it."""
        p, r, ops = self.p, self.refs, self.ops
        m, total, prob, o_carry = carry
        cur, prev, nxt = self.slot(i), self.slot(i - 1), self.slot(i + 1)
        o = ops.uncarry(oacc, o_carry)
        block = self.operands(i, bool(masked))

        def scores(acc):
            nonlocal o
            take_turn(p, r, self.wg)
            acc = ops.wgmma(acc, r.q_smem.at[self.q_slot], r.k_smem.at[cur].T)
            plgpu.barrier_wait(r.v_full.at[prev])
            o = ops.wgmma(o, prob, r.v_smem.at[prev])
            give_turn(p, r, self.wg)
            s = ops.load(acc, 1)
            self.release_k(i)
            self.release_q(i)
            return s

        s = self.logits(ops.with_acc(scores, (TILE, p.config.block_kv)), i, masked, block)
        m, total, rescale, prob = lax.optimization_barrier(self.softmax(s, m, total, i, block))
        # a basic-block border: ptxas may not hoist the wait for P V above the softmax
        pl.when(i + 1 < self.end_i)(lambda: plgpu.barrier_wait(r.k_full.at[nxt]))
        value = ops.load(o, 0)
        free_slot(p, r, 1, prev)
        if p.config.lazy_rescale:
            value = tile.rescaled(value, rescale, p.interpret)
        else:
            value = value * tile.by_row(rescale, value.shape[1])
        return m, total, prob.astype(p.dtype), ops.carry(ops.store(o, value))

    def steps(self, c, oacc):
        """All blocks of this warpgroup but the first."""
        p = self.p
        loop = lambda lo, hi, masked, c: lax.fori_loop(
            lo, hi, functools.partial(self.step, oacc=oacc, masked=masked), c
        )
        i = self.begin_i + 1
        if p.masked_high and not p.one_high_block:
            border = lax.max(i, lax.min(self.full_i, self.end_i))
            c = loop(i, border, BOTH, c)
            i = border
        if p.masked_low:
            border = lax.max(i, lax.min(self.low_i, self.end_i))
            c = loop(i, border, NONE, c)
            return loop(border, self.end_i, LOW, c)
        return loop(i, self.end_i, NONE, c)

    def last(self, c, oacc):
        """P V of the last block: O (not normalised), row maximum (base 2) and row sum."""
        p, r, ops = self.p, self.refs, self.ops
        m, total, prob, o_carry = c
        last = self.slot(self.end_i - 1)
        plgpu.barrier_wait(r.v_full.at[last])
        o = ops.wgmma(ops.uncarry(oacc, o_carry), prob, r.v_smem.at[last])
        if p.config.late_sum:
            total = total.sum(axis=1)
        value = ops.load(o)
        free_slot(p, r, 1, last)
        return value, m, total

    def attend(self, oacc):
        """All blocks of this warpgroup: O (not normalised), row maximum (base 2) and row sum."""
        return self.last(self.steps(self.first_block(oacc), oacc), oacc)

    def finish(self, o, m, total) -> None:
        """O and lse to memory."""
        if self.anew is not None:
            return self.anew().finish(o, m, total)
        o, lse = self.normalise(o, m, total)
        self.store(o.astype(self.p.dtype), lse)

    def cross(self, after: "Consumer", c, oacc):
        """From this tile to the one after: its first Q K^T, the last P V of this one, and its
        softmax under that.  Returns what `first_block` does."""
        p, r, ops = self.p, self.refs, self.ops
        m, total, prob, o_carry = c
        last, cur, nxt = self.slot(self.end_i - 1), after.slot(0), after.slot(1)
        o, zero = ops.uncarry(oacc, o_carry), jnp.int32(0)
        after = after.with_rows()
        block = after.operands(zero, bool(after.first_mask))
        plgpu.barrier_wait(r.q_full.at[after.q_slot])
        plgpu.barrier_wait(r.k_full.at[cur])

        def scores(acc):
            nonlocal o
            take_turn(p, r, self.wg)
            acc = ops.wgmma(acc, r.q_smem.at[after.q_slot], r.k_smem.at[cur].T)
            plgpu.barrier_wait(r.v_full.at[last])
            o = ops.wgmma(o, prob, r.v_smem.at[last])
            give_turn(p, r, self.wg)
            s = ops.load(acc, 1)
            free_slot(p, r, 0, cur)
            after.release_q(zero)
            return s

        s = ops.with_acc(scores, (TILE, p.config.block_kv))
        s = after.logits(s, zero, after.first_mask, block)
        m_new, fresh, _, prob = self.softmax(s, None, None, zero, block)
        m_new, fresh, prob = lax.optimization_barrier((m_new, fresh, prob))
        # a basic-block border, as in `step`
        pl.when(after.end_i > 1)(lambda: plgpu.barrier_wait(r.k_full.at[nxt]))
        value = ops.load(o, 0)
        free_slot(p, r, 1, last)
        # narrow before O is scaled and stored: both would not fit in registers
        prob = lax.optimization_barrier(prob.astype(p.dtype))
        if p.config.late_sum:
            total = total.sum(axis=1)
        self.finish(value, m, total)
        zeros = jnp.zeros((TILE, p.head_dim_v), jnp.float32)
        zeros = zeros if p.interpret else plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
        o = ops.store(o, zeros)
        return m_new, fresh, prob, ops.carry(o)

    def normalise(self, o, m, total):
        """O / total and the natural-log lse; a row that saw no key gives zeros and -inf."""
        p = self.p
        empty = m < MASKED * p.multiplier * 0.5
        lse = (m + jnp.log2(total)) * LN2
        if p.sinks:
            total = total + jnp.exp2(self.refs.extra.sinks[self.head] * LOG2E - m)
        if p.rate:
            total = total * p.kept
        scale = jnp.where(empty, 0.0, 1.0 / total)
        return o * tile.by_row(scale, o.shape[1]), jnp.where(empty, -jnp.inf, lse)

    def skip(self, lo, hi, turns) -> None:
        """Keep the barriers in step over blocks that this warpgroup does not see.

        A tile has one turn fewer than blocks (the first block of a consumer takes none): the turn
        of block i is taken where `i < turns`.
        """
        p, r = self.p, self.refs

        @pl.loop(lo, hi)
        def _(i):
            slot = self.slot(i)
            plgpu.barrier_wait(r.k_full.at[slot])
            self.release_k(i)
            plgpu.barrier_wait(r.v_full.at[slot])
            free_slot(p, r, 1, slot)

            @pl.when(i < turns)
            def _():
                take_turn(p, r, self.wg)
                give_turn(p, r, self.wg)

    def store(self, o, lse) -> None:
        """Through shared memory by TMA, which drops the rows of O past the end.

        lse leaves as a plain bulk copy, which checks no bounds: its array holds whole tiles.
        """
        p, r, wg = self.p, self.refs, self.wg
        rows = pl.ds(self.base, TILE)
        own = p.config.own_o(p.head_dim, p.head_dim_v)
        chunks = p.config.o_chunks(p.head_dim_v) if own else 0
        if p.config.persistent:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        r.lse_smem[wg] = lse
        if chunks:
            for c in range(p.head_dim_v // 64):
                dst = r.o_smem.at[wg, c % chunks]
                if c >= chunks:
                    plgpu.wait_smem_to_gmem(chunks - 1, wait_read_only=True)
                dst[...] = o[:, c * 64 : c * 64 + 64]
                plgpu.commit_smem()
                columns = pl.ds(c * 64, 64)
                plgpu.copy_smem_to_gmem(dst, r.o.at[self.b, rows, self.head, columns])
        else:
            dst = (r.o_smem if own else r.q_smem).at[wg]
            if p.config.o_in_ring:
                plgpu.barrier_wait(r.k_read)
                dst = r.k_smem.at[self.slot(self.end_i - 1), pl.ds(wg * TILE, TILE)]
            dst[...] = o
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(dst, r.o.at[self.b, rows, self.head])
        plgpu.copy_smem_to_gmem(r.lse_smem.at[wg], r.lse.at[self.b, self.head, rows])

    def run(self, blocks) -> None:
        """The whole tile, `blocks` of them in the ring."""
        p, r = self.p, self.refs
        plgpu.barrier_wait(r.q_full.at[self.q_slot])
        self.free_o(self.begin_i > 0)
        self.skip(jnp.int32(0), self.begin_i, blocks - 1)

        @pl.when(self.begin_i < self.end_i)
        def _():
            self.finish(*self.ops.with_acc(self.attend, (TILE, p.head_dim_v)))

        if p.dynamic or p.lists or not p.band.unbounded or p.queries % p.tile_rows:

            @pl.when(self.begin_i >= self.end_i)
            def _():
                if p.config.persistent:
                    plgpu.barrier_arrive(r.q_free.at[self.q_slot])
                zeros = lambda shape, layout: plgpu.layout_cast(
                    jnp.zeros(shape, jnp.float32), layout
                )
                o = zeros((TILE, p.head_dim_v), plgpu.Layout.WGMMA).astype(p.dtype)
                self.store(o, zeros((TILE,), plgpu.Layout.WGMMA.reduce(1)) - jnp.inf)

        self.skip(self.end_i, blocks, blocks)
