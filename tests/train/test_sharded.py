"""Device count must not change a step: four devices in a process of their own."""

import os
import pathlib
import subprocess
import sys

import jax

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


def test_a_batch_over_four_devices_is_the_batch_on_one():
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache" / jax.__version__),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    script = [sys.executable, str(ROOT / "tests" / "train" / "sharded.py")]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "equal", done.stderr
