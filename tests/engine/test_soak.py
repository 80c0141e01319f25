"""The soak of `bench/soak.py`, small: guard blocks keep their bits, and it would tell if not."""

import importlib.util
import pathlib
import sys

import jax
import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "bench" / "soak.py"


def load():
    spec = importlib.util.spec_from_file_location("soak", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


BENCH = load()


@pytest.mark.parametrize("mode,dtype", [("swap", "float32"), ("recompute", "float32")])
def test_a_short_soak_leaves_no_trace(mode, dtype):
    found = BENCH.soak(BENCH.make_engine(mode, dtype, tiny=True), seed=1, requests=60)
    assert found.wrong == ()
    assert found.preempted > 0 and (found.swapped > 0) == (mode == "swap")
    assert found.reasons["length"] > 30 and found.reasons["abort"] > 0
    assert found.cache_hit_rate > 0.05 and found.same == found.repeated == 20
    assert found.gap < 1e-3


def test_a_write_into_a_guard_block_is_noticed():
    engine = BENCH.make_engine("recompute", "float32", tiny=True)
    step, count = engine.step, iter(range(10**6))

    def careless():
        outputs = step()
        if next(count) == 20:  # one bit of one block that belongs to nobody
            pool = engine._batch.pool
            free = np.flatnonzero(np.asarray(pool.refs.to_numpy()) == 1)
            held = np.unique(np.concatenate(engine._batch.tables))
            guard = next(b for b in free if b not in held and b != 0)
            cache = engine._device.cache
            first = jax.device_put(cache.v[0].at[guard, 0, 0, 0].set(7.0), cache.v[0].sharding)
            engine._device.cache = cache.replace(v=(first, *cache.v[1:]))
        return outputs

    engine.step = careless
    found = BENCH.soak(engine, seed=1, requests=12)
    assert found.wrong == ("a guard block has changed",)
