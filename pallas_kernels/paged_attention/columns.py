"""Keys as rows, queries as columns: one tile of keys against one packed query tile.

A decode has few queries and many keys, so the operands of attention change places: `S^T = K Q^T`
has 64 keys as wgmma's M and 8 to 64 query columns as its N, and `O^T += V^T P^T`.  The running
maximum is a vector over the columns: a reduction over the four warps of a warpgroup.

That reduction goes through shared memory.  Mosaic reserves one scratch for it per CTA, at the same
address for every warpgroup, so two warpgroups of a CTA that reduce at the same time read each
other's values.  `_column_reduce` takes the scratch as an argument: each warpgroup brings its own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mgpu
from pallas_kernels._mgpu import MASKED, Ops

from . import onebyte, quantised
from .geometry import LOG2E, Geometry, Scoring

ROWS = plgpu.Layout.WGMMA
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)
PER_ROW = plgpu.Layout.WGMMA.reduce(1)


def reduce_scratch(cols: int) -> int:
    """f32 elements of SMEM that one warpgroup needs to reduce a `[*, cols]` tile over its rows."""
    return 4 * 32 * 2 * (cols // 8)


def clear_rows(ref, live, interpret: bool, before=None):
    """Zero the rows of a tile in SMEM from `live` on and before `before`.

    64 x 64 at a time for want of registers.
    """
    rows = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=ROWS)
    for r in range(0, ref.shape[0], 64):
        for c in range(0, ref.shape[1], 64):
            part = ref.at[pl.ds(r, 64), pl.ds(c, 64)]
            x = part[...] if interpret else plgpu.load(part, layout=ROWS)
            kept = rows + r < live
            if before is not None:
                kept = kept & (rows + r >= before)
            part[...] = jnp.where(kept, x, jnp.zeros_like(x))


def row_layout(size: int):
    """One element per thread where there are 128 of them."""
    if size % 128 == 0:
        return plgpu.Layout.WG_STRIDED((size,), 1)
    return plgpu.Layout.WGMMA.reduce(1)


def _column_reduce(kind: str, x: jax.Array, scratch: Any) -> jax.Array:
    result = plgpu.ShapeDtypeStruct((x.shape[1],), jnp.dtype(jnp.float32), layout=PER_COLUMN)

    @plgpu.inline_mgpu(arg_types=(ROWS, plgpu.RefType()), return_type=result)
    def reduce(_, values, ref):
        return values.reduce(kind, 0, ref)

    return reduce(x, scratch)  # pyright: ignore[reportCallIssue]


class Segment(NamedTuple):
    """What the queries of a tile, and the row they belong to, say about scores and masks."""

    position: Any  # i32, of the tile's first token
    context: Any  # i32, keys of the row
    slopes: Any = None  # f32 [cols], ALiBi
    factor: Any = None  # f32 [cols] of the scores, in place of `Scoring.scale`
    first: Any = None  # i32, keys before it belong to another part of the call
    query_positions: Any = None  # i32 [cols], in place of position + token
    old: Any = None  # i32, first of the row's new keys, which `new_keys` describes
    new_keys: Any = None  # i32 [1 + words, L] in GMEM, see `explicit.pack_new_keys`


class TileRefs(NamedTuple):
    """One tile of keys and what works on it, in SMEM but for the scales."""

    q: Any  # [terms * cols, H]
    k: Any  # [tile, H]
    v: Any  # [tile, Hv]
    p: Any  # [cols, tile]
    scratch: Any  # of the reductions over the keys
    k_scale: Any = None  # f32 [tile] in registers, of pools with scales of tokens
    v_scale: Any = None


def row_parts(ref) -> list[Any]:
    """What goes to registers at once of a tile of one-byte values: whole swizzled rows."""
    size = 128 if ref.shape[1] % 128 == 0 else 64
    return [pl.ds(c, size) for c in range(0, ref.shape[1], size)]


def spread_rows(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A per-row vector over the columns of a tile."""
    return lax.broadcast_in_dim(x, shape, [0])


def spread(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A per-column vector over the rows of a tile."""
    return lax.broadcast_in_dim(x, shape, [1])


@dataclasses.dataclass(frozen=True)
class Columns:
    """The arithmetic of one warpgroup, the same on the GPU and in the interpreter."""

    ops: Ops
    geom: Geometry
    scoring: Scoring
    tile: int  # keys
    dtype: Any  # of q and the output
    narrow: Any = None  # dtype of pools of one byte a value

    @property
    def terms(self) -> int:
        """What queries and P are split into, one after another in the columns of q and p."""
        return 1 if self.narrow is None else quantised.num_terms(self.dtype, self.narrow)

    def max(self, x, scratch):
        """Maximum over the keys, `[tile, cols] -> [cols]`."""
        return x.max(axis=0) if self.ops.interpret else _column_reduce("max", x, scratch)

    def sum(self, x, scratch):
        """Sum over the keys, `[tile, cols] -> [cols]`."""
        return x.sum(axis=0) if self.ops.interpret else _column_reduce("add", x, scratch)

    def load(self, ref):
        """A tile or a per-column vector from GMEM."""
        if self.ops.interpret:
            return ref[...]
        layout = ROWS if len(ref.shape) == 2 else PER_COLUMN
        return plgpu.load(ref, layout=layout, optimized=False)

    def load_row(self, ref):
        """A vector of values `[Hv]` from GMEM, spread over the 128 threads."""
        if self.ops.interpret:
            return ref[...]
        return plgpu.load(ref, layout=row_layout(self.geom.value_dim), optimized=False)

    def zero_row(self):
        """Zeros to store as the output of one token and head."""
        zeros = jnp.zeros((self.geom.value_dim,), self.dtype)
        return plgpu.layout_cast(zeros, row_layout(self.geom.value_dim))

    def full(self, value: float):
        """A constant per-column vector."""
        return plgpu.layout_cast(jnp.full((self.geom.cols,), value, jnp.float32), PER_COLUMN)

    def start(self):
        """Running maximum `[cols]` and, kept per row until the end, the running sums."""
        sums = jnp.zeros((self.tile, self.geom.cols), jnp.float32)
        return self.full(MASKED), plgpu.layout_cast(sums, ROWS)

    def logits(self, s, first_key, seg: Segment, k_scale=None, shift=None):
        """Scores -> masked base-2 logits, `shift` [tile] added to each row of them."""
        scoring, shape = self.scoring, (self.tile, self.geom.cols)
        key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=ROWS) + first_key
        visible, behind = self.visible(key, first_key, seg)
        scale = scoring.scale
        if seg.factor is not None:
            s, scale = s * spread(seg.factor, shape), 1.0
        if k_scale is not None:
            s = s * spread_rows(k_scale, shape)
        if scoring.soft_cap is None:
            s = s * (scale * LOG2E)
        else:
            # tanh x = 1 - 2 / (1 + e^2x), by exp2: tanh.approx errs by 5e-4 of the cap
            e = jnp.exp2(jnp.minimum(s * (2 * LOG2E * scale / scoring.soft_cap), 80.0))
            s = (1.0 - 2.0 / (1.0 + e)) * (scoring.soft_cap * LOG2E)
        if seg.slopes is not None:
            distance = behind.astype(jnp.float32)
            if seg.query_positions is not None:
                distance = -jnp.abs(distance)  # a tree may place a visible key after its query
            s = s + spread(seg.slopes * LOG2E, shape) * distance
        if shift is not None:
            s = s + spread_rows(shift, shape)
        return jnp.where(visible, s, MASKED)

    def visible(self, key, first_key, seg: Segment):
        """(which keys are seen, distance key - query) of a tile `[tile, cols]`."""
        geom, window, shape = self.geom, self.scoring.window, key.shape
        if seg.query_positions is not None:
            return self.visible_explicitly(key, first_key, seg)
        if geom.q_tokens == 1:
            behind = key - seg.position  # <= 0 where visible
        else:
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=ROWS)
            behind = key - (seg.position + lax.div(column, jnp.int32(geom.group)))
        visible = behind <= 0
        if window is not None:
            visible = visible & (behind > -window)
        return visible, behind

    def visible_explicitly(self, key, first_key, seg: Segment):
        """As `visible`, where queries stand anywhere and bits say which new keys they see."""
        geom, window, shape = self.geom, self.scoring.window, key.shape
        begin = first_key - seg.old
        last = jnp.int32(seg.new_keys.shape[1] - self.tile)
        begin = lax.min(lax.max(begin, -jnp.int32(self.tile)) + self.tile, last)
        rows = lambda x: spread_rows(self.load_keys(seg.new_keys.at[x], begin), shape)
        behind = key + rows(0) - spread(seg.query_positions, shape)
        bits = rows(1)
        if geom.q_tokens > 1:  # one token has all columns, wherever its group lies
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=ROWS)
            token = lax.div(column, jnp.int32(geom.group))
            if geom.q_tokens > 32:
                bits = jnp.where(token < 32, bits, rows(2))
                token = jnp.where(token < 32, token, token - 32)
            bits = bits >> token
        visible = (bits & 1) == 1
        if window is not None:
            visible = visible & (behind > -window)
        if seg.first is not None:
            visible = visible & (key >= seg.first)
        return visible, behind

    def dead_keys(self, first_key, seg: Segment):
        """Of a tile's keys: (whether V has to be cleared, from which one on, before which one).

        What lies before the first block to read repeats it.  With a window that block holds dead
        slots only where it is the row's last too, so that the row ends in this tile: no other tile
        asks.  Where the first keys are read elsewhere their own slots are dead as well.
        """
        live, window = seg.context - first_key, self.scoring.window
        dead = live < self.tile
        if seg.first is not None:
            before = seg.first - first_key
            return dead | (before > 0), live, before
        if window is not None and seg.query_positions is None:
            return dead, live, seg.position - window + 1 - first_key
        return dead, live, None

    def load_keys(self, ref, begin):
        """`ref[begin : begin + tile]` from GMEM, one value per key."""
        ref = ref.at[pl.ds(begin, self.tile)]
        if self.ops.interpret:
            return ref[...]
        return plgpu.load(ref, layout=PER_ROW, optimized=False)

    def scores(self, q, k, meanwhile: Callable[[], Any] = lambda: None):
        """`K Q^T [tile, cols]`, issued and awaited, and what `meanwhile` gives in between."""
        ops, cols = self.ops, self.geom.cols
        dtype = jnp.int32 if k.dtype == quantised.INT8 else jnp.float32

        def product(acc):
            acc = ops.wgmma(acc, k, q.T)
            other = meanwhile()
            return ops.load(acc), other

        s, other = ops.with_acc(product, (self.tile, self.terms * cols), dtype=dtype)
        s = s.astype(jnp.float32)
        if self.terms == 1:
            return s, other
        parts = [s[:, j * cols : (j + 1) * cols] for j in range(self.terms)]
        total = parts.pop()
        while parts:
            total = parts.pop() + total * (1.0 / quantised.base(k.dtype))
        return total, other

    def split_queries(self, source, target, scratch):
        """Queries in GMEM -> their terms in SMEM; returns the factor `[cols]` of the scores."""
        if self.ops.interpret:
            q = source[...].T.astype(jnp.float32)
        else:
            q = onebyte.load_queries(source)
        factor, inverse = quantised.factor_of(self.max(jnp.maximum(q, -q), scratch), self.narrow)
        self.store_terms(q * spread(inverse, q.shape), target)
        plgpu.commit_smem()
        return factor * self.scoring.scale

    def store_terms(self, x, target):
        """`[rows, cols]` -> the terms of it, `[terms * cols, rows]`."""
        if self.ops.interpret:
            terms = onebyte.split(x, self.narrow, self.terms)
            target[...] = jnp.concatenate(terms, axis=1).T
        else:
            onebyte.store_terms(x, target, self.narrow, self.terms)

    def scales(self, refs: TileRefs):
        """(scale of each key, log2 of that of each value, its inverse), `[tile]` each or None."""
        if refs.k_scale is None:
            return None, None, None
        # also what a slot without a key may hold: NaN
        v = refs.v_scale
        v = jnp.where(v > quantised.SMALLEST, v, jnp.full_like(v, quantised.SMALLEST))
        return refs.k_scale, jnp.log2(v), 1.0 / v

    def with_output(self, f):
        """`f(O [Hv, cols])`, zeroed: an accumulator, or a value that loops carry."""
        shape = (self.geom.value_dim, self.geom.cols)
        if self.narrow is not None:
            return f(plgpu.layout_cast(jnp.zeros(shape, jnp.float32), ROWS))
        return self.ops.with_acc(f, shape)

    def carry(self, acc):
        """As `Ops.carry`."""
        return acc if self.narrow is not None else self.ops.carry(acc)

    def uncarry(self, acc, carried):
        """As `Ops.uncarry`."""
        return carried if self.narrow is not None else self.ops.uncarry(acc, carried)

    def output(self, acc):
        """The value of O once no wgmma is in flight."""
        return acc if self.narrow is not None else self.ops.load(acc)

    def step_narrow(self, o, m, sums, refs: TileRefs, first_key, seg: Segment, release):
        """As `step`, with P in terms of V's type; `release` when the tile may be overwritten.

        P is relative to the maximum of its tile, so that few bits are enough: what matters for the
        tile is not small in it.  With scales the maxima are those of s + log2(v_scale), so that
        P * v_scale = 2^(s + log2(v_scale) - m) stays within 0..1; the sums take 1 / v_scale back.
        """
        ops, dtype, cols = self.ops, self.narrow, self.geom.cols
        dead, live, before = self.dead_keys(first_key, seg)

        if dtype != quantised.INT8:

            @pl.when(dead)
            def _():
                _mgpu.clear_rows(refs.v, live, ops.interpret, before)
                plgpu.commit_smem()

        def meanwhile():
            return refs.v[...].T if ops.interpret else onebyte.load_transposed(refs.v)

        s, words = self.scores(refs.q, refs.k, meanwhile)
        k_scale, shift, inverse = self.scales(refs)
        s = self.logits(s, first_key, seg, k_scale, shift)
        top = self.max(s, refs.scratch)
        m_new = jnp.maximum(m, top)
        alpha, beta = jnp.exp2(m - m_new), jnp.exp2(top - m_new)
        p = jnp.exp2(s - spread(top, s.shape))
        weight = p if inverse is None else p * spread_rows(inverse, p.shape)
        sums = sums * spread(alpha, s.shape) + weight * spread(beta, s.shape)
        self.store_terms(p * onebyte.unit(dtype), refs.p)
        plgpu.commit_smem()
        release()
        if ops.interpret:
            wide = jnp.int32 if dtype == quantised.INT8 else jnp.float32
            of = jnp.dot(words.astype(wide), refs.p[...].T.astype(wide))
        else:
            of = onebyte.products(words, refs.p, dtype, self.terms * cols)
        of = onebyte.join(of, cols, dtype, self.terms)
        beta = beta * (1.0 / onebyte.unit(dtype))
        o = o * spread(alpha, o.shape) + of * spread(beta, o.shape)
        return o, m_new, sums

    def step(self, acc, m, sums, refs: TileRefs, first_key, seg: Segment):
        """One tile of keys: `(acc, m, sums)` after it."""
        ops, v = self.ops, refs.v
        s, _ = self.scores(refs.q, refs.k)
        s = self.logits(s, first_key, seg)
        dead, live, before = self.dead_keys(first_key, seg)
        pl.when(dead)(lambda: clear_rows(v, live, ops.interpret, before))
        m_new = jnp.maximum(m, self.max(s, refs.scratch))
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s - spread(m_new, s.shape))
        sums = sums * spread(alpha, s.shape) + p
        ops.store_transposed(refs.p, p.astype(self.dtype))
        plgpu.commit_smem()
        o = ops.load(acc)
        acc = ops.store(acc, o * spread(alpha, o.shape))
        acc = ops.wgmma(acc, v.T, refs.p.T)
        return acc, m_new, sums

    def finish(self, m, sums, o, scratch):
        """Normalised output and base-2 log-sum-exp; MASKED and zeros where no key was visible."""
        total = self.sum(sums, scratch)
        seen = m > MASKED / 2
        inverse = jnp.where(seen, 1.0 / total, 0.0)
        lse = jnp.where(seen, m + jnp.log2(total), MASKED)
        return o * spread(inverse, o.shape), lse

    def merge(self, m, w, o, lse2, o2):
        """Running `(m, w, o)`, o unnormalised over weights 2^(lse - m), with one more partial."""
        m_new = jnp.maximum(m, lse2)
        a, a2 = jnp.exp2(m - m_new), jnp.exp2(lse2 - m_new)
        return m_new, w * a + a2, o * spread(a, o.shape) + o2 * spread(a2, o.shape)

    def with_sinks(self, o, lse, sinks, gain=None):
        """The sink takes its share of the probability and gives no value (lse leaves it out).

        `gain` [cols] is the one scale of all values of a head.
        """
        if gain is not None:
            o = o * spread(gain, o.shape)
        if sinks is None:
            return o
        sink = sinks * LOG2E
        m = jnp.maximum(lse, sink)
        own = jnp.exp2(lse - m)
        return o * spread(own / (own + jnp.exp2(sink - m)), o.shape)
