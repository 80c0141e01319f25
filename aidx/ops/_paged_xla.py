"""Paged attention in plain XLA: every platform, every option, work that follows the real contexts.

Two ways to go over the keys, both a loop whose trip count is known on the device only:

- `_rows`: rows with few queries (decode, verification).  The chunks of all rows form one list of
  work items, (row, chunk); every trip takes the next items of the list whatever their rows, so a
  long row among short ones costs its own chunks and no more.
- `_tiles`: rows with many queries (prefill).  One tile of queries after the other goes over the
  chunks that its last query can see.

Both gather a chunk of blocks once for all queries of the item and all heads that share a key head.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._loops import varying_like
from ._paged_spec import PagedOperands, PagedSpec

Array = jax.Array
NEG_INF = float("-inf")
FEW = 8  # queries of a row up to which all rows go through the work list
CHUNK = 32  # keys of a chunk of `_rows`: the last of a row wastes half of it (four times, if alone)
TILE_Q, TILE_CHUNK = 64, 256  # queries and keys of `_tiles`
ITEMS = 128  # work items of a trip, at most
PER_ROW = 4  # work items of a trip for each row, at most
SEPARATE = 8  # queries of an item (of all heads that share a key) up to which blocks stay apart


class Partial(NamedTuple):
    """Softmax over a part of the keys: out is not divided by the total yet."""

    m: Array  # [..., K, Q * G] largest logit
    total: Array  # [..., K, Q * G] sum of exp(logit - m)
    acc: Array  # [..., K, Q * G, Hv]


class Rows(NamedTuple):
    """Rows of queries and the keys `first <= s < context` that they go over."""

    tables: Array  # [R, M]
    context: Array  # [R]
    first: Array  # [R]
    start: Array  # [R] index of the first query
    count: Array  # [R] queries


class Queries(NamedTuple):
    """The queries of some items, gathered: index i of Q counts the row's new tokens from `at`."""

    q: Array  # [U, K, Q * G, H]
    token: Array  # [U, Q] index into T
    index: Array  # [U, Q] i
    real: Array  # [U, Q] whether there is such a query
    position: Array  # [U, Q] for window and ALiBi


def forward(spec: PagedSpec, ops: PagedOperands) -> tuple[Array, Array]:
    """(out [T, N, Hv], lse [T, N])."""
    T, N, _ = ops.q.shape
    R = ops.block_tables.shape[0]
    if T == 0 or R == 0 or ops.block_tables.shape[1] == 0:
        return (
            jnp.zeros((T, N, ops.v_pool.shape[3]), ops.q.dtype),
            jnp.full((T, N), NEG_INF, jnp.float32),
        )
    out, lse = _own(spec, ops)
    if ops.shared_tables is not None:
        with jax.named_scope("cascade"):
            out, lse = _merge_outputs((out, lse), _shared(spec, ops))
    if ops.sinks is not None:
        # The sink is one more logit with no value.
        out = out * jax.nn.sigmoid(lse - ops.sinks[None])[..., None]
    return out.astype(ops.q.dtype), lse


def _own(spec: PagedSpec, ops: PagedOperands) -> tuple[Array, Array]:
    """Every row over its own table, past what it shares."""
    start, count = ops.q_indptr[:-1], jnp.diff(ops.q_indptr)
    first = jnp.zeros_like(start)
    if ops.shared_group is not None:
        group = ops.shared_group
        first = jnp.where(group >= 0, ops.shared_lens[jnp.maximum(group, 0)], 0)
    rows = Rows(ops.block_tables, ops.context_lens, first, start, count)
    if spec.max_q <= FEW:
        return _rows(spec, ops, rows, spec.max_q)
    # Single queries would fill a tile of `_tiles` with padding: they go through the work list.
    single = rows._replace(count=jnp.where(count == 1, 1, 0))
    many = rows._replace(count=jnp.where(count == 1, 0, count))
    out, lse = _rows(spec, ops, single, 1)
    more, more_lse = _tiles(spec, ops, many)
    is_single = (single.count[_row_of_tokens(ops)] == 1)[:, None]
    return jnp.where(is_single[..., None], out, more), jnp.where(is_single, lse, more_lse)


def _row_of_tokens(ops: PagedOperands) -> Array:
    """The row that owns each token, clipped to a row where none does: [T]."""
    tokens = jnp.arange(ops.q.shape[0], dtype=jnp.int32)
    row = jnp.searchsorted(ops.q_indptr, tokens, side="right").astype(jnp.int32) - 1
    return jnp.clip(row, 0, ops.block_tables.shape[0] - 1)


# --- one chunk of keys ---------------------------------------------------------------------------


def _positions(ops: PagedOperands, rows: Rows, row: Array, index: Array, token: Array) -> Array:
    """Where queries stand: given, or context - n + i."""
    if ops.positions is not None:
        return ops.positions[token]
    return (rows.context - rows.count)[row][..., None] + index


def _take(ops: PagedOperands, rows: Rows, row: Array, at: Array, Q: int) -> Queries:
    """Queries at .. at + Q of each item's row."""
    T, N, H = ops.q.shape
    K = ops.k_pool.shape[1]
    index = at[:, None] + jnp.arange(Q, dtype=jnp.int32)[None]
    real = index < rows.count[row][:, None]
    token = jnp.clip(rows.start[row][:, None] + index, 0, T - 1)
    q = ops.q[token].reshape(*token.shape, K, N // K, H)
    q = q.transpose(0, 2, 1, 3, 4).reshape(token.shape[0], K, Q * (N // K), H)
    return Queries(q, token, index, real, _positions(ops, rows, row, index, token))


def _key_positions(ops: PagedOperands, rows: Rows, row: Array, s: Array, old: Array) -> Array:
    """Where keys stand: their index, or what `positions` says of the new tokens."""
    if ops.positions is None:
        return s
    new = jnp.clip(rows.start[row][:, None] + s - old, 0, ops.q.shape[0] - 1)
    return jnp.where(s >= old, ops.positions[new], s)


def _seen(
    spec: PagedSpec, ops: PagedOperands, rows: Rows, row: Array, x: Queries, s: Array, past: bool
) -> tuple[Array, Array]:
    """(which keys each query sees, distance to them): [U, Q, C].

    `past` says that the keys are a shared prefix: older than every query, so causality is settled.
    """
    context = rows.context[row][:, None]
    old = context if past else context - rows.count[row][:, None]
    where = s if past else _key_positions(ops, rows, row, s, old)
    away = x.position[:, :, None] - where[:, None, :]
    seen = x.real[:, :, None] & ((s < context) & (s >= rows.first[row][:, None]))[:, None, :]
    if not past:
        j = (s - old)[:, None, :]  # index among the new tokens, negative for old keys
        if ops.tree_mask is None:
            seen &= j <= x.index[:, :, None]
        else:
            seen &= (j < 0) | _tree_bit(ops.tree_mask[x.token], j)
    if spec.window is not None:
        seen &= away < spec.window
    return seen, away


def _tree_bit(words: Array, j: Array) -> Array:
    """Bit j of `words` [U, Q, W] at j [U, 1, C]: bool [U, Q, C]; beyond the words none is set."""
    number = words.shape[2]
    U, Q, C = words.shape[0], words.shape[1], j.shape[2]
    at = jnp.clip(j // 32, 0, number - 1)
    word = jnp.take_along_axis(words, jnp.broadcast_to(at, (U, Q, C)), axis=2)
    bit = (word >> (j % 32).astype(jnp.uint32)) & 1
    return (bit == 1) & (j >= 0) & (j < 32 * number)


def _blocks(pool: Array, blocks: Array, joined: bool) -> Array:
    """Blocks [U, n] of a pool [P, K, block_size, ...] as they lie: [U, n, K, block_size, ...].

    `joined` puts them side by side, [U, 1, K, n * block_size, ...], which moves every value again.
    """
    # Rows of a matrix: XLA's CPU compiler then copies a block as one run.
    x = pool.reshape(pool.shape[0], -1).at[blocks].get(mode="clip")
    x = x.reshape(*blocks.shape, *pool.shape[1:])
    if not joined:
        return x
    x = jnp.moveaxis(x, 2, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, None]


def _scale_of(scale: Array, blocks: Array, joined: bool) -> Array:
    """Scales of a chunk's keys: [U, n, K, 1, block_size] or [1, 1, K, 1, 1]."""
    if scale.ndim == 1:
        return scale[None, None, :, None, None]
    return _blocks(scale, blocks, joined)[:, :, :, None, :]


def _chunk(
    spec: PagedSpec,
    ops: PagedOperands,
    rows: Rows,
    row: Array,
    chunk: Array,
    size: int,
    x: Queries,
    past: bool = False,
) -> Partial:
    """Items (row, chunk) [U]: their queries over the `size` keys from `chunk * size`."""
    block_size = ops.k_pool.shape[2]
    K, G = ops.k_pool.shape[1], ops.q.shape[1] // ops.k_pool.shape[1]
    U, Q = x.token.shape
    n = size // block_size
    columns = chunk[:, None] * n + jnp.arange(n, dtype=jnp.int32)[None]
    blocks = rows.tables[row[:, None], jnp.minimum(columns, rows.tables.shape[1] - 1)]
    s = chunk[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None]
    # A table narrower than a whole number of chunks repeats its last block: not keys of the row.
    s = jnp.where(s < rows.tables.shape[1] * block_size, s, jnp.iinfo(jnp.int32).max // 2)
    seen, away = _seen(spec, ops, rows, row, x, s, past)
    # With few queries the keys are what costs: each block is a product of its own, read as it was
    # copied.  With many, larger products are worth putting the blocks side by side.
    few = Q * G <= SEPARATE
    joined = n > 1 and not few
    parts = 1 if joined else n

    def by_part(a: Array) -> Array:
        """[U, Q, C] -> [U, parts, 1, Q * G, C / parts]."""
        a = jnp.swapaxes(a.reshape(U, Q, parts, size // parts), 1, 2)
        a = jnp.broadcast_to(a[:, :, :, None], (U, parts, Q, G, size // parts))
        return a.reshape(U, parts, 1, Q * G, size // parts)

    # A slot nobody sees may hold NaN, and 0 * NaN is NaN.
    live = seen.any(axis=1).reshape(U, parts, 1, size // parts, 1)

    with jax.named_scope("scores"):
        k = _only(live, _blocks(ops.k_pool, blocks, joined).astype(x.q.dtype))
        q = jnp.broadcast_to(x.q[:, None], (U, parts, *x.q.shape[1:]))
        if not few:
            logits = _dot(q, k, "upkxh,upksh->upkxs")
        else:  # the keys come first: as the second operand they would be transposed
            logits = jnp.swapaxes(_apart(_dot(k, q, "upksh,upkxh->upksx")), 3, 4)
        logits = logits * spec.scale
        if ops.k_scale is not None:
            logits = logits * _scale_of(ops.k_scale, blocks, joined)
        if spec.soft_cap is not None:
            logits = spec.soft_cap * jnp.tanh(logits / spec.soft_cap)
        if ops.alibi_slopes is not None:
            slopes = jnp.tile(ops.alibi_slopes.reshape(1, 1, K, 1, G), (1, 1, 1, Q, 1))
            far = by_part(jnp.abs(away).astype(jnp.float32))
            logits = logits - slopes.reshape(1, 1, K, Q * G, 1) * far
        logits = jnp.where(_apart(by_part(seen)), logits, NEG_INF)
    with jax.named_scope("softmax"):
        m = logits.max(axis=(1, 4))
        below = _apart(logits - jnp.where(m == NEG_INF, 0.0, m)[:, None, :, :, None])
        p = _apart(jnp.exp(below.reshape(-1))).reshape(below.shape)  # flat: vectors of full length
        total = p.sum(axis=(1, 4))
    with jax.named_scope("values"):
        v = _only(live, _blocks(ops.v_pool, blocks, joined).astype(x.q.dtype))
        if ops.v_scale is not None:
            scale = _scale_of(ops.v_scale, blocks, joined)
            p = p * jnp.where(jnp.swapaxes(live, 3, 4), scale, 0.0)
        acc = _apart(_dot(p.astype(v.dtype), v, "upkxs,upksh->upkxh"))
        acc = _apart(acc.sum(axis=1)) if parts > 1 else acc[:, 0]
    return Partial(m, total, acc)


def _only(live: Array, x: Array) -> Array:
    """`x` where `live`, zero elsewhere.

    As an `and` of bits: XLA on a CPU makes one fast loop of it and the gather that x comes from,
    but a slower one of the gather with a select, and even of the gather alone.
    """
    bits = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    mask = _apart(-live.astype(bits))  # -1 is all ones
    return lax.bitcast_convert_type(lax.bitcast_convert_type(x, bits) & mask, x.dtype)


def _apart(x: Array) -> Array:
    """`x` as it is, for a compiler that would make one slow program of its maker and its users.

    XLA on a CPU computes a cheap operand again for each user, does not vectorise over short axes,
    and gives a chain of products to a library that is slower with them together than one by one.
    """
    return lax.optimization_barrier(x)


def _dot(x: Array, y: Array, contract: str) -> Array:
    precision = "highest" if x.dtype == jnp.float32 else None
    return jnp.einsum(contract, x, y, precision=precision, preferred_element_type=jnp.float32)


# --- merging parts -------------------------------------------------------------------------------


def _empty(ops: PagedOperands, lead: tuple[int, ...]) -> Partial:
    Hv = ops.v_pool.shape[3]
    start = Partial(
        jnp.full(lead, NEG_INF, jnp.float32),
        jnp.zeros(lead, jnp.float32),
        jnp.zeros((*lead, Hv), jnp.float32),
    )
    return varying_like(start, ops)


def _merge(a: Partial, b: Partial) -> Partial:
    """Softmax over the union of two sets of keys."""
    m = jnp.maximum(a.m, b.m)
    finite = jnp.where(m == NEG_INF, 0.0, m)
    x, y = jnp.exp(a.m - finite), jnp.exp(b.m - finite)
    return Partial(m, a.total * x + b.total * y, a.acc * x[..., None] + b.acc * y[..., None])


def _merge_into(total: Partial, row: Array, part: Partial) -> Partial:
    """Add items of rows `row` (len(total) for none) to the totals by row.

    A NaN stays in its row: it goes there as the largest logit, for a matmul would spread it.
    """
    R = total.m.shape[0]
    fine = jnp.isfinite(part.acc.sum(axis=-1)) & jnp.isfinite(part.total)
    m = total.m.at[row].max(jnp.where(fine, part.m, jnp.nan), mode="drop")
    finite = jnp.where(m == NEG_INF, 0.0, m)
    keep = jnp.exp(total.m - finite)
    weight = jnp.exp(part.m - finite[jnp.minimum(row, R - 1)])
    # A product with the 0/1 matrix of membership: one matmul, and no order left to chance.
    member = (row[None, :] == jnp.arange(R, dtype=row.dtype)[:, None]).astype(jnp.float32)
    used = fine & jnp.isfinite(weight) & (row < R)[:, None, None]
    gather = lambda x: jnp.einsum("ru,u...->r...", member, x, precision="highest")
    return Partial(
        m,
        total.total * keep + gather(jnp.where(used, part.total * weight, 0.0)),
        total.acc * keep[..., None]
        + gather(jnp.where(used[..., None], part.acc * weight[..., None], 0.0)),
    )


def _finish(total: Partial) -> tuple[Array, Array]:
    """(out f32, lse) of a complete softmax."""
    some = total.total > 0
    safe = jnp.where(some, total.total, 1.0)
    lse = jnp.where(some, total.m + jnp.log(safe), NEG_INF)
    return total.acc / safe[..., None], lse


def _merge_outputs(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """Two finished softmaxes over disjoint keys."""
    lse = jnp.logaddexp(a[1], b[1])
    share = lambda part: jnp.exp(part - jnp.where(lse == NEG_INF, 0.0, lse))[..., None]
    return a[0] * share(a[1]) + b[0] * share(b[1]), lse


# --- rows with few queries -----------------------------------------------------------------------


def _chunk_size(spec: PagedSpec, ops: PagedOperands, default: int, slots: int) -> int:
    """Keys of a chunk: whole blocks, no more than a table holds."""
    block_size = ops.k_pool.shape[2]
    size = min(spec.config.chunk_size_kv or default, slots)
    return -(-size // block_size) * block_size


def _key_range(spec: PagedSpec, ops: PagedOperands, rows: Rows) -> tuple[Array, Array]:
    """First and past-the-last key that some query of each row may see."""
    low = rows.first
    if spec.window is not None and ops.positions is None:
        low = jnp.maximum(low, rows.context - rows.count - spec.window + 1)
    return low, jnp.where(rows.count > 0, rows.context, 0)


def _rows(spec: PagedSpec, ops: PagedOperands, rows: Rows, Q: int) -> tuple[Array, Array]:
    """(out f32 [T, N, Hv], lse [T, N]) of rows with at most Q queries; zeros and -inf elsewhere."""
    N = ops.q.shape[1]
    K, block_size = ops.k_pool.shape[1:3]
    R, M = rows.tables.shape
    size = _chunk_size(spec, ops, CHUNK if R > 1 else 4 * CHUNK, M * block_size)
    row = jnp.arange(R, dtype=jnp.int32)
    low, high = _key_range(spec, ops, rows)
    first, past = low // size, -(-high // size)
    x = _take(ops, rows, row, jnp.zeros_like(row), Q)
    most = -(-M * block_size // size)
    if most == 1:
        total = _chunk(spec, ops, rows, row, jnp.zeros_like(row), size, x)
    elif spec.deterministic or R == 1:
        total = _in_step(spec, ops, rows, x, first, past, size)
    else:
        total = _work_list(spec, ops, rows, x, first, past, size, most)
    out, lse = _finish(total)
    out = out.reshape(R, K, Q, N // K, -1).transpose(0, 2, 1, 3, 4).reshape(R, Q, N, -1)
    lse = lse.reshape(R, K, Q, N // K).transpose(0, 2, 1, 3).reshape(R, Q, N)
    return _to_tokens(ops, rows, out, lse)


def _to_tokens(ops: PagedOperands, rows: Rows, out: Array, lse: Array) -> tuple[Array, Array]:
    """[R, Q, N, *] by row -> [T, N, *] by token."""
    row = _row_of_tokens(ops)
    index = jnp.arange(ops.q.shape[0], dtype=jnp.int32) - rows.start[row]
    owned = (index >= 0) & (index < rows.count[row])
    index = jnp.clip(index, 0, out.shape[1] - 1)
    return (
        jnp.where(owned[:, None, None], out[row, index], 0.0),
        jnp.where(owned[:, None], lse[row, index], NEG_INF),
    )


def _in_step(
    spec: PagedSpec,
    ops: PagedOperands,
    rows: Rows,
    x: Queries,
    first: Array,
    past: Array,
    size: int,
) -> Partial:
    """Chunk c of every row in trip c: a row's sums do not depend on the other rows."""
    row = jnp.arange(first.shape[0], dtype=jnp.int32)

    def trip(c: Array, total: Partial) -> Partial:
        return _merge(total, _chunk(spec, ops, rows, row, jnp.full_like(row, c), size, x))

    start = _empty(ops, x.q.shape[:3])
    low = jnp.min(jnp.where(past > first, first, jnp.iinfo(jnp.int32).max))
    return lax.fori_loop(low, past.max(), trip, start)


def _work_list(
    spec: PagedSpec,
    ops: PagedOperands,
    rows: Rows,
    x: Queries,
    first: Array,
    past: Array,
    size: int,
    most: int,
) -> Partial:
    """The items (row, chunk) of all rows, `ITEMS` a trip at most."""
    R = first.shape[0]
    counts = jnp.maximum(past - first, 0)
    ends = jnp.cumsum(counts)
    U = min(ITEMS, max(8, PER_ROW * R), R * most)
    # The list is made outside the loop: it is one for all layers of a step.
    item = jnp.arange(-(-R * most // U) * U, dtype=jnp.int32)
    rows_of_items = jnp.cumsum(jnp.zeros_like(item).at[ends].add(1, mode="drop"))
    owner = jnp.minimum(rows_of_items, R - 1)
    chunks = jnp.where(rows_of_items < R, (first + counts - ends)[owner] + item, 0)

    def trip(i: Array, total: Partial) -> Partial:
        of = lambda a: lax.dynamic_slice_in_dim(a, i * U, U)
        row, at = of(rows_of_items), of(owner)
        picked = jax.tree.map(lambda a: a[at], x)
        picked = picked._replace(real=picked.real & (row < R)[:, None])
        return _merge_into(total, row, _chunk(spec, ops, rows, at, of(chunks), size, picked))

    start = _empty(ops, x.q.shape[:3])
    return lax.fori_loop(0, -(-ends[-1] // U), trip, start)


# --- rows with many queries ----------------------------------------------------------------------


def _tiles(
    spec: PagedSpec, ops: PagedOperands, rows: Rows, past: bool = False
) -> tuple[Array, Array]:
    """(out f32 [T, N, Hv], lse [T, N]): one tile of queries of a row after the other."""
    T, N, _ = ops.q.shape
    K, Hv, block_size = ops.k_pool.shape[1], ops.v_pool.shape[3], ops.k_pool.shape[2]
    R, M = rows.tables.shape
    Q = min(spec.config.block_size_q or TILE_Q, T)
    size = _chunk_size(spec, ops, TILE_CHUNK, M * block_size)
    ends = jnp.cumsum(-(-rows.count // Q))
    low, high = _key_range(spec, ops, rows)

    def tile(i: Array, outputs: tuple[Array, Array]) -> tuple[Array, Array]:
        row = jnp.minimum(jnp.searchsorted(ends, i, side="right"), R - 1).astype(jnp.int32)
        at = (i - jnp.where(row > 0, ends[jnp.maximum(row - 1, 0)], 0)) * Q
        x = _take(ops, rows, row[None], at[None], Q)
        begin, end = low[row], high[row]
        if not past and ops.tree_mask is None:
            # The last query of the tile sees no key after its own.
            end = jnp.minimum(end, rows.context[row] - rows.count[row] + at + Q)
        if spec.window is not None and ops.positions is None:
            begin = jnp.maximum(begin, x.position.min() - spec.window + 1)

        def trip(c: Array, total: Partial) -> Partial:
            return _merge(total, _chunk(spec, ops, rows, row[None], c[None], size, x, past))

        start = _empty(ops, x.q.shape[:3])
        total = lax.fori_loop(begin // size, -(-end // size), trip, start)
        out, lse = _finish(total)
        out = out.reshape(K, Q, N // K, Hv).transpose(1, 0, 2, 3).reshape(Q, N, Hv)
        lse = lse.reshape(K, Q, N // K).transpose(1, 0, 2).reshape(Q, N)
        token = jnp.where(x.real[0], x.token[0], T)
        return (
            outputs[0].at[token].set(out, mode="drop"),
            outputs[1].at[token].set(lse, mode="drop"),
        )

    outputs = (jnp.zeros((T, N, Hv), jnp.float32), jnp.full((T, N), NEG_INF, jnp.float32))
    return lax.fori_loop(0, ends[-1], tile, varying_like(outputs, ops))


def _shared(spec: PagedSpec, ops: PagedOperands) -> tuple[Array, Array]:
    """All queries over the prefix their group shares: queries sorted by group are its rows."""
    T = ops.q.shape[0]
    C = ops.shared_tables.shape[0]
    row = _row_of_tokens(ops)
    tokens = jnp.arange(T, dtype=jnp.int32)
    owned = (tokens >= ops.q_indptr[0]) & (tokens < ops.q_indptr[-1])
    group = jnp.where(owned & (ops.shared_group[row] >= 0), ops.shared_group[row], C)
    order = jnp.argsort(group, stable=True)
    counts = jnp.zeros(C, jnp.int32).at[group].add(1, mode="drop")
    start = jnp.cumsum(counts) - counts
    position = ops.positions
    if position is None:
        own = ops.context_lens - jnp.diff(ops.q_indptr)
        position = own[row] + tokens - ops.q_indptr[row]
    sorted_ops = ops._replace(q=ops.q[order], positions=position[order], tree_mask=None)
    rows = Rows(ops.shared_tables, ops.shared_lens, jnp.zeros(C, jnp.int32), start, counts)
    out, lse = _tiles(spec, sorted_ops, rows, past=True)
    return jnp.zeros_like(out).at[order].set(out), jnp.full_like(lse, NEG_INF).at[order].set(lse)
