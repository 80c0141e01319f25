"""Text from tokens, one token at a time: no broken characters, no part of a stop string shown.

`Detokenizer` is what stays the same during a request, `DetokenizerState` what changes; `step` is
a pure function from one state to the next.  The law it keeps: the deltas, concatenated, are the
text that decoding all tokens at once gives.

The only thing asked of a tokenizer is `decode(ids, skip_special_tokens=...)`.  What makes that
hard to call piece by piece is that a character may need several tokens (bytes) and that most
decoders strip the space before a text's first word.  So tokens whose text ends in U+FFFD wait for
the next ones, and pieces are decoded behind an anchor: a token with a plain text of its own, which
is then taken off.  A step decodes a handful of tokens however long the text is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Protocol

REPLACEMENT = "\ufffd"  # what decoders put where bytes are no character (yet)
_CHARACTER = 4  # bytes in the longest UTF-8 character: no token waits for more than that
_LONGEST_WAIT = 32  # tokens, a bound for garbage whose bytes never come to a boundary
_ANCHOR_SCAN = 1024  # ids tried when looking for an anchor


class Decodes(Protocol):
    """A tokenizer, as far as this module is concerned."""

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no character become U+FFFD."""
        ...


@dataclass(frozen=True)
class DetokenizerState:
    """Where a text stands: `pending` tokens are no characters yet, `held` text may be a stop."""

    started: bool = False  # whether the text has a token before the next one
    pending: tuple[int, ...] = ()
    held: str = ""
    num_tokens: int = 0
    stop: str | None = None  # the stop string found; nothing follows it


@dataclass(frozen=True)
class Detokenizer:
    """Turns a request's tokens into text.

    Attributes:
      pieces: the tokenizer, wrapped once (`Pieces(tokenizer)`) and shared by all requests.
      stop: strings that end the text; whichever is complete first counts, of two that are complete
        with the same character the longer.
      include_stop: whether the stop string is part of the text.
      min_tokens: a stop string that is complete within the first so many tokens is passed over.

    >>> class Letters:
    ...     def decode(self, ids, *, skip_special_tokens=True):
    ...         return "".join(map(chr, ids))
    >>> detokenizer = Detokenizer(Pieces(Letters()), stop=("END",))
    >>> state, text = detokenizer.init(), []
    >>> for token in b"an EN, an END.":
    ...     state, delta = detokenizer.step(state, token)
    ...     text.append(delta)
    >>> "".join(text), state.stop
    ('an EN, an ', 'END')
    """

    pieces: "Pieces"
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    min_tokens: int = 0

    def init(self, prompt: Sequence[int] = ()) -> DetokenizerState:
        """The state before the first token; after a prompt a leading space is kept.

        >>> class Letters:
        ...     def decode(self, ids, *, skip_special_tokens=True):
        ...         return "".join(map(chr, ids)).removeprefix(" ")
        >>> detokenizer = Detokenizer(Pieces(Letters()))
        >>> detokenizer.step(detokenizer.init(), 32)[1]
        ''
        >>> detokenizer.step(detokenizer.init(b"a"), 32)[1]
        ' '
        """
        return DetokenizerState(started=any(self.pieces.one(t) for t in reversed(prompt)))

    def step(self, state: DetokenizerState, token: int) -> tuple[DetokenizerState, str]:
        """One more token: the new state and the text that can be shown now (often "").

        After a stop string (`state.stop`) further tokens give no text.
        """
        if state.stop is not None:
            return state, ""
        started, pending, text = self._decode(state, token)
        state = DetokenizerState(started, pending, state.held, state.num_tokens + 1)
        return self._show(state, text, last=False) if self.stop else (state, text)

    def finish(self, state: DetokenizerState) -> tuple[DetokenizerState, str]:
        """The text that was still held back, when no token follows."""
        if state.stop is not None:
            return state, ""
        text = self.pieces.text(state.pending, state.started)
        return self._show(replace(state, pending=()), text, last=True)

    def _decode(self, state: DetokenizerState, token: int) -> tuple[bool, tuple[int, ...], str]:
        """(started, tokens that must wait, text that is complete) after `token`."""
        pieces, started, pending = self.pieces, state.started, state.pending
        if not pieces.one(token):
            return started, pending, ""  # a special token, skipped
        if not pending and started:
            text = pieces.one(token)
            return (True, (token,), "") if text.endswith(REPLACEMENT) else (True, (), text)
        pending = (*pending, token)
        text, shown = pieces.text(pending, started), ""
        while text.endswith(REPLACEMENT) and len(pending) >= _CHARACTER:
            # Four tokens are four bytes: the first belongs to no character still to come, unless
            # it is cut by the token border.
            head, rest = pieces.text(pending[:1], started), pieces.text(pending[1:], True)
            if head + rest != text and len(pending) < _LONGEST_WAIT:
                break
            shown, text, pending, started = shown + head, rest, pending[1:], True
        if text.endswith(REPLACEMENT):
            return started, pending, shown
        return True, (), shown + text

    def _show(
        self, state: DetokenizerState, text: str, *, last: bool
    ) -> tuple[DetokenizerState, str]:
        """Looks for stop strings in held + `text` and holds back what may become one."""
        if not self.stop:
            return state, text
        text = state.held + text
        if state.num_tokens > self.min_tokens:
            found = _first_stop(text, self.stop)
            if found is not None:
                start, end = found
                shown = text[: end if self.include_stop else start]
                return replace(state, held="", pending=(), stop=text[start:end]), shown
        held = 0 if last else _length_that_may_become(text, self.stop)
        cut = len(text) - held
        if text[cut:] == state.held:
            return state, text[:cut]
        return replace(state, held=text[cut:]), text[:cut]


def _first_stop(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """(start, end) of the stop string that is complete first; the longer one on equal ends."""
    found = [(at + len(s), at) for s in stops if (at := text.find(s)) >= 0]
    if not found:
        return None
    end, start = min(found)
    return start, end


def _length_that_may_become(text: str, stops: tuple[str, ...]) -> int:
    """The length of the longest end of `text` that is a proper beginning of a stop string."""
    beginnings, longest = _beginnings(stops)
    for length in range(min(len(text), longest), 0, -1):
        if text[-length:] in beginnings:
            return length
    return 0


@lru_cache(1024)
def _beginnings(stops: tuple[str, ...]) -> tuple[frozenset[str], int]:
    """All proper beginnings of the stop strings, and the longest one's length."""
    return frozenset(s[:i] for s in stops for i in range(1, len(s))), max(map(len, stops)) - 1


@dataclass(frozen=True)
class Pieces:
    """What tokens add to a text, away from its start.

    Attributes:
      tokenizer: see `Decodes`.
      skip_special_tokens: leave special tokens out of the text.
      one: what a token adds on its own, behind other text.

    >>> class Words:  # as Llama's: a space before every word, the first one stripped
    ...     def decode(self, ids, *, skip_special_tokens=True):
    ...         return "".join((" a", " b", "c")[i] for i in ids if i < 3).removeprefix(" ")
    >>> pieces = Pieces(Words())
    >>> pieces.one(1), pieces.text([1], started=False), pieces.text([1, 2], started=True)
    (' b', 'b', ' bc')
    """

    tokenizer: Decodes
    skip_special_tokens: bool = True
    one: Callable[[int], str] = field(init=False, compare=False, repr=False)
    _anchor: tuple[int, ...] = field(init=False, compare=False, repr=False)
    _skip: int = field(init=False, compare=False, repr=False)

    def __post_init__(self):
        anchor = _find_anchor(self._decode)
        object.__setattr__(self, "_anchor", anchor)
        object.__setattr__(self, "_skip", len(self._decode(anchor)))
        # A token's own text is asked for again and again: most tokens need nothing else.
        object.__setattr__(self, "one", lru_cache(1 << 18)(lambda token: self.text((token,), True)))

    def text(self, ids: Sequence[int], started: bool) -> str:
        """The text of `ids`: at the start of a text, or with some text before them."""
        if not ids:
            return ""
        return self._decode((*self._anchor, *ids))[self._skip :] if started else self._decode(ids)

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=self.skip_special_tokens)


def _find_anchor(decode: Callable[[Sequence[int]], str]) -> tuple[int, ...]:
    """A token with a visible ASCII text that keeps its length whatever follows, as a tuple of one.

    A byte token will do: beside a broken character byte fallback shows it as U+FFFD, which is as
    long.  () where no token qualifies: then pieces are decoded as if they began a text.
    """
    for token in range(_ANCHOR_SCAN):
        text = decode([token])
        if text and text.isascii() and text.isprintable() and not text.isspace():
            twice = decode([token, token])
            if twice.startswith(text) and twice.endswith(text):
                return (token,)
    return ()
