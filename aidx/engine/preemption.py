"""Who of the running gives blocks back: because a window moved on, or because they run out."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from aidx.cache import NULL_BLOCK
from aidx.engine.batch import (
    NO_BLOCKS,
    BatchScheduler,
    blocks_short,
    ceil_div,
    finish,
    grow,
    queued,
    replaced,
)
from aidx.engine.request import SequenceState, SequenceStatus


def find_blocks(batch: BatchScheduler, take: np.ndarray, drained: bool):
    """Give every running sequence its blocks, preempting the last in line while they do not do."""
    preempted: list[SequenceState] = []
    if (batch.num_computed + take <= batch.num_blocks * batch.pool.block_size).all():
        return batch, take, preempted
    short = blocks_short(batch, take)
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
        batch, seq = preempt(batch, victim, swap=True)
        preempted.append(seq)
        take = take.copy()
        take[victim] = 0
        short = blocks_short(batch, take)
    return grow(batch, short), take, preempted


def preempt(
    batch: BatchScheduler, seat: int, *, swap: bool = False
) -> tuple[BatchScheduler, SequenceState]:
    """Take the seat and the blocks of a sequence; it waits, to be swapped in or recomputed."""
    seq = batch.sequence(seat)
    paused = seq.status is SequenceStatus.PAUSED
    blocks = _blocks_to_keep(batch, seq) if swap and not paused else NO_BLOCKS
    seq = dataclasses.replace(
        seq,
        num_computed=seq.num_computed if len(blocks) else 0,
        num_swapped=len(blocks),
        preemptions=seq.preemptions + 1,
        status=SequenceStatus.PAUSED if paused else SequenceStatus.PENDING,
        seat=-1,
        blocks=NO_BLOCKS,
    )
    if len(blocks):
        outs = (*batch.swap_outs, (seq.seq_id, blocks))
        batch = batch.replace(swap_outs=outs)
    return queued(finish(batch, [seat]), seq), seq


def _blocks_to_keep(batch: BatchScheduler, seq: SequenceState) -> np.ndarray:
    """What a preempted sequence takes along to host memory; nothing where it cannot."""
    config = batch.config
    blocks = seq.blocks[: ceil_div(seq.num_computed, batch.pool.block_size)]
    held = sum(other.num_swapped for other in batch.waiting)
    unwritten = {to for _, to in batch.copies}.intersection(blocks.tolist())
    if (
        config.preemption_mode != "swap"
        or held + len(blocks) > config.max_swapped_blocks
        or (blocks == NULL_BLOCK).any()  # a window let go of it: what is left is no beginning
        or unwritten
    ):
        return NO_BLOCKS
    return blocks


def preempt_all(batch: BatchScheduler) -> BatchScheduler:
    """Everybody waits again: what the cache holds is worth nothing any more."""
    for seat, seq in enumerate(batch.running):
        if seq is not None:
            batch, _ = preempt(batch, seat)
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
    return batch.replace(waiting=waiting, swap_outs=outs)


def evict(batch: BatchScheduler) -> BatchScheduler:
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
    return batch.replace(
        pool=batch.pool.free(np.concatenate(gone)),
        tables=replaced(batch.tables, tables),
        num_evicted=np.maximum(batch.num_evicted, dead),
        evicted=(*batch.evicted, *gaps),
    )
