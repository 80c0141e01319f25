"""op_check passes what is right and catches each kind of broken kernel, with a simple example."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.kernels import (
    Case,
    CounterExample,
    KernelBuilder,
    Tolerance,
    op_check,
    standard_cases,
)
from aidx.kernels._compare import Mismatch, differs

F32 = ("float32",)
SMALL = Case("2 x 3", ((2, 3), (3,)), dtypes=F32)


def reference(x, scale):
    return jnp.tanh(x) * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def check(fn, laws, case=SMALL, backward=None, batching="vmap", reference=reference):
    """Checks fn as an implementation of `reference`; the counterexample."""
    builder = KernelBuilder("broken").reference(reference).batching(batching)
    kernel = builder.implementation("own", fn, backward=backward).build(registry=None)
    with pytest.raises(CounterExample) as caught:
        op_check(kernel, [case], laws=laws)
    assert caught.value.row.law == laws[-1], str(caught.value)
    return caught.value


@pytest.mark.smoke
def test_a_right_kernel_keeps_every_law(capsys):
    def own(x, scale):
        return scale.reshape((1,) * (x.ndim - 1) + scale.shape) * jnp.tanh(x)

    def backward(operands, outputs, cotangents):
        x, scale = operands
        row = scale.reshape((1,) * (x.ndim - 1) + scale.shape)
        dscale = (cotangents * jnp.tanh(x)).sum(tuple(range(x.ndim - 1)))
        return cotangents * row * (1 - jnp.tanh(x) ** 2), dscale

    kernel = (
        KernelBuilder("right")
        .reference(reference)
        .implementation("own", own, backward=backward)
        .implementation("gpu", own, platforms=("cuda",))
        .build(registry=None)
    )
    report = op_check(kernel, [SMALL])
    printed = capsys.readouterr().out
    assert printed.strip() == str(report)
    results = {row.law: row.result for row in report.rows if row.implementation == "own"}
    idle = {law for law, result in results.items() if result != "ok"}
    assert len(results) == 12 and idle <= {"devices", "unread"}
    assert "runs on cuda; this is cpu" in printed


def test_the_fixed_shapes_are_tried_in_each_dtype():
    kernel = KernelBuilder("shapes").reference(reference).build(registry=None)
    cases = standard_cases(lambda rows, width: ((rows, width), (width,)), gradients=False)
    report = op_check(kernel, cases, laws=["reference"], verbose=False)
    assert {(row.case.split()[0], row.dtype) for row in report.rows} == {
        (name, dtype)
        for name in ("odd", "one", "empty", "padded")
        for dtype in ("float32", "bfloat16")
    }


# --- values ---------------------------------------------------------------------------------------


def test_a_wrong_value_is_shrunk_to_the_one_element_that_matters():
    def own(x, scale):
        return jnp.where(x < -1.0, 1.0, 0.0) + reference(x, scale)

    found = check(own, ["reference"], Case("3 x 5", ((3, 5), (5,)), dtypes=F32))
    x, scale = found.operands
    assert np.count_nonzero(x) == 1 and np.count_nonzero(scale) == 0
    assert "got 1.0, want" in str(found) and "'3 x 5' in float32" in str(found)


def test_a_wrong_tail_is_found_in_the_padded_case():
    def own(x, scale):
        whole = x.shape[-1] // 128 * 128 or x.shape[-1]
        out = reference(x, scale)
        return out.at[..., whole:].set(0.0)

    kernel = KernelBuilder("tail").reference(reference).implementation("own", own).build(None)
    cases = standard_cases(lambda rows, width: ((rows, width), (width,)), dtypes=F32)
    with pytest.raises(CounterExample) as caught:
        op_check(kernel, cases, laws=["reference"])
    assert caught.value.row.case == "padded 5 x 129"


def test_a_wrong_dtype_is_found():
    own = lambda x, scale: reference(x, scale).astype(jnp.float32)
    case = Case("2 x 3", ((2, 3), (3,)), dtypes=("float32", "bfloat16"), gradients=False)
    assert "float32(2, 3), want bfloat16(2, 3)" in str(check(own, ["reference"], case))


def test_accumulating_in_bfloat16_is_found():
    reference = lambda x: jnp.sum(x.astype(jnp.float32), -1).astype(x.dtype)
    own = lambda x: jax.lax.scan(lambda c, y: (c + y, None), jnp.zeros(x.shape[:1], x.dtype), x.T)[
        0
    ]
    case = Case("long", ((2, 999),), dtypes=("bfloat16",), gradients=False)
    check(own, ["reference"], case, reference=reference)


def test_a_wrong_gradient_is_found():
    def backward(operands, outputs, cotangents):
        return cotangents, jnp.zeros_like(operands[1])

    check(reference, ["reference", "gradient"], backward=backward)


def test_a_wrong_gradient_of_the_reference_is_found():
    @jax.custom_vjp
    def twice(x):
        return 2 * x

    twice.defvjp(lambda x: (2 * x, None), lambda _, c: (3 * c,))
    wrong = lambda x, scale: reference(twice(x), scale)
    found = check(wrong, ["reference", "gradient", "finite differences"], reference=wrong)
    assert "differences" in found.row.detail


# --- transformations ------------------------------------------------------------------------------


def test_a_wrong_batching_rule_is_found():
    def rule(apply, axis_size, in_batched, x, scale):
        scale = scale[0] if in_batched[1] else scale  # the first element's scale for all
        return jax.vmap(lambda x: reference(x, scale))(x), True

    found = check(reference, ["reference", "vmap"], batching=rule)
    assert "vmap over (0, 0)" in found.row.detail


def test_what_cannot_be_vmapped_is_found():
    def own(x, scale):
        if x.ndim != 2 or jnp.shape(x) == (6, 3):
            raise NotImplementedError("2 rows only")
        return reference(x, scale)

    def rule(apply, axis_size, in_batched, x, scale):
        return apply(x.reshape(-1, 3), scale), True

    builder = KernelBuilder("no_vmap").reference(reference).batching(rule)
    kernel = builder.implementation("own", own).build(registry=None)
    case = Case("2 x 3", ((2, 3), (3,)), dtypes=F32, vmap=((0, None),))
    with pytest.raises(CounterExample, match="refuses here: own: 2 rows only"):
        op_check(kernel, [case], laws=["reference", "vmap"])


def test_another_result_under_jit_is_found():
    def own(x, scale):
        return reference(x, scale) + isinstance(x, jax.core.Tracer)

    call = lambda x, scale, implementation: own(x, scale)
    with pytest.raises(CounterExample, match="'jit'"):
        op_check(call, [SMALL], reference=reference, implementations=["own"], laws=["jit"])


def test_a_program_that_cannot_be_exported_is_found():
    def own(x, scale):
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.pure_callback(
            lambda x, s: np.tanh(x) * np.asarray(s), shape, x, scale, vmap_method="sequential"
        )

    case = Case("2 x 3", ((2, 3), (3,)), dtypes=F32, gradients=False)
    call = KernelBuilder("callback").reference(reference).implementation("own", own).build(None)
    with pytest.raises(CounterExample, match="'export'"):
        op_check(call, [case], laws=["reference", "export"])


# --- what a run must not do -----------------------------------------------------------------------


def test_a_random_kernel_is_found():
    rng = np.random.default_rng(0)

    def own(x, scale):
        noise = lambda x: (x + rng.normal(size=x.shape) * 1e-6).astype(np.float32)
        x = jax.pure_callback(noise, jax.ShapeDtypeStruct(x.shape, x.dtype), x)
        return reference(x, scale)

    case = Case("2 x 3", ((2, 3), (3,)), dtypes=F32, gradients=False)
    check(own, ["reference", "determinism"], case)
    check(own, ["reference", "donation"], case)
    laws = ["reference", "determinism", "donation"]
    given = dict(reference=reference, laws=laws, verbose=False)
    report = op_check(own, [case], repeatable=False, **given)
    assert [row.law for row in report.rows] == ["reference", "donation"]
    off = lambda x, scale: own(x, scale) * (1 + 1e-2)
    with pytest.raises(CounterExample):
        op_check(off, [case], repeatable=False, **given)


def test_a_write_that_is_not_in_place_is_found():
    own = lambda pool, x: (pool.at[0].set(x).astype(jnp.bfloat16),)
    case = Case("4 x 3", ((4, 3), (3,)), dtypes=F32, gradients=False, donate=(0,))
    found = check(own, ["reference", "donation"], case, reference=own)
    assert "donated operand 0 was copied" in found.row.detail
    in_place = lambda pool, x: (pool.at[0].set(x),)
    op_check(in_place, [case], reference=in_place, laws=["donation"], verbose=False)


def test_a_read_of_what_must_not_be_read_is_found():
    where = lambda x, keep: jnp.sum(jnp.where(keep, x, 0.0))
    times = lambda x, keep: jnp.sum(jnp.where(keep, x, x - x))  # 0, unless it is NaN
    case = Case(
        "5 of 8",
        ((8,), np.arange(8) < 5),
        dtypes=F32,
        unread=lambda x, keep: (~keep, None),
    )
    laws = ["reference", "unread"]
    found = check(times, laws, case, reference=where)
    assert "nan where it must not be read" in found.row.detail
    op_check(where, [case], reference=where, laws=[*laws, "nan and inf"], verbose=False)


@pytest.mark.parametrize(
    "own",
    [
        lambda x, scale: reference(jnp.nan_to_num(x), scale),  # hides NaN
        lambda x, scale: reference(x, scale) + 0 * jnp.sum(x),  # spreads it
    ],
    ids=["hidden", "spread"],
)
def test_nan_in_the_wrong_places_is_found(own):
    assert "nan in operand 0" in check(own, ["reference", "nan and inf"]).row.detail


def test_a_compilation_for_every_call_is_found():
    own = lambda x, scale: jax.jit(lambda x: reference(x, scale))(x)
    with pytest.raises(CounterExample, match=r"third call .* compiled 1 programs"):
        op_check(own, [SMALL], reference=reference, laws=["recompilation"])


# --- what is said ---------------------------------------------------------------------------------


def test_an_implementation_that_refuses_everything_is_not_called_right():
    def own(x, scale):
        raise NotImplementedError("later")

    kernel = KernelBuilder("idle").reference(reference).implementation("own", own).build(None)
    with pytest.raises(CounterExample, match=r"refused every case.*own: later"):
        op_check(kernel, [SMALL], laws=["reference"])


def test_an_error_of_the_kernel_passes_through():
    own = lambda x, scale: jnp.zeros(3) @ jnp.zeros(4)
    kernel = KernelBuilder("bug").reference(reference).implementation("own", own).build(None)
    with pytest.raises(TypeError, match="dot_general"):
        op_check(kernel, [SMALL], laws=["reference"])


def test_each_configuration_is_tried():
    def own(x, scale, *, config):
        return reference(x, scale) + (0.1 if config == 128 else 0.0)

    builder = KernelBuilder("tuned").reference(reference).implementation("own", own)
    kernel = builder.tuning((64, 128)).build(registry=None)
    with pytest.raises(CounterExample) as caught:
        op_check(kernel, [SMALL], laws=["reference"])
    assert caught.value.row.implementation == "own 128"


def test_a_tolerance_is_kept():
    own = lambda x, scale: reference(x, scale) + 1e-3
    builder = KernelBuilder("loose").reference(reference).implementation("own", own)
    op_check(
        builder.tolerance(Tolerance(float32=1e-2)).build(None), [SMALL], laws=["reference"],
        verbose=False,
    )  # fmt: skip
    with pytest.raises(CounterExample):
        op_check(builder.build(None), [SMALL], laws=["reference"])


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="needs a reference"):
        op_check(reference, [SMALL])
    with pytest.raises(ValueError, match="0 cases"):
        op_check(reference, [], reference=reference)
    with pytest.raises(ValueError, match="laws=\\['speed'\\]"):
        op_check(reference, [SMALL], reference=reference, laws=["speed"])


def test_results_are_compared_as_they_should_be():
    nan, inf = np.nan, np.inf
    same = functools.partial(differs, tolerance=0.5)
    assert same(np.array([nan, inf]), np.array([nan, inf])) == 0.0
    assert same(np.array([3.0]), np.array([2.0])) == pytest.approx(1 / 3)
    for got, want in [([nan], [1.0]), ([1.0], [nan]), ([inf], [-inf]), ([9.0], [inf]), ([4], [5])]:
        assert isinstance(same(np.array(got), np.array(want)), Mismatch), (got, want)
    assert isinstance(same(np.zeros(2), np.zeros(3)), Mismatch)
    assert isinstance(same((np.zeros(2),), [np.zeros(2)]), Mismatch)
    assert same(np.zeros((0, 3)), np.zeros((0, 3))) == 0.0
