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
    running = [batch.at(seat) for seat in work.seats]
    running = dict(zip(work.seats.tolist(), running, strict=True))
    seats, starts, counts, samples = work.seats, work.starts, work.counts, work.samples
    targets = np.full(len(seats), -1, np.int64)
    if every_logit[seats].any():
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
    tokens = np.full(int(counts.sum()), -1, np.int32)
    ends = np.cumsum(counts)
    for i in np.flatnonzero(~(drew[seats] & (counts == 1))):
        at, first = ends[i] - counts[i], starts[i]
        tokens[at : ends[i]] = running[seats[i]].log[first : first + counts[i]]
    seq_ids = np.array([running[s].seq_id for s in seats], np.int64)
    return Rows(seats, seq_ids, starts, counts, samples, targets, tokens)
