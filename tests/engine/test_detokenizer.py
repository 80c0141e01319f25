"""Streams of text: the deltas are the decode of all tokens, and show no part of a stop string."""

import functools

import hypothesis
import hypothesis.strategies as st
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from aidx.engine.detokenizer import (
    Detokenizer,
    Pieces,
    _first_stop,
    _length_that_may_become,
)

TEXT = """To be, or not to be, that is the question: “whether 'tis nobler”… naïve café, 北京, 東京,
Привет, мир! 😀😃 👨‍👩‍👧 def f(x):\n\treturn x + 1\n\n  # ∑ ∞ ≤ — the end.
Hello world, hello worlds. """


@functools.cache
def byte_level():
    """GPT-2's kind: bytes, merged; tokens may begin and end inside a character."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        show_progress=False,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return tokenizer


@functools.cache
def byte_fallback():
    """Llama 2's kind: pieces with a space in front, bytes for what has no piece."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    words = ["▁", "▁▁", "▁t", "he", "▁the", "▁Hello", "▁world", "s", ",", ".", "é", "北", "京"]
    words += [c for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ!?" if c != "s"]
    vocab = {piece: i for i, piece in enumerate([*pieces, *words])}
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@functools.cache
def metaspace():
    """A SentencePiece unigram without byte fallback: the decoder itself strips the first space."""
    pieces = ["<unk>", "<s>", "▁", "▁the", "▁Hello", "▁world", "s", ",", "é", "北", "\ufffd", "a"]
    vocab = [(piece, -1.0) for piece in pieces]
    tokenizer = tokenizers.Tokenizer(models.Unigram(vocab, 0, False))
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


ALL = [byte_level, byte_fallback, metaspace]


@functools.cache
def pieces_of(make, skip=True):
    return Pieces(make(), skip)


def encode(make, text):
    return make().encode(text, add_special_tokens=False).ids


def stream(detokenizer, tokens, prompt=()):
    """(state, deltas): one delta a token, then what `finish` gives."""
    state, deltas = detokenizer.init(prompt), []
    for token in tokens:
        state, delta = detokenizer.step(state, token)
        deltas.append(delta)
    state, delta = detokenizer.finish(state)
    return state, [*deltas, delta]


def ids_of(make):
    return st.lists(st.integers(0, make().get_vocab_size() + 1), max_size=25)


settings = hypothesis.settings(max_examples=150, deadline=None, derandomize=True)


# --- the law --------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("make", [byte_level, metaspace])
def test_deltas_of_random_tokens_are_the_full_decode(make, skip):
    @settings
    @hypothesis.given(ids_of(make))
    def law(ids):
        _, deltas = stream(Detokenizer(pieces_of(make, skip)), ids)
        assert "".join(deltas) == make().decode(ids, skip_special_tokens=skip)

    law()


def valid_runs(ids):
    """Whether every run of byte tokens (special tokens skipped) is whole characters."""
    run = b""
    for token in [*(i for i in ids if i > 2), 10**6]:
        if token < 259:
            run += bytes([token - 3])
            continue
        try:
            run.decode()
        except UnicodeDecodeError:
            return False
        run = b""
    return True


def characters(text):
    """Tokens of a text: one piece or its bytes a character."""
    make = byte_fallback()
    out = []
    for c in text:
        token = make.token_to_id("▁" if c == " " else c)
        out.extend([token] if token is not None else [3 + b for b in c.encode()])
    return out


mixed_text = st.text(st.sampled_from("aZ !é北京😀∑ \n\u0301\ufffd") | st.characters(), max_size=12)


@settings
@hypothesis.given(st.lists(st.one_of(mixed_text, ids_of(byte_fallback)), max_size=4))
def test_deltas_with_byte_fallback_are_the_full_decode(parts):
    ids = [t for part in parts for t in (characters(part) if isinstance(part, str) else part)]
    hypothesis.assume(valid_runs(ids))
    _, deltas = stream(Detokenizer(pieces_of(byte_fallback)), ids)
    assert "".join(deltas) == byte_fallback().decode(ids)


@pytest.mark.smoke
@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
def test_no_delta_of_a_text_shows_a_broken_character(make):
    text = TEXT if make is not metaspace else "Hello world北, the worlds é Hello"
    ids = encode(make, text) if make is not byte_fallback else characters(text)
    _, deltas = stream(Detokenizer(pieces_of(make)), ids)
    assert "".join(deltas) == make().decode(ids)
    assert not any("\ufffd" in delta for delta in deltas)


def test_a_character_is_shown_with_its_last_byte():
    ids = characters("a😀b")
    _, deltas = stream(Detokenizer(pieces_of(byte_fallback)), ids)
    assert deltas == ["a", "", "", "", "😀", "b", ""]


def test_whole_characters_stay_when_a_broken_byte_follows():
    # The decoder itself would take back the shown character: "�����".
    ids = [*characters("😀"), 3 + 0x80, *characters("b")]
    assert byte_fallback().decode(ids) == "\ufffd" * 5 + "b"
    _, deltas = stream(Detokenizer(pieces_of(byte_fallback)), ids)
    assert "".join(deltas) == "😀\ufffdb"


@pytest.mark.parametrize("make", [byte_level, byte_fallback])
def test_bytes_that_never_become_a_character_are_shown_as_they_come(make):
    byte = encode(make, "é")[-1:] if make is byte_level else [3 + 0xA9]
    broken = next(
        i
        for i in range(make().get_vocab_size())
        if make().decode([i]) == "\ufffd" and make().decode([i, i]) == "\ufffd\ufffd"
    )
    for token in (broken, *byte):
        _, deltas = stream(Detokenizer(pieces_of(make)), [token] * 50)
        assert "".join(deltas) == make().decode([token] * 50)
        behind = [
            len(make().decode([token] * (i + 1))) - len("".join(deltas[: i + 1])) for i in range(50)
        ]
        assert max(behind) <= 4


class Counting:
    """A tokenizer that notes how many tokens it was asked to decode at once."""

    def __init__(self, inner):
        self.inner, self.lengths = inner, []

    def decode(self, ids, *, skip_special_tokens=True):
        self.lengths.append(len(ids))
        return self.inner.decode(ids, skip_special_tokens=skip_special_tokens)


def test_a_step_decodes_a_handful_of_tokens_however_long_the_text():
    counting = Counting(byte_level())
    detokenizer = Detokenizer(Pieces(counting), stop=("never",))
    ids = encode(byte_level, TEXT * 20)
    counting.lengths.clear()
    _, deltas = stream(detokenizer, ids)
    assert "".join(deltas) == TEXT * 20
    assert max(counting.lengths) <= 5
    assert sum(counting.lengths) < len(ids)  # most tokens are known after the first time


# --- spaces and special tokens --------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_fallback, metaspace], ids=lambda f: f.__name__)
def test_the_first_space_goes_at_the_start_of_a_text_and_stays_after_a_prompt(make):
    hello, world = make().token_to_id("▁Hello"), make().token_to_id("▁world")
    start = make().token_to_id("<s>")
    detokenizer = Detokenizer(pieces_of(make))
    assert stream(detokenizer, [hello, world])[1] == ["Hello", " world", ""]
    assert stream(detokenizer, [hello, world], prompt=[start])[1] == ["Hello", " world", ""]
    assert stream(detokenizer, [hello, world], prompt=[start, hello])[1] == [" Hello", " world", ""]
    assert stream(detokenizer, [start, hello])[1] == ["", "Hello", ""]


@pytest.mark.parametrize("make", ALL, ids=lambda f: f.__name__)
def test_special_tokens_are_skipped_or_shown(make):
    special = make().token_to_id("<s>")
    a = make().token_to_id("a")
    for skip, want in ((True, "aa"), (False, make().decode([a, special, a], False))):
        _, deltas = stream(Detokenizer(pieces_of(make, skip)), [a, special, a])
        assert "".join(deltas) == want
    assert "<s>" in want


def test_a_skipped_token_inside_a_character_does_not_break_it():
    first, *rest = characters("é😀")[1:]
    _, deltas = stream(Detokenizer(pieces_of(byte_fallback)), [first, 1, *rest])
    assert "".join(deltas) == "😀"


# --- stop strings ---------------------------------------------------------------------------------


def reference_stop(text, stops, include):
    """What of `text` is shown: up to the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stops if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@pytest.mark.smoke
@hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(st.text("ab", min_size=0, max_size=3), max_size=10),
    st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3),
    st.booleans(),
)
def test_stop_strings_do_not_depend_on_token_borders(tokens, stops, include):
    class Table:
        def decode(self, ids, *, skip_special_tokens=True):
            return "".join(["x", *tokens][i] for i in ids if i <= len(tokens))

    detokenizer = Detokenizer(Pieces(Table()), tuple(stops), include)
    state, deltas = stream(detokenizer, range(1, len(tokens) + 1))
    want, found = reference_stop("".join(tokens), stops, include)
    assert ("".join(deltas), state.stop) == (want, found)
    # A prefix of the text that was shown never needs to be taken back, whatever follows.
    shown = ""
    for i, delta in enumerate(deltas[:-1]):
        shown += delta
        for more in ("", *stops, *(s[1:] for s in stops)):
            so_far = "".join(tokens[: i + 1])
            assert reference_stop(so_far + more, stops, include)[0].startswith(shown)


def test_a_stop_string_across_tokens_is_never_shown():
    detokenizer = Detokenizer(pieces_of(byte_fallback), stop=("ab!", "京a"))
    state, deltas = stream(detokenizer, characters("xaab!yz"))
    assert deltas == ["x", "", "a", "", "", "", "", ""] and state.stop == "ab!"
    state, deltas = stream(detokenizer, characters("xab"))
    assert deltas == ["x", "", "", "ab"] and state.stop is None
    state, deltas = stream(detokenizer, characters("北京ab"))
    assert "".join(deltas) == "北" and state.stop == "京a"


def test_text_behind_the_stop_string_in_the_same_token_is_cut():
    hello = byte_fallback().token_to_id("▁Hello")
    for include, want in ((False, " H"), (True, " Hel")):
        detokenizer = Detokenizer(pieces_of(byte_fallback), ("el",), include)
        state, deltas = stream(detokenizer, [hello, hello], prompt=[hello])
        assert "".join(deltas) == want and state.stop == "el"


def test_stop_strings_within_min_tokens_are_passed_over():
    ids = characters("a!a!a!")
    for min_tokens, want in ((0, "a"), (1, "a"), (2, "a!a"), (4, "a!a!a"), (6, "a!a!a!")):
        detokenizer = Detokenizer(pieces_of(byte_fallback), ("!",), min_tokens=min_tokens)
        assert "".join(stream(detokenizer, ids)[1]) == want


def test_a_stop_string_can_be_complete_at_the_end_only():
    # Three bytes of a character wait; at the end they are shown as U+FFFD, a legal stop string.
    ids = characters("😀")[:3]
    state, deltas = stream(Detokenizer(pieces_of(byte_fallback), ("\ufffd",)), ids)
    assert state.stop == "\ufffd" and "".join(deltas) == ""


def test_states_are_values():
    detokenizer = Detokenizer(pieces_of(byte_fallback), ("zz",))
    before = detokenizer.init()
    one, _ = detokenizer.step(before, characters("z")[0])
    again, _ = detokenizer.step(before, characters("z")[0])
    assert one == again and before == detokenizer.init() and hash(one) == hash(again)


def test_helpers():
    assert _first_stop("xabc", ["c", "ab", "abc"]) == (1, 3)
    assert _first_stop("xabc", ["c", "bc"]) == (2, 4)
    assert _first_stop("x", ["ab"]) is None
    assert _length_that_may_become("xaba", ("abab", "b")) == 3
    assert _length_that_may_become("b", ("b", "ab")) == 0
