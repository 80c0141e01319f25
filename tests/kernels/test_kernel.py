"""The builder, the registry, and the callable under every transformation."""

import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import aidx
from aidx.kernels import REGISTRY, CustomKernelRegistry, Fold, KernelBuilder, register
from aidx.ops import registry as ops

X = jnp.arange(6.0).reshape(2, 3)
SCALE = jnp.array([1.0, 2.0, -1.0])


def reference(x, scale, *, power=2):
    return x**power * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def own(x, scale, *, power=2):
    if power != 2:
        raise NotImplementedError(f"squares only, not {power=}")
    return x * x * scale.reshape((1,) * (x.ndim - 1) + scale.shape)


def marked(value):
    return lambda x, scale, *, power=2: reference(x, scale, power=power) + value


@pytest.fixture
def build():
    """Registered kernels, unregistered after the test."""
    names = []

    def make(builder):
        kernel = builder.build()
        names.append(kernel.name)
        return kernel

    yield make
    for name in names:
        if name in REGISTRY.list():
            REGISTRY.unregister(name)


# --- choosing -------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_the_first_that_can_is_taken_and_explained(build):
    kernel = build(
        KernelBuilder("power")
        .reference(reference)
        .implementation("gpu", marked(9.0), platforms=("cuda",))
        .implementation("odd", marked(7.0), when=lambda x, s, power: power == 2 and "it is even")
        .implementation("own", own)
    )
    lines = aidx.explain("power", X, SCALE)
    assert [(line.name, line.chosen) for line in lines] == [
        ("gpu", False), ("odd", False), ("own", True), ("reference", False),
    ]  # fmt: skip
    assert [line.reason for line in lines[:2]] == ["runs on cuda; this is cpu", "it is even"]
    np.testing.assert_allclose(kernel(X, SCALE), reference(X, SCALE))
    np.testing.assert_allclose(kernel(X, SCALE, power=3), reference(X, SCALE, power=3) + 7)
    only = kernel(X, scale=SCALE, implementation=("own", "reference"), power=3)
    np.testing.assert_allclose(only, reference(X, SCALE, power=3))
    text = jax.jit(kernel).trace(X, SCALE).lower(lowering_platforms=("cuda",)).as_text()
    assert "9.0" in text and "7.0" not in text
    with pytest.raises(ExceptionGroup, match="no implementation of power"):
        kernel(X, SCALE, implementation="own", power=3)


def test_a_config_reaches_the_implementation_that_takes_one():
    tuned = lambda x, scale, *, power=2, config: reference(x, scale, power=power) + config
    builder = KernelBuilder("tuned").reference(reference).implementation("tuned", tuned)
    kernel = builder.tuning((10.0, 20.0)).build(registry=None)
    zero = jnp.zeros_like(X)
    assert kernel.tuning == (10.0, 20.0)
    assert kernel(zero, SCALE)[0, 0] == 10 and kernel(zero, SCALE, config=20.0)[0, 0] == 20
    with pytest.raises(ValueError, match=r"config=30.0 is not in the tuning space of tuned"):
        kernel(zero, SCALE, config=30.0)
    with pytest.raises(ExceptionGroup) as caught:
        kernel(zero, SCALE, config=20.0, implementation="reference")
    assert "takes no config" in str(caught.value.exceptions[0])


def test_static_options_must_be_hashable():
    kernel = KernelBuilder("static").reference(reference).build(registry=None)
    with pytest.raises(TypeError, match=r"power of static is static and must be hashable"):
        kernel(X, SCALE, power=[2])
    with pytest.raises(TypeError, match="missing a required argument: 'scale'"):
        kernel(X)


def test_another_compute_capability_is_refused(monkeypatch):
    builder = KernelBuilder("capable").reference(reference)
    kernel = builder.implementation("own", own, compute_capability=("9.0",)).build(registry=None)
    assert kernel.explain(X, SCALE)[0].chosen  # no GPU here: nothing is known of it
    device = types.SimpleNamespace(compute_capability="8.0")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    other = builder.implementation("own", own, compute_capability=("9.0", "10.0")).build(None)
    assert other.explain(X, SCALE)[0].reason == "needs compute capability 9.0, 10.0, this is 8.0"


# --- transformations ------------------------------------------------------------------------------


def full_rule(apply, size, batched, x, scale):
    """Rows of all elements at once; a vmapped scale goes one by one."""
    if batched[1]:
        x = x if batched[0] else jnp.broadcast_to(x, (size, *x.shape))
        return jnp.stack([apply(x[i], scale[i]) for i in range(size)]), True
    return apply(x.reshape(-1, 3), scale).reshape(x.shape), True


@pytest.mark.parametrize(
    "batching",
    ["vmap", "sequential", Fold(("x",)), full_rule],
    ids=["vmap", "sequential", "fold", "rule"],
)
def test_every_batching_rule_is_the_loop(batching):
    builder = KernelBuilder("batched").reference(reference).implementation("own", own)
    kernel = builder.batching(batching).build(registry=None)
    x, scale = jnp.stack([X, X - 2, -X]), jnp.stack([SCALE, 2 * SCALE, SCALE - 1])
    loss = lambda f: lambda x, s: jnp.sum(jnp.sin(f(x, s)))
    for axes in ((0, None), (0, 0), (None, 0)):
        args = x if axes[0] == 0 else X, scale if axes[1] == 0 else SCALE
        ours, theirs = (jax.vmap(f, axes)(*args) for f in (kernel, reference))
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        each = [jax.vmap(jax.grad(loss(f), (0, 1)), axes)(*args) for f in (kernel, reference)]
        chex.assert_trees_all_close(*each, rtol=1e-5, atol=1e-5)
        over = [jax.grad(loss(jax.vmap(f, axes)), (0, 1))(*args) for f in (kernel, reference)]
        chex.assert_trees_all_close(*over, rtol=1e-5, atol=1e-4)
    twice = [jax.vmap(jax.vmap(f, (0, None)), (None, 0))(x, scale) for f in (kernel, reference)]
    chex.assert_trees_all_close(*twice, rtol=1e-6)


@pytest.mark.parametrize("batching", ["vmap", "sequential", Fold(("x",))], ids=str)
def test_cotangents_alone_are_vmapped(batching):
    builder = KernelBuilder("pulled").reference(reference).implementation("own", own)
    kernel = builder.batching(batching).build(registry=None)
    rows = jnp.stack([X, X - 1])
    ours, theirs = (jax.vmap(jax.vjp(f, X, SCALE)[1])(rows) for f in (kernel, reference))
    chex.assert_trees_all_close(ours, theirs, rtol=1e-6)


def test_a_fold_is_one_call():
    builder = KernelBuilder("folded").reference(reference).batching(Fold(("x",)))
    shapes = []
    seen = lambda x, scale, *, power=2: shapes.append(x.shape) or reference(x, scale, power=power)
    kernel = builder.implementation("own", seen).build(registry=None)
    jax.vmap(kernel, (0, None))(jnp.stack([X] * 4), SCALE)
    assert shapes == [(8, 3)] or set(shapes) == {(2, 3), (8, 3)}


def test_the_gradient_is_the_declared_one_else_the_references():
    def backward(operands, outputs, cotangents, *, power):
        return 100 * cotangents, None

    gradient = lambda kernel: jax.grad(lambda x, s: jnp.sum(kernel(x, s)), (0, 1))(X, SCALE)
    builder = KernelBuilder("gradient").reference(reference).implementation("own", own)
    chex.assert_trees_all_close(gradient(builder.build(None)), gradient(reference))
    dx, dscale = gradient(builder.vjp(backward).build(None))
    assert (dx == 100).all() and (dscale == 0).all()
    dx, _ = gradient(
        KernelBuilder("its_own")
        .reference(reference)
        .implementation("own", own, backward=lambda *a, power: (7 * a[2], None))
        .vjp(backward)
        .build(None)
    )
    assert (dx == 7).all()
    wrong = builder.vjp(lambda operands, outputs, cotangents, power: (cotangents,)).build(None)
    with pytest.raises(ValueError, match="1 cotangents for 2 operands"):
        gradient(wrong)
    wrong = builder.vjp(lambda operands, outputs, c, power: (c[0], None)).build(None)
    with pytest.raises(ValueError, match=r"a cotangent \(3,\) for an operand \(2, 3\)"):
        gradient(wrong)


def test_integers_none_and_trees_are_operands():
    def pick(tree, index, bias=None):
        x, y = tree["x"][index], tree["y"][None]
        return (x + y if bias is None else x + y + bias), index + 1

    kernel = KernelBuilder("pick").reference(pick).build(registry=None)
    tree = {"x": X, "y": SCALE}
    index = jnp.array([1, 1])
    value, following = kernel(tree, index)
    np.testing.assert_allclose(value, X[index] + SCALE[None])
    assert following.tolist() == [2, 2]
    loss = lambda tree, bias: jnp.sum(kernel(tree, index, bias)[0] * 2)
    gradient, bias = jax.grad(loss, (0, 1))(tree, jnp.ones((2, 3)))
    assert gradient["x"].tolist() == [[0, 0, 0], [4, 4, 4]] and (bias == 2).all()
    assert (jax.grad(loss)(tree, None)["y"] == 4).all()
    given = []
    backward = lambda operands, outputs, cotangents: given.append(cotangents) or (None,) * 3
    own = KernelBuilder("pick").reference(pick).vjp(backward).implementation("own", pick)
    jax.grad(lambda tree: jnp.sum(own.build(None)(tree, index)[0]))(tree)
    assert given[0][0].shape == (2, 3) and given[-1][1] is None  # integers have no cotangent


def test_remat_saves_the_named_output():
    runs = []

    def counted(x, scale, *, power=2):
        runs.append(1)
        return reference(x, scale, power=power)

    kernel = KernelBuilder("rematted").reference(reference).implementation("own", counted)
    kernel = kernel.build(registry=None)
    policy = jax.checkpoint_policies.save_only_these_names("rematted_out")
    loss = lambda x: jnp.sum(jax.checkpoint(kernel, policy=policy)(x, SCALE))
    expected = jax.grad(lambda x: jnp.sum(reference(x, SCALE)))(X)
    np.testing.assert_allclose(jax.grad(loss)(X), expected)
    jaxpr = str(jax.make_jaxpr(jax.grad(loss))(X))
    assert "rematted_out" in jaxpr


def test_a_pallas_kernel_is_an_implementation():
    def body(x_ref, scale_ref, out_ref):
        x = x_ref[...]
        out_ref[...] = x * x * scale_ref[...][None]

    def pallas(x, scale, *, power=2):
        if power != 2 or x.ndim != 2:
            raise NotImplementedError(f"squares of matrices, not {power=} of {x.shape}")
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return pl.pallas_call(body, out_shape=out, interpret=True)(x, scale)

    builder = KernelBuilder("pallas").reference(reference).implementation("pallas", pallas)
    kernel = builder.build(registry=None)
    np.testing.assert_allclose(kernel(X, SCALE, implementation="pallas"), reference(X, SCALE))
    batch = jnp.stack([X, X + 1])
    ours = jax.vmap(jax.grad(lambda x: jnp.sum(kernel(x, SCALE, implementation="pallas"))))(batch)
    np.testing.assert_allclose(ours, 2 * batch * SCALE[None, None], rtol=1e-6)


def test_equal_layers_are_traced_once():
    runs = []
    traced = lambda x, scale, *, power=2: runs.append(1) or reference(x, scale, power=power)
    kernel = KernelBuilder("layers").reference(reference).implementation("own", traced).build(None)

    def stack(x):
        for _ in range(6):
            x = kernel(x, SCALE)
        return x

    jax.jit(stack).lower(X)
    assert len(runs) == 1


# --- errors at registration -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fn", "words"),
    [
        (lambda x, *, power=2: x, "takes 1 operands ('x',), not 2 ('x', 'scale')"),
        (lambda x, weight, *, power=2: x, "operand 1 is 'weight', not 'scale'"),
        (lambda x, scale: x, "lacks the option 'power'"),
        (lambda x, scale, *, power=3: x, "the default of power is 3, not 2"),
        (lambda x, scale, *, power: x, "the default of power is absent, not 2"),
        (lambda x, scale, *, power=2, fast=True: x, "an option 'fast' of its own"),
        (lambda x, scale, power=2: x, "takes 3 operands"),
    ],
)
def test_another_signature_is_refused_saying_what_differs(fn, words):
    builder = KernelBuilder("differs").reference(reference).implementation("own", fn)
    with pytest.raises(ValueError) as caught:
        builder.build(registry=None)
    assert "'own' of differs has another signature" in str(caught.value)
    assert words in str(caught.value)


def test_what_cannot_be_a_kernel_is_refused(build):
    builder = KernelBuilder("bad").reference(reference)
    with pytest.raises(ValueError, match="bad has no reference"):
        KernelBuilder("bad").implementation("own", own).build()
    with pytest.raises(ValueError, match="an implementation named 'own' already"):
        builder.implementation("own", own).implementation("own", own).build()
    with pytest.raises(ValueError, match="an implementation named 'reference' already"):
        builder.implementation("reference", own).build()
    with pytest.raises(ValueError, match=r"takes \*xs: name every parameter"):
        KernelBuilder("bad").reference(lambda *xs: xs).build()
    with pytest.raises(ValueError, match="has a parameter 'config'"):
        KernelBuilder("bad").reference(lambda x, *, config: x).build()
    with pytest.raises(ValueError, match="3 operands, the reference 2"):
        builder.sharding("n d, d, d -> n d").build()
    with pytest.raises(ValueError, match="no factor of"):
        builder.sharding("n d, d -> n d", replicated=("e",))
    with pytest.raises(ValueError, match="reads 'operands -> outputs'"):
        builder.sharding("n d, d")
    with pytest.raises(ValueError, match="batching is 'vmap'"):
        builder.batching("loop").build()
    with pytest.raises(ValueError, match="names no operands"):
        builder.batching(Fold(("y",))).build()
    with pytest.raises(ValueError, match="no implementation takes a config"):
        builder.tuning((1, 2)).build()
    with pytest.raises(ValueError, match="must be hashable"):
        builder.tuning(({},)).build()
    with pytest.raises(ValueError, match="distinct"):
        builder.tuning((1, 1)).build()
    takes = lambda x, scale, *, power=2, config=1: x
    with pytest.raises(ValueError, match="declare a tuning space"):
        builder.implementation("tuned", takes).build()
    build(builder)
    with pytest.raises(ValueError, match="there is an op named 'bad' already"):
        builder.build()
    with pytest.raises(ValueError, match="there is an op named 'flash_attention' already"):
        KernelBuilder("flash_attention").reference(reference).build()


# --- the registry ---------------------------------------------------------------------------------


def test_a_kernel_is_listed_found_and_forgotten(build):
    kernel = build(KernelBuilder("listed").reference(reference))
    assert "listed" in REGISTRY.list() and REGISTRY.get("listed") is kernel
    assert [i.name for i in aidx.implementations("listed")] == ["reference"]
    REGISTRY.unregister("listed")
    for call in (
        REGISTRY.get,
        REGISTRY.unregister,
        lambda n: REGISTRY.replace(n, kernel).__enter__(),
    ):
        with pytest.raises(ValueError, match="no kernel named 'listed'"):
            call("listed")
    with pytest.raises(ValueError, match="no op named 'listed'"):
        aidx.implementations("listed")
    np.testing.assert_allclose(kernel(X, SCALE), reference(X, SCALE))


def test_a_replacement_reaches_compiled_programs_and_leaves_them(build):
    kernel = build(KernelBuilder("replaced").reference(reference))
    other = KernelBuilder("other").reference(marked(5.0)).build(registry=None)
    model = jax.jit(lambda x: kernel(x, SCALE))
    before = model(X)
    with REGISTRY.replace("replaced", other):
        np.testing.assert_allclose(model(X), before + 5)
        assert REGISTRY.get("replaced") is other
        assert aidx.explain("replaced", X, SCALE)[0].chosen
        with REGISTRY.replace("replaced", KernelBuilder("c").reference(marked(6.0)).build(None)):
            np.testing.assert_allclose(model(X), before + 6)
        np.testing.assert_allclose(model(X), before + 5)
    np.testing.assert_allclose(model(X), before)
    assert REGISTRY.get("replaced") is kernel


def test_register_adds_to_a_kernel_that_others_hold(build):
    kernel = build(KernelBuilder("grown").reference(reference))

    @register("grown", "late", when=lambda x, s, power: None if power == 2 else "squares only")
    def late(x, scale, *, power=2):
        return reference(x, scale, power=power) + 3

    np.testing.assert_allclose(kernel(X, SCALE), reference(X, SCALE) + 3)
    register("grown", "first", before="late")(marked(4.0))
    assert [i.name for i in aidx.implementations("grown")] == ["first", "late", "reference"]
    assert kernel.explain(X, SCALE, implementation="late", power=3)[0].reason == "squares only"
    with pytest.raises(ValueError, match="operand 1 is 'y', not 'scale'"):
        register("grown", "wrong")(lambda x, y, *, power=2: x)
    with pytest.raises(ValueError, match="named 'late' already"):
        register("grown", "late")(own)
    with pytest.raises(ValueError, match=r"with aidx\.kernels\.register"):
        ops.register("grown", "plain")(own)
    with pytest.raises(ValueError, match="no op named 'nothing'"):
        register("nothing", "own")


def test_register_adds_to_an_op_of_aidx(monkeypatch):
    monkeypatch.setitem(ops._TABLES, "flash_attention", ops.implementations("flash_attention"))

    @register("flash_attention", "ones", before="xla", when=lambda spec, o: spec.left and "window")
    def ones(spec, operands):
        return jnp.ones_like(operands.q), jnp.zeros(operands.q.shape[:3])

    x = jnp.zeros((4, 1, 8))
    assert (aidx.flash_attention(x, x, x) == 1).all()
    windowed = aidx.explain("flash_attention", x, x, x, causal=True, window=2)
    assert {line.name: line.reason for line in windowed}["ones"] == "window"
    with pytest.raises(ValueError, match="test the compute capability in `when`"):
        register("flash_attention", "other", compute_capability=("9.0",))


def test_entry_points_of_other_packages_are_loaded_once(monkeypatch, build):
    kernel = KernelBuilder("plugged").reference(reference).build(registry=None)
    module = types.ModuleType("plugin")
    module.kernel, module.setup, module.number = kernel, lambda registry: calls.append(registry), 3
    calls = []
    monkeypatch.setitem(sys.modules, "plugin", module)
    point = lambda name: aidx.kernels.catalog.importlib.metadata.EntryPoint(
        name, f"plugin:{name}", "aidx.kernels"
    )
    found = [point("kernel"), point("setup")]
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: found)
    registry = CustomKernelRegistry()
    assert registry.load_entry_points() == ("kernel", "setup")
    assert registry.list() == ("plugged",) and calls == [registry]
    assert [i.name for i in aidx.implementations("plugged")] == ["reference"]
    assert registry.load_entry_points() == ()
    registry.unregister("plugged")
    found.append(point("number"))
    with pytest.raises(TypeError, match="neither a CustomKernel nor a function"):
        registry.load_entry_points()
