"""What must not change an answer: batch, order, chunks, blocks, preemption, cache, asynchrony."""

import dataclasses
import functools
import json
import os
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.cache import KVCache, KVCacheConfig, contiguous_attend
from aidx.engine import SamplingParams
from aidx.models import save_model

from .tiny import (
    GREEDY,
    PROMPTS,
    SEEDED,
    assert_same,
    dense_tokens,
    engine,
    generate,
    model,
    run,
    tokens_of,
)

PARAMS = [GREEDY, GREEDY, *SEEDED[2:4], GREEDY, SEEDED[5]]  # of PROMPTS


@functools.cache
def wanted():
    return [dense_tokens(p, q) for p, q in zip(PROMPTS, PARAMS, strict=True)]


def check(outputs):
    for prompt, output, reference in zip(PROMPTS, outputs, wanted(), strict=True):
        assert output.outputs[0].finish_reason == "length"
        assert_same(prompt, output.outputs[0].token_ids, reference)


@pytest.mark.smoke
def test_paged_is_dense():
    check(generate(PROMPTS, PARAMS))


def test_paged_is_contiguous():
    """The same model over a `KVCache` with one row, one token at a time."""
    geometry = KVCacheConfig(
        num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, max_seq_len=64, dtype="float32"
    )

    @jax.jit
    def decode(params, cache, token, position):
        logits, cache = model().forward(
            params, token[None, None], position[None, None], contiguous_attend(), cache
        )
        return jnp.argmax(logits[0, 0]), cache

    outputs = generate(PROMPTS[:3], GREEDY)
    for prompt, output in zip(PROMPTS[:3], outputs, strict=True):
        cache, tokens = KVCache.create(geometry), list(prompt)
        for i in range(len(prompt) + 11):
            token, cache = decode(model().params, cache, jnp.int32(tokens[i]), jnp.int32(i))
            if i >= len(prompt) - 1:
                tokens.append(int(token))
        assert_same(prompt, output.outputs[0].token_ids, tokens[len(prompt) :])


def test_one_by_one_is_all_at_once():
    check([generate([p], q)[0] for p, q in zip(PROMPTS, PARAMS, strict=True)])


@pytest.mark.parametrize("order", [[5, 4, 3, 2, 1, 0], [2, 0, 5, 1, 4, 3]])
def test_the_order_of_arrival_does_not_matter(order):
    outputs = generate([PROMPTS[i] for i in order], [PARAMS[i] for i in order])
    check([outputs[order.index(i)] for i in range(len(order))])


def test_arriving_in_the_middle_does_not_matter():
    made, done, names = engine(), {}, []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        names.append(made.add_request(prompt, params))
        for _ in range(3):
            done |= {o.request_id: o for o in made.step()}
    done |= run(made)
    check([done[name] for name in names])


@pytest.mark.parametrize("chunk", [4, 5, 9])
def test_the_size_of_chunks_does_not_matter(chunk):
    """The budget is the chunk; the trace is that of 16 tokens all the same."""
    made = engine()
    config = made._batch.config.__class__(
        **{**vars(made._batch.config), "max_num_batched_tokens": chunk}
    )
    made._batch = made._batch.__class__(**{**vars(made._batch), "config": config})
    check(generate(PROMPTS, PARAMS, made=made))


def test_a_cut_step_does_not_matter():
    """One decodes when a prompt of seven arrives: two of its tokens wait for the next step."""
    made, steps = engine(), []
    config = dataclasses.replace(made._batch.config, step_sizes=(6, 16))
    made._batch = made._batch.replace(config=config)
    done, names = {}, []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        names.append(made.add_request(prompt, params))
        for _ in range(3):
            done |= {o.request_id: o for o in made.step()}
            steps.append(made._work.counts.tolist())
    done |= run(made)
    check([done[name] for name in names])
    assert [1, 5] in steps and [1, 7] not in steps


def test_the_size_of_blocks_does_not_matter():
    """Two of the prompts: this geometry shares no trace with the other tests."""
    outputs = generate(PROMPTS[2:4], SEEDED[2:4], block_size=8, num_blocks=21)
    for i, output in zip((2, 3), outputs, strict=True):
        assert_same(PROMPTS[i], output.outputs[0].token_ids, wanted()[i])


def test_preemption_does_not_matter():
    made = engine(hold=26, enable_prefix_caching=False)
    check(generate(PROMPTS, PARAMS, made=made))
    assert made.stats().preempted > 0


def test_a_prefix_hit_does_not_matter():
    made = engine()
    check(generate(PROMPTS, PARAMS, made=made))
    outputs = generate(PROMPTS, PARAMS, made=made)
    assert [o.num_cached_tokens for o in outputs] == [(len(p) - 1) // 4 * 4 for p in PROMPTS]
    check(outputs)


def test_answers_are_cached_too():
    """The second turn of a conversation finds the first one's answer."""
    made = engine()
    [first] = generate([PROMPTS[3]], GREEDY, made=made)
    turn = [*PROMPTS[3], *first.outputs[0].token_ids, 5, 6]
    [second] = generate([turn], GREEDY, made=made)
    assert second.num_cached_tokens == (12 + 11) // 4 * 4  # the last token was never computed
    assert_same(turn, second.outputs[0].token_ids, dense_tokens(turn, GREEDY))


@pytest.mark.parametrize("samples", [1, 3])
def test_an_answer_is_not_found_as_a_beginning(samples):
    """Blocks written after a prefix hit, or a fork, are known by all that stands before them."""
    made, prompt = engine(), PROMPTS[2][:9]
    generate([[*prompt[:8], 1]], GREEDY, made=made)
    params = SamplingParams(temperature=0.9, n=samples, seed=1, max_tokens=8)
    [output] = generate([prompt], params, made=made)
    assert output.num_cached_tokens == 8
    for sample in output.outputs:
        middle = [prompt[8], *sample.token_ids[:3], 5, 6]
        [found] = generate([middle], GREEDY, made=made)
        assert found.num_cached_tokens == 0
        assert_same(middle, found.outputs[0].token_ids, dense_tokens(middle, GREEDY))
        turn = [*prompt, *sample.token_ids, 7]
        [found] = generate([turn], GREEDY, made=made)
        assert found.num_cached_tokens >= 12
        assert_same(turn, found.outputs[0].token_ids, dense_tokens(turn, GREEDY))


def test_the_size_of_the_pool_does_not_matter_to_a_window():
    """Blocks out of sight are others' at once: eight cannot hold two whole sequences, nor one."""
    config = dataclasses.replace(model().config, windows=(9, 5))
    windowed = model().replace(config=config)
    options = dict(forward=windowed.forward, max_num_batched_tokens=8, max_num_seqs=4)
    prompts, params = [PROMPTS[2], PROMPTS[5], PROMPTS[2]], [GREEDY, SEEDED[5], SEEDED[2]]
    whole = tokens_of(generate(prompts, params, **options))
    assert whole != tokens_of(generate(prompts, params, **options | {"forward": model().forward}))
    for prefix in (True, False):
        made = engine(**options, num_blocks=9, window=9, enable_prefix_caching=prefix)
        assert tokens_of(generate(prompts, params, made=made)) == whole
        assert tokens_of(generate(prompts[:1], params[0], made=made)) == whole[:1]
        assert made.pool.num_free == 8
    with pytest.raises(ValueError, match="need 11 blocks"):
        generate(prompts[:1], params[0], **options, num_blocks=9)
    with pytest.raises(ValueError, match="no prefix stays"):
        engine(**options, window=9, cascade_tokens=64)


def test_asynchronous_is_synchronous():
    params = [*PARAMS[:-1], SamplingParams(temperature=0.9, max_tokens=10, n=2, seed=5)]
    late, now = (
        generate(PROMPTS, params, made=engine(asynchronous=flag)) for flag in (True, False)
    )
    assert tokens_of(late) == tokens_of(now)
    check(late)


def test_samples_of_a_request_do_not_depend_on_one_another():
    """Sample i is the same alone, among three, and when its siblings are preempted."""
    params = SamplingParams(temperature=0.9, max_tokens=10, n=3, seed=11)
    reference = [dense_tokens(PROMPTS[2], params, index=i) for i in range(3)]
    for options in ({}, {"enable_prefix_caching": False}, {"hold": 24}):
        [output] = generate([PROMPTS[2]], params, **options)
        for sample, tokens in zip(output.outputs, reference, strict=True):
            assert_same(PROMPTS[2], sample.token_ids, tokens)
    assert len({tuple(tokens) for tokens in reference}) == 3


def test_what_others_ask_for_does_not_matter():
    """A row in a step with penalties, masks and logprobs draws what it draws alone."""
    loud = SamplingParams(
        temperature=1.3,
        top_p=0.7,
        max_tokens=12,
        seed=3,
        frequency_penalty=0.7,
        logit_bias={5: 3.0},
        allowed_token_ids=list(range(0, 90, 2)),
        logprobs=4,
    )
    made = engine()
    made.add_request(PROMPTS[1], loud)
    check(generate(PROMPTS, PARAMS, made=made))
    [alone] = generate([PROMPTS[1]], loud)
    [beside] = generate([PROMPTS[1]], loud, made=made)
    assert tokens_of([alone]) == tokens_of([beside])
    # The seat that loud sat in is clean again.
    check(generate(PROMPTS, PARAMS, made=made))


def test_the_pool_is_empty_at_the_end():
    made = engine()
    generate(PROMPTS, PARAMS, made=made)
    assert made.pool.stats().held == 0
    assert np.all(np.asarray(made.pool.refs[np.arange(1, made.pool.num_blocks)]) == 0)


LIVE = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokens = []
for prompt in json.loads(sys.argv[2]):
    x = torch.tensor([prompt])
    out = model.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=64 - len(prompt),
                         do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens.append(out[0, len(prompt):].tolist())
print("RESULT" + json.dumps(tokens))
"""


@pytest.mark.oracle
def test_paged_is_transformers(tmp_path):
    save_model(model(), tmp_path)
    (tmp_path / "live.py").write_text(LIVE)
    command = [os.environ["AIDX_TORCH_PYTHON"], "live.py", str(tmp_path), json.dumps(PROMPTS)]
    text = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    outputs = generate(PROMPTS, SamplingParams(temperature=0, max_tokens=None))
    for prompt, output, tokens in zip(
        PROMPTS, outputs, json.loads(text.split("RESULT")[1]), strict=True
    ):
        assert_same(prompt, output.outputs[0].token_ids, tokens)
