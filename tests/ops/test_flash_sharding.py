"""Attention over eight devices, in a process of its own: the device count is fixed at start."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_sharded_attention_equals_one_device_without_collectives():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache" / "sharded"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.ops.sharded_attention"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.splitlines() == [
        "jit: no collectives",
        "shard_map: equal",
        "shard_map: the gradient of what is replicated is summed",
        "shard_map: paged attention over heads equal",
        "export: equal",
    ]
