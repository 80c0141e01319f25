"""The step as a program: donated, in place, a few traces, padding that does nothing."""

import re

import jax
import numpy as np
import pytest

from aidx.engine import EngineConfig
from aidx.engine import step as stepping
from aidx.engine.step import Sampler, Shape, all_shapes, pack_plan, pick_shape, unpack_plan
from aidx.engine.warmup import empty_plan

from .tiny import GREEDY, LENGTH, LIMITS, PROMPTS, engine, generate, model

SHAPE = Shape(4, 4, 1, Sampler("greedy"))


def plan(shape=SHAPE, rows=0, **changes):
    values = dict(
        seats=np.arange(rows),
        writes=np.arange(rows),
        starts=np.zeros(rows, int),
        counts=np.ones(rows, int),
        targets=np.full(rows, -1),
        sampling=np.zeros((rows, stepping.SAMPLING_COLUMNS), np.int32),
        tokens=np.arange(rows),
        updates=np.zeros((0, 3), np.int32),
    )
    return pack_plan(shape, max_num_seqs=4, **(values | changes))


def test_a_plan_survives_the_journey():
    updates = np.array([[2, 0, 7], [1, 3, 9]], np.int32)
    sampling = np.arange(22, dtype=np.int32).reshape(2, 11)
    packed = plan(
        rows=2,
        seats=np.array([3, 1]),
        writes=np.array([3, 4]),
        starts=np.array([5, 0]),
        targets=np.array([-1, 8]),
        sampling=sampling,
        tokens=np.array([-1, 6]),
        updates=updates,
    )
    assert packed.shape == (SHAPE.plan_size,) and packed.dtype == np.int32
    back = jax.tree.map(np.asarray, unpack_plan(packed, SHAPE))
    assert back.seats.tolist() == [3, 1, 4, 4] and back.writes.tolist() == [3, 4, 4, 4]
    assert back.context_lens.tolist() == [6, 1, 0, 0] and back.counts.tolist() == [1, 1, 0, 0]
    assert back.targets.tolist() == [-1, 8, -1, -1] and back.tokens.tolist() == [-1, 6, -1, -1]
    assert (back.sampling[:2] == sampling).all() and (back.updates[:2] == updates).all()
    assert (back.updates[2:, 0] == 5).all()  # out of range: written nowhere


def test_a_plan_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"\(5, 5, 0\) do not fit \(4, 4, 16\)"):
        plan(rows=5)


def lowered(made, shape):
    return stepping.run_step.lower(
        made._device.params,
        made._device.cache,
        made._device.state,
        np.zeros(shape.plan_size, np.int32),
        None,
        forward=made._device._forward,
        shape=shape,
    )


@pytest.mark.smoke
def test_cache_and_state_are_updated_in_place():
    """Every pool is aliased with its output, and after steps lies where it lay."""
    made = engine()
    generate(PROMPTS[:1], GREEDY, made=made)
    before = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(made._device.cache)]
    generate(PROMPTS[:4], GREEDY, made=made)
    after = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(made._device.cache)]
    assert before == after
    text = lowered(made, SHAPE).compile().as_text()
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", text).group(1)
    donated = jax.tree.leaves((made._device.cache, made._device.state))
    assert len(re.findall(r"(?:may|must)-alias", aliases)) == len(donated)


def test_no_pool_is_copied():
    made = engine()
    pool = "f32[{},{},{},{}]".format(*made._device.cache.k[0].shape)
    for shape in (SHAPE, pick_shape(2, 10, Sampler(), **limits())):
        text = lowered(made, shape).compile().as_text()
        copies = [
            line for line in text.splitlines() if re.search(rf"= {re.escape(pool)}\S* copy\(", line)
        ]
        assert copies == []


def limits():
    names = ("max_num_seqs", "max_num_batched_tokens", "max_logprobs")
    return {name: LIMITS[name] for name in names}


def test_an_empty_plan_changes_nothing():
    made = engine()
    generate(PROMPTS[:2], GREEDY, made=made)
    cache = jax.tree.map(np.array, made._device.cache)
    tokens = np.array(made._device.state.last_token)
    made._device.run(SHAPE, empty_plan(made.config, SHAPE))
    for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(made._device.cache), strict=True):
        np.testing.assert_array_equal(a[1:], np.asarray(b)[1:])
    np.testing.assert_array_equal(tokens[:-1], np.asarray(made._device.state.last_token)[:-1])


def test_what_no_live_slot_holds_may_be_anything():
    """NaN in every block changes no token: nothing reads what was not written."""
    made = engine()
    made._device.cache = jax.tree.map(
        lambda x: jax.device_put(np.full(x.shape, np.nan, x.dtype), x.sharding), made._device.cache
    )
    clean, dirty = generate(PROMPTS, GREEDY), generate(PROMPTS, GREEDY, made=made)
    assert [o.outputs[0].token_ids for o in clean] == [o.outputs[0].token_ids for o in dirty]


@pytest.mark.parametrize("cpu,most", [(True, 45), (False, 30)])
def test_the_traces_are_few_and_each_request_finds_one(cpu, most):
    shapes = all_shapes(256, 2048, 20, cpu=cpu)
    assert len(shapes) == len(set(shapes)) <= most
    for rows, tokens in ((1, 1), (3, 3), (256, 256), (1, 2), (256, 300), (7, 2048)):
        for sampler in (
            Sampler("greedy"),
            Sampler("plain"),
            Sampler("full"),
            Sampler("full", masked=True),
            Sampler("greedy", num_logprobs=3),
        ):
            shape = pick_shape(
                rows,
                tokens,
                sampler,
                max_num_seqs=256,
                max_num_batched_tokens=2048,
                max_logprobs=20,
                cpu=cpu,
            )
            assert shape in shapes
            assert shape.num_rows >= rows and shape.num_tokens >= tokens
            assert shape.decode == (rows == tokens)


@pytest.mark.parametrize("tokens", [256, 300, 2048, 4096])
def test_a_step_is_cut_to_sizes_that_there_are_traces_for(tokens):
    geometry = {name: value for name, value in LIMITS.items() if not name.startswith("max_")}
    limits = dict(max_num_batched_tokens=tokens, max_model_len=LENGTH)
    config = EngineConfig(**geometry, **limits, cpu=False)
    sizes = config.scheduler().step_sizes
    assert set(sizes) == {s.num_tokens for s in config.shapes() if not s.decode}
    assert EngineConfig(**geometry, **limits).scheduler().step_sizes == ()


def test_greedy_rows_alone_draw_no_noise():
    """What no running row needs is not in the program: no random bits, no [R, V] state."""
    text = lowered(engine(), SHAPE).as_text()
    assert "threefry" not in text and "shift_right_logical" not in text
    plain = lowered(engine(), Shape(4, 4, 1, Sampler("plain"))).as_text()
    assert "threefry" in plain or "shift_right_logical" in plain


def test_the_model_is_only_a_parameter():
    """The engine's room names no model."""
    import aidx.engine.engine as room

    assert "aidx.models" not in {getattr(v, "__name__", "") for v in vars(room).values()}
    assert model().forward is model().forward
