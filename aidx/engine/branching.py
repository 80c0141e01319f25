"""Beams that fork and die: sequences replaced by continuations of theirs."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from aidx.engine.batch import NO_BLOCKS, BatchScheduler, cancel, queued, replaced, seated
from aidx.engine.request import SequenceState, SequenceStatus


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
                blocks=NO_BLOCKS,
                status=SequenceStatus.PENDING,
            )
            batch = queued(batch, child)
        made.append(child)
    return batch, made


def _continue_in_seat(batch: BatchScheduler, child: SequenceState) -> BatchScheduler:
    """`child` goes on where its parent sits, one token further."""
    known, promised, paused = (
        column.copy() for column in (batch.num_known, batch.num_tokens, batch.paused)
    )
    known[child.seat] = promised[child.seat] = child.num_known
    paused[child.seat] = False
    seq_ids = batch.seq_ids.copy()
    seq_ids[child.seat] = child.seq_id
    return batch.replace(
        running=replaced(batch.running, {child.seat: child}),
        seq_ids=seq_ids,
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
    batch = batch.replace(pool=pool, copies=copies)
    return seated(batch, child, blocks, published, batch.keys[source]), child
