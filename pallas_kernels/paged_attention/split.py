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

from . import onebyte, quantised
from . import worklist as wl
from .columns import Columns, Segment, TileRefs, reduce_scratch, spread
from .explicit import Explicit
from .geometry import Geometry, Scoring
from .pages import PageTiles
from .worklist import WorkList

STARTED, ENDED = 0, 1  # which partial of a share: goes on in the next share, or ends here


@dataclasses.dataclass(frozen=True)
class SplitConfig:
    """How the split-KV kernel runs.

    `stages` key tiles of `key_tile` keys in flight per CTA, `ctas` CTAs; with 2 CTAs an SM one
    computes while the other waits.  `alone`: a CTA is one warpgroup that starts its own copies and
    computes; three of them fit an SM where keys have to be converted.  With `fixed_chunk` keys are
    cut at its multiples and `ctas` is not used: a CTA per chunk, and a row's output does not depend
    on what else is in the batch.

    >>> SplitConfig().ctas
    264
    """

    key_tile: int = 64
    stages: int = 3
    ctas: int = 2 * HOPPER_SMS
    fixed_chunk: int | None = None
    alone: bool = False
    uncut: bool = False  # segments are whole: there is nothing to merge, and no second kernel

    def __post_init__(self):
        if self.key_tile % 64 or self.key_tile <= 0:
            raise ValueError(f"{self.key_tile=} is not a positive multiple of 64")
        if self.uncut and self.fixed_chunk is not None:
            raise ValueError(f"{self.uncut=} and {self.fixed_chunk=} contradict each other")
        if self.stages < 1 or self.ctas < 1:
            raise ValueError(f"{self.stages=} and {self.ctas=} have to be positive")
        if self.fixed_chunk is not None and (
            self.fixed_chunk % self.key_tile or self.fixed_chunk <= 0
        ):
            raise ValueError(f"{self.fixed_chunk=} is not a multiple of {self.key_tile=}")


def smem_bytes(config: SplitConfig, geom: Geometry, pool_bytes: int = 2) -> int:
    """Shared memory of one CTA, for pools of `pool_bytes` a value."""
    h, hv, cols, tile = geom.head_dim, geom.value_dim, geom.cols, config.key_tile
    ring = config.stages * tile * (h + hv) * pool_bytes
    if pool_bytes == 1:  # queries and P in up to three terms
        small = 3 * cols * (h + tile) + cols * hv * 2
    else:
        small = (query_slots(config) * cols * h + cols * tile + cols * hv) * 2
    return ring + small + 4 * reduce_scratch(cols) + 1024


def query_slots(config: SplitConfig) -> int:
    """Query tiles in shared memory: the producer is one ahead of the consumer."""
    return 1 if config.alone else 2


def num_shares(config: SplitConfig, geom: Geometry) -> int:
    """CTAs of the kernel: `ctas`, or a bound on the chunks of all rows."""
    if config.fixed_chunk is None:
        return config.ctas
    chunks = cdiv(geom.blocks_per_row * geom.block_size, config.fixed_chunk)
    return geom.num_q_tiles * geom.num_kv_heads * chunks


def _check(config: SplitConfig, geom: Geometry, pool_dtype: Any) -> None:
    need = smem_bytes(config, geom, jnp.dtype(pool_dtype).itemsize)
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
    gains: tuple[jax.Array, jax.Array] | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    explicit: Explicit | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Output `[T, K, G, Hv]` and base-2 log-sum-exp by column, f32 `[U, K, cols]`.

    `q` is packed (`pack_queries`).  `slopes`, `sinks` and, for one-byte pools with a scale per
    head, the two `gains` (of scores and values) are f32 `[blocks, cols]` (`pack_columns`).
    `scales` of tokens are those of K and V, f32 `[P, K, block_size]`: plain loads, a tile ahead.
    """
    _check(config, geom, k_pool.dtype)
    cols, hv, ctas = geom.cols, geom.value_dim, num_shares(config, geom)
    tile, stages, u = config.key_tile, config.stages, work.tiles.shape[0]
    pages = PageTiles(geom, tile)
    narrow = k_pool.dtype if quantised.is_quantised(k_pool.dtype) else None
    math = Columns(Ops(bool(interpret)), geom, scoring, tile, q.dtype, narrow)
    sds, smem, terms = jax.ShapeDtypeStruct, plgpu.SMEM, math.terms
    swz = lambda dim: swizzled(k_pool.dtype, _swizzle(k_pool, dim))
    ring = lambda dim: smem((stages, tile, dim), k_pool.dtype, transforms=swz(dim))
    rows = lambda dim: smem((terms * cols, dim), k_pool.dtype, transforms=swz(dim))
    out_type = (
        sds((geom.num_tokens, geom.num_kv_heads, geom.group, hv), q.dtype),
        sds((u, geom.num_kv_heads, cols), jnp.float32),
    )
    if not config.uncut:
        out_type += sds((ctas, 2, hv, cols), jnp.float32), sds((ctas, 2, cols), jnp.float32)
    scratch = dict(
        q=smem(
            (query_slots(config) if narrow is None else 1, terms * cols, geom.head_dim),
            k_pool.dtype,
            transforms=swz(geom.head_dim),
        ),
        k=ring(geom.head_dim),
        v=ring(hv),
        p=rows(tile),
        o=smem((cols, hv), q.dtype),
        red=smem((reduce_scratch(cols),), jnp.float32),
        q_full=plgpu.Barrier(num_barriers=2),
        q_free=plgpu.Barrier(num_barriers=2),
        kv_full=plgpu.Barrier(num_arrivals=2 * pages.per_tile, num_barriers=stages),
        kv_free=plgpu.Barrier(num_barriers=stages),
    )
    inputs = dict(
        q=q,
        k=k_pool,
        v=v_pool,
        table=block_tables,
        tiles=work.tiles,
        shares=work.shares,
        dead=work.dead,
        slopes=slopes,
        sinks=sinks,
        k_gain=None if gains is None else gains[0],
        gain=None if gains is None else gains[1],
        k_scale=None if scales is None else scales[0],
        v_scale=None if scales is None else scales[1],
        **({} if explicit is None else explicit._asdict()),
    )
    inputs = {name: x for name, x in inputs.items() if x is not None}
    call = _Split(math, pages, config)

    def body(*refs):
        given, refs = refs[: len(inputs)], refs[len(inputs) :]
        outputs, rest = refs[: len(out_type)], refs[len(out_type) :]
        call.body(
            Namespace(dict(zip(inputs, given, strict=True))),
            outputs,
            Namespace(dict(zip(scratch, rest, strict=True))),
        )

    with jax.named_scope("paged_attention.split"):
        out, lse, *parts = plgpu.kernel(
            body,
            out_type=out_type,
            scratch_types=tuple(scratch.values()),
            grid=(ctas,),
            grid_names=("cta",),
            num_threads=1 if config.alone else 2,
            thread_name="wg",
            interpret=interpret_params(interpret),
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(*inputs.values())
    if config.uncut:
        return out, lse
    last = {name: inputs[name] for name in ("sinks", "gain") if name in inputs}

    def combine(*refs):
        given, refs = refs[: 3 + len(last)], refs[3 + len(last) :]
        shares, part_o, part_lse, *factors = given
        out_ref, lse_ref, o_s = refs
        own = Namespace(dict(zip(last, factors, strict=True)))
        call.combine_body(shares, part_o, part_lse, own, out_ref, lse_ref, o_s)

    with jax.named_scope("paged_attention.combine"):
        out, lse = jax.new_ref(out), jax.new_ref(lse)
        plgpu.kernel(
            combine,
            out_type=(),
            scratch_types=(smem((cols, hv), q.dtype),),
            grid=(ctas,),
            grid_names=("cta",),
            interpret=interpret_params(interpret),
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(work.shares, *parts, *last.values(), out, lse)
        return out[...], lse[...]


def _swizzle(pool: jax.Array, dim: int) -> int:
    """Bytes of a row of SMEM tiles: 128 where they divide a key's."""
    return 128 if dim * pool.dtype.itemsize % 128 == 0 else 64


@dataclasses.dataclass(frozen=True)
class Namespace:
    """Refs by name; None for those that this call lacks."""

    refs: dict[str, Any]

    def __getattr__(self, name: str) -> Any:
        return self.refs.get(name)


def _read(ref, row, *columns):
    """Scalars of a row of the work list."""
    return tuple(ref[row, x] for x in columns)


def _tile(smem: Namespace, q_slot, slot, ahead) -> TileRefs:
    """Ring slot `slot` against the queries of `q_slot`."""
    own = (smem.q.at[q_slot], smem.k.at[slot], smem.v.at[slot], smem.p, smem.red)
    return TileRefs(*own) if ahead is None else TileRefs(*own, *ahead[0])


def _facts_of(tiles_ref, u):
    """A row of `WorkList.tiles`."""
    return _read(tiles_ref, u, *range(8))


@dataclasses.dataclass(frozen=True)
class _Split:
    """The two kernel bodies; static facts only."""

    math: Columns
    pages: PageTiles
    config: SplitConfig

    def body(self, refs: Namespace, outputs, smem: Namespace):
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        share = _read(refs.shares, cta, wl.LENGTH, wl.TILE, wl.HEAD, wl.OFFSET)
        share = (*share, _read(refs.shares, cta, *range(wl.FACTS, wl.FACTS + 8)))

        if self.config.alone:
            self.consume(cta, share, refs, smem, outputs)
            self.clear(cta, refs.dead, outputs[0])
            return

        @pl.when(wg == 0)
        def _():
            self.consume(cta, share, refs, smem, outputs)

        @pl.when(wg == 1)
        def _():
            self.produce(share, refs, smem)
            self.clear(cta, refs.dead, outputs[0])

    # ---------------------------------------------------------------- consumer

    def consume(self, cta, share, refs: Namespace, smem: Namespace, outputs):
        math, geom, tile = self.math, self.math.geom, self.math.tile
        ops, stages = math.ops, self.config.stages
        length, *first, fact = share

        feeder = None
        if self.config.alone:
            feeder = self.start_feeding(share, refs, smem)

        def segment(carry):
            (done, u, head, offset, seen, fact), feeder = carry
            count, first_tile = fact[wl.COUNT], fact[wl.KEY_TILE]
            n = lax.min(count - offset, length - done)
            seg = self.segment(refs, u, head, fact)
            ahead = self.first_scales(refs, head, fact, offset)
            if math.narrow is not None:
                q_slot = 0
                seg = self.split_queries(refs, smem, u, head, fact, seg)
            else:
                q_slot = seen & (query_slots(self.config) - 1)
                if feeder is not None:
                    self.load_q(refs, smem, u, head, q_slot, fact[wl.FIRST_TOKEN])
                plgpu.barrier_wait(smem.q_full.at[q_slot])

            def attend(acc):
                def step(j, carry):
                    m, sums, a, feeder, ahead = carry
                    now, ahead = ahead, self.next_scales(refs, head, fact, offset + j, ahead)
                    slot = lax.rem(done + j, jnp.int32(stages))
                    plgpu.barrier_wait(smem.kv_full.at[slot])
                    key = (first_tile + offset + j) * tile

                    def release():
                        nonlocal feeder
                        if feeder is None:
                            plgpu.barrier_arrive(smem.kv_free.at[slot])
                        else:
                            feeder = self.feed(length, feeder, refs, smem)

                    own = _tile(smem, q_slot, slot, now)
                    given = (math.uncarry(acc, a), m, sums, own, key, seg)
                    if math.narrow is not None:
                        a, m, sums = math.step_narrow(*given, release)
                    else:
                        a, m, sums = math.step(*given)
                        ops.load(a)
                        if feeder is not None:
                            plgpu.commit_smem()  # all four warps are through with the slot
                        release()
                    return m, sums, math.carry(a), feeder, ahead

                carry = (*math.start(), math.carry(acc), feeder, ahead)
                m, sums, a, fed, _ = lax.fori_loop(0, n, step, carry)
                return m, sums, math.output(math.uncarry(acc, a)), fed

            m, sums, o, feeder = math.with_output(attend)

            if feeder is None and math.narrow is None:
                plgpu.barrier_arrive(smem.q_free.at[q_slot])
            o, lse = math.finish(m, sums, o, smem.red)
            ended = offset + n == count
            where = (cta, u, head, offset == 0, ended)
            self.emit(where, o, lse, self.last_factors(refs, head), fact, smem.o, outputs)
            head = jnp.where(ended, head + 1, head)
            wrap = head == geom.num_kv_heads
            u = jnp.where(wrap, fact[wl.NEXT], u)
            fact = lax.cond(wrap, lambda: _facts_of(refs.tiles, u), lambda: fact)
            head = jnp.where(wrap, 0, head)
            offset = jnp.where(ended, 0, offset + n)
            return (done + n, u, head, offset, seen + 1, fact), feeder

        zero = jnp.int32(0)
        start = (zero, *first, zero, fact)
        lax.while_loop(lambda c: c[0][0] < length, segment, (start, feeder))
        plgpu.wait_smem_to_gmem(0)

    def segment(self, refs: Namespace, u, head, fact) -> Segment:
        """What scores and masks of query tile u and KV head `head` depend on."""
        math, geom = self.math, self.math.geom
        block = geom.column_block(head)
        seg = Segment(fact[wl.POSITION], fact[wl.CONTEXT])
        if refs.slopes is not None:
            seg = seg._replace(slopes=math.load(refs.slopes.at[block]))
        if refs.query_positions is None:
            return seg
        return seg._replace(
            first=None if refs.first is None else refs.first[fact[wl.ROW]],
            query_positions=math.load(refs.query_positions.at[u]),
            old=refs.old[fact[wl.ROW]],
            new_keys=refs.new_keys.at[u],
        )

    def first_scales(self, refs: Namespace, head, fact, offset):
        """((scales of K, of V) of a segment's tile, the blocks of the keys of the next)."""
        if refs.k_scale is None:
            return None
        blocks = self.blocks_of_keys(refs, fact, offset)
        return self.next_scales(refs, head, fact, offset - 1, (None, blocks))

    def next_scales(self, refs: Namespace, head, fact, offset, ahead):
        """As `first_scales`, for the tile after `offset`: loads that are awaited a tile later."""
        if ahead is None:
            return None
        at = (ahead[1], head, fact[wl.KEY_TILE] + offset + 1, self.math.ops.interpret)
        scales = tuple(self.pages.scales_of_keys(x, *at) for x in (refs.k_scale, refs.v_scale))
        return scales, self.blocks_of_keys(refs, fact, offset + 2)

    def blocks_of_keys(self, refs: Namespace, fact, offset):
        row, tile = fact[wl.ROW], fact[wl.KEY_TILE] + offset
        first_key, context = self.first_key(refs, fact), fact[wl.CONTEXT]
        where = (row, tile, context, first_key, self.math.ops.interpret)
        return self.pages.blocks_of_keys(refs.table, *where)

    def split_queries(self, refs: Namespace, smem: Namespace, u, head, fact, seg: Segment):
        """The segment's queries as terms in shared memory; their factor joins what it says."""
        geom = self.math.geom
        block, index = geom.column_block(head), u if geom.q_tokens > 1 else fact[wl.FIRST_TOKEN]
        factor = self.math.split_queries(refs.q.at[index, block], smem.q.at[0], smem.red)
        if refs.k_gain is not None:
            factor = factor * self.math.load(refs.k_gain.at[block])
        return seg._replace(factor=factor)

    def last_factors(self, refs: Namespace, head):
        """(sinks, gain) of a KV head's columns."""
        block, load = self.math.geom.column_block(head), self.math.load
        return tuple(None if x is None else load(x.at[block]) for x in (refs.sinks, refs.gain))

    def emit(self, where, o, lse, factors, fact, o_s, outputs):
        """A whole segment goes to the output, a part of one to this share's partials."""
        cta, u, head, starts, ends = where
        out_ref, lse_ref, *parts = outputs

        def whole():
            out = self.math.with_sinks(o, lse, *factors)
            self.math.ops.store_plain(lse_ref.at[u, head], lse)
            self.put(out, o_s, out_ref, fact, head)

        if not parts:
            whole()
            return
        part_o_ref, part_lse_ref = parts
        pl.when(starts & ends)(whole)

        @pl.when(jnp.logical_not(starts & ends))
        def _():
            slot = jnp.where(ends, ENDED, STARTED)
            self.math.ops.store_plain(part_o_ref.at[cta, slot], o)
            self.math.ops.store_plain(part_lse_ref.at[cta, slot], lse)

    def put(self, o, o_s, out_ref, fact, head):
        """The live columns of `o [Hv, cols]` as rows of the output."""
        geom, group = self.math.geom, self.math.geom.group
        token, tokens = fact[wl.FIRST_TOKEN], fact[wl.NUM_TOKENS]
        o = o.astype(self.math.dtype)
        if self.math.narrow is not None and not self.math.ops.interpret:
            onebyte.store_rows(o, o_s)
        else:
            self.math.ops.store_plain(o_s, o, transpose=True)
        plgpu.commit_smem()
        for i in range(geom.q_tokens):
            rows = pl.ds(geom.first_column(head) + i * group, group)

            @pl.when(i < tokens)
            def _():
                plgpu.copy_smem_to_gmem(o_s.at[rows], out_ref.at[token + i, head])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    # ---------------------------------------------------------------- producer

    def produce(self, share, refs: Namespace, smem: Namespace):
        q_free, kv_free = smem.q_free, smem.kv_free
        length, *first, fact = share
        stages = self.config.stages

        def step(i, carry):
            fetched, seen = carry
            u, head, offset, fact, _ = fetched

            def load_q():
                slot = seen & 1
                pl.when(seen >= 2)(lambda: plgpu.barrier_wait(q_free.at[slot]))
                self.load_q(refs, smem, u, head, slot, fact[wl.FIRST_TOKEN])

            if self.math.narrow is None:
                pl.when((offset == 0) | (i == 0))(load_q)
            pl.when(i >= stages)(
                lambda: plgpu.barrier_wait(kv_free.at[lax.rem(i, jnp.int32(stages))])
            )
            last = offset + 1 == fact[wl.COUNT]
            return self.fetch(i, fetched, refs, smem), jnp.where(last, seen + 1, seen)

        begin = (*first, fact, self.block_ids(refs, fact, first[2]))
        fetched, seen = lax.fori_loop(0, length, step, (begin, jnp.int32(0)))
        offset = fetched[2]
        seen = jnp.where(offset == 0, seen, seen + 1)  # a segment that the next share goes on with

        @pl.loop(lax.max(length - stages, 0), length)
        def _(i):
            plgpu.barrier_wait(kv_free.at[lax.rem(i, jnp.int32(stages))])

        if self.math.narrow is not None:
            return

        @pl.loop(lax.max(seen - 2, 0), jnp.where(length > 0, seen, 0))
        def _(x):
            plgpu.barrier_wait(q_free.at[x & 1])

    def load_q(self, refs: Namespace, smem: Namespace, u, head, slot, token):
        """Start the copy of a query tile."""
        geom = self.math.geom
        index = u if geom.q_tokens > 1 else token
        source = refs.q.at[index, geom.column_block(head)]
        plgpu.copy_gmem_to_smem(source, smem.q.at[slot], smem.q_full.at[slot])

    def fetch(self, i, place, refs: Namespace, smem: Namespace):
        """Start the copies of the share's tile i, which lies at `place`; returns the next place.

        A place is (query tile, head, offset, facts of the query tile, block ids).
        """
        u, head, offset, fact, ids = place
        slot = lax.rem(i, jnp.int32(self.config.stages))
        last = offset + 1 == fact[wl.COUNT]
        next_head = jnp.where(last, head + 1, head)
        wrap = next_head == self.math.geom.num_kv_heads
        next_u = jnp.where(wrap, fact[wl.NEXT], u)
        next_fact = lax.cond(wrap, lambda: _facts_of(refs.tiles, next_u), lambda: fact)
        next_offset = jnp.where(last, 0, offset + 1)
        next_ids = self.block_ids(refs, next_fact, next_offset)  # a tile ahead of its use
        self.pages.fetch(
            fact[wl.KEY_TILE] + offset,
            ids,
            head,
            ((refs.k, smem.k.at[slot]), (refs.v, smem.v.at[slot])),
            smem.kv_full.at[slot],
        )
        return next_u, jnp.where(wrap, 0, next_head), next_offset, next_fact, next_ids

    def start_feeding(self, share, refs: Namespace, smem: Namespace):
        """(tiles fetched, place of the next) with the ring filled, for a warpgroup alone."""
        length, *first, fact = share
        feeder = jnp.int32(0), (*first, fact, self.block_ids(refs, fact, first[2]))
        for _ in range(self.config.stages):
            feeder = self.feed(length, feeder, refs, smem)
        return feeder

    def feed(self, length, feeder, refs: Namespace, smem: Namespace):
        """Fetch one more tile, if there is one, into the slot that is free."""
        i, place = feeder
        place = lax.cond(i < length, lambda: self.fetch(i, place, refs, smem), lambda: place)
        return i + 1, place

    def block_ids(self, refs: Namespace, fact, offset):
        row, tile = fact[wl.ROW], fact[wl.KEY_TILE] + offset
        first_key = self.first_key(refs, fact)
        return self.pages.block_ids(refs.table, row, tile, fact[wl.CONTEXT], first_key)

    def first_key(self, refs: Namespace, fact):
        """First key of the row that this call may read, None for 0."""
        window = self.math.scoring.window
        if window is not None and refs.query_positions is None:
            return lax.max(fact[wl.POSITION] - window + 1, 0)
        return None if refs.first is None else refs.first[fact[wl.ROW]]

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

    def combine_body(self, shares_ref, part_o_ref, part_lse_ref, refs, out_ref, lse_ref, o_s):
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
            out = math.with_sinks(out, lse, *self.last_factors(refs, head))
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
