"""New keys and values into their slots of the block pools, in place, in one launch.

A row is one head of one token.  Eight neighbouring threads take a row, 16 bytes at a time each, so
that a warp moves whole lines, finds the largest magnitude of a row by three shuffles and needs no
shared memory; all loads of a thread are under way before the first is used.  The rows of K and of V
are the two parts of one grid.

A CTA takes rows that lie side by side, or, where their scales are written too, those of one head
of neighbouring tokens: a block holds the scales of a head side by side, so that a warp's 16 go out
together, 64 bytes where the slots are in order.
"""

import dataclasses
import struct
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import WARPGROUP, cdiv, div, in_place, interpret_params, rem, taken

from . import quantised

LANES = 8  # threads of a row
ROWS = 64  # of a CTA
PASSES = ROWS * LANES // WARPGROUP  # rows of a thread
TOP = {quantised.INT8: 127.0, quantised.E4M3: 448.0}  # the largest value that is stored
SMALLEST = 2.0**-120  # a scale below counts as this much: its inverse is finite
MAGIC = 1.5 * 2.0**23  # x + MAGIC has the nearest integer to x in its last bits


class Written(NamedTuple):
    """What `write_kv` gives back; None for what the call lacks."""

    k_pool: jax.Array
    v_pool: jax.Array
    k_scale: jax.Array | None = None
    v_scale: jax.Array | None = None


def write_kv(
    k_pool: jax.Array,
    v_pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    slots: jax.Array,
    *,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    interpret: Any = None,
) -> Written:
    """Write token t's key and value into slot `slots[t]` = block * block_size + offset, on Hopper.

    Donate the pools and the write is in place.

    Args:
      k_pool: `[P, K, block_size, H]` in k's dtype, or int8 or float8_e4m3fn with scales.
      v_pool: `[P, K, block_size, Hv]`.
      k: bf16 or f16 `[T, K, H]`.
      v: `[T, K, Hv]`.
      slots: i32 `[T]`, distinct; -1 writes nothing.
      k_scale: f32 `[P, K, block_size]`, written beside the values: the largest magnitude of a token
        and head over the largest one stored.  Or `[K]`, fixed.
      v_scale: as k_scale.
      interpret: True runs the GPU interpreter.

    Raises:
      ValueError: arguments that do not fit each other.
      NotImplementedError: what this kernel cannot do.

    >>> pool = jnp.zeros((3, 8, 16, 64), jnp.bfloat16)
    >>> x, slots = jnp.ones((8, 8, 64), jnp.bfloat16), jnp.arange(8)
    >>> jax.eval_shape(write_kv, pool, pool, x, x, slots).k_pool.shape
    (3, 8, 16, 64)
    """
    _check(k_pool, v_pool, k, v, slots, k_scale, v_scale)
    scaled = k_scale is not None and k_scale.ndim == 3
    inputs = dict(slots=slots.astype(jnp.int32))
    inputs |= {name: x.reshape(-1, x.shape[-1]) for name, x in (("k", k), ("v", v))}
    targets: dict[str, Any] = dict(k_pool=k_pool, v_pool=v_pool)
    if k_scale is not None and v_scale is not None:
        where = targets if scaled else inputs
        where |= dict(k_scale=k_scale.astype(jnp.float32), v_scale=v_scale.astype(jnp.float32))
    kind = None if k_scale is None else k_pool.dtype
    _, heads, size, _ = k_pool.shape
    total = k.shape[0] * heads
    part = lambda name, x: _Rows(name, x.shape[2], kind, scaled, heads, size, total)
    parts = part("k", k), part("v", v)
    ctas = parts[0].ctas
    with jax.named_scope("write_kv"):
        state = {name: in_place(x) for name, x in targets.items()}
        names = (*inputs, *targets)

        def body(*refs):
            refs, cta = dict(zip(names, refs, strict=True)), lax.axis_index("cta")
            for i, part in enumerate(parts):
                first = part.first(cta - i * ctas)
                move = part.interpreted if interpret else part.move
                pl.when(div(cta, ctas) == i)(lambda move=move, first=first: move(refs, first))

        plgpu.kernel(
            body,
            out_type=(),
            grid=(2 * ctas,),
            grid_names=("cta",),
            interpret=interpret_params(interpret),
            compiler_params=plgpu.CompilerParams(),
        )(*inputs.values(), *state.values())
        return Written(**{name: taken(ref) for name, ref in state.items()})


def _check(k_pool, v_pool, k, v, slots, k_scale, v_scale) -> None:
    """What the shapes and dtypes have to be."""
    p, heads, size, _ = k_pool.shape
    if v_pool.shape[:3] != (p, heads, size) or slots.shape != k.shape[:1]:
        raise ValueError(f"{k_pool.shape=}, {v_pool.shape=}, {k.shape=}, {slots.shape=} do not fit")
    for name, pool, x in (("k", k_pool, k), ("v", v_pool, v)):
        if x.shape != (*slots.shape, heads, pool.shape[3]):
            raise ValueError(f"{name} of {x.shape} does not fit {pool.shape} and {slots.shape}")
    narrow = quantised.is_quantised(k_pool.dtype)
    if narrow != (k_scale is not None) or narrow != (v_scale is not None):
        raise ValueError(f"scales go with int8 and float8_e4m3fn, not {k_pool.dtype=}")
    if k_scale is not None and k_scale.ndim != v_scale.ndim:
        raise NotImplementedError(f"scales of two kinds: {k_scale.shape=}, {v_scale.shape=}")
    if k.dtype not in (jnp.bfloat16, jnp.float16) or v.dtype != k.dtype:
        raise NotImplementedError(f"{k.dtype=}, {v.dtype=} are not bfloat16 or float16")
    if k_pool.dtype != v_pool.dtype or not (narrow or k_pool.dtype == k.dtype):
        raise NotImplementedError(f"{k.dtype=} into {k_pool.dtype=} and {v_pool.dtype=}")
    if any(x % 64 or x > 256 for x in (k.shape[2], v.shape[2])) or k.shape[0] == 0:
        raise NotImplementedError(f"{k.shape=}, {v.shape=}: heads are not 64, 128, 192 or 256")


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The rows of K or of V."""

    name: str
    features: int
    kind: Any  # of what is stored, None for values as they come
    scaled: bool  # a scale for every row is stored too; else those of heads are given
    heads: int
    block_size: int
    total: int

    @property
    def step(self) -> int:
        """From a row of a CTA to its next."""
        return self.heads if self.scaled else 1

    @property
    def ctas(self) -> int:
        """CTAs that it takes."""
        return self.step * cdiv(self.total // self.step, ROWS)

    def first(self, cta):
        """First row of a CTA."""
        return div(cta, self.step) * (ROWS * self.step) + rem(cta, self.step)

    def move(self, refs: dict[str, Any], first) -> None:
        """Rows `first`, `first + step` ... to their slots."""
        source, slots, pool = refs[self.name], refs["slots"], refs[f"{self.name}_pool"]
        arrays = [source, slots, pool, refs.get(f"{self.name}_scale", slots)]
        ptx = self.ptx(jnp.dtype(source.dtype))

        @plgpu.inline_mgpu(arg_types=(*[plgpu.RefType()] * 4, plgpu.Layout.WG_SPLAT))
        def emit(_, *args):
            from jax.experimental.mosaic.gpu import utils

            *arrays, first = args
            args = [*map(utils.memref_ptr, arrays), first.registers[()], utils.thread_idx()]
            utils.inline_ptx(ptx, *args, has_side_effects=True)

        emit(*arrays, first)  # pyright: ignore[reportCallIssue]

    def ptx(self, dtype: Any) -> str:
        """PTX of operands: rows, slots, pool, scales, first row, thread."""
        passes, chunks = PASSES, self.features // (8 * LANES)
        words = lambda i, j: [f"x{4 * (i * chunks + j) + n}" for n in range(4)]
        lines = [
            f".reg .b32 own, r, head, t, u, row<{passes}>, slot<{passes}>, w<2>;",
            f".reg .b32 x<{4 * passes * chunks}>; .reg .pred live<{passes}>, lead, some;",
            f".reg .f32 f<{8 * chunks}>, top, a, s; .reg .b64 at, off; .reg .b16 h<4>;",
            ".reg .b32 place; .reg .f32 kept;",
            "and.b32 own, $5, 7; bfe.u32 r, $5, 3, 2; bfe.u32 t, $5, 5, 2;",
            f"mad.lo.u32 r, t, {4 * passes}, r; mad.lo.u32 r, r, {self.step}, $4;",
            "mov.b32 place, -1; mov.f32 kept, 0f00000000;",
        ]
        for i in range(passes):
            lines += [
                f"add.u32 row{i}, r, {4 * i * self.step};",
                f"setp.lt.u32 live{i}, row{i}, {self.total};",
                f"div.u32 t, row{i}, {self.heads}; mul.wide.u32 at, t, 4; add.u64 at, at, $1;",
                f"mov.b32 slot{i}, -1; @live{i} ld.global.b32 slot{i}, [at];",
                f"mul.wide.u32 at, row{i}, {2 * self.features}; add.u64 at, at, $0;",
                "mul.wide.u32 off, own, 16; add.u64 at, at, off;",
            ]
            for j in range(chunks):
                lines += [f"mov.b32 {x}, 0;" for x in words(i, j)]
                to = ", ".join(words(i, j))
                lines.append(f"@live{i} ld.global.v4.b32 {{{to}}}, [at+{16 * LANES * j}];")
        for i in range(passes):
            lines += [
                f"setp.ge.s32 live{i}, slot{i}, 0; rem.u32 head, row{i}, {self.heads};",
                f"div.u32 t, slot{i}, {self.block_size}; rem.u32 u, slot{i}, {self.block_size};",
                f"mad.lo.u32 t, t, {self.heads}, head; mad.lo.u32 row{i}, t, {self.block_size}, u;",
            ]
            if self.kind is not None:
                lines += self.scale_ptx(i, [words(i, j) for j in range(chunks)], dtype)
            each = 16 if self.kind is None else 8  # bytes of a thread
            lines += [
                f"mul.wide.u32 at, row{i}, {each * LANES * chunks}; add.u64 at, at, $2;",
                f"mul.wide.u32 off, own, {each}; add.u64 at, at, off;",
            ]
            for j in range(chunks):
                out = words(i, j)
                if self.kind is not None:
                    lines += self.store_ptx(j)
                    out = ["w0", "w1"]
                to = f"st.global.v{len(out)}.b32 [at+{each * LANES * j}]"
                lines.append(f"@live{i} {to}, {{{', '.join(out)}}};")
        if self.scaled:
            lines += [
                "setp.ge.s32 lead, place, 0; mul.wide.u32 at, place, 4; add.u64 at, at, $3;",
                "@lead st.global.f32 [at], kept;",
            ]
        return "{\n" + "\n".join(lines) + "\n}"

    def scale_ptx(self, i: int, words: list[list[str]], dtype: Any) -> list[str]:
        """PTX: the words of pass i as f0, f1, ..., and s, by which they are multiplied."""
        lines, f = [], 0
        for word in (x for chunk in words for x in chunk):
            if dtype == jnp.bfloat16:
                lines.append(f"shl.b32 t, {word}, 16; mov.b32 f{f}, t;")
                lines.append(f"and.b32 t, {word}, 0xffff0000; mov.b32 f{f + 1}, t;")
            else:
                lines.append(f"mov.b32 {{h0, h1}}, {word};")
                lines += [f"cvt.f32.f16 f{f + n}, h{n};" for n in range(2)]
            f += 2
        if self.scaled:
            lines.append("abs.f32 top, f0;")
            lines += [f"abs.f32 a, f{n}; max.f32 top, top, a;" for n in range(1, f)]
            for apart in (4, 2, 1):
                lines += [
                    f"mov.b32 t, top; shfl.sync.bfly.b32 t, t, {apart}, 0x1f, 0xffffffff;",
                    "mov.b32 a, t; max.f32 top, top, a;",
                ]
            lines += [
                f"div.rn.f32 s, top, {_hex(TOP[self.kind])};",
                f"setp.eq.and.u32 lead, own, {i}, live{i};",
                f"@lead mov.b32 place, row{i}; @lead mov.f32 kept, s;",
            ]
        else:
            lines.append("mul.wide.u32 at, head, 4; add.u64 at, at, $3; ld.global.f32 s, [at];")
        lines.append(f"setp.gt.f32 some, s, {_hex(0.0)}; selp.f32 s, s, {_hex(1.0)}, some;")
        lines.append(f"max.f32 s, s, {_hex(SMALLEST)}; rcp.rn.f32 s, s;")
        return lines

    def store_ptx(self, j: int) -> list[str]:
        """PTX: 8 values of chunk j as w0 and w1."""
        lines = []
        for n in range(2):
            f = [f"f{8 * j + 4 * n + x}" for x in range(4)]
            if self.kind == quantised.E4M3:
                lines += [f"mul.f32 {x}, {x}, s;" for x in f]
                lines += [
                    f"cvt.rn.satfinite.e4m3x2.f32 h{x}, {f[2 * x + 1]}, {f[2 * x]};"
                    for x in range(2)
                ]
                lines.append(f"mov.b32 w{n}, {{h0, h1}};")
                continue
            if self.scaled:
                lines += [f"fma.rn.f32 {x}, {x}, s, {_hex(MAGIC)};" for x in f]
            else:
                top, low = _hex(TOP[self.kind]), _hex(-TOP[self.kind])
                lines += [f"mul.f32 {x}, {x}, s; min.f32 {x}, {x}, {top};" for x in f]
                lines += [f"max.f32 {x}, {x}, {low}; add.f32 {x}, {x}, {_hex(MAGIC)};" for x in f]
            for to, (low, high) in (("head", f[:2]), ("u", f[2:])):
                lines.append(f"mov.b32 t, {low}; mov.b32 u, {high}; prmt.b32 {to}, t, u, 0x0040;")
            lines.append(f"prmt.b32 w{n}, head, u, 0x5410;")
        return lines

    # -------------------------------------------------------------------------- the interpreter

    def interpreted(self, refs: dict[str, Any], first) -> None:
        """As `move`, row after row."""
        slots, pool = refs["slots"], refs[f"{self.name}_pool"]

        @pl.loop(0, ROWS)
        def _(r):
            row = first + r * self.step
            slot = slots[div(lax.min(row, jnp.int32(self.total - 1)), self.heads)]

            @pl.when((row < self.total) & (slot >= 0))
            def _():
                head = rem(row, self.heads)
                place = (div(slot, self.block_size), head, rem(slot, self.block_size))
                x = refs[self.name][row]
                if self.kind is not None:
                    scales = refs[f"{self.name}_scale"]
                    x = x.astype(jnp.float32)
                    scale = jnp.abs(x).max() / TOP[self.kind] if self.scaled else scales[head]
                    if self.scaled:
                        scales[place] = scale
                    x = x * (1.0 / jnp.maximum(jnp.where(scale > 0, scale, 1.0), SMALLEST))
                    x = jnp.clip(x, -TOP[self.kind], TOP[self.kind])
                    x = jnp.round(x) if self.kind == quantised.INT8 else x
                pool[place] = x.astype(pool.dtype)


def _hex(x: float) -> str:
    """An f32 as PTX writes it."""
    return "0f" + struct.pack(">f", x).hex().upper()
