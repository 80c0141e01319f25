"""What the forward and the backward kernels share: the call, its optional operands, their tiles."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import MASKED
from pallas_kernels.flash_attention import tile
from pallas_kernels.flash_attention.mask import (
    TILE,
    Band,
    BlockKinds,
    Bounds,
    block_lists,
    pad_rows,
    tile_ranges,
)
from pallas_kernels.flash_attention.program import Program

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


class Modifier(NamedTuple):
    """A score_mod or mask_mod: what the tile computes and the arrays that it loads.

    An array is `[b, n]`, `[b, n, T]`, `[b, n, S]` or `[b, n, T, S]` as `program.kinds` says, with b
    and n 1 where it does not depend on them; f32 or i32 (a whole tile may be bf16 or f16).
    """

    program: Program
    arrays: tuple[jax.Array, ...]


class Dropout(NamedTuple):
    """The rate, and the word of every query `[B, N, T]` u32 (`pallas_kernels.dropout`)."""

    rate: float
    words: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Options:
    """What one call asks for beside q, k and v; see `flash_attention_fwd`."""

    band: Band
    scale: float
    bounds: Bounds | None = None
    soft_cap: float | None = None
    alibi_slopes: jax.Array | None = None
    sinks: jax.Array | None = None
    dropout: Dropout | None = None
    score: Modifier | None = None
    mask: Modifier | None = None
    blocks: BlockKinds | None = None

    @property
    def even(self) -> bool:
        """Whether all tiles cost the same: CTAs that walk many of them then end together."""
        static = self.bounds is None and self.blocks is None
        return static and self.band.left is not None and self.band.right is not None

    @property
    def loads(self) -> bool:
        """Whether a block brings vectors of keys or whole tiles into registers."""
        kinds = [] if self.score is None else self.score.program.kinds
        return self.mask is not None or "key" in kinds or "tile" in kinds

    @property
    def apart(self) -> bool:
        """Whether dS takes P times a slope, and dV takes it without."""
        sloped = self.score is not None and not self.score.program.additive
        return self.soft_cap is not None or sloped


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
    """The static side of one call; `queries` and `keys` are what the caller gave, not padded."""

    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    head_dim_v: int
    dtype: Any
    band: Band
    dynamic: bool  # bounds come as arrays
    scale: float
    soft_cap: float | None
    alibi: bool
    sinks: bool
    rate: float  # of dropout
    score: Program | None
    mask: Program | None
    lists: bool  # blocks are listed, not a range
    config: Any
    interpret: bool

    @classmethod
    def of(cls, q, v, options: Options, config: Any, interpret: Any, **more: Any) -> Any:
        """The problem of a call."""
        (batch, queries, heads, head_dim), (_, keys, kv_heads, head_dim_v) = q.shape, v.shape
        o = options
        return cls(
            batch, queries, keys, heads, kv_heads, head_dim, head_dim_v, q.dtype, o.band,
            o.bounds is not None, o.scale, o.soft_cap, o.alibi_slopes is not None,
            o.sinks is not None, 0.0 if o.dropout is None else o.dropout.rate,
            None if o.score is None else o.score.program,
            None if o.mask is None else o.mask.program,
            o.blocks is not None, config, bool(interpret), **more,
        )  # fmt: skip

    @property
    def group(self) -> int:
        """Query heads of one KV head."""
        return self.heads // self.kv_heads

    @property
    def kept(self) -> float:
        """Share of the probabilities that dropout keeps."""
        return 1.0 - self.rate


class Extra(NamedTuple):
    """The operands that only some calls have, as arrays outside a kernel and as refs inside."""

    rows: Any = None  # [B, 2, rows] i32: the interval of every row
    ranges: Any = None  # [B, tiles, 4] i32: of every tile of rows
    key_end: Any = None  # [B] i32: past the last key that some query sees; NaN may follow
    query_end: Any = None  # [B] i32: past the last query that sees some key
    slopes: Any = None  # [N] f32
    sinks: Any = None  # [N] f32
    words: Any = None  # [B, N, T'] u32
    score: tuple[Any, ...] = ()
    mask: tuple[Any, ...] = ()
    order: Any = None  # [b, n, tiles, blocks] i32: what a tile of rows visits, partial blocks first
    counts: Any = None  # [b, n, tiles, 2] i32: partial blocks, blocks
    work: Any = None  # [B * tiles, columns] i32: the tiles in the order in which they start


def extra_operands(
    options: Options, batch: int, block_q: int, block_kv: int, *, by_query: bool, tile_rows: int
) -> Extra:
    """The optional operands padded to whole tiles; rows are queries or keys (`by_query`)."""
    found: dict[str, Any] = {}
    bounds = options.bounds
    if bounds is not None:
        pair = (bounds.key_lo, bounds.key_hi) if by_query else (bounds.query_lo, bounds.query_hi)
        rows = pad_rows(*pair, block_q if by_query else block_kv)
        rows = jnp.broadcast_to(rows, (batch, *rows.shape[1:]))
        found["rows"], found["ranges"] = rows, tile_ranges(rows, tile_rows)
        found["key_end"] = _last(bounds.key_lo, bounds.key_hi, batch)
        found["query_end"] = _last(bounds.query_lo, bounds.query_hi, batch)
        # the same number, in fewer kernels
        found["key_end" if by_query else "query_end"] = found["ranges"][..., 1].max(-1)
    if options.alibi_slopes is not None:
        found["slopes"] = options.alibi_slopes.astype(jnp.float32)
    if options.sinks is not None:
        found["sinks"] = options.sinks.astype(jnp.float32)
    if options.dropout is not None and by_query:
        found["words"] = _pad_last(options.dropout.words, block_q)
    for name, modifier in (("score", options.score), ("mask", options.mask)):
        if modifier is not None:
            found[name] = tuple(
                _pad_value(x, kind, block_q, block_kv, by_query)
                for x, kind in zip(modifier.arrays, modifier.program.kinds, strict=True)
            )
    if options.blocks is not None:
        found["order"], found["counts"] = block_lists(
            options.blocks, options.band, bounds, block_q, block_kv, by_query=by_query
        )
    return Extra(**found)


def sorted_tiles(blocks: jax.Array, columns: Sequence[jax.Array]) -> jax.Array:
    """[B * tiles, 2 + columns] i32: (b, tile, columns) of every tile, most `blocks` first.

    >>> sorted_tiles(jnp.array([[1, 3, 2]]), [jnp.array([[7, 8, 9]])]).tolist()
    [[0, 1, 8], [0, 2, 9], [0, 0, 7]]
    """
    batch, tiles = blocks.shape
    n = batch * tiles
    at = jnp.arange(n, dtype=jnp.int32)
    table = jnp.stack([at // tiles, at % tiles, *(x.reshape(n) for x in columns)], axis=1)
    keys = blocks.reshape(n)
    if n > 2048:
        return table[jnp.argsort(-keys)]
    # few tiles: ranks by comparing all, two short fusions where a sort would be several kernels
    more, level = keys[None] > keys[:, None], keys[None] == keys[:, None]
    rank = (more | (level & (at[None] < at[:, None]))).sum(1, dtype=jnp.int32)
    return jnp.zeros_like(table).at[rank].set(table, unique_indices=True)


def _last(lo: jax.Array, hi: jax.Array, batch: int) -> jax.Array:
    """[B] i32: past the end of all intervals that are not empty."""
    return jnp.broadcast_to(jnp.where(lo < hi, hi, 0).max(-1).astype(jnp.int32), (batch,))


def _pad_last(x: jax.Array, multiple: int) -> jax.Array:
    """The last axis to a multiple, by its last value: whatever is computed there stays finite."""
    extra = -x.shape[-1] % multiple
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, extra)], mode="edge") if extra else x


def _pad_value(x: jax.Array, kind: str, block_q: int, block_kv: int, by_query: bool) -> jax.Array:
    """One array of a modifier; a whole tile has the rows of the kernel first."""
    if kind == "scalar":
        return x
    if kind != "tile":
        return _pad_last(x, block_q if kind == "query" else block_kv)
    x = _pad_last(_pad_last(x, block_kv).swapaxes(2, 3), block_q)
    return x.swapaxes(2, 3) if by_query else x


def at_index(ref: Any, b, n) -> tuple[Any, Any]:
    """The first two indices of an operand that may not depend on them."""
    return (0 if ref.shape[0] == 1 else b), (0 if ref.shape[1] == 1 else n)


def load_ranges(extra: Extra, b, base) -> tuple[jax.Array, jax.Array]:
    """`(lo, hi)` of `Extra.rows` for the 64 rows from `base` on, one of each a row."""
    layout = plgpu.Layout.WGMMA.reduce(1)
    part = lambda x: extra.rows.at[b, x, pl.ds(base, TILE)]
    lo, hi = (plgpu.load(part(x), layout=layout, optimized=False) for x in (0, 1))
    return lo, hi


def load_values(
    program: Program,
    refs: Sequence[Any],
    b,
    n,
    query0,
    key0,
    columns: int,
    *,
    by_query: bool,
    lazy: bool = False,
) -> list[Any]:
    """What a program needs of one tile of 64 rows; issued early, it is there when needed.

    `lazy` leaves what has columns to be loaded group by group, where registers are short: such a
    value is a function of the group's first column.
    """
    layout, found = plgpu.Layout.WGMMA, []
    row0, column0 = (query0, key0) if by_query else (key0, query0)
    for ref, kind in zip(refs, program.kinds, strict=True):
        at = at_index(ref, b, n)
        if kind == "scalar":
            found.append(ref[at])
            continue
        by_row = kind != "tile" and (kind == "query") == by_query
        how = layout if kind == "tile" else layout.reduce(1 if by_row else 0)

        def load(first, size, ref=ref, at=at, by_row=by_row, how=how, kind=kind):
            where = pl.ds(row0, TILE) if by_row else pl.ds(column0 + first, size)
            where = (pl.ds(row0, TILE), where) if kind == "tile" else (where,)
            return plgpu.load(ref.at[(*at, *where)], layout=how, optimized=False)

        if lazy and not by_row:
            found.append(functools.partial(load, size=tile.GROUP))
        else:
            found.append(load(0, columns))
    return found


def group_program(
    program: Program, values: Sequence[Any], query0, key0, *, by_query: bool
) -> Callable[[int, Any], tuple[Any, ...]]:
    """`f(c, score)`: the outputs of a program on a group of columns; rows are queries (`by_query`)
    or keys."""
    row0, column0 = (query0, key0) if by_query else (key0, query0)
    kinds = ["query", "key"] if by_query else ["key", "query"]
    forms = [kinds.index(k) if k in kinds else k for k in program.kinds]
    return tile.evaluator(program, values, forms, TILE, row0, column0, by_query)


def run_program(
    program: Program, x, values: Sequence[Any], query0, key0, *, by_query: bool, hide: bool = False
) -> tuple[Any, ...]:
    """The outputs of a program on the tile x; with `hide` x, MASKED where a mask_mod hides it.

    Group by group, each to its end: a tile of bools would take as many registers as one of floats.
    """
    f, found = group_program(program, values, query0, key0, by_query=by_query), []
    for c, score in tile.groups(x):
        outs = f(c, score)
        found.append((jnp.where(outs[0], score, MASKED),) if hide else outs)
    return tuple(lax.concatenate(parts, 1) for parts in zip(*found, strict=True))


def statistics(
    lse: jax.Array, delta: jax.Array, multiple: int, words: jax.Array | None = None
) -> jax.Array:
    """[B, N, 2 or 3, T'] f32: lse in base 2, delta, and the bits of the dropout words.

    A row that saw nothing gets 1e30 for its lse, so that P = 0, and its delta may be NaN.
    """
    delta = jnp.where(jnp.isneginf(lse), 0.0, delta)
    lse = jnp.where(jnp.isneginf(lse), 1e30, lse * LOG2E)
    pad = ((0, 0), (0, 0), (0, -lse.shape[-1] % multiple))
    rows = [jnp.pad(lse, pad, constant_values=1e30), jnp.pad(delta, pad)]
    if words is not None:
        rows.append(jax.lax.bitcast_convert_type(jnp.pad(words, pad), jnp.float32))
    return jnp.stack(rows, axis=2)


def pad_tokens(x: jax.Array) -> jax.Array:
    """`[B, T, ...]` with T padded to a multiple of 8: TMA strides and tiles have 8 rows."""
    extra = -x.shape[1] % 8
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) if extra else x
