"""Which tokens the next step computes: a pure function of immutable state.

`schedule(batch) -> (batch, Schedule)` runs once a step:

    1. share the token budget among the running sequences, decodes first;
    2. find their blocks, preempting the newest (or the lowest priority) when there are too few;
    3. admit waiting sequences in the policy's order while seats, budget and memory last.

The running sequences are columns of small integer arrays, one entry a seat, so that a decode step
of hundreds of rows costs a few dozen NumPy calls.  Waiting ones are `SequenceState`s in a tuple.
`record` and `finish` bring back what the device sampled.  No JAX in here: this room can be tested
with a counter in place of a model.
"""

import collections
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from aidx.cache import NULL_BLOCK, BlockKey, BlockPool, block_keys
from aidx.engine.request import SequenceState, SequenceStatus

POLICIES = ("fcfs", "priority", "shortest_first", "fair")
PREEMPTION_MODES = ("recompute", "swap")
# What a token costs a user under `fair`: VTC's weights of an input and an output token.
PROMPT_COST, OUTPUT_COST = 1.0, 2.0
_NO_BLOCKS = np.zeros(0, np.int32)


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """The limits of a batch.

    Attributes:
        max_num_seqs: seats: sequences that run at once.
        max_num_batched_tokens: query tokens of one step, at least max_num_seqs.
        max_model_len: tokens of a sequence, prompt included.
        policy: `fcfs`; `priority` (smaller first, first come first served within one);
            `shortest_first` (fewest prompt tokens left); `fair` (the user with the least service:
            the virtual token counter of Sheng et al., OSDI 2024).
        max_overtaken: steps in which later arrivals may be admitted before a waiting sequence; at
            this bound it goes first, whatever the policy says.
        enable_prefix_caching: whether full blocks are published and looked up.
        watermark: share of the pool that an admission leaves free for the running to grow into.
        preemption_mode: what becomes of the blocks of a sequence that must give them back:
            `recompute` computes them again, `swap` keeps them in host memory.
        max_swapped_blocks: that host memory holds; beyond, sequences are recomputed.
        window: keys that a query sees in the layer that sees the most, itself included; None: all.
            Blocks that no later query sees go back to the pool.

    Raises:
        ValueError: a limit is below its least, or the policy or the mode is unknown.

    Example:
        >>> SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=4)
        Traceback (most recent call last):
            ...
        ValueError: max_num_batched_tokens=4 must be at least max_num_seqs=8: every running ...
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 4096
    policy: str = "fcfs"
    max_overtaken: int = 256
    enable_prefix_caching: bool = True
    watermark: float = 0.01
    preemption_mode: str = "recompute"
    max_swapped_blocks: int = 0
    window: int | None = None

    def __post_init__(self):
        if self.policy not in POLICIES:
            raise ValueError(f"policy={self.policy!r} is not one of {POLICIES}")
        if self.preemption_mode not in PREEMPTION_MODES:
            raise ValueError(
                f"preemption_mode={self.preemption_mode!r} is not one of {PREEMPTION_MODES}"
            )
        for name in ("max_num_seqs", "max_model_len", "max_overtaken"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} must be at least "
                f"max_num_seqs={self.max_num_seqs}: every running sequence decodes in every step"
            )
        if self.max_swapped_blocks < 0:
            raise ValueError(f"max_swapped_blocks={self.max_swapped_blocks} is negative")
        if not 0 <= self.watermark < 1:
            raise ValueError(f"watermark={self.watermark} must be in [0, 1)")
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1, or None")


def blocks_needed(config: SchedulerConfig, num_tokens: int, block_size: int) -> int:
    """The most blocks that a sequence of so many tokens holds at once.

    Under a window these are the ones that the tokens of a step see, and one that is not published
    yet or only begun at either end.

    Example:
        >>> limits = dict(max_num_seqs=2, max_num_batched_tokens=8)
        >>> blocks_needed(SchedulerConfig(**limits), 100, 4)
        25
        >>> blocks_needed(SchedulerConfig(**limits, window=10), 100, 4)
        7
    """
    whole = _ceil(num_tokens, block_size)
    if config.window is None:
        return whole
    return min(whole, _ceil(config.window + config.max_num_batched_tokens, block_size) + 2)


@dataclasses.dataclass(frozen=True, eq=False)
class BatchScheduler:
    """All sequences that are not finished, and the pool they live in.

    Columns have one entry a seat; an empty seat has zeros.  `num_tokens` counts the promised tokens
    (sampled by a step in flight) too; `num_sent` the entries of a seat's block table that the
    device has; `num_published` the blocks that are in the prefix cache; `num_evicted` the blocks in
    front that a window let go of, null blocks since.
    """

    config: SchedulerConfig
    pool: BlockPool
    waiting: tuple[SequenceState, ...]  # by arrival
    running: tuple[SequenceState | None, ...]  # [S]
    tables: tuple[np.ndarray, ...]  # [S] of [num_blocks] i32
    keys: tuple[BlockKey | None, ...]  # [S] key of the last published block
    num_tokens: np.ndarray  # [S] i64
    num_known: np.ndarray  # [S] i64
    num_computed: np.ndarray  # [S] i64
    num_blocks: np.ndarray  # [S] i64
    num_sent: np.ndarray  # [S] i64
    num_published: np.ndarray  # [S] i64
    num_evicted: np.ndarray  # [S] i64
    limit: np.ndarray  # [S] i64
    paused: np.ndarray  # [S] bool
    synchronous: np.ndarray  # [S] bool
    arrival: np.ndarray  # [S] i64
    user: np.ndarray  # [S] i64, index into service
    users: Mapping[str, int]
    service: np.ndarray  # [users] f64, virtual tokens served
    # Before the next step, in this order:
    swap_outs: tuple[tuple[int, np.ndarray], ...] = ()  # (seq_id, blocks to host memory)
    swap_ins: tuple[tuple[int, np.ndarray], ...] = ()  # (seq_id, where they go; -1: nowhere)
    copies: tuple[tuple[int, int], ...] = ()  # (from, to) blocks
    evicted: tuple[tuple[int, int, int], ...] = ()  # (seat, begin, end): null in its table now

    @property
    def num_running(self) -> int:
        """Sequences that have a seat."""
        return sum(seq is not None for seq in self.running)

    @property
    def unfinished(self) -> bool:
        """Whether anybody runs or waits."""
        return bool(self.waiting) or any(seq is not None for seq in self.running)

    def at(self, seat: int | np.integer) -> SequenceState:
        """Who sits there, as it was when it sat down.

        Raises:
            ValueError: nobody does.
        """
        seq = self.running[seat]
        if seq is None:
            raise ValueError(f"{seat=} is empty")
        return seq

    def sequence(self, seat: int) -> SequenceState:
        """The running sequence of `seat`, with its columns filled in."""
        seq = self.at(seat)
        if self.paused[seat]:
            status = SequenceStatus.PAUSED
        elif self.num_computed[seat] < seq.num_prompt:
            status = SequenceStatus.PREFILLING
        else:
            status = SequenceStatus.GENERATING
        return dataclasses.replace(
            seq,
            num_known=int(self.num_known[seat]),
            num_computed=int(self.num_computed[seat]),
            status=status,
            blocks=self.tables[seat],
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Schedule:
    """One step's work; row i computes `counts[i]` tokens of the sequence in `seats[i]`.

    Attributes:
        seats: `[r]` i64.
        starts: `[r]` i64, position of the row's first token.
        counts: `[r]` i64, at least 1.
        samples: `[r]` bool: the row's last token is the sequence's last, so a token is sampled.
        updates: `[u, 3]` i32, (seat, index, block): entries of block tables the device lacks.
        swap_outs, swap_ins, copies: what happens to blocks before the step, see `BatchScheduler`.
        admitted: sequences that took a seat in this step.
        preempted: sequences that lost theirs.
    """

    seats: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    samples: np.ndarray
    updates: np.ndarray
    swap_outs: tuple[tuple[int, np.ndarray], ...]
    swap_ins: tuple[tuple[int, np.ndarray], ...]
    copies: tuple[tuple[int, int], ...]
    admitted: tuple[SequenceState, ...]
    preempted: tuple[SequenceState, ...]

    @property
    def num_tokens(self) -> int:
        """Query tokens of the step."""
        return int(self.counts.sum())


def new_batch(config: SchedulerConfig, pool: BlockPool) -> BatchScheduler:
    """An empty batch over `pool`.

    Example:
        >>> batch = new_batch(SchedulerConfig(max_num_seqs=2), BlockPool.create(9, 4))
        >>> batch.unfinished, batch.pool.num_free
        (False, 8)
    """
    s = config.max_num_seqs
    zeros = np.zeros(s, np.int64)
    return BatchScheduler(
        config=config,
        pool=pool,
        waiting=(),
        running=(None,) * s,
        tables=(_NO_BLOCKS,) * s,
        keys=(None,) * s,
        **dict.fromkeys(_COUNTERS, zeros),
        paused=np.zeros(s, bool),
        synchronous=np.zeros(s, bool),
        users={},
        service=np.zeros(0),
    )


_COUNTERS = (
    "num_tokens",
    "num_known",
    "num_computed",
    "num_blocks",
    "num_sent",
    "num_published",
    "num_evicted",
    "limit",
    "arrival",
    "user",
)


# Arrivals and departures.


def check_fits(batch: BatchScheduler, seq: SequenceState) -> None:
    """Refuse at once what could never run.

    Raises:
        ValueError: the prompt leaves no room for a token, or the whole sequence needs more blocks
            than the pool has.
    """
    if seq.num_prompt >= batch.config.max_model_len:
        raise ValueError(
            f"the prompt has {seq.num_prompt} tokens; max_model_len="
            f"{batch.config.max_model_len} must leave room for one more"
        )
    # The last token is never computed.
    need = blocks_needed(batch.config, seq.limit - 1, batch.pool.block_size)
    if need > batch.pool.num_blocks - 1:
        raise ValueError(
            f"{seq.num_prompt} prompt tokens and up to {seq.limit - seq.num_prompt} new ones need "
            f"{need} blocks of {batch.pool.block_size} tokens; the pool has "
            f"{batch.pool.num_blocks - 1}: ask for fewer tokens or give the pool more memory"
        )


def add(batch: BatchScheduler, seq: SequenceState) -> BatchScheduler:
    """`seq` waits.

    Under `fair`, a user who comes back after an absence starts no lower than the least served user
    who is present: nobody saves up service (Sheng et al. 2024, section 4.1).

    Raises:
        ValueError: it could never run (`check_fits`).
    """
    check_fits(batch, seq)
    users, service, name = batch.users, batch.service, seq.request.user
    if name not in users:
        users = {**users, name: len(users)}
        service = np.append(service, 0.0)
    present = set()
    if batch.config.policy == "fair":
        present = {s.request.user for s in (*batch.waiting, *batch.running) if s is not None}
    if present and name not in present:
        least = min((service[users[other]] for other in present), default=service[users[name]])
        service = service.copy()
        service[users[name]] = max(service[users[name]], least)
    return _queued(dataclasses.replace(batch, users=users, service=service), seq)


def finish(batch: BatchScheduler, seats: Iterable[int]) -> BatchScheduler:
    """The sequences in `seats` are done: their blocks go back, their seats are empty."""
    seats = list(seats)
    if not seats:
        return batch
    held = [batch.tables[seat] for seat in seats]
    columns = {}
    for name in (*_COUNTERS, "paused", "synchronous"):
        columns[name] = getattr(batch, name).copy()
        columns[name][seats] = 0
    empty = dict.fromkeys(seats)
    return dataclasses.replace(
        batch,
        pool=batch.pool.free(np.concatenate(held)),
        running=_replaced(batch.running, empty),
        tables=_replaced(batch.tables, dict.fromkeys(seats, _NO_BLOCKS)),
        keys=_replaced(batch.keys, empty),
        evicted=tuple(gap for gap in batch.evicted if gap[0] not in empty),
        **columns,
    )


def cancel(batch: BatchScheduler, seq_ids: Iterable[int]) -> BatchScheduler:
    """Forget these sequences, waiting or running; unknown ids are passed over."""
    gone = set(seq_ids)
    waiting = tuple(seq for seq in batch.waiting if seq.seq_id not in gone)
    seats = [i for i, seq in enumerate(batch.running) if seq is not None and seq.seq_id in gone]
    left = lambda moves: tuple(move for move in moves if move[0] not in gone)
    batch = dataclasses.replace(
        batch, waiting=waiting, swap_outs=left(batch.swap_outs), swap_ins=left(batch.swap_ins)
    )
    return finish(batch, seats)


def record(batch: BatchScheduler, seats: np.ndarray, tokens: np.ndarray) -> BatchScheduler:
    """The host has read what a step sampled: one token for each of `seats`.

    A synchronous sequence was paused until now, and goes on.
    """
    known = batch.num_known.copy()
    for seat, token in zip(seats.tolist(), tokens.tolist(), strict=True):
        batch.at(seat).log[known[seat]] = token
        known[seat] += 1
    promised, paused = batch.num_tokens, batch.paused
    late = batch.synchronous[seats]
    if late.any():
        promised = promised.copy()
        promised[seats[late]] += 1
        paused = paused.copy()
        paused[seats[late]] = False
    return dataclasses.replace(batch, num_known=known, num_tokens=promised, paused=paused)


def branch(
    batch: BatchScheduler,
    group: Sequence[int],
    children: Sequence[tuple[int, int, int]],
) -> tuple[BatchScheduler, list[SequenceState]]:
    """Replace sequences by continuations of theirs: beams that fork and die.

    Args:
        batch: the state; every sequence of the group is paused.
        group: seq_ids.
        children: (seq_id of the child, place of its parent in the group, its next token).

    Returns:
        The batch, and the children in order.  A parent's first child takes its seat and its blocks
        over; others share the full blocks and copy the last one on write.  A child without a seat
        or a block to be had waits like a preempted sequence.
    """
    seats = {s.seq_id: i for i, s in enumerate(batch.running) if s is not None}
    parents = [
        batch.sequence(seats[i]) if i in seats else next(s for s in batch.waiting if s.seq_id == i)
        for i in group
    ]
    used = {parent for _, parent, _ in children}
    batch = cancel(batch, [seq_id for i, seq_id in enumerate(group) if i not in used])
    kept = [seq.seq_id for i, seq in enumerate(parents) if i in used and seq.seat < 0]
    batch = cancel(batch, kept)  # those that wait: their children are queued anew
    made, taken = [], set()
    for seq_id, place, token in children:
        parent = parents[place]
        log = parent.log.copy()
        log[parent.num_known] = token
        child = dataclasses.replace(
            parent, seq_id=seq_id, log=log, num_known=parent.num_known + 1, keys=()
        )
        if parent.seat >= 0 and place not in taken:
            taken.add(place)
            batch = _continue_in_seat(batch, child)
        elif parent.seat >= 0 and (forked := _fork_into_seat(batch, child)) is not None:
            batch, child = forked
        else:
            child = dataclasses.replace(
                child,
                num_computed=0,
                num_swapped=0,
                seat=-1,
                blocks=_NO_BLOCKS,
                status=SequenceStatus.PENDING,
            )
            batch = _queued(batch, child)
        made.append(child)
    return batch, made


def _continue_in_seat(batch: BatchScheduler, child: SequenceState) -> BatchScheduler:
    """`child` goes on where its parent sits, one token further."""
    known, promised, paused = (
        column.copy() for column in (batch.num_known, batch.num_tokens, batch.paused)
    )
    known[child.seat] = promised[child.seat] = child.num_known
    paused[child.seat] = False
    return dataclasses.replace(
        batch,
        running=_replaced(batch.running, {child.seat: child}),
        num_known=known,
        num_tokens=promised,
        paused=paused,
    )


def _fork_into_seat(
    batch: BatchScheduler, child: SequenceState
) -> tuple[BatchScheduler, SequenceState] | None:
    """`child` in a seat of its own, sharing its parent's full blocks; None: no seat or no block."""
    seat = next((i for i, seq in enumerate(batch.running) if seq is None), None)
    full, rest = divmod(child.num_computed, batch.pool.block_size)
    if seat is None or (rest and not batch.pool.num_free):
        return None
    blocks, copies = child.blocks[:full], batch.copies
    pool = batch.pool.fork(blocks)
    if rest:
        pool, fresh = pool.allocate(1)
        copies = (*copies, (int(child.blocks[full]), int(fresh[0])))
        blocks = np.concatenate((blocks, fresh))
    source = child.seat
    child = dataclasses.replace(child, seat=seat, blocks=blocks)
    published = int(batch.num_published[source])
    batch = dataclasses.replace(batch, pool=pool, copies=copies)
    return _seated(batch, child, blocks, published, batch.keys[source]), child


# One step.


def schedule(
    batch: BatchScheduler, *, drained: bool = True
) -> tuple[BatchScheduler, Schedule | None]:
    """What the next step computes, and the batch as it is once that step is issued.

    `drained=False` says that results of a step are still to be read.  A preemption needs them (the
    tokens are computed again, so the host must know them): where one is due, `(batch, None)` comes
    back unchanged and the caller reads the results first.
    """
    before, batch = batch, _evict(batch)
    take = _share_budget(batch)
    batch, take, preempted = _find_blocks(batch, take, drained)
    if take is None:
        return before, None
    admitted: list[SequenceState] = []
    if not preempted:
        batch, take, admitted = _admit(batch, take)
    blocked = None if admitted or preempted else _blocked_by_sibling(batch, take)
    if blocked is None:
        return _issue(batch, take, admitted, preempted)
    if not drained:
        return before, None
    batch, seq = _preempt(before, blocked)
    batch, found = schedule(batch)
    assert found is not None  # that is for a step in flight, and there is none
    return batch, dataclasses.replace(found, preempted=(seq, *found.preempted))


def _blocked_by_sibling(batch: BatchScheduler, take: np.ndarray) -> int | None:
    """The seat of a paused beam that waits for a sibling that waits for a seat, or for blocks."""
    if not batch.paused.any() or (take.any() and None in batch.running):
        return None
    waiting = [s.request for s in batch.waiting if s.status is not SequenceStatus.PAUSED]
    paused = [i for i in np.flatnonzero(batch.paused) if batch.at(i).request in waiting]
    return int(paused[-1]) if paused else None


def _share_budget(batch: BatchScheduler) -> np.ndarray:
    """Tokens of each running sequence in this step, `[S]`: decodes first, then by policy."""
    config = batch.config
    idle = batch.paused | (batch.num_tokens >= batch.limit)
    need = np.where(idle, 0, batch.num_tokens - batch.num_computed)
    if need.sum() > config.max_num_batched_tokens:
        order = np.lexsort((batch.arrival, _running_key(batch, need), need > 1))
        ahead = np.zeros_like(need)
        ahead[order] = np.cumsum(need[order]) - need[order]
        need = np.clip(config.max_num_batched_tokens - ahead, 0, need)
    rows_left = config.max_num_seqs - np.count_nonzero(need)
    for seat in np.flatnonzero(need > 1):
        seq = batch.at(seat)
        if seq.every_logit and batch.num_computed[seat] < seq.num_prompt:
            extra = min(int(need[seat]) - 1, rows_left)
            need[seat] = 1 + extra
            rows_left -= extra
    return need


def _running_key(batch: BatchScheduler, need: np.ndarray) -> np.ndarray:
    """What the policy sorts running sequences by, `[S]`."""
    match batch.config.policy:
        case "priority":
            return np.array([0 if s is None else s.request.priority for s in batch.running])
        case "shortest_first":
            return need
        case "fair" if len(batch.service):
            return batch.service[batch.user]
    return np.zeros_like(need)


def _blocks_short(batch: BatchScheduler, take: np.ndarray) -> np.ndarray:
    """Blocks that each seat lacks for `take` more tokens, `[S]`."""
    whole = _ceil(batch.num_computed + take, batch.pool.block_size)
    return np.where(take > 0, np.maximum(whole - batch.num_blocks, 0), 0)


def _find_blocks(batch: BatchScheduler, take: np.ndarray, drained: bool):
    """Give every running sequence its blocks, preempting the last in line while they do not do."""
    preempted: list[SequenceState] = []
    short = _blocks_short(batch, take)
    while short.sum() > batch.pool.num_free:
        if not drained:
            return batch, None, []
        seats = [i for i, seq in enumerate(batch.running) if seq is not None]
        by_priority = batch.config.policy == "priority"
        victim = max(
            seats,
            key=lambda i: (
                batch.at(i).request.priority if by_priority else 0,
                batch.at(i).arrival,
            ),
        )
        batch, seq = _preempt(batch, victim, swap=True)
        preempted.append(seq)
        take = take.copy()
        take[victim] = 0
        short = _blocks_short(batch, take)
    return _grow(batch, short), take, preempted


def _preempt(
    batch: BatchScheduler, seat: int, *, swap: bool = False
) -> tuple[BatchScheduler, SequenceState]:
    """Take the seat and the blocks of a sequence; it waits, to be swapped in or recomputed."""
    seq = batch.sequence(seat)
    paused = seq.status is SequenceStatus.PAUSED
    blocks = _blocks_to_keep(batch, seq) if swap and not paused else _NO_BLOCKS
    seq = dataclasses.replace(
        seq,
        num_computed=seq.num_computed if len(blocks) else 0,
        num_swapped=len(blocks),
        preemptions=seq.preemptions + 1,
        status=SequenceStatus.PAUSED if paused else SequenceStatus.PENDING,
        seat=-1,
        blocks=_NO_BLOCKS,
    )
    if len(blocks):
        outs = (*batch.swap_outs, (seq.seq_id, blocks))
        batch = dataclasses.replace(batch, swap_outs=outs)
    return _queued(finish(batch, [seat]), seq), seq


def _blocks_to_keep(batch: BatchScheduler, seq: SequenceState) -> np.ndarray:
    """What a preempted sequence takes along to host memory; nothing where it cannot."""
    config = batch.config
    blocks = seq.blocks[: _ceil(seq.num_computed, batch.pool.block_size)]
    held = sum(other.num_swapped for other in batch.waiting)
    unwritten = {to for _, to in batch.copies}.intersection(blocks.tolist())
    if (
        config.preemption_mode != "swap"
        or held + len(blocks) > config.max_swapped_blocks
        or (blocks == NULL_BLOCK).any()  # a window let go of it: what is left is no beginning
        or unwritten
    ):
        return _NO_BLOCKS
    return blocks


def preempt_all(batch: BatchScheduler) -> BatchScheduler:
    """Everybody waits again: what the cache holds is worth nothing any more."""
    for seat, seq in enumerate(batch.running):
        if seq is not None:
            batch, _ = _preempt(batch, seat)
    return forget_swapped(batch, [seq.seq_id for seq in batch.waiting])


def forget_swapped(batch: BatchScheduler, seq_ids: Iterable[int]) -> BatchScheduler:
    """These waiting sequences will be recomputed: what host memory holds of them is worth nothing.

    Ids that do not wait are passed over.
    """
    gone = set(seq_ids)
    waiting = tuple(
        dataclasses.replace(seq, num_computed=0, num_swapped=0)
        if seq.seq_id in gone and seq.num_swapped
        else seq
        for seq in batch.waiting
    )
    outs = tuple((seq_id, blocks) for seq_id, blocks in batch.swap_outs if seq_id not in gone)
    return dataclasses.replace(batch, waiting=waiting, swap_outs=outs)


def _evict(batch: BatchScheduler) -> BatchScheduler:
    """Give back the blocks that no later query sees, null blocks in their place.

    The query at p sees the keys from p - window + 1 on.  Steps in flight read those blocks before
    a later step writes to them: the device runs steps in order.
    """
    window, size = batch.config.window, batch.pool.block_size
    if window is None:
        return batch
    dead = np.maximum(batch.num_computed - window + 1, 0) // size
    if batch.config.enable_prefix_caching:  # the cache is told of a block first
        dead = np.minimum(dead, batch.num_published)
    seats = np.flatnonzero(dead > batch.num_evicted)
    if not len(seats):
        return batch
    gone, tables, gaps = [], {}, []
    for seat in seats.tolist():
        begin, end = int(batch.num_evicted[seat]), int(dead[seat])
        gone.append(batch.tables[seat][begin:end])
        tables[seat] = batch.tables[seat].copy()
        tables[seat][begin:end] = NULL_BLOCK
        gaps.append((seat, begin, end))
    return dataclasses.replace(
        batch,
        pool=batch.pool.free(np.concatenate(gone)),
        tables=_replaced(batch.tables, tables),
        num_evicted=np.maximum(batch.num_evicted, dead),
        evicted=(*batch.evicted, *gaps),
    )


def _grow(batch: BatchScheduler, short: np.ndarray) -> BatchScheduler:
    """Allocate `short[s]` blocks for each seat, in one call to the pool."""
    seats = np.flatnonzero(short)
    if not len(seats):
        return batch
    pool, fresh = batch.pool.allocate(int(short.sum()))
    parts = np.split(fresh, np.cumsum(short[seats])[:-1])
    tables = {
        seat: np.concatenate((batch.tables[seat], part))
        for seat, part in zip(seats.tolist(), parts, strict=True)
    }
    return dataclasses.replace(
        batch,
        pool=pool,
        tables=_replaced(batch.tables, tables),
        num_blocks=batch.num_blocks + short,
    )


# Admission.


def _admit(batch: BatchScheduler, take: np.ndarray):
    """Seat waiting sequences while seats, budget, rows and memory last."""
    config, before = batch.config, batch.num_computed
    free_seats = [i for i, seq in enumerate(batch.running) if seq is None]
    budget = config.max_num_batched_tokens - int(take.sum())
    rows = config.max_num_seqs - _num_rows(batch, take)
    if not (free_seats and budget and rows and batch.waiting):
        return batch, take, []
    take, service, admitted = take.copy(), batch.service.copy(), []
    for seq in _in_policy_order(batch, service):
        if not (free_seats and budget and rows):
            break
        source = _fork_source(batch, seq, before)
        if seq.status is SequenceStatus.PAUSED or source is _NOT_YET:
            continue
        placed = _place(batch, seq, source, free_seats[0])
        if placed is None:
            break  # what the policy puts first is not overtaken for being large
        batch, seq = placed
        seat = free_seats.pop(0)
        take[seat] = min(
            seq.num_known - seq.num_computed, budget, rows if seq.every_logit else budget
        )
        budget -= int(take[seat])
        rows -= int(take[seat]) if seq.every_logit else 1
        service[batch.user[seat]] += PROMPT_COST * max(
            seq.num_prompt - seq.num_charged - seq.num_cached, 0
        )
        admitted.append(seq)
    taken = {seq.seq_id for seq in admitted}
    latest = max((seq.arrival for seq in admitted), default=-1)
    waiting = tuple(
        dataclasses.replace(seq, overtaken=seq.overtaken + 1) if seq.arrival < latest else seq
        for seq in batch.waiting
        if seq.seq_id not in taken
    )
    batch = dataclasses.replace(batch, waiting=waiting, service=service)
    fresh = np.where(np.isin(np.arange(config.max_num_seqs), [s.seat for s in admitted]), take, 0)
    return _grow(batch, _blocks_short(batch, fresh)), take, admitted


def _num_rows(batch: BatchScheduler, take: np.ndarray) -> int:
    """Rows that `take` makes: one a sequence, one a token where every logit is wanted."""
    rows = np.count_nonzero(take)
    for seat in np.flatnonzero(take > 1):
        rows += (int(take[seat]) - 1) * batch.at(seat).every_logit
    return int(rows)


def _in_policy_order(batch: BatchScheduler, service: np.ndarray) -> Iterator[SequenceState]:
    """Waiting sequences, the next to admit first; `service` may grow while this runs."""
    bound, policy = batch.config.max_overtaken, batch.config.policy
    yield from (seq for seq in batch.waiting if seq.overtaken >= bound)
    rest = [seq for seq in batch.waiting if seq.overtaken < bound]
    if policy == "priority":
        rest.sort(key=lambda seq: seq.request.priority)  # stable: by arrival within one
    elif policy == "shortest_first":
        rest.sort(key=lambda seq: seq.num_known)
    if policy != "fair":
        yield from rest
        return
    queues: dict[str, collections.deque] = {}
    for seq in rest:
        queues.setdefault(seq.request.user, collections.deque()).append(seq)
    while queues:
        user = min(queues, key=lambda u: (service[batch.users[u]], queues[u][0].arrival))
        yield queues[user].popleft()
        if not queues[user]:
            del queues[user]


_NOT_YET = -1


def _fork_source(batch: BatchScheduler, seq: SequenceState, before: np.ndarray) -> int | None:
    """The seat of a sample of the same request whose prompt stands in the cache.

    `_NOT_YET` while such a sample still computes the prompt: this one waits for it rather than
    compute it again.
    """
    if seq.every_logit or seq.num_prompt < 2 or seq.num_swapped:
        return None
    siblings = [
        i for i, r in enumerate(batch.running) if r is not None and r.request is seq.request
    ]
    ready = [i for i in siblings if before[i] >= seq.num_prompt]
    if ready and batch.config.window is not None:  # one that went on may have let go of keys
        seen = max(seq.num_prompt - batch.config.window, 0) // batch.pool.block_size
        return next((i for i in ready if batch.num_evicted[i] <= seen), None)
    return ready[0] if ready else (_NOT_YET if siblings else None)


def _place(
    batch: BatchScheduler, seq: SequenceState, source: int | None, seat: int
) -> tuple[BatchScheduler, SequenceState] | None:
    """Seat `seq` with the blocks that it can share; None where the pool has no room for it.

    There is room when all its tokens fit beside what the running prefills will still need, and the
    watermark stays free for decodes to grow into.
    """
    size, pool, copies = batch.pool.block_size, batch.pool, batch.copies
    shared = np.zeros(0, np.int32)
    if seq.num_swapped:
        cached = seq.num_computed
        if batch.config.enable_prefix_caching:  # others may hold the beginning, or the pool still
            pool, shared = pool.match_prefix(seq.keys[: cached // size])
    elif source is not None:
        cached = seq.num_prompt - 1  # the last token gives the logits that each sample draws from
        shared = batch.tables[source][: cached // size]
        pool = pool.fork(shared)
    else:
        if batch.config.enable_prefix_caching and not seq.every_logit:
            pool, shared = pool.match_prefix(seq.keys[: (seq.num_known - 1) // size])
        cached = len(shared) * size
    if batch.config.window is not None:  # the beginning of a prefix may be beyond all sight
        dead = max(cached - batch.config.window + 1, 0) // size
        pool = pool.free(shared[:dead])
        shared = np.concatenate((np.full(dead, NULL_BLOCK, np.int32), shared[dead:]))
    most = blocks_needed(batch.config, batch.config.max_model_len, size)
    need = _ceil(min(seq.num_known + 1, seq.limit - 1), size) - len(shared)
    need = min(need, most - np.count_nonzero(shared))
    if any(r is not None for r in batch.running):
        waiting_for = np.clip(_ceil(batch.num_tokens, size) - batch.num_blocks, 0, most).sum()
        need += int(waiting_for) + int(batch.config.watermark * pool.num_blocks)
    if need > pool.num_free:
        return None
    blocks, swap_ins = shared, batch.swap_ins
    if seq.num_swapped:
        pool, fresh = pool.allocate(seq.num_swapped - len(shared))
        places = np.concatenate((np.full(len(shared), -1, np.int32), fresh))
        swap_ins = (*swap_ins, (seq.seq_id, places))
        blocks = np.concatenate((shared, fresh))
    elif source is not None and cached % size:  # copy on write: the block that the prompt ends in
        pool, fresh = pool.allocate(1)
        copies = (*copies, (int(batch.tables[source][cached // size]), int(fresh[0])))
        blocks = np.concatenate((shared, fresh))
    seq = dataclasses.replace(
        seq,
        num_computed=cached,
        num_swapped=0,
        num_cached=cached if not seq.preemptions else seq.num_cached,
        num_charged=seq.num_charged,
        status=SequenceStatus.PREFILLING,
        seat=seat,
    )
    last = seq.keys[len(shared) - 1] if len(shared) and seq.keys else None
    batch = dataclasses.replace(batch, pool=pool, copies=copies, swap_ins=swap_ins)
    return _seated(batch, seq, blocks, len(shared), last), seq


def _seated(
    batch: BatchScheduler,
    seq: SequenceState,
    blocks: np.ndarray,
    num_published: int,
    last_key: BlockKey | None,
) -> BatchScheduler:
    """Write `seq` into the columns of its seat; `last_key` is that of its last published block."""
    values: dict[str, Any] = dict(
        num_tokens=seq.num_known,
        num_known=seq.num_known,
        num_computed=seq.num_computed,
        num_blocks=len(blocks),
        num_sent=0,
        num_published=num_published,
        num_evicted=np.count_nonzero(blocks == NULL_BLOCK),
        limit=seq.limit,
        arrival=seq.arrival,
        user=batch.users[seq.request.user],
        synchronous=seq.synchronous,
    )
    columns = {}
    for name, value in values.items():
        columns[name] = getattr(batch, name).copy()
        columns[name][seq.seat] = value
    seated = dataclasses.replace(seq, num_charged=seq.num_prompt)
    return dataclasses.replace(
        batch,
        running=_replaced(batch.running, {seq.seat: seated}),
        tables=_replaced(batch.tables, {seq.seat: blocks}),
        keys=_replaced(batch.keys, {seq.seat: last_key}),
        **columns,
    )


# The step itself.


def _issue(
    batch: BatchScheduler,
    take: np.ndarray,
    admitted: list[SequenceState],
    preempted: list[SequenceState],
) -> tuple[BatchScheduler, Schedule]:
    """Write the step down, and move the batch to where it stands once the step is issued."""
    seats = np.flatnonzero(take)
    starts, counts = batch.num_computed[seats], take[seats]
    samples = starts + counts == batch.num_tokens[seats]
    schedule = Schedule(
        seats=seats,
        starts=starts,
        counts=counts,
        samples=samples,
        updates=_table_updates(batch),
        swap_outs=batch.swap_outs,
        swap_ins=batch.swap_ins,
        copies=batch.copies,
        admitted=tuple(admitted),
        preempted=tuple(preempted),
    )
    if not len(seats):
        return batch, schedule
    promised, paused = batch.num_tokens.copy(), batch.paused.copy()
    late = batch.synchronous[seats]
    promised[seats[samples & ~late]] += 1
    paused[seats[samples & late]] = True
    service = batch.service.copy()
    np.add.at(service, batch.user[seats[samples]], OUTPUT_COST)
    batch = dataclasses.replace(
        batch,
        num_computed=batch.num_computed + take,
        num_tokens=promised,
        num_sent=batch.num_blocks,
        paused=paused,
        service=service,
        swap_outs=(),
        swap_ins=(),
        copies=(),
        evicted=(),
    )
    return _publish(batch), schedule


def _table_updates(batch: BatchScheduler) -> np.ndarray:
    """(seat, index, block) for every entry of a block table that the device lacks, `[u, 3]`."""
    parts = []
    for seat, begin, end in batch.evicted:
        index = np.arange(begin, min(end, int(batch.num_sent[seat])))
        rows = np.full((len(index), 3), NULL_BLOCK, np.int32)
        rows[:, 0], rows[:, 1] = seat, index
        parts.append(rows)
    for seat in np.flatnonzero(batch.num_blocks > batch.num_sent):
        index = np.arange(batch.num_sent[seat], batch.num_blocks[seat])
        rows = np.empty((len(index), 3), np.int32)
        rows[:, 0], rows[:, 1], rows[:, 2] = seat, index, batch.tables[seat][index]
        parts.append(rows)
    return np.concatenate(parts) if parts else np.zeros((0, 3), np.int32)


def _publish(batch: BatchScheduler) -> BatchScheduler:
    """Let the prefix cache find every block that is full and whose tokens the host knows.

    A block counts as written as soon as its step is issued: the device runs steps in order, and
    within a step every token is written before any is attended to.
    """
    if not batch.config.enable_prefix_caching:
        return batch
    size = batch.pool.block_size
    full = np.minimum(batch.num_known, batch.num_computed) // size
    seats = np.flatnonzero(full > batch.num_published)
    if not len(seats):
        return batch
    blocks, keys, last = [], [], {}
    for seat in seats.tolist():
        seq, key = batch.at(seat), batch.keys[seat]
        for j in range(int(batch.num_published[seat]), int(full[seat])):
            if j < len(seq.keys):
                key = seq.keys[j]
            else:
                key = BlockKey(
                    key, seq.log[j * size : (j + 1) * size].tobytes(), seq.request.cache_salt
                )
            blocks.append(batch.tables[seat][j])
            keys.append(key)
        last[seat] = key
    return dataclasses.replace(
        batch,
        pool=batch.pool.publish(np.array(blocks, np.int32), keys),
        keys=_replaced(batch.keys, last),
        num_published=np.maximum(batch.num_published, full),
    )


def _queued(batch: BatchScheduler, seq: SequenceState) -> BatchScheduler:
    """`seq` among the waiting, with the keys of its full blocks."""
    if batch.config.enable_prefix_caching:
        keys = block_keys(seq.tokens, batch.pool.block_size, extra=seq.request.cache_salt)
        seq = dataclasses.replace(seq, keys=tuple(keys))
    where = len(batch.waiting)
    while where and batch.waiting[where - 1].arrival > seq.arrival:
        where -= 1
    waiting = (*batch.waiting[:where], seq, *batch.waiting[where:])
    return dataclasses.replace(batch, waiting=waiting)


def _replaced(column: tuple[Any, ...], values: Mapping[int, Any]) -> tuple[Any, ...]:
    """`column` with some entries changed."""
    changed = list(column)
    for i, value in values.items():
        changed[i] = value
    return tuple(changed)


def _ceil(tokens, size: int):
    return -(-tokens // size)
