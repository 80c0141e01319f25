"""How the partial outputs of a cluster meet: each query column at the warpgroup that merges it.

Every warpgroup of the cluster has an output and a log-sum-exp of its own keys for all columns.
Column c is merged by warpgroup c mod `ranks`, so that is where everybody sends it, straight into
the shared memory of that warpgroup's CTA (`st.shared::cluster`).  Behind one cluster barrier the
merging warpgroup then finds its columns at home.  Through L2 the same is a store, a release for
other SMs and a load: 0.2 us more in calls of five, 1.9 us in calls of 35.

The interpreter knows no other CTA's shared memory: there the partials go through global memory.
"""

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import cdiv

from .columns import PER_COLUMN, ROWS, Columns
from .onebyte import singles


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Static facts: `ranks` warpgroups, `warpgroups` of them a CTA, `live` columns to merge."""

    ranks: int
    warpgroups: int
    live: int
    cols: int
    value_dim: int

    @property
    def turns(self) -> int:
        """Columns that one warpgroup merges, at most."""
        return cdiv(self.live, self.ranks)

    @property
    def bytes(self) -> int:
        """Shared memory of one CTA."""
        return 4 * self.warpgroups * self.turns * self.ranks * (self.value_dim + 1)

    def outputs(self, tiles: int, heads: int, interpret: bool) -> tuple[Any, ...]:
        """Arrays in global memory, `tiles` query tiles of `heads` KV heads: the interpreter's."""
        if not interpret:
            return ()
        shape = (tiles, heads, self.ranks, self.cols)
        return (
            jax.ShapeDtypeStruct((*shape, self.value_dim), jnp.float32),
            jax.ShapeDtypeStruct(shape, jnp.float32),
        )

    def scratch(self, interpret: bool) -> tuple[Any, ...]:
        """Shared memory."""
        if interpret:
            return ()
        shape = (self.warpgroups, self.turns, self.ranks)
        return plgpu.SMEM((*shape, self.value_dim), jnp.float32), plgpu.SMEM(shape, jnp.float32)

    def send(self, math: Columns, parts, place, first, rank, o, lse) -> None:
        """Output `[Hv, cols]` and log-sum-exp `[cols]` of this warpgroup, to those that merge.

        `place` is (query tile, head) of this cluster, `first` the first of the live columns.
        """
        part_o, part_lse = parts
        if math.ops.interpret:
            part_o[(*place, rank)] = o.T
            part_lse[(*place, rank)] = lse
        else:
            _send(self, o, lse, part_o, part_lse, rank, first)

    def received(self, math: Columns, parts, place, first, rank, turn: int):
        """(log-sum-exp, output `[Hv]`) of every warpgroup for column `rank + turn * ranks`."""
        part_o, part_lse = parts
        if math.ops.interpret:
            column = first + rank + turn * self.ranks
            where = lambda x: (*place, x, column)
        else:
            where = lambda x: (lax.axis_index("wg"), turn, x)
        every = [where(x) for x in range(self.ranks)]
        return [part_lse[x] for x in every], [math.load_row(part_o.at[x]) for x in every]


def send_ptx(exchange: Exchange, column_tile: int) -> str:
    """PTX: a thread's values of eight columns, to where each column is merged.

    Operands: the buffers of outputs and of log-sum-exps, thread, rank, first live column; two
    log-sum-exps, and for every 64 rows and half of 16 two values of O.
    """
    x = exchange
    alone = x.ranks == x.warpgroups  # one CTA, launched without a cluster
    space = "shared" if alone else "shared::cluster"
    there = "mov.b32 far, near;" if alone else "mapa.shared::cluster.u32 far, near, cta;"
    lines = [
        ".reg .pred own, top;",
        ".reg .b32 lane, row, low, column, owner, turn, cta, place, near, far;",
        "and.b32 lane, $2, 31;",
        "shr.u32 low, lane, 2;",
        "bfe.u32 row, $2, 5, 2;",
        "mad.lo.u32 row, row, 16, low;",
    ]
    for e in range(2):
        lines += [
            "and.b32 column, lane, 3;",
            f"mad.lo.u32 column, column, 2, {8 * column_tile + e};",
            "sub.u32 column, column, $4;",
            f"setp.lt.u32 own, column, {x.live};",
            f"rem.u32 owner, column, {x.ranks};",
            f"div.u32 turn, column, {x.ranks};",
            f"div.u32 cta, owner, {x.warpgroups};",
            f"rem.u32 owner, owner, {x.warpgroups};",
            f"mad.lo.u32 place, owner, {x.turns}, turn;",
            f"mad.lo.u32 place, place, {x.ranks}, $3;",
            "mad.lo.u32 near, place, 4, $1;",
            there,
            "setp.eq.and.u32 top, row, 0, own;",
            f"@top st.{space}.f32 [far], ${5 + e};",
            f"mad.lo.u32 near, place, {4 * x.value_dim}, $0;",
            "mad.lo.u32 near, row, 4, near;",
            there,
        ]
        for i in range(x.value_dim // 64):
            for half in range(2):
                to, value = 4 * (64 * i + 8 * half), 7 + 4 * i + 2 * half + e
                lines.append(f"@own st.{space}.f32 [far+{to}], ${value};")
    return "{\n" + "\n".join(lines) + "\n}"


def _send(exchange: Exchange, o, lse, part_o, part_lse, rank, first) -> None:
    scalar = plgpu.Layout.WG_SPLAT

    @plgpu.inline_mgpu(
        arg_types=(ROWS, PER_COLUMN, plgpu.RefType(), plgpu.RefType(), scalar, scalar)
    )
    def emit(_, o, lse, part_o, part_lse, rank, first):
        from jax.experimental.mosaic.gpu import utils

        refs = [utils.memref_ptr(part_o), utils.memref_ptr(part_lse), utils.thread_idx()]
        scalars = [rank.registers[()], first.registers[()]]
        for j in range(exchange.cols // 8):
            values = singles(lse.registers[j].flat)
            for i in range(exchange.value_dim // 64):
                values += singles(o.registers[i, j].flat)
            utils.inline_ptx(send_ptx(exchange, j), *refs, *scalars, *values)

    i32 = lambda x: jnp.asarray(x, jnp.int32)
    emit(o, lse, part_o, part_lse, i32(rank), i32(first))  # pyright: ignore[reportCallIssue]
