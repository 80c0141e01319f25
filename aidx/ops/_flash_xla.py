"""Flash attention in plain XLA: the implementation for every platform, and every option.

The forward runs over tiles of queries and, inside, over the tiles of keys that some query of the
tile can see, with the online softmax of Milakov and Gimelshein (2018); the backward recomputes the
scores tile by tile from the log-sum-exp (Dao et al. 2022).  At most one tile of scores exists at a
time.  Everything between the raw product q . k and the softmax is one function of a tile,
`_logits`, whose own vjp gives the gradients of bias, ALiBi slopes and captured arrays.

Layout inside: queries [B, K, G, T, H], keys [B, K, S, H]; G query heads share a key head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.dropout import dropout_keeps, dropout_rows

from ._flash_spec import NO_COTANGENTS, FlashOperands, FlashSpec
from ._loops import varying_like

Array = jax.Array
NEG_INF = float("-inf")
TILE_SCORES = 1 << 19  # scores of one tile over batch and heads: 2 MiB of f32, a core's cache
ONE_TILE = 1 << 21  # scores of a whole call that is not cut into tiles


class Tiles(NamedTuple):
    """Static tiling of one call; q, k and v are padded to whole tiles."""

    q: int
    kv: int
    count_q: int
    count_kv: int
    T: int
    S: int


class Product(NamedTuple):
    """What of a tile's logits is differentiated: the raw product and the float operands."""

    raw: Any  # [B, K, G, q, kv] f32
    bias: Any
    slopes: Any
    captured: Any


def choose_tiles(spec: FlashSpec, ops: FlashOperands, *, backward: bool = False) -> Tiles:
    """Tiles as asked, else those of the block mask, else by size.

    Measured on a CPU (bench/attention_cpu.py): one tile while all scores fit a cache and none can
    be skipped (of the backward, which has four arrays of them, all queries and some keys), tiles of
    256 x 256 for few heads and long sequences, 128 x 128 otherwise, wider ones where there are few
    queries.
    """
    B, T, N, _ = ops.q.shape
    S = ops.k.shape[1]
    if spec.block_mask is not None:
        q, kv = spec.block_mask
    else:
        skips = spec.left is not None or spec.right is not None or ops.q_segments is not None
        size = 256 if T >= 1024 and B * N * 256 * 256 <= TILE_SCORES else 128
        if not skips and B * N * T * S <= ONE_TILE:
            q, kv = T, max(64, TILE_SCORES // (B * N * T)) if backward else S
        elif size > T:
            q, kv = T, min(1024, max(size, TILE_SCORES // (B * N * T)))
        else:
            q, kv = size, size
        q, kv = spec.config.block_size_q or q, spec.config.block_size_kv or kv
    q, kv = max(1, min(q, T)), max(1, min(kv, S))
    return Tiles(q, kv, -(-T // q), -(-S // kv), T, S)


# --- one tile ------------------------------------------------------------------------------------


def _group(x: Array, K: int) -> Array:
    """[b, n, t, s] -> [b, K|1, G|1, t, s]."""
    b, n, t, s = x.shape
    return x.reshape(b, 1, 1, t, s) if n == 1 else x.reshape(b, K, n // K, t, s)


def _slice(x: Array, tiles: Tiles, i: Array, j: Array) -> Array:
    """The tile (i, j) of the last two axes; an axis of size 1 broadcasts."""
    if x.shape[-2] > 1:
        x = lax.dynamic_slice_in_dim(x, i * tiles.q, tiles.q, x.ndim - 2)
    if x.shape[-1] > 1:
        x = lax.dynamic_slice_in_dim(x, j * tiles.kv, tiles.kv, x.ndim - 1)
    return x


def _indices(tiles: Tiles, i: Array, j: Array) -> tuple[Array, Array]:
    t = i * tiles.q + jnp.arange(tiles.q, dtype=jnp.int32)
    s = j * tiles.kv + jnp.arange(tiles.kv, dtype=jnp.int32)
    return t, s


def _positions(spec: FlashSpec, ops: FlashOperands, tiles: Tiles, i: Array) -> Array:
    """Positions of the tile's queries on the keys' axis: [b, q]."""
    if ops.q_positions is not None:
        return lax.dynamic_slice_in_dim(ops.q_positions, i * tiles.q, tiles.q, 1)
    offset = (spec.query_offset or 0) + i * tiles.q
    return (offset + jnp.arange(tiles.q, dtype=jnp.int32))[None]


def _heads(ops: FlashOperands) -> tuple[int, int, int]:
    """(B, K, G)."""
    B, _, N, _ = ops.q.shape
    K = ops.k.shape[2]
    return B, K, N // K


def _logits(
    spec: FlashSpec, ops: FlashOperands, tiles: Tiles, i: Array, j: Array, x: Product
) -> Array:
    """Logits of a tile before masking: soft cap, bias, ALiBi, score_mod."""
    B, K, G = _heads(ops)
    logits = x.raw * spec.scale
    if spec.soft_cap is not None:
        logits = spec.soft_cap * jnp.tanh(logits / spec.soft_cap)
    if x.bias is not None:
        logits = logits + x.bias
    t, s = _indices(tiles, i, j)
    if x.slopes is not None:
        away = jnp.abs(_positions(spec, ops, tiles, i)[:, :, None] - s[None, None, :])
        slopes = x.slopes.reshape(-1, K, G, 1, 1)
        logits = logits - slopes * away.astype(jnp.float32)[:, None, None]
    if spec.score_mod is not None:
        b, n = jnp.arange(B, dtype=jnp.int32), jnp.arange(K * G, dtype=jnp.int32)
        flat = logits.reshape(B, K * G, tiles.q, tiles.kv)
        t, s = jnp.minimum(t, tiles.T - 1), jnp.minimum(s, tiles.S - 1)
        flat = spec.score_mod.on_tile(x.captured, b, n, t, s, score=flat)
        logits = flat.astype(jnp.float32).reshape(logits.shape)
    return logits


def _visible(spec: FlashSpec, ops: FlashOperands, tiles: Tiles, i: Array, j: Array) -> Any:
    """Which scores of a tile exist: bool broadcastable to [B, K, G, q, kv], or None for all."""
    B, K, G = _heads(ops)
    t, s = _indices(tiles, i, j)
    shown: list[Array] = []
    if spec.left is not None or spec.right is not None:
        ahead = s[None, None, :] - _positions(spec, ops, tiles, i)[:, :, None]  # [b, q, kv]
        if spec.left is not None:
            shown.append((ahead >= -spec.left)[:, None, None])
        if spec.right is not None:
            shown.append((ahead <= spec.right)[:, None, None])
    if tiles.count_kv * tiles.kv != tiles.S:
        shown.append((s < tiles.S)[None, None, None, None, :])
    if ops.kv_lens is not None:
        shown.append((s[None, :] < ops.kv_lens[:, None])[:, None, None, None, :])
    if ops.q_lens is not None:
        shown.append((t[None, :] < ops.q_lens[:, None])[:, None, None, :, None])
    if ops.q_segments is not None:
        rows = lax.dynamic_slice_in_dim(ops.q_segments, i * tiles.q, tiles.q, 1)
        columns = lax.dynamic_slice_in_dim(ops.kv_segments, j * tiles.kv, tiles.kv, 1)
        shown.append((rows[:, :, None] == columns[:, None, :])[:, None, None])
    if ops.mask is not None:
        shown.append(_group(_slice(ops.mask, tiles, i, j), K))
    b, n = jnp.arange(B, dtype=jnp.int32), jnp.arange(K * G, dtype=jnp.int32)
    t, s = jnp.minimum(t, tiles.T - 1), jnp.minimum(s, tiles.S - 1)
    for program, captured in (
        (spec.mask_mod, ops.mask_captured),
        (spec.block_mask_mod, ops.block_captured),
    ):
        if program is not None:
            shown.append(_group(program.on_tile(captured, b, n, t, s), K))
    if not shown:
        return None
    seen = shown[0]
    for more in shown[1:]:
        seen = seen & more
    return seen


def _kept(spec: FlashSpec, ops: FlashOperands, tiles: Tiles, i: Array, j: Array) -> Array:
    """Which scores dropout keeps: bool [B, K, G, q, kv]."""
    B, K, G = _heads(ops)
    t, s = _indices(tiles, i, j)
    b = jnp.arange(B, dtype=jnp.int32)
    if spec.batch_period:
        b = b % spec.batch_period
    n = jnp.arange(K * G, dtype=jnp.int32)
    if spec.dropout_broadcast:
        b, n = b * 0, n * 0
    rows = dropout_rows(
        ops.dropout_key[:, None, None, :], b[:, None, None], n[None, :, None], t[None, None, :]
    )
    return dropout_keeps(
        rows.reshape(B, K, G, tiles.q, 1), s.reshape(1, 1, 1, 1, tiles.kv), spec.dropout_rate
    )


# --- which tiles ---------------------------------------------------------------------------------


def needed_tiles(spec: FlashSpec, ops: FlashOperands, tiles: Tiles) -> Array:
    """Which tiles hold a score that exists for some row of the batch: bool [count_q, count_kv].

    A tile of other segments is ruled out by the ranges of the ids, so ascending ids skip exactly.
    """
    i = jnp.arange(tiles.count_q, dtype=jnp.int32)
    j = jnp.arange(tiles.count_kv, dtype=jnp.int32)
    first, last = j * tiles.kv, jnp.minimum((j + 1) * tiles.kv, tiles.S) - 1  # keys
    if ops.q_positions is not None:
        # Padded rows repeat a real one, so the range of a tile is that of its real rows.
        rows = ops.q_positions.reshape(-1, tiles.count_q, tiles.q)
        low, high = rows.min(axis=(0, 2)), rows.max(axis=(0, 2))
    else:
        low = (spec.query_offset or 0) + i * tiles.q
        high = (spec.query_offset or 0) + jnp.minimum((i + 1) * tiles.q, tiles.T) - 1
    needed = jnp.ones((tiles.count_q, tiles.count_kv), bool)
    if spec.left is not None:
        needed &= last[None, :] >= low[:, None] - spec.left
    if spec.right is not None:
        needed &= first[None, :] <= high[:, None] + spec.right
    if ops.kv_lens is not None:
        needed &= (first < ops.kv_lens.max())[None, :]
    if ops.q_lens is not None:
        needed &= (i * tiles.q < ops.q_lens.max())[:, None]
    if ops.q_segments is not None:
        rows = ops.q_segments.reshape(-1, tiles.count_q, tiles.q)
        columns = ops.kv_segments.reshape(-1, tiles.count_kv, tiles.kv)
        apart = rows.max(2)[:, :, None] < columns.min(2)[:, None, :]
        apart |= rows.min(2)[:, :, None] > columns.max(2)[:, None, :]
        needed &= ~apart.all(0)
    if ops.block_kinds is not None:
        needed &= (ops.block_kinds > 0).any(axis=(0, 1))
    return needed


def _has_gaps(ops: FlashOperands) -> bool:
    """Whether the needed tiles of a row may have holes between the first and the last."""
    return ops.q_segments is not None or ops.block_kinds is not None


def _over_needed(needed: Array, gaps: bool, body: Callable[[Array, Any], Any], init: Any) -> Any:
    """fori_loop from the first to past the last needed tile of a vector, stepping over holes."""
    n = needed.shape[0]
    first = jnp.argmax(needed).astype(jnp.int32)
    past = jnp.where(needed.any(), n - jnp.argmax(needed[::-1]), first).astype(jnp.int32)
    if gaps:
        return lax.fori_loop(
            first, past, lambda j, c: lax.cond(needed[j], body, lambda _, c: c, j, c), init
        )
    return lax.fori_loop(first, past, body, init)


# --- layout --------------------------------------------------------------------------------------


def _pad(x: Any, axis: int, to: int, value: float | int | bool = 0) -> Any:
    if x is None or x.shape[axis] in (1, to):
        return x
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, to - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value)


def _padded(ops: FlashOperands, tiles: Tiles) -> FlashOperands:
    """Masks, bias, ids and positions padded to whole tiles."""
    T, S = tiles.count_q * tiles.q, tiles.count_kv * tiles.kv
    positions = ops.q_positions
    if positions is not None and positions.shape[1] != T:
        positions = jnp.pad(positions, ((0, 0), (0, T - positions.shape[1])), mode="edge")
    pad2 = lambda x, value: _pad(_pad(x, 2, T, value), 3, S, value)

    def segments(x: Any, to: int) -> Any:
        if x is None or x.shape[1] == to:
            return x
        # A repeated last id keeps the range of the tile; the length masks hide the padding.
        return jnp.pad(x, ((0, 0), (0, to - x.shape[1])), mode="edge")

    return ops._replace(
        bias=pad2(ops.bias, 0),
        mask=pad2(ops.mask, False),
        q_positions=positions,
        q_segments=segments(ops.q_segments, T),
        kv_segments=segments(ops.kv_segments, S),
    )


def _ends(ops: FlashOperands) -> tuple[Any, Any]:
    """How many queries and keys of a row exist, [b]; None: all."""
    ends = lambda lens, borders: borders[:, -1] if lens is None and borders is not None else lens
    return ends(ops.q_lens, ops.q_borders), ends(ops.kv_lens, ops.kv_borders)


def _blank(x: Array, end: Any) -> Array:
    """Zeros past the end of [B, T, *]: a NaN there, times a probability of 0, would be NaN."""
    if end is None:
        return x
    there = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < end[:, None]
    return jnp.where(there.reshape(*there.shape, *(1,) * (x.ndim - 2)), x, 0)


def _blanked(ops: FlashOperands) -> FlashOperands:
    q_end, kv_end = _ends(ops)
    return ops._replace(q=_blank(ops.q, q_end), k=_blank(ops.k, kv_end), v=_blank(ops.v, kv_end))


def _queries(x: Array, tiles: Tiles, K: int) -> Array:
    """[B, T, N, *] -> padded [B, K, G, T', *]."""
    B, T, N = x.shape[:3]
    x = x.reshape(B, T, K, N // K, *x.shape[3:])
    x = jnp.moveaxis(x, 1, 3)
    return _pad_exact(x, 3, tiles.count_q * tiles.q)


def _keys(x: Array, tiles: Tiles) -> Array:
    """[B, S, K, H] -> padded [B, K, S', H]."""
    return _pad_exact(x.transpose(0, 2, 1, 3), 2, tiles.count_kv * tiles.kv)


def _pad_exact(x: Array, axis: int, to: int, value: float = 0) -> Array:
    widths = [(0, 0)] * x.ndim
    widths[axis] = (0, to - x.shape[axis])
    return jnp.pad(x, widths, constant_values=value) if to != x.shape[axis] else x


def _from_queries(x: Array, T: int) -> Array:
    """[B, K, G, T', *] -> [B, T, N, *]."""
    x = jnp.moveaxis(x[:, :, :, :T], 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def _dot(x: Array, y: Array, contract: str, spec: FlashSpec) -> Array:
    """Batched product over (B, K) in f32; f32 inputs at the precision of the configuration."""
    precision = "highest" if x.dtype == jnp.float32 and spec.config.precision == "highest" else None
    return jnp.einsum(contract, x, y, precision=precision, preferred_element_type=jnp.float32)


# --- forward -------------------------------------------------------------------------------------


class Running(NamedTuple):
    """Online softmax of a query tile over the keys so far, f32."""

    m: Array  # [B, K, G, q] largest logit
    total: Array  # [B, K, G, q] sum of exp(logit - m)
    acc: Array  # [B, K, G, q, Hv] sum of exp(logit - m) * v, dropout applied


def forward(spec: FlashSpec, operands: FlashOperands) -> tuple[Array, Array]:
    """(out [B, T, N, Hv], lse [B, T, N])."""
    B, K, G = _heads(operands)
    T, S = operands.q.shape[1], operands.k.shape[1]
    if min(B, T, S, K) == 0:
        out = jnp.zeros((*operands.q.shape[:3], operands.v.shape[3]), operands.q.dtype)
        return out, jnp.full(operands.q.shape[:3], NEG_INF, jnp.float32)
    tiles = choose_tiles(spec, operands)
    ops = _padded(_blanked(operands), tiles)
    q, k, v = _queries(ops.q, tiles, K), _keys(ops.k, tiles), _keys(ops.v, tiles)
    needed = needed_tiles(spec, ops, tiles)
    sinks = None if ops.sinks is None else ops.sinks.reshape(-1, K, G, 1)

    def query_tile(i: Array) -> tuple[Array, Array]:
        q_i = lax.dynamic_slice_in_dim(q, i * tiles.q, tiles.q, 3)
        step = lambda j, running: _key_tile(spec, ops, tiles, i, j, q_i, k, v, running)
        if tiles.count_kv == 1:
            running = step(jnp.int32(0), None)
        else:
            start = Running(
                jnp.full((B, K, G, tiles.q), NEG_INF, jnp.float32),
                jnp.zeros((B, K, G, tiles.q), jnp.float32),
                jnp.zeros((B, K, G, tiles.q, v.shape[-1]), jnp.float32),
            )
            start = varying_like(start, (operands, i))
            running = _over_needed(needed[i], _has_gaps(ops), step, start)
        out, lse = _normalised(running, sinks)
        return out.astype(operands.q.dtype), lse

    if tiles.count_q == 1:
        out, lse = query_tile(jnp.int32(0))
    else:
        out, lse = lax.map(query_tile, jnp.arange(tiles.count_q, dtype=jnp.int32))
        out = jnp.moveaxis(out, 0, 3).reshape(B, K, G, -1, v.shape[-1])
        lse = jnp.moveaxis(lse, 0, 3).reshape(B, K, G, -1)
    return _from_queries(out, T), _from_queries(lse, T)


def _key_tile(
    spec: FlashSpec,
    ops: FlashOperands,
    tiles: Tiles,
    i: Array,
    j: Array,
    q_i: Array,
    k: Array,
    v: Array,
    running: Running | None,
) -> Running:
    """One more tile of keys; None is the softmax over no keys yet."""
    k_j = lax.dynamic_slice_in_dim(k, j * tiles.kv, tiles.kv, 2)
    v_j = lax.dynamic_slice_in_dim(v, j * tiles.kv, tiles.kv, 2)
    with jax.named_scope("scores"):
        x = _masked_logits(spec, ops, tiles, i, j, _dot(q_i, k_j, "bkgth,bksh->bkgts", spec))
    with jax.named_scope("softmax"):
        m = x.max(axis=-1)
        m = m if running is None else jnp.maximum(running.m, m)
        finite = jnp.where(m == NEG_INF, 0.0, m)
        p = jnp.exp(x - finite[..., None])
        total = p.sum(axis=-1)
    if spec.dropout_rate:
        p = jnp.where(_kept(spec, ops, tiles, i, j), p / (1.0 - spec.dropout_rate), 0.0)
    with jax.named_scope("values"):
        acc = _dot(p.astype(v.dtype), v_j, "bkgts,bksh->bkgth", spec)
    if running is None:
        return Running(m, total, acc)
    shrink = jnp.exp(running.m - finite)
    return Running(m, running.total * shrink + total, running.acc * shrink[..., None] + acc)


def _normalised(running: Running, sinks: Any) -> tuple[Array, Array]:
    """(out f32, lse) of a finished softmax."""
    m, total, acc = running
    lse = jnp.where(total > 0, m + jnp.log(jnp.where(total > 0, total, 1.0)), NEG_INF)
    if sinks is not None:
        # The sink is one more logit with no value: it only enlarges the denominator.
        top = jnp.maximum(m, sinks)
        acc = acc * jnp.exp(m - top)[..., None]
        total = total * jnp.exp(m - top) + jnp.exp(sinks - top)
    return acc / jnp.where(total > 0, total, 1.0)[..., None], lse


def _masked_logits(
    spec: FlashSpec, ops: FlashOperands, tiles: Tiles, i: Array, j: Array, raw: Array
) -> Array:
    x = _logits(spec, ops, tiles, i, j, _product(ops, tiles, i, j, raw))
    seen = _visible(spec, ops, tiles, i, j)
    return x if seen is None else jnp.where(seen, x, NEG_INF)


def _product(ops: FlashOperands, tiles: Tiles, i: Array, j: Array, raw: Array) -> Product:
    K = ops.k.shape[2]
    bias = (
        None if ops.bias is None else _group(_slice(ops.bias, tiles, i, j), K).astype(jnp.float32)
    )
    return Product(raw, bias, ops.alibi_slopes, ops.score_captured)


# --- backward ------------------------------------------------------------------------------------


class Sums(NamedTuple):
    """What the backward adds up over all tiles, f32."""

    dq: Array  # [B, K, G, T', H]
    bias: Any  # bias's shape, padded
    slopes: Any  # [b, N]
    captured: tuple[Any, ...]  # of the float arrays only


def backward(
    spec: FlashSpec,
    operands: FlashOperands,
    outputs: tuple[Array, Array],
    cotangents: tuple[Array, Array],
) -> FlashOperands:
    """Cotangents of the operands, None where there is none (integers and masks).

    With p the probabilities, D = sum_s p dp and the sink's share removed from D's rows:
    ds = p * (dp - D) + p_without_sink * d_lse; the rest is products of p and ds with the inputs.
    """
    B, K, _ = _heads(operands)
    T, S = operands.q.shape[1], operands.k.shape[1]
    floats = tuple(jnp.issubdtype(c.dtype, jnp.inexact) for c in operands.score_captured)
    if min(B, T, S, K) == 0:
        return no_gradients(operands)
    tiles = choose_tiles(spec, operands, backward=True)
    ops = _padded(_blanked(operands), tiles)
    out, lse = outputs
    d_out, d_lse = _blank(cotangents[0], _ends(operands)[0]), cotangents[1]
    q, k, v = _queries(ops.q, tiles, K), _keys(ops.k, tiles), _keys(ops.v, tiles)
    do = _queries(d_out, tiles, K)
    with jax.named_scope("delta"):
        delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
        total = lse
        if ops.sinks is not None:
            sinks = jnp.broadcast_to(ops.sinks[:, None, :], lse.shape)
            total = jnp.logaddexp(lse, sinks)
            d_sinks = -jnp.exp(sinks - total) * delta
        empty = lse == NEG_INF
        # p = exp(x - total): an empty row gets total = +inf, so that all its p are zero.
        without_sink = jnp.where(empty, 0.0, jnp.exp(jnp.minimum(total - lse, 80.0)))
        delta = delta - jnp.where(empty, 0.0, d_lse) * without_sink
        total = jnp.where(empty, jnp.inf, total)
        pad = tiles.count_q * tiles.q
        delta = _pad_exact(_queries_rows(delta, K), 3, pad)
        total = _pad_exact(_queries_rows(total, K), 3, pad, jnp.inf)
    needed = needed_tiles(spec, ops, tiles)

    def key_tile(sums: Sums, j: Array) -> tuple[Sums, tuple[Array, Array]]:
        k_j = lax.dynamic_slice_in_dim(k, j * tiles.kv, tiles.kv, 2)
        v_j = lax.dynamic_slice_in_dim(v, j * tiles.kv, tiles.kv, 2)

        def query_tile(i: Array, carry: tuple[Array, Array, Sums]) -> tuple[Array, Array, Sums]:
            dk, dv, sums = carry
            rows = lambda x: lax.dynamic_slice_in_dim(x, i * tiles.q, tiles.q, 3)
            q_i, do_i = rows(q), rows(do)
            raw = _dot(q_i, k_j, "bkgth,bksh->bkgts", spec)
            x, pull = _tile_vjp(spec, ops, tiles, i, j, raw, floats)
            p = jnp.exp(x - rows(total)[..., None])
            dp = _dot(do_i, v_j, "bkgth,bksh->bkgts", spec)
            kept = p
            if spec.dropout_rate:
                keep = _kept(spec, ops, tiles, i, j)
                kept = jnp.where(keep, p / (1.0 - spec.dropout_rate), 0.0)
                dp = jnp.where(keep, dp / (1.0 - spec.dropout_rate), 0.0)
            dv = dv + _dot(kept.astype(v.dtype), do_i, "bkgts,bkgth->bksh", spec)
            d = pull(p * (dp - rows(delta)[..., None]))
            ds = d.raw.astype(q.dtype)
            dk = dk + _dot(ds, q_i, "bkgts,bkgth->bksh", spec)
            dq_i = _dot(ds, k_j, "bkgts,bksh->bkgth", spec)
            return dk, dv, _add(sums, d, dq_i, tiles, i, j)

        zeros = (jnp.zeros(k_j.shape, jnp.float32), jnp.zeros(v_j.shape, jnp.float32))
        zeros = varying_like(zeros, (operands, cotangents))
        dk, dv, sums = _over_needed(needed[:, j], _has_gaps(ops), query_tile, (*zeros, sums))
        return sums, (dk.astype(k.dtype), dv.astype(v.dtype))

    like = lambda x: None if x is None else jnp.zeros(x.shape, jnp.float32)
    start = Sums(
        jnp.zeros(q.shape, jnp.float32),
        like(ops.bias),
        like(ops.alibi_slopes),
        tuple(like(c) for c, f in zip(ops.score_captured, floats, strict=True) if f),
    )
    start = varying_like(start, (operands, cotangents))
    sums, (dk, dv) = lax.scan(key_tile, start, jnp.arange(tiles.count_kv, dtype=jnp.int32))
    grads = no_gradients(operands)
    if operands.sinks is not None:
        summed = d_sinks.sum(axis=1)
        summed = summed if operands.sinks.shape[0] == B else summed.sum(axis=0, keepdims=True)
        grads = grads._replace(sinks=summed.astype(operands.sinks.dtype))
    if operands.bias is not None:
        grads = grads._replace(bias=_cut(sums.bias, operands.bias))
    if operands.alibi_slopes is not None:
        grads = grads._replace(alibi_slopes=sums.slopes.astype(operands.alibi_slopes.dtype))
    found = iter(sums.captured)
    captured = tuple(
        next(found).astype(c.dtype) if f else None
        for c, f in zip(operands.score_captured, floats, strict=True)
    )
    return grads._replace(
        q=_from_queries(sums.dq, T).astype(operands.q.dtype),
        k=_from_keys(dk, S),
        v=_from_keys(dv, S),
        score_captured=captured,
    )


def _tile_vjp(
    spec: FlashSpec,
    ops: FlashOperands,
    tiles: Tiles,
    i: Array,
    j: Array,
    raw: Array,
    floats: tuple[bool, ...],
) -> tuple[Array, Callable[[Array], Product]]:
    """Masked logits of a tile and the pullback to its raw product and float operands."""

    def masked(x: Product) -> Array:
        given = iter(x.captured)
        captured = tuple(
            next(given) if f else c for c, f in zip(ops.score_captured, floats, strict=True)
        )
        y = _logits(spec, ops, tiles, i, j, x._replace(captured=captured))
        seen = _visible(spec, ops, tiles, i, j)
        return y if seen is None else jnp.where(seen, y, NEG_INF)

    x = _product(ops, tiles, i, j, raw)
    x = x._replace(captured=tuple(c for c, f in zip(x.captured, floats, strict=True) if f))
    y, pull = jax.vjp(masked, x)
    return y, lambda ds: pull(ds)[0]


def _add(sums: Sums, d: Product, dq_i: Array, tiles: Tiles, i: Array, j: Array) -> Sums:
    """The sums with one tile's cotangents added in place."""
    at = (0, 0, 0, i * tiles.q, 0)
    dq = lax.dynamic_update_slice(sums.dq, lax.dynamic_slice(sums.dq, at, dq_i.shape) + dq_i, at)
    bias = sums.bias
    if bias is not None:
        part = d.bias.astype(jnp.float32).reshape(*bias.shape[:2], *d.bias.shape[-2:])
        at = (
            0,
            0,
            i * tiles.q if bias.shape[2] > 1 else 0,
            j * tiles.kv if bias.shape[3] > 1 else 0,
        )
        bias = lax.dynamic_update_slice(bias, lax.dynamic_slice(bias, at, part.shape) + part, at)
    slopes = None if sums.slopes is None else sums.slopes + d.slopes.astype(jnp.float32)
    captured = tuple(
        a + b.astype(jnp.float32) for a, b in zip(sums.captured, d.captured, strict=True)
    )
    return Sums(dq, bias, slopes, captured)


def no_gradients(operands: FlashOperands) -> FlashOperands:
    """Zero cotangents of what is differentiable, None of the rest."""
    floats = [jnp.issubdtype(c.dtype, jnp.inexact) for c in operands.score_captured]
    like = lambda x: None if x is None else jnp.zeros_like(x)
    return NO_COTANGENTS._replace(
        q=like(operands.q),
        k=like(operands.k),
        v=like(operands.v),
        bias=like(operands.bias),
        alibi_slopes=like(operands.alibi_slopes),
        sinks=like(operands.sinks),
        score_captured=tuple(
            like(c) if f else None for c, f in zip(operands.score_captured, floats, strict=True)
        ),
        mask_captured=(None,) * len(operands.mask_captured),
        block_captured=(None,) * len(operands.block_captured),
    )


def _queries_rows(x: Array, K: int) -> Array:
    """[B, T, N] -> [B, K, G, T]."""
    B, T, N = x.shape
    return jnp.moveaxis(x.reshape(B, T, K, N // K), 1, 3)


def _from_keys(x: Array, S: int) -> Array:
    """Scanned [count, B, K, kv, H] -> [B, S, K, H]."""
    x = jnp.moveaxis(x, 0, 2)
    x = x.reshape(*x.shape[:2], -1, x.shape[-1])[:, :, :S]
    return x.transpose(0, 2, 1, 3)


def _cut(x: Array, like: Array) -> Array:
    return x[:, :, : like.shape[2], : like.shape[3]].astype(like.dtype)


def weights(spec: FlashSpec, operands: FlashOperands) -> tuple[Array, Array, Array]:
    """(out, lse, probabilities [B, N, T, S]), all scores at once; differentiable by jax itself.

    The probabilities are those that multiplied v: the sink's share and dropped ones are gone.
    """
    B, K, G = _heads(operands)
    T, S = operands.q.shape[1], operands.k.shape[1]
    N, tiles = K * G, Tiles(T, S, 1, 1, T, S)
    operands, zero = _blanked(operands), jnp.int32(0)
    q, k, v = _queries(operands.q, tiles, K), _keys(operands.k, tiles), _keys(operands.v, tiles)
    raw = _dot(q, k, "bkgth,bksh->bkgts", spec)
    x = _masked_logits(spec, operands, tiles, zero, zero, raw)
    top = x.max(axis=-1, initial=NEG_INF)
    sinks = None if operands.sinks is None else operands.sinks.reshape(-1, K, G, 1)
    if sinks is not None:
        top = jnp.maximum(top, sinks)
    top = lax.stop_gradient(jnp.where(top == NEG_INF, 0.0, top))
    p = jnp.exp(x - top[..., None])
    total = p.sum(axis=-1)
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), NEG_INF)
    if sinks is not None:
        total = total + jnp.exp(sinks - top)
    p = p / jnp.where(total > 0, total, 1.0)[..., None]
    if spec.dropout_rate:
        keep = _kept(spec, operands, tiles, zero, zero)
        p = jnp.where(keep, p / (1.0 - spec.dropout_rate), 0.0)
    out = _dot(p.astype(v.dtype), v, "bkgts,bksh->bkgth", spec).astype(operands.q.dtype)
    return _from_queries(out, T), _from_queries(lse, T), p.reshape(B, N, T, S)
