"""What hides a key from a query: windows, packed sequences, and masks written as scalar functions.

`score_mod(score, b, n, t, s)` and `mask_mod(b, n, t, s)` are what FlexAttention (Dong et al. 2024)
calls them: scalar functions of one score and its indices, traced once.  The arrays they capture
become operands, so changing them recompiles nothing and float ones get gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.extend import core as jex_core

ScoreMod = Callable[[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]
MaskMod = Callable[[jax.Array, jax.Array, jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True, eq=False)
class ScalarFn:
    """A traced scalar function whose captured arrays are passed back in as `captured`.

    Two are equal when their programs are equal, whatever the values of the captured arrays.
    `period` > 0 wraps the batch index (a folded vmap axis repeats the batch).
    """

    jaxpr: Any
    text: str
    period: int = 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ScalarFn) and (self.text, self.period) == (
            other.text,
            other.period,
        )

    def __hash__(self) -> int:
        return hash((self.text, self.period))

    def __call__(self, captured: tuple[jax.Array, ...], *args: jax.Array) -> jax.Array:
        """The function at scalars."""
        (out,) = jex_core.jaxpr_as_fun(jex_core.ClosedJaxpr(self.jaxpr, list(captured)))(*args)
        return out

    def on_tile(
        self,
        captured: tuple[jax.Array, ...],
        b: jax.Array,
        n: jax.Array,
        t: jax.Array,
        s: jax.Array,
        score: jax.Array | None = None,
    ) -> jax.Array:
        """The function over index vectors b, n, t, s, and a score tile [b, n, t, s]: [b, n, t, s].

        What depends on a part of the indices only is computed for that part only.
        """
        if self.period:
            b = b % self.period
        lead = () if score is None else (0,)
        fn = functools.partial(self, captured)
        for axis in (3, 2, 1, 0):
            fn = jax.vmap(fn, (*lead, *(0 if a == axis else None for a in range(4))))
        scores = () if score is None else (score,)
        return fn(*scores, b, n, t, s)


def trace_score_mod(fn: ScoreMod) -> tuple[ScalarFn, tuple[jax.Array, ...]]:
    """`(program, captured arrays)` of a score_mod.

    Raises:
      TypeError: it does not return one float.

    >>> slopes = jnp.array([0.5, 0.25])
    >>> program, captured = trace_score_mod(lambda score, b, n, t, s: score - slopes[n] * (t - s))
    >>> one = jnp.int32(1)
    >>> print(program(captured, jnp.float32(3.0), one, one, one * 5, one))
    2.0
    """
    program, captured, out = _trace(fn, True)
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise TypeError(f"score_mod must return a float scalar, not {out.dtype}")
    return program, captured


def trace_mask_mod(fn: MaskMod) -> tuple[ScalarFn, tuple[jax.Array, ...]]:
    """`(program, captured arrays)` of a mask_mod, True where the key is seen.

    Raises:
      TypeError: it does not return one bool.

    >>> program, captured = trace_mask_mod(lambda b, n, t, s: s <= t)
    >>> print(program(captured, *[jnp.int32(i) for i in (0, 0, 3, 4)]))
    False
    """
    program, captured, out = _trace(fn, False)
    if out.dtype != jnp.bool_:
        raise TypeError(f"mask_mod must return a bool scalar, not {out.dtype}")
    return program, captured


def _trace(fn: Callable[..., Any], scored: bool) -> tuple[ScalarFn, tuple[jax.Array, ...], Any]:
    index = jax.ShapeDtypeStruct((), jnp.int32)
    args = (jax.ShapeDtypeStruct((), jnp.float32),) * scored + (index,) * 4
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    leaves = jax.tree.leaves(out)
    if len(leaves) != 1 or leaves[0].shape != ():
        shapes = [leaf.shape for leaf in leaves]
        raise TypeError(f"score_mod and mask_mod return one scalar; this one returns {shapes}")
    captured = tuple(jnp.asarray(c) for c in closed.consts)
    return ScalarFn(closed.jaxpr, str(closed.jaxpr)), captured, leaves[0]


# --- windows and packed sequences ----------------------------------------------------------------


def normalise_window(
    window: int | tuple[int, int] | None, causal: bool
) -> tuple[int | None, int | None]:
    """`(left, right)`: a query at t sees keys t - left .. t + right; None is unbounded.

    An int counts the keys a query sees, its own included (Hugging Face's sliding_window) and
    needs `causal`; a pair is FlashAttention's `(left, right)`, -1 unbounded.

    Raises:
      ValueError: a window below 1, a pair below -1, an int without `causal`.

    >>> normalise_window(4, causal=True), normalise_window((2, -1), causal=False)
    ((3, 0), (2, None))
    """
    if window is None:
        return None, 0 if causal else None
    if isinstance(window, int):
        if window < 1:
            raise ValueError(f"window counts keys and must be at least 1, not {window}")
        if not causal:
            raise ValueError(f"{window=} as an int needs causal=True; pass (left, right) instead")
        return window - 1, 0
    left, right = (int(w) for w in window)
    if left < -1 or right < -1:
        raise ValueError(f"window=(left, right) must be at least -1, not {(left, right)}")
    if causal:
        right = 0
    return (None if left == -1 else left), (None if right == -1 else right)


def segments_of(cu_seqlens: jax.Array, length: int, beyond: int) -> jax.Array:
    """Sequence number of each of `length` packed tokens, `beyond` after the last sequence: [T] i32.

    >>> print(segments_of(jnp.array([0, 2, 2, 5]), 7, beyond=-1))
    [ 0  0  2  2  2 -1 -1]
    """
    place = jnp.arange(length, dtype=jnp.int32)
    # unrolled: a loop on a GPU launches kernels for every step
    found = jnp.searchsorted(cu_seqlens, place, side="right", method="scan_unrolled")
    number = found.astype(jnp.int32) - 1
    return jnp.where(place < cu_seqlens[-1], number, beyond)


def packed_positions(cu_q: jax.Array, cu_kv: jax.Array, length: int) -> jax.Array:
    """Where each packed query stands on the packed keys' axis, every sequence aligned at its end.

    >>> print(packed_positions(jnp.array([0, 1, 3]), jnp.array([0, 4, 6]), 3))
    [3 4 5]
    """
    number = jnp.clip(segments_of(cu_q, length, 0), 0, cu_q.shape[0] - 2)
    ends = (cu_kv - cu_q)[1:]
    return jnp.arange(length, dtype=jnp.int32) + ends[number].astype(jnp.int32)


# --- block masks ---------------------------------------------------------------------------------

AT_ONCE = 2**22  # values of a mask that `block_mask` looks at in one step


@flax.struct.dataclass
class BlockMask:
    """Which tiles of a `mask_mod` are empty, partial or full; the size is that of the tile grid.

    Built by `block_mask`, reusable over layers and calls of the same T and S.

    Where every query sees one run of keys, every key is seen by one run of queries, and neither
    goes back as tokens go on (documents, windows, prefixes), the runs `[lo, hi)` are kept: the
    Hopper kernels take them in place of the mask_mod, as they take segment ids.  None elsewhere,
    where heads have masks of their own, and of masks that are built while something is traced.
    """

    kinds: jax.Array  # [B|1, N|1, T tiles, S tiles] i8: 0 empty, 1 partial, 2 full
    kv_counts: jax.Array  # [B|1, N|1, T tiles] i32: key tiles a query tile needs
    kv_tiles: jax.Array  # [B|1, N|1, T tiles, S tiles] i32: those first, ascending
    q_counts: jax.Array  # [B|1, N|1, S tiles] i32: query tiles a key tile needs
    q_tiles: jax.Array  # [B|1, N|1, S tiles, T tiles] i32: those first, ascending
    key_ranges: jax.Array | None  # [B|1, 2, T] i32: lo and hi of each query's keys; S, 0: no key
    query_ranges: jax.Array | None  # [B|1, 2, S] i32: lo and hi of each key's queries
    captured: tuple[jax.Array, ...]  # what the mask_mod captured
    program: ScalarFn = flax.struct.field(pytree_node=False)
    block_q: int = flax.struct.field(pytree_node=False)
    block_kv: int = flax.struct.field(pytree_node=False)
    q_length: int = flax.struct.field(pytree_node=False)
    kv_length: int = flax.struct.field(pytree_node=False)

    @property
    def sparsity(self) -> jax.Array:
        """Share of empty tiles."""
        return jnp.mean((self.kinds == 0).astype(jnp.float32))


def block_mask(
    mask_mod: MaskMod,
    q_length: int,
    kv_length: int,
    *,
    batch: int = 1,
    num_heads: int = 1,
    block_q: int = 128,
    block_kv: int = 128,
) -> BlockMask:
    """Sort the tiles of a mask into empty, partial and full, `AT_ONCE` values of it in memory.

    `batch` and `num_heads` stay 1 unless the mask differs between them.

    Raises:
      TypeError: mask_mod does not return one bool.
      ValueError: a length or block below 1.

    >>> causal = block_mask(lambda b, n, t, s: s <= t, 4, 4, block_q=2, block_kv=2)
    >>> print(causal.kinds[0, 0])
    [[1 0]
     [2... 1]]
    >>> print(causal.key_ranges[0])
    [[0 0 0 0]
     [1 2 3 4]]
    """
    sizes = (q_length, kv_length, batch, num_heads, block_q, block_kv)
    if min(sizes) < 1:
        raise ValueError(
            f"lengths and blocks must be positive: {q_length=}, {kv_length=}, {batch=}, "
            f"{num_heads=}, {block_q=}, {block_kv=}"
        )
    program, captured = trace_mask_mod(mask_mod)
    tiles_q, tiles_kv = -(-q_length // block_q), -(-kv_length // block_kv)
    per_step = min(tiles_kv, max(1, AT_ONCE // (batch * num_heads * block_q * block_kv)))
    steps, width = -(-tiles_kv // per_step), per_step * block_kv
    b, n = jnp.arange(batch, dtype=jnp.int32), jnp.arange(num_heads, dtype=jnp.int32)

    def visit(runs: Any, step: jax.Array) -> tuple[Any, jax.Array]:
        t = step // steps * block_q + jnp.arange(block_q, dtype=jnp.int32)
        s = step % steps * width + jnp.arange(width, dtype=jnp.int32)
        # Indices past the end repeat the last one: they cannot change any() or all().
        seen = program.on_tile(
            captured, b, n, jnp.minimum(t, q_length - 1), jnp.minimum(s, kv_length - 1)
        )
        tiles = seen.reshape(*seen.shape[:3], per_step, block_kv)
        some, every = tiles.any(axis=(2, 4)), tiles.all(axis=(2, 4))
        if num_heads == 1:
            seen = seen[:, 0] & (t < q_length)[None, :, None] & (s < kv_length)[None, None]
            runs = _extend(runs[0], seen, t, s), _extend(runs[1], seen.swapaxes(1, 2), s, t)
        return runs, some.astype(jnp.int8) + every.astype(jnp.int8)

    lengths = (tiles_q * block_q, kv_length), (steps * width, q_length)
    runs = tuple(_no_runs(batch, *x) for x in lengths)
    runs, kinds = jax.lax.scan(visit, runs, jnp.arange(tiles_q * steps, dtype=jnp.int32))
    ranges = None
    if num_heads == 1 and _are_ranges(*runs):
        ranges = runs[0][:, :2, :q_length], runs[1][:, :2, :kv_length]
    kinds = kinds.transpose(1, 2, 0, 3).reshape(batch, num_heads, tiles_q, steps * per_step)
    kinds = kinds[..., :tiles_kv]
    by_key = kinds.swapaxes(2, 3)
    return BlockMask(
        kinds=kinds,
        kv_counts=jnp.sum(kinds > 0, axis=3, dtype=jnp.int32),
        kv_tiles=_needed_first(kinds),
        q_counts=jnp.sum(by_key > 0, axis=3, dtype=jnp.int32),
        q_tiles=_needed_first(by_key),
        key_ranges=None if ranges is None else ranges[0],
        query_ranges=None if ranges is None else ranges[1],
        captured=captured,
        program=program,
        block_q=block_q,
        block_kv=block_kv,
        q_length=q_length,
        kv_length=kv_length,
    )


def _no_runs(batch: int, rows: int, columns: int) -> jax.Array:
    """[B, 3, rows] i32: first column of what a row sees, past the last, how many; of nothing."""
    empty = jnp.array([columns, 0, 0], jnp.int32)
    return jnp.broadcast_to(empty[None, :, None], (batch, 3, rows))


def _extend(runs: jax.Array, seen: jax.Array, rows: jax.Array, columns: jax.Array) -> jax.Array:
    """`runs` with what the tile `seen` [B, rows, columns] adds."""
    size = rows.shape[0]
    lo, hi, count = jnp.moveaxis(jax.lax.dynamic_slice_in_dim(runs, rows[0], size, 2), 1, 0)
    columns = columns[None, None]
    lo = jnp.minimum(lo, jnp.where(seen, columns, lo[..., None]).min(-1))
    hi = jnp.maximum(hi, jnp.where(seen, columns + 1, 0).max(-1))
    count = count + seen.sum(-1, dtype=jnp.int32)
    return jax.lax.dynamic_update_slice_in_dim(runs, jnp.stack([lo, hi, count], 1), rows[0], 2)


def _are_ranges(*runs: jax.Array) -> bool:
    """Whether all rows see one run each, in order; False of what is traced."""

    def ordered(runs: jax.Array) -> jax.Array:
        lo, hi, count = jnp.moveaxis(runs, 1, 0)
        before = lambda x: jax.lax.cummax(jnp.where(count > 0, x, 0), axis=1)
        held = (count == hi - lo) & (lo >= before(lo)) & (hi >= before(hi))
        return jnp.all(held | (count == 0))

    answer = ordered(runs[0]) & ordered(runs[1])
    return not isinstance(answer, Tracer) and bool(answer)


def _needed_first(kinds: jax.Array) -> jax.Array:
    return jnp.argsort(kinds == 0, axis=-1, stable=True).astype(jnp.int32)
