"""What the forward and the backward do to one tile of scores.

A tile is `[rows, columns]` in the wgmma layout: in the forward rows are queries and columns keys,
in the backward the other way round.  All functions walk the columns in groups of 8: a thread's
columns in two groups differ by a constant, so one `[rows, 8]` iota serves the whole tile and
comparisons and distances are against immediate numbers.  A full-width iota would stay live and
spill.
"""

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import MASKED

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


def mask(s, lo, hi):
    """MASKED where a column lies outside `lo <= c < hi`.

    lo and hi are None or `[rows, 8]` i32: the row's bound minus the column's index in its group.
    """
    out = []
    for c, x in groups(s):
        seen = None
        if hi is not None:
            seen = hi > c
        if lo is not None:
            seen = lo <= c if seen is None else seen & (lo <= c)
        out.append(x if seen is None else jnp.where(seen, x, MASKED))
    return lax.concatenate(out, 1)


def add_distance(s, distance, slope):
    """`s - slope * |distance - c|`; distance is `[rows, 8]` f32, slope a scalar."""
    return lax.concatenate([x - jnp.abs(distance - float(c)) * slope for c, x in groups(s)], 1)


def exp2_poly(x, interpret: bool):
    """2**x for x <= 0 on the FMA pipe: cubic on [-1/2, 1/2] (relative error 8e-5), exponent added.

    bf16 rounds P at 4e-3, so the error vanishes in it.
    """
    x = jnp.maximum(x, -126.0)
    cubic = lambda f: ((0.05508868 * f + 0.24260405) * f + 0.69327624) * f + 0.99992894
    if interpret:  # XLA simplifies (x + c) - c away
        n = jnp.round(x)
        return cubic(x - n) * jnp.exp2(n)
    shifted = x + 12582912.0  # 1.5 * 2**23: the integer nearest to x lands in the low mantissa bits
    p = lax.bitcast_convert_type(cubic(x - (shifted - 12582912.0)), jnp.int32)
    exponent = lax.bitcast_convert_type(shifted, jnp.int32) << 23
    return lax.bitcast_convert_type(p + exponent, jnp.float32)


def exp2(x, poly: int, interpret: bool):
    """2**x, `poly` of every 8 column groups on the FMA pipe and the others on MUFU."""
    if not poly:
        return jnp.exp2(x)
    parts = []
    for c in range(0, x.shape[1], 64):
        cut = c + 64 - 8 * poly
        if cut > c:
            parts.append(jnp.exp2(x[:, c:cut]))
        parts.append(exp2_poly(x[:, cut : c + 64], interpret))
    return lax.concatenate(parts, 1)


def fold(p):
    """`[rows, columns]` to partial row sums `[rows, 8]`: no traffic between lanes."""
    parts = [x for _, x in groups(p)]
    while len(parts) > 1:
        pairs = [a + b for a, b in zip(parts[::2], parts[1::2], strict=False)]
        parts = pairs + parts[len(pairs) * 2 :]
    return parts[0]
