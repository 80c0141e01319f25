"""`BatchScheduler`: who runs, who waits, and who holds which blocks.

The running sequences are columns of small integer arrays, one entry a seat, so that a decode step
of hundreds of rows costs a few dozen NumPy calls.  Waiting ones are `SequenceState`s in a tuple.
What moves a sequence in or out of a seat is here; what decides it is in `scheduler.py` (budget),
`admission.py` (who comes in) and `preemption.py` (who must go).
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from aidx.cache import NULL_BLOCK, BlockKey, BlockPool, block_keys
from aidx.engine.request import SequenceState, SequenceStatus

POLICIES = ("fcfs", "priority", "shortest_first", "fair")
PREEMPTION_MODES = ("recompute", "swap")
NO_BLOCKS = np.zeros(0, np.int32)
NO_UPDATES = np.zeros((0, 3), np.int32)


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
        step_sizes: query tokens that steps with prompts are padded to, ascending.  Rather than be
            padded to the next, a step of decodes and prompts puts tokens off and fills the one
            below, where that wastes less.  (): no step is cut.

    Raises:
        ValueError: a limit is below its least, the policy or the mode is unknown, or the step sizes
            do not ascend.

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
    step_sizes: tuple[int, ...] = ()

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
        if any(b <= a for a, b in itertools.pairwise((0, *self.step_sizes))):
            raise ValueError(f"step_sizes={self.step_sizes} must ascend, from at least 1 on")


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
    whole = ceil_div(num_tokens, block_size)
    if config.window is None:
        return whole
    return min(whole, ceil_div(config.window + config.max_num_batched_tokens, block_size) + 2)


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
    seq_ids: np.ndarray  # [S] i64, -1 for nobody
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

    def replace(self, **changes: Any) -> "BatchScheduler":
        """`dataclasses.replace` at a fifth of its cost: every step makes some new states.

        Raises:
            TypeError: there is no such field.
        """
        if not changes.keys() <= self.__dict__.keys():
            raise TypeError(f"no fields: {sorted(changes.keys() - self.__dict__.keys())}")
        new = object.__new__(BatchScheduler)
        new.__dict__.update(self.__dict__, **changes)
        return new

    @property
    def num_running(self) -> int:
        """Sequences that have a seat."""
        return sum(seq is not None for seq in self.running)

    @property
    def unfinished(self) -> bool:
        """Whether anybody runs or waits."""
        return bool(self.waiting) or any(seq is not None for seq in self.running)

    def lengths(self) -> dict[int, int]:
        """seq_id -> tokens that the host knows, of everybody who runs or waits."""
        waiting = {seq.seq_id: seq.num_known for seq in self.waiting}
        return waiting | dict(zip(self.seq_ids.tolist(), self.num_known.tolist(), strict=True))

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
        running: who sits where.
        take: `[S]` i64, counts by seat.
        repeats: steps that may follow in which the same rows decode, until one of them ends;
            nobody coming or going meanwhile.
        calm: how many of them pass before a row needs a block or has one to publish.
        updates: `[u, 3]` i32, (seat, index, block): entries of block tables the device lacks.
        swap_outs, swap_ins, copies: what happens to blocks before the step, see `BatchScheduler`.
        admitted: sequences that took a seat in this step.
        preempted: sequences that lost theirs.
    """

    seats: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    samples: np.ndarray
    running: tuple[SequenceState | None, ...]
    take: np.ndarray
    repeats: int = 0
    calm: int = 0
    updates: np.ndarray = dataclasses.field(default_factory=lambda: NO_UPDATES)
    swap_outs: tuple[tuple[int, np.ndarray], ...] = ()
    swap_ins: tuple[tuple[int, np.ndarray], ...] = ()
    copies: tuple[tuple[int, int], ...] = ()
    admitted: tuple[SequenceState, ...] = ()
    preempted: tuple[SequenceState, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Query tokens of the step."""
        return int(self.counts.sum())


COUNTERS = (
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
        tables=(NO_BLOCKS,) * s,
        keys=(None,) * s,
        seq_ids=np.full(s, -1, np.int64),
        **dict.fromkeys(COUNTERS, zeros),
        paused=np.zeros(s, bool),
        synchronous=np.zeros(s, bool),
        users={},
        service=np.zeros(0),
    )


# In and out.


def queued(batch: BatchScheduler, seq: SequenceState) -> BatchScheduler:
    """`seq` among the waiting, with the keys of its full blocks."""
    if batch.config.enable_prefix_caching:
        keys = block_keys(seq.tokens, batch.pool.block_size, extra=seq.request.cache_salt)
        seq = dataclasses.replace(seq, keys=tuple(keys))
    where = len(batch.waiting)
    while where and batch.waiting[where - 1].arrival > seq.arrival:
        where -= 1
    waiting = (*batch.waiting[:where], seq, *batch.waiting[where:])
    return batch.replace(waiting=waiting)


def seated(
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
        seq_ids=seq.seq_id,
        arrival=seq.arrival,
        user=batch.users[seq.request.user],
        synchronous=seq.synchronous,
    )
    columns = {}
    for name, value in values.items():
        columns[name] = getattr(batch, name).copy()
        columns[name][seq.seat] = value
    seated = dataclasses.replace(seq, num_charged=seq.num_prompt)
    return batch.replace(
        running=replaced(batch.running, {seq.seat: seated}),
        tables=replaced(batch.tables, {seq.seat: blocks}),
        keys=replaced(batch.keys, {seq.seat: last_key}),
        **columns,
    )


def finish(batch: BatchScheduler, seats: Iterable[int]) -> BatchScheduler:
    """The sequences in `seats` are done: their blocks go back, their seats are empty."""
    seats = list(seats)
    if not seats:
        return batch
    held = [batch.tables[seat] for seat in seats]
    columns = {}
    for name in (*COUNTERS, "paused", "synchronous"):
        columns[name] = getattr(batch, name).copy()
        columns[name][seats] = 0
    seq_ids = batch.seq_ids.copy()
    seq_ids[seats] = -1
    empty = dict.fromkeys(seats)
    return batch.replace(
        pool=batch.pool.free(np.concatenate(held)),
        running=replaced(batch.running, empty),
        tables=replaced(batch.tables, dict.fromkeys(seats, NO_BLOCKS)),
        keys=replaced(batch.keys, empty),
        seq_ids=seq_ids,
        evicted=tuple(gap for gap in batch.evicted if gap[0] not in empty),
        **columns,
    )


def cancel(batch: BatchScheduler, seq_ids: Iterable[int]) -> BatchScheduler:
    """Forget these sequences, waiting or running; unknown ids are passed over."""
    gone = set(seq_ids)
    waiting = tuple(seq for seq in batch.waiting if seq.seq_id not in gone)
    seats = [i for i, seq in enumerate(batch.running) if seq is not None and seq.seq_id in gone]
    left = lambda moves: tuple(move for move in moves if move[0] not in gone)
    batch = batch.replace(
        waiting=waiting, swap_outs=left(batch.swap_outs), swap_ins=left(batch.swap_ins)
    )
    return finish(batch, seats)


def blocks_short(batch: BatchScheduler, take: np.ndarray) -> np.ndarray:
    """Blocks that each seat lacks for `take` more tokens, `[S]`."""
    whole = ceil_div(batch.num_computed + take, batch.pool.block_size)
    return np.where(take > 0, np.maximum(whole - batch.num_blocks, 0), 0)


def grow(batch: BatchScheduler, short: np.ndarray) -> BatchScheduler:
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
    return batch.replace(
        pool=pool,
        tables=replaced(batch.tables, tables),
        num_blocks=batch.num_blocks + short,
    )


def replaced(column: tuple[Any, ...], values: Mapping[int, Any]) -> tuple[Any, ...]:
    """`column` with some entries changed."""
    changed = list(column)
    for i, value in values.items():
        changed[i] = value
    return tuple(changed)


def ceil_div(tokens, size: int):
    """How many blocks of `size` so many tokens take; ints or arrays.

    Example:
        >>> ceil_div(9, 4)
        3
    """
    return -(-tokens // size)
