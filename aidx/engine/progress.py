"""What a sample's output looks like so far, token by token: text, logprobs, whether it ended.

`Rules` is what stays the same during a request, `Progress` what changes; `advance` is a pure
function from one to the next.
"""

import dataclasses

from aidx.engine.detokenizer import Detokenizer, DetokenizerState
from aidx.engine.outputs import CompletionOutput, FinishReason, Logprobs


@dataclasses.dataclass(frozen=True)
class Rules:
    """When a request's samples end, and what their text is made with.

    Attributes:
        eos_ids: tokens that end it without a stop_reason.
        stop_ids: tokens that end it and are its stop_reason.
        min_tokens: tokens before which neither counts.
        include_stop: whether a stop token's text is part of the text.
        detokenizer: None gives token ids without text.
    """

    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    include_stop: bool = False
    detokenizer: Detokenizer | None = None


@dataclasses.dataclass(frozen=True)
class Progress:
    """A sample's output so far; the tokens themselves are in the sequence's log."""

    text: str = ""
    state: DetokenizerState | None = None
    logprobs: tuple[Logprobs, ...] = ()
    cumulative_logprob: float = 0.0
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


def start(rules: Rules, prompt) -> Progress:
    """Before the first token.

    Example:
        >>> start(Rules(), [1, 2]).text
        ''
    """
    return Progress(state=rules.detokenizer.init(prompt) if rules.detokenizer else None)


def advance(
    progress: Progress,
    rules: Rules,
    token: int,
    num_output: int,
    *,
    last: bool = False,
    logprobs: Logprobs | None = None,
) -> Progress:
    """One more token, the `num_output`-th; `last` says that there is no room for another.

    Example:
        >>> rules = Rules(eos_ids=frozenset({2}), stop_ids=frozenset({5}))
        >>> advance(Progress(), rules, 5, 1).stop_reason
        5
        >>> advance(Progress(), rules, 7, 1, last=True).finish_reason
        'length'
        >>> advance(Progress(), rules, 7, 1).finish_reason is None
        True
    """
    reason: FinishReason | None = "length" if last else None
    stop_reason: int | str | None = None
    if num_output >= rules.min_tokens:
        if token in rules.eos_ids:
            reason = "stop"
        elif token in rules.stop_ids:
            reason, stop_reason = "stop", token
    stopped_by_token = reason == "stop"
    text, state = progress.text, progress.state
    if rules.detokenizer is not None:
        if not stopped_by_token or rules.include_stop:
            state, delta = rules.detokenizer.step(state, token)
            text += delta
        if state.stop is not None:
            reason, stop_reason = "stop", state.stop
        elif reason is not None:
            state, delta = rules.detokenizer.finish(state)
            text += delta
            if state.stop is not None:
                reason, stop_reason = "stop", state.stop
    if logprobs is None and reason is None and text is progress.text and state is progress.state:
        return progress
    cumulative = progress.cumulative_logprob
    if logprobs is not None:
        cumulative += logprobs[token].logprob
    return Progress(
        text,
        state,
        progress.logprobs if logprobs is None else (*progress.logprobs, logprobs),
        cumulative,
        reason,
        stop_reason,
    )


def end(
    progress: Progress, rules: Rules, reason: FinishReason, stop_reason: int | str | None = None
) -> Progress:
    """It ends for a reason of its own: cancelled, failed.  Text that was held back is shown.

    Example:
        >>> end(Progress("abc"), Rules(), "abort").finish_reason
        'abort'
    """
    text, state = progress.text, progress.state
    if rules.detokenizer is not None and state is not None and reason != "error":
        state, delta = rules.detokenizer.finish(state)
        text += delta
    return dataclasses.replace(
        progress, text=text, state=state, finish_reason=reason, stop_reason=stop_reason
    )


def completion(
    progress: Progress, index: int, tokens: tuple[int, ...], *, with_logprobs: bool
) -> CompletionOutput:
    """As the caller sees it.

    Example:
        >>> completion(Progress("hi"), 0, (4, 5), with_logprobs=False).token_ids
        (4, 5)
    """
    return CompletionOutput(
        index=index,
        text=progress.text,
        token_ids=tokens,
        cumulative_logprob=progress.cumulative_logprob if with_logprobs else None,
        logprobs=progress.logprobs if with_logprobs else None,
        finish_reason=progress.finish_reason,
        stop_reason=progress.stop_reason,
    )
