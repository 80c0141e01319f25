"""`LLM` and `AsyncLLM`: what a user touches.  The traces are those of tests/engine."""

import asyncio
import dataclasses
import itertools
import os
import pathlib
import stat
import subprocess
import sys
import threading
import time
from types import MappingProxyType, SimpleNamespace

import jax
import numpy as np
import pytest

import aidx.llm
from aidx.engine import BeamSearchParams, EngineDeadError, SamplingParams
from aidx.llm import LLM, AsyncLLM, pool_size, set_compilation_cache
from aidx.models import save_model
from tests.engine.tiny import (
    GREEDY,
    LIMITS,
    PROMPTS,
    Letters,
    dense_tokens,
    engine,
    generate,
    model,
    tokens_of,
)


class Chatty(Letters):
    def encode_chat(self, messages, *, add_generation_prompt=True):
        text = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return self.encode(text + "<bot>" * add_generation_prompt)


OPTIONS = {
    name: LIMITS[name]
    for name in (
        "num_blocks",
        "block_size",
        "max_num_seqs",
        "max_num_batched_tokens",
        "max_model_len",
        "max_logprobs",
    )
}


def make(tokenizer=None, generation=None, **options):
    config = MappingProxyType(generation or {})
    wrapped = model().replace(tokenizer=tokenizer, generation_config=config)
    return LLM(wrapped, warmup=False, **(OPTIONS | options))


@pytest.fixture(scope="module")
def llm():
    return make(Chatty())


def test_prompts_are_ids_or_texts_one_or_many(llm):
    text = "def f(x):"
    ids = llm.encode(text)
    [one] = llm.generate(text, GREEDY)
    [same] = llm.generate(ids, GREEDY)
    many = llm.generate([text, ids, np.array(ids)], GREEDY)
    assert tokens_of([one, same]) == tokens_of(many[:2]) == tokens_of(many[1:])
    assert one.prompt == text and same.prompt is None
    assert list(one.outputs[0].token_ids) == dense_tokens(ids, GREEDY)
    assert one.outputs[0].text == Letters().decode(one.outputs[0].token_ids)


def test_what_is_no_prompt_is_refused_by_name(llm):
    for prompts in (None, 5, {"prompt": "text"}):
        with pytest.raises(TypeError, match=r"prompts=.* is neither a text"):
            llm.generate(prompts, GREEDY)
    for prompts in ([1.5, 2.0], [None], [{"prompt": "text"}]):
        with pytest.raises(ValueError, match="a prompt is a non-empty list of token ids, not"):
            llm.generate(prompts, GREEDY)
    [one] = llm.generate(jax.numpy.array(PROMPTS[0]), GREEDY)
    assert list(one.outputs[0].token_ids) == dense_tokens(PROMPTS[0], GREEDY)
    with pytest.raises(TypeError, match="are no BeamSearchParams"):
        llm.beam_search("text", GREEDY)
    for messages in ("hi", {"role": "user", "content": "hi"}):
        with pytest.raises(TypeError, match=r"messages=.* must be a list"):
            llm.chat(messages)


def test_each_prompt_has_its_parameters(llm):
    each = [dataclasses.replace(GREEDY, max_tokens=n) for n in (3, 5, 1)]
    outputs = llm.generate(PROMPTS[:3], each)
    assert [len(o.outputs[0].token_ids) for o in outputs] == [3, 5, 1]
    with pytest.raises(ValueError, match="2 prompts, 3 sampling_params and 2 priorities"):
        llm.generate(PROMPTS[:2], each)


def test_one_bad_prompt_refuses_all_and_leaves_nothing(llm):
    with pytest.raises(ValueError, match="outside a vocabulary"):
        llm.generate([PROMPTS[0], [1000]], GREEDY)
    assert not llm.engine.has_unfinished and llm.stats().waiting == 0


def test_parameters_default_to_the_generation_config():
    quiet = make(generation={"do_sample": False, "max_new_tokens": 3})
    [output] = quiet.generate(PROMPTS[0])
    assert list(output.outputs[0].token_ids) == dense_tokens(PROMPTS[0], GREEDY)[:3]
    warm = make(generation={"do_sample": True, "temperature": 0.5, "top_p": 0.9})
    assert (warm.default_params().temperature, warm.default_params().top_p) == (0.5, 0.9)


def test_chat_goes_through_the_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    [one] = llm.chat(messages, GREEDY)
    both = llm.chat([messages, messages], GREEDY)
    assert one.prompt_token_ids == tuple(Letters().encode("<user>hi<bot>"))
    assert tokens_of(both) == tokens_of([one, one])
    [bare] = llm.chat(messages, GREEDY, add_generation_prompt=False)
    assert bare.prompt_token_ids == tuple(Letters().encode("<user>hi"))
    with pytest.raises(ValueError, match="no tokenizer"):
        make().chat(messages)
    with pytest.raises(ValueError, match="no tokenizer: give token ids"):
        make().generate("text")


def test_an_end_of_sequence_outside_of_the_vocabulary_is_none():
    odd = LLM(model().replace(eos_token_ids=(10**6,)), warmup=False, **OPTIONS)
    params = dataclasses.replace(GREEDY, ignore_eos=False, min_tokens=2)
    assert tokens_of(odd.generate([[1, 2]], params)) == [[dense_tokens([1, 2], GREEDY)]]


def test_beams_come_with_prompt_and_text(llm):
    params = BeamSearchParams(beam_width=2, max_tokens=4)
    [output] = llm.beam_search("ab", params)
    [reference] = generate([Letters().encode("ab")], params)
    assert [s.tokens[2:] for s in output.sequences] == [o.token_ids for o in reference.outputs]
    best, second = output.sequences
    assert best.cum_logprob > second.cum_logprob and best.text.startswith("ab")


def test_other_parameters_answer_otherwise(llm):
    before = tokens_of(llm.generate(PROMPTS[:2], GREEDY))
    old = llm.model.params
    llm.update_params(jax.tree.map(lambda x: x * 1.2, old))
    assert tokens_of(llm.generate(PROMPTS[:2], GREEDY)) != before
    llm.update_params(old)
    assert tokens_of(llm.generate(PROMPTS[:2], GREEDY)) == before


def test_a_context_that_the_model_is_not_made_for_is_refused_before_its_weights_are_read(
    tmp_path, monkeypatch
):
    save_model(model(), tmp_path)
    monkeypatch.setattr("aidx.models.load.read_params", lambda *_: pytest.fail("weights were read"))
    for path_or_model in (tmp_path, model()):
        with pytest.raises(ValueError, match=r"max_model_len=2049 .*max_position_embeddings=2048"):
            LLM(path_or_model, **(OPTIONS | {"max_model_len": 2049}), warmup=False)
    longer = make(max_model_len=2049, allow_long_max_model_len=True, num_blocks=520)
    assert longer.engine.config.max_model_len == 2049


def test_the_length_is_what_the_pool_holds_unless_asked_for():
    small = make(num_blocks=9, max_model_len=None)
    assert small.engine.config.max_model_len == 32
    with pytest.raises(ValueError, match="max_model_len=64 does not fit the pool's 8 blocks of 4"):
        make(num_blocks=9)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"gpu_memory_utilization": 0.5}, "both size the pool"),
        ({"num_blocks": None, "gpu_memory_utilization": 1.5}, "must be in"),
        ({"dtype": "bfloat16"}, "differs from the model's float32"),
        ({"revision": "main"}, "revision='main' is for loading"),
        ({"max_num_batched_tokens": 2}, "at least max_num_seqs=4"),
        ({"kv_cache_dtype": "int32"}, "kv_cache_dtype='int32' is not one of auto, fp8, int8"),
        ({"preemption_mode": "drop"}, "preemption_mode='drop'"),
        ({"swap_space": -1}, "swap_space=-1 GiB"),
    ],
)
def test_options_that_contradict_one_another_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_dtype": "int4"},
        {"preemption_mode": "drop"},
        {"scheduling_policy": "lifo"},
        {"warmup": "fast"},
    ],
)
def test_what_no_model_could_mend_is_refused_before_one_is_loaded(options):
    [(name, value)] = options.items()
    with pytest.raises(ValueError, match=rf"{name.removeprefix('scheduling_')}='{value}' is no"):
        LLM("a directory that is not there", **options)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"implementation": "nope"}, "paged_attention has no implementation .'nope'."),
        ({"block_size": 0}, "block_size=0 must be at least 1"),
    ],
)
def test_nor_what_no_engine_could_do(options, message):
    with pytest.raises(ValueError, match=message):
        LLM("a directory that is not there", **options)


def test_blocks_are_larger_on_a_cpu_for_many_sequences():
    many = dict(max_num_seqs=8, max_num_batched_tokens=16)
    sizes = [
        make(**options).engine.config.block_size
        for options in (
            dict(block_size=None, **many),
            dict(block_size=None, max_num_seqs=1),
            dict(block_size=8, **many),
        )
    ]
    assert sizes == [64 if jax.default_backend() == "cpu" else 16, 16, 8]


def test_a_cache_of_one_byte_a_value_serves_and_preemption_is_the_users_choice(llm):
    small = make(kv_cache_dtype="fp8", preemption_mode="swap", swap_space=0.25)
    config = small.engine.config
    assert (config.preemption_mode, config.swap_space_bytes) == ("swap", 1 << 28)
    kinds = {str(x.dtype) for x in jax.tree.leaves(small.engine._device.cache)}
    assert kinds == {"float8_e4m3fn", "float32"}  # values, and a scale for each token and head
    exact, rounded = (x.generate(PROMPTS[0], GREEDY)[0].outputs[0] for x in (llm, small))
    assert rounded.token_ids[0] == exact.token_ids[0] and rounded.finish_reason == "length"


def test_a_pool_on_a_cpu_takes_at_most_a_gibibyte_and_no_more_than_can_be_used():
    config = engine().config
    block = 2 * 2 * 2 * 8 * 4 * 4
    assert pool_size(model(), config, 0.9) == 2 * 4 * 16 + 1
    large = dataclasses.replace(
        config, max_num_seqs=16, max_num_batched_tokens=16, max_model_len=10**8
    )
    assert pool_size(model(), large, 0.9) == (1 << 30) // block
    quantised = dataclasses.replace(large, dtype="int8")  # one scale of 4 bytes for 8 values
    assert pool_size(model(), quantised, 0.9) == (1 << 30) // (block // 4 + block // 8)


def test_a_pool_on_a_gpu_takes_what_parameters_and_temporaries_leave(monkeypatch):
    config = dataclasses.replace(engine().config, max_model_len=10**6)
    limit = 8 << 20
    device = SimpleNamespace(platform="gpu", memory_stats=lambda: {"bytes_limit": limit})
    monkeypatch.setattr(aidx.llm, "_device", lambda params: device)
    monkeypatch.setattr(aidx.llm.stepping, "temporary_bytes", lambda *a: 1 << 20)
    block = 2 * 2 * 2 * 8 * 4 * 4
    params = sum(x.nbytes for x in jax.tree.leaves(model().params))
    assert pool_size(model(), config, 0.5) == ((limit // 2) - params - (1 << 20)) // block
    with pytest.raises(ValueError, match="leaves no room for a cache"):
        pool_size(model(), config, 0.12)


def test_temporaries_are_those_of_the_largest_step():
    config = engine().config
    small = aidx.llm.stepping.temporary_bytes(model().forward, model().params, config)
    assert small > 0


# The compilation cache.


def run_python(code, tmp_path, **env):
    root = pathlib.Path(aidx.__file__).resolve().parent.parent
    env = {
        "XDG_CACHE_HOME": str(tmp_path),
        "JAX_PLATFORMS": "cpu",
        "PATH": os.environ["PATH"],
    } | env
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env=env, cwd=root, check=True, capture_output=True, text=True
    ).stdout.strip()


def test_programs_are_kept_in_a_directory_of_our_own(tmp_path):
    code = (
        "import jax, jax.numpy as jnp; jax.jit(lambda x: x + 1)(jnp.ones(3))\n"
        "import aidx.llm as llm\n"
        "print(jax.config.jax_compilation_cache_dir, llm.set_compilation_cache())"
    )
    directory = tmp_path / "aidx" / "jax"
    assert run_python(code, tmp_path) == f"None {directory}"  # importing sets nothing
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.chmod(0o755)
    assert run_python(code, tmp_path) == "None None"  # others could write there
    chosen = str(tmp_path / "mine")
    found = run_python(code, tmp_path, JAX_COMPILATION_CACHE_DIR=chosen)
    assert found == f"{chosen} {chosen}"


def test_a_cache_that_the_user_set_stays():
    before = jax.config.jax_compilation_cache_dir
    assert before is not None and set_compilation_cache() == before


# AsyncLLM.


@pytest.fixture
def served(llm):
    with AsyncLLM(llm) as served:
        yield served
    assert not llm.engine.has_unfinished and llm.stats().pool_use == 0


async def collect(served, prompt, params, **options):
    return [output async for output in served.stream(prompt, params, **options)]


def test_streams_run_side_by_side_and_grow(served):
    async def main():
        return await asyncio.gather(*(collect(served, p, GREEDY) for p in PROMPTS))

    for prompt, outputs in zip(PROMPTS, asyncio.run(main()), strict=True):
        tokens = [o.outputs[0].token_ids for o in outputs]
        assert all(b[: len(a)] == a for a, b in itertools.pairwise(tokens))
        assert list(tokens[-1]) == dense_tokens(prompt, GREEDY)
        assert [o.finished for o in outputs] == [False] * (len(outputs) - 1) + [True]


LONG = dataclasses.replace(GREEDY, max_tokens=60)


def test_a_reader_that_leaves_cancels_running_and_waiting_requests(served, monkeypatch):
    slow_down(monkeypatch, served.llm.engine)
    before = served.stats().finished

    async def main():
        streams = [served.stream([1 + i, 2], LONG) for i in range(6)]  # four seats
        first = [asyncio.create_task(anext(s)) for s in streams]
        await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
        for task in first:
            task.cancel()
        await asyncio.gather(*first, return_exceptions=True)
        for s in streams:
            await s.aclose()
        return await served.generate(PROMPTS[0], GREEDY)

    output = asyncio.run(main())
    assert list(output.outputs[0].token_ids) == dense_tokens(PROMPTS[0], GREEDY)
    after = served.stats().finished
    assert after["length"] == before.get("length", 0) + 1  # none of the six went on to its end
    assert after["abort"] > before.get("abort", 0)


def test_other_parameters_reach_running_streams(served, monkeypatch):
    slow_down(monkeypatch, served.llm.engine)
    old = served.llm.model.params
    new = jax.tree.map(lambda x: x * 1.2, old)

    async def main():
        stream = served.stream([3, 4], LONG)
        await anext(stream)
        await served.update_params(new)
        changed = [output async for output in stream][-1]
        with pytest.raises(ValueError, match="the new parameters differ"):
            await served.update_params({})
        await served.update_params(old)
        return changed, await served.generate([3, 4], LONG)

    changed, after = asyncio.run(main())
    assert list(after.outputs[0].token_ids) == dense_tokens([3, 4], LONG)
    assert changed.outputs[0].token_ids != after.outputs[0].token_ids
    assert len(changed.outputs[0].token_ids) == 60


def test_abort_ends_a_stream_with_a_reason(served):
    async def main():
        outputs = []
        async for output in served.stream([3, 4], LONG, request_id="mine"):
            outputs.append(output)
            if len(outputs) == 1:
                assert await served.abort("mine")
        assert not await served.abort("mine")
        return outputs

    assert asyncio.run(main())[-1].outputs[0].finish_reason == "abort"


def test_a_refusal_is_raised_where_it_belongs(served):
    async def main():
        good = asyncio.create_task(served.generate(PROMPTS[0], GREEDY))
        with pytest.raises(ValueError, match="outside a vocabulary"):
            await served.generate([1000], GREEDY)
        return await good

    assert asyncio.run(main()).finished


def test_a_slow_reader_sees_fewer_outputs_and_the_last_one(served):
    async def main():
        seen = []
        async for output in served.stream(PROMPTS[0], LONG):
            seen.append(len(output.outputs[0].token_ids))
            await asyncio.sleep(0.05)
        return seen

    seen = asyncio.run(main())
    assert seen[-1] == 60 and seen == sorted(set(seen))


def slow_down(monkeypatch, engine):
    """60 tokens take more than a second: nothing that is told to stop has ended by itself."""
    step = engine.step

    def slow():
        time.sleep(0.02)
        return step()

    monkeypatch.setattr(engine, "step", slow)


def test_closing_ends_everything(llm, monkeypatch):
    slow_down(monkeypatch, llm.engine)

    async def main():
        served = AsyncLLM(llm)
        task = asyncio.create_task(collect(served, [1, 2], LONG))
        await asyncio.sleep(0.05)
        await asyncio.to_thread(served.close)
        with pytest.raises(EngineDeadError, match=r"close\(\) was called"):
            await task
        with pytest.raises(EngineDeadError, match="closed"):
            await served.generate([1], GREEDY)

    asyncio.run(main())
    assert not any(t.name == "aidx-engine" for t in threading.enumerate())
    assert not llm.engine.has_unfinished


def test_a_bug_in_the_engine_reaches_every_stream(monkeypatch):
    broken = make()
    slow_down(monkeypatch, broken.engine)

    async def main():
        served = AsyncLLM(broken)
        tasks = [asyncio.create_task(collect(served, [1 + i], LONG)) for i in range(3)]
        await asyncio.sleep(0.02)

        def step():
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(broken.engine, "step", step)
        for result in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(result, EngineDeadError) and "a bug" in str(result)
        with pytest.raises(EngineDeadError, match="a bug"):
            await served.generate([1], GREEDY)

    asyncio.run(main())


def test_options_come_too_late_for_an_llm(llm):
    with pytest.raises(ValueError, match="block_size"):
        AsyncLLM(llm, block_size=8)


def test_sampling_params_none_takes_the_defaults(served):
    output = asyncio.run(served.generate(PROMPTS[0]))
    assert len(output.outputs[0].token_ids) == SamplingParams().max_tokens
