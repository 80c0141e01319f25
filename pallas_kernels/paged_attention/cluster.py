"""Decode of small batches in one launch: a row and KV head is a cluster of CTAs.

Every warpgroup of the cluster takes each R-th key tile of the row (R = CTAs x warpgroups), starts
its own TMA copies and keeps its own running maximum; the partial outputs meet in shared memory
behind one cluster barrier (`exchange.py`), and the cluster's warpgroups merge them, one query
column at a time.  No work list, no second kernel: where a call lasts five microseconds, every
launch beside it would show.
"""

import dataclasses
import functools
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
    store_scalar,
    swizzled,
)

from .columns import Columns, Segment, TileRefs, reduce_scratch
from .exchange import Exchange
from .geometry import LOG2E, Geometry, Scoring
from .pages import PageTiles


@dataclasses.dataclass(frozen=True)
class ClusterConfig:
    """How the single-launch kernel runs.

    `cluster` CTAs of `warpgroups` warpgroups share a row and KV head; each warpgroup keeps `stages`
    tiles of `key_tile` keys in flight.  Clusters of 16 are beyond what CUDA guarantees to place;
    an H200 places them.

    >>> ClusterConfig(cluster=8).cluster
    8
    """

    cluster: int = 8
    warpgroups: int = 2
    stages: int = 2
    key_tile: int = 64

    def __post_init__(self):
        if self.cluster not in (1, 2, 4, 8, 16):
            raise ValueError(f"{self.cluster=} is not 1, 2, 4, 8 or 16")
        if self.key_tile % 64 or self.key_tile <= 0:
            raise ValueError(f"{self.key_tile=} is not a positive multiple of 64")
        if not 1 <= self.warpgroups <= 4 or self.stages < 1:
            raise ValueError(f"{self.warpgroups=} is not 1 to 4 or {self.stages=} is below 1")


def smem_bytes(config: ClusterConfig, geom: Geometry, itemsize: int) -> int:
    """Shared memory of one CTA."""
    h, hv, cols = geom.head_dim, geom.value_dim, geom.cols
    ring = config.stages * config.key_tile * (h + hv) * itemsize
    small = cols * (h + config.key_tile) * itemsize + 4 * reduce_scratch(cols)
    return config.warpgroups * (ring + small) + _exchange(config, geom).bytes + 1024


def _exchange(config: ClusterConfig, geom: Geometry) -> Exchange:
    return Exchange(
        ranks=config.cluster * config.warpgroups,
        warpgroups=config.warpgroups,
        live=geom.q_tokens * geom.group,
        cols=geom.cols,
        value_dim=geom.value_dim,
    )


def pick_config(geom: Geometry, itemsize: int = 2, *, max_cluster: int = 8) -> ClusterConfig:
    """One CTA of two warpgroups per SM, none without a tile of the longest row the table holds.

    Clusters of 16 measured slower: an H200 places few of them at a time.  So did a ring of three
    slots where it does not run long: 5 to 13% at 8 and 32 tiles a CTA.  Of one or two tiles a CTA
    one warpgroup takes both: there is half as much to merge (4.99 -> 4.76 us).

    >>> pick_config(Geometry(1, 32, 8, 128, 128, 99, 64, 1, 64, max_q=1))
    ClusterConfig(cluster=8, warpgroups=2, stages=2, key_tile=64)
    """
    tiles = cdiv(geom.blocks_per_row * geom.block_size, 64)
    segments = geom.num_rows * tiles_per_row(geom) * geom.num_kv_heads
    cluster = 1
    while 2 * cluster <= min(max_cluster, tiles) and 2 * cluster * segments <= HOPPER_SMS:
        cluster *= 2
    warpgroups = 2 if tiles > 2 * cluster else 1
    most = 2 if tiles <= 32 * cluster else 3
    stages = max(1, min(most, cdiv(tiles, cluster * warpgroups)))
    config = ClusterConfig(cluster, warpgroups, stages)
    while stages > 1 and smem_bytes(config, geom, itemsize) > SMEM_BYTES:
        stages -= 1
        config = dataclasses.replace(config, stages=stages)
    return config


def _cluster_sync() -> None:
    """PTX `barrier.cluster` with release and acquire by every thread.

    A `plgpu.ClusterBarrier` has one thread arrive per warpgroup, with the scope of its CTA: it does
    not order the global writes of the other 127.
    """

    @plgpu.inline_mgpu()
    def sync(_):
        from jax.experimental.mosaic import gpu as mgpu

        mgpu.utils.inline_ptx(
            "barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;",
            has_side_effects=True,
        )

    sync()  # pyright: ignore[reportCallIssue]


def first_tokens(q_indptr: jax.Array, geom: Geometry) -> jax.Array:
    """First token of every query tile `[U]`: `tiles_per_row` tiles per row, some of them empty."""
    offset = jnp.arange(tiles_per_row(geom), dtype=jnp.int32) * geom.q_tokens
    return (q_indptr[:-1].astype(jnp.int32)[:, None] + offset[None, :]).reshape(-1)


def tiles_per_row(geom: Geometry) -> int:
    """Query tiles of a row, whether it needs them or not."""
    return cdiv(geom.max_q, geom.q_tokens)


def cluster_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    q_indptr: jax.Array,
    *,
    geom: Geometry,
    scoring: Scoring,
    config: ClusterConfig,
    slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Output `[T, K, G, Hv]` and base-2 log-sum-exp by column, f32 `[U, K, cols]`.

    `q` is packed (`pack_queries`), `slopes` and `sinks` are f32 `[blocks, cols]` (`pack_columns`).
    """
    need = smem_bytes(config, geom, q.dtype.itemsize)
    if need > SMEM_BYTES:
        raise NotImplementedError(f"{config} needs {need} bytes of shared memory, not {SMEM_BYTES}")
    cols, hv, w = geom.cols, geom.value_dim, config.warpgroups
    tile, stages, exchange = config.key_tile, config.stages, _exchange(config, geom)
    u = geom.num_rows * tiles_per_row(geom)
    pages = PageTiles(geom, tile)
    sds, smem, swz = jax.ShapeDtypeStruct, plgpu.SMEM, swizzled(q.dtype)
    heads = geom.num_kv_heads
    call = _Cluster(
        math=Columns(Ops(bool(interpret)), geom, scoring, tile, q.dtype),
        pages=pages,
        config=config,
        exchange=exchange,
        has=(slopes is not None, sinks is not None),
    )
    barrier = plgpu.Barrier(num_arrivals=w)
    mesh: dict[str, Any] = {}
    if config.cluster > 1:
        mesh.update(cluster=(config.cluster,), cluster_names=("c",))
        barrier = plgpu.ClusterBarrier(collective_axes=("c",), num_arrivals=w)
    columns = [x for x in (slopes, sinks) if x is not None]
    with jax.named_scope("paged_attention.cluster"):
        out, lse, *_ = plgpu.kernel(
            call.body,
            out_type=(
                sds((geom.num_tokens, heads, geom.group, hv), q.dtype),
                sds((u, heads, cols), jnp.float32),
                *exchange.outputs(u, heads, bool(interpret)),
            ),
            scratch_types=(
                smem((w, cols, geom.head_dim), q.dtype, transforms=swz),
                smem((w, stages, tile, geom.head_dim), q.dtype, transforms=swz),
                smem((w, stages, tile, hv), q.dtype, transforms=swz),
                smem((w, cols, tile), q.dtype, transforms=swz),
                smem((w, reduce_scratch(cols)), jnp.float32),
                plgpu.Barrier(num_barriers=(w,)),
                plgpu.Barrier(num_arrivals=2 * pages.per_tile, num_barriers=(w, stages)),
                barrier,
                *exchange.scratch(bool(interpret)),
            ),
            grid=(heads, u),
            grid_names=("head", "u"),
            num_threads=w,
            thread_name="wg",
            interpret=interpret_params(interpret),
            compiler_params=plgpu.CompilerParams(approx_math=True),
            **mesh,
        )(q, k_pool, v_pool, block_tables, context_lens, q_indptr, *columns)
    return out, lse


@dataclasses.dataclass(frozen=True)
class _Cluster:
    """The kernel body; static facts only."""

    math: Columns
    pages: PageTiles
    config: ClusterConfig
    exchange: Exchange
    has: tuple[bool, bool]  # slopes, sinks

    def body(self, q_ref, k_ref, v_ref, table_ref, context_ref, indptr_ref, *refs):
        columns, refs = refs[: sum(self.has)], refs[sum(self.has) :]
        slopes_ref = columns[0] if self.has[0] else None
        sinks_ref = columns[-1] if self.has[1] else None
        geom, config, math = self.math.geom, self.config, self.math
        out_ref, lse_ref, *refs = refs
        if math.ops.interpret:  # partials in global memory, before the scratch
            refs = [*refs[2:], *refs[:2]]
        q_s, k_s, v_s, p_s, red_s, q_full, kv_full, done, *parts = refs
        u, head = lax.axis_index("u"), lax.axis_index("head")
        wg = lax.axis_index("wg")
        rank = wg
        if config.cluster > 1:
            rank = rank + lax.axis_index("c") * config.warpgroups
        ranks, per_row = config.cluster * config.warpgroups, tiles_per_row(geom)
        row = div(u, per_row) if per_row > 1 else u
        early = None
        if self.math.scoring.window is None:  # the first blocks, before the row's length is known
            early = [
                self.pages.peek(table_ref, row, rank + j * ranks) for j in range(config.stages)
            ]
        begin, end, context = indptr_ref[row], indptr_ref[row + 1], context_ref[row]
        facts = self.facts(u, row, begin, end, context)
        token = facts[0]
        index = u if geom.q_tokens > 1 else lax.min(token, jnp.int32(geom.num_tokens - 1))
        source = q_ref.at[index, geom.column_block(head)]
        plgpu.copy_gmem_to_smem(source, q_s.at[wg], q_full.at[wg])
        block = geom.column_block(head)
        slopes = None if slopes_ref is None else math.load(slopes_ref.at[block])
        self.clear(u, head, rank, indptr_ref, out_ref)
        smem = tuple(x.at[wg] for x in (q_s, k_s, v_s, p_s, red_s))
        bars = (q_full.at[wg], lambda slot: kv_full.at[wg, slot])
        o, lse = self.attend(
            rank, row, head, facts, early, (k_ref, v_ref, table_ref), smem, bars, slopes
        )
        first = geom.first_column(head)
        self.exchange.send(math, parts, (u, head), first, rank, o, lse)
        if math.ops.interpret:
            plgpu.barrier_arrive(done)
            plgpu.barrier_wait(done)
        else:
            _cluster_sync()
        self.merge(u, head, rank, facts, parts, sinks_ref, (out_ref, lse_ref))

    def facts(self, u, row, begin, end, context):
        """First token, tokens, position, first key tile, key tiles and context of query tile u."""
        geom, tile, window = self.math.geom, self.math.tile, self.math.scoring.window
        offset = (u - row * tiles_per_row(geom)) * geom.q_tokens if geom.max_q > 1 else 0
        tokens = lax.max(lax.min(end - begin - offset, jnp.int32(geom.q_tokens)), 0)
        position = context - (end - begin) + offset
        last = position + tokens - 1
        first_key = 0 if window is None else lax.max(position - window + 1, 0)
        first_tile = first_key if window is None else div(first_key, tile)
        count = jnp.where((tokens > 0) & (last >= 0), div(lax.max(last, 0), tile) + 1, first_tile)
        return begin + offset, tokens, position, first_tile, count - first_tile, context

    def attend(self, rank, row, head, facts, early, refs, smem, bars, slopes):
        """Normalised output `[Hv, cols]` and log-sum-exp over this warpgroup's key tiles."""
        math, pages, config = self.math, self.pages, self.config
        ops, geom, stages = math.ops, math.geom, config.stages
        k_ref, v_ref, table_ref = refs
        q_s, k_s, v_s, p_s, red_s = smem
        q_full, kv_full = bars
        _, _, position, first_tile, count, context = facts
        ranks = config.cluster * config.warpgroups
        n = div(lax.max(count - rank + (ranks - 1), 0), ranks)
        tile_of = lambda j: first_tile + rank + j * ranks

        def ids_of(j):
            window, first_key = math.scoring.window, None
            if window is not None:
                first_key = lax.max(position - window + 1, 0)
            return pages.block_ids(table_ref, row, tile_of(j), context, first_key)

        def fetch(j, slot, ids):
            pairs = ((k_ref, k_s.at[slot]), (v_ref, v_s.at[slot]))
            pages.fetch(tile_of(j), ids, head, pairs, kv_full(slot))

        for j in range(stages):

            @pl.when(j < n)
            def _():
                if early is None:
                    fetch(j, j, ids_of(j))
                else:
                    fetch(j, j, pages.settle(early[j], tile_of(j), context))

        plgpu.barrier_wait(q_full)

        def main(acc):
            def step(j, carry):
                m, sums, ids, a = carry
                slot = lax.rem(j, jnp.int32(stages))
                ahead = ids_of(j + stages + 1)
                plgpu.barrier_wait(kv_full(slot))
                refs = TileRefs(q_s, k_s.at[slot], v_s.at[slot], p_s, red_s)
                key, seg = tile_of(j) * math.tile, Segment(position, context, slopes)
                a, m, sums = math.step(ops.uncarry(acc, a), m, sums, refs, key, seg)
                ops.load(a)

                @pl.when(j + stages < n)
                def _():
                    plgpu.commit_smem()  # all four warps are through with the slot
                    fetch(j + stages, slot, ids)

                return m, sums, ahead, ops.carry(a)

            carry = (*math.start(), ids_of(stages), ops.carry(acc))
            m, sums, _, a = lax.fori_loop(0, n, step, carry)
            return m, sums, ops.load(ops.uncarry(acc, a))

        m, sums, o = ops.with_acc(main, (geom.value_dim, geom.cols))
        return math.finish(m, sums, o, red_s)

    def merge(self, u, head, rank, facts, parts, sinks_ref, outputs):
        """The partials of the cluster, query column c by warpgroup c, c - ranks, ..."""
        geom, exchange, math = self.math.geom, self.exchange, self.math
        token, tokens = facts[0], facts[1]
        out_ref, lse_ref = outputs
        first = geom.first_column(head)

        def column(turn):
            c = rank + turn * exchange.ranks
            lse, values = exchange.received(math, parts, (u, head), first, rank, turn)
            m = functools.reduce(lax.max, lse)
            weight = [jnp.exp2(x - m) for x in lse]
            total, o = weight[0], values[0] * weight[0]
            for w, v in zip(weight[1:], values[1:], strict=True):
                total, o = total + w, o + v * w
            seen = jnp.where(m > MASKED / 2, m + jnp.log2(total), MASKED)
            store_scalar(lse_ref.at[u, head], first + c, seen, math.ops.interpret)
            gain = 1.0 / total
            if sinks_ref is not None:
                sink = sinks_ref[geom.column_block(head), first + c] * LOG2E
                top = lax.max(m, sink)
                own = jnp.exp2(m - top)
                gain = own / (total * own + jnp.exp2(sink - top))
            i = div(c, geom.group) if geom.q_tokens > 1 else 0

            @pl.when(i < tokens)
            def _():
                g = c - i * geom.group
                o_ = (o * gain).astype(math.dtype)
                math.ops.store_plain(out_ref.at[token + i, head, g], o_)

        for turn in range(exchange.turns):
            left = exchange.live - turn * exchange.ranks
            pl.when(rank < min(exchange.ranks, left))(functools.partial(column, turn))

    def clear(self, u, head, rank, indptr_ref, out_ref):
        """Zeros for the tokens of no row: they lie past the last row's."""
        geom = self.math.geom
        num = geom.num_rows * tiles_per_row(geom)

        @pl.when(rank == self.config.cluster * self.config.warpgroups - 1)
        def _():
            begin = indptr_ref[geom.num_rows] + u

            @pl.loop(0, div(lax.max(geom.num_tokens - begin + (num - 1), 0), num))
            def _(x):
                for g in range(geom.group):
                    target = out_ref.at[begin + x * num, head, g]
                    self.math.ops.store_plain(target, self.math.zero_row())
