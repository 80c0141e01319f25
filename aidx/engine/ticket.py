"""What the engine keeps of a request, and what it reports of it: pure functions of both."""

import dataclasses
import numbers
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from aidx.engine.beam import Beams, Hypothesis
from aidx.engine.config import EngineConfig
from aidx.engine.detokenizer import Detokenizer, Pieces
from aidx.engine.outputs import (
    CompletionOutput,
    FinishReason,
    Logprobs,
    RequestMetrics,
    RequestOutput,
)
from aidx.engine.progress import Progress, Rules, completion
from aidx.engine.request import Request, SequenceState, new_sequence
from aidx.engine.sampling_params import (
    BeamSearchParams,
    SamplingParams,
    encode_bad_words,
    params_row,
    params_state_row,
)
from aidx.ops.sampling import VARIANTS, SamplingState, pack_rows


@dataclasses.dataclass(frozen=True)
class Ticket:
    """What the engine keeps of a request: the static side of its samples, and its clock."""

    request: Request
    prompt_ids: tuple[int, ...]
    seed: int
    samples: tuple[SequenceState, ...]  # as they arrived
    stream: bool
    sampling: np.ndarray  # [11] i32, packed SamplingRows of sample 0
    needs: tuple[int, int, int]  # place in VARIANTS, masked, num_logprobs + 1
    rules: Rules
    bad_words: tuple[tuple[int, ...], ...]
    metrics: RequestMetrics
    num_cached: int = 0
    beams: bool = False

    @property
    def quiet(self) -> bool:
        """Whether a token that ends nothing has nothing to tell, nor anything to keep of it."""
        rules = self.rules
        text = rules.detokenizer is not None and not rules.text_at_end
        return not (self.stream or self.beams or text or self.request.params.logprobs is not None)


def check_types(name: Any, params: Any, priority: Any, user: Any) -> None:
    """What a caller hands over is what the queues can sort and compare.

    Raises:
        TypeError: it is not, with the value.

    Example:
        >>> check_types("a", SamplingParams(), "high", "")
        Traceback (most recent call last):
        TypeError: priority='high' must be an integer
    """
    if not isinstance(params, SamplingParams | BeamSearchParams):
        raise TypeError(f"{params!r} is neither SamplingParams nor BeamSearchParams")
    if not isinstance(priority, numbers.Integral):
        raise TypeError(f"{priority=} must be an integer")
    for what, value in (("request_id", name), ("user", user)):
        if not isinstance(value, str):
            raise TypeError(f"{what}={value!r} must be a string")


def checked_prompt(prompt: Sequence[int], vocab_size: int) -> np.ndarray:
    """A prompt as i32 ids.

    Raises:
        ValueError: it is empty, no list of integers, or has ids outside the vocabulary.

    Example:
        >>> checked_prompt([1, 2], 3).tolist()
        [1, 2]
    """
    tokens = np.asarray(prompt)
    if tokens.ndim != 1 or not len(tokens) or not np.issubdtype(tokens.dtype, np.integer):
        raise ValueError(f"a prompt is a non-empty list of token ids, not {prompt!r}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        bad = [int(t) for t in tokens if not 0 <= t < vocab_size]
        raise ValueError(f"token ids {bad[:8]} are outside a vocabulary of {vocab_size}")
    return tokens.astype(np.int32)


def beam_search(
    config: EngineConfig, params: BeamSearchParams, num_prompt: int
) -> tuple[Beams, SamplingParams]:
    """The state of a beam search, and what its sequences ask of the sampler.

    Raises:
        ValueError: it needs more logprobs than the engine gives.
    """
    search = Beams(
        width=params.beam_width,
        max_tokens=min(params.max_tokens, config.max_model_len - num_prompt),
        eos_ids=frozenset(() if params.ignore_eos else config.eos_token_ids),
        length_penalty=params.length_penalty,
    )
    if search.num_candidates > config.max_logprobs:
        raise ValueError(
            f"beam_width={params.beam_width} with {len(search.eos_ids)} end-of-sequence tokens "
            f"needs max_logprobs >= {search.num_candidates}, which is {config.max_logprobs}"
        )
    sampling = SamplingParams(
        temperature=0, max_tokens=params.max_tokens, logprobs=search.num_candidates
    )
    return search, sampling


def new_ticket(
    config: EngineConfig,
    request: Request,
    *,
    stream: bool,
    beams: bool,
    tokenizer: Any,
    pieces: Callable[[bool], Pieces],
    now: float,
    seq_ids: Iterator[int],
) -> Ticket:
    """Everything about a request that its steps will need, checked.

    Args:
        config: of the engine.
        request: who asks.
        stream: whether it is reported after every token.
        beams: whether its samples are the beams of a search.
        tokenizer: None gives token ids without text.
        pieces: the tokenizer's, by whether special tokens are skipped.
        now: on the engine's clock.
        seq_ids: names for its samples; taken once nothing is left to refuse.

    Raises:
        ValueError: it asks for something that this engine cannot do.
    """
    params = request.params
    for name in ("logprobs", "prompt_logprobs"):
        asked = getattr(params, name)
        if asked is not None and asked > config.max_logprobs:
            raise ValueError(f"{name}={asked} exceeds max_logprobs={config.max_logprobs}")
    if bad := [t for t in params.stop_token_ids if not 0 <= t < config.vocab_size]:
        raise ValueError(f"stop_token_ids {bad} are outside a vocabulary of {config.vocab_size}")
    text = params.detokenize and tokenizer is not None
    if (params.stop or params.bad_words) and tokenizer is None:
        raise ValueError(
            f"stop={params.stop!r} and bad_words={params.bad_words!r} need a tokenizer"
        )
    seed = params.seed if params.seed is not None else secrets.randbits(63)
    ticket = Ticket(
        request=request,
        prompt_ids=tuple(request.prompt.tolist()),
        seed=seed,
        samples=(),
        stream=stream,
        sampling=pack_rows(
            params_row(params, seed=seed, sample=0, prompt_length=len(request.prompt))
        )[0],
        needs=(
            VARIANTS.index(params.variant),
            int(params.needs_state),
            1
            + max(
                (n for n in (params.logprobs, params.prompt_logprobs) if n is not None),
                default=-1,
            ),
        ),
        rules=Rules(
            eos_ids=frozenset(() if params.ignore_eos else config.eos_token_ids),
            stop_ids=frozenset(params.stop_token_ids),
            min_tokens=params.min_tokens,
            include_stop=params.include_stop_str_in_output,
            detokenizer=_detokenizer(params, pieces) if text else None,
            text_at_end=text and not stream and not params.stop,
        ),
        bad_words=_bad_words(params, tokenizer),
        metrics=RequestMetrics(arrival_time=now),
        beams=beams,
    )
    if params.needs_state:
        mask_row(config, ticket, ())  # ids outside the vocabulary are refused here
    ids = [next(seq_ids) for _ in range(params.n)]
    samples = tuple(
        new_sequence(
            request,
            seq_id=seq_id,
            arrival=seq_id,
            index=index,
            max_tokens=params.max_tokens,
            max_model_len=config.max_model_len,
            synchronous=beams or any(len(word) > 1 for word in ticket.bad_words),
            every_logit=params.prompt_logprobs is not None and index == 0,
        )
        for index, seq_id in enumerate(ids)
    )
    return dataclasses.replace(ticket, samples=samples)


def _bad_words(params: SamplingParams, tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    if not params.bad_words:
        return ()
    encode = lambda word: tokenizer.encode(word, add_special_tokens=False)
    return encode_bad_words(params.bad_words, encode)


def _detokenizer(params: SamplingParams, pieces: Callable[[bool], Pieces]) -> Detokenizer:
    return Detokenizer(
        pieces(params.skip_special_tokens),
        stop=tuple(params.stop),
        include_stop=params.include_stop_str_in_output,
        min_tokens=params.min_tokens,
    )


def mask_row(
    config: EngineConfig, ticket: Ticket, output: Sequence[int], banned: Sequence[int] = ()
) -> SamplingState:
    """The per-vocabulary sampling state of a sequence, on the host."""
    return params_state_row(
        ticket.request.params,
        config.vocab_size,
        prompt=ticket.request.prompt.tolist(),
        output=output,
        eos_token_ids=config.eos_token_ids,
        bad_word_ids=[*(w for w in ticket.bad_words if len(w) == 1), *((t,) for t in banned)],
    )


# Reports.


def request_output(
    ticket: Ticket,
    samples: tuple[CompletionOutput, ...],
    prompt_logprobs: Sequence[Logprobs | None] | None,
    finished_time: float | None,
) -> RequestOutput:
    """What `Engine.step` reports of a request; `finished_time` is None while it goes on."""
    request, first = ticket.request, ticket.metrics
    return RequestOutput(
        request_id=request.request_id,
        prompt=request.prompt_text,
        prompt_token_ids=ticket.prompt_ids,
        outputs=samples,
        prompt_logprobs=None if prompt_logprobs is None else tuple(prompt_logprobs),
        metrics=RequestMetrics(
            arrival_time=first.arrival_time,
            first_scheduled_time=first.first_scheduled_time,
            first_token_time=first.first_token_time,
            finished_time=finished_time,
            num_generation_tokens=sum(len(sample.token_ids) for sample in samples),
            longest_sample=max((len(sample.token_ids) for sample in samples), default=0),
            num_preemptions=first.num_preemptions,
        ),
        num_cached_tokens=ticket.num_cached,
        seed=ticket.seed,
    )


def sample_outputs(
    ticket: Ticket, progress: Mapping[int, Progress]
) -> tuple[CompletionOutput, ...]:
    """The samples as they stand; `progress` is by seq_id."""
    with_logprobs = ticket.request.params.logprobs is not None
    outputs = []
    for seq in ticket.samples:
        so_far = progress[seq.seq_id]
        tokens = tuple(seq.log[seq.num_prompt :][: so_far.num_tokens].tolist())
        outputs.append(completion(so_far, seq.index, tokens, with_logprobs=with_logprobs))
    return tuple(outputs)


def beam_outputs(
    search: Beams, ended: Progress | None, tokenizer: Any
) -> tuple[CompletionOutput, ...]:
    """The finished beams, or the running ones while the search goes on; best first.

    `ended` is how the running ones ended, where they did.
    """
    reasons: list[tuple[Hypothesis, FinishReason | None, int | str | None]]
    if search.running:
        ended = ended if ended is not None else Progress()
        reasons = [(beam, ended.finish_reason, ended.stop_reason) for beam in search.running]
    else:
        reasons = [(beam, "stop" if beam.ended else "length", None) for _, beam in search.finished]
    decode = tokenizer.decode if tokenizer is not None else lambda _: ""
    return tuple(
        CompletionOutput(
            index=index,
            text=decode(list(beam.tokens)),
            token_ids=beam.tokens,
            cumulative_logprob=float(beam.logprob),
            finish_reason=reason,
            stop_reason=stop_reason,
        )
        for index, (beam, reason, stop_reason) in enumerate(reasons)
    )
