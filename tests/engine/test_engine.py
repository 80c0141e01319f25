"""The engine as its callers see it: endings, logprobs, refusals, failures, cancellation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.engine import Engine, EngineConfig, EngineDeadError, SamplingParams
from aidx.engine.sampling_params import encode_bad_words

from .tiny import (
    GREEDY,
    LENGTH,
    LIMITS,
    PROMPTS,
    SEEDED,
    VOCAB,
    Letters,
    assert_same,
    dense_logits,
    dense_tokens,
    engine,
    generate,
    model,
    run,
    tokens_of,
)

FREE = dense_tokens  # what the model says when nobody interferes


def log_softmax(x):
    return np.asarray(jax.nn.log_softmax(jnp.asarray(x), axis=-1))


# Endings.


def test_a_stop_token_ends_and_is_the_reason():
    tokens = FREE(PROMPTS[0], GREEDY)
    at = next(i for i in range(2, 12) if tokens[i] not in tokens[:i])
    params = SamplingParams(temperature=0, max_tokens=12, stop_token_ids=[tokens[at]])
    [output] = generate([PROMPTS[0]], params)
    sample = output.outputs[0]
    assert list(sample.token_ids) == tokens[: at + 1]
    assert (sample.finish_reason, sample.stop_reason) == ("stop", tokens[at])


@pytest.mark.parametrize("ignore", [False, True])
def test_end_of_sequence_ends_unless_it_is_ignored(ignore):
    tokens = FREE(PROMPTS[0], GREEDY)
    at = next(i for i in range(2, 12) if tokens[i] not in tokens[:i])
    params = dataclasses.replace(GREEDY, ignore_eos=ignore)
    [output] = generate([PROMPTS[0]], params, eos_token_ids=(tokens[at],))
    sample = output.outputs[0]
    assert list(sample.token_ids) == (tokens if ignore else tokens[: at + 1])
    assert sample.finish_reason == ("length" if ignore else "stop") and sample.stop_reason is None


def test_min_tokens_keep_the_end_away():
    eos = FREE(PROMPTS[1], GREEDY)[0]
    params = dataclasses.replace(GREEDY, min_tokens=6)
    [output] = generate([PROMPTS[1]], params, eos_token_ids=(eos,))
    tokens = list(PROMPTS[1])
    for _ in range(6):
        logits = dense_logits(tokens)[-1].copy()
        logits[eos] = -np.inf
        tokens.append(int(np.argmax(logits)))
    assert list(output.outputs[0].token_ids)[:6] == tokens[len(PROMPTS[1]) :]
    assert len(output.outputs[0].token_ids) > 6


def test_the_models_length_ends():
    prompt = PROMPTS[2]
    [output] = generate([prompt], SamplingParams(temperature=0, max_tokens=None))
    assert len(output.outputs[0].token_ids) == LENGTH - len(prompt)
    assert output.outputs[0].finish_reason == "length"


def test_a_stop_string_ends_across_tokens_and_no_stream_shows_part_of_it():
    made = engine(tokenizer=Letters())
    [free] = generate([PROMPTS[0]], GREEDY, made=made)
    text = free.outputs[0].text
    assert text == Letters().decode(free.outputs[0].token_ids)
    stop = text[4:6]
    at = text.index(stop)
    params = dataclasses.replace(GREEDY, stop=[stop])
    name = made.add_request(PROMPTS[0], params, stream=True)
    seen = []
    while made.has_unfinished:
        seen += [o.outputs[0] for o in made.step() if o.request_id == name]
    assert seen[-1].text == text[:at]
    assert (seen[-1].finish_reason, seen[-1].stop_reason) == ("stop", stop)
    assert len(seen[-1].token_ids) == at + 2  # the overrun is dropped
    assert all(text[:at].startswith(s.text) for s in seen)
    kept = dataclasses.replace(params, include_stop_str_in_output=True)
    assert generate([PROMPTS[0]], kept, made=made)[0].outputs[0].text == text[: at + 2]


def test_a_stream_gives_every_token_once():
    made = engine(tokenizer=Letters())
    name = made.add_request(PROMPTS[1], GREEDY, stream=True)
    seen = []
    while made.has_unfinished:
        seen += [o.outputs[0] for o in made.step() if o.request_id == name]
    assert [len(o.token_ids) for o in seen] == list(range(1, 13))
    [at_end] = generate([PROMPTS[1]], GREEDY, made=made)
    assert at_end.outputs[0].text == seen[-1].text == Letters().decode(seen[-1].token_ids)


def test_the_host_is_one_step_behind():
    made = engine()
    made.add_request(PROMPTS[0], GREEDY, stream=True)
    assert made.step() == [] and made._in_flight is not None
    [output] = made.step()
    assert len(output.outputs[0].token_ids) == 1 and made._in_flight is not None


# Logprobs.


def test_logprobs_are_those_of_the_raw_logits():
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=6, logprobs=3, top_k=4)
    [output] = generate([PROMPTS[1]], params, tokenizer=Letters())
    sample = output.outputs[0]
    tokens = [*PROMPTS[1], *sample.token_ids]
    reference = log_softmax(dense_logits(tokens))[len(PROMPTS[1]) - 1 :]
    for i, (token, found) in enumerate(zip(sample.token_ids, sample.logprobs, strict=True)):
        row = reference[i]
        assert next(iter(found)) == token
        assert found[token].rank == 1 + (row > row[token]).sum()
        assert found[token].decoded_token == Letters().decode([token])
        best = np.argsort(-row)[:3].tolist()
        assert set(found) == {token, *best}
        for t, logprob in found.items():
            assert logprob.logprob == pytest.approx(row[t], abs=1e-4)
    total = sum(
        found[t].logprob for t, found in zip(sample.token_ids, sample.logprobs, strict=True)
    )
    assert sample.cumulative_logprob == pytest.approx(total)


def test_prompt_logprobs_are_complete_even_where_the_prefix_is_cached():
    made = engine()
    generate(PROMPTS, GREEDY, made=made)
    params = dataclasses.replace(GREEDY, prompt_logprobs=2)
    outputs = generate(PROMPTS, params, made=made)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        reference = log_softmax(dense_logits(prompt))
        assert output.prompt_logprobs[0] is None and len(output.prompt_logprobs) == len(prompt)
        for i, found in enumerate(output.prompt_logprobs[1:]):
            token = prompt[i + 1]
            assert found[token].logprob == pytest.approx(reference[i, token], abs=1e-4)
            assert found[token].rank == 1 + (reference[i] > reference[i, token]).sum()
            assert set(found) == {token, *np.argsort(-reference[i])[:2].tolist()}
        assert_same(prompt, output.outputs[0].token_ids, FREE(prompt, GREEDY))


# What the sampler is told.


def test_a_drawn_seed_is_reported_and_draws_the_same_again():
    params = SamplingParams(max_tokens=8)
    first, second = generate([PROMPTS[0]] * 2, params)
    assert first.seed != second.seed and tokens_of([first]) != tokens_of([second])
    again = generate([PROMPTS[0]], dataclasses.replace(params, seed=first.seed))
    assert tokens_of(again) == tokens_of([first]) and again[0].seed == first.seed


def test_only_allowed_tokens_are_drawn_and_bias_draws():
    allowed = [3, 50, 70]
    [output] = generate([PROMPTS[0]], SamplingParams(allowed_token_ids=allowed, max_tokens=10))
    assert set(output.outputs[0].token_ids) <= set(allowed)
    [output] = generate([PROMPTS[0]], dataclasses.replace(GREEDY, logit_bias={42: 100.0}))
    assert set(output.outputs[0].token_ids) == {42}


def test_penalties_count_what_was_generated_also_after_a_preemption():
    """A huge frequency penalty lets no token come twice."""
    params = SamplingParams(
        temperature=0, max_tokens=20, frequency_penalty=2.0, logit_bias={7: 30.0}
    )
    reference = tokens_of(generate(PROMPTS[:4], params))
    assert all(1 < tokens.count(7) < 20 for [tokens] in reference)
    made = engine(hold=26, enable_prefix_caching=False)
    assert tokens_of(generate(PROMPTS[:4], params, made=made)) == reference
    assert made.stats().preempted > 0


@pytest.mark.parametrize("length", [1, 2, 3])
def test_bad_words_are_not_generated(length):
    made = engine(tokenizer=Letters())
    [free] = generate([PROMPTS[3]], GREEDY, made=made)
    word = free.outputs[0].text[3 : 3 + length]
    assert word.strip() and word in free.outputs[0].text
    params = dataclasses.replace(GREEDY, bad_words=[word], max_tokens=20)
    [output] = generate([PROMPTS[3]], params, made=made)
    assert word not in output.outputs[0].text
    # The best token at every place that would not complete the word.
    ids, tokens = encode_bad_words([word], Letters().encode), list(PROMPTS[3])
    for _ in range(20):
        logits = dense_logits(tokens)[-1].copy()
        for bad in ids:
            if (
                tuple(tokens[len(PROMPTS[3]) :][-(len(bad) - 1) :] if len(bad) > 1 else ())
                == bad[:-1]
            ):
                logits[bad[-1]] = -np.inf
        tokens.append(int(np.argmax(logits)))
    assert list(output.outputs[0].token_ids) == tokens[len(PROMPTS[3]) :]


# Refusals, at once and with the values.


@pytest.mark.parametrize(
    "prompt,params,message",
    [
        ([], GREEDY, "non-empty"),
        ([[1]], GREEDY, "non-empty"),
        ([0.5], GREEDY, "non-empty"),
        ([1, VOCAB], GREEDY, r"\[97\] are outside a vocabulary of 97"),
        ([-1], GREEDY, r"\[-1\] are outside"),
        ([1] * 64, GREEDY, "64 tokens; max_model_len=64"),
        ([1], SamplingParams(logprobs=7), "logprobs=7 exceeds max_logprobs=6"),
        ([1], SamplingParams(prompt_logprobs=9), "prompt_logprobs=9 exceeds"),
        ([1], SamplingParams(stop=["x"]), "need a tokenizer"),
        ([1], SamplingParams(bad_words=["x"]), "need a tokenizer"),
        ([1], SamplingParams(allowed_token_ids=[100]), r"\[100\] outside a vocabulary"),
        ([1], SamplingParams(logit_bias={200: 1.0}), r"\[200\] outside a vocabulary"),
        ([1], SamplingParams(stop_token_ids=[2, -3]), r"stop_token_ids \[-3\] are outside"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(prompt, params, message):
    made = engine()
    with pytest.raises(ValueError, match=message):
        made.add_request(prompt, params)
    assert not made.has_unfinished


@pytest.mark.parametrize(
    "arguments,message",
    [
        ({"params": {"temperature": 0}}, "{'temperature': 0} is neither SamplingParams nor"),
        ({"priority": "high"}, "priority='high' must be an integer"),
        ({"priority": float("nan")}, "priority=nan must be an integer"),
        ({"user": None}, "user=None must be a string"),
        ({"request_id": 5}, "request_id=5 must be a string"),
    ],
)
def test_what_the_queues_could_not_sort_is_refused_and_harms_nobody(arguments, message):
    made = engine(scheduling_policy="priority")
    name = made.add_request(PROMPTS[0], GREEDY)
    with pytest.raises(TypeError, match=message):
        made.add_request(PROMPTS[1], **arguments)
    done = run(made)
    assert_same(PROMPTS[0], done[name].outputs[0].token_ids, FREE(PROMPTS[0], GREEDY))


def test_a_name_in_use_is_refused_and_free_again_afterwards():
    made = engine()
    made.add_request([1, 2], GREEDY, request_id="a")
    with pytest.raises(ValueError, match="'a' is unfinished"):
        made.add_request([3], GREEDY, request_id="a")
    run(made)
    assert made.add_request([3], GREEDY, request_id="a") == "a"
    run(made)


def test_a_request_larger_than_the_pool_is_refused():
    made = engine(num_blocks=9)
    with pytest.raises(ValueError, match="need 10 blocks of 4 tokens; the pool has 8"):
        made.add_request([1] * 28, SamplingParams(max_tokens=12))


@pytest.mark.parametrize(
    "bad",
    [
        {"vocab_size": 0},
        {"max_logprobs": -1},
        {"scheduling_policy": "x"},
        {"block_size": 0},
        {"num_blocks": 1},
        {"implementation": "nope"},
    ],
)
def test_a_config_that_makes_no_sense_is_refused(bad):
    with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
        EngineConfig(**(LIMITS | bad))


def test_an_engine_for_a_known_model_fills_the_memory_it_is_given():
    make = functools.partial(EngineConfig.for_model, "mistral-7b", vocab_size=32_000)
    config = make(1 << 30, block_size=32, dtype="int8", max_num_seqs=8)
    geometry = (config.num_layers, config.num_kv_heads, config.head_dim, config.max_model_len)
    assert geometry == (32, 8, 128, 32768)
    assert (config.window, config.max_num_seqs, config.block_size) == (4096, 8, 32)
    assert config.num_blocks == (1 << 30) // (2 * 32 * 8 * 32 * (128 + 4))
    for wrong, message in (
        (lambda: make(1 << 20), "num_blocks=0 must be at least 2"),
        (lambda: make(1 << 30, num_blocks=9), "num_blocks=9 and memory_bytes=1073741824 both"),
        (lambda: EngineConfig.for_model("bert", 1, vocab_size=1), "unknown model 'bert'"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


# Cancellation.


def test_the_plan_of_a_decode_that_follows_is_the_one_that_would_be_packed_anew(monkeypatch):
    made, same = engine(cascade_tokens=8), []

    def compared(self, work, again=Engine._plan_again):
        found = again(self, work)
        if found is not None:
            drew = self._drew.copy()
            anew, limits = self._plan_anew(work), dict(max_num_seqs=4, updates=work.updates)
            assert anew[1] == found[1]
            packed = [
                pack(shape, starts=rows.starts, **limits) for rows, shape, pack in (found, anew)
            ]
            np.testing.assert_array_equal(*packed)
            for name, value in vars(anew[0]).items():
                np.testing.assert_array_equal(getattr(found[0], name), value, err_msg=name)
            assert (self._drew == drew).all()
            same.append(work.seats)
        return found

    monkeypatch.setattr(Engine, "_plan_again", compared)
    params = [GREEDY, SamplingParams(n=2, seed=1, max_tokens=20), GREEDY, *SEEDED[:3]]
    shared = [PROMPTS[2][:20], PROMPTS[2][:20], PROMPTS[0], *PROMPTS[3:]]
    generate(shared, params, made=made)
    assert len(same) > 15


@pytest.mark.parametrize("stream", [False, True])
def test_a_cancelled_request_tells_every_token_that_was_read(stream):
    made = engine(tokenizer=Letters())
    name = made.add_request(PROMPTS[0], GREEDY, stream=stream)
    for _ in range(7):
        made.step()
    made.abort(name)
    sample = run(made)[name].outputs[0]
    wanted = generate([PROMPTS[0]], GREEDY)[0].outputs[0].token_ids
    assert len(sample.token_ids) == 6 and sample.token_ids == wanted[:6]
    assert sample.text == Letters().decode(sample.token_ids)


def test_waiting_and_running_requests_can_be_cancelled():
    made = engine()
    names = [made.add_request(p, dataclasses.replace(GREEDY, max_tokens=30)) for p in PROMPTS]
    for _ in range(4):
        made.step()
    assert made.stats().waiting and made.stats().running
    for name in (names[0], names[-1]):
        assert made.abort(name)
    assert not made.abort("nobody")
    done = run(made)
    assert [done[n].outputs[0].finish_reason for n in names] == ["abort", *["length"] * 4, "abort"]
    got = list(done[names[0]].outputs[0].token_ids)
    assert (
        got == FREE(PROMPTS[0], GREEDY)[: len(got)] and done[names[-1]].outputs[0].token_ids == ()
    )
    assert made.pool.stats().held == 0 and not made.abort(names[0])


# Failures.


def test_a_row_without_an_answer_fails_alone():
    embed = model().params["embed"].at[96].set(jnp.nan)
    made = engine(params=model().params | {"embed": embed})
    names = [made.add_request(p, GREEDY) for p in (PROMPTS[0], [5, 96], PROMPTS[1])]
    done = run(made)
    bad = done[names[1]].outputs[0]
    assert bad.finish_reason == "error" and "finite" in bad.stop_reason and bad.token_ids == ()
    for prompt, name in ((PROMPTS[0], names[0]), (PROMPTS[1], names[2])):
        assert_same(prompt, done[name].outputs[0].token_ids, FREE(prompt, GREEDY))
    assert made.pool.stats().held == 0


def test_a_tokenizer_that_fails_fails_its_request_alone():
    class Late(Letters):
        broken = False

        def decode(self, ids, *, skip_special_tokens=True):
            if self.broken and 42 in ids:
                raise KeyError("no piece 42")
            return super().decode(ids, skip_special_tokens=skip_special_tokens)

    tokenizer = Late()
    made = engine(tokenizer=tokenizer)
    generate(PROMPTS[:1], GREEDY, made=made)
    tokenizer.broken = True
    bad = made.add_request([1, 2], dataclasses.replace(GREEDY, logit_bias={42: 100.0}))
    good = made.add_request(PROMPTS[0], GREEDY)
    done = run(made)
    assert done[bad].outputs[0].finish_reason == "error"
    assert "no piece 42" in done[bad].outputs[0].stop_reason
    assert_same(PROMPTS[0], done[good].outputs[0].token_ids, FREE(PROMPTS[0], GREEDY))


def failing(made, where, error, times=1):
    """Let the engine's next device step raise, before or after it took the cache."""
    run_step, left = made._device.run, [times]

    def run(shape, packed):
        if not left[0]:
            return run_step(shape, packed)
        left[0] -= 1
        if where == "after":
            run_step(shape, packed)
            jax.tree.map(lambda x: x.delete(), made._device.cache)
        raise error

    made._device.run = run


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_step_that_fails_ends_those_in_it_and_the_engine_goes_on(where):
    made = engine()
    names = [made.add_request(p, GREEDY) for p in PROMPTS]
    for _ in range(3):
        made.step()
    failing(made, where, RuntimeError("out of order"))
    done = run(made)
    reasons = [done[name].outputs[0].finish_reason for name in names]
    assert set(reasons) == {"error", "length"}
    for prompt, name, reason in zip(PROMPTS, names, reasons, strict=True):
        sample = done[name].outputs[0]
        if reason == "error":
            assert "out of order" in sample.stop_reason
        else:
            assert_same(prompt, sample.token_ids, FREE(prompt, GREEDY))
    assert made.pool.stats().held == 0
    outputs = generate(PROMPTS, GREEDY, made=made)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert_same(prompt, output.outputs[0].token_ids, FREE(prompt, GREEDY))


def test_an_engine_that_cannot_get_its_memory_back_says_so(monkeypatch):
    made = engine()
    names = [made.add_request(p, GREEDY) for p in PROMPTS]
    made.step()
    failing(made, "after", RuntimeError("the device is gone"))

    def no_memory():
        raise MemoryError("none left")

    monkeypatch.setattr(made._device, "allocate", no_memory)
    done = run(made)
    assert all(done[name].outputs[0].finish_reason == "error" for name in names)
    with pytest.raises(EngineDeadError, match=r"the device is gone.*none left"):
        made.add_request([1], GREEDY)


# Other parameters, numbers, compilations.


def test_other_parameters_compile_nothing_and_forget_every_prefix():
    made = engine()
    generate(PROMPTS, GREEDY, made=made)
    names = [made.add_request(p, GREEDY) for p in PROMPTS[:2]]
    for _ in range(5):
        made.step()
    other = jax.tree.map(lambda x: x * 1.1, model().params)
    with jax.log_compiles(), count_compilations() as count:
        made.update_params(other)
        done = run(made)
        outputs = generate(PROMPTS, GREEDY, made=made)
        assert count() == 0
    assert all(done[name].outputs[0].finish_reason == "length" for name in names)
    assert [o.num_cached_tokens for o in outputs[2:]] == [0] * 4
    [fresh] = generate([PROMPTS[2]], GREEDY, made=engine(params=other))
    assert tokens_of([fresh]) == tokens_of(outputs[2:3]) != [[FREE(PROMPTS[2], GREEDY)]]
    host = jax.tree.map(np.asarray, other)
    for same in (host, jax.device_put(other, jax.devices()[0]), jax.tree.map(jnp.asarray, host)):
        with count_compilations() as count:
            made.update_params(same)
            assert tokens_of(generate([PROMPTS[2]], GREEDY, made=made)) == tokens_of([fresh])
            assert count() == 0
    for wrong, message in (
        ({}, r"\['embed'\] is absent, not float32\[97, 32\]"),
        (other | {"norm": jnp.ones(3)}, r"\['norm'\] is float32\[3\], not float32\[32\]"),
        (other | {"more": jnp.ones(3)}, r"\['more'\] is float32\[3\], not absent"),
    ):
        with pytest.raises(ValueError, match=message):
            made.update_params(wrong)


class count_compilations:
    """Counts the programs that the whole process compiles, whoever asks for them."""

    def __enter__(self):
        self.seen = []
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return lambda: len(self.seen)

    def __exit__(self, *_):
        jax.monitoring.unregister_event_duration_listener(self._listen)

    def _listen(self, event, _duration, **_kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            self.seen.append(event)


@pytest.mark.smoke
def test_nothing_compiles_after_the_warm_up():
    """Every kind of request, forks, preemption, aborts: not one program more in the process."""
    made = engine(hold=22, tokenizer=Letters())
    seen = []
    programs = made.warmup(lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, programs) for i in range(programs)]
    with count_compilations() as count:
        kinds = [
            GREEDY,
            SamplingParams(temperature=0.7, n=3, max_tokens=9),
            SamplingParams(top_p=0.8, top_k=5, min_p=0.01, max_tokens=9),
            SamplingParams(temperature=0.7, repetition_penalty=1.2, max_tokens=9, min_tokens=3),
            SamplingParams(temperature=0, logprobs=4, prompt_logprobs=3, max_tokens=9),
            SamplingParams(bad_words=["ab"], stop=["zz"], max_tokens=20),
        ]
        for prompt, params in zip(PROMPTS, kinds, strict=True):
            made.add_request(prompt, params, stream=True)
        made.abort(made.add_request(PROMPTS[0], GREEDY))
        run(made)
        generate(PROMPTS, kinds, made=made)
        made.stats()
        assert count() == 0
    assert made.stats().preempted > 0


def test_warming_up_for_greedy_requests_compiles_the_greedy_half():
    made = engine()
    everything = len(made.config.shapes()) + 1
    assert made.warmup(variant="greedy") < made.warmup(variant="full") < everything


def test_statistics_are_what_happened():
    seconds = iter(range(10**6))
    made = engine()
    made._clock = lambda: float(next(seconds))
    outputs = generate(PROMPTS, GREEDY, made=made)
    stats = made.stats()
    assert stats.generated_tokens == 12 * len(PROMPTS) and stats.finished == {"length": 6}
    assert stats.prompt_tokens == sum(map(len, PROMPTS)) and stats.cache_hit_rate == 0
    assert stats.running == stats.waiting == 0 and stats.pool_use == 0
    assert 0 < stats.tokens_per_second < 12 * 6
    for output in outputs:
        m = output.metrics
        assert m.arrival_time < m.first_scheduled_time < m.first_token_time < m.finished_time
        assert m.num_generation_tokens == 12
    assert stats.time_to_first_token.mean > stats.queue_time.mean > 0
    assert stats.inter_token_latency.p99 >= stats.inter_token_latency.p50 > 0
    [output] = generate(PROMPTS[:1], SamplingParams(n=3, max_tokens=5, seed=1), made=engine())
    assert (output.metrics.num_generation_tokens, output.metrics.longest_sample) == (15, 5)
    generate(PROMPTS, GREEDY, made=made)
    assert made.stats().cache_hit_rate == pytest.approx(
        sum((len(p) - 1) // 4 * 4 for p in PROMPTS) / (2 * sum(map(len, PROMPTS)))
    )
