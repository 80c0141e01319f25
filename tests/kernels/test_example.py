"""The example does what docs/custom_kernels.md says of it."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from aidx.kernels import REGISTRY

EXAMPLE = pathlib.Path(__file__).resolve().parents[2] / "examples" / "custom_kernel.py"


@pytest.fixture
def run():
    yield lambda name: runpy.run_path(str(EXAMPLE), run_name=name)
    REGISTRY.unregister("add_rms_norm")


def test_sixty_lines_declare_check_tune_and_use_a_kernel(run, capsys):
    run("__main__")
    printed = capsys.readouterr().out
    assert len(EXAMPLE.read_text().splitlines()) <= 60
    assert printed.count("op_check add_rms_norm") == 2 and "FAILED" not in printed
    assert "add_rms_norm/mosaic_gpu: needs cuda, this is cpu" in printed  # nothing to tune here
    assert float(printed.split()[-1]) > 0


def test_its_kernel_is_what_a_gpu_gets(run):
    example = run("example")
    x, scale = jax.ShapeDtypeStruct((8, 512), jnp.bfloat16), jnp.ones(512, jnp.bfloat16)
    layers = [{"scale": scale, "up": jnp.zeros((512, 512), jnp.bfloat16)}]
    layers[0]["down"] = layers[0]["up"]
    traced = jax.jit(example["model"]).trace(layers, x)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic" not in traced.lower().as_text()
    odd = REGISTRY.get("add_rms_norm").table[0].forward
    with pytest.raises(NotImplementedError, match=r"128 elements, not \(3, 100\)"):
        odd.fn(jnp.ones((3, 100)), jnp.ones((3, 100)), jnp.ones(100), config=4)
