"""What a request asks of the sampler: `SamplingParams` and `BeamSearchParams`, with vLLM's names.

Plain Python values, validated where they are written.  `params_row` and `params_state_row` turn
them into what `aidx.ops.sampling.sample` takes.
"""

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ops.sampling import (
    VARIANTS,
    SamplingRows,
    SamplingState,
    Variant,
    sampling_rows,
    state_row,
)

# What a generation_config.json may ask for that no sampler here does, and the value that asks for
# nothing.
_NOT_BUILT = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "min_length": 0,
    "typical_p": 1.0,
    "top_h": None,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "penalty_alpha": 0.0,
    "no_repeat_ngram_size": 0,
    "guidance_scale": 1.0,
    "encoder_repetition_penalty": 1.0,
    "watermarking_config": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
}
_PENALTIES = ("repetition", "presence", "frequency")
_FLAGS = ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens", "detokenize")
_LARGEST = 2**31 - 1  # what the device can count: more asks for the same


@dataclass(frozen=True)
class SamplingParams:
    """How to draw a request's tokens and when to stop.

    Attributes:
      n: how many samples to draw from the prompt.
      temperature: 0 takes the most likely token; the logits are divided by it otherwise.
      top_k: keep the k most likely tokens; 0 or -1 keeps all.
      top_p: keep the most likely tokens that together hold this mass; 1 keeps all.
      min_p: keep tokens at least this fraction as likely as the most likely; 0 keeps all.
      repetition_penalty: > 1 makes tokens of prompt and output less likely (multiplicative).
      presence_penalty: taken once from the logit of every token of the output, -2 to 2.
      frequency_penalty: taken per occurrence in the output, -2 to 2.
      logit_bias: token id to what is added to its logit.
      seed: integer; None (or -1) draws one and the output reports it.
      stop: strings that end the output.
      stop_token_ids: tokens that end the output, besides the model's end-of-sequence tokens.
      include_stop_str_in_output: keep the stop string (or the stop token's text) in the text.
      ignore_eos: go on after the model's end-of-sequence tokens.
      min_tokens: generate so many before an end-of-sequence, stop token or stop string counts.
      max_tokens: generate at most so many; None goes on to the model's length.
      logprobs: report the log-probability of each token and of the so many most likely ones.
      prompt_logprobs: the same for the tokens of the prompt.
      allowed_token_ids: draw from these only.
      bad_words: words that are not generated.
      skip_special_tokens: leave special tokens out of the text.
      detokenize: False gives token ids without text.

    Raises:
      ValueError or TypeError: a value out of range, with the value.

    >>> SamplingParams(temperature=0.8, top_p=0.95, stop="END").stop
    ('END',)
    """

    n: int = 1
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: str | Sequence[str] = ()
    skip_special_tokens: bool = True
    detokenize: bool = True

    def __post_init__(self):
        put = lambda name, value: object.__setattr__(self, name, value)
        for name in ("n", "top_k", "min_tokens"):
            put(name, _integer(name, getattr(self, name)))
        for name in ("seed", "max_tokens", "logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                put(name, _integer(name, getattr(self, name)))
        for name in ("stop", "bad_words"):
            value = getattr(self, name)
            put(name, (value,) if isinstance(value, str) else _listed(name, value))
        for name in ("stop_token_ids", "allowed_token_ids"):
            value = getattr(self, name)
            if value is not None or name == "stop_token_ids":
                put(name, tuple(_integer(name, token) for token in _listed(name, value)))
        if self.logit_bias is not None:
            put("logit_bias", _biases(self.logit_bias))
        if self.seed == -1:
            put("seed", None)
        _validate_ranges(self)
        _validate_lists(self)

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is taken: temperature 0."""
        return self.temperature == 0

    @property
    def needs_truncation(self) -> bool:
        """Whether top_k, top_p or min_p leaves tokens out."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def needs_penalties(self) -> bool:
        """Whether the tokens seen so far change the logits."""
        neutral = (1.0, 0.0, 0.0)
        return neutral != (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)

    @property
    def needs_masks(self) -> bool:
        """Whether some tokens may not be drawn at some step."""
        return self.allowed_token_ids is not None or bool(self.bad_words) or self.min_tokens > 0

    @property
    def needs_state(self) -> bool:
        """Whether the sampler keeps something per vocabulary item for this request."""
        return self.needs_penalties or self.needs_masks or bool(self.logit_bias)

    @property
    def variant(self) -> Variant:
        """The cheapest sampler variant that honours every parameter.

        >>> SamplingParams(temperature=0, top_p=0.9).variant  # the best token is always kept
        'greedy'
        >>> SamplingParams(temperature=0.7).variant, SamplingParams(top_p=0.9).variant
        ('plain', 'full')
        """
        if self.needs_state:
            return "full"
        if self.greedy:
            return "greedy"
        return "full" if self.needs_truncation else "plain"

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any], **overrides) -> "SamplingParams":
        """The defaults that a checkpoint's generation_config.json asks for.

        `do_sample` false (or absent) is temperature 0, as transformers reads it; other absent keys
        are the defaults of this class (so no top_k of 50).  Keys that say nothing about sampling
        (token ids, cache settings, ...) are left to who owns them.

        Raises:
          ValueError: a key that asks for another way of sampling, which is not built.

        >>> config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 2}
        >>> params = SamplingParams.from_generation_config(config, max_tokens=8)
        >>> params.temperature, params.top_p, params.max_tokens
        (0.6, 0.9, 8)
        """
        for name, neutral in _NOT_BUILT.items():
            if config.get(name) not in (None, neutral):
                raise ValueError(
                    f"generation_config.json asks for {name}={config[name]!r}, which aidx does not "
                    "do; pass SamplingParams"
                )
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        values = {name: config[name] for name in names if config.get(name) is not None}
        if config.get("max_new_tokens") is not None:
            values["max_tokens"] = config["max_new_tokens"]
        if config.get("min_new_tokens") is not None:
            values["min_tokens"] = config["min_new_tokens"]
        if config.get("stop_strings") is not None:
            values["stop"] = config["stop_strings"]
        if not config.get("do_sample", False):
            values["temperature"] = 0.0
        return cls(**{**values, **overrides})


def _validate_ranges(p: SamplingParams) -> None:
    for name in ("temperature", "top_p", "min_p", *(f"{x}_penalty" for x in _PENALTIES)):
        _require_number(name, getattr(p, name))
    for name in _FLAGS:
        if not isinstance(getattr(p, name), bool):
            raise TypeError(f"{name} must be True or False, not {getattr(p, name)!r}")
    ranges = {
        "n": (p.n >= 1, "at least 1"),
        "temperature": (0 <= p.temperature < math.inf, "finite and at least 0"),
        "top_k": (p.top_k >= -1, "a number of tokens, or 0 or -1 for all"),
        "top_p": (0 < p.top_p <= 1, "in (0, 1]"),
        "min_p": (0 <= p.min_p <= 1, "in [0, 1]"),
        "repetition_penalty": (0 < p.repetition_penalty < math.inf, "finite and above 0"),
        "presence_penalty": (-2 <= p.presence_penalty <= 2, "in [-2, 2]"),
        "frequency_penalty": (-2 <= p.frequency_penalty <= 2, "in [-2, 2]"),
        "max_tokens": (p.max_tokens is None or p.max_tokens >= 1, "None or at least 1"),
        "min_tokens": (p.min_tokens >= 0, "at least 0"),
        "logprobs": (p.logprobs is None or p.logprobs >= 0, "None or at least 0"),
        "prompt_logprobs": (
            p.prompt_logprobs is None or p.prompt_logprobs >= 0,
            "None or at least 0",
        ),
        "seed": (p.seed is None or -(2**63) <= p.seed < 2**64, "a 64-bit integer"),
    }
    for name, (valid, wanted) in ranges.items():
        if not valid:
            raise ValueError(f"{name} must be {wanted}, not {getattr(p, name)!r}")
    if p.max_tokens is not None and p.min_tokens > p.max_tokens:
        raise ValueError(f"min_tokens={p.min_tokens} exceeds max_tokens={p.max_tokens}")
    if p.greedy and p.n > 1:
        raise ValueError(f"n={p.n} samples at temperature 0 would all be the same; use n=1")


def _validate_lists(p: SamplingParams) -> None:
    for name in ("stop", "bad_words"):
        if any(not isinstance(s, str) for s in getattr(p, name)):
            raise TypeError(f"{name} must be strings, not {getattr(p, name)!r}")
        if "" in getattr(p, name):
            raise ValueError(f"{name} holds an empty string: {getattr(p, name)!r}")
    if p.stop and not p.detokenize:
        raise ValueError(f"stop={p.stop!r} is looked for in the text: it needs detokenize=True")
    if p.allowed_token_ids is not None and not p.allowed_token_ids:
        raise ValueError("allowed_token_ids is empty: no token could be drawn; None allows all")
    for token, bias in (p.logit_bias or {}).items():
        if not math.isfinite(bias):
            raise ValueError(f"logit_bias[{token}] must be finite, not {bias}")


def _integer(name: str, value: Any) -> int:
    """An int, also of NumPy."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    return operator.index(value)


def _require_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")


def _listed(name: str, value: Any) -> tuple[Any, ...]:
    try:
        return () if value is None else tuple(value)
    except TypeError:
        raise TypeError(f"{name} must be a list, not {value!r}") from None


def _biases(value: Any) -> dict[int, float]:
    """Token id to bias; JSON has string keys only."""
    if not isinstance(value, Mapping):
        raise TypeError(f"logit_bias must map token ids to numbers, not {value!r}")
    biases = {}
    for token, bias in value.items():
        number = int(token) if isinstance(token, str) and token.isdecimal() else token
        _require_number(f"logit_bias[{token!r}]", bias)
        biases[_integer("logit_bias: a token id", number)] = float(bias)
    return biases


def widest_variant(variants: Iterable[Variant]) -> Variant:
    """The variant that serves a batch: the widest of its rows'; greedy for none.

    >>> widest_variant(["greedy", "plain"])
    'plain'
    """
    return VARIANTS[max((VARIANTS.index(v) for v in variants), default=0)]


def params_row(
    params: SamplingParams, *, seed: int, sample: int, prompt_length: int
) -> SamplingRows:
    """One request's sample as `SamplingRows` of length 1 (NumPy).

    `seed` is the request's, or the one drawn for it; `sample` counts the request's n samples.

    >>> row = params_row(SamplingParams(top_k=5, min_tokens=2), seed=1, sample=0, prompt_length=7)
    >>> row.top_k.tolist(), row.stop_from.tolist()
    ([5], [9])
    """
    return sampling_rows(
        1,
        seed=seed,
        sample=sample,
        temperature=params.temperature,
        top_k=min(params.top_k, _LARGEST),
        top_p=params.top_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        stop_from=min(prompt_length + params.min_tokens, _LARGEST),
    )


def params_state_row(
    params: SamplingParams,
    vocab_size: int,
    *,
    prompt: Sequence[int],
    output: Sequence[int] = (),
    eos_token_ids: Sequence[int] = (),
    bad_word_ids: Sequence[Sequence[int]] = (),
) -> SamplingState:
    """One request's row of `SamplingState` (NumPy, no leading axis).

    `output` is what was generated before (after a preemption), `bad_word_ids` what
    `encode_bad_words` gave; longer ones than a token are the business of `banned_tokens`.
    Stop tokens are masked until min_tokens whether or not `ignore_eos` lets them pass afterwards,
    as vLLM does.

    >>> row = params_state_row(SamplingParams(min_tokens=1), 32, prompt=[1], eos_token_ids=[2])
    >>> row.stop.tolist()
    [4]
    """
    return state_row(
        vocab_size,
        prompt=prompt,
        output=output,
        allowed=params.allowed_token_ids,
        banned=[word[0] for word in bad_word_ids if len(word) == 1],
        stop={*eos_token_ids, *params.stop_token_ids} if params.min_tokens else (),
        bias=params.logit_bias,
    )


def encode_bad_words(
    words: Iterable[str], encode: Callable[[str], Sequence[int]]
) -> tuple[tuple[int, ...], ...]:
    """The token sequences that spell the bad words, at the start of a text and after a space.

    `encode` must add no special tokens.  As in vLLM a word is banned as tokenised, not as text: a
    model can still spell it with other tokens.  A spelling that ends in another is left out: the
    other one bans it.

    >>> encode_bad_words(["no"], lambda text: [ord(c) for c in text])
    ((110, 111),)
    """
    found: dict[tuple[int, ...], None] = {}
    for word in words:
        bare = word.lstrip(" ")
        if not bare:
            raise ValueError(f"bad_words holds only spaces: {word!r}")
        alone, spaced = tuple(encode(bare)), tuple(encode(" " + bare))
        found[alone] = None
        if spaced[-len(alone) :] != alone:
            found[spaced] = None
    return tuple(found)


def banned_tokens(bad_word_ids: Iterable[Sequence[int]], output: Sequence[int]) -> tuple[int, ...]:
    """The tokens that would complete a bad word of two or more tokens after `output`.

    Computed on the host from the tokens generated so far, so a row with such a word needs its last
    token there before its next step.  Single tokens are banned once and for all in the state.

    >>> banned_tokens([(5, 6, 7), (9,)], [1, 5, 6])
    (7,)
    """
    banned = {}
    for word in bad_word_ids:
        prefix = tuple(word[:-1])
        if prefix and tuple(output[-len(prefix) :]) == prefix:
            banned[word[-1]] = None
    return tuple(banned)


@dataclass(frozen=True)
class BeamSearchParams:
    """Beam search: keep the `beam_width` most likely continuations.

    Attributes:
      beam_width: how many beams are kept and returned.
      max_tokens: the most tokens a beam may generate.
      ignore_eos: go on after the model's end-of-sequence tokens.
      length_penalty: a beam's score is its log-probability / length^length_penalty.

    >>> BeamSearchParams(beam_width=4, max_tokens=32).length_penalty
    1.0
    """

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0

    def __post_init__(self):
        for name in ("beam_width", "max_tokens"):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        _require_number("length_penalty", self.length_penalty)
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty must be finite, not {self.length_penalty}")
