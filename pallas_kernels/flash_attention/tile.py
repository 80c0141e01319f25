"""What the forward and the backward do to one tile of scores.

A tile is `[rows, columns]` in the wgmma layout: in the forward rows are queries and columns keys,
in the backward the other way round.  All functions walk the columns in groups of 8: a thread's
columns in two groups differ by a constant, so one `[rows, 8]` iota serves the whole tile and
comparisons and distances are against immediate numbers.  A full-width iota would stay live and
spill.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import MASKED, lanes
from pallas_kernels.dropout import LAST, PAIR, WEYL, shared_half, threshold
from pallas_kernels.flash_attention.program import Program, index

GROUP = 8


def iota(rows: int, dim: int):
    """Row (0) or column (1) index of a `[rows, 8]` group."""
    return plgpu.broadcasted_iota(jnp.int32, (rows, GROUP), dim, layout=plgpu.Layout.WGMMA)


def by_row(x, columns: int):
    """`[rows]` to `[rows, columns]`."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), [0])


def by_column(x, rows: int):
    """`[columns]` to `[rows, columns]`."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), [1])


def groups(s):
    """The tile's column groups and the offset of each."""
    return [(c, s[:, c : c + GROUP]) for c in range(0, s.shape[1], GROUP)]


def mask_group(x, c, lo, hi):
    """The group x that starts at column c, MASKED where a column lies outside `lo <= c < hi`.

    lo and hi are None or `[rows, 8]` i32: the row's bound minus the column's index in its group.
    """
    seen = None
    if hi is not None:
        seen = hi > c
    if lo is not None:
        seen = lo <= c if seen is None else seen & (lo <= c)
    return x if seen is None else jnp.where(seen, x, MASKED)


def mask(s, lo, hi):
    """`mask_group` of every group."""
    return lax.concatenate([mask_group(x, c, lo, hi) for c, x in groups(s)], 1)


def add_distance(s, distance, slope):
    """`s - slope * |distance - c|`; distance is `[rows, 8]` f32, slope a scalar."""
    return lax.concatenate([x - jnp.abs(distance - float(c)) * slope for c, x in groups(s)], 1)


def fold(p):
    """`[rows, columns]` to partial row sums `[rows, 8]`: no traffic between lanes."""
    parts = [x for _, x in groups(p)]
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]


def rescaled(x, by, interpret: bool):
    """`[rows, columns]` times `[rows]`, where a warp whose factors are all 1 does nothing.

    x and the result are f32 in the wgmma layout, `by` in that of its rows.
    """
    if interpret:
        return x * by_row(by, x.shape[1])
    layout = plgpu.Layout.WGMMA
    result = plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(jnp.float32), layout=layout)

    @plgpu.inline_mgpu(arg_types=(layout, layout.reduce(1)), return_type=result)
    def multiply(_, x, by):
        from jax.experimental.mosaic import gpu as mgpu
        from jaxlib.mlir import ir
        from jaxlib.mlir.dialects import arith, nvvm, scf

        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        one, changes = mgpu.c(1.0, f32), mgpu.c(False, ir.IntegerType.get_signless(1))
        for factor in by.registers.flat:
            (number,) = lanes(factor)
            changes = arith.ori(changes, arith.cmpf(arith.CmpFPredicate.UNE, number, one))
        changes = nvvm.vote_sync(mgpu.c(0xFFFFFFFF, i32), changes, "any")
        kept = list(x.registers.flat)
        branch = scf.IfOp(changes, [register.type for register in kept], has_else=True)
        with ir.InsertionPoint(branch.then_block):
            times = x * by.broadcast_in_dim(x.shape, (0,), x.layout)
            scf.yield_(list(times.registers.flat))
        with ir.InsertionPoint(branch.else_block):  # pyright: ignore
            scf.yield_(kept)
        registers = x.registers.copy()
        registers.flat[:] = list(branch.results)
        return mgpu.FragmentedArray(_registers=registers, _layout=x.layout, _is_signed=None)

    return multiply(x, by)  # pyright: ignore[reportCallIssue]


def evaluator(
    program: Program,
    values: Sequence[Any],
    forms: Sequence[Any],
    rows: int,
    row0,
    column0,
    by_query: bool,
) -> Callable[[int, Any], tuple[Any, ...]]:
    """`f(c, score)`: the outputs of a program on the group that starts at column c.

    `forms` says how a value meets the tile: 0 by its rows, 1 by its columns, "tile" or "scalar".
    """
    row, column = iota(rows, 0) + row0, iota(rows, 1) + column0
    row_float, column_float = row.astype(jnp.float32), column.astype(jnp.float32)
    along_rows = index(row, floats=row_float)
    fixed: list[Any] = [
        by_row(v, GROUP) if form == 0
        else lax.broadcast_in_dim(v, (rows, GROUP), ()) if form == "scalar"
        else by_column(v, rows) if form == 1 and not callable(v)
        else v
        for v, form in zip(values, forms, strict=True)
    ]  # fmt: skip

    def outputs(c: int, score):
        along_columns = index(column, c, column_float)
        here: list[Any] = []
        v: Any
        for v, form in zip(fixed, forms, strict=True):
            if callable(v):
                v = by_column(v(c), rows) if form == 1 else v(c)
            elif form not in (0, "scalar"):
                v = v[:, c : c + GROUP]
            here.append(v.astype(jnp.float32) if v.dtype in NARROW else v)
        t, s = (along_rows, along_columns) if by_query else (along_columns, along_rows)
        return program.on_tile(score, t, s, here)

    return outputs


NARROW = (jnp.bfloat16, jnp.float16)


def keeps_by_query(words, key0, columns: int, rate: float) -> Iterator[Any]:
    """Which scores dropout keeps, rows being queries: `[rows, 8]` bools, made when asked for.

    Two groups share the first half of the hash: key tokens s and s ^ 8.
    """
    rows = words.shape[0]
    word = by_row(words, GROUP)
    first = (iota(rows, 1) + key0).astype(jnp.uint32) * jnp.uint32(WEYL)
    border = jnp.uint32(threshold(rate))
    for c in range(0, columns, 2 * PAIR):
        half = shared_half(word, first + jnp.uint32(c * WEYL & 0xFFFFFFFF))
        for last in LAST:
            yield half * jnp.uint32(last) >= border


def keeps_by_key(words: Iterable[Any], key0, rows: int, rate: float) -> Iterator[Any]:
    """The same where columns are queries: words are `[rows, 8]` a group."""
    key = iota(rows, 0) + key0
    column = (key & ~PAIR).astype(jnp.uint32) * jnp.uint32(WEYL)
    odd = (key & PAIR).astype(jnp.uint32) // jnp.uint32(PAIR)
    last = jnp.uint32(LAST[0]) + odd * jnp.uint32((LAST[1] - LAST[0]) & 0xFFFFFFFF)
    border = jnp.uint32(threshold(rate))
    for word in words:
        yield shared_half(word, column) * last >= border


def dropped(kept: Iterable[Any], x):
    """x where `kept`, else 0, group by group."""
    parts = [jnp.where(k, g, 0.0) for (_, g), k in zip(groups(x), kept, strict=True)]
    return lax.concatenate(parts, 1)
