"""Preemption that keeps the blocks in host memory: the same tokens, and nothing computed twice."""

import dataclasses

import jax
import numpy as np
import pytest

from aidx.cache import swap_out
from aidx.engine import BeamSearchParams, SamplingParams
from aidx.engine import scheduler as scheduling
from aidx.engine.preemption import preempt
from aidx.engine.step import run_step

from . import test_scheduler as pure
from .test_laws import PARAMS, check
from .tiny import GREEDY, PROMPTS, assert_same, dense_tokens, engine, generate, run, tokens_of

TIGHT = dict(hold=26, enable_prefix_caching=False)


def swapping(**options):
    return engine(**({"preemption_mode": "swap"} | options))


@pytest.mark.smoke
@pytest.mark.parametrize("options", [TIGHT, dict(hold=26), dict(hold=24, asynchronous=False)])
def test_swapping_does_not_matter(options):
    made = swapping(**options)
    check(generate(PROMPTS, PARAMS, made=made))
    stats = made.stats()
    assert stats.swapped == stats.preempted > 0
    assert not made._swapped and made.pool.stats().held == options["hold"]
    assert stats.prompt_tokens <= sum(map(len, PROMPTS))  # no prompt is computed again


def test_recomputing_computes_again():
    made = engine(**TIGHT)  # without a warm-up, "auto" has measured nothing
    check(generate(PROMPTS, PARAMS, made=made))
    assert made.stats().preempted > 0 and made.stats().swapped == 0
    assert made.stats().prompt_tokens > sum(map(len, PROMPTS))


def test_the_blocks_that_come_back_hold_the_same_bits():
    made, seen = swapping(**TIGHT), {}
    issue = made._issue

    def watched(work):
        for seq_id, blocks in work.swap_outs:
            seen[seq_id] = [
                np.asarray(pool[blocks]) for pool in jax.tree.leaves(made._device.cache)
            ]
        places = dict(work.swap_ins)
        flight = issue(work)
        for seq in work.admitted:
            if seq.seq_id not in places:
                continue
            full = seq.num_computed // 4  # the block after them is written to in this step
            for old, pool in zip(
                seen[seq.seq_id], jax.tree.leaves(made._device.cache), strict=True
            ):
                np.testing.assert_array_equal(
                    np.asarray(pool[seq_blocks(made, seq)[:full]]), old[:full]
                )
            seen[seq.seq_id] = None
        return flight

    made._issue = watched
    generate(PROMPTS, PARAMS, made=made)
    assert None in seen.values()


def seq_blocks(made, seq):
    return made._batch.tables[seq.seat]


def test_what_the_pool_still_holds_is_not_swapped_in():
    """The other sequence has the same system prompt: its blocks serve both."""
    made, places = swapping(hold=20), []
    issue = made._issue
    made._issue = lambda work: (places.extend(work.swap_ins), issue(work))[1]
    prompts = [[*PROMPTS[2], i] for i in range(3)]
    params = SamplingParams(temperature=0, max_tokens=24)
    outputs = generate(prompts, params, made=made)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_same(prompt, output.outputs[0].token_ids, dense_tokens(prompt, params))
    assert places and all((where[:7] == -1).all() for _, where in places)
    assert any((where >= 0).any() for _, where in places)


def test_samples_and_beams_survive_it():
    samples = SamplingParams(temperature=0.9, max_tokens=10, n=3, seed=11)
    for params in (samples, BeamSearchParams(beam_width=3, max_tokens=8)):
        calm, tight = (
            generate([PROMPTS[2], PROMPTS[5]], params, made=swapping(hold=hold)) for hold in (0, 23)
        )
        assert tokens_of(calm) == tokens_of(tight)


def test_host_memory_is_bounded():
    """Room for two blocks: longer sequences are recomputed."""
    made = swapping(**TIGHT, swap_space_bytes=2 * engine().config.block_bytes)
    assert made._batch.config.max_swapped_blocks == 2
    check(generate(PROMPTS, PARAMS, made=made))
    assert made.stats().preempted > made.stats().swapped


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_block_is_as_large_as_it_says(dtype):
    made = engine(dtype=dtype)
    assert made.config.block_bytes * made.config.num_blocks == made._device.cache.memory_bytes


def until_swapped(made):
    names = [made.add_request(p, q) for p, q in zip(PROMPTS, PARAMS, strict=True)]
    done = {}
    while not made._swapped:
        done |= {o.request_id: o for o in made.step()}
    return names, done


def test_cancelled_and_stale_blocks_are_dropped():
    """An abort forgets them; other parameters make them worthless."""
    made = swapping(**TIGHT)
    names, done = until_swapped(made)
    waiting = {s.seq_id: s.request.request_id for s in made._batch.waiting if s.num_swapped}
    assert set(waiting) == set(made._swapped)
    made.abort(next(iter(waiting.values())))
    assert not made._swapped
    run(made)
    made = swapping(**TIGHT)
    names, done = until_swapped(made)
    made.update_params(made._device.params)
    assert not made._swapped and not any(s.num_swapped for s in made._batch.waiting)
    done |= run(made)
    check([done[name] for name in names])


def test_a_failed_copy_is_recomputed(monkeypatch):
    """Host memory is full: the step fails, its rows end, whoever was to be swapped recomputes."""
    made = swapping(**TIGHT)
    names = [made.add_request(p, q) for p, q in zip(PROMPTS, PARAMS, strict=True)]
    failed = []

    def broken(*args):
        failed.append(args)
        raise MemoryError("no pinned memory")

    monkeypatch.setattr("aidx.engine.device.swap_out", broken)
    done = {}
    while not failed:
        done |= {o.request_id: o for o in made.step()}
    monkeypatch.setattr("aidx.engine.device.swap_out", swap_out)
    assert not any(s.num_swapped for s in made._batch.waiting)
    done |= run(made)
    reasons = {done[name].outputs[0].finish_reason for name in names}
    assert reasons == {"error", "length"}
    for name, prompt, params in zip(names, PROMPTS, PARAMS, strict=True):
        if done[name].outputs[0].finish_reason == "length":
            assert_same(prompt, done[name].outputs[0].token_ids, dense_tokens(prompt, params))


def test_the_warm_up_measures_and_nothing_compiles_after_it(monkeypatch):
    for cost, mode in ((1.0, "swap"), (0.0, "recompute")):
        made = engine(max_logprobs=0, enable_prefix_caching=False)
        monkeypatch.setattr(made._device, "time_recomputing", lambda cost=cost: cost)
        made.warmup(variant="plain")
        assert made._batch.config.preemption_mode == mode
    made = engine(max_logprobs=0, enable_prefix_caching=False)
    assert 0 < made._device.time_recomputing() < 10
    monkeypatch.setattr(made._device, "time_recomputing", lambda: 1.0)
    made.warmup(variant="plain")
    pool, _ = made.pool.allocate(26)
    made._batch = dataclasses.replace(made._batch, pool=pool)
    programs = lambda: (run_step._cache_size(), swap_out.__globals__["_take"]._cache_size())
    before = programs()
    generate(PROMPTS, GREEDY, made=made)
    assert made.stats().swapped > 0 and programs() == before


def test_impossible_settings_are_refused():
    with pytest.raises(ValueError, match="preemption_mode='swop'"):
        engine(preemption_mode="swop")
    with pytest.raises(ValueError, match="max_swapped_blocks"):
        engine(swap_space_bytes=-1)


# The scheduler alone: what is written where, followed block by block.


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("room", [5, 100])
def test_every_read_finds_what_was_written(lag, room):
    """A pretended device: each slot holds (sequence, position); every context must be its own."""
    device, host = {}, {}
    batch = pure.batch_of(
        num_blocks=14, preemption_mode="swap", max_swapped_blocks=room, enable_prefix_caching=False
    )
    seqs = [pure.sequence(i, 3 + 4 * i, max_tokens=9) for i in range(6)]
    swaps = []

    def follow(batch, step):
        for seq_id, blocks in step.swap_outs:
            host[seq_id] = [device.get(int(b)) for b in blocks]
        for seq_id, places in step.swap_ins:
            for block, content in zip(places.tolist(), host.pop(seq_id), strict=True):
                device[block] = content
        swaps.extend(step.swap_ins)
        assert sum(len(blocks) for blocks in host.values()) <= room
        for seat, start, count in zip(step.seats, step.starts, step.counts, strict=True):
            seq, table = batch.running[seat], batch.tables[seat]
            for position in range(start, start + count):
                old = device.get(int(table[position // 4])) or {}
                if position % 4 == 0:
                    old = {}
                device[int(table[position // 4])] = old | {position: seq.seq_id}
            for position in range(start + count):
                assert device[int(table[position // 4])][position] == seq.seq_id

    batch, outputs, _ = pure.run(pure.filled(batch, seqs), lag=lag, check=follow)
    assert outputs == {seq.seq_id: pure.expected(seq) for seq in seqs}
    assert swaps and not host and batch.pool.num_free == batch.pool.num_blocks - 1


def test_a_cancelled_sequence_is_not_moved():
    batch = pure.batch_of(num_blocks=5, preemption_mode="swap", max_swapped_blocks=9)
    batch, _ = scheduling.schedule(pure.filled(batch, [pure.sequence(i, 7) for i in range(2)]))
    batch = scheduling.record(batch, np.array([0, 1]), np.array([3, 3]))
    batch, _ = preempt(batch, 1, swap=True)
    assert [seq_id for seq_id, _ in batch.swap_outs] == [1]
    assert scheduling.cancel(batch, [1]).swap_outs == ()
    assert scheduling.forget_swapped(batch, [1]).waiting[0].num_computed == 0
