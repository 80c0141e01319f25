"""One step on the device: one function for prefill, decode, prefix hits and forks.

    step(params, cache, state, plan) -> (cache, state, tokens)

`plan` is what only the host knows, packed into one array because the cost of a call grows with the
number of its arguments; `state` is what only the device knows without a sync: the last token of
every seat, and the block tables, of which a plan carries the new entries only.  Both `cache` and
`state` are donated: nothing is copied.

A few traces of it exist, named by `Shape`: how many tokens and rows it has room for, whether a row
may have more than one token, and which sampler it ends in.  A pure decode step of 5 rows runs in
the trace for 8 rows of one token.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from aidx.cache import PagedKVCache, paged_attend
from aidx.engine.cascade import MAX_GROUPS
from aidx.ops.paged_attention import Cascade
from aidx.ops.sampling import (
    VARIANTS,
    SamplingState,
    Variant,
    count_tokens,
    sample,
    set_state_row,
    token_logprobs,
    unpack_rows,
)
from aidx.typing import Forward, Params

SAMPLING_COLUMNS = 11  # of aidx.ops.sampling.pack_rows
# Columns of a row of the plan, before its sampling parameters.
SEAT, WRITES, CONTEXT, COUNT, TARGET = range(5)
ROW_COLUMNS = 5 + SAMPLING_COLUMNS


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What a step ends in; what no row of the step needs is not computed.

    Attributes:
        variant: of `aidx.sample`.
        masked: whether per-vocabulary state (counts, masks, bias) is read and kept.
        num_logprobs: how many of the most likely tokens are reported; None: no logprobs at all.
    """

    variant: Variant = "greedy"
    masked: bool = False
    num_logprobs: int | None = None


@dataclasses.dataclass(frozen=True)
class Shape:
    """The static side of a step: T, R, the bound on a row's tokens, and the sampler.

    With `cascade` rows read the prefixes that they share once, see `aidx.engine.cascade`.

    Example:
        >>> Shape(num_tokens=8, num_rows=8, max_q=1, sampler=Sampler()).decode
        True
    """

    num_tokens: int
    num_rows: int
    max_q: int
    sampler: Sampler
    cascade: bool = False

    @property
    def decode(self) -> bool:
        """Whether every row has one token: token i is row i's."""
        return self.max_q == 1

    @property
    def num_updates(self) -> int:
        """Entries of block tables that the plan has room for."""
        return max(16, self.num_rows)

    @property
    def plan_size(self) -> int:
        """i32 words of a packed plan."""
        shared = self.num_rows + 2 * MAX_GROUPS if self.cascade else 0
        return self.num_rows * ROW_COLUMNS + self.num_tokens + 3 * self.num_updates + shared


@struct.dataclass
class BatchState:
    """What the device remembers between steps, by seat; the last seat stands for nobody.

    Example:
        >>> state = new_state(max_num_seqs=4, max_blocks=16)
        >>> state.last_token.shape, state.block_tables.shape
        ((5,), (5, 16))
    """

    last_token: jax.Array | np.ndarray  # [S + 1] i32
    block_tables: jax.Array | np.ndarray  # [S + 1, M] i32


@struct.dataclass
class Plan:
    """A step's work as the device reads it (see `Schedule`); padding rows have count 0."""

    seats: jax.Array  # [R] i32, the last seat for padding
    writes: jax.Array  # [R] i32, the seat whose last token the row draws, the last seat for none
    context_lens: jax.Array  # [R] i32, keys after this step's write
    counts: jax.Array  # [R] i32, query tokens
    targets: jax.Array  # [R] i32, token whose logprob is wanted; -1: the one that is drawn
    sampling: jax.Array  # [R, 11] i32, packed SamplingRows
    tokens: jax.Array  # [T] i32, -1: the seat's last token, which only the device knows
    updates: jax.Array  # [U, 3] i32, (seat, index, block); a seat out of range writes nothing
    group: jax.Array | None = None  # [R] i32, the shared prefix that a row begins with, -1 for none
    shared: jax.Array | None = None  # [MAX_GROUPS, 2] i32, a seat that has the prefix; its tokens


def new_state(max_num_seqs: int, max_blocks: int) -> BatchState:
    """No tokens, no blocks; NumPy arrays, which are uploaded without compiling anything."""
    return BatchState(
        last_token=np.zeros(max_num_seqs + 1, np.int32),
        block_tables=np.zeros((max_num_seqs + 1, max_blocks), np.int32),
    )


def mask_shapes(
    max_num_seqs: int, vocab_size: int, sharding: jax.sharding.Sharding | None = None
) -> SamplingState:
    """Shapes and dtypes of `new_masks`.

    Example:
        >>> mask_shapes(3, 40).prompt.shape
        (4, 2)
    """
    s, words = max_num_seqs + 1, -(-vocab_size // 32)
    shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
    return SamplingState(
        counts=shape((s, vocab_size), jnp.int32),
        prompt=shape((s, words), jnp.uint32),
        allowed=shape((s, words), jnp.uint32),
        stop=shape((s, words), jnp.uint32),
        bias=shape((s, vocab_size), jnp.float32),
    )


def new_masks(max_num_seqs: int, vocab_size: int) -> SamplingState:
    """`sampling_state` of every seat in NumPy, which is uploaded without compiling anything.

    Example:
        >>> new_masks(3, 40).counts.shape
        (4, 40)
    """
    shapes = mask_shapes(max_num_seqs, vocab_size)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    return zeros.replace(allowed=~zeros.allowed)


def state_sharding(params: Params) -> jax.sharding.Sharding:
    """Where the batch state lies: whole on every device that the parameters are on.

    Being explicit matters on one device too: a program is compiled for arguments that are tied to
    a device or for such that are not, and what a step returns is tied if any argument was.
    """
    leaf = jax.tree.leaves(params)[0]
    if isinstance(leaf.sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(leaf.sharding.mesh, jax.sharding.PartitionSpec())
    return jax.sharding.SingleDeviceSharding(next(iter(leaf.devices())))


def cache_sharding(params: Params, num_kv_heads: int) -> jax.sharding.Sharding:
    """Where the pools `[P, K, block_size, H]` lie: split by KV head as the parameters are.

    Example:
        >>> cache_sharding({"embed": jnp.zeros(3)}, 2).device_set == {jax.devices()[0]}
        True
    """
    whole = state_sharding(params)
    if not isinstance(whole, jax.sharding.NamedSharding):
        return whole
    axes = {a for leaf in jax.tree.leaves(params) for a in leaf.sharding.spec if a is not None}
    split = [a for a in axes if num_kv_heads % whole.mesh.shape[a] == 0]
    spec = jax.sharding.PartitionSpec(None, *split[:1])
    return jax.sharding.NamedSharding(whole.mesh, spec)


def cache_splits(params: Params, num_kv_heads: int) -> int:
    """Over how many devices a block is spread.

    Example:
        >>> cache_splits({"embed": jnp.zeros(3)}, 2)
        1
    """
    sharding = cache_sharding(params, num_kv_heads)
    shape = (1, num_kv_heads, 1, 1)
    return num_kv_heads // sharding.shard_shape(shape)[1]


# The plan: packed on the host, unpacked on the device.


def pack_plan(
    shape: Shape,
    *,
    max_num_seqs: int,
    seats: np.ndarray,
    writes: np.ndarray,
    starts: np.ndarray,
    counts: np.ndarray,
    targets: np.ndarray,
    sampling: np.ndarray,
    tokens: np.ndarray,
    updates: np.ndarray,
    group: np.ndarray | None = None,
    shared: np.ndarray | None = None,
) -> np.ndarray:
    """One i32 array of `shape.plan_size` words; everything beyond the given rows is padding.

    `group` `[r]` and `shared` `[groups, 2]` are for shapes with `cascade` and may be left out.

    Raises:
        ValueError: more rows, tokens or updates than the shape has room for, or groups for a shape
            without cascade.
    """
    rows, size = len(seats), (len(seats), len(tokens), len(updates))
    room = (shape.num_rows, shape.num_tokens, shape.num_updates)
    if any(have > most for have, most in zip(size, room, strict=True)):
        raise ValueError(f"(rows, tokens, updates) {size} do not fit {room}")
    if group is not None and not shape.cascade:
        raise ValueError(f"{group=} for {shape}")
    packed = np.full(shape.plan_size, -1, np.int32)
    at = shape.num_rows * ROW_COLUMNS
    table = packed[:at].reshape(shape.num_rows, ROW_COLUMNS)
    table[:rows, SEAT], table[:rows, WRITES] = seats, writes
    table[:rows, CONTEXT], table[:rows, COUNT] = starts + counts, counts
    table[:rows, TARGET] = targets
    table[:rows, 5:] = sampling
    if rows < shape.num_rows:
        table[rows:] = 0
        table[rows:, SEAT] = table[rows:, WRITES] = max_num_seqs
        table[rows:, TARGET] = -1
    packed[at : at + len(tokens)] = tokens
    at += shape.num_tokens
    end = at + 3 * shape.num_updates
    packed[at:end] = max_num_seqs + 1
    packed[at : at + updates.size] = updates.ravel()
    if group is not None and shared is not None:
        packed[end : end + rows] = group
        packed[end + shape.num_rows :][: shared.size] = shared.ravel()
    return packed


def next_plan(
    shape: Shape,
    *,
    last: np.ndarray,
    max_num_seqs: int,
    starts: np.ndarray,
    updates: np.ndarray,
) -> np.ndarray:
    """The plan of the same decoding rows one token further: a copy of `last` with what differs.

    In `last` every row drew its next token, which the device knows.

    Raises:
        ValueError: more updates than the shape has room for.

    Example:
        >>> shape = Shape(num_tokens=2, num_rows=2, max_q=1, sampler=Sampler())
        >>> row = lambda start, token: dict(
        ...     max_num_seqs=4, seats=np.array([3]), writes=np.array([3]), starts=start,
        ...     counts=np.array([1]), targets=np.array([-1]), tokens=token,
        ...     sampling=np.zeros((1, SAMPLING_COLUMNS)), updates=np.array([[3, 0, 7]])[:0])
        >>> first = pack_plan(shape, **row(np.array([8]), np.array([65])))
        >>> second = pack_plan(shape, **row(np.array([9]), np.array([-1])))
        >>> none = np.zeros((0, 3))
        >>> again = next_plan(shape, last=first, max_num_seqs=4, starts=np.array([9]), updates=none)
        >>> np.array_equal(again, second)
        True
    """
    if len(updates) > shape.num_updates:
        raise ValueError(f"{len(updates)} updates do not fit {shape.num_updates}")
    again = last.copy()
    at = shape.num_rows * ROW_COLUMNS
    again[CONTEXT:at:ROW_COLUMNS][: len(starts)] = starts + 1
    again[at : at + shape.num_tokens] = -1
    at += shape.num_tokens
    again[at : at + 3 * shape.num_updates] = max_num_seqs + 1
    again[at : at + updates.size] = updates.ravel()
    return again


def unpack_plan(packed: jax.Array, shape: Shape) -> Plan:
    """The inverse of `pack_plan`, on the device."""
    at = shape.num_rows * ROW_COLUMNS
    rows = packed[:at].reshape(shape.num_rows, ROW_COLUMNS)
    end = at + shape.num_tokens + 3 * shape.num_updates
    group = shared = None
    if shape.cascade:
        group = packed[end : end + shape.num_rows]
        shared = jnp.maximum(packed[end + shape.num_rows :], 0).reshape(MAX_GROUPS, 2)
    return Plan(
        seats=rows[:, SEAT],
        writes=rows[:, WRITES],
        context_lens=rows[:, CONTEXT],
        counts=rows[:, COUNT],
        targets=rows[:, TARGET],
        sampling=rows[:, 5:],
        tokens=packed[at : at + shape.num_tokens],
        updates=packed[at + shape.num_tokens : end].reshape(shape.num_updates, 3),
        group=group,
        shared=shared,
    )


# The step.


def step(
    params: Params,
    cache: PagedKVCache,
    state: BatchState,
    packed: jax.Array,
    masks: SamplingState | None = None,
    *,
    forward: Forward,
    shape: Shape,
    implementation: Any = None,
) -> tuple[PagedKVCache, BatchState, SamplingState | None, jax.Array]:
    """Write, attend, sample.

    Args:
        params: the model's parameters.
        cache: the pools; donated.
        state: donated.
        packed: `pack_plan`'s array.
        masks: per-vocabulary sampling state by seat, for a masked sampler; donated.
        forward: the model.
        shape: which trace.
        implementation: of paged attention, see `aidx.ops.paged_attention`.

    Returns:
        cache, state, masks, and per row `[R, 1]` i32 the drawn token (-1: no finite logit), or
        `[R, 3 + 2 n]` with logprobs: token, logprob, rank, n tokens, n logprobs (f32 as bits).
    """
    with jax.named_scope("plan"):
        plan = unpack_plan(packed, shape)
        tables = _updated(state.block_tables, plan.updates)
        q_indptr = jnp.pad(jnp.cumsum(plan.counts, dtype=jnp.int32), (1, 0))
        row, live = _rows_of_tokens(q_indptr, shape)
        seat = plan.seats[row]
        index = jnp.arange(shape.num_tokens, dtype=jnp.int32) - q_indptr[row]
        positions = jnp.maximum(plan.context_lens[row] - plan.counts[row] + index, 0)
        tokens = jnp.maximum(jnp.where(plan.tokens < 0, state.last_token[seat], plan.tokens), 0)
        block, offset = jnp.divmod(positions, cache.block_size)
        slots = jnp.where(live, tables[seat, block] * cache.block_size + offset, -1)
        cascade = None
        if plan.group is not None and plan.shared is not None:
            cascade = Cascade(tables[plan.shared[:, 0]], plan.shared[:, 1], plan.group)
    attend = paged_attend(
        tables[plan.seats],
        plan.context_lens,
        q_indptr,
        slots,
        max_q=shape.max_q,
        cascade=cascade,
        implementation=implementation,
    )
    last = jnp.maximum(q_indptr[1:] - 1, 0)
    logits, cache = forward(params, tokens, positions, attend, cache, logits_at=last)
    with jax.named_scope("sample"):
        drawn, masks, out = _draw(logits, plan, masks, shape.sampler)
    last_token = jnp.asarray(state.last_token).at[plan.writes].set(drawn)
    return cache, BatchState(last_token, tables), masks, out


def _updated(block_tables, updates: jax.Array) -> jax.Array:
    """Block tables with (seat, index, block) entries written; out of range is padding."""
    tables = jnp.asarray(block_tables)
    return tables.at[updates[:, 0], updates[:, 1]].set(updates[:, 2], mode="drop")


def _rows_of_tokens(q_indptr: jax.Array, shape: Shape) -> tuple[jax.Array, jax.Array]:
    """The row of each token `[T]`, and whether it has one."""
    t = jnp.arange(shape.num_tokens, dtype=jnp.int32)
    live = t < q_indptr[-1]
    if shape.decode and shape.num_tokens == shape.num_rows:
        return t, live
    row = jnp.searchsorted(q_indptr[1:], t, side="right", method="compare_all")
    return jnp.minimum(row, shape.num_rows - 1).astype(jnp.int32), live


def _draw(logits: jax.Array, plan: Plan, masks: SamplingState | None, sampler: Sampler):
    """The tokens `[R]`, the masks that have counted them, and what the host reads."""
    rows = unpack_rows(plan.sampling)
    own = None
    if sampler.masked and masks is not None:
        own = jax.tree.map(lambda leaf: leaf[plan.seats], masks)
    drawn = sample(logits, rows, plan.context_lens, own, variant=sampler.variant).tokens
    # A NaN is the largest of its row: the token it wins is no answer.
    won = jnp.take_along_axis(logits, jnp.maximum(drawn, 0)[:, None], axis=-1)[:, 0]
    drawn = jnp.where(jnp.isnan(won), -1, drawn)
    if sampler.masked and masks is not None:
        nobody = masks.counts.shape[0] - 1
        masks = count_tokens(masks, plan.writes, jnp.where(plan.writes == nobody, -1, drawn))
    out = drawn[:, None]
    if sampler.num_logprobs is not None:
        asked = jnp.where(plan.targets < 0, drawn, plan.targets)
        found = token_logprobs(logits, asked, sampler.num_logprobs)
        bits = lambda x: jax.lax.bitcast_convert_type(x, jnp.int32)
        out = jnp.concatenate(
            (
                out,
                bits(found.logprob)[:, None],
                found.rank[:, None],
                found.top_tokens,
                bits(found.top_logprobs),
            ),
            axis=1,
        )
    return drawn, masks, out


run_step = jax.jit(
    step,
    static_argnames=("forward", "shape", "implementation"),
    donate_argnames=("cache", "state", "masks"),
)
"""`step`, compiled once a shape; cache, state and masks are updated in place."""


@functools.partial(jax.jit, donate_argnums=0)
def write_tables(state: BatchState, updates: jax.Array) -> BatchState:
    """Entries of block tables that did not fit a plan: `updates` `[U, 3]` (seat, index, block)."""
    tables = _updated(state.block_tables, updates)
    return BatchState(state.last_token, tables)


@functools.partial(jax.jit, donate_argnums=0)
def write_masks(masks: SamplingState, seat: jax.Array, row: SamplingState) -> SamplingState:
    """A seat's per-vocabulary sampling state, when a sequence takes the seat."""
    return set_state_row(masks, seat, row)


# Which traces there are.


def row_buckets(max_num_seqs: int, *, cpu: bool = True) -> tuple[int, ...]:
    """Rows that decode steps come in.

    A CPU pays for every padding row: powers of two.  A GPU reads the parameters whatever the rows
    are, and a kernel takes a second to lower: few, and halves only where a step is bound by
    operations; beyond 128 rows three quarters too, where a row of padding costs what a row does.
    One row of its own would be slower than eight: XLA makes a product with a vector a
    multiplication and a sum, which reach half the bandwidth of a matmul.

    Example:
        >>> row_buckets(24), row_buckets(256, cpu=False)
        ((1, 2, 4, 8, 16, 24), (8, 64, 128, 192, 256))
    """
    sizes = [1 << i for i in range(max_num_seqs.bit_length())]
    if not cpu:
        sizes = [size for size in sizes if size == 8 or size >= 64]
        sizes = sorted([*sizes, *(3 * size // 4 for size in sizes if size > 128)])
    return (*(size for size in sizes if size < max_num_seqs), max_num_seqs)


def token_buckets(max_num_batched_tokens: int, *, cpu: bool = True) -> tuple[int, ...]:
    """Tokens that other steps come in.

    Padding costs what tokens cost, on a GPU from some 256 tokens on (below, the parameters' bytes
    are the bound).  So: halves, and sizes between two where steps of decodes and one prompt fall;
    on a CPU quarters at the small end.

    Example:
        >>> token_buckets(2048)
        (32, 128, 512, 1024, 2048)
        >>> token_buckets(256)
        (16, 64, 128, 160, 192, 224, 256)
        >>> token_buckets(8192, cpu=False)
        (128, 384, 512, 768, 1024, 2048, 4096, 8192)
    """
    if not cpu:
        sizes = [size for size in (128, 384, 512, 768, 1024) if size < max_num_batched_tokens]
        sizes += [1 << i for i in range(11, max_num_batched_tokens.bit_length())]
        return tuple(
            sorted(
                {size for size in sizes if size < max_num_batched_tokens} | {max_num_batched_tokens}
            )
        )
    sizes, size = [max_num_batched_tokens], max_num_batched_tokens
    while size > 32:
        size = -(-size // (2 if len(sizes) < 3 else 4))
        sizes.append(max(size, 16))
    if 128 < max_num_batched_tokens <= 512:
        sizes += [max_num_batched_tokens * eighths // 8 for eighths in (5, 6, 7)]
    return tuple(sorted(set(sizes)))


@functools.lru_cache(maxsize=64)
def all_shapes(
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_logprobs: int,
    *,
    cpu: bool = True,
    cascade: bool = False,
) -> tuple[Shape, ...]:
    """Every trace that a batch with these limits can ask for, in order of cost within its kind.

    A step that prefills is dear enough to draw where the most likely token would do; masks and
    logprobs are rare enough for few, large traces, and so are shared prefixes (`cascade`).  Rows
    between two powers of two have no trace for `full`, which takes the next power.

    Example:
        >>> [s.sampler.variant for s in all_shapes(1, 16, 5)]
        ['greedy', 'plain', 'full', 'full', 'plain', 'full', 'full']
    """
    everything = Sampler("full", masked=True, num_logprobs=max_logprobs)
    decode = [
        Shape(r, r, 1, sampler)
        for r in row_buckets(max_num_seqs, cpu=cpu)
        for sampler in (Sampler("greedy"), Sampler("plain"), Sampler("full"), everything)
        if r == max_num_seqs
        or (sampler is not everything and (r.bit_count() == 1 or sampler.variant != "full"))
    ]
    shared = [
        Shape(r, r, 1, sampler, cascade=True)
        for r in row_buckets(max_num_seqs, cpu=cpu)
        for sampler in (Sampler("plain"), Sampler("full"), everything)
        if cascade and 8 * r >= max_num_seqs and (sampler.variant == "plain" or r == max_num_seqs)
    ]
    sizes = token_buckets(max_num_batched_tokens, cpu=cpu)
    prefill = [
        Shape(t, min(max_num_seqs, t), t, sampler)
        for t in sizes
        for sampler in (Sampler("plain"), Sampler("full"), everything)
        if sampler is not everything or t in sizes[::-2]
    ]
    return (*decode, *shared, *prefill)


@functools.lru_cache(maxsize=4096)
def pick_shape(
    rows: int,
    tokens: int,
    needed: Sampler,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_logprobs: int,
    cpu: bool = True,
    cascade: bool = False,
) -> Shape:
    """The smallest trace for `rows` rows of `tokens` tokens in all that samples as `needed`.

    `cascade`: the one that reads shared prefixes once, which `all_shapes` was asked for.

    Example:
        >>> limits = dict(max_num_seqs=8, max_num_batched_tokens=64, max_logprobs=5)
        >>> shape = pick_shape(3, 3, Sampler(), **limits)
        >>> shape.num_tokens, shape.max_q
        (4, 1)
        >>> shape = pick_shape(2, 10, Sampler(), **limits)
        >>> shape.num_tokens, shape.num_rows, shape.sampler.variant
        (32, 8, 'plain')
    """
    return next(
        shape
        for shape in all_shapes(
            max_num_seqs, max_num_batched_tokens, max_logprobs, cpu=cpu, cascade=cascade
        )
        if shape.cascade == cascade
        and rows <= shape.num_rows
        and tokens <= shape.num_tokens
        and (tokens == rows or not shape.decode)
        and _serves(shape.sampler, needed)
    )


def _serves(sampler: Sampler, needed: Sampler) -> bool:
    return (
        VARIANTS.index(sampler.variant) >= VARIANTS.index(needed.variant)
        and sampler.masked >= needed.masked
        and (needed.num_logprobs is None or sampler.num_logprobs is not None)
    )


def temporary_bytes(forward: Forward, params: Params, config: Any) -> int:
    """Device memory that the largest step needs besides parameters, cache and state.

    Found by compiling that step with a pool of two blocks: the pool is updated in place, so its
    size does not enter.  `config` is an `EngineConfig`.
    """
    shape = config.shapes()[-1]  # the most tokens, and everything that a sampler can do
    cache = PagedKVCache.create(
        num_layers=config.num_layers,
        num_blocks=2,
        block_size=config.block_size,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=config.dtype,
        sharding=cache_sharding(params, config.num_kv_heads),
    )
    masks = mask_shapes(config.max_num_seqs, config.vocab_size, state_sharding(params))
    lowered = run_step.lower(
        params,
        cache,
        jax.device_put(new_state(config.max_num_seqs, config.max_blocks), state_sharding(params)),
        np.zeros(shape.plan_size, np.int32),
        masks,
        forward=forward,
        shape=shape,
        implementation=config.implementation,
    )
    memory = lowered.compile().memory_analysis()
    state = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(masks))
    if memory is None:
        raise NotImplementedError("this backend does not say what memory a program needs")
    return memory.temp_size_in_bytes + state
