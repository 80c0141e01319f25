"""The fused kernels as ops: the laws of `op_check`, in the interpreter, on the CPU and on a GPU."""

import functools
import importlib
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

import aidx
from aidx.kernels import KernelBuilder, Tolerance, fused, op_check
from aidx.ops import _fused
from tests.pallas_kernels.fused_cases import case

KERNELS = {
    kernel.name: kernel
    for kernel in (
        fused.rms_norm,
        fused.residual_rms_norm,
        fused.layer_norm,
        fused.residual_layer_norm,
        fused.apply_rope,
        fused.gated,
        fused.softmax_cross_entropy,
    )
}
STATIC = {"softmax_cross_entropy": dict(label_smoothing=0.1, z_loss=1e-2)}
QUICK = ("residual_layer_norm", "apply_rope", "gated", "softmax_cross_entropy")
ROOT = pathlib.Path(__file__).resolve().parents[2]


def quick(names):
    return [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in names]


@pytest.fixture
def interpreted(monkeypatch):
    """Lets the doors run their kernels in the interpreter."""

    def load(name):
        module = importlib.import_module(f"pallas_kernels.fused.{name}")
        how = plgpu.InterpretGPUParams()
        made = {
            key: functools.partial(value, interpret=how)
            for key, value in vars(module).items()
            if isinstance(value, types.FunctionType) and value.__module__ == module.__name__
        }
        return types.SimpleNamespace(**made)

    monkeypatch.setattr(_fused, "_kernels", load)


@pytest.mark.parametrize("name", quick(KERNELS))
def test_kernels_and_their_gradients_keep_to_the_reference(name, interpreted):
    """Rank 3, rows that end inside a vector's piece."""
    kernel = KERNELS[name]
    entry = {entry.name: entry for entry in kernel.table}["mosaic_gpu"]
    assert entry.platforms == ("cuda",)
    own = (
        KernelBuilder(f"interpreted_{name}")
        .reference(kernel.reference)
        .implementation("own", entry.forward.fn, backward=entry.backward.backward)
        .tolerance(kernel.tolerance)
    )
    own = (own.tuning(kernel.tuning[:1]) if kernel.tuning else own).build(registry=None)
    dtypes = ("float32",) if name == "apply_rope" else ("bfloat16",)
    shape = case(name, (2, 1), 48, dtypes=dtypes, static=STATIC.get(name, {}))
    op_check(own, [shape], implementations=["own"], laws=["reference", "gradient"])


@pytest.mark.parametrize("name", quick(KERNELS))
def test_the_laws_on_this_machine(name):
    """What needs no GPU keeps every law, at any rank, empty and with rows that do not fit."""
    static, few = STATIC.get(name, {}), dict(dtypes=("float32",))
    odd = 6 if name == "apply_rope" else 7
    cases = [case(name, (3,), 8, static=static), case(name, (2, 1), odd, static=static, **few)]
    if name in ("rms_norm", "softmax_cross_entropy"):
        cases.append(case(name, (0,), 8, static=static, **few))
    op_check(KERNELS[name], cases)


@pytest.mark.slow
def test_the_laws_over_eight_devices():
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    run = subprocess.run(
        [sys.executable, "-m", "tests.pallas_kernels.sharded_fused"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert run.stdout.count("kept over 8 devices") == len(KERNELS)


@pytest.mark.smoke
def test_they_are_ops_of_aidx():
    assert [i.name for i in aidx.implementations("softmax_cross_entropy")][-2:] == [
        "xla",
        "reference",
    ]
    x, scale = jnp.ones((2, 8)), jnp.ones(8)
    lines = {line.name: line for line in aidx.explain("rms_norm", x, scale, eps=1e-5)}
    assert lines["reference"].chosen and "cuda" in lines["mosaic_gpu"].reason


@pytest.mark.parametrize(("rows", "kernels"), [(1, 0), (1023, 0), (1024, 1)])
def test_small_operands_are_left_to_xla(rows, kernels):
    """From 8 MiB on the kernel is lowered for CUDA; asked for by name it is at any size."""
    x, scale = jnp.zeros((rows, 4096), jnp.bfloat16), jnp.ones(4096)
    lowered = lambda f: jax.jit(f).trace(x, scale).lower(lowering_platforms=("cuda",)).as_text()
    assert lowered(fused.rms_norm).count("mosaic_gpu_v2") == kernels
    asked = functools.partial(fused.rms_norm, implementation="mosaic_gpu")
    assert lowered(asked).count("mosaic_gpu_v2") == 1


def test_a_smoothed_loss_is_the_mixture_it_says():
    """Smoothing is a cross-entropy with a mixed target; z adds the square of lse."""
    logits = jax.random.normal(jax.random.key(0), (4, 10)) * 3
    targets = jnp.array([0, 9, 10, -1])
    call = functools.partial(fused.softmax_cross_entropy, label_smoothing=0.2, z_loss=0.5)
    loss, lse = call(logits, targets)
    logp = np.asarray(jax.nn.log_softmax(logits), np.float64)
    mixed = 0.8 * np.eye(10)[[0, 9]] + 0.02
    want = -(mixed * logp[:2]).sum(-1) + 0.5 * np.asarray(lse[:2], np.float64) ** 2
    np.testing.assert_allclose(loss, [*want, 0, 0], rtol=1e-6)
    slopes = jax.grad(lambda x: call(x, targets)[0].sum())(logits)
    assert jnp.abs(slopes[:2]).min() > 0
    np.testing.assert_array_equal(slopes[2:], 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", KERNELS)
def test_the_laws_on_a_gpu(name):
    """A Hopper GPU: shapes that fit, that do not, and real ones."""
    static, width = STATIC.get(name, {}), 128 if name == "apply_rope" else 4096
    tolerance = Tolerance(float32=1e-4, gradient=8.0)  # sums of 300 rows in another order
    shapes = [((3,), 16), ((0,), 8), ((2, 1), 6), ((300,), width)]
    report = op_check(
        KERNELS[name],
        [case(name, *shape, static=static) for shape in shapes],
        implementations=["mosaic_gpu"],
        custom_calls=["mosaic_gpu_v2"],
        tolerance=tolerance,
    )
    results = {(row.case, row.result) for row in report.rows}
    assert {("(3,) x 16", "ok"), (f"(300,) x {width}", "ok")} <= results
    assert {("(0,) x 8", "refused"), ("(2, 1) x 6", "refused")} <= results
