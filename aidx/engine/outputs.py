"""What a request gives back, in vLLM's shape."""

from dataclasses import dataclass, field
from typing import Literal

FinishReason = Literal["stop", "length", "abort", "error"]


@dataclass(frozen=True)
class Logprob:
    """A token's log-probability under the raw logits, its rank (1 is the most likely), its text."""

    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


Logprobs = dict[int, Logprob]


@dataclass(frozen=True)
class CompletionOutput:
    """One of a request's `n` samples.

    `finish_reason`: "stop" (end-of-sequence, stop token or stop string), "length" (max_tokens or
    the model's length), "abort" (cancelled), "error"; None while it runs.  `stop_reason`: the stop
    string or stop token id that ended it, the message of an error, None for end-of-sequence.
    `logprobs[i]` maps token ids to `Logprob`: the i-th token first, then the most likely ones.

    >>> CompletionOutput(0, " Paris", (3681,), finish_reason="length").finished
    True
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    cumulative_logprob: float | None = None
    logprobs: tuple[Logprobs, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def finished(self) -> bool:
        """Whether the sample has ended, for whatever reason."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class RequestMetrics:
    """When things happened to a request, in seconds of one monotonic clock; None: not yet.

    >>> m = RequestMetrics(1.0, first_scheduled_time=1.5, first_token_time=2.0, finished_time=4.0,
    ...                    num_generation_tokens=10, longest_sample=5)
    >>> m.queue_time, m.time_to_first_token, m.inter_token_latency
    (0.5, 1.0, 0.5)
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_generation_tokens: int = 0  # of all samples
    longest_sample: int = 0  # tokens of it
    num_preemptions: int = 0

    @property
    def queue_time(self) -> float | None:
        """Seconds from arrival to the first step that worked on it."""
        return _difference(self.first_scheduled_time, self.arrival_time)

    @property
    def time_to_first_token(self) -> float | None:
        """Seconds from arrival to the first token."""
        return _difference(self.first_token_time, self.arrival_time)

    @property
    def inter_token_latency(self) -> float | None:
        """Mean seconds between the tokens of a sample; None for fewer than two.

        Samples run side by side, so the longest one's tokens are counted, not the sum.
        """
        span = _difference(self.finished_time, self.first_token_time)
        if span is None or self.longest_sample < 2:
            return None
        return span / (self.longest_sample - 1)


def _difference(later: float | None, earlier: float | None) -> float | None:
    return None if later is None or earlier is None else later - earlier


@dataclass(frozen=True)
class RequestOutput:
    """A request's outputs so far; `finished` once every sample has ended.

    `prompt_logprobs[i]` belongs to the i-th prompt token; the first is None (nothing predicts it).
    `num_cached_tokens` prompt tokens came from the prefix cache.  `seed` is the one the samples
    were drawn with: the request's own, or the one drawn for it.

    >>> done = CompletionOutput(0, "!", (0,), finish_reason="stop")
    >>> RequestOutput("r0", "Hi", (17250,), outputs=(done,)).finished
    True
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...] = ()
    prompt_logprobs: tuple[Logprobs | None, ...] | None = None
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    seed: int | None = None

    @property
    def finished(self) -> bool:
        """Whether every sample has ended."""
        return bool(self.outputs) and all(output.finished for output in self.outputs)


@dataclass(frozen=True)
class BeamSearchSequence:
    """One beam: prompt and generated tokens, the latter's summed log-probability, the text."""

    tokens: tuple[int, ...]
    cum_logprob: float = 0.0
    text: str | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class BeamSearchOutput:
    """The beams of one prompt, best score first."""

    sequences: tuple[BeamSearchSequence, ...] = field(default=())


def logprobs_of_token(
    token: int,
    logprob: float,
    rank: int,
    top_tokens=(),
    top_logprobs=(),
    decode=None,
) -> Logprobs:
    """The `Logprobs` of one position: the token itself first, then the most likely ones.

    `decode(id) -> str` fills `decoded_token`; without it that stays None.

    >>> out = logprobs_of_token(7, -1.5, 2, [9, 7], [-0.5, -1.5])
    >>> list(out), out[9].rank
    ([7, 9], 1)
    """
    text = decode if decode is not None else lambda _: None
    out = {int(token): Logprob(float(logprob), int(rank), text(int(token)))}
    for place, (other, value) in enumerate(zip(top_tokens, top_logprobs, strict=True), start=1):
        out.setdefault(int(other), Logprob(float(value), place, text(int(other))))
    return out
