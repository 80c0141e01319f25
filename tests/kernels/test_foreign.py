"""A C++ function, compiled here, is an implementation like any other."""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.kernels import (
    Case,
    CounterExample,
    Fold,
    KernelBuilder,
    build_library,
    load_library,
    op_check,
)

# A missing compiler fails these tests on Linux; elsewhere there may be no toolchain at all.
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="built with g++ on Linux")
SOURCE = pathlib.Path(__file__).parent / "row_sum.cc"


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = build_library(SOURCE, tmp_path_factory.mktemp("foreign") / "row_sum.so", flags=["-O1"])
    load_library(path, {"test_row_sum": "row_sum", "test_scribble": "scribble"})
    return path


def reference(x):
    return jnp.sum(x, axis=1)


def foreign(target):
    def call(x):
        if x.dtype != jnp.float32:
            raise NotImplementedError(f"float32 only, not {x.dtype}")
        out = jax.ShapeDtypeStruct(x.shape[:1], x.dtype)
        return jax.ffi.ffi_call(target, out)(x)

    return call


def backward(operands, outputs, cotangents):
    return (jnp.broadcast_to(cotangents[:, None], operands[0].shape),)


def build(target):
    return (
        KernelBuilder(target)
        .reference(reference)
        .implementation("cpp", foreign(target), platforms=("cpu",), backward=backward)
        .batching(Fold(("x",)))
        .build(registry=None)
    )


def test_a_c_function_keeps_every_law(library):
    case = Case("3 x 5", ((3, 5),), dtypes=("float32",))
    empty = Case("0 x 5", ((0, 5),), dtypes=("float32",))
    kernel = build("test_row_sum")
    report = op_check(kernel, [case, empty], custom_calls=["test_row_sum"], verbose=False)
    assert {row.implementation for row in report.rows} == {"cpp"}
    x = jnp.ones((2, 3, 5))
    text = jax.jit(jax.vmap(kernel)).lower(x).as_text()
    assert text.count("@test_row_sum(%") == 1 and "tensor<6x5xf32>" in text  # folded, one call


def test_another_dtype_takes_the_reference(library):
    kernel = build("test_row_sum")
    chosen = {line.name: line for line in kernel.explain(jnp.ones((2, 3), jnp.bfloat16))}
    assert chosen["reference"].chosen and "float32 only" in chosen["cpp"].reason
    np.testing.assert_array_equal(kernel(jnp.ones((2, 3), jnp.bfloat16)), [3, 3])


def test_a_target_without_a_promise_cannot_be_exported_unasked(library):
    case = Case("3 x 5", ((3, 5),), dtypes=("float32",))
    with pytest.raises(CounterExample, match="'export'"):
        op_check(build("test_row_sum"), [case], laws=["reference", "export"])


def test_a_function_that_writes_into_its_operand_is_found(library):
    case = Case("3 x 5", ((3, 5),), dtypes=("float32",))
    with pytest.raises(CounterExample, match=r"'donation'.*changed its operand"):
        op_check(build("test_scribble"), [case], laws=["donation"])


def test_what_does_not_compile_says_why(tmp_path):
    (tmp_path / "bad.cc").write_text("int main( {")
    with pytest.raises(RuntimeError, match="error"):
        build_library(tmp_path / "bad.cc", tmp_path / "bad.so")
