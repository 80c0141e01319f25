"""The scheduler as a pure function: policies, memory, preemption, forks; no model, no JAX."""

import dataclasses
import time
from types import SimpleNamespace

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from aidx.cache import BlockPool
from aidx.engine.request import Request, SequenceStatus, new_sequence
from aidx.engine.scheduler import (
    POLICIES,
    SchedulerConfig,
    add,
    blocks_needed,
    cancel,
    finish,
    new_batch,
    record,
    schedule,
)


def batch_of(num_blocks=33, block_size=4, **options):
    options = {"max_num_seqs": 4, "max_num_batched_tokens": 16, "max_model_len": 64} | options
    return new_batch(SchedulerConfig(**options), BlockPool.create(num_blocks, block_size))


def sequence(seq_id, prompt, max_tokens=8, *, request=None, max_model_len=64, **options):
    if isinstance(prompt, int):
        prompt = np.arange(prompt) + 100 * seq_id
    keep = {k: options.pop(k) for k in ("priority", "user", "cache_salt") if k in options}
    request = request or Request(
        str(seq_id), np.asarray(prompt, np.int32), SimpleNamespace(), **keep
    )
    return new_sequence(
        request,
        seq_id=seq_id,
        arrival=seq_id,
        max_tokens=max_tokens,
        max_model_len=max_model_len,
        **options,
    )


def token_after(tokens):
    """The pretended model: a function of the tokens alone."""
    return int(np.int64(tokens[-1]) * 31 + len(tokens)) % 50


def run(batch, *, lag=False, steps=1000, check=lambda *a: None, plan=schedule):
    """Step until nothing is left; returns the batch, all outputs and the schedules.

    With `lag` the tokens of a step are read after the next one was scheduled; `plan` schedules.
    """
    outputs, schedules, unread = {}, [], []

    def read(batch):
        rows = unread.pop(0)
        alive = [(s, i, t) for s, i, t in rows if batch.running[s] and batch.running[s].seq_id == i]
        seats, tokens = [s for s, _, _ in alive], [t for _, _, t in alive]
        batch = record(batch, np.array(seats, int), np.array(tokens, int))
        done = [s for s in seats if batch.num_known[s] == batch.limit[s]]
        for s in done:
            outputs[batch.running[s].seq_id] = batch.sequence(s).output.tolist()
        return finish(batch, done)

    shadow = {}  # seq_id -> tokens including unread ones
    for _ in range(steps):
        if not batch.unfinished:
            return batch, outputs, schedules
        batch, step = plan(batch, drained=not unread)
        if step is None:
            batch = read(batch)
            continue
        schedules.append(step)
        check(batch, step)
        rows = []
        for seat, start, count, samples in zip(
            step.seats, step.starts, step.counts, step.samples, strict=True
        ):
            seq = batch.running[seat]
            known = shadow.setdefault(seq.seq_id, batch.sequence(seat).tokens.tolist())
            assert start + count <= len(known)
            if samples:
                known.append(token_after(known))
                rows.append((int(seat), seq.seq_id, known[-1]))
        unread.append(rows)
        while len(unread) > lag:
            batch = read(batch)
    raise AssertionError("it does not end")


def admissions(schedules):
    return [seq.seq_id for step in schedules for seq in step.admitted]


def expected(seq):
    tokens = seq.tokens.tolist()
    while len(tokens) < seq.limit:
        tokens.append(token_after(tokens))
    return tokens[seq.num_prompt :]


SHARED = Request("shared", np.arange(11, dtype=np.int32), SimpleNamespace())
SIZES = st.sets(st.integers(1, 16), max_size=5).map(lambda sizes: tuple(sorted(sizes)))


def filled(batch, seqs):
    for seq in seqs:
        batch = add(batch, seq)
    return batch


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("lag", [False, True])
def test_a_repeated_step_is_the_step_that_would_be_planned_anew(lag, caching):
    """Growing blocks, ends, arrivals and preemptions in between: whatever the shortcut passes over
    would have changed nothing."""
    batch = batch_of(num_blocks=14, enable_prefix_caching=caching)
    batch = filled(batch, [sequence(i, 3 + 4 * i, max_tokens=9 + 2 * i) for i in range(3)])
    last, unread, repeated, late = None, [], 0, [sequence(i, 5) for i in range(3, 6)]
    for at in range(400):
        if not batch.unfinished and not late:
            break
        if at % 9 == 8 and late:
            batch = add(batch, late.pop())
        anew, wanted = schedule(batch, drained=not unread)
        batch, step = schedule(batch, drained=not unread, last=last)
        if step is not None:
            if last and step.take is last.take:
                repeated += 1
                assert batch.running is anew.running
                assert batch.pool.stats() == anew.pool.stats() and batch.keys == anew.keys
                for have, want in ((step, wanted), (batch, anew)):
                    for name, value in vars(want).items():
                        if isinstance(value, np.ndarray):
                            np.testing.assert_array_equal(getattr(have, name), value, name)
                np.testing.assert_equal(batch.tables, anew.tables)
                assert not (wanted.admitted or wanted.preempted)
            drawn = [(s, batch.running[s].seq_id) for s in step.seats[step.samples]]
            unread, last = [*unread, drawn], step
        while len(unread) > (lag and step is not None):
            alive = [s for s, i in unread.pop(0) if batch.seq_ids[s] == i]
            batch = record(batch, np.array(alive, int), np.full(len(alive), at % 50))
            batch = finish(batch, [s for s in alive if batch.num_known[s] == batch.limit[s]])
    assert not batch.unfinished and not late and repeated > 12


def test_a_state_has_no_other_fields():
    with pytest.raises(TypeError, match="num_token"):
        batch_of().replace(num_token=np.zeros(4, int))


@pytest.mark.smoke
@pytest.mark.parametrize("lag", [False, True])
def test_every_sequence_gets_its_tokens_and_the_pool_is_empty(lag):
    seqs = [sequence(i, 3 + 5 * i, max_tokens=4 + i) for i in range(6)]
    batch = filled(batch_of(), seqs)
    batch, outputs, _ = run(batch, lag=lag)
    assert outputs == {seq.seq_id: expected(seq) for seq in seqs}
    assert batch.pool.num_free == batch.pool.num_blocks - 1


def test_a_step_stays_within_its_budget_and_decodes_go_first():
    batch = filled(batch_of(max_num_batched_tokens=6), [sequence(0, 3), sequence(1, 20)])
    batch, _, schedules = run(batch)
    assert max(s.num_tokens for s in schedules) <= 6
    # The long prompt never holds up the running decode: both are in the steps that prefill it.
    chunks = [s for s in schedules if s.counts.max() > 1][1:]
    assert chunks and all(0 in s.seats[s.counts == 1] for s in chunks)


def decoding(rows, **options):
    """A batch in which so many sequences decode."""
    limits = dict(num_blocks=513, max_num_seqs=20, max_num_batched_tokens=64)
    batch = filled(batch_of(**limits, **options), [sequence(i, 2) for i in range(rows)])
    if not rows:
        return batch
    batch, step = schedule(batch)
    return record(batch, step.seats, np.full(rows, 7))


@pytest.mark.parametrize(
    "rows,prompt,tokens",
    [
        (8, 15, 23),  # fits
        (8, 16, 24),
        (8, 17, 24),
        (8, 27, 24),  # 11 tokens put off, where 13 would be padded
        (8, 28, 36),  # 12, where 12 would be
        (14, 20, 24),  # 10 of 20
        (15, 20, 35),  # 11 of 20: more than half
        (8, 41, 48),
        (8, 50, 58),
        (8, 60, 64),
        (1, 25, 24),
        (0, 26, 26),  # nothing decodes
    ],
)
def test_a_step_of_decodes_and_a_prompt_fills_a_size_where_the_next_is_mostly_padding(
    rows, prompt, tokens
):
    batch = add(decoding(rows, step_sizes=(4, 24, 48, 64)), sequence(99, prompt))
    batch, step = schedule(batch)
    assert step.counts.tolist() == [1] * rows + [tokens - rows]
    batch = record(batch, step.seats[step.samples], np.full(step.samples.sum(), 7))
    _, step = schedule(batch)
    assert step.counts[rows:].tolist() == [rows + prompt - tokens or 1]


def test_prompts_are_put_off_whole_or_in_part_and_the_last_first():
    batch = decoding(4, step_sizes=(16, 64))
    batch, step = schedule(filled(batch, [sequence(10, 9), sequence(11, 6), sequence(12, 2)]))
    assert step.counts.tolist() == [1] * 4 + [9, 3]
    assert [seq.seq_id for seq in batch.waiting] == [12] and not batch.waiting[0].overtaken
    batch = record(batch, step.seats[step.samples], np.full(5, 7))
    _, step = schedule(batch)
    assert step.counts.tolist() == [1] * 5 + [3, 2]


def test_a_cut_step_has_a_row_for_each_token_whose_logits_are_wanted():
    batch = add(decoding(4, step_sizes=(16, 64)), sequence(99, 14, every_logit=True))
    batch, step = schedule(batch)
    assert step.counts.tolist() == [1] * 4 + [12]
    _, step = schedule(record(batch, step.seats[:4], np.full(4, 7)))
    assert step.counts.tolist() == [1] * 4 + [2]
    # There is one row left for the second prompt: it computes a token, but decodes nothing.
    batch = batch_of(max_num_seqs=2, step_sizes=(10, 16))
    _, step = schedule(filled(batch, [sequence(0, 10), sequence(1, 9, every_logit=True)]))
    assert step.counts.tolist() == [10, 1]


def test_samples_fork_in_a_cut_step():
    """They draw from the prompt that their sibling computed: one token each, never put off."""
    seqs = [sequence(i, np.arange(11), request=SHARED, index=i) for i in range(3)]
    batch, step = schedule(filled(batch_of(num_blocks=65, step_sizes=(8, 16)), seqs))
    batch = record(batch, step.seats, np.array([7]))
    batch, step = schedule(add(batch, sequence(9, 6)))
    assert step.starts.tolist() == [11, 10, 10, 0] and step.counts.tolist() == [1, 1, 1, 5]
    assert len(step.copies) == 2


ORDERS = {
    "fcfs": [0, 1, 2, 3, 4],
    "priority": [0, 3, 4, 2, 1],
    "shortest_first": [0, 4, 2, 3, 1],
    "fair": [0, 3, 1, 2, 4],
}


@pytest.mark.parametrize("policy", POLICIES)
def test_each_policy_has_an_order_of_its_own(policy):
    """One seat; 0 runs first.  Users: 0, 1, 2, 4 are a's and 3 is b's."""
    assert len({tuple(order) for order in ORDERS.values()}) == len(POLICIES)
    batch = batch_of(policy=policy, max_num_seqs=1)
    batch = add(batch, sequence(0, 4, user="a"))
    batch, _ = schedule(batch)
    waiting = [
        sequence(1, 9, priority=2, user="a"),
        sequence(2, 5, priority=1, user="a"),
        sequence(3, 7, priority=0, user="b"),
        sequence(4, 3, priority=0, user="a"),
    ]
    batch = filled(batch, waiting)
    batch = record(batch, np.array([0]), np.array([1]))
    _, _, schedules = run(batch)
    assert [0, *admissions(schedules)] == ORDERS[policy]


def test_priority_is_first_come_first_served_within_one():
    batch = batch_of(policy="priority", max_num_seqs=1)
    batch = filled(batch, [sequence(i, 6 - i, priority=i % 2) for i in range(6)])
    _, _, schedules = run(batch)
    assert admissions(schedules) == [0, 2, 4, 1, 3, 5]


def test_fair_serves_a_light_user_while_a_heavy_one_queues():
    """Sheng et al. 2024: service received by two backlogged users stays within a bound."""
    batch = batch_of(policy="fair", max_num_seqs=2, num_blocks=65)
    seqs = [sequence(i, 8, user="heavy") for i in range(12)]
    seqs += [sequence(12 + i, 8, user="light") for i in range(4)]
    batch = filled(batch, seqs)
    gap = []

    def check(batch, step):
        names = {s.request.user for s in batch.waiting}
        if names == {"heavy", "light"}:
            gap.append(abs(batch.service[0] - batch.service[1]))

    _, _, schedules = run(batch, check=check)
    assert max(gap) <= 2 * (8 * 1 + 8 * 2) * 2
    order = admissions(schedules)
    assert max(order.index(i) for i in (12, 13, 14, 15)) < 9


def test_fair_gives_no_credit_for_absence():
    batch = batch_of(policy="fair")
    batch = add(batch, sequence(0, 8, user="a"))
    batch, _ = schedule(batch)
    served = batch.service[batch.users["a"]]
    assert served > 0
    batch = add(batch, sequence(1, 8, user="newcomer"))
    assert batch.service[batch.users["newcomer"]] == served


@pytest.mark.parametrize("bound", [1, 3])
def test_nobody_is_overtaken_more_often_than_the_bound(bound):
    batch = batch_of(policy="shortest_first", max_num_seqs=1, max_overtaken=bound)
    batch = add(batch, sequence(0, 2, max_tokens=1))
    batch, _ = schedule(batch)
    batch = record(batch, np.array([0]), np.array([1]))
    batch = finish(batch, [0])
    batch = filled(batch, [sequence(1, 15, max_tokens=1)])
    batch = filled(batch, [sequence(2 + i, 2, max_tokens=1) for i in range(8)])
    _, _, schedules = run(batch)
    assert admissions(schedules).index(1) == bound


def test_who_was_overtaken_enough_is_seated_once():
    batch = batch_of(policy="priority", max_num_seqs=2, max_overtaken=1)
    batch = filled(batch, [sequence(0, 1, max_tokens=4, priority=1)])
    batch = filled(batch, [sequence(1 + i, 2, max_tokens=1) for i in range(2)])
    _, outputs, schedules = run(batch)
    assert admissions(schedules) == [1, 2, 0] and set(outputs) == {0, 1, 2}


def test_what_does_not_fit_waits_and_is_not_overtaken_for_being_large():
    batch = batch_of(num_blocks=9, enable_prefix_caching=False, max_num_batched_tokens=32)
    seqs = [sequence(0, 16, max_tokens=4), sequence(1, 24, max_tokens=2), sequence(2, 2)]
    batch = filled(batch, seqs)
    batch, step = schedule(batch)
    assert [seq.seq_id for seq in step.admitted] == [0]
    assert batch.waiting[0].seq_id == 1
    _, _, schedules = run(record(batch, np.array([0]), np.array([token_after(seqs[0].tokens)])))
    assert admissions(schedules) == [1, 2]


@pytest.mark.parametrize("policy,victims", [("fcfs", [2]), ("priority", [0])])
def test_preemption_takes_the_newest_or_the_lowest_priority(policy, victims):
    batch = batch_of(num_blocks=10, policy=policy, enable_prefix_caching=False, watermark=0.0)
    seqs = [sequence(i, 8, max_tokens=12, priority=2 - i) for i in range(3)]
    batch, outputs, schedules = run(filled(batch, seqs))
    preempted = [seq.seq_id for step in schedules for seq in step.preempted]
    assert preempted[:1] == victims
    assert outputs == {seq.seq_id: expected(seq) for seq in seqs}


def test_preemption_waits_for_the_step_in_flight():
    batch = batch_of(num_blocks=6, enable_prefix_caching=False, watermark=0.0)
    batch = filled(batch, [sequence(i, 8, max_tokens=12) for i in range(2)])
    drained = []
    for _ in range(20):
        after, step = schedule(batch, drained=False)
        if step is None:
            assert after is batch
            drained.append(True)
            break
        seats = step.seats[step.samples]
        batch = record(after, seats, np.ones_like(seats))
    assert drained
    _, step = schedule(batch, drained=True)
    assert [seq.seq_id for seq in step.preempted] == [1]


def test_what_can_never_run_is_refused_at_once():
    batch = batch_of(num_blocks=5)
    with pytest.raises(ValueError, match="64 tokens; max_model_len=64"):
        add(batch, sequence(0, 64))
    with pytest.raises(ValueError, match="need 5 blocks of 4 tokens; the pool has 4"):
        add(batch, sequence(0, 10, max_tokens=8))
    assert add(batch, sequence(0, 10, max_tokens=7)).waiting  # the last token is never computed


def test_a_prefix_hit_skips_what_is_cached_but_never_the_last_token():
    batch = add(batch_of(), sequence(0, np.arange(12), max_tokens=1))
    batch, _, _ = run(batch)
    batch = filled(batch, [sequence(1, np.arange(12)), sequence(2, [*range(10), 77, 78, 79])])
    _, step = schedule(batch)
    assert [(s.num_cached, s.num_computed) for s in step.admitted] == [(8, 8), (8, 8)]
    assert step.starts.tolist() == [8, 8] and step.counts.tolist() == [4, 5]


def test_prefixes_are_shared_within_one_salt_only_and_not_when_switched_off():
    for options, salts in (({"enable_prefix_caching": False}, "ss"), ({}, "st")):
        batch = batch_of(**options)
        for i in range(2):
            batch = add(batch, sequence(i, np.arange(9), max_tokens=1, cache_salt=salts[i]))
            batch, _, schedules = run(batch)
        assert schedules[0].starts.tolist() == [0]


def test_samples_of_one_request_share_its_prompt():
    request = Request("r", np.arange(10, dtype=np.int32), SimpleNamespace())
    seqs = [sequence(i, 10, request=request, index=i, max_tokens=5) for i in range(3)]
    batch = filled(batch_of(enable_prefix_caching=False), seqs)
    batch, first = schedule(batch)
    assert first.seats.tolist() == [0] and len(batch.waiting) == 2
    batch = record(batch, np.array([0]), np.array([7]))
    batch, second = schedule(batch)
    # One query token each: the prompt's last, whose logits every sample draws from.
    assert second.counts.tolist() == [1, 1, 1] and second.starts.tolist() == [10, 9, 9]
    assert [b.tolist()[:2] for b in batch.tables[:3]] == [batch.tables[0].tolist()[:2]] * 3
    lasts = [int(b[2]) for b in batch.tables[:3]]
    assert len(set(lasts)) == 3
    assert second.copies == ((lasts[0], lasts[1]), (lasts[0], lasts[2]))
    used = batch.pool.num_blocks - 1 - batch.pool.num_free
    assert used == 5
    batch = record(batch, second.seats, np.array([3, 4, 5]))
    batch, _, _ = run(batch)
    assert batch.pool.num_free == batch.pool.num_blocks - 1


def test_the_device_is_told_every_entry_of_every_table_once():
    """Replaying the updates gives the tables: what the device knows is what the host knows."""
    device = np.zeros((4, 16), int)

    def check(batch, step):
        for seat, index, block in step.updates:
            device[seat, index] = block
        for seat in step.seats:
            table = batch.tables[seat]
            assert device[seat, : len(table)].tolist() == table.tolist()

    batch = batch_of(num_blocks=12)
    seqs = [sequence(i, 3 + 2 * i, max_tokens=9) for i in range(7)]
    _, _, schedules = run(filled(batch, seqs), check=check, lag=True)
    assert sum(len(s.updates) for s in schedules) < 7 * 8 + 40


@pytest.mark.parametrize("prefix", [False, True])
def test_blocks_out_of_the_window_go_back_to_the_pool(prefix):
    """Sequences of 15 blocks run two at a time in a pool of 8, where each sees 5 keys."""
    options = dict(max_num_seqs=2, max_num_batched_tokens=4, enable_prefix_caching=prefix)
    seqs = [sequence(i, 41 + i, max_tokens=15) for i in range(4)]
    with pytest.raises(ValueError, match="need 14 blocks of 4 tokens; the pool has 8"):
        add(batch_of(num_blocks=9, **options), seqs[0])
    running = []

    def check(batch, step):
        held = [np.count_nonzero(table) for table in batch.tables]
        assert max(held) <= blocks_needed(batch.config, 64, 4) == 5
        assert sum(held) == batch.pool.stats().held
        running.append(batch.num_running)

    batch = filled(batch_of(num_blocks=9, window=5, **options), seqs)
    batch, outputs, _ = run(batch, check=check, lag=True)
    assert outputs == {seq.seq_id: expected(seq) for seq in seqs}
    assert batch.pool.num_free == 8 and max(running) == 2
    # The same prompt again: of its beginning only what is seen is held.
    first = filled(batch, [dataclasses.replace(seqs[0], seq_id=9, arrival=9)])
    _, step = schedule(first)
    assert step.admitted[0].num_cached <= 40 and (prefix or not step.admitted[0].num_cached)


def test_a_sample_does_not_share_what_its_sibling_has_let_go_of():
    batch = batch_of(num_blocks=20, window=4, max_num_seqs=2, enable_prefix_caching=False)
    first, second = (sequence(i, np.arange(11), max_tokens=20, request=SHARED) for i in (0, 1))
    batch = add(batch, first)
    for step in range(10):
        batch, work = schedule(batch)
        if step:
            batch = record(batch, work.seats, np.array([7]))
        else:
            batch = record(batch, work.seats, np.array([3]))
    assert batch.num_evicted[0] > 2  # the prompt's last keys are gone
    batch, work = schedule(add(batch, second))
    [admitted] = work.admitted
    assert admitted.num_computed == 0 and work.counts.tolist() == [1, 11]


def test_a_synchronous_sequence_is_not_scheduled_before_its_token_is_read():
    batch = filled(batch_of(), [sequence(0, 3, synchronous=True), sequence(1, 3)])
    batch, _ = schedule(batch, drained=False)
    assert batch.sequence(0).status is SequenceStatus.PAUSED
    batch, second = schedule(batch, drained=False)
    assert second.seats.tolist() == [1]
    batch = record(batch, np.array([0, 1]), np.array([5, 6]))
    batch, third = schedule(batch, drained=False)
    assert third.seats.tolist() == [0, 1]


def test_every_logit_takes_a_row_for_each_prompt_token():
    batch = filled(batch_of(), [sequence(0, 3), sequence(1, 9, every_logit=True)])
    batch, first = schedule(batch)
    assert first.counts.tolist() == [3, 3]  # four rows: one, and three that are left
    batch, second = schedule(batch)
    assert second.counts.tolist() == [1, 3]


def test_cancelled_sequences_leave_nothing_behind():
    batch = filled(batch_of(max_num_seqs=2), [sequence(i, 6) for i in range(4)])
    batch, _ = schedule(batch)
    batch = cancel(batch, [1, 3, 99])
    assert [s.seq_id for s in batch.running if s] == [0]
    assert [s.seq_id for s in batch.waiting] == [2]
    batch = cancel(batch, [0, 2])
    assert not batch.unfinished
    assert batch.pool.num_free == batch.pool.num_blocks - 1


@pytest.mark.parametrize(
    "bad,message",
    [
        ({"policy": "lifo"}, "policy='lifo'"),
        ({"max_num_seqs": 0}, "max_num_seqs=0"),
        ({"max_num_batched_tokens": 3}, "must be at least max_num_seqs=4"),
        ({"watermark": 1.0}, "watermark=1.0"),
        ({"max_overtaken": 0}, "max_overtaken=0"),
        ({"step_sizes": (8, 4)}, r"step_sizes=\(8, 4\)"),
        ({"step_sizes": (8, 8)}, r"step_sizes=\(8, 8\)"),
        ({"step_sizes": (0, 8)}, r"step_sizes=\(0, 8\)"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        SchedulerConfig(**({"max_num_seqs": 4} | bad))


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(data=st.data())
def test_laws_hold_for_any_arrivals(data):
    """Blocks are never shared for writing, tables cover what is computed, everything ends."""
    policy = data.draw(st.sampled_from(POLICIES))
    seats = data.draw(st.integers(1, 4))
    batch = batch_of(
        num_blocks=data.draw(st.integers(10, 20)),
        policy=policy,
        max_num_seqs=seats,
        max_num_batched_tokens=seats + data.draw(st.integers(0, 12)),
        enable_prefix_caching=data.draw(st.booleans()),
        max_overtaken=data.draw(st.integers(1, 4)),
        window=data.draw(st.none() | st.integers(1, 12)),
        step_sizes=data.draw(SIZES),
    )
    device = np.zeros((seats, 16), int)
    seqs, i = [], 0
    for _ in range(data.draw(st.integers(1, 6))):
        length, max_tokens = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 16))
        prompt = np.array(data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length)))
        request = Request(
            str(i),
            prompt.astype(np.int32),
            SimpleNamespace(),
            priority=data.draw(st.integers(0, 2)),
            user=data.draw(st.sampled_from("ab")),
        )
        for index in range(data.draw(st.integers(1, 3))):
            seqs.append(sequence(i, prompt, max_tokens, request=request, index=index))
            i += 1

    def check(batch, step):
        size = batch.pool.block_size
        assert step.num_tokens <= batch.config.max_num_batched_tokens
        for seat, index, block in step.updates:
            device[seat, index] = block
        written, read = [], []
        for seat, start, count in zip(step.seats, step.starts, step.counts, strict=True):
            table = batch.tables[seat]
            assert len(table) * size >= start + count
            assert device[seat, : len(table)].tolist() == table.tolist()
            first = max(0, start + 1 - (batch.config.window or start + 1)) // size
            assert table[first:].all()  # no query looks at a null block
            read += table[first : start // size].tolist()
            written += set(table[start // size : -(-(start + count) // size)].tolist())
        assert len(written) == len(set(written))  # a written block has one owner
        assert not set(written) & set(read)
        assert len(set(written) & {src for src, _ in step.copies}) <= len(step.copies)

    batch, outputs, _ = run(filled(batch, seqs), lag=data.draw(st.booleans()), check=check)
    assert outputs == {seq.seq_id: expected(seq) for seq in seqs}
    assert batch.pool.num_free == batch.pool.num_blocks - 1


@pytest.mark.parametrize("lag", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_cut_step_fills_a_size_and_puts_off_less_than_it_saves_and_no_more_than_half(policy, lag):
    """Beside the step that would be planned without sizes; the answers are the same."""
    rng = np.random.default_rng(POLICIES.index(policy))
    sizes, most = (8, 24, 64), 64
    limits = dict(policy=policy, max_num_seqs=8, max_num_batched_tokens=most, num_blocks=33)
    batch, seqs, cuts = batch_of(**limits, step_sizes=sizes), [], []
    for _ in range(40):
        prompt = np.arange(rng.integers(1, 40)) + 100 * rng.integers(3)
        request = Request(str(len(seqs)), prompt.astype(np.int32), SimpleNamespace())
        options = dict(
            max_tokens=int(rng.integers(1, 16)),
            every_logit=rng.random() < 0.1,
            synchronous=rng.random() < 0.2,
        )
        for index in range(rng.integers(1, 3)):
            seqs.append(sequence(len(seqs), prompt, request=request, index=index, **options))

    def plan(batch, *, drained):
        uncut = batch.replace(config=dataclasses.replace(batch.config, step_sizes=()))
        _, whole = schedule(uncut, drained=drained)
        after, step = schedule(batch, drained=drained)
        assert after.config is batch.config
        if whole is None:
            assert step is None
            return after, step
        assert len(step.preempted) == len(whole.preempted) and step.num_tokens <= most
        put_off = whole.num_tokens - step.num_tokens
        if put_off:
            decodes = np.count_nonzero(whole.samples & (whole.counts == 1))
            padded = min(size for size in sizes if size >= whole.num_tokens)
            assert step.num_tokens in sizes and decodes and not whole.preempted
            assert put_off < padded - whole.num_tokens
            assert 0 < put_off <= step.num_tokens - decodes
            cuts.append(put_off)
        return after, step

    batch, outputs, schedules = run(filled(batch, seqs), lag=lag, plan=plan)
    assert outputs == {seq.seq_id: expected(seq) for seq in seqs}
    assert batch.pool.num_free == batch.pool.num_blocks - 1
    assert len(cuts) > 4 and any(step.preempted for step in schedules)


def test_a_state_stays_as_it_was():
    before = filled(batch_of(), [sequence(i, 6) for i in range(3)])
    frozen = {f.name: getattr(before, f.name) for f in dataclasses.fields(before)}
    copies = {k: v.copy() for k, v in frozen.items() if isinstance(v, np.ndarray)}
    run(before)
    assert all(getattr(before, k) is v for k, v in frozen.items())
    assert all((frozen[k] == v).all() for k, v in copies.items())
    assert before.pool.num_free == before.pool.num_blocks - 1


def profile_host(rows=256, steps=200):
    """Seconds a decode step of `rows` costs on the host (called by hand, asserted by nobody)."""
    batch = batch_of(
        num_blocks=rows * 20,
        block_size=16,
        max_num_seqs=rows,
        max_num_batched_tokens=2048,
        max_model_len=2048,
    )
    seqs = [sequence(i, 16, max_tokens=steps + 50, max_model_len=2048) for i in range(rows)]
    batch = filled(batch, seqs)
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        batch, step = schedule(batch)
        seats = step.seats[step.samples]
        batch = record(batch, seats, np.ones_like(seats))
        seconds.append(time.perf_counter() - start)
    return np.median(seconds), np.max(seconds)
