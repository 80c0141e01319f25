"""Strict settings for every test: rank promotion raises, warnings are errors, one compile cache."""

import gc
import os
import pathlib
import sys

os.environ.setdefault("NPROC", "16")  # threads of the kernel interpreter: two cores would deadlock
os.environ.setdefault("JAX_PLATFORMS", "cpu" if not os.environ.get("AIDX_TEST_GPU") else "")
# Most of the suite's time is compilation of programs that run once: LLVM need not optimise them.
# (Workers inherit this; code for a GPU is compiled as it is shipped.)
if (
    "PYTEST_XDIST_WORKER" not in os.environ
    and os.environ["JAX_PLATFORMS"] == "cpu"
    and not any("sm90a" in word and "not sm90a" not in word for word in sys.argv)
):
    quick = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {quick}"

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


MAPPINGS = pathlib.Path("/proc/self/maps")  # Linux; a process may have 65,530 of them


def pytest_runtest_teardown(item, nextitem):
    """Compiled programs are let go between files before their mappings reach the kernel's limit.

    Every program maps memory, and the loader's fault is a segmentation fault of the whole worker.
    """
    if nextitem is not None and item.path == nextitem.path:
        return
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def rng_key():
    return jax.random.key(0)
