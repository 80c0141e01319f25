"""The rows of a step: a `Schedule` with the tokens that the device lacks."""

import dataclasses

import numpy as np

from aidx.engine.batch import BatchScheduler, Schedule


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a plan; several of them may belong to one seat (every_logit)."""

    seats: np.ndarray  # [r]
    seq_ids: np.ndarray  # [r]
    starts: np.ndarray  # [r]
    counts: np.ndarray  # [r]
    samples: np.ndarray  # [r] bool
    targets: np.ndarray  # [r] prompt token whose logprob the row reports, -1 for none
    tokens: np.ndarray  # [t]


def next_rows(rows: Rows, work: Schedule) -> Rows | None:
    """The rows of `work` where it is the decode that follows the decode `rows`; else None.

    Asked while nobody takes or leaves a seat.
    """
    if work.seats is not rows.seats:  # a repeated step has the same
        if not np.array_equal(work.seats, rows.seats) or not work.samples.all():
            return None
        if work.num_tokens != len(work.seats):
            return None
    return dataclasses.replace(rows, seats=work.seats, starts=work.starts)


def plan_rows(
    batch: BatchScheduler, work: Schedule, every_logit: np.ndarray, drew: np.ndarray
) -> Rows:
    """The schedule's rows; a sequence that wants every logit has one for each of its tokens.

    Args:
        batch: who sits where.
        work: what the step computes.
        every_logit: `[S]` bool, seats that want one row a prompt token.
        drew: `[S]` bool, seats whose last token the device has.
    """
    seats, starts, counts, samples = work.seats, work.starts, work.counts, work.samples
    targets = np.full(len(seats), -1, np.int64)
    if every_logit[seats].any():
        running = {s: batch.at(s) for s in seats.tolist()}
        every = every_logit[seats] & (starts < [running[s].num_prompt for s in seats])
        repeats = np.where(every, counts, 1)
        row = np.repeat(np.arange(len(seats)), repeats)
        offset = np.arange(len(row)) - np.repeat(np.cumsum(repeats) - repeats, repeats)
        seats, starts, every = seats[row], starts[row] + offset, every[row]
        samples = samples[row] & (~every | (offset == counts[row] - 1))
        counts = np.where(every, 1, counts[row])
        following = [
            running[s].log[p + 1] if e and p + 1 < running[s].num_prompt else -1
            for s, p, e in zip(seats, starts, every, strict=True)
        ]
        targets = np.array(following, np.int64)
    ends = np.cumsum(counts)
    tokens = np.full(ends[-1], -1, np.int32)
    for i in np.flatnonzero(~(drew[seats] & (counts == 1))):
        at, first = ends[i] - counts[i], starts[i]
        tokens[at : ends[i]] = batch.at(seats[i]).log[first : first + counts[i]]
    return Rows(seats, batch.seq_ids[seats], starts, counts, samples, targets, tokens)
