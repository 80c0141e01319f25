"""Thousands of random arrivals, cancellations and priorities on a pool too small for them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from aidx.engine import Engine, EngineConfig, SamplingParams
from aidx.engine.scheduler import POLICIES

VOCAB = 61


def forward(params, tokens, positions, attend, cache, *, logits_at=None, hidden=False):
    """A model that says (31 * sum of all its context + its length) mod V: every slot must be right.

    Queries of zero attend to everything alike, so attention gives the mean of the values.
    """
    value = jnp.broadcast_to(tokens[:, None, None].astype(jnp.float32), (len(tokens), 1, 8))
    mean, cache = attend(cache, 0, jnp.zeros_like(value), value, value)
    length = positions[logits_at].astype(jnp.float32) + 1
    total = jnp.round(mean[logits_at, 0, 0] * length)
    answer = (31 * total + length) % VOCAB
    distance = jnp.arange(VOCAB, dtype=jnp.float32)[None] - answer[:, None]
    return -jnp.abs(distance) * params["sharpness"], cache


def answer(prompt, num):
    tokens = list(prompt)
    for _ in range(num):
        tokens.append((31 * sum(tokens) + len(tokens)) % VOCAB)
    return tokens[len(prompt) :]


def make(policy, *, num_blocks=25):
    config = EngineConfig(
        num_layers=1,
        num_kv_heads=1,
        head_dim=8,
        vocab_size=VOCAB,
        num_blocks=num_blocks,
        block_size=2,
        max_num_seqs=8,
        max_num_batched_tokens=16,
        max_model_len=40,
        scheduling_policy=policy,
        max_overtaken=20,
        watermark=0.0,
    )
    return Engine(forward, {"sharpness": jnp.float32(100)}, config)


def soak(policy, number, seed):
    rng = np.random.default_rng(seed)
    made, wanted, done, aborted = make(policy), {}, {}, set()
    prefixes = [rng.integers(0, VOCAB, size=6).tolist() for _ in range(3)]
    while len(wanted) < number or made.has_unfinished:
        for _ in range(rng.poisson(0.8)):
            if len(wanted) == number:
                break
            prompt = rng.integers(0, VOCAB, size=rng.integers(1, 14)).tolist()
            if rng.random() < 0.5:
                prompt = prefixes[rng.integers(3)] + prompt
            samples = 1 + (rng.random() < 0.1) * int(rng.integers(1, 3))
            params = SamplingParams(
                temperature=0 if samples == 1 else 0.5,  # so sharp that a draw is the best token
                n=samples,
                max_tokens=int(rng.integers(1, 12)),
                detokenize=False,
            )
            name = made.add_request(
                prompt, params, priority=int(rng.integers(3)), user="abc"[rng.integers(3)]
            )
            wanted[name] = (prompt, params)
        if wanted and rng.random() < 0.15:
            name = list(wanted)[-int(rng.integers(1, min(len(wanted), 30) + 1))]
            if made.abort(name):
                aborted.add(name)
        for output in made.step():
            assert output.finished and output.request_id not in done
            done[output.request_id] = output
    return made, wanted, done, aborted


def check(made, wanted, done, aborted):
    assert set(done) == set(wanted)
    for name, (prompt, params) in wanted.items():
        for sample in done[name].outputs:
            reference = answer(prompt, params.max_tokens)
            if sample.finish_reason == "abort":
                assert name in aborted
                reference = reference[: len(sample.token_ids)]
            else:
                assert sample.finish_reason == "length"
            assert list(sample.token_ids) == reference
    stats = made.stats()
    assert stats.preempted > 0 and stats.cache_hit_rate > 0.05
    assert stats.running == stats.waiting == 0 and made.pool.stats().held == 0
    assert not made._progress and not made._tickets


def test_two_thousand_requests_all_end_right_and_leave_nothing():
    number = 2000 // len(POLICIES)
    total = 0
    for seed, policy in enumerate(POLICIES):
        made, *rest = soak(policy, number, seed)
        check(made, *rest)
        total += len(rest[0])
    assert total == 2000


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(5))
def test_more_of_it(policy, seed):
    check(*soak(policy, 2000, 100 + seed))


def test_the_fake_model_notices_a_wrong_slot():
    """Were a block lost or another's, the sums would tell."""
    made = make("fcfs")
    name = made.add_request([1, 2, 3], SamplingParams(temperature=0, max_tokens=8))
    for _ in range(4):
        made.step()
    state = made._device.state
    tables = np.array(state.block_tables)
    tables[0, 0] = tables[0, 1]
    made._device.state = dataclasses.replace(state, block_tables=made._device.put(tables))
    outputs = []
    while made.has_unfinished:
        outputs += made.step()
    assert outputs[0].request_id == name
    assert list(outputs[0].outputs[0].token_ids) != answer([1, 2, 3], 8)
