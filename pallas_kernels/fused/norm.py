"""RMSNorm and LayerNorm in one read and one write of the rows, forward and backward.

A warpgroup holds a row in registers: it is read once, its statistics are two sums over the
warpgroup, and what is made of it is written.  With a residual the sum is made, stored and
normalised in the same pass.  The backward makes the statistics anew, which costs no memory traffic;
the gradients of scale and bias are sums over rows that every warpgroup keeps in registers, every
CTA adds up in SMEM and writes as one row, and the caller adds up.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import HOPPER_SMS, SMEM_BYTES, WARPGROUP, cdiv, interpret_params

from ._vectors import Vectors, checked_rows
from .config import NORM, NormConfig

LONGEST = 16_384  # bytes of a row, which waits in registers for its statistics
BUDGET = 128  # registers a thread for the rows and the sums of a backward, of 255 (in SMEM the sums
# of longer rows); of 64 where four warpgroups share an SM's


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
            mean, (squares,) = _moments(row_of, h, centred, scratch, i)
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
            scratch_types=[plgpu.SMEM((2, 1, 4), jnp.float32)],
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
    ctas = min(rows, HOPPER_SMS * config.backward_ctas)
    row_of = Row(width, Vectors.piece(h.dtype, interpret))
    sums = 2 if biased else 1
    # The most that compile without spills (`configs.py`), by the pieces of a row.
    most = {1: 8, 2: 6, 3: 5, 4: 5}.get(row_of.count, 4 - sums)
    team = config.backward_warpgroups or most
    size = row_of.count * row_of.tile.size
    if 4 * size * sums * team > SMEM_BYTES - 4096:
        raise NotImplementedError(f"no room for the sums of {team} warpgroups of {width}")
    registers = (sums * 4 + 2 * h.dtype.itemsize) * size // (4 * WARPGROUP)
    at_hand = registers <= BUDGET and registers * team < 2 * BUDGET

    def body(h_ref, scale_ref, dy_ref, *refs):
        dh_ref, refs = (refs[0], refs[1:]) if dh is not None else (None, refs)
        dx_ref, partial_ref, scratch_ref, sums_ref, barrier = refs
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        worker, scratch = cta * team + wg, scratch_ref.at[wg]
        mine = [sums_ref.at[wg, k] for k in range(sums)]

        stride, pieces = ctas * team, range(row_of.count)
        ahead = config.backward_prefetch
        refs = [h_ref, dy_ref, *([dh_ref] if ahead and dh_ref is not None else [])]
        read = lambda row: tuple(tuple(row_of.read(ref.at[row]).tiles) for ref in refs)

        def one(i, carry):
            found, tiles = carry
            row = worker + i * stride
            tiles = tiles if ahead else read(row)
            coming = read(lax.min(row + stride, jnp.int32(rows - 1))) if ahead else ()
            h, dy, *more = (Pieces(list(x)) for x in tiles)
            g = lambda j: dy[j] * row_of.load(scale_ref, j)
            mean, (squares, gh, *rest) = _moments(row_of, h, centred, scratch, i, g)
            r = lax.rsqrt(squares / width + eps)
            slope, offset = r * r * r * gh / width, (r * rest[0] / width if rest else None)
            # Rows wait for their sums in their own dtype: f32 would take twice the registers.
            h, dy, *more = (x.waiting() for x in (h, dy, *more))
            new = []
            for j in pieces:
                n = h[j] if mean is None else h[j] - mean
                dx = g(j) * r - n * slope
                dx = dx if offset is None else dx - offset
                if dh_ref is not None:
                    dx = dx + (more[0][j] if more else row_of.load(dh_ref.at[row], j))
                row_of.store(dx_ref.at[row], dx, j)
                own = (dy[j] * (n * r), dy[j])[:sums]
                if at_hand:
                    new.append(tuple(a + b for a, b in zip(found[j], own, strict=True)))
                else:
                    for ref, part in zip(mine, own, strict=True):
                        row_of.store(ref, row_of.load(ref, j) + part, j)
            return tuple(new), coming

        zero = ((row_of.tile.zeros(),) * sums,) * row_of.count
        if not at_hand:
            _keep(row_of, mine, zero)
        start = zero if at_hand else ()
        first = read(lax.min(worker, jnp.int32(rows - 1))) if ahead else ()
        count = _share(rows, stride, worker)
        found, _ = lax.fori_loop(0, count, one, (start, first))
        if at_hand:
            _keep(row_of, mine, found)
        _add_up(row_of, partial_ref.at[cta], sums_ref, barrier, wg)

    like = jax.ShapeDtypeStruct(h.shape, h.dtype)
    with jax.named_scope("norm_backward"):
        dx, partial = plgpu.kernel(
            body,
            out_type=(like, jax.ShapeDtypeStruct((ctas, sums, width), jnp.float32)),
            scratch_types=[
                plgpu.SMEM((team, 2, 3, 4), jnp.float32),
                plgpu.SMEM((team, sums, size), jnp.float32),
                plgpu.Barrier(num_arrivals=team),
            ],
            grid=(ctas,),
            grid_names=("cta",),
            num_threads=team,
            thread_name="wg",
            interpret=interpret_params(interpret),
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(h, scale, dy, *(() if dh is None else (dh,)))
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

    def load(self, ref, j: int):
        """Piece j in f32."""
        return self.tile.load(ref, j * self.tile.size)

    def store(self, ref, value, j: int) -> None:
        """Piece j."""
        self.tile.store(ref, value, j * self.tile.size)

    def totals(self, *rows, scratch, at: Any) -> list[Any]:
        """Of some lists of pieces; what lies behind the end of a row must be zero."""
        tiles = [functools.reduce(jnp.add, parts) for parts in rows]
        return self.tile.totals(tiles, scratch, at)

    def masked(self, part, j: int):
        """Piece j with zeros behind the end of the row."""
        inside = self.width - j * self.tile.size
        if inside >= self.tile.size:
            return part
        return jnp.where(self.tile.indices() < inside, part, jnp.zeros_like(part))


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


def _moments(row_of: Row, h: Pieces, centred: bool, scratch, i, g=None):
    """`(mean or None, [sum (h - mean)^2])`, and of a backward `sum g (h - mean)`, `sum g`."""
    pieces, mean, at = range(row_of.count), None, i & 1
    if centred:
        (total,) = row_of.totals([h[j] for j in pieces], scratch=scratch, at=0)
        mean, at = total / row_of.width, 1
    n = [h[j] if mean is None else row_of.masked(h[j] - mean, j) for j in pieces]
    rows = [[part * part for part in n]]
    if g is not None:
        slopes = [g(j) for j in pieces]
        rows.append([a * b for a, b in zip(slopes, n, strict=True)])
        rows += [slopes] if centred else []
    return mean, row_of.totals(*rows, scratch=scratch, at=at)


def _keep(row_of: Row, refs, parts) -> None:
    """The sums `parts[piece][k]` into refs[k]."""
    for j, own in enumerate(parts):
        for ref, part in zip(refs, own, strict=True):
            row_of.store(ref, part, j)


def _add_up(row_of: Row, out_ref, sums_ref, barrier, wg) -> None:
    """The sums of a CTA's warpgroups, in their order, by the first of them."""
    team, sums, _ = sums_ref.shape
    plgpu.barrier_arrive(barrier)
    plgpu.barrier_wait(barrier)

    @pl.when(wg == 0)
    def _():
        for k in range(sums):
            for j in range(row_of.count):
                parts = [row_of.load(sums_ref.at[other, k], j) for other in range(team)]
                row_of.store(out_ref.at[k], functools.reduce(jnp.add, parts), j)


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
