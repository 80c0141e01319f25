"""Rows that share a prefix read it once, and nobody can tell from the answers."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from aidx.engine import BeamSearchParams, SamplingParams
from aidx.engine.cascade import MAX_GROUPS, shared_prefixes
from aidx.engine.step import Sampler, pick_shape, run_step
from aidx.engine.warmup import empty_plan

from .tiny import VOCAB, dense_tokens, engine, generate, run, tokens_of

SYSTEM = np.random.default_rng(7).integers(0, VOCAB - 1, size=21).tolist()
OTHER = np.random.default_rng(8).integers(0, VOCAB - 1, size=10).tolist()


def cascade_steps(made):
    """Whether each step that is issued reads a prefix once."""
    seen, issue = [], made._cascade

    def counted(rows):
        found = issue(rows)
        seen.append(bool(found) and made._shape(rows, cascade=True).cascade)
        return found

    made._cascade = counted
    return seen


def greedy(n):
    return SamplingParams(temperature=0, max_tokens=n)


@pytest.mark.smoke
def test_a_shared_system_prompt_read_once_does_not_matter():
    """Rows come, go and grow at different times; one of another prompt runs beside them."""
    prompts = [[*SYSTEM, 5], [*SYSTEM, 6, 7, 8], [*SYSTEM[:9], 3], OTHER, [*SYSTEM, 9, 9]]
    params = [greedy(12), greedy(5), greedy(9), greedy(11), greedy(8)]
    outputs = []
    for tokens in (0, 16):
        made = engine(cascade_tokens=tokens)
        generate([SYSTEM], greedy(1), made=made)  # its blocks are found by the others
        seen = cascade_steps(made)
        outputs.append(tokens_of(generate(prompts, params, made=made)))
        assert any(seen) == bool(tokens)
    assert outputs[0] == outputs[1]
    for prompt, param, [tokens] in zip(prompts, params, outputs[1], strict=True):
        assert tokens == dense_tokens(prompt, param)


def test_samples_and_beams_share_their_prompt():
    samples = SamplingParams(temperature=0.9, n=4, seed=3, max_tokens=8)
    beams = BeamSearchParams(beam_width=3, max_tokens=6)
    for params in (samples, beams):
        found = []
        for tokens in (0, 16):
            made = engine(cascade_tokens=tokens)
            seen = cascade_steps(made)
            found.append(tokens_of(generate([SYSTEM], params, made=made)))
            assert any(seen) == bool(tokens)
        assert found[0] == found[1]


def test_prompt_logprobs_beside_a_group_do_not_matter():
    """One row a prompt token: some stand inside the prefix that the others share."""
    loud = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=2)
    found = []
    for tokens in (0, 16):
        made = engine(cascade_tokens=tokens)
        names = [made.add_request([*SYSTEM, i], greedy(12)) for i in range(2)]
        done = {}
        for _ in range(3):
            done |= {o.request_id: o for o in made.step()}
        names.append(made.add_request([*SYSTEM, 4], loud))
        done |= run(made)
        found.append([done[name] for name in names])
    assert tokens_of(found[0]) == tokens_of(found[1])
    for a, b in zip(found[0][2].prompt_logprobs[1:], found[1][2].prompt_logprobs[1:], strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose(
            [x.logprob for x in a.values()], [x.logprob for x in b.values()], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("variant", ["greedy", "plain"])
def test_nothing_compiles_after_the_warm_up(variant):
    made = engine(cascade_tokens=16, max_logprobs=0)
    made.warmup(variant=variant)
    before = run_step._cache_size()
    seen = cascade_steps(made)
    generate([[*SYSTEM, i] for i in range(4)], greedy(6), made=made)
    if variant == "plain":
        generate([SYSTEM], SamplingParams(temperature=0.9, n=3, max_tokens=5), made=made)
    assert any(seen) and run_step._cache_size() == before


# The search for groups, against every interval of every order.


def best(tables, full):
    """Members x blocks of the best group, by trying every prefix of every table."""
    sizes = [0]
    for table, size in zip(tables, full, strict=True):
        for n in range(1, size + 1):
            same = sum(
                f >= n and list(t[:n]) == list(table[:n]) for t, f in zip(tables, full, strict=True)
            )
            sizes.append(same * n if same > 1 else 0)
    return max(sizes)


@hypothesis.given(st.lists(st.lists(st.integers(1, 2), max_size=5), max_size=7), st.data())
def test_the_groups_are_the_largest(tables, data):
    tables = [np.array(t, np.int32) for t in tables]
    full = np.array([data.draw(st.integers(0, len(t))) for t in tables], np.int64)
    least = data.draw(st.integers(2, 12))
    found = shared_prefixes(tables, full, least=least)
    top = best(tables, full)
    assert (found is not None) == (top >= least)
    if found is None:
        return
    assert len(found.lens) <= MAX_GROUPS
    sizes = []
    for g, (leader, blocks) in enumerate(zip(found.leaders, found.lens, strict=True)):
        members = np.flatnonzero(found.group == g)
        assert leader in members and (full[members] >= blocks).all()
        assert all((tables[m][:blocks] == tables[leader][:blocks]).all() for m in members)
        sizes.append(len(members) * int(blocks))
    assert sizes[0] == top and min(sizes) >= least
    assert set(found.group.tolist()) <= {-1, *range(len(sizes))}


def test_unlike_rows_cost_next_to_nothing():
    """Without common first blocks no table is looked at beyond its first entry."""

    class Untouchable(np.ndarray):
        def __getitem__(self, at):
            assert at == 0
            return super().__getitem__(at)

    tables = [np.arange(i, i + 9, dtype=np.int32).view(Untouchable) for i in range(1, 100, 10)]
    assert shared_prefixes(tables, np.full(10, 9), least=2) is None


def test_no_row_is_padded_for_the_sake_of_a_cascade():
    """Two rows that need the full sampler would run in the trace for four: they do not."""
    limits = dict(max_num_seqs=4, max_num_batched_tokens=16, max_logprobs=6)
    pick = lambda rows, variant, **more: pick_shape(rows, rows, Sampler(variant), **limits, **more)
    assert pick(2, "plain", cascade=True).num_rows == 2
    assert pick(2, "full", cascade=True).num_rows == 4 > pick(2, "full").num_rows
    full = SamplingParams(temperature=0.9, top_k=5, n=2, seed=1, max_tokens=6)
    made = engine(cascade_tokens=16)
    seen = cascade_steps(made)
    generate([SYSTEM], full, made=made)
    assert seen and not any(seen)


def test_a_plan_without_groups_runs_in_the_cascade_trace():
    made = engine(cascade_tokens=16)
    shape = next(s for s in made.config.shapes() if s.cascade and s.sampler.variant == "plain")
    cache = jax.tree.map(np.array, made._device.cache)
    made._device.run(shape, empty_plan(made.config, shape))
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(made._device.cache), strict=True):
        np.testing.assert_array_equal(a[1:], np.asarray(b)[1:])
