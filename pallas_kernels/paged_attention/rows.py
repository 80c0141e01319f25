"""Rows of queries and of the output between global memory and a swizzled tile.

A tile's 64 rows are (token, head of the group) pairs of one KV head: `group` rows that lie together
in `[T, K, G, H]`, then a jump.  TMA would want one copy per token and 8 rows at least; a warpgroup
moves 16 bytes a thread, 8 rows of 256 bytes at a time.
"""

from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import swizzled

# c: 16-byte chunk of the tile, row: its row, own: chunk of the row, near, far: its two addresses
_CHUNK = """
add.u32 c, lane, {first};
div.u32 row, c, {per_row}; rem.u32 own, c, {per_row};
div.u32 token, row, {group}; rem.u32 g, row, {group};
setp.lt.s32 live{i}, token, $4;
add.u32 token, token, $2; mad.lo.u32 token, token, {heads}, $3; mad.lo.u32 token, token, {group}, g;
mul.wide.u32 off, token, {row_bytes}; add.u64 far{i}, $0, off;
mul.wide.u32 off, own, 16; add.u64 far{i}, far{i}, off;
shr.u32 near{i}, row, 3; mul.lo.u32 near{i}, near{i}, {group_bytes};
shr.u32 g, own, 3; shl.b32 g, g, 10; add.u32 near{i}, near{i}, g;
and.b32 row, row, 7; shl.b32 g, row, 7; add.u32 near{i}, near{i}, g;
and.b32 own, own, 7; xor.b32 own, own, row; shl.b32 own, own, 4;
add.u32 near{i}, near{i}, own; add.u32 near{i}, near{i}, $1;"""


def _ptx(load: bool, rows: int, width: int, group: int, heads: int) -> str:
    """PTX of operands: global base, shared base, first token, KV head, live tokens, thread."""
    per_row, count = width // 8, rows * width // 8 // 128
    lines = [
        f".reg .b32 lane, c, row, own, token, g, near<{count}>; .reg .b64 off, far<{count}>;",
        f".reg .pred live<{count}>; .reg .b32 x<{4 * count}>;",
        "and.b32 lane, $5, 127;",
    ]
    for i in range(count):
        lines.append(
            _CHUNK.format(
                i=i,
                first=128 * i,
                per_row=per_row,
                group=group,
                heads=heads,
                row_bytes=2 * width,
                group_bytes=16 * width,
            )
        )
    words = lambda i: "{" + ", ".join(f"x{4 * i + j}" for j in range(4)) + "}"
    for i in range(count):
        if load:
            lines += [f"mov.b32 x{4 * i + j}, 0;" for j in range(4)]
            lines.append(f"@live{i} ld.global.v4.b32 {words(i)}, [far{i}];")
        else:
            lines.append(f"ld.shared.v4.b32 {words(i)}, [near{i}];")
    for i in range(count):
        to = f"st.shared.v4.b32 [near{i}]" if load else f"@live{i} st.global.v4.b32 [far{i}]"
        lines.append(f"{to}, {words(i)};")
    return "{\n" + "\n".join(lines) + "\n}"


def _move(load: bool, outside: Any, tile: Any, first, head, live) -> None:
    rows, width = tile.shape
    _, heads, group, _ = outside.shape
    scalar = plgpu.Layout.WG_SPLAT
    types = (plgpu.RefType(), plgpu.RefType(swizzled(tile.dtype)), scalar, scalar, scalar)

    @plgpu.inline_mgpu(arg_types=types)
    def emit(_, outside, tile, *scalars):
        from jax.experimental.mosaic.gpu import utils

        args = [utils.memref_ptr(outside), utils.memref_ptr(tile)]
        args += [x.registers[()] for x in scalars]
        ptx = _ptx(load, rows, width, group, heads)
        utils.inline_ptx(ptx, *args, utils.thread_idx(), has_side_effects=True)

    i32 = lambda x: jnp.asarray(x, jnp.int32)
    emit(outside, tile, i32(first), i32(head), i32(live))  # pyright: ignore[reportCallIssue]


def load_rows(source: Any, tile: Any, first, head, live, interpret: bool) -> None:
    """`source[first + i, head]` of `[T, K, G, H]` for i < live -> rows `i * G` on of `tile`.

    Other rows are zeros.  By one warpgroup; `commit_smem` is left to the caller.
    """
    if not interpret:
        _move(True, source, tile, first, head, live)
        return
    group, rows = source.shape[2], tile.shape[0]
    parts = []
    for i in range(rows // group):
        inside = lax.min(lax.max(first + i, 0), source.shape[0] - 1)
        parts.append(jnp.where(i < live, source[inside, head], 0))
    x = jnp.concatenate(parts)
    tile[...] = jnp.pad(x, ((0, rows - x.shape[0]), (0, 0)))


def store_rows(tile: Any, target: Any, first, head, live, interpret: bool) -> None:
    """The rows of `load_rows`, the other way."""
    if not interpret:
        _move(False, target, tile, first, head, live)
        return
    group = target.shape[2]
    x = tile[...]
    for i in range(tile.shape[0] // group):

        @pl.when(i < live)
        def _(i=i):
            target[first + i, head] = x[i * group : (i + 1) * group]
