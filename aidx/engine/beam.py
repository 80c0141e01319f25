"""Beam search on the host: which continuations live on, which are finished, when to stop.

The bookkeeping is that of `transformers` (early_stopping=False), so that the beams are the same:

    candidates: the best k = max(2, 1 + |eos|) * width of  score_b + log p(token | beam b)
    running':   the best `width` of them that do not end
    finished':  those among the first `width` that end, at score / length^length_penalty,
                merged with the finished ones; the best `width` stay
    stop:       every candidate ends, or `width` are finished and no running beam can beat the worst

Scores are float32, added in the order in which the tokens came.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Hypothesis:
    """A beam: its generated tokens, their summed log-probability, whether it ended with EOS."""

    tokens: tuple[int, ...] = ()
    logprob: float | np.float32 = 0.0
    ended: bool = False


@dataclasses.dataclass(frozen=True)
class Beams:
    """The search of one request.

    Attributes:
        width: how many beams are kept.
        max_tokens: tokens at which every beam ends.
        eos_ids: tokens that end a beam.
        length_penalty: exponent of the length that a score is divided by.
        running: the live beams, best first.
        finished: (score, beam), best first, at most `width`.
    """

    width: int
    max_tokens: int
    eos_ids: frozenset[int] = frozenset()
    length_penalty: float = 1.0
    running: tuple[Hypothesis, ...] = (Hypothesis(),)
    finished: tuple[tuple[float | np.float32, Hypothesis], ...] = ()

    @property
    def num_candidates(self) -> int:
        """Tokens of each beam that a selection looks at: enough that `width` of them go on.

        Example:
            >>> Beams(width=4, max_tokens=8, eos_ids=frozenset({2})).num_candidates
            8
        """
        return max(2, 1 + len(self.eos_ids)) * self.width


def select(
    beams: Beams, tokens: Sequence[np.ndarray], logprobs: Sequence[np.ndarray]
) -> tuple[Beams, list[int]]:
    """One round.

    Args:
        beams: the search so far.
        tokens: for each running beam its `num_candidates` most likely tokens, `[k]` i32.
        logprobs: theirs, `[k]` f32.

    Returns:
        The search, and for each new running beam the old one that it continues; no running beams
        when the search is over.

    Example:
        >>> beams = Beams(width=1, max_tokens=2)
        >>> one = [np.array([3, 4])], [np.log(np.array([0.7, 0.3], np.float32))]
        >>> beams, parents = select(beams, *one)
        >>> beams.running[0].tokens, parents
        ((3,), [0])
        >>> beams, parents = select(beams, *one)
        >>> beams.finished[0][1].tokens, parents
        ((3, 3), [])
    """
    score = np.array([beam.logprob for beam in beams.running], np.float32)
    total = (score[:, None] + np.stack(logprobs).astype(np.float32)).ravel()
    best = np.argsort(-total, kind="stable")[: beams.num_candidates]
    k = len(tokens[0])
    length = len(beams.running[0].tokens) + 1
    candidates = []
    for i in best:
        parent, token = int(i) // k, int(tokens[int(i) // k][int(i) % k])
        ended = token in beams.eos_ids
        beam = Hypothesis((*beams.running[parent].tokens, token), np.float32(total[i]), ended)
        candidates.append((parent, beam, ended or length >= beams.max_tokens))
    norm = np.float32(length**beams.length_penalty)
    done = [(beam.logprob / norm, beam) for _, beam, ends in candidates[: beams.width] if ends]
    finished = sorted((*beams.finished, *done), key=lambda pair: -pair[0])[: beams.width]
    alive = [(parent, beam) for parent, beam, ends in candidates if not ends][: beams.width]
    if len(finished) == beams.width and alive and alive[0][1].logprob / norm <= finished[-1][0]:
        alive = []
    beams = dataclasses.replace(
        beams, running=tuple(beam for _, beam in alive), finished=tuple(finished)
    )
    return beams, [parent for parent, _ in alive]
