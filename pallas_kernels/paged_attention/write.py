"""New keys and values into their slots of the block pools, in place, in one launch.

A CTA takes 64 rows, a row being one head of one token: they come by TMA, are rotated and quantised
in registers where that is asked for, and go out with one TMA box per token, all heads of it at
once.  K, V and (to be rotated) Q are the parts of one grid.
"""

import dataclasses
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import (
    Ops,
    cdiv,
    div,
    in_place,
    interpret_params,
    rem,
    swizzled,
    taken,
)

from . import quantised

ROWS = 64  # of a CTA: wgmma's register layout
TILE, PER_ROW = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1)
MAGIC = 1.5 * 2.0**23  # adding it to |x| < 2^22 rounds x to the nearest even integer


class Written(NamedTuple):
    """What `write_kv` gives back; None for what the call lacks."""

    k_pool: jax.Array
    v_pool: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None
    q: jax.Array | None = None


def write_kv(
    k_pool: jax.Array,
    v_pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    q: jax.Array | None = None,
    cos: jax.Array | None = None,
    sin: jax.Array | None = None,
    interpret: Any = None,
) -> Written:
    """Write token t's key and value into slot `slots[t]` = block * block_size + offset, on Hopper.

    Donate the pools and the write is in place.  With `cos` and `sin` keys (and `q`) are rotated
    first, feature i with feature i + H/2.

    Args:
      k_pool: `[P, K, block_size, H]` in k's dtype, or int8 or float8_e4m3fn with scales.
      v_pool: `[P, K, block_size, Hv]`.
      k: bf16 or f16 `[T, K, H]`.
      v: `[T, K, Hv]`.
      slots: i32 `[T]`, distinct; -1 writes nothing.
      k_scale: f32 `[P, K, block_size]`, written beside the values: the largest magnitude of a token
        and head over the largest one stored.  Or `[K]`, fixed.
      v_scale: as k_scale.
      q: `[T, N, H]`.
      cos: f32 `[T, H / 2]`.
      sin: f32 `[T, H / 2]`.
      interpret: True runs the GPU interpreter.

    Raises:
      ValueError: arguments that do not fit each other.
      NotImplementedError: what this kernel cannot do.

    >>> pool = jnp.zeros((3, 8, 16, 64), jnp.bfloat16)
    >>> x, slots = jnp.ones((8, 8, 64), jnp.bfloat16), jnp.arange(8)
    >>> jax.eval_shape(write_kv, pool, pool, x, x, slots).k_pool.shape
    (3, 8, 16, 64)
    """
    rotate = cos is not None
    _check(k_pool, v_pool, k, v, slots, k_scale, v_scale, q, cos, sin)
    block_size, heads = k_pool.shape[2], k_pool.shape[1]
    parts = [
        _Part("k", k.shape[1:], k_pool.dtype, rotate, heads),
        _Part("v", v.shape[1:], v_pool.dtype, False, heads),
    ]
    values = dict(k=k, v=v)
    if q is not None:
        parts.append(_Part("q", q.shape[1:], q.dtype, True, 0))
    scaled = k_scale is not None and k_scale.ndim == 3
    inputs = {name: _padded(x, max(x.shape[0] * heads, ROWS)) for name, x in values.items()}
    if q is not None:  # its tiles go out whole and may not overlap
        inputs["q"] = _padded(q, ROWS * cdiv(q.shape[0] * q.shape[1], ROWS))
    inputs["slots"] = slots.astype(jnp.int32)
    if cos is not None and sin is not None:
        inputs |= dict(cos=cos.astype(jnp.float32), sin=sin.astype(jnp.float32))
    if k_scale is not None and v_scale is not None and not scaled:
        inputs |= dict(k_fixed=k_scale.astype(jnp.float32), v_fixed=v_scale.astype(jnp.float32))
    targets: dict[str, Any] = dict(k_pool=k_pool, v_pool=v_pool)
    if scaled:
        targets |= dict(k_scale=k_scale, v_scale=v_scale)
    if q is not None:
        targets["q_out"] = jnp.empty_like(inputs["q"])
    call = _Write(tuple(parts), k.shape[0], block_size, scaled, k.dtype, bool(interpret))
    with jax.named_scope("write_kv"):
        state = {name: in_place(x) for name, x in targets.items()}
        names = (*inputs, *targets)

        def body(*refs):
            call.body(dict(zip(names, refs, strict=False)), refs[len(names) :])

        plgpu.kernel(
            body,
            out_type=(),
            scratch_types=call.scratch(),
            grid=(sum(call.tiles(part) for part in parts),),
            grid_names=("cta",),
            interpret=interpret_params(interpret),
            compiler_params=plgpu.CompilerParams(),
        )(*inputs.values(), *state.values())
        out = {name: taken(ref) for name, ref in state.items()}
    if q is not None:
        out["q"] = out.pop("q_out")[: q.shape[0] * q.shape[1]].reshape(q.shape)
    return Written(**out)


def _padded(x: jax.Array, rows: int) -> jax.Array:
    """`x [T, N, H]` as `[rows, H]`, zeros behind."""
    x = x.reshape(-1, x.shape[-1])
    return jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))


def _check(k_pool, v_pool, k, v, slots, k_scale, v_scale, q, cos, sin) -> None:
    """What the shapes and dtypes have to be."""
    p, heads, size, _ = k_pool.shape
    if v_pool.shape[:3] != (p, heads, size) or slots.shape != k.shape[:1]:
        raise ValueError(f"{k_pool.shape=}, {v_pool.shape=}, {k.shape=}, {slots.shape=} do not fit")
    for name, pool, x in (("k", k_pool, k), ("v", v_pool, v)):
        if x.shape != (*slots.shape, heads, pool.shape[3]):
            raise ValueError(f"{name} of {x.shape} does not fit {pool.shape} and {slots.shape}")
        if heads * pool.shape[3] * pool.dtype.itemsize % 128:
            raise NotImplementedError(f"a token of {heads} x {pool.shape[3]} {pool.dtype} values")
    if (cos is None) != (sin is None) or (q is not None and cos is None):
        raise ValueError("q is given to be rotated, by cos and sin")
    if cos is not None and cos.shape != (k.shape[0], k.shape[2] // 2):
        raise ValueError(f"{cos.shape=} is not ({k.shape[0]}, {k.shape[2] // 2})")
    narrow = quantised.is_quantised(k_pool.dtype)
    if narrow != (k_scale is not None) or narrow != (v_scale is not None):
        raise ValueError(f"scales go with int8 and float8_e4m3fn, not {k_pool.dtype=}")
    if k_scale is not None and k_scale.ndim != v_scale.ndim:
        raise NotImplementedError(f"scales of two kinds: {k_scale.shape=}, {v_scale.shape=}")
    if k.dtype not in (jnp.bfloat16, jnp.float16) or v.dtype != k.dtype:
        raise NotImplementedError(f"{k.dtype=}, {v.dtype=} are not bfloat16 or float16")
    if q is not None and (q.dtype != k.dtype or q.shape[2] != k.shape[2]):
        raise ValueError(f"{q.shape=}, {q.dtype=} do not fit {k.shape=}, {k.dtype=}")
    if k_pool.dtype != v_pool.dtype or not (narrow or k_pool.dtype == k.dtype):
        raise NotImplementedError(f"{k.dtype=} into {k_pool.dtype=} and {v_pool.dtype=}")
    if any(x % 64 for x in (k.shape[2], v.shape[2])):
        raise NotImplementedError(f"{k.shape=}, {v.shape=}: heads are no multiples of 64")
    if ROWS % heads or (q is not None and q.shape[1] > 256) or k.shape[0] == 0:
        raise NotImplementedError(f"{k.shape=}: {ROWS} rows are no multiple of the heads")


@dataclasses.dataclass(frozen=True)
class _Part:
    """Q, K or V: rows of a flat array and where they go."""

    name: str
    shape: tuple[int, ...]  # heads, features
    dtype: Any  # stored
    rotate: bool
    pool_heads: int  # 0: back to an array of the same shape

    @property
    def heads(self) -> int:
        """Rows of a token."""
        return self.shape[0]

    @property
    def features(self) -> int:
        """Of a row."""
        return self.shape[1]

    def transforms(self, dtype: Any) -> tuple[Any, ...]:
        """Of tiles in SMEM, so that halves of rows and whole tokens are whole pieces of them.

        Fewer than 8 heads make up no swizzled piece: their tiles lie plain.
        """
        if self.heads % 8:
            return ()
        half = self.features // 2 * jnp.dtype(dtype).itemsize
        return swizzled(dtype, next(s for s in (128, 64, 32) if half % s == 0))


@dataclasses.dataclass(frozen=True)
class _Write:
    """The kernel body; static facts only."""

    parts: tuple[_Part, ...]
    tokens: int
    block_size: int
    scaled: bool
    dtype: Any  # of what comes
    interpret: bool

    def rows(self, part: _Part) -> int:
        """Of the part's flat array."""
        rows = max(self.tokens * part.heads, ROWS)
        return rows if part.pool_heads else ROWS * cdiv(rows, ROWS)

    def tiles(self, part: _Part) -> int:
        """CTAs of a part."""
        return cdiv(self.rows(part), ROWS)

    def tiles_of(self, part: _Part) -> list[tuple[Any, ...]]:
        """(shape, dtype, transforms) of a tile as it comes and, where that differs, as it goes."""
        changed = part.rotate or quantised.is_quantised(part.dtype)
        kinds = (self.dtype, part.dtype) if changed else (self.dtype,)
        return [
            ((ROWS, part.features), kind, part.transforms(kind), i) for i, kind in enumerate(kinds)
        ]

    @property
    def all_tiles(self) -> list[tuple[Any, ...]]:
        """Those of all parts: a CTA has one part, and the less it takes the more fit an SM."""
        return list(dict.fromkeys(tile for part in self.parts for tile in self.tiles_of(part)))

    def scratch(self) -> tuple[Any, ...]:
        """A barrier, and the tiles."""
        tiles = [plgpu.SMEM(shape, x, transforms=t) for shape, x, t, _ in self.all_tiles]
        return (plgpu.Barrier(), *tiles)

    def body(self, refs: dict[str, Any], scratch):
        full, *tiles = scratch
        tiles = dict(zip(self.all_tiles, tiles, strict=True))
        cta, begin = lax.axis_index("cta"), 0
        for part in self.parts:
            count = self.tiles(part)
            mine = (cta >= begin) & (cta < begin + count)

            @pl.when(mine)
            def _(part=part, begin=begin):
                smem = [tiles[x] for x in self.tiles_of(part)]
                # the last tile begins inside the one before it, and writes from `own` on
                own = (cta - begin) * ROWS
                row = lax.min(own, jnp.int32(self.rows(part) - ROWS))
                plgpu.copy_gmem_to_smem(refs[part.name].at[pl.ds(row, ROWS)], smem[0], full)
                plgpu.barrier_wait(full)
                if len(smem) > 1:
                    self.transform(part, refs, (row, own), *smem)
                    plgpu.commit_smem()
                self.put(part, refs, (row, own), smem[-1])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            begin += count

    def transform(self, part: _Part, refs, rows, source, target) -> None:
        """Rotate and quantise the tile of `rows`: its first, and the first not written before."""
        row, _ = rows
        half = part.features // 2
        parts = [pl.ds(0, half), pl.ds(half, half)]
        x = [self.load(source.at[:, at]).astype(jnp.float32) for at in parts]
        if part.rotate:
            cos, sin = (self.by_token(refs[n], row, part.heads, half) for n in ("cos", "sin"))
            x = [x[0] * cos - x[1] * sin, x[1] * cos + x[0] * sin]
            # what an unfused call would have stored in between
            x = [y.astype(source.dtype).astype(jnp.float32) for y in x]
        if quantised.is_quantised(part.dtype):
            x = self.quantise(part, refs, rows, x)
        for at, y in zip(parts, x, strict=True):
            self.store(target.at[:, at], y.astype(part.dtype))

    def quantise(self, part: _Part, refs, rows, x):
        """The stored values in f32, not yet rounded to fp8; writes the scales."""
        top = 127.0 if part.dtype == quantised.INT8 else 448.0
        if self.scaled:
            largest = jnp.maximum(*(jnp.abs(y).max(axis=1) for y in x))
            scale = largest / top
            self.put_scales(part, refs, rows, scale)
        else:
            scale = self.by_head(refs[f"{part.name}_fixed"], rows[0], part.heads)
        scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
        shape = x[0].shape
        spread = lax.broadcast_in_dim(scale, shape, [0])
        x = [jnp.maximum(jnp.minimum(y / spread, top), -top) for y in x]
        if part.dtype != quantised.INT8:
            return x
        return [((y + MAGIC) - MAGIC).astype(jnp.int32) for y in x]

    def put(self, part: _Part, refs, rows, source) -> None:
        """The tile to its place: token by token into a pool."""
        row, own = rows
        if not part.pool_heads:
            plgpu.copy_smem_to_gmem(source, refs["q_out"].at[pl.ds(row, ROWS)])
            return
        heads, pool, slots = part.heads, refs[f"{part.name}_pool"], refs["slots"]
        token = div(row, heads)
        for i in range(min(ROWS // heads, self.tokens)):
            slot = slots[token + i]

            @pl.when((slot >= 0) & (row + i * heads >= own))
            def _(i=i, slot=slot):
                tile = source.at[pl.ds(i * heads, heads)]
                place = (div(slot, self.block_size), pl.ds(0, heads), rem(slot, self.block_size))
                plgpu.copy_smem_to_gmem(tile, pool.at[place])

    # ------------------------------------------------------------- registers, and the interpreter

    def load(self, ref):
        """A tile from SMEM."""
        return ref[...] if self.interpret else plgpu.load(ref, layout=TILE, optimized=False)

    def store(self, ref, value) -> None:
        """A tile to SMEM."""
        Ops(self.interpret).store_plain(ref, value)

    def by_token(self, ref, row, heads: int, features: int):
        """`ref [T, features]` of every row's token, `[64, features]` from `row` on."""
        if self.interpret:
            token = (row + jnp.arange(ROWS, dtype=jnp.int32)) // heads
            return ref[...][jnp.minimum(token, self.tokens - 1)]
        kind = plgpu.ShapeDtypeStruct((ROWS, features), jnp.dtype(jnp.float32), layout=TILE)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=kind)
        def gather(_, source, first):
            return _gathered(source, first, heads, self.tokens, (ROWS, features))

        return gather(ref, jnp.asarray(row, jnp.int32))  # pyright: ignore[reportCallIssue]

    def by_head(self, ref, row, heads: int):
        """`ref [K]` of every row's head."""
        if self.interpret:
            return ref[...][(row + jnp.arange(ROWS, dtype=jnp.int32)) % heads]
        kind = plgpu.ShapeDtypeStruct((ROWS,), jnp.dtype(jnp.float32), layout=PER_ROW)

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT), return_type=kind)
        def gather(_, source, first):
            return _gathered(source, first, heads, None, (ROWS,))

        return gather(ref, jnp.asarray(row, jnp.int32))  # pyright: ignore[reportCallIssue]

    def put_scales(self, part: _Part, refs, rows, scale) -> None:
        """One scale per row into its slot."""
        row, own = rows
        pool, slots = refs[f"{part.name}_scale"], refs["slots"]
        if self.interpret:

            @pl.loop(0, min(ROWS, self.tokens * part.heads))
            def _(r):
                slot, head = slots[div(row + r, part.heads)], rem(row + r, part.heads)

                @pl.when((slot >= 0) & (row + r >= own))
                def _():
                    place = (div(slot, self.block_size), head, rem(slot, self.block_size))
                    pool[place] = scale[r]

            return

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.RefType(), PER_ROW, *[plgpu.Layout.WG_SPLAT] * 2)
        )
        def scatter(_, target, slot_of, values, *bounds):
            _scatter(target, slot_of, values, bounds, part.heads, self.tokens, self.block_size)

        scatter(pool, slots, scale, *(jnp.asarray(x, jnp.int32) for x in rows))  # pyright: ignore


def _gathered(source, first, heads: int, tokens: int | None, shape: tuple[int, ...]):
    """Registers of `source[token, column]`, or of `source[head]` where `tokens` is None."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref, vector

    layout = mgpu.WGMMA_LAYOUT if len(shape) == 2 else mgpu.WGMMA_ROW_LAYOUT
    index = ir.IndexType.get()
    const = lambda x: arith.constant(index, x)
    begin = arith.index_cast(index, first.registers.item())
    sizes = layout.registers_shape(shape)
    registers = first.registers.reshape(-1).repeat(math.prod(sizes)).reshape(sizes)
    where = zip(itertools.product(*map(range, sizes)), layout.thread_idxs(shape), strict=True)
    for at, (row, *column) in where:
        row = arith.addi(row, begin)
        if tokens is None:
            values = [memref.load(source, [arith.remui(row, const(heads))])]
        else:
            token = arith.minui(arith.divui(row, const(heads)), const(tokens - 1))
            places = [arith.addi(column[0], const(i)) for i in range(layout.vector_length)]
            values = [memref.load(source, [token, place]) for place in places]
        kind = ir.VectorType.get((len(values),), values[0].type)
        registers[at] = vector.from_elements(kind, values)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _scatter(target, slot_of, values, bounds, heads: int, tokens: int, block_size: int) -> None:
    """`target[block, head, offset] = value` for every own row whose token has a slot."""
    from jax.experimental.mosaic import gpu as mgpu
    from jaxlib.mlir import ir
    from jaxlib.mlir.dialects import arith, memref, scf, vector

    index, i32 = ir.IndexType.get(), ir.IntegerType.get_signless(32)
    const = lambda x: arith.constant(index, x)
    begin, own = (arith.index_cast(index, x.registers.item()) for x in bounds)
    layout = mgpu.WGMMA_ROW_LAYOUT
    for value, (row,) in zip(values.registers.flat, layout.thread_idxs((ROWS,)), strict=True):
        row = arith.addi(row, begin)
        token, head = arith.divui(row, const(heads)), arith.remui(row, const(heads))
        inside = arith.andi(
            arith.cmpi(arith.CmpIPredicate.ult, token, const(tokens)),
            arith.cmpi(arith.CmpIPredicate.uge, row, own),
        )
        slot = memref.load(slot_of, [arith.minui(token, const(tokens - 1))])
        given = arith.cmpi(arith.CmpIPredicate.sge, slot, arith.constant(i32, 0))
        branch = scf.IfOp(arith.andi(inside, given))
        with ir.InsertionPoint(branch.then_block):
            at = arith.index_cast(index, slot)
            block, offset = arith.divui(at, const(block_size)), arith.remui(at, const(block_size))
            scalar = vector.extract(value, [], [0])
            memref.store(scalar, target, [block, head, offset])
            scf.yield_([])
