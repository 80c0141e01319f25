"""aidx's own ops keep the laws, on eight devices: a process of its own, as their count is fixed."""

import os
import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_ops_of_aidx_keep_every_law():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache" / "sharded"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.checked_ops"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    checked = re.findall(r"^op_check (\w+): (\d+) ok$", run.stdout, re.MULTILINE)
    counts = {name: int(count) for name, count in checked}
    ops = ("rms_norm", "layer_norm", "turned", "flash", "paged", "write_kv", "drawn")
    assert all(counts[name] >= 7 for name in ops), counts
    assert run.stdout.count("devices  ") >= 7 and run.stdout.count("there is one device") == 0
    assert run.stdout.splitlines()[-1] == "-- check_custom --"
