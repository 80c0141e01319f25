"""A run that is killed, wherever, ends where the one that was not ends: bit for bit."""

import os
import pathlib
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aidx.train import Checkpoints, init_state, loss_scale
from aidx.train.checkpoint import named_leaves, same_bits

from . import killed

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def child(folder, when):
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache" / jax.__version__),
    }
    script = [sys.executable, "-m", "tests.train.killed", str(folder), when]
    done = subprocess.run(script, env=env, cwd=ROOT, capture_output=True, text=True, timeout=120)
    return -done.returncode, done.stderr


def test_killed_within_a_save_and_within_a_step_then_terminated_it_ends_the_same(tmp_path):
    wanted = killed.run(tmp_path / "whole").state
    folder = tmp_path / "killed"
    code, log = child(folder, "save:6")
    assert code == signal.SIGKILL, log
    names = {p.name for p in folder.iterdir()}
    assert "3" in names and "6" not in names and any(n.startswith("6.") for n in names)
    code, log = child(folder, "step:8")
    assert code == signal.SIGKILL, log
    code, log = child(folder, "term:10")
    assert code == signal.SIGTERM, log
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.latest == 11  # SIGTERM came in step 10, which was finished and saved
    resumed = killed.run(folder)
    assert resumed.reason == "done" and int(resumed.state.step) == killed.STEPS
    assert same_bits(resumed.state, wanted)
    again = killed.run(folder)  # nothing is left to do
    assert again.metrics == {} and same_bits(again.state, wanted)


def state(seed=0):
    p = {
        "w": jax.random.normal(jax.random.key(seed), (3, 2)),
        "half": jnp.arange(4, dtype=jnp.bfloat16) / 3,
        "layers": ({"b": jnp.full(2, seed, jnp.float32)}, {"b": jnp.ones(2)}),
    }
    made = init_state(p, optax.adamw(0.1), jax.random.key(seed), loss_scale=loss_scale(8.0))
    return made.replace(step=jnp.int32(seed))


@pytest.mark.smoke
def test_what_is_restored_is_what_was_saved_and_the_last_n_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for seed in (1, 2, 3):
            checkpoints.save(seed, state(seed), {"seed": seed})
        checkpoints.save(3, state(9), {"seed": 9})  # a step is saved once
        checkpoints.wait()
        assert checkpoints.steps == [2, 3] and checkpoints.latest == 3
        for step in (None, 2):
            found, meta = checkpoints.restore(state(), step)
            assert same_bits(found, state(step or 3)) and meta == {"seed": step or 3}
        assert found.key.dtype == state().key.dtype
        with pytest.raises(FileNotFoundError, match=r"no checkpoint 1, only \[2, 3\]"):
            checkpoints.restore(state(), 1)


def test_a_save_outlives_the_donation_of_its_state(tmp_path):
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    big = {"w": jnp.arange(1 << 21, dtype=jnp.float32)}
    wanted = np.asarray(big["w"])
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, big)
        zeros = step(big)
        jax.block_until_ready(zeros)
        checkpoints.wait()
        found, _ = checkpoints.restore(zeros)
    assert (np.asarray(found["w"]) == wanted).all()


def test_another_tree_is_refused_by_name(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": jnp.ones(2), "b": jnp.ones(3)})
        checkpoints.wait()
        with pytest.raises(ValueError, match=r"lacks \['c'\] and has \['b'\]"):
            checkpoints.restore({"a": jnp.ones(2), "c": jnp.ones(3)})
        with pytest.raises(ValueError, match=r"b has .*3.*\(4,\) is wanted"):
            checkpoints.restore({"a": jnp.ones(2), "b": jnp.ones(4)})
    with pytest.raises(ValueError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="2 leaves have 1"):
        named_leaves({"a.b": 1, "a": {"b": 2}})


def test_same_bits_tells_zeros_dtypes_and_keys_apart():
    assert same_bits(state(1), state(1)) and not same_bits(state(1), state(2))
    assert not same_bits(jnp.float32(0.0), jnp.float32(-0.0))
    assert not same_bits(jnp.zeros(1, jnp.int32), jnp.zeros(1))
    assert not same_bits(jax.random.key(0), jax.random.key(1))
    assert same_bits(jnp.float32(np.nan), jnp.float32(np.nan))
