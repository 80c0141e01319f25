"""Strict settings for every test: rank promotion raises, warnings are errors, one compile cache."""

import os
import pathlib

os.environ.setdefault("NPROC", "16")  # threads of the kernel interpreter: two cores would deadlock
os.environ.setdefault("JAX_PLATFORMS", "cpu" if not os.environ.get("AIDX_TEST_GPU") else "")

import jax
import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
# Scripts that tests run in a process of their own (another Python, eight devices).
collect_ignore_glob = [
    "oracles/*.py",
    "ops/sharded_attention.py",
    "engine/tensor_parallel.py",
    "kernels/checked_ops.py",
]

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_compilation_cache_dir", str(ROOT / ".jax_cache" / jax.__version__))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_collection_modifyitems(config, items):
    """A test marked `gpu` is collected out (not skipped) where there is no GPU."""
    if jax.default_backend() == "gpu":
        return
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        config.hook.pytest_deselected(items=gpu)
        items[:] = [item for item in items if not item.get_closest_marker("gpu")]


@pytest.fixture
def rng_key():
    return jax.random.key(0)
