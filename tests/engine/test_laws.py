"""What must not change an answer: batch, order, chunks, blocks, preemption, cache, asynchrony."""

import functools

import numpy as np
import pytest

from aidx.engine import SamplingParams

from .tiny import (
    GREEDY,
    PROMPTS,
    SEEDED,
    assert_same,
    dense_tokens,
    engine,
    generate,
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
