"""The rule of choice: order, refusal, the platform at lowering, and what explain says of it."""

import functools
import os
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.kernels._laws import compilations
from aidx.ops import _kernel_store, registry
from aidx.ops.flash_attention import flash_attention
from aidx.ops.paged_attention import PagedAttentionConfig, paged_attention
from aidx.ops.write_kv import write_kv


@pytest.fixture
def table(monkeypatch):
    """A registry of its own."""
    monkeypatch.setattr(registry, "_TABLES", {})

    def add(name, value, platforms=(), backward=None):
        def forward(spec, operands):
            if isinstance(value, Exception):
                raise value
            return operands + value

        registry.register("op", name, platforms=platforms, backward=backward)(forward)

    return add


def run(names=None, x=0.0, direction="forward"):
    chosen = tuple(i.name for i in registry.resolve("op", names))
    call = registry.Call("op", chosen, None, direction)
    return jax.jit(lambda x: registry.dispatch(call, x))(jnp.float32(x))


@pytest.mark.smoke
def test_the_first_that_can_is_taken(table):
    table("never", NotImplementedError("odd sizes"))
    table("second", 2.0)
    table("third", 3.0)
    assert run() == 2.0
    assert run("third") == 3.0
    assert run(("never", "third")) == 3.0


def test_all_that_refuse_say_why(table):
    table("a", NotImplementedError("odd sizes"))
    table("b", NotImplementedError("no f32"))
    with pytest.raises(ExceptionGroup, match="no implementation of op") as caught:
        run()
    assert [str(e) for e in caught.value.exceptions] == ["a: odd sizes", "b: no f32"]
    assert all(isinstance(e, NotImplementedError) for e in caught.value.exceptions)


def test_another_error_is_not_a_refusal(table):
    table("broken", TypeError("a bug"))
    table("good", 1.0)
    with pytest.raises(TypeError, match="a bug"):
        run()


def test_unknown_names_are_told_the_known(table):
    table("xla", 1.0)
    with pytest.raises(ValueError, match=r"'triton'.*it has \['xla'\]"):
        run("triton")
    with pytest.raises(ValueError, match="has no implementation"):
        run(())
    with pytest.raises(ValueError, match="no op named"):
        registry.implementations("other")
    with pytest.raises(ValueError, match="already"):
        table("xla", 2.0)


def test_the_platform_is_chosen_at_lowering(table):
    table("gpu", 17.0, platforms=("cuda",))
    table("xla", 3.0)
    call = registry.Call("op", ("gpu", "xla"), None)
    traced = jax.jit(lambda x: registry.dispatch(call, x)).trace(jnp.float32(0))
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
    assert "3.0" in text["cpu"] and "1.7" not in text["cpu"]
    assert "1.7" in text["cuda"] and "3.0" not in text["cuda"]
    assert run() == 3.0


def test_a_gpu_refusal_falls_through_at_lowering(table):
    table("gpu", NotImplementedError("odd sizes"), platforms=("cuda",))
    table("xla", 3.0)
    call = registry.Call("op", ("gpu", "xla"), None)
    traced = jax.jit(lambda x: registry.dispatch(call, x)).trace(jnp.float32(0))
    assert "3.0" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_named_gpu_kernel_says_on_a_cpu_that_it_runs_elsewhere(table):
    table("gpu", 1.0, platforms=("cuda",))
    with pytest.raises(ExceptionGroup) as caught:
        run("gpu")
    assert "none of gpu runs on this platform" in str(caught.value.exceptions[0])


def test_a_gradient_takes_an_implementation_with_both_directions(table):
    table("forward_only", 1.0)
    table("both", 2.0, backward=lambda spec, x, out, ct: ct)
    assert run() == 1.0
    assert run(direction="residual") == 2.0


def test_cuda_takes_the_kernels_and_cpu_the_tiles():
    x = jax.ShapeDtypeStruct((1, 256, 2, 64), jnp.bfloat16)
    grad = jax.grad(lambda q: jnp.sum(flash_attention(q, q, q, causal=True), dtype=jnp.float32))
    traced = jax.jit(grad).trace(x)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") == 2
    assert "mosaic" not in traced.lower().as_text()


def test_cuda_takes_the_paged_kernel():
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
    half = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    pool = half(64, 2, 16, 64)
    step = jax.jit(lambda *a: paged_attention(*a, max_q=1))
    traced = step.trace(half(8, 4, 64), pool, pool, shape(8, 16), shape(8), shape(9))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_explain_names_the_choice_and_the_reasons():
    x = np.zeros((8, 2, 16), np.float32)
    lines = registry.explain("flash_attention", x, x, x, causal=True)
    assert [line.name for line in lines] == ["mosaic_gpu", "cudnn", "xla"]
    assert [line.chosen for line in lines] == [False, False, True]
    assert lines[0].reason == "runs on cuda; this is cpu"
    (only,) = registry.explain("flash_attention", x, x, x, implementation="xla")
    assert only.chosen and not only.reason


@pytest.mark.parametrize("names", ["cudnn", "mosaic_gpu"])
def test_f32_is_refused_by_the_half_precision_kernels(names):
    x = jnp.zeros((8, 2, 64))
    with pytest.raises(ExceptionGroup) as caught:
        flash_attention(x, x, x, implementation=names)
    assert "float32" in str(caught.value.exceptions[0])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bias": jnp.zeros((8, 8))}, "bias"),
        ({"mask": jnp.ones((8, 8), bool)}, "mask"),
        ({"dropout_rate": 0.1, "dropout_key": jax.random.key(0)}, "dropout"),
        ({"score_mod": lambda x, b, n, t, s: x}, "score_mod"),
        ({"mask_mod": lambda b, n, t, s: t >= s}, "mask_mod"),
        ({"sinks": jnp.ones(2)}, "sinks"),
        ({"logits_soft_cap": 2.0}, "soft_cap"),
        ({"return_lse": True}, "return_lse"),
        ({"deterministic": True}, "deterministic"),
        ({"causal": True, "query_offset": 1}, "top left"),
    ],
)
def test_an_option_cudnn_lacks_is_refused_not_ignored(options, word):
    x = jnp.zeros((8, 2, 64), jnp.bfloat16)
    with pytest.raises(ExceptionGroup) as caught:
        flash_attention(x, x, x, implementation="cudnn", **options)
    assert word in str(caught.value.exceptions[0])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"config": PagedAttentionConfig(chunk_size_kv=64)}, "chunk_size_kv=64"),
        ({"dtype": jnp.float32}, "float32"),
    ],
)
def test_what_the_paged_kernels_lack_is_refused(options, word):
    options = {"dtype": jnp.bfloat16, **options}
    dtype = options.pop("dtype")
    pool = jnp.zeros((2, 1, 16, 64), dtype)
    rows = jnp.array([[0]]), jnp.array([3]), jnp.array([0, 3])
    q = jnp.zeros((3, 2, 64), dtype)
    with pytest.raises(ExceptionGroup) as caught:
        paged_attention(q, pool, pool, *rows, implementation="mosaic_gpu", **options)
    assert word in str(caught.value.exceptions[0])


def test_return_weights_needs_the_tiles():
    x = jnp.zeros((8, 2, 64), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="return_weights"):
        flash_attention(x, x, x, return_weights=True, implementation="mosaic_gpu")


def test_a_lowered_kernel_keeps_operands_that_it_does_not_read(table):
    registry.register("op", "xla")(lambda spec, operands: operands[0] + 3.0)
    first = lambda spec, operands: operands[0] + 17.0
    registry.register("op", "gpu", platforms=("cuda",), before="xla")(first)
    assert [i.name for i in registry.implementations("op")] == ["gpu", "xla"]
    call = registry.Call("op", ("gpu", "xla"), None)
    x = jnp.float32(0)
    traced = jax.jit(lambda x, y: registry.dispatch(call, (x, y))).trace(x, x)
    assert "1.7" in traced.lower(lowering_platforms=("cuda",)).as_text()


def test_a_kernel_is_lowered_once_a_directory(table, tmp_path, monkeypatch):
    """What another process lowered is read; what its name does not describe is never kept."""
    runs = []

    def kernel(spec, operands):
        runs.append(spec)
        return operands + 17.0

    other = lambda spec, operands: operands + 3.0
    kernel.__module__ = other.__module__ = "aidx.ops.test"
    registry.register("op", "xla")(other)
    registry.register("op", "gpu", platforms=("cuda",), before="xla")(kernel)
    monkeypatch.setattr(_kernel_store, "directory", lambda: tmp_path)

    def lower(spec):
        """As a new process would."""
        registry._lowered.cache_clear()
        registry._bind.cache_clear()
        call = registry.Call("op", ("gpu", "xla"), spec)
        traced = jax.jit(lambda x: registry.dispatch(call, x)).trace(jnp.float32(0))
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    first, made = lower(1), len(runs)
    assert "1.7" in first and made
    [file] = tmp_path.iterdir()
    assert lower(1) == first and len(runs) == made
    lower(2)
    assert len(runs) > made and len(list(tmp_path.iterdir())) == 2
    file.write_bytes(file.read_bytes()[:-1])  # a broken file is as none
    made = len(runs)
    assert lower(1) == first and len(runs) > made
    held = len(list(tmp_path.iterdir()))
    lower(print)  # a function says nothing of itself
    kernel.__module__ = "elsewhere"  # nor does code that is not hashed
    lower(3)
    assert len(list(tmp_path.iterdir())) == held
    monkeypatch.setattr(_kernel_store, "directory", lambda: tmp_path / "missing")
    kernel.__module__ = "aidx.ops.test"
    assert "1.7" in lower(4)  # no room is no error


def test_a_kept_kernel_finds_its_runtime(tmp_path):
    """A second start lowers no kernel; without the import that sets MOSAIC_GPU_RUNTIME_LIB_PATH the
    first call of one would end in a segmentation fault."""
    script = """if True:
        import sys, jax, jax.numpy as jnp
        from aidx.ops.paged_attention import paged_attention
        of = lambda *shape, dtype=jnp.int32: jax.ShapeDtypeStruct(shape, dtype)
        q, pool = of(4, 8, 128, dtype=jnp.bfloat16), of(16, 2, 64, 128, dtype=jnp.bfloat16)
        call = jax.jit(paged_attention).trace(q, pool, pool, of(4, 8), of(4), of(5))
        call.lower(lowering_platforms=("cuda",))
        modules = ("jax.experimental.pallas.mosaic_gpu", "jax.experimental.mosaic.gpu.core")
        print(*(name in sys.modules for name in modules))
    """
    cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PLATFORMS": "cpu"}
    start = functools.partial(
        subprocess.check_output, [sys.executable, "-c", script], env=os.environ | cache, text=True
    )
    assert start() == "True True\n"
    assert start() == "False True\n"


def two_outputs(table, platform):
    """An op of two operands and outputs, whose kernel refuses anything batched by JAX."""

    def kernel(spec, operands):
        x, tables, none = operands
        assert (x.shape, tables.shape, none) == ((3,), (2, 3), None)
        return {"y": x * 17.0 + tables[0], "n": jnp.argmax(x) + tables.sum().astype(jnp.int32)}

    def plain(spec, operands):
        x, tables, _ = operands
        return {"y": x * 3.0 + tables[0], "n": jnp.argmax(x) + tables.sum().astype(jnp.int32)}

    registry.register("op", "kernel", platforms=(platform,))(kernel)
    registry.register("op", "xla")(plain)
    call = lambda names: registry.Call("op", names, None)
    return lambda names: lambda x, tables: registry.dispatch(call(names), (x, tables, None))


@pytest.mark.smoke
@pytest.mark.parametrize("names", [("kernel",), ("kernel", "xla"), ("xla",)], ids="+".join)
def test_vmap_equals_a_loop(table, names):
    """Named and chosen, any axes, nested, empty; in jit and out of it without compiling again."""
    f = two_outputs(table, "cpu")(names)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 5, 3)), jnp.float32)
    tables = jnp.arange(24.0).reshape(2, 3, 4)
    stack = lambda *rows: jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)
    cases = (
        ((0, None), (x[:, 0], tables[..., 0]), lambda i: (x[i, 0], tables[..., 0])),
        ((1, 2), (x[:, 0].T, tables), lambda i: (x[i, 0], tables[..., i])),
        ((None, -1), (x[0, 0], tables), lambda i: (x[0, 0], tables[..., i])),
    )
    for axes, args, row in cases:
        want = stack(*(f(*row(i)) for i in range(4)))
        turned = {"y": want["y"].T, "n": want["n"]}
        for transform in (lambda g: g, jax.jit):
            out = transform(jax.vmap(f, axes))(*args)
            chex.assert_trees_all_close(out, want, rtol=1e-6)
            out = transform(jax.vmap(f, axes, {"y": 1, "n": 0}))(*args)
            chex.assert_trees_all_close(out, turned, rtol=1e-6)
    twice = jax.vmap(jax.vmap(f, (0, None)), (0, 2))
    want = stack(*(stack(*(f(x[i, j], tables[..., i]) for j in range(5))) for i in range(4)))
    chex.assert_trees_all_close(jax.jit(twice)(x, tables), want, rtol=1e-6)
    mapped = jax.vmap(f, (0, None))
    none = mapped(x[:0, 0], tables[..., 0])
    assert (none["y"].shape, none["n"].shape) == ((0, 3), (0,))
    with compilations() as count:
        mapped(x[:, 1], tables[..., 1] + 0.0)
    assert count[0] <= 1  # the addition


@pytest.mark.parametrize("names", [("kernel",), ("kernel", "xla")], ids="+".join)
def test_gradients_around_it_and_vmap_change_places(table, names):
    dispatch = two_outputs(table, "cpu")(names)

    @jax.custom_vjp
    def f(x, tables):
        return dispatch(x, tables)["y"]

    slopes = lambda x, tables: dispatch(x, tables)["y"] - tables[0]
    f.defvjp(lambda *saved: (f(*saved), saved), lambda s, c: (c * slopes(*s), jnp.zeros((2, 3))))
    x, tables = jnp.arange(12.0).reshape(4, 3), jnp.arange(6.0).reshape(2, 3)
    one = lambda x: jnp.sum(jnp.sin(f(x, tables)))
    want = jnp.stack([jax.grad(one)(row) for row in x])
    assert np.abs(want).max() > 1
    inside = jax.vmap(jax.grad(one))
    outside = jax.grad(lambda x: jnp.sum(jnp.sin(jax.vmap(f, (0, None))(x, tables))))
    for gradient in (inside, outside, jax.jit(inside), jax.jit(outside)):
        np.testing.assert_allclose(gradient(x), want, rtol=1e-5)


def test_the_platform_of_a_vmapped_call_is_chosen_at_lowering(table):
    f = two_outputs(table, "cuda")(("kernel", "xla"))
    rows = jax.ShapeDtypeStruct((4, 3), jnp.float32), jax.ShapeDtypeStruct((2, 3), jnp.float32)
    traced = jax.jit(jax.vmap(f, (0, None))).trace(*rows)
    text = {p: traced.lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda")}
    assert "1.7" in text["cuda"] and "3.0" not in text["cuda"] and "while" in text["cuda"]
    assert "1.7" not in text["cpu"] and "while" not in text["cpu"]  # JAX batches what it can


@pytest.mark.parametrize("names", [None, "mosaic_gpu"])
def test_kernels_of_the_pools_are_lowered_under_vmap(names):
    half = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    whole = lambda *s: jax.ShapeDtypeStruct(s, jnp.int32)
    pool = (4, 2, 16, 64)

    def count(f, axes, *shapes):
        traced = jax.jit(jax.vmap(f, axes)).trace(*shapes)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
        return text.count("@mosaic_gpu") and text.count("stablehlo.while")

    write = lambda *args: write_kv(*args, implementation=names)
    tokens, pools = half(3, 2, 2, 64), half(3, *pool)
    assert count(write, (0, 0, 0, 0, None), pools, pools, tokens, tokens, whole(2)) == 1
    read = lambda *args: paged_attention(*args, max_q=1, implementation=names)
    tables = whole(2, 4), whole(2), whole(3)
    assert count(read, (0, *[None] * 5), half(3, 2, 4, 64), half(*pool), half(*pool), *tables) == 1


def test_equal_layers_are_traced_once():
    """Twelve calls of one shape lower to one function, not twelve copies of the loops."""
    x = jnp.zeros((64, 2, 8))

    def stack(x, layers):
        for _ in range(layers):
            x = flash_attention(x, x, x, causal=True)
        return x

    size = lambda layers: len(jax.jit(lambda x: stack(x, layers)).lower(x).as_text())
    assert size(12) < 1.5 * size(1)
    chex.assert_shape(stack(x, 1), x.shape)
