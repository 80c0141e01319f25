"""Scopes of code that was written without them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

from aidx.telemetry.hooks import profile_batches, profile_engine, profile_methods
from aidx.telemetry.profiler import Profiler
from aidx.train.hooks import profile_layers, profile_optimizer


def counts(profiler):
    return {row.path: row.count for row in profiler.report().host}


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


NAMES = {("Net", "first"), ("Net", "blocks_0"), ("Net", "blocks_1")}


def test_nnx_layers_are_scopes_named_by_their_place_and_only_meanwhile():
    model, x = Net(), jnp.ones((2, 4))
    before = Net.__call__
    wanted = model(x)
    with Profiler() as profiler, profile_layers(model):
        np.testing.assert_array_equal(model(x), wanted)
        text = str(jax.jit(lambda x: model(x)).lower(x).as_text(debug_info=True))
        nnx.jit(lambda m, x: m(x))(model, x)  # modules are made anew under a transformation
    found = counts(profiler)
    assert found == {("Net",): 3, **dict.fromkeys(NAMES, 3)}
    assert "Net/blocks_1/" in text  # the device's instructions carry the names, too
    assert Net.__call__ is before
    with Profiler() as profiler:
        model(x)
    assert counts(profiler) == {}


def test_a_layer_that_raises_leaves_no_scope_open():
    model = Net()
    with Profiler() as profiler, profile_layers(model):
        with pytest.raises((TypeError, ValueError)):
            model(jnp.ones((2, 5)))
        model(jnp.ones((2, 4)))
    assert counts(profiler)["Net",] == 2 and all(path[0] == "Net" for path in counts(profiler))


def test_linen_layers_are_scopes_by_interception():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(3)(linen.Dense(3)(x))

    model, x = Block(), jnp.ones((2, 3))
    with profile_layers(), Profiler() as profiler:
        params = model.init(jax.random.key(0), x)
        model.apply(params, x)
    assert counts(profiler) == {
        ("Block",): 2, ("Block", "Dense_0"): 2, ("Block", "Dense_1"): 2,
    }  # fmt: skip


def test_an_optimiser_keeps_what_it_does_and_names_it_on_the_device():
    params, grads = {"w": jnp.ones(3)}, {"w": jnp.full(3, 2.0)}
    plain, hooked = optax.adam(0.1), profile_optimizer(optax.adam(0.1), "adam")
    state = plain.init(params)
    updates, _ = hooked.update(grads, state, params)
    np.testing.assert_array_equal(updates["w"], plain.update(grads, state, params)[0]["w"])
    lowered = jax.jit(lambda g, s: hooked.update(g, s)[0]).lower(grads, state)
    assert "adam/" in lowered.as_text(debug_info=True)


def test_an_objects_methods_are_scopes_and_its_own_attributes_come_back():
    class Engine:
        def __init__(self):
            self._read = lambda: "own"

        def step(self):
            return self._issue(), self._read()

        def _issue(self):
            return 1

        def _report(self):
            return ()

    engine = Engine()
    own = engine._read
    with Profiler() as profiler:
        with profile_engine(engine):
            assert engine.step() == (1, "own")
        assert engine.step() == (1, "own") and engine._read is own
    assert vars(engine) == {"_read": own}
    assert counts(profiler) == {
        ("engine",): 1, ("engine", "dispatch"): 1, ("engine", "read"): 1,
    }  # fmt: skip
    with pytest.raises(AttributeError, match="nothing"), profile_methods(engine, {"nothing": "a"}):
        pass


def test_waiting_for_batches_is_counted_and_working_on_them_is_not():
    with Profiler() as profiler:
        for _ in profile_batches(iter("abc"), "loader"):
            pass
    assert counts(profiler) == {("loader",): 4}
    assert list(profile_batches([])) == []


def test_the_engine_has_the_methods_that_are_hooked():
    from aidx.engine import Engine
    from aidx.telemetry.hooks import ENGINE_SCOPES

    assert all(callable(getattr(Engine, method)) for method in ENGINE_SCOPES)
