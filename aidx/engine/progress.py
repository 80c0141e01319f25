"""What a sample's output looks like so far, token by token: text, logprobs, whether it ended.

`Rules` is what stays the same during a request, `Progress` what changes; `advance` is a pure
function from one to the next.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

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
        text_at_end: make the text when the sample ends, in one piece: for who neither streams nor
            looks for stop strings.
    """

    eos_ids: frozenset[int] = frozenset()
    stop_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    include_stop: bool = False
    detokenizer: Detokenizer | None = None
    text_at_end: bool = False


@dataclasses.dataclass(frozen=True)
class Progress:
    """A sample's output so far; the tokens themselves are in the sequence's log.

    `num_tokens` counts those of which `advance` was told: all, once the sample has ended.
    """

    text: str = ""
    num_tokens: int = 0
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
    output: Sequence[int] | np.ndarray,
    *,
    last: bool = False,
    logprobs: Logprobs | None = None,
) -> Progress:
    """One more token, the last of `output`; `last` says that there is no room for another.

    Example:
        >>> rules = Rules(eos_ids=frozenset({2}), stop_ids=frozenset({5}))
        >>> advance(Progress(), rules, [5]).stop_reason
        5
        >>> advance(Progress(), rules, [7], last=True).finish_reason
        'length'
        >>> advance(Progress(), rules, [7]).finish_reason is None
        True
    """
    token = int(output[-1])
    reason: FinishReason | None = "length" if last else None
    stop_reason: int | str | None = None
    if len(output) >= rules.min_tokens:
        if token in rules.eos_ids:
            reason = "stop"
        elif token in rules.stop_ids:
            reason, stop_reason = "stop", token
    text, state, detokenizer = progress.text, progress.state, rules.detokenizer
    shown = reason != "stop" or rules.include_stop
    if detokenizer is not None and state is not None and not rules.text_at_end:
        if shown:
            state, delta = detokenizer.step(state, token)
            text += delta
        if reason is not None and state.stop is None:
            state, delta = detokenizer.finish(state)
            text += delta
        if state.stop is not None:
            reason, stop_reason = "stop", state.stop
    elif reason is not None:
        text = _text(progress, rules, output if shown else output[:-1])
    cumulative = progress.cumulative_logprob
    if logprobs is not None:
        cumulative += logprobs[token].logprob
    return Progress(
        text,
        len(output),
        state,
        progress.logprobs if logprobs is None else (*progress.logprobs, logprobs),
        cumulative,
        reason,
        stop_reason,
    )


def end(
    progress: Progress,
    rules: Rules,
    output: Sequence[int] | np.ndarray,
    reason: FinishReason,
    stop_reason: int | str | None = None,
) -> Progress:
    """It ends for a reason of its own: cancelled, failed.  Text that was held back is shown.

    Example:
        >>> end(Progress(), Rules(), [1, 2], "abort").finish_reason
        'abort'
    """
    text = progress.text
    if reason != "error":  # it may be the text that failed
        if rules.text_at_end:
            text = _text(progress, rules, output)
        elif rules.detokenizer is not None and progress.state is not None:
            text += rules.detokenizer.finish(progress.state)[1]
    return dataclasses.replace(
        progress,
        text=text,
        num_tokens=len(output),
        finish_reason=reason,
        stop_reason=stop_reason,
    )


def _text(progress: Progress, rules: Rules, output: Sequence[int] | np.ndarray) -> str:
    """The text of all tokens at once."""
    if rules.detokenizer is None or progress.state is None:
        return ""
    return rules.detokenizer.pieces.text([int(t) for t in output], progress.state.started)


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
