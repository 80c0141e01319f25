"""Sampling parameters: what is refused, which variant they need, what the sampler is given."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from aidx.engine.sampling_params import (
    BeamSearchParams,
    SamplingParams,
    banned_tokens,
    encode_bad_words,
    params_row,
    params_state_row,
    widest_variant,
)
from aidx.ops.sampling import VARIANTS, sample

V = 40


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"n": 0}, ValueError, "n must be at least 1, not 0"),
        ({"n": 1.5}, TypeError, "n must be an integer, not 1.5"),
        ({"n": True}, TypeError, "not True"),
        ({"temperature": -0.1}, ValueError, "temperature .* not -0.1"),
        ({"temperature": float("nan")}, ValueError, "temperature .* not nan"),
        ({"temperature": float("inf")}, ValueError, "temperature .* not inf"),
        ({"top_k": -2}, ValueError, "top_k .* not -2"),
        ({"top_p": 0.0}, ValueError, r"top_p must be in \(0, 1\], not 0.0"),
        ({"top_p": 1.01}, ValueError, "not 1.01"),
        ({"min_p": -0.1}, ValueError, "min_p .* not -0.1"),
        ({"min_p": 1.1}, ValueError, "min_p .* not 1.1"),
        ({"repetition_penalty": 0.0}, ValueError, "repetition_penalty .* not 0.0"),
        ({"presence_penalty": 2.1}, ValueError, "presence_penalty .* not 2.1"),
        ({"frequency_penalty": -2.1}, ValueError, "frequency_penalty .* not -2.1"),
        ({"max_tokens": 0}, ValueError, "max_tokens .* not 0"),
        ({"min_tokens": -1}, ValueError, "min_tokens .* not -1"),
        ({"min_tokens": 9, "max_tokens": 8}, ValueError, "min_tokens=9 exceeds max_tokens=8"),
        ({"logprobs": -1}, ValueError, "logprobs .* not -1"),
        ({"prompt_logprobs": -1}, ValueError, "prompt_logprobs .* not -1"),
        ({"seed": 2**64}, ValueError, "seed .* not 18446744073709551616"),
        ({"seed": "1"}, TypeError, "seed must be an integer, not '1'"),
        ({"temperature": 0, "n": 2}, ValueError, "n=2 samples at temperature 0"),
        ({"stop": [""]}, ValueError, "stop holds an empty string"),
        ({"stop": [1]}, TypeError, "stop must be strings"),
        ({"stop": "x", "detokenize": False}, ValueError, r"stop=\('x',\)"),
        ({"stop_token_ids": ["2"]}, TypeError, "stop_token_ids must be an integer, not '2'"),
        ({"allowed_token_ids": []}, ValueError, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [1.0]}, TypeError, "allowed_token_ids"),
        ({"bad_words": [""]}, ValueError, "bad_words holds an empty string"),
        ({"logit_bias": {3: float("inf")}}, ValueError, r"logit_bias\[3\] must be finite"),
        ({"logit_bias": [3]}, TypeError, r"logit_bias must map token ids to numbers, not \[3\]"),
        ({"logit_bias": {"x": 1}}, TypeError, "logit_bias: a token id must be an integer, not 'x'"),
        ({"logit_bias": {1.5: 1}}, TypeError, "must be an integer, not 1.5"),
        ({"logit_bias": {3: "x"}}, TypeError, r"logit_bias\[3\] must be a number, not 'x'"),
        ({"temperature": "hot"}, TypeError, "temperature must be a number, not 'hot'"),
        ({"top_p": None}, TypeError, "top_p must be a number, not None"),
        ({"min_p": True}, TypeError, "min_p must be a number, not True"),
        ({"presence_penalty": "1"}, TypeError, "presence_penalty must be a number, not '1'"),
        ({"stop": 5}, TypeError, "stop must be a list, not 5"),
        ({"stop_token_ids": 5}, TypeError, "stop_token_ids must be a list, not 5"),
        ({"allowed_token_ids": 5}, TypeError, "allowed_token_ids must be a list, not 5"),
        ({"ignore_eos": "no"}, TypeError, "ignore_eos must be True or False, not 'no'"),
        ({"detokenize": None}, TypeError, "detokenize must be True or False, not None"),
    ],
    ids=lambda x: str(x) if isinstance(x, dict) else "",
)
def test_values_out_of_range_are_refused_with_the_value(arguments, error, message):
    with pytest.raises(error, match=message):
        SamplingParams(**arguments)


def test_the_defaults_are_vllms():
    p = SamplingParams()
    assert (p.n, p.temperature, p.top_k, p.top_p, p.min_p) == (1, 1.0, 0, 1.0, 0.0)
    assert (p.repetition_penalty, p.presence_penalty, p.frequency_penalty) == (1.0, 0.0, 0.0)
    assert (p.max_tokens, p.min_tokens, p.seed, p.logprobs) == (16, 0, None, None)
    assert p.detokenize and p.skip_special_tokens and not p.ignore_eos
    assert p.variant == "plain"


def test_values_become_immutable():
    p = SamplingParams(stop="a", stop_token_ids=[1], bad_words=["b"], logit_bias={"3": 1}, seed=-1)
    assert p.stop == ("a",) and p.stop_token_ids == (1,) and p.bad_words == ("b",)
    assert p.logit_bias == {3: 1.0} and p.seed is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.n = 2
    assert dataclasses.replace(p, n=2).stop == ("a",)


def test_one_word_is_a_word_and_numpys_numbers_are_numbers():
    p = SamplingParams(
        n=np.int64(2),
        top_p=np.float32(0.5),
        bad_words="word",
        stop_token_ids=np.array([1, 2]),
        allowed_token_ids=np.array([3]),
    )
    assert p.bad_words == ("word",)  # not its letters
    assert (p.n, p.stop_token_ids, p.allowed_token_ids) == (2, (1, 2), (3,))
    assert {type(x) for x in (p.n, *p.stop_token_ids, *p.allowed_token_ids)} == {int}


def test_more_than_the_device_can_count_is_all():
    params = SamplingParams(top_k=2**40, min_tokens=2**40, max_tokens=None)
    row = params_row(params, seed=1, sample=0, prompt_length=7)
    assert row.top_k.tolist() == row.stop_from.tolist() == [2**31 - 1]


@pytest.mark.parametrize(
    ("arguments", "variant"),
    [
        ({"temperature": 0}, "greedy"),
        ({"temperature": 0, "top_k": 5, "top_p": 0.5, "min_p": 0.1}, "greedy"),
        ({"temperature": 0, "frequency_penalty": 0.1}, "full"),
        ({"temperature": 0, "min_tokens": 1}, "full"),
        ({}, "plain"),
        ({"top_k": -1, "seed": 1}, "plain"),
        ({"stop_token_ids": [1], "stop": "a"}, "plain"),
        ({"top_k": 1}, "full"),
        ({"top_p": 0.99}, "full"),
        ({"min_p": 0.01}, "full"),
        ({"repetition_penalty": 1.1}, "full"),
        ({"presence_penalty": -0.1}, "full"),
        ({"logit_bias": {1: 2}}, "full"),
        ({"allowed_token_ids": [1]}, "full"),
        ({"bad_words": ["a"]}, "full"),
    ],
    ids=str,
)
def test_the_variant_is_the_cheapest_that_honours_everything(arguments, variant):
    p = SamplingParams(**arguments)
    assert p.variant == variant
    assert (variant == "full") or not p.needs_state


@pytest.mark.parametrize(("temperature", "least"), [(0, "greedy"), (0.8, "plain")])
def test_a_wider_variant_draws_the_same_token(temperature, least):
    row = params_row(SamplingParams(temperature=temperature), seed=5, sample=0, prompt_length=1)
    rows = row.__class__(**{name: np.repeat(v, 8, axis=0) for name, v in vars(row).items()})
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((8, V)), jnp.float32)
    drawn = [
        sample(logits, rows, jnp.arange(8), variant=variant).tokens.tolist()
        for variant in VARIANTS[VARIANTS.index(least) :]
    ]
    assert all(tokens == drawn[0] for tokens in drawn)


def test_a_batch_takes_the_widest_variant():
    assert widest_variant([]) == "greedy"
    assert widest_variant(["plain", "greedy"]) == "plain"
    assert widest_variant(["plain", "full", "greedy"]) == "full"


def test_generation_config_gives_the_defaults():
    config = {
        "do_sample": True,
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "repetition_penalty": 1.05,
        "max_new_tokens": 64,
        "eos_token_id": [1, 2],
        "transformers_version": "5",
    }
    p = SamplingParams.from_generation_config(config)
    assert (p.temperature, p.top_k, p.top_p, p.repetition_penalty) == (0.6, 20, 0.95, 1.05)
    assert p.max_tokens == 64
    assert SamplingParams.from_generation_config(config, temperature=0.1).temperature == 0.1
    assert SamplingParams.from_generation_config({}).greedy
    assert SamplingParams.from_generation_config({"do_sample": False, "temperature": 0.6}).greedy
    assert SamplingParams.from_generation_config({"do_sample": True, "top_p": None}).top_p == 1.0
    assert SamplingParams.from_generation_config({"stop_strings": ["a", "b"]}).stop == ("a", "b")


def test_a_generation_config_that_cannot_be_honoured_is_refused():
    with pytest.raises(ValueError, match="num_beams=4"):
        SamplingParams.from_generation_config({"num_beams": 4})
    with pytest.raises(ValueError, match="min_length=9"):
        SamplingParams.from_generation_config({"min_length": 9})
    with pytest.raises(ValueError, match="typical_p=0"):
        SamplingParams.from_generation_config({"typical_p": 0.9})
    neutral = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "penalty_alpha": None}
    assert SamplingParams.from_generation_config(neutral).greedy


def test_a_row_is_what_the_parameters_say():
    p = SamplingParams(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, min_tokens=4)
    row = params_row(p, seed=2**40 + 3, sample=2, prompt_length=10)
    assert row.seed.tolist() == [[2**8, 3]] and row.sample.tolist() == [2]
    assert row.temperature.tolist() == [0.5] and row.top_k.tolist() == [3]
    assert row.top_p[0] == np.float32(0.9) and row.min_p[0] == np.float32(0.1)
    assert row.stop_from.tolist() == [14]


def drawn_with(p, position, **state):
    """The token drawn from flat logits, and which tokens can be drawn, by a biased search."""
    rows = params_row(p, seed=0, sample=0, prompt_length=1)
    one = params_state_row(p, V, prompt=[1], **state)
    batched = one.__class__(**{k: v[None] for k, v in vars(one).items()})
    logits = jnp.zeros((1, V)).at[0, 2].set(9.0).at[0, 5].set(8.0).at[0, 7].set(7.0)
    return int(sample(logits, rows, jnp.array([position]), batched).tokens[0])


def test_stop_tokens_are_masked_until_min_tokens():
    p = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[5], ignore_eos=True)
    assert [drawn_with(p, at, eos_token_ids=[2]) for at in (1, 2, 3)] == [7, 7, 2]


def test_single_bad_words_bias_and_allowed_ids_reach_the_sampler():
    p = SamplingParams(temperature=0, bad_words=["x"])
    assert drawn_with(p, 1, bad_word_ids=[(2,), (5, 7)]) == 5
    p = SamplingParams(temperature=0, logit_bias={2: -5, 7: 2})
    assert drawn_with(p, 1) == 7
    p = SamplingParams(temperature=0, allowed_token_ids=[7, 8])
    assert drawn_with(p, 1) == 7
    p = SamplingParams(temperature=0, presence_penalty=2.0)
    assert drawn_with(p, 3, output=[2, 2]) == 5
    p = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert drawn_with(p, 3, output=[2]) == 5


def test_a_bad_word_is_banned_where_its_beginning_was_generated():
    words = [(5, 6, 7), (9,), (6, 8), (1, 2)]
    assert banned_tokens(words, []) == ()
    assert banned_tokens(words, [5]) == ()
    assert banned_tokens(words, [5, 6]) == (7, 8)
    assert banned_tokens(words, [5, 6, 6]) == (8,)
    assert banned_tokens([(1, 1, 4), (1, 4)], (1, 1)) == (4,)


def test_bad_words_are_encoded_with_and_without_a_space():
    table = {"no": [3], " no": [8], "dog": [1, 2], " dog": [9, 1, 2]}
    assert encode_bad_words(["no", " no", "dog"], table.__getitem__) == ((3,), (8,), (1, 2))
    with pytest.raises(ValueError, match="only spaces"):
        encode_bad_words([" "], table.__getitem__)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"beam_width": 0, "max_tokens": 1}, ValueError, "beam_width must be at least 1, not 0"),
        ({"beam_width": 1, "max_tokens": 0}, ValueError, "max_tokens must be at least 1, not 0"),
        ({"beam_width": 2.0, "max_tokens": 1}, TypeError, "beam_width .* not 2.0"),
        (
            {"beam_width": 2, "max_tokens": 1, "length_penalty": float("nan")},
            ValueError,
            "length_penalty .* not nan",
        ),
    ],
    ids=["width", "tokens", "type", "penalty"],
)
def test_beam_parameters_are_validated(arguments, error, message):
    with pytest.raises(error, match=message):
        BeamSearchParams(**arguments)
