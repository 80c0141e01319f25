"""Runs a module of the tests on several CPU devices: their count is fixed when a process starts."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def output_on_devices(module: str, count: int) -> str:
    """What `python -m module` prints on `count` devices; its errors if it fails."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        # what conftest set (LLVM's quick passes) stays
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} "
        f"--xla_force_host_platform_device_count={count}",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache" / "sharded"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    command = [sys.executable, "-m", module]
    run = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run.stdout
