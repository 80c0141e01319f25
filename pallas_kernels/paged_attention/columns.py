"""Keys as rows, queries as columns: one tile of keys against one packed query tile.

A decode has few queries and many keys, so the operands of attention change places: `S^T = K Q^T`
has 64 keys as wgmma's M and 8 to 64 query columns as its N, and `O^T += V^T P^T`.  The running
maximum is a vector over the columns: a reduction over the four warps of a warpgroup.

That reduction goes through shared memory.  Mosaic reserves one scratch for it per CTA, at the same
address for every warpgroup, so two warpgroups of a CTA that reduce at the same time read each
other's values.  `_column_reduce` takes the scratch as an argument: each warpgroup brings its own.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import MASKED, Ops

from .geometry import LOG2E, Geometry, Scoring

ROWS = plgpu.Layout.WGMMA
PER_COLUMN = plgpu.Layout.WGMMA.reduce(0)


def reduce_scratch(cols: int) -> int:
    """f32 elements of SMEM that one warpgroup needs to reduce a `[*, cols]` tile over its rows."""
    return 4 * 32 * 2 * (cols // 8)


def clear_rows(ref, live, interpret: bool):
    """Zero the rows of a tile in SMEM from `live` on, 64 x 64 at a time for want of registers."""
    rows = plgpu.broadcasted_iota(jnp.int32, (64, 64), 0, layout=ROWS)
    for r in range(0, ref.shape[0], 64):
        for c in range(0, ref.shape[1], 64):
            part = ref.at[pl.ds(r, 64), pl.ds(c, 64)]
            x = part[...] if interpret else plgpu.load(part, layout=ROWS)
            part[...] = jnp.where(rows + r < live, x, jnp.zeros_like(x))


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
    dtype: Any

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

    def logits(self, s, first_key, position, slopes):
        """Scores -> masked base-2 logits; `position` is that of the tile's first query token."""
        geom, scoring, shape = self.geom, self.scoring, (self.tile, self.geom.cols)
        key = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=ROWS) + first_key
        if geom.q_tokens == 1:
            behind = key - position  # <= 0 where visible
        else:
            column = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=ROWS)
            behind = key - (position + lax.div(column, jnp.int32(geom.group)))
        if scoring.soft_cap is None:
            s = s * (scoring.scale * LOG2E)
        else:
            # tanh x = 1 - 2 / (1 + e^2x), by exp2: tanh.approx errs by 5e-4 of the cap
            e = jnp.exp2(jnp.minimum(s * (2 * LOG2E * scoring.scale / scoring.soft_cap), 80.0))
            s = (1.0 - 2.0 / (1.0 + e)) * (scoring.soft_cap * LOG2E)
        if slopes is not None:
            s = s + spread(slopes * LOG2E, shape) * behind.astype(jnp.float32)
        visible = behind <= 0
        if scoring.window is not None:
            visible = visible & (behind > -scoring.window)
        return jnp.where(visible, s, MASKED)

    def clear_dead_rows(self, v_s, live):
        """Zero the rows of V from `live` on: they may hold NaN, and 0 * NaN is NaN."""
        clear_rows(v_s, live, self.ops.interpret)

    def step(self, acc, m, sums, refs, first_key, position, context, slopes):
        """One tile of keys: `(acc, m, sums)` after it.

        `refs`: q, k, v, p and the scratch of the reduction, in SMEM.
        """
        ops, geom = self.ops, self.geom
        q_s, k_s, v_s, p_s, scratch = refs
        s = ops.with_acc(lambda a: ops.load(ops.wgmma(a, k_s, q_s.T)), (self.tile, geom.cols))
        s = self.logits(s, first_key, position, slopes)
        live = context - first_key
        pl.when(live < self.tile)(lambda: self.clear_dead_rows(v_s, live))
        m_new = jnp.maximum(m, self.max(s, scratch))
        alpha = jnp.exp2(m - m_new)
        p = jnp.exp2(s - spread(m_new, s.shape))
        sums = sums * spread(alpha, s.shape) + p
        ops.store_transposed(p_s, p.astype(self.dtype))
        plgpu.commit_smem()
        o = ops.load(acc)
        acc = ops.store(acc, o * spread(alpha, o.shape))
        acc = ops.wgmma(acc, v_s.T, p_s.T)
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

    def with_sinks(self, o, lse, sinks):
        """The sink takes its share of the probability and gives no value (lse leaves it out)."""
        if sinks is None:
            return o
        sink = sinks * LOG2E
        m = jnp.maximum(lse, sink)
        own = jnp.exp2(lse - m)
        return o * spread(own / (own + jnp.exp2(sink - m)), o.shape)
