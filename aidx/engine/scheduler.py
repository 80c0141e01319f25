"""Which tokens the next step computes: a pure function of immutable state.

`schedule(batch) -> (batch, Schedule)` runs once a step:

    1. share the token budget among the running sequences, decodes first;
    2. find their blocks, preempting the newest (or the lowest priority) when there are too few
       (`preemption.py`);
    3. admit waiting sequences in the policy's order while seats, budget and memory last
       (`admission.py`);
    4. where too much of the step would be padding, plan it again with a smaller budget.

`add` and `cancel` bring sequences in and take them out, `record` and `finish` bring back what the
device sampled.  The state is `BatchScheduler` (`batch.py`).  No JAX in here: this room can be
tested with a counter in place of a model.
"""

import bisect
import dataclasses

import numpy as np

from aidx.cache import NULL_BLOCK, BlockKey
from aidx.engine.admission import OUTPUT_COST, admit
from aidx.engine.batch import (
    NO_UPDATES,
    BatchScheduler,
    Schedule,
    blocks_needed,
    grow,
    queued,
    replaced,
)
from aidx.engine.batch import POLICIES as POLICIES
from aidx.engine.batch import PREEMPTION_MODES as PREEMPTION_MODES
from aidx.engine.batch import SchedulerConfig as SchedulerConfig
from aidx.engine.batch import cancel as cancel
from aidx.engine.batch import finish as finish
from aidx.engine.batch import new_batch as new_batch
from aidx.engine.branching import branch as branch
from aidx.engine.preemption import evict, find_blocks, preempt
from aidx.engine.preemption import forget_swapped as forget_swapped
from aidx.engine.preemption import preempt_all as preempt_all
from aidx.engine.request import SequenceState, SequenceStatus

# What comes and goes.


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
    return queued(batch.replace(users=users, service=service), seq)


def record(batch: BatchScheduler, seats: np.ndarray, tokens: np.ndarray) -> BatchScheduler:
    """The host has read what a step sampled: one token for each of `seats`.

    A synchronous sequence was paused until now, and goes on.
    """
    known = batch.num_known.copy()
    places = known[seats].tolist()
    for seat, place, token in zip(seats.tolist(), places, tokens.tolist(), strict=True):
        batch.at(seat).log[place] = token
    known[seats] += 1
    promised, paused = batch.num_tokens, batch.paused
    late = batch.synchronous[seats]
    if late.any():
        promised = promised.copy()
        promised[seats[late]] += 1
        paused = paused.copy()
        paused[seats[late]] = False
    return batch.replace(num_known=known, num_tokens=promised, paused=paused)


# One step.


def schedule(
    batch: BatchScheduler, *, drained: bool = True, last: Schedule | None = None
) -> tuple[BatchScheduler, Schedule | None]:
    """What the next step computes, and the batch as it is once that step is issued.

    `drained=False` says that results of a step are still to be read.  A preemption needs them (the
    tokens are computed again, so the host must know them): where one is due, `(batch, None)` comes
    back unchanged and the caller reads the results first.  `last` is what the step before computed,
    if the caller has it at hand: where the next step does the same again, that is all there is to
    look at.
    """
    nobody_comes = not batch.waiting or None not in batch.running
    if last is not None and last.repeats and last.running is batch.running and nobody_comes:
        again = _repeat(batch, last)
        if again is not None:
            return again
    return _plan(batch, batch.config.max_num_batched_tokens, drained)


def _plan(
    batch: BatchScheduler, budget: int, drained: bool
) -> tuple[BatchScheduler, Schedule | None]:
    """`schedule` with `budget` tokens at most, whatever the last step was."""
    before, batch = batch, evict(batch)
    take = need = _need(batch)
    prompts = need.max() > 1
    if prompts:  # else decodes, for all of which there is room
        take = _share_budget(batch, need, budget)
    batch, take, preempted = find_blocks(batch, take, drained)
    if take is None:
        return before, None
    admitted: list[SequenceState] = []
    if not preempted:
        batch, take, admitted = admit(batch, take, budget)
    blocked = None if admitted or preempted else _blocked_by_sibling(batch, take)
    if blocked is None:
        if (prompts or admitted) and not preempted and (size := _size_to_fill(batch, take)):
            filled, work = _plan(before, size, drained)
            if work is not None and work.num_tokens == size:
                return filled, work
        return _issue(batch, take, admitted, preempted)
    if not drained:
        return before, None
    batch, seq = preempt(before, blocked)
    batch, found = schedule(batch)
    assert found is not None  # that is for a step in flight, and there is none
    return batch, dataclasses.replace(found, preempted=(seq, *found.preempted))


def _repeat(batch: BatchScheduler, last: Schedule) -> tuple[BatchScheduler, Schedule] | None:
    """The rows of `last` decode once more; None where the pool lacks a block for one of them."""
    computed, calm, updates = batch.num_computed + last.take, last.calm - 1, NO_UPDATES
    if not last.calm:
        short = (computed > batch.num_blocks * batch.pool.block_size).astype(np.int64)
        if short.sum() > batch.pool.num_free:
            return None
        batch = grow(batch, short)
        updates = _table_updates(batch)
    batch = batch.replace(
        num_computed=computed,
        num_tokens=batch.num_tokens + last.take,
        num_sent=batch.num_blocks,
    )
    if not last.calm:
        batch = _publish(batch)
        calm = _calm(batch, last.seats)
    return batch, Schedule(
        seats=last.seats,
        starts=last.starts + 1,
        counts=last.counts,
        samples=last.samples,
        running=last.running,
        take=last.take,
        repeats=last.repeats - 1,
        calm=calm,
        updates=updates,
    )


def _repeats(batch: BatchScheduler, take: np.ndarray, samples: np.ndarray) -> int:
    """`Schedule.repeats` of a step that computes `take`, once it is issued."""
    if not np.array_equal(take, samples) or batch.synchronous.any():
        return 0
    if batch.config.window is not None or batch.config.policy == "fair":  # every step counts
        return 0
    return int((batch.limit - batch.num_tokens)[samples].min())


def _calm(batch: BatchScheduler, seats: np.ndarray) -> int:
    """`Schedule.calm` of a step in which `seats` decode, once it is issued."""
    size = batch.pool.block_size
    steps = batch.num_blocks * size - batch.num_computed
    if batch.config.enable_prefix_caching:
        steps = np.minimum(steps, (batch.num_published + 1) * size - batch.num_known - 1)
    return max(int(steps[seats].min()), 0)


def _blocked_by_sibling(batch: BatchScheduler, take: np.ndarray) -> int | None:
    """The seat of a paused beam that waits for a sibling that waits for a seat, or for blocks."""
    if not batch.paused.any() or (take.any() and None in batch.running):
        return None
    waiting = [s.request for s in batch.waiting if s.status is not SequenceStatus.PAUSED]
    paused = [i for i in np.flatnonzero(batch.paused) if batch.at(i).request in waiting]
    return int(paused[-1]) if paused else None


def _size_to_fill(batch: BatchScheduler, take: np.ndarray) -> int:
    """The size below `take` that the step had better fill than be padded to the next; 0: none.

    That is where the padding is more than what is put off, and that at most half of the prompts'
    tokens.  Without decodes nothing is: the first token of a lone prompt would wait for a second
    step.
    """
    sizes, tokens = batch.config.step_sizes, int(take.sum())
    at = bisect.bisect_left(sizes, tokens)
    if not 0 < at < len(sizes):
        return 0
    size, padded = sizes[at - 1 : at + 1]
    decodes = np.count_nonzero((take == 1) & (batch.num_computed + 1 == batch.num_tokens))
    put_off = tokens - size
    return size if decodes and put_off < padded - tokens and put_off <= size - decodes else 0


def _need(batch: BatchScheduler) -> np.ndarray:
    """Tokens that each running sequence has left to compute, `[S]`."""
    idle = batch.paused | (batch.num_tokens >= batch.limit)
    return np.where(idle, 0, batch.num_tokens - batch.num_computed)


def _share_budget(batch: BatchScheduler, need: np.ndarray, budget: int) -> np.ndarray:
    """Tokens of each running sequence in this step, `[S]`: decodes first, then by policy."""
    config, need = batch.config, need.copy()
    if need.sum() > budget:
        order = np.lexsort((batch.arrival, _running_key(batch, need), need > 1))
        ahead = np.zeros_like(need)
        ahead[order] = np.cumsum(need[order]) - need[order]
        need = np.clip(budget - ahead, 0, need)
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


def _issue(
    batch: BatchScheduler,
    take: np.ndarray,
    admitted: list[SequenceState],
    preempted: list[SequenceState],
) -> tuple[BatchScheduler, Schedule]:
    """Write the step down, and move the batch to where it stands once the step is issued."""
    seats, computed = take.nonzero()[0], batch.num_computed + take
    samples = (computed == batch.num_tokens) & (take > 0)
    before, starts, updates = batch, batch.num_computed[seats], _table_updates(batch)
    repeats = calm = 0
    if len(seats):
        late = samples & batch.synchronous
        service = batch.service
        if batch.config.policy == "fair":
            service = service.copy()
            np.add.at(service, batch.user[samples], OUTPUT_COST)
        batch = batch.replace(
            num_computed=computed,
            num_tokens=batch.num_tokens + (samples ^ late),
            num_sent=batch.num_blocks,
            paused=batch.paused | late,
            service=service,
            swap_outs=(),
            swap_ins=(),
            copies=(),
            evicted=(),
        )
        batch = _publish(batch)
        repeats = _repeats(batch, take, samples)
        calm = _calm(batch, seats) if repeats else 0
    return batch, Schedule(
        seats=seats,
        starts=starts,
        counts=take[seats],
        samples=samples[seats],
        running=batch.running,
        take=take,
        repeats=repeats,
        calm=calm,
        updates=updates,
        swap_outs=before.swap_outs,
        swap_ins=before.swap_ins,
        copies=before.copies,
        admitted=tuple(admitted),
        preempted=tuple(preempted),
    )


def _table_updates(batch: BatchScheduler) -> np.ndarray:
    """(seat, index, block) for every entry of a block table that the device lacks, `[u, 3]`."""
    if batch.num_sent is batch.num_blocks and not batch.evicted:  # as the last step left them
        return NO_UPDATES
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
    return np.concatenate(parts) if parts else NO_UPDATES


def _publish(batch: BatchScheduler) -> BatchScheduler:
    """Let the prefix cache find every block that is full and whose tokens the host knows.

    A block counts as written as soon as its step is issued: the device runs steps in order, and
    within a step every token is written before any is attended to.
    """
    if not batch.config.enable_prefix_caching:
        return batch
    size = batch.pool.block_size
    full = np.minimum(batch.num_known, batch.num_computed) // size
    seats = (full > batch.num_published).nonzero()[0]
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
    return batch.replace(
        pool=batch.pool.publish(np.array(blocks, np.int32), keys),
        keys=replaced(batch.keys, last),
        num_published=np.maximum(batch.num_published, full),
    )
