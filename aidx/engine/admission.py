"""Who of the waiting takes a seat: the policies, and what a sequence shares when it sits down."""

import collections
import dataclasses
from collections.abc import Iterator

import numpy as np

from aidx.cache import NULL_BLOCK
from aidx.engine.batch import (
    BatchScheduler,
    blocks_needed,
    blocks_short,
    ceil_div,
    grow,
    seated,
)
from aidx.engine.request import SequenceState, SequenceStatus

# What a token costs a user under `fair`: VTC's weights of an input and an output token.
PROMPT_COST, OUTPUT_COST = 1.0, 2.0
_NOT_YET = -1


def admit(batch: BatchScheduler, take: np.ndarray, budget: int):
    """Seat waiting sequences while seats, `budget` tokens a step, rows and memory last."""
    if not batch.waiting:
        return batch, take, []
    config, before = batch.config, batch.num_computed
    free_seats = [i for i, seq in enumerate(batch.running) if seq is None]
    budget -= int(take.sum())
    rows = config.max_num_seqs - _num_rows(batch, take)
    if not (free_seats and budget and rows):
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
    batch = batch.replace(waiting=waiting, service=service)
    fresh = np.where(np.isin(np.arange(config.max_num_seqs), [s.seat for s in admitted]), take, 0)
    return grow(batch, blocks_short(batch, fresh)), take, admitted


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
    need = ceil_div(min(seq.num_known + 1, seq.limit - 1), size) - len(shared)
    need = min(need, most - np.count_nonzero(shared))
    if any(r is not None for r in batch.running):
        waiting_for = np.clip(ceil_div(batch.num_tokens, size) - batch.num_blocks, 0, most).sum()
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
    batch = batch.replace(pool=pool, copies=copies, swap_ins=swap_ins)
    return seated(batch, seq, blocks, len(shared), last), seq
