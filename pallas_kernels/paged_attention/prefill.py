"""Chunked prefill over a block pool: flash attention whose keys arrive block by block.

One warpgroup loads, `consumers` warpgroups compute 64 query rows each; a row is a (token, head of
the group) pair, so K and V are read once for the group.  The schedule of a consumer is that of
`flash_attention.forward` (FlashAttention-3, Shah et al., 2024): Q K^T of block i is issued before
P V of block i-1 and the softmax runs under it; the consumers take turns at the tensor cores.  Keys
are walked from the last block to the first: the diagonal and the ragged end come first and are the
only blocks to mask (with a window, the last ones too).

Pools of one byte a value: the warpgroup that loads also converts.  Tiles arrive in a ring of their
own, are multiplied by their scales in registers and written at 16 bits to where the consumers look
for them, who know nothing of it.

The last block of a row ends in slots that may hold NaN.  Masked scores make their P zero, but
0 * NaN is NaN, so one consumer clears those rows of V in shared memory before any reads them.
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
from pallas_kernels._mgpu import MASKED, SMEM_BYTES, Ops, div, rem
from pallas_kernels.flash_attention import tile as tl

from . import quantised
from . import worklist as wl
from .columns import row_layout, row_parts
from .geometry import LOG2E, Geometry, Scoring
from .pages import PageTiles, scale_words
from .rows import load_rows, store_rows

ROWS = 64  # query rows of a consumer: wgmma's M
RAW_STAGES = 2  # tiles of one-byte values on their way


@dataclasses.dataclass(frozen=True)
class PrefillConfig:
    """How the prefill kernel runs: `consumers` x 64 query rows against `block_kv` keys at a time.

    >>> PrefillConfig().block_kv
    128
    """

    consumers: int = 2
    block_kv: int = 128
    stages: int = 2
    late_sum: bool = False

    def __post_init__(self):
        if self.consumers not in (1, 2, 3):
            raise ValueError(f"{self.consumers=} is not 1, 2 or 3")
        if self.block_kv % 64 or self.block_kv <= 0 or self.stages < 1:
            raise ValueError(f"{self.block_kv=} is not a multiple of 64 or {self.stages=} below 1")


def row_tokens(group: int) -> int:
    """Tokens that one consumer holds; the rows left over are padding."""
    return ROWS // group


def prefill_geometry(geom: Geometry, config: PrefillConfig) -> Geometry:
    """The same call in this kernel's query tiles."""
    tokens = config.consumers * row_tokens(geom.group)
    return dataclasses.replace(geom, q_tokens=tokens)


def smem_bytes(config: PrefillConfig, geom: Geometry, pool_bytes: int = 2) -> int:
    """Shared memory of one CTA, for pools of `pool_bytes` a value."""
    h, hv, c = geom.head_dim, geom.value_dim, config.consumers
    ring = config.stages * config.block_kv * (h + hv) * 2
    if pool_bytes == 1:
        ring += RAW_STAGES * (config.block_kv * (h + hv) + 8 * scale_words(geom, config.block_kv))
    return ring + c * ROWS * max(h, hv) * 2 + 1024


def pick_prefill(geom: Geometry, pool_bytes: int = 2) -> PrefillConfig:
    """The largest tiles that fit.

    >>> geom = Geometry(512, 32, 8, 128, 128, 999, 64, 1, 128, max_q=512)
    >>> pick_prefill(geom)
    PrefillConfig(consumers=2, block_kv=192, stages=2, late_sum=True)
    >>> pick_prefill(geom, pool_bytes=1)
    PrefillConfig(consumers=2, block_kv=64, stages=3, late_sum=False)
    """
    wide = geom.head_dim + geom.value_dim > 256
    fits = 192 % geom.block_size == 0
    config = PrefillConfig(block_kv=192 if fits else 128, late_sum=True)
    if wide:
        config = PrefillConfig(block_kv=64)
    if pool_bytes == 1:  # registers for the conversion: fewer for the scores
        config = PrefillConfig(block_kv=64, stages=3)
    if smem_bytes(config, geom, pool_bytes) > SMEM_BYTES:
        raise NotImplementedError(f"{config} does not fit shared memory for {geom}")
    return config


def pack_rows(x: jax.Array, geom: Geometry) -> jax.Array:
    """A per-head vector `[N]` as the 64 rows of a consumer: f32 `[K, 64]`."""
    per = row_tokens(geom.group)
    x = jnp.tile(x.astype(jnp.float32).reshape(geom.num_kv_heads, geom.group), (1, per))
    return jnp.pad(x, ((0, 0), (0, ROWS - x.shape[1])))


def unpack_rows(lse: jax.Array, tiles: jax.Array, geom: Geometry) -> jax.Array:
    """Row values `[U, K, consumers, 64]` -> `[T, N]`; tokens of no tile get -inf."""
    u, k, c, _ = lse.shape
    per = row_tokens(geom.group)
    x = lse[..., : per * geom.group].reshape(u, k, c * per, geom.group)
    x = x.transpose(0, 2, 1, 3).reshape(u, c * per, geom.num_heads)
    i = jnp.arange(c * per, dtype=jnp.int32)[None, :]
    live = (i < tiles[:, wl.NUM_TOKENS, None]) & (tiles[:, wl.COUNT, None] > 0)
    index = jnp.where(live, tiles[:, wl.FIRST_TOKEN, None] + i, geom.num_tokens)
    out = jnp.full((geom.num_tokens + 1, geom.num_heads), -jnp.inf, jnp.float32)
    return out.at[index].set(x)[: geom.num_tokens]


class Refs(NamedTuple):
    """What a CTA works on."""

    q: Any  # [T, K, G, H]
    k: Any
    v: Any
    table: Any
    tiles: Any
    slopes: Any  # [K, 64] or None
    sinks: Any
    dead: Any  # [T], or None where another kernel clears them
    out: Any  # [T, K, G, Hv]
    lse: Any  # [U, K, consumers, 64]
    q_s: Any  # in the end the output
    k_s: Any
    v_s: Any
    k_full: Any
    v_full: Any
    k_free: Any
    v_free: Any
    clean: Any
    turn: Any
    raw: Any = None  # `Raw`, for pools of one byte a value


class Raw(NamedTuple):
    """Tiles of one-byte values as they come."""

    k: Any  # [RAW_STAGES, block_kv, H]
    v: Any
    full: Any  # a barrier a stage
    scales: Any  # (of K, of V) in GMEM: packed by token, f32 [K] by head
    k_scale: Any = None  # [RAW_STAGES, words], for scales by token
    v_scale: Any = None


def prefill_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    block_tables: jax.Array,
    tiles: jax.Array,
    out: jax.Array | None,
    *,
    geom: Geometry,
    scoring: Scoring,
    config: PrefillConfig,
    slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    scales: tuple[jax.Array, jax.Array] | None = None,
    dead: jax.Array | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """`out [T, K, G, Hv]` with the rows of `tiles` written in place, and lse `[U, K, c, 64]`.

    Without an `out` it is made here, with zeros where `dead [T]` says so.  `geom` is
    `prefill_geometry`'s, q `[T, K, G, H]`, `slopes` and `sinks` packed by `pack_rows`.  `scales`
    of one-byte pools are `[K]` each or packed by `pages.pack_scales`.
    """
    need = smem_bytes(config, geom, k_pool.dtype.itemsize)
    if need > SMEM_BYTES:
        raise NotImplementedError(f"{config} needs {need} bytes of shared memory, not {SMEM_BYTES}")
    u, c, hv = tiles.shape[0], config.consumers, geom.value_dim
    stages, block = config.stages, config.block_kv
    pages = PageTiles(geom, block)
    smem, swz, bar = plgpu.SMEM, _mgpu.swizzled(q.dtype), plgpu.Barrier
    call = _Prefill(geom, scoring, config, pages, q.dtype, bool(interpret))
    columns = [x for x in (slopes, sinks, dead) if x is not None]
    narrow = scales is not None
    arrivals = 1 if narrow else pages.per_tile
    raw = _raw_scratch(k_pool, scales, geom, config, pages) if scales is not None else ()

    def body(q_ref, k_ref, v_ref, table_ref, tiles_ref, *refs):
        extra, refs = refs[: len(columns)], refs[len(columns) :]
        factors, refs = refs[: 2 * narrow], refs[2 * narrow :]
        out_ref, lse_ref, *scratch = refs
        scratch, own = scratch[: len(scratch) - len(raw)], scratch[len(scratch) - len(raw) :]
        extra = list(extra)
        slopes_ref, sinks_ref, dead_ref = (
            None if x is None else extra.pop(0) for x in (slopes, sinks, dead)
        )
        call.body(
            Refs(
                q_ref,
                k_ref,
                v_ref,
                table_ref,
                tiles_ref,
                slopes_ref,
                sinks_ref,
                dead_ref,
                out_ref,
                lse_ref,
                *scratch,
                raw=Raw(own[0], own[1], own[2], factors, *own[3:5]) if narrow else None,
            )
        )

    with jax.named_scope("paged_attention.prefill"):
        shape = (geom.num_tokens, geom.num_kv_heads, geom.group, hv)
        out_type = [
            jax.ShapeDtypeStruct(shape, q.dtype),
            jax.ShapeDtypeStruct((u, geom.num_kv_heads, c, ROWS), jnp.float32),
        ]
        target = () if out is None else (jax.new_ref(out),)
        made = _mgpu.kernel(
            body,
            out_type=out_type[len(target) :],
            scratch_types=(
                smem((c, ROWS, max(geom.head_dim, hv)), q.dtype, transforms=swz),
                smem((stages, block, geom.head_dim), q.dtype, transforms=swz),
                smem((stages, block, hv), q.dtype, transforms=swz),
                bar(num_arrivals=arrivals, num_barriers=stages),
                bar(num_arrivals=arrivals, num_barriers=stages),
                bar(num_arrivals=c, num_barriers=stages),
                bar(num_arrivals=c, num_barriers=stages),
                bar(num_arrivals=1),
                bar(num_arrivals=1, num_barriers=c),
                *raw,
            ),
            grid=(u * geom.num_kv_heads,),
            grid_names=("cta",),
            num_warpgroups=c + 1,
            interpret=interpret,
        )(q, k_pool, v_pool, block_tables, tiles, *columns, *(scales or ()), *target)
        return (target[0][...], made[0]) if target else (made[0], made[1])


def _raw_scratch(k_pool, scales, geom: Geometry, config: PrefillConfig, pages: PageTiles):
    """What `Raw` needs of shared memory."""
    by_token, block = scales[0].ndim == 3, config.block_kv
    copies = (4 if by_token else 2) * pages.per_tile
    ring = lambda dim: plgpu.SMEM(
        (RAW_STAGES, block, dim),
        k_pool.dtype,
        transforms=_mgpu.swizzled(k_pool.dtype, 128 if dim % 128 == 0 else 64),
    )
    factors = plgpu.SMEM((RAW_STAGES, scale_words(geom, block)), jnp.float32)
    full = plgpu.Barrier(num_arrivals=copies, num_barriers=RAW_STAGES)
    return ring(geom.head_dim), ring(geom.value_dim), full, *((factors, factors) * by_token)


@dataclasses.dataclass(frozen=True)
class _Prefill:
    """The kernel body; static facts only."""

    geom: Geometry
    scoring: Scoring
    config: PrefillConfig
    pages: PageTiles
    dtype: Any
    interpret: bool

    def body(self, refs: Refs) -> None:
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        heads, consumers = self.geom.num_kv_heads, self.config.consumers
        # the last tiles of a row see the most keys: they start first
        u = refs.tiles.shape[0] - 1 - div(cta, heads)
        head = rem(cta, heads)
        fact = tuple(refs.tiles[u, x] for x in range(8))
        busy = fact[wl.COUNT] > 0
        wide = self.geom.head_dim + self.geom.value_dim > 256
        wide = wide or self.config.block_kv > 128
        producer = 32 if consumers == 3 else 24 if wide else 40  # whichever spills with fewer
        if refs.raw is not None:
            producer = 120
        computing, loading = _mgpu.registers(consumers, producer=producer)

        @pl.when(wg < consumers)
        def _():
            plgpu.set_max_registers(computing, action="increase")
            pl.when(busy)(Consumer(self, refs, wg, u, head, fact).run)

        @pl.when(wg == consumers)
        def _():
            plgpu.set_max_registers(loading, action="decrease")
            produce = self.produce if refs.raw is None else self.convert
            pl.when(busy)(lambda: produce(refs, head, fact))
            if refs.dead is not None:
                self.clear(refs, cta)

    def clear(self, refs: Refs, cta) -> None:
        """Zeros for the tokens that attend to nothing, every CTA its part."""
        geom, ops = self.geom, Ops(self.interpret)
        tokens, ctas = geom.num_tokens, refs.tiles.shape[0] * geom.num_kv_heads
        layout = row_layout(geom.value_dim)

        @pl.loop(0, _mgpu.cdiv(tokens, ctas))
        def _(x):
            token = x * ctas + cta
            inside = lax.min(token, jnp.int32(tokens - 1))

            @pl.when((token < tokens) & (refs.dead[inside] > 0))
            def _():
                @pl.loop(0, geom.num_kv_heads)
                def _(head):
                    for g in range(geom.group):
                        zeros = jnp.zeros((geom.value_dim,), self.dtype)
                        zeros = plgpu.layout_cast(zeros, layout)
                        ops.store_plain(refs.out.at[token, head, g], zeros)

    def block_ids(self, refs: Refs, fact, i):
        """Of key block i, counted from the last."""
        window, first_key = self.scoring.window, None
        if window is not None:
            first_key = lax.max(fact[wl.POSITION] - window + 1, 0)
        tile = lax.max(fact[wl.KEY_TILE] + fact[wl.COUNT] - 1 - i, 0)
        return self.pages.block_ids(refs.table, fact[wl.ROW], tile, fact[wl.CONTEXT], first_key)

    def convert(self, refs: Refs, head, fact) -> None:
        """As `produce`, from pools of one byte a value."""
        raw, stages, count = refs.raw, self.config.stages, fact[wl.COUNT]
        last = fact[wl.KEY_TILE] + count - 1
        by_token = raw.k_scale is not None

        def fetch(i):
            at = rem(i, RAW_STAGES)
            pairs = ((refs.k, raw.k.at[at]), (refs.v, raw.v.at[at]))
            scales = ()
            if by_token:
                scales = tuple(
                    zip(raw.scales, (raw.k_scale.at[at], raw.v_scale.at[at]), strict=True)
                )
            ids = self.block_ids(refs, fact, i)
            self.pages.fetch(last - i, ids, head, pairs, raw.full.at[at], scales=scales)

        fetch(jnp.int32(0))
        pl.when(count > 1)(lambda: fetch(jnp.int32(1)))

        @pl.loop(0, count)
        def _(i):
            slot, at = rem(i, stages), rem(i, RAW_STAGES)
            plgpu.barrier_wait(raw.full.at[at])
            for source, target, scale, factor, full, free in (
                (raw.k, refs.k_s, raw.k_scale, raw.scales[0], refs.k_full, refs.k_free),
                (raw.v, refs.v_s, raw.v_scale, raw.scales[1], refs.v_full, refs.v_free),
            ):
                pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                scale = scale.at[at] if by_token else factor[head]
                self.widen(source.at[at], target.at[slot], scale, head)
                plgpu.commit_smem()  # and all four warps are through with the raw tile
                plgpu.barrier_arrive(full.at[slot])
            pl.when(i + RAW_STAGES < count)(lambda: fetch(i + RAW_STAGES))

        self.drain(refs, count)

    def widen(self, source, target, scale, head) -> None:
        """A tile of one-byte values times its scales, at 16 bits."""
        size, block = self.geom.block_size, self.config.block_kv
        if len(getattr(scale, "shape", ())):
            offset = rem(head, max(quantised.SCALES_PER_ROW // size, 1)) * size
            scale = quantised.load_rows(scale, size, offset, block, self.interpret)
        wide = quantised.compute_dtype(self.dtype, source.dtype)
        for at in row_parts(source):
            part = source.at[:, at]
            if self.interpret:
                x = part[...]
            else:
                x = plgpu.load(part, layout=plgpu.Layout.WGMMA_UPCAST_2X)
            x = plgpu.layout_cast(quantised.convert(x, wide), plgpu.Layout.WGMMA)
            x = x.astype(jnp.float32)
            factor = scale if scale.ndim == 0 else lax.broadcast_in_dim(scale, x.shape, [0])
            target[:, at] = (x * factor).astype(self.dtype)

    def drain(self, refs: Refs, count) -> None:
        """Wait until the consumers are through with the last tiles."""
        stages = self.config.stages

        @pl.loop(lax.max(count - stages, 0), count)
        def _(i):
            slot = rem(i, stages)
            plgpu.barrier_wait(refs.k_free.at[slot])
            plgpu.barrier_wait(refs.v_free.at[slot])

    def produce(self, refs: Refs, head, fact) -> None:
        """K and V from the last block to the first."""
        stages, count = self.config.stages, fact[wl.COUNT]
        last = fact[wl.KEY_TILE] + count - 1
        ids_of = functools.partial(self.block_ids, refs, fact)

        def step(i, ids):
            slot, ahead = rem(i, stages), ids_of(i + 1)
            for source, target, full, free in (
                (refs.k, refs.k_s, refs.k_full, refs.k_free),
                (refs.v, refs.v_s, refs.v_full, refs.v_free),
            ):
                pl.when(i >= stages)(lambda free=free: plgpu.barrier_wait(free.at[slot]))
                self.pages.fetch(last - i, ids, head, ((source, target.at[slot]),), full.at[slot])
            return ahead

        lax.fori_loop(0, count, step, ids_of(0))
        self.drain(refs, count)


@dataclasses.dataclass(frozen=True)
class Consumer:
    """One consumer warpgroup; block i is key block `last - i`."""

    call: _Prefill
    refs: Refs
    wg: Any
    u: Any
    head: Any
    fact: Any

    @property
    def ops(self) -> Ops:
        """Accumulators."""
        return Ops(self.call.interpret)

    @property
    def count(self):
        """Key blocks of the tile."""
        return self.fact[wl.COUNT]

    @property
    def position(self):
        """Position of the first token of this warpgroup."""
        return self.fact[wl.POSITION] + self.wg * row_tokens(self.call.geom.group)

    @property
    def first(self):
        """First token of this warpgroup."""
        return self.fact[wl.FIRST_TOKEN] + self.wg * row_tokens(self.call.geom.group)

    @property
    def live(self):
        """Tokens of this warpgroup, at most as many as it has rows for."""
        per = row_tokens(self.call.geom.group)
        return lax.min(self.fact[wl.NUM_TOKENS] - self.wg * per, jnp.int32(per))

    def queries(self):
        """The tile of queries in shared memory."""
        refs, h = self.refs, self.call.geom.head_dim
        tile = refs.q_s.at[self.wg + self.ops.opaque(0)]
        return tile if tile.shape[1] == h else tile.at[:, pl.ds(0, h)]

    def first_key(self, i):
        """First key of block i."""
        return (self.fact[wl.KEY_TILE] + self.count - 1 - i) * self.call.config.block_kv

    def slot(self, i):
        """Ring slot of block i."""
        return rem(i, self.call.config.stages)

    def unmasked(self):
        """Blocks `lo <= i < hi` that every row of this warpgroup sees in full."""
        block, per = self.call.config.block_kv, row_tokens(self.call.geom.group)
        end = self.fact[wl.KEY_TILE] + self.count
        lo = lax.max(end - div(lax.max(self.position + 1, 0), block), 1)
        if self.call.scoring.window is None:
            return lo, self.count
        oldest = self.position + per - 1 - self.call.scoring.window  # no longer seen by all
        hi = jnp.where(oldest < 0, self.count, end - 1 - div(lax.max(oldest, 0), block))
        return lo, lax.max(hi, lo)

    @property
    def multiplier(self) -> float:
        """What `logits` leaves to the exponent: one instruction a score less."""
        scoring = self.call.scoring
        plain = scoring.soft_cap is None and self.refs.slopes is None and scoring.scale > 0
        return scoring.scale * LOG2E if plain else 1.0

    def logits(self, s, i, masked: bool):
        """Scores -> what times `multiplier` are base-2 logits, masked where that is needed."""
        call, key0 = self.call, self.first_key(i)
        scoring, group = call.scoring, call.geom.group
        if scoring.soft_cap is None:
            rest = scoring.scale * LOG2E / self.multiplier
            s = s if rest == 1.0 else s * rest
        else:
            # tanh x = 1 - 2 / (1 + e^2x), by exp2: tanh.approx errs by 5e-4 of the cap
            e = jnp.exp2(jnp.minimum(s * (2 * LOG2E * scoring.scale / scoring.soft_cap), 80.0))
            s = (1.0 - 2.0 / (1.0 + e)) * (scoring.soft_cap * LOG2E)
        if not masked and self.refs.slopes is None:
            return s
        # position of the row minus key of the first column group, [64, 8]
        behind = lax.div(tl.iota(ROWS, 0), jnp.int32(group)) - tl.iota(ROWS, 1)
        behind = behind + (self.position - key0)
        if self.refs.slopes is not None:
            slope = self.load_rows(self.refs.slopes.at[self.head]) * LOG2E
            slope, distance = tl.by_row(slope, tl.GROUP), behind.astype(jnp.float32)
            parts = [x - jnp.abs(distance - float(c)) * slope for c, x in tl.groups(s)]
            s = lax.concatenate(parts, 1)
        if not masked:
            return s
        lo = None if scoring.window is None else behind - scoring.window + 1
        return tl.mask(s, lo, behind + 1)

    def load_rows(self, ref):
        """A `[64]` vector over the rows."""
        if self.call.interpret:
            return ref[...]
        return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)

    def turn(self, op: str, wg) -> None:
        """The tensor cores: wait for them ("sync") or hand them over ("arrive")."""
        if self.call.config.consumers == 1:
            return
        if self.call.interpret:
            {"sync": plgpu.barrier_wait, "arrive": plgpu.barrier_arrive}[op](self.refs.turn.at[wg])
        else:
            named = {"sync": _mgpu.named_barrier_sync, "arrive": _mgpu.named_barrier_arrive}[op]
            named(wg + 5, 2 * _mgpu.WARPGROUP)

    def next_wg(self):
        """Whose turn comes after this warpgroup's."""
        return jnp.where(self.wg == self.call.config.consumers - 1, 0, self.wg + 1)

    def softmax(self, s, m, total):
        """Online softmax step: maxima (base 2), sums or their 8 columns (`late_sum`), factor, P."""
        late, times = self.call.config.late_sum, self.multiplier
        new = s.max(axis=1) * times
        new = new if m is None else jnp.maximum(m, new)
        p = jnp.exp2(s * times - tl.by_row(new, s.shape[1]))
        fresh = tl.fold(p) if late else p.sum(axis=1)
        if m is None:
            return new, fresh, None, p
        alpha = jnp.exp2(m - new)
        old = tl.by_row(alpha, tl.GROUP) if late else alpha
        return new, total * old + fresh, alpha, p

    def first_v(self) -> None:
        """V of block 0 has landed and, where its row ends in it, holds zeros past the end.

        And before the first key to read: where a window leaves one block of the pool, the tile's
        part before that repeats it.
        """
        refs, window = self.refs, self.call.scoring.window
        plgpu.barrier_wait(refs.v_full.at[self.slot(0)])
        live = self.fact[wl.CONTEXT] - self.first_key(0)
        before = None
        if window is not None:
            before = self.fact[wl.POSITION] - window + 1 - self.first_key(0)

        @pl.when(live < self.call.config.block_kv)
        def _():
            @pl.when(self.wg == 0)
            def _():
                _mgpu.clear_rows(refs.v_s.at[self.slot(0)], live, self.call.interpret, before)
                plgpu.commit_smem()
                plgpu.barrier_arrive(refs.clean)

            plgpu.barrier_wait(refs.clean)

    def await_v(self, i) -> None:
        """V of block i has landed."""
        pl.when(i > 0)(lambda: plgpu.barrier_wait(self.refs.v_full.at[self.slot(i)]))

    def first_block(self, oacc):
        """Q K^T and softmax of block 0: nothing to overlap with yet."""
        refs, slot = self.refs, self.slot(0)

        def scores(acc):
            plgpu.barrier_wait(refs.k_full.at[slot])
            return self.ops.load(self.ops.wgmma(acc, self.queries(), refs.k_s.at[slot].T))

        s = self.ops.with_acc(scores, (ROWS, self.call.config.block_kv))
        plgpu.barrier_arrive(refs.k_free.at[slot])
        m, total, _, p = self.softmax(self.logits(s, 0, True), None, None)
        self.first_v()
        following = self.slot(1)
        pl.when(self.count > 1)(lambda: plgpu.barrier_wait(refs.k_full.at[following]))
        return m, total, p.astype(self.call.dtype), self.ops.carry(oacc)

    def step(self, i, carry, oacc, masked: bool):
        """Block i: issue Q K^T, then P V of block i-1, and run the softmax under it."""
        refs, ops = self.refs, self.ops
        m, total, p, o_carry = carry
        now, before, following = self.slot(i), self.slot(i - 1), self.slot(i + 1)
        o = ops.uncarry(oacc, o_carry)

        def scores(acc):
            nonlocal o
            self.turn("sync", self.wg)
            acc = ops.wgmma(acc, self.queries(), refs.k_s.at[now].T)
            self.await_v(i - 1)
            o = ops.wgmma(o, p, refs.v_s.at[before])
            self.turn("arrive", self.next_wg())
            s = ops.load(acc, 1)
            plgpu.barrier_arrive(refs.k_free.at[now])
            return s

        s = self.logits(ops.with_acc(scores, (ROWS, self.call.config.block_kv)), i, masked)
        m, total, alpha, p = lax.optimization_barrier(self.softmax(s, m, total))
        # a basic-block border: ptxas may not hoist the wait for P V above the softmax
        pl.when(i + 1 < self.count)(lambda: plgpu.barrier_wait(refs.k_full.at[following]))
        value = ops.load(o, 0)
        plgpu.barrier_arrive(refs.v_free.at[before])
        o = ops.store(o, value * tl.by_row(alpha, value.shape[1]))
        return m, total, p.astype(self.call.dtype), ops.carry(o)

    def attend(self, oacc):
        """All blocks: O (not normalised), row maximum (base 2) and row sum."""
        refs, ops = self.refs, self.ops
        loop = lambda lo, hi, masked, c: lax.fori_loop(
            lo, hi, functools.partial(self.step, oacc=oacc, masked=masked), c
        )
        lo, hi = (lax.min(x, self.count) for x in self.unmasked())
        c = self.first_block(oacc)
        c = loop(1, lo, True, c)
        c = loop(lo, hi, False, c)
        if self.call.scoring.window is not None:
            c = loop(hi, self.count, True, c)
        m, total, p, o_carry = c
        last = self.count - 1
        self.await_v(last)
        o = ops.wgmma(ops.uncarry(oacc, o_carry), p, refs.v_s.at[self.slot(last)])
        if self.call.config.late_sum:
            total = total.sum(axis=1)
        value = ops.load(o)
        plgpu.barrier_arrive(refs.v_free.at[self.slot(last)])
        return value, m, total

    def run(self) -> None:
        """The tile, from the queries' arrival to the output."""
        wg, consumers = self.wg, self.call.config.consumers
        refs = self.refs
        pl.when(wg == consumers - 1)(lambda: self.turn("arrive", 0))
        place = (self.first, self.head, self.live, self.call.interpret)
        load_rows(refs.q, self.queries(), *place)
        plgpu.commit_smem()
        o, m, total = self.ops.with_acc(self.attend, (ROWS, self.call.geom.value_dim))
        pl.when(wg == 0)(lambda: self.turn("sync", 0))  # the turn that the last one handed over
        seen = m > MASKED * self.multiplier / 2
        lse = jnp.where(seen, (m + jnp.log2(total)) / LOG2E, -jnp.inf)
        self.ops.store_plain(refs.lse.at[self.u, self.head, wg], lse)
        if refs.sinks is not None:
            sink = self.load_rows(refs.sinks.at[self.head]) * LOG2E
            total = total + jnp.exp2(jnp.minimum(sink - m, 126.0))
        o = o * tl.by_row(jnp.where(seen, 1.0 / total, 0.0), o.shape[1])
        plgpu.commit_smem()  # all four warps are through with the queries
        staged = refs.q_s.at[wg]
        if staged.shape[1] != o.shape[1]:
            staged = staged.at[:, pl.ds(0, o.shape[1])]
        o = lax.optimization_barrier(o.astype(self.call.dtype))
        for c in range(0, o.shape[1], 64):
            staged.at[:, pl.ds(c, 64)][...] = o[:, c : c + 64]
        plgpu.commit_smem()
        store_rows(staged, refs.out, *place)
