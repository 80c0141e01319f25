"""Processes that have found each other by jax.distributed run the same configuration."""

import os
import pathlib
import socket
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_first_process_tunes_for_all():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.ops.autotune_process", str(rank), "2", str(port)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        results = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [r[0].splitlines()[-1:] for r in results] == [
        ["rank 0 of 2 takes 2 [tuned] True"],
        ["rank 1 of 2 takes 2 [tuned] False"],
    ], results
