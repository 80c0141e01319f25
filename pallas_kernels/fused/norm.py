"""RMSNorm and LayerNorm in one read and one write of the rows, forward and backward.

A warpgroup holds a row in registers: it is read once, its statistics are sums over the warpgroup
that meet in one barrier, and what is made of it is written.  With a residual the sum is made,
stored and normalised in the same pass.  The backward makes the statistics anew, which costs no
memory traffic; its warpgroups fetch their next rows into shared memory while they work.  The
gradients of scale and bias are sums over rows that every warpgroup keeps in registers, every CTA
adds up in SMEM and writes as one row, and the caller adds up.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels import _mgpu
from pallas_kernels._mgpu import (
    HOPPER_SMS,
    SMEM_BYTES,
    cdiv,
    interpret_params,
    rem,
)

from ._vectors import Vectors, checked_rows
from .config import NORM, NormConfig

LONGEST = 16_384  # bytes of a row, which waits in registers for its statistics
# (pieces of a row, warpgroups of a CTA, rows in flight for each) of the backward: the first entry
# with as many pieces as a row has, the fastest on an H200.  No registers spill (`configs.py`).
TEAMS = ((1, 6, 2), (2, 4, 2), (4, 3, 2), (16, 2, 1))


def norm(
    x: jax.Array,
    scale: jax.Array,
    bias: jax.Array | None = None,
    residual: jax.Array | None = None,
    *,
    eps: float,
    centred: bool,
    config: NormConfig = NORM,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array | None]:
    """`y = (h - mean(h)) / sqrt(var(h) + eps) * scale + bias` of `h = x + residual`.

    Args:
      x: `[rows, D]` bf16, f16 or f32; D a multiple of 8.
      scale: `[D]`.
      bias: `[D]`, or None.
      residual: as x, or None: h is x.
      eps: added to the variance.
      centred: False leaves out the mean: RMSNorm.
      config: how the rows are shared out.
      interpret: True runs the GPU interpreter.

    Returns:
      `(y, h)` in x's dtype, h None without a residual; y is of the rounded h.

    Raises:
      NotImplementedError: what this kernel cannot do.

    References:
      Ba, Kiros & Hinton, Layer Normalization, 2016; Zhang & Sennrich, Root Mean Square Layer
      Normalization, 2019.

    >>> x, scale = jnp.ones((4, 64), jnp.bfloat16), jnp.ones(64)
    >>> y, h = jax.eval_shape(functools.partial(norm, eps=1e-6, centred=False), x, scale)
    >>> y.shape, h
    ((4, 64), None)
    """
    _check(x, scale, bias, residual=residual)
    rows, width = x.shape
    ctas = min(rows, HOPPER_SMS * config.ctas) if config.ctas else rows
    row_of = Row(width, Vectors.piece(x.dtype, interpret))
    names = [name for name, a in (("residual", residual), ("bias", bias)) if a is not None]

    def body(x_ref, scale_ref, *refs):
        given = dict(zip([*names, "y", "h"], refs, strict=False))
        scratch, cta = refs[-1], lax.axis_index("cta")

        @pl.loop(0, _share(rows, ctas, cta))
        def _(i):
            row = cta + i * ctas
            h = row_of.read(x_ref.at[row])
            if residual is not None:
                other = row_of.read(given["residual"].at[row])
                added = (h[j] + other[j] for j in range(row_of.count))
                h = row_of.written(given["h"].at[row], added)
            pivot = None
            if centred:
                pivot = row_of.tile.beginning(x_ref.at[row])
                if residual is not None:
                    pivot = pivot + row_of.tile.beginning(given["residual"].at[row])
            mean, squares = _moments(row_of, h.__getitem__, None, pivot, scratch, i & 1)
            r = lax.rsqrt(squares / width + eps)
            h = h.waiting()
            for j in range(row_of.count):
                y = (h[j] if mean is None else h[j] - mean) * r * row_of.load(scale_ref, j)
                y = y + row_of.load(given["bias"], j) if "bias" in names else y
                row_of.store(given["y"].at[row], y, j)

    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    with jax.named_scope("norm"):
        out = plgpu.kernel(
            body,
            out_type=(like,) if residual is None else (like, like),
            scratch_types=[plgpu.SMEM((2, 2, 4), jnp.float32)],
            grid=(ctas,),
            grid_names=("cta",),
            interpret=interpret_params(interpret),
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(x, scale, *(a for a in (residual, bias) if a is not None))
    return out[0], None if residual is None else out[1]


def norm_backward(
    h: jax.Array,
    scale: jax.Array,
    dy: jax.Array,
    dh: jax.Array | None = None,
    *,
    eps: float,
    centred: bool,
    biased: bool = False,
    config: NormConfig = NORM,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """The gradient of `norm`: with n the normalised h, r its factor and g = dy * scale,

        dx = r * (g - mean(g) - n * mean(g * n)) + dh,  dscale = sum(dy * n),  dbias = sum(dy).

    Args:
      h: `[rows, D]`, what was normalised (x, or the sum).
      scale: `[D]`.
      dy: `[rows, D]`, the cotangent of y.
      dh: `[rows, D]`, the cotangent of h where that is an output.
      eps, centred, config, interpret: of `norm`.
      biased: whether dbias is wanted.

    Returns:
      `(dx in h's dtype, dscale f32 [D], dbias f32 [D] or None)`; dx is the residual's too.

    Raises:
      NotImplementedError: what this kernel cannot do.

    >>> x, scale = jnp.ones((4, 64), jnp.bfloat16), jnp.ones(64)
    >>> f = functools.partial(norm_backward, eps=1e-6, centred=False)
    >>> [a.shape for a in jax.eval_shape(f, x, scale, x)[:2]]
    [(4, 64), (64,)]
    """
    _check(h, scale, None, dy=dy, dh=dh)
    rows, width = h.shape
    ctas, sums = min(rows, HOPPER_SMS), 2 if biased else 1
    row_of = Row(width, Vectors.piece(h.dtype, interpret))
    size, inputs = row_of.count * row_of.tile.size, 2 if dh is None else 3
    team, stages = next((t, n) for pieces, t, n in TEAMS if row_of.count <= pieces)
    team, stages = config.backward_warpgroups or team, config.backward_stages or stages
    if 4 * size + team * (stages * inputs * width * h.dtype.itemsize + 256) > SMEM_BYTES - 1024:
        raise NotImplementedError(f"no room for {team} x {stages} x {inputs} rows of {width}")
    opaque = _mgpu.Ops(row_of.tile.interpret).opaque

    def body(*refs):
        rows_of, (scale_ref, dx_ref, partial_ref, *refs) = refs[:inputs], refs[inputs:]
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        scratch, ring, landed, sums_ref, turns = refs[0].at[wg], *refs[1:]
        worker, stride = wg * ctas + cta, ctas * team
        count = _share(rows, stride, worker)

        def fetch(i):
            """Row i of this warpgroup on its way to shared memory."""
            slot, mode = rem(i, stages), plgpu.OOBFillMode.PROMISE_IN_BOUNDS
            for k, ref in enumerate(rows_of):
                source, target = ref.at[worker + i * stride], ring.at[wg, slot, k]
                plgpu.copy_gmem_to_smem(source, target, landed.at[wg, slot], oob_mode=mode)

        def one(i, found):
            row = worker + i * stride
            plgpu.barrier_wait(landed.at[wg, rem(i, stages)])
            h_ref, dy_ref, *dh_ref = (ring.at[wg, rem(i, stages), k] for k in range(inputs))
            h = lambda j: row_of.load(h_ref, j)
            dy = lambda j: row_of.load(dy_ref, j)
            apart = functools.partial(_apart, opaque(row) >= 0)
            pivot = row_of.tile.beginning(h_ref) if centred else None
            g = lambda j: dy(j) * scale[j]
            mean, squares, crossed, *rest = _moments(row_of, h, g, pivot, scratch, i & 1, apart)
            r = lax.rsqrt(squares / width + eps)
            pull = -r * r * r * crossed / width
            offset = -r * rest[0] / width if rest else None

            def piece(j, sums):  # read again: there are not the registers to keep it
                e, d = h(j), dy(j)
                e, scaled = e if mean is None else e - mean, d * r
                other = row_of.load(dh_ref[0], j) if dh_ref else None
                parts = [part for part in (other, offset) if part is not None]
                dx = scaled * scale[j]
                dx = dx + functools.reduce(jnp.add, parts) if parts else dx
                row_of.store(dx_ref.at[row], dx + e * pull, j)
                return tuple(map(jnp.add, sums, (scaled * e, d)))

            new = [apart(functools.partial(piece, j), sums) for j, sums in enumerate(found)]
            plgpu.commit_smem()  # all have read it before it is written anew
            pl.when(i + stages < count)(lambda: fetch(i + stages))
            return tuple(new)

        for i in range(stages):
            pl.when(i < count)(lambda i=i: fetch(jnp.int32(i)))
        scale = [row_of.load(scale_ref, j) for j in range(row_of.count)]
        zero = ((row_of.tile.zeros(),) * sums,) * row_of.count
        found = lax.fori_loop(0, count, one, zero)
        _add_up(row_of, partial_ref.at[cta], found, sums_ref, turns, wg, team)

    like = jax.ShapeDtypeStruct(h.shape, h.dtype)
    with jax.named_scope("norm_backward"):
        dx, partial = _mgpu.kernel(
            body,
            out_type=(like, jax.ShapeDtypeStruct((ctas, sums, width), jnp.float32)),
            scratch_types=[
                plgpu.SMEM((team, 2, 4, 4), jnp.float32),
                plgpu.SMEM((team, stages, inputs, width), h.dtype),
                plgpu.Barrier(num_arrivals=inputs, num_barriers=(team, stages)),
                plgpu.SMEM((size,), jnp.float32),
                plgpu.Barrier(num_barriers=team),
            ],
            grid=(ctas,),
            grid_names=("cta",),
            num_warpgroups=team,
            interpret=interpret,
        )(h, dy, *(() if dh is None else (dh,)), scale)
        total = jnp.sum(partial, axis=0)
    return dx, total[0], total[1] if biased else None


def _share(rows: int, workers: int, worker):
    """How many of the rows `worker, worker + workers, ...` there are."""
    return lax.div(rows - 1 - worker + workers, jnp.int32(workers))


@dataclasses.dataclass(frozen=True)
class Row:
    """A row in pieces of one vector a thread: what is done piece by piece needs few registers at a
    time, however long the row.
    """

    width: int
    tile: Vectors

    @property
    def count(self) -> int:
        """Of pieces."""
        return cdiv(self.width, self.tile.size)

    def read(self, ref):
        """The row at ref."""
        return Pieces([self.tile.raw(ref, j * self.tile.size) for j in range(self.count)])

    def written(self, ref, values):
        """The row of these f32 pieces once it is stored at ref."""
        kept = []
        for j, value in enumerate(values):
            kept.append(value.astype(ref.dtype))
            self.store(ref, kept[-1], j)
        return Pieces(kept)

    def load(self, ref, j):
        """Piece j (an int, or an i32 scalar) in f32, zero behind the end."""
        return self.tile.load(ref, j * self.tile.size, inside=self.width % self.tile.size == 0)

    def masked(self, part, j):
        """Piece j with zeros behind the end."""
        if self.width % self.tile.size == 0:
            return part
        inside = self.tile.indices() < self.width - j * self.tile.size
        return jnp.where(inside, part, jnp.zeros_like(part))

    def store(self, ref, value, j: int) -> None:
        """Piece j."""
        self.tile.store(ref, value, j * self.tile.size)


@dataclasses.dataclass(frozen=True)
class Pieces:
    """A row in registers, in its own dtype."""

    tiles: list[Any]

    def __getitem__(self, j: int):
        """Piece j in f32."""
        return self.tiles[j].astype(jnp.float32)

    def waiting(self):
        """The same for a later pass: not kept in f32 meanwhile, in twice the registers."""
        return Pieces(list(lax.optimization_barrier(tuple(self.tiles))))


def _apart(always, f, carry):
    """`f(carry)` behind a branch: unrolled, all that memory holds would be read ahead of it, into
    registers that there are not.
    """
    return lax.cond(always, f, lambda carry: carry, carry)


def _moments(row_of: Row, h, g, pivot, scratch, half, apart=None):
    """`(mean or None, sum (h - mean)^2)`, and of a backward `sum g (h - mean)` and `sum g`.

    h(j) and g(j) are pieces in f32, zero behind the end; pivot None leaves out the mean.  All sums
    meet in one barrier: they are about the pivot, any number near the mean, and are moved to the
    mean afterwards.  With the mean of k elements for a pivot no more cancels than a factor of
    width / k of the variance, whatever the row holds, and next to nothing in most rows.
    """
    tile, width, count = row_of.tile, row_of.width, row_of.count

    def piece(j, sums):
        d = h(j) if pivot is None else row_of.masked(h(j) - pivot, j)
        parts = [d * d] if pivot is None else [d * d, d]
        if g is not None:
            slope = g(j)
            parts += [slope * d] if pivot is None else [slope * d, slope]
        return [tile.folded(part, onto) for part, onto in zip(parts, sums, strict=True)]

    sums = [tile.folded(tile.zeros())] * ((1 if pivot is None else 2) * (1 if g is None else 2))
    for j in range(count):
        sums = apart(functools.partial(piece, j), sums) if apart else piece(j, sums)
    found = tile.totals(sums, scratch, half)
    if pivot is None:
        return None, *found
    squares, firsts, *others = found
    shift = firsts / width
    squares = squares - firsts * shift
    return pivot + shift, squares, *([others[0] - shift * others[1], others[1]] if others else [])


def _add_up(row_of: Row, out_ref, found, shared, turns, wg, team: int) -> None:
    """The sums of a CTA's warpgroups, in their order: each adds its own to those before it."""
    load = lambda j: row_of.load(shared, j)
    last, pieces = team - 1, range(row_of.count)
    for k in range(len(found[0])):
        own = [parts[k] for parts in found]

        @pl.when(wg < last)
        def _(k=k, own=own):
            @pl.when(wg == 0)
            def _():
                if k:
                    plgpu.barrier_wait(turns.at[last])
                for j in pieces:
                    row_of.store(shared, own[j], j)

            @pl.when(wg > 0)
            def _():
                plgpu.barrier_wait(turns.at[wg - 1])
                for j in pieces:
                    row_of.store(shared, load(j) + own[j], j)

            plgpu.barrier_arrive(turns.at[wg])

        @pl.when(wg == last)
        def _(k=k, own=own):
            if last:
                plgpu.barrier_wait(turns.at[last - 1])
            for j in pieces:
                row_of.store(out_ref.at[k], load(j) + own[j] if last else own[j], j)
            if last and k + 1 < len(found[0]):
                plgpu.barrier_arrive(turns.at[last])


def _check(x, scale, bias, **others) -> None:
    """What the shapes and dtypes have to be."""
    checked_rows(x=x)
    if x.ndim != 2 or x.shape[1] * x.dtype.itemsize > LONGEST:
        raise NotImplementedError(f"{x.shape=}: takes [rows, D] of rows up to {LONGEST} bytes")
    for name, vector in (("scale", scale), ("bias", bias)):
        if vector is not None and vector.shape != x.shape[1:]:
            raise ValueError(f"{name} of {vector.shape} is not {x.shape[1:]}")
        if vector is not None:
            checked_rows(**{name: vector})
    for name, other in others.items():
        if other is not None and (other.shape, other.dtype) != (x.shape, x.dtype):
            raise ValueError(f"{name} is {other.shape} {other.dtype}, not {x.shape} {x.dtype}")
