"""What is asked for (`Request`) and how far one sample of it has come (`SequenceState`).

A request with `n` samples is `n` sequences: they share the prompt's blocks, not their fate.
"""

import dataclasses
import enum
from typing import Any

import numpy as np


class SequenceStatus(enum.StrEnum):
    """Where a sequence stands.

    pending -> prefilling -> generating -> completed | cancelled | failed; `paused` sequences hold
    their seat and wait for the host (a beam for its siblings, a row whose next step needs its last
    token on the host).  A preempted sequence is pending again.
    """

    PENDING = "pending"
    PREFILLING = "prefilling"
    GENERATING = "generating"
    PAUSED = "paused"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    FAILED = "failed"


STATUS_AFTER = {
    "stop": SequenceStatus.COMPLETED,
    "length": SequenceStatus.COMPLETED,
    "abort": SequenceStatus.CANCELLED,
    "error": SequenceStatus.FAILED,
}
"""The status of a sequence that ended for a `CompletionOutput.finish_reason`."""


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What a caller asked for; it never changes.

    Attributes:
        request_id: the caller's name for it, unique among the unfinished ones.
        prompt: token ids, `[P]` i32, at least one.
        params: `SamplingParams` (`BeamSearchParams` for a beam search).
        priority: smaller goes first under the policy `priority`.
        user: whose service the policy `fair` counts it as.
        prompt_text: the prompt as text, where there was one.
        cache_salt: prefixes are shared only between requests of one salt.
    """

    request_id: str
    prompt: np.ndarray
    params: Any
    priority: int = 0
    user: str = ""
    prompt_text: str | None = None
    cache_salt: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class SequenceState:
    """One sample of one request, as the scheduler sees it.

    `log` holds the tokens, prompt first; it is append-only and shared by successive states: a state
    reads its first `num_known` entries only.  `num_tokens - num_known` tokens were sampled by steps
    whose results the host has not read yet.

    Attributes:
        seq_id: unique in a scheduler.
        request: what it is a sample of.
        index: which of the request's samples.
        log: `[limit]` i32, the tokens.
        num_prompt: tokens of the prompt.
        limit: tokens at which it ends, prompt included.
        arrival: order of arrival; samples of one request have consecutive ones.
        num_known: tokens that the host has read.
        num_computed: tokens whose keys and values the steps issued so far have written.
        num_swapped: blocks of them that host memory holds; only while it waits.
        num_cached: of those, at admission, found in the prefix cache or forked.
        num_charged: tokens of the prompt that the user has been charged for (policy `fair`).
        overtaken: steps in which a later arrival was admitted before it.
        preemptions: how often it had to give its blocks back.
        synchronous: its next step needs its last token on the host.
        every_logit: one row for each token of its prompt, to have all its logits (prompt_logprobs).
        status: see `SequenceStatus`.
        seat: row of the device's state, -1 when it has none.
        blocks: block ids, `[num_blocks]` i32.
        keys: what its full blocks hold, as the prefix cache names it, when it was last queued.
    """

    seq_id: int
    request: Request
    index: int
    log: np.ndarray
    num_prompt: int
    limit: int
    arrival: int
    num_known: int
    num_computed: int = 0
    num_swapped: int = 0
    num_cached: int = 0
    num_charged: int = 0
    overtaken: int = 0
    preemptions: int = 0
    synchronous: bool = False
    every_logit: bool = False
    status: SequenceStatus = SequenceStatus.PENDING
    seat: int = -1
    blocks: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    keys: tuple[Any, ...] = ()

    @property
    def tokens(self) -> np.ndarray:
        """The tokens that the host knows, `[num_known]` i32: prompt, then output."""
        return self.log[: self.num_known]

    @property
    def output(self) -> np.ndarray:
        """The output tokens that the host knows."""
        return self.log[self.num_prompt : self.num_known]


def new_sequence(
    request: Request,
    *,
    seq_id: int,
    arrival: int,
    max_tokens: int | None,
    max_model_len: int,
    index: int = 0,
    synchronous: bool = False,
    every_logit: bool = False,
) -> SequenceState:
    """The state of sample `index` of `request` at its arrival.

    It ends at `min(len(prompt) + max_tokens, max_model_len)` tokens.

    Example:
        >>> request = Request("a", np.array([5, 6, 7], np.int32), None)
        >>> seq = new_sequence(request, seq_id=0, arrival=0, max_tokens=4, max_model_len=64)
        >>> seq.limit, seq.tokens.tolist(), str(seq.status)
        (7, [5, 6, 7], 'pending')
    """
    num_prompt = len(request.prompt)
    limit = max_model_len if max_tokens is None else min(num_prompt + max_tokens, max_model_len)
    log = np.zeros(max(limit, num_prompt), np.int32)
    log[:num_prompt] = request.prompt
    return SequenceState(
        seq_id=seq_id,
        request=request,
        index=index,
        log=log,
        num_prompt=num_prompt,
        limit=limit,
        arrival=arrival,
        num_known=num_prompt,
        synchronous=synchronous,
        every_logit=every_logit,
    )
