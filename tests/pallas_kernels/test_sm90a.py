"""Every shipped kernel configuration, compiled for sm_90a without a GPU: nothing spills.

Needs the CUDA plugin of JAX and ptxas (`CONTRIBUTING.md`).
"""

import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.flash_attention import Band, flash_attention_bwd
from pallas_kernels.fused.cross_entropy import cross_entropy_backward
from pallas_kernels.paged_attention import write_kv
from pallas_kernels.sparse.vector import vector_matmul

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "scripts" / "compile_sm90a.py"


def gate():
    spec = importlib.util.spec_from_file_location("compile_sm90a", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GATE = gate()
CASES = {name: (f, args) for name, f, args in GATE.cases()}


OPTIONS = ("soft cap", "dropout", "score_mod", "bias", "mask_mod", "blocks")


def in_the_gate(name: str) -> bool:
    """Every option at one head size, every head size with every mask; the rest is slow.

    >>> [in_the_gate(f"flash/H{h} dropout bwd") for h in (64, 128, 256)]
    [False, True, False]
    """
    if name.startswith("fused/"):
        return not re.search(r" (1024|2048) |gelu|float32", name)
    option = next((i for i, o in enumerate(OPTIONS) if o in name), None)
    if option is not None:
        return f"H{(64, 128, 256)[option % 3]} " in name
    if "deterministic" in name and "flash" in name:
        return "causal" in name or "packed" in name
    other = {"int8": "h256", "float8_e4m3fn": "h64"}  # one-byte pools: two head sizes of three
    return not any(kind in name and head in name for kind, head in other.items())


@pytest.fixture
def no_compile_cache():
    """What comes from the cache, ptxas says nothing of."""
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", True)


@pytest.mark.sm90a
@pytest.mark.parametrize(
    "name", [n if in_the_gate(n) else pytest.param(n, marks=pytest.mark.slow) for n in CASES]
)
def test_compiles_without_spills(name, no_compile_cache):
    problems, registers = GATE.compiled(*CASES[name])
    assert problems == []
    assert registers > 0


def written_one_by_one(pools, tokens, slots):
    one = lambda rows: write_kv(*rows[0], *rows[1], slots)[:2]
    return jax.lax.map(one, (pools, tokens))


def graded_one_by_one(logits, targets, lse):
    one = lambda row: cross_entropy_backward(row[0], row[1], row[2], row[2], row[2])
    return jax.lax.map(one, (logits, targets, lse))


@pytest.mark.sm90a
@pytest.mark.parametrize("f", [written_one_by_one, graded_one_by_one], ids=lambda f: f.__name__)
def test_a_kernel_that_writes_in_place_is_not_fused_with_slices(f, no_compile_cache):
    """XLA would forget that its operand and its result are one buffer."""
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
    pools, tokens = (shape(3, 2, 8, 16, 64),) * 2, (shape(3, 3, 8, 64),) * 2
    args = {
        written_one_by_one: (pools, tokens, shape(3, dtype=jnp.int32)),
        graded_one_by_one: (
            shape(3, 64, 1024),
            shape(3, 64, dtype=jnp.int32),
            shape(3, 64, dtype=jnp.float32),
        ),
    }
    program, _ = GATE.program(f, args[f])
    holders = [c for c in program.as_text().split("\n\n") if "mosaic_gpu_v2" in c]
    assert holders and not any(" dynamic-update-slice(" in c for c in holders)
    assert all("output_to_operand_aliasing" in c for c in holders)


def two_layers(x, lse):
    for _ in range(2):
        x = flash_attention_bwd(x, x, x, x, lse, x, band=Band(right=0), scale=0.1).q
    return x


def two_products(data, x, row, column, indptr):
    for _ in range(2):
        x = vector_matmul(data, x, row, column, indptr)
    return x


@pytest.mark.sm90a
@pytest.mark.parametrize("f", [two_layers, two_products], ids=lambda f: f.__name__)
def test_zeros_that_kernels_add_to_are_not_copied(f, no_compile_cache):
    """XLA makes equal constants once and copies them to where they are overwritten."""
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    index = lambda n: shape(n, dtype=jnp.int32)
    args = {
        two_layers: (shape(1, 256, 2, 64, dtype=jnp.bfloat16), shape(1, 256, 2)),
        two_products: (shape(9000), shape(4000), index(9000), index(9000), index(4001)),
    }
    program, _ = GATE.program(f, args[f])
    text = program.as_text()
    assert text.count('custom_call_target="mosaic_gpu_v2"') == 2
    assert not re.search(r"= f32\S* copy\(", text)


def test_a_spill_and_a_serialised_wgmma_are_seen():
    log = "Used 168 registers\n 24 bytes spill stores, 24 bytes spill loads\n warning C7513: x"
    problems, registers = GATE.verdict(log)
    assert problems == ["24 B spilled", "C7513"]
    assert registers == 168
    assert GATE.verdict("")[0] == ["ptxas said nothing"]
