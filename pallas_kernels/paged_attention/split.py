"""Decode by a persistent split-KV kernel: every CTA reads an equal share of all keys.

One producer warpgroup keeps a ring of key tiles in flight (one TMA box per block), across the
borders of segments; one consumer warpgroup runs `Columns.step` over them.  A segment that lies in
one share is written at once.  A segment cut by share borders leaves partial outputs with their
log-sum-exp, and `combine`, a second small kernel, merges them in the order of the keys.

Flash-Decoding (Dao et al., 2023) with Stream-K's equal shares (Osama et al., 2023).
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import (
    HOPPER_SMS,
    MASKED,
    SMEM_BYTES,
    Ops,
    cdiv,
    div,
    interpret_params,
    swizzled,
)

from . import worklist as wl
from .columns import Columns, reduce_scratch, spread
from .geometry import Geometry, Scoring
from .pages import PageTiles
from .worklist import WorkList

STARTED, ENDED = 0, 1  # which partial of a share: goes on in the next share, or ends here


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """How the split-KV kernel runs.

    `stages` key tiles of `key_tile` keys in flight per CTA, `ctas` CTAs; with 2 CTAs an SM one
    computes while the other waits.  With `fixed_chunk` keys are cut at its multiples and `ctas` is
    not used: a CTA per chunk, and a row's output does not depend on what else is in the batch.

    >>> SplitConfig().ctas
    264
    """

    key_tile: int = 64
    stages: int = 3
    ctas: int = 2 * HOPPER_SMS
    fixed_chunk: int | None = None

    def __post_init__(self):
        if self.key_tile % 64 or self.key_tile <= 0:
            raise ValueError(f"{self.key_tile=} is not a positive multiple of 64")
        if self.stages < 1 or self.ctas < 1:
            raise ValueError(f"{self.stages=} and {self.ctas=} have to be positive")
        if self.fixed_chunk is not None and (
            self.fixed_chunk % self.key_tile or self.fixed_chunk <= 0
        ):
            raise ValueError(f"{self.fixed_chunk=} is not a multiple of {self.key_tile=}")


def smem_bytes(config: SplitConfig, geom: Geometry, itemsize: int) -> int:
    """Shared memory of one CTA."""
    h, hv, cols = geom.head_dim, geom.value_dim, geom.cols
    ring = config.stages * config.key_tile * (h + hv) * itemsize
    small = (2 * cols * h + cols * config.key_tile + cols * hv) * itemsize
    return ring + small + 4 * reduce_scratch(cols) + 1024


def num_shares(config: SplitConfig, geom: Geometry) -> int:
    """CTAs of the kernel: `ctas`, or a bound on the chunks of all rows."""
    if config.fixed_chunk is None:
        return config.ctas
    chunks = cdiv(geom.blocks_per_row * geom.block_size, config.fixed_chunk)
    return geom.num_q_tiles * geom.num_kv_heads * chunks


def _check(config: SplitConfig, geom: Geometry, dtype: Any) -> None:
    need = smem_bytes(config, geom, jnp.dtype(dtype).itemsize)
    if need > SMEM_BYTES:
        raise NotImplementedError(f"{config} needs {need} bytes of shared memory, not {SMEM_BYTES}")


def split_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    block_tables: jax.Array,
    work: WorkList,
    *,
    geom: Geometry,
    scoring: Scoring,
    config: SplitConfig,
    slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Output `[T, K, G, Hv]` and base-2 log-sum-exp by column, f32 `[U, K, cols]`.

    `q` is packed (`pack_queries`), `slopes` and `sinks` are f32 `[blocks, cols]` (`pack_columns`).
    """
    _check(config, geom, q.dtype)
    cols, hv, ctas = geom.cols, geom.value_dim, num_shares(config, geom)
    tile, stages, u = config.key_tile, config.stages, work.tiles.shape[0]
    pages = PageTiles(geom, tile)
    sds, smem, swz = jax.ShapeDtypeStruct, plgpu.SMEM, swizzled(q.dtype)
    out_type = (
        sds((geom.num_tokens, geom.num_kv_heads, geom.group, hv), q.dtype),
        sds((u, geom.num_kv_heads, cols), jnp.float32),
        sds((ctas, 2, hv, cols), jnp.float32),
        sds((ctas, 2, cols), jnp.float32),
    )
    scratch = (
        smem((2, cols, geom.head_dim), q.dtype, transforms=swz),
        smem((stages, tile, geom.head_dim), q.dtype, transforms=swz),
        smem((stages, tile, hv), q.dtype, transforms=swz),
        smem((cols, tile), q.dtype, transforms=swz),
        smem((cols, hv), q.dtype),
        smem((reduce_scratch(cols),), jnp.float32),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_barriers=2),
        plgpu.Barrier(num_arrivals=2 * pages.per_tile, num_barriers=stages),
        plgpu.Barrier(num_barriers=stages),
    )
    columns = [x for x in (slopes, sinks) if x is not None]
    call = _Split(
        math=Columns(Ops(bool(interpret)), geom, scoring, tile, q.dtype),
        pages=pages,
        config=config,
        has=(slopes is not None, sinks is not None),
    )
    with jax.named_scope("paged_attention.split"):
        out, lse, part_o, part_lse = plgpu.kernel(
            call.body,
            out_type=out_type,
            scratch_types=scratch,
            grid=(ctas,),
            grid_names=("cta",),
            num_threads=2,
            thread_name="wg",
            interpret=interpret_params(interpret),
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(q, k_pool, v_pool, block_tables, *work, *columns)
    with jax.named_scope("paged_attention.combine"):
        out, lse = jax.new_ref(out), jax.new_ref(lse)
        plgpu.kernel(
            call.combine_body,
            out_type=(),
            scratch_types=(smem((cols, hv), q.dtype),),
            grid=(ctas,),
            grid_names=("cta",),
            interpret=interpret_params(interpret),
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(work.shares, part_o, part_lse, *columns[-1:] * call.has[1], out, lse)
        return out[...], lse[...]


def _read(ref, row, *columns):
    """Scalars of a row of the work list."""
    return tuple(ref[row, x] for x in columns)


def _facts_of(tiles_ref, u):
    """A row of `WorkList.tiles`."""
    return _read(tiles_ref, u, *range(8))


@dataclasses.dataclass(frozen=True)
class _Split:
    """The two kernel bodies; static facts only."""

    math: Columns
    pages: PageTiles
    config: SplitConfig
    has: tuple[bool, bool]  # slopes, sinks

    def body(self, q_ref, k_ref, v_ref, table_ref, tiles_ref, shares_ref, dead_ref, *refs):
        columns, refs = refs[: sum(self.has)], refs[sum(self.has) :]
        slopes_ref = columns[0] if self.has[0] else None
        sinks_ref = columns[-1] if self.has[1] else None
        outputs, (q_s, k_s, v_s, p_s, o_s, red_s, q_full, q_free, kv_full, kv_free) = (
            refs[:4],
            refs[4:],
        )
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        share = _read(shares_ref, cta, wl.LENGTH, wl.TILE, wl.HEAD, wl.OFFSET)
        share = (*share, _read(shares_ref, cta, *range(wl.FACTS, wl.FACTS + 8)))

        @pl.when(wg == 0)
        def _():
            smem = (q_s, k_s, v_s, p_s, o_s, red_s)
            bars = (q_full, q_free, kv_full, kv_free)
            self.consume(cta, share, tiles_ref, slopes_ref, sinks_ref, smem, bars, outputs)

        @pl.when(wg == 1)
        def _():
            inputs = (q_ref, k_ref, v_ref, table_ref, tiles_ref)
            bars = (q_full, q_free, kv_full, kv_free)
            self.produce(share, inputs, (q_s, k_s, v_s), bars)
            self.clear(cta, dead_ref, outputs[0])

    # ---------------------------------------------------------------- consumer

    def consume(self, cta, share, tiles_ref, slopes_ref, sinks_ref, smem, bars, outputs):
        math, geom, tile = self.math, self.math.geom, self.math.tile
        ops, stages = math.ops, self.config.stages
        q_s, k_s, v_s, p_s, o_s, red_s = smem
        q_full, q_free, kv_full, kv_free = bars
        length, *first, fact = share

        def segment(carry):
            done, u, head, offset, seen, fact = carry
            count, first_tile = fact[wl.COUNT], fact[wl.KEY_TILE]
            position, context = fact[wl.POSITION], fact[wl.CONTEXT]
            n = lax.min(count - offset, length - done)
            q_slot = seen & 1
            block = geom.column_block(head)
            slopes = None if slopes_ref is None else math.load(slopes_ref.at[block])
            plgpu.barrier_wait(q_full.at[q_slot])

            def attend(acc):
                def step(j, carry):
                    m, sums, a = carry
                    slot = lax.rem(done + j, jnp.int32(stages))
                    plgpu.barrier_wait(kv_full.at[slot])
                    refs = (q_s.at[q_slot], k_s.at[slot], v_s.at[slot], p_s, red_s)
                    key = (first_tile + offset + j) * tile
                    a, m, sums = math.step(
                        ops.uncarry(acc, a), m, sums, refs, key, position, context, slopes
                    )
                    ops.load(a)
                    plgpu.barrier_arrive(kv_free.at[slot])
                    return m, sums, ops.carry(a)

                m, sums, a = lax.fori_loop(0, n, step, (*math.start(), ops.carry(acc)))
                return m, sums, ops.load(ops.uncarry(acc, a))

            m, sums, o = ops.with_acc(attend, (geom.value_dim, geom.cols))

            plgpu.barrier_arrive(q_free.at[q_slot])
            o, lse = math.finish(m, sums, o, red_s)
            ended = offset + n == count
            sinks = None if sinks_ref is None else math.load(sinks_ref.at[block])
            where = (cta, u, head, offset == 0, ended)
            self.emit(where, o, lse, sinks, fact, o_s, outputs)
            head = jnp.where(ended, head + 1, head)
            wrap = head == geom.num_kv_heads
            u = jnp.where(wrap, fact[wl.NEXT], u)
            fact = lax.cond(wrap, lambda: _facts_of(tiles_ref, u), lambda: fact)
            head = jnp.where(wrap, 0, head)
            offset = jnp.where(ended, 0, offset + n)
            return done + n, u, head, offset, seen + 1, fact

        zero = jnp.int32(0)
        lax.while_loop(lambda c: c[0] < length, segment, (zero, *first, zero, fact))
        plgpu.wait_smem_to_gmem(0)

    def emit(self, where, o, lse, sinks, fact, o_s, outputs):
        """A whole segment goes to the output, a part of one to this share's partials."""
        cta, u, head, starts, ends = where
        out_ref, lse_ref, part_o_ref, part_lse_ref = outputs

        @pl.when(starts & ends)
        def _():
            out = self.math.with_sinks(o, lse, sinks)
            self.math.ops.store_plain(lse_ref.at[u, head], lse)
            self.put(out, o_s, out_ref, fact, head)

        @pl.when(jnp.logical_not(starts & ends))
        def _():
            slot = jnp.where(ends, ENDED, STARTED)
            self.math.ops.store_plain(part_o_ref.at[cta, slot], o)
            self.math.ops.store_plain(part_lse_ref.at[cta, slot], lse)

    def put(self, o, o_s, out_ref, fact, head):
        """The live columns of `o [Hv, cols]` as rows of the output."""
        geom, group = self.math.geom, self.math.geom.group
        token, tokens = fact[wl.FIRST_TOKEN], fact[wl.NUM_TOKENS]
        self.math.ops.store_plain(o_s, o.astype(self.math.dtype), transpose=True)
        plgpu.commit_smem()
        for i in range(geom.q_tokens):
            rows = pl.ds(geom.first_column(head) + i * group, group)

            @pl.when(i < tokens)
            def _():
                plgpu.copy_smem_to_gmem(o_s.at[rows], out_ref.at[token + i, head])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    # ---------------------------------------------------------------- producer

    def produce(self, share, inputs, smem, bars):
        pages, geom = self.pages, self.math.geom
        q_ref, k_ref, v_ref, table_ref, tiles_ref = inputs
        q_s, k_s, v_s = smem
        q_full, q_free, kv_full, kv_free = bars
        length, *first, fact = share
        stages = self.config.stages

        def load_q(u, head, seen, token):
            slot = seen & 1
            pl.when(seen >= 2)(lambda: plgpu.barrier_wait(q_free.at[slot]))
            index = u if geom.q_tokens > 1 else token
            source = q_ref.at[index, geom.column_block(head)]
            plgpu.copy_gmem_to_smem(source, q_s.at[slot], q_full.at[slot])

        def step(i, carry):
            u, head, offset, seen, fact, ids = carry
            token, first_tile, count, following = (
                fact[x] for x in (wl.FIRST_TOKEN, wl.KEY_TILE, wl.COUNT, wl.NEXT)
            )
            last = offset + 1 == count
            next_head = jnp.where(last, head + 1, head)
            wrap = next_head == geom.num_kv_heads
            next_head = jnp.where(wrap, 0, next_head)
            next_u = jnp.where(wrap, following, u)
            next_fact = lax.cond(wrap, lambda: _facts_of(tiles_ref, next_u), lambda: fact)
            next_offset = jnp.where(last, 0, offset + 1)
            next_ids = self.block_ids(table_ref, next_fact, next_offset)  # a tile ahead of its use
            pl.when((offset == 0) | (i == 0))(lambda: load_q(u, head, seen, token))
            slot = lax.rem(i, jnp.int32(stages))
            pl.when(i >= stages)(lambda: plgpu.barrier_wait(kv_free.at[slot]))
            pages.fetch(
                first_tile + offset,
                ids,
                head,
                ((k_ref, k_s.at[slot]), (v_ref, v_s.at[slot])),
                kv_full.at[slot],
            )
            seen = jnp.where(last, seen + 1, seen)
            return next_u, next_head, next_offset, seen, next_fact, next_ids

        u, head, offset = first
        ids = self.block_ids(table_ref, fact, offset)
        carry = (u, head, offset, jnp.int32(0), fact, ids)
        carry = lax.fori_loop(0, length, step, carry)
        offset, seen = carry[2:4]
        seen = jnp.where(offset == 0, seen, seen + 1)  # a segment that the next share goes on with

        @pl.loop(lax.max(length - stages, 0), length)
        def _(i):
            plgpu.barrier_wait(kv_free.at[lax.rem(i, jnp.int32(stages))])

        @pl.loop(lax.max(seen - 2, 0), jnp.where(length > 0, seen, 0))
        def _(x):
            plgpu.barrier_wait(q_free.at[x & 1])

    def block_ids(self, table_ref, fact, offset):
        row, tile = fact[wl.ROW], fact[wl.KEY_TILE] + offset
        seen = (fact[wl.POSITION], fact[wl.CONTEXT], self.math.scoring.window)
        return self.pages.block_ids(table_ref, row, tile, *seen)

    def clear(self, cta, dead_ref, out_ref):
        """Zeros for the tokens that attend to nothing, every CTA its part."""
        geom = self.math.geom

        ctas = num_shares(self.config, geom)

        @pl.loop(0, cdiv(geom.num_tokens, ctas))
        def _(x):
            token = x * ctas + cta
            inside = lax.min(token, jnp.int32(geom.num_tokens - 1))

            @pl.when((token < geom.num_tokens) & (dead_ref[inside] > 0))
            def _():
                @pl.loop(0, geom.num_kv_heads)
                def _(head):
                    for g in range(geom.group):
                        target = out_ref.at[token, head, g]
                        self.math.ops.store_plain(target, self.math.zero_row())

    # ---------------------------------------------------------------- combine

    def combine_body(self, shares_ref, part_o_ref, part_lse_ref, *refs):
        sinks_ref = refs[0] if self.has[1] else None
        out_ref, lse_ref, o_s = refs[-3:]
        math = self.math
        cta = lax.axis_index("cta")
        begin = shares_ref[cta, wl.MERGE_FROM]

        @pl.when(begin >= 0)
        def _():
            u, head = _read(shares_ref, cta, wl.TILE, wl.HEAD)
            fact = _read(shares_ref, cta, *range(wl.FACTS, wl.FACTS + 8))
            m, w, o = self.fold(part_o_ref, part_lse_ref, begin, cta)
            out = o * spread(1.0 / w, o.shape)
            lse = m + jnp.log2(w)
            sinks = None
            if sinks_ref is not None:
                sinks = math.load(sinks_ref.at[math.geom.column_block(head)])
            out = math.with_sinks(out, lse, sinks)
            math.ops.store_plain(lse_ref.at[u, head], lse)
            self.put(out, o_s, out_ref, fact, head)
            plgpu.wait_smem_to_gmem(0)

    def fold(self, part_o_ref, part_lse_ref, begin, cta):
        """Merge the partials of shares `begin .. cta`, several loads in flight."""
        math = self.math
        at_once = max(1, 8 * 1024 // (math.geom.cols * math.geom.value_dim))
        load = lambda c, slot: (
            math.load(part_lse_ref.at[c, slot]),
            math.load(part_o_ref.at[c, slot]),
        )

        def step(r, carry):
            index = [begin + r * at_once + x for x in range(at_once)]
            parts = [load(lax.min(c, cta - 1), STARTED) for c in index]
            for c, (lse, o) in zip(index, parts, strict=True):
                m, w, total = carry
                carry = math.merge(m, w, total, lse + jnp.where(c < cta, 0.0, -1e31), o)
            return carry

        # in the order of the keys, so that a last part without a visible key changes no bit
        last = load(cta, ENDED)
        rounds = div(cta - begin + (at_once - 1), at_once)
        nothing = (math.full(MASKED), math.full(0.0), last[1] * 0.0)
        m, w, o = lax.fori_loop(0, rounds, step, nothing)
        return math.merge(m, w, o, *last)
