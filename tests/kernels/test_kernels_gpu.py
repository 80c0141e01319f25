"""On a Hopper GPU (nvcc for the second): kernels of one's own keep every law on the device."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import pytest

from aidx.kernels import (
    REGISTRY,
    Case,
    Fold,
    KernelBuilder,
    Tolerance,
    build_library,
    load_library,
    op_check,
)

pytestmark = pytest.mark.gpu
HERE = pathlib.Path(__file__).resolve().parent


def test_the_example_keeps_every_law():
    run = runpy.run_path(str(HERE.parents[1] / "examples" / "custom_kernel.py"))
    try:
        shapes = lambda rows, width: ((rows, width), (rows, width), (width,))
        cases = [
            Case(f"{n} x {d}", shapes(n, d)) for n, d in ((3, 512), (1, 128), (0, 8), (5, 129))
        ]
        targets = ["mosaic_gpu_v2"]
        report = op_check(run["add_rms_norm"], cases, custom_calls=targets)
    finally:
        REGISTRY.unregister("add_rms_norm")
    results = {(row.case, row.result) for row in report.rows}
    assert {("3 x 512", "ok"), ("1 x 128", "ok"), ("0 x 8", "refused")} <= results


def test_a_cuda_function_keeps_every_law(tmp_path):
    library = build_library(HERE / "row_sum.cu", tmp_path / "row_sum.so", compiler="nvcc")
    load_library(library, {"test_row_sum_cuda": "row_sum"}, platform="CUDA")

    def foreign(x):
        if x.dtype != jnp.float32:
            raise NotImplementedError(f"float32 only, not {x.dtype}")
        return jax.ffi.ffi_call("test_row_sum_cuda", jax.ShapeDtypeStruct(x.shape[:1], x.dtype))(x)

    kernel = (
        KernelBuilder("row_sum")
        .reference(lambda x: jnp.sum(x, axis=1))
        .implementation("cuda", foreign, platforms=("cuda",))
        .vjp(lambda operands, out, c: (jnp.broadcast_to(c[:, None], operands[0].shape),))
        .batching(Fold(("x",)))
        .tolerance(Tolerance(float32=1e-4))
        .build(registry=None)
    )
    cases = [Case(f"{n} x {d}", ((n, d),), dtypes=("float32",)) for n, d in ((3, 999), (0, 5))]
    op_check(kernel, cases, custom_calls=["test_row_sum_cuda"])
