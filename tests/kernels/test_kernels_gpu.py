"""On a Hopper GPU (nvcc for the second): kernels of one's own keep every law on the device."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
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
from aidx.kernels._laws import TRANSFORMATIONS, VALUES
from aidx.ops.flash_attention import flash_attention
from aidx.ops.write_kv import write_kv
from tests.kernels import checked_ops

pytestmark = pytest.mark.gpu
BF16, OURS = ("bfloat16",), ("mosaic_gpu",)
TARGETS = ("mosaic_gpu_v2",)  # what an export of a kernel of ours holds
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


def flash(q, k, v, kv_lens, *, implementation):
    return flash_attention(
        q, k, v, causal=True, kv_lens=kv_lens, deterministic=True, implementation=implementation
    )


def check_flash(implementations):
    """A masked P is 0, and 0 times a NaN of V is NaN: one that is seen is no case of theirs."""
    lens, kv = np.array([70, 33], np.int32), (2, 70, 2, 64)
    case = Case(
        "GQA, 70 tokens, ragged",
        ((2, 70, 4, 64), kv, kv, lens),
        dtypes=BF16,
        vmap=((0, 0, 0, None),),
        unread=checked_ops.padding,
        poison=(),
    )
    return op_check(
        flash,
        [case],
        reference=checked_ops.plain_flash,
        implementations=implementations,
        tolerance=Tolerance(bfloat16=3e-2),
        custom_calls=TARGETS,
    )


def check_paged(implementations):
    pool = (5, 8, 16, 64)
    tables = (checked_ops.TABLES, checked_ops.CONTEXT, checked_ops.INDPTR)
    case = Case(
        "decode and verify, 16 heads over 8",
        ((4, 16, 64), pool, pool, *tables),
        dtypes=BF16,
        gradients=False,
        vmap=((0, None, None, None, None, None),),
        unread=checked_ops.unowned,
        poison=(),
    )
    return op_check(
        checked_ops.paged,
        [case],
        reference=checked_ops.plain_paged,
        implementations=implementations,
        custom_calls=TARGETS,
    )


def check_write(implementations):
    slots = np.array([5, -1, 2], np.int32)
    pools, tokens = ((2, 8, 16, 64),) * 2, ((3, 8, 64),) * 2
    skipped = jnp.broadcast_to((slots == -1)[:, None, None], tokens[0])
    case = Case(
        "3 tokens, one of no slot",
        (*pools, *tokens, slots),
        dtypes=BF16,
        gradients=False,
        vmap=((0, 0, 0, 0, None),),
        donate=(0, 1),
        unread=lambda *_: (None, None, skipped, skipped, None),
    )
    return op_check(
        write_kv,
        [case],
        reference=checked_ops.plain_write,
        implementations=implementations,
        custom_calls=TARGETS,
    )


@pytest.mark.parametrize("check", [check_flash, check_paged, check_write], ids=lambda f: f.__name__)
def test_aidxs_own_kernels_keep_every_law_on_the_device(check):
    report = check(OURS)
    assert sum(row.result == "ok" for row in report.rows) >= 7


def test_aidxs_other_ops_keep_every_law_on_the_device():
    checked_ops.check_norms()
    checked_ops.check_sample()


def test_sparse_products_keep_every_law_on_the_device():
    """All but one: rows cut twice and transposed products are added up atomically."""
    laws = (*VALUES, *TRANSFORMATIONS)
    ours = {name: list(OURS) for name in ("spmm", "sddmm", "two_four")}
    given = dict(custom_calls=TARGETS, laws=laws, repeatable=False)
    checked_ops.check_products(ours, BF16, (512, 64), **given)
