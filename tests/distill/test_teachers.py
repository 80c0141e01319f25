"""Teachers: what each says, what it learns, and that votes are not averages."""

import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.cache import no_cache_attend
from aidx.distill import (
    CurriculumOrder,
    DistributedAggregation,
    EnsembleAggregation,
    KnowledgeDistillationOptions,
    OnlineUpdate,
    Outputs,
    TeacherModelType,
    decoder_outputs,
    distill_loss,
    distributed_teacher,
    ensemble_logits,
    is_correct,
    make_teacher,
)
from aidx.distill.make_teacher import CONSTRUCTORS
from aidx.distill.outputs import attention_map
from aidx.distill.progress import difficulty
from aidx.distill.teachers import Int8, dequantize_params, quantize_params
from aidx.models import LlamaConfig, Model, init_params, save_model, stack_layers

ROOT = pathlib.Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
linear = lambda w, x: x @ w
X = jnp.asarray(RNG.normal(size=(5, 3)), jnp.float32)
WS = [jnp.asarray(RNG.normal(size=(3, 4)) * 2, jnp.float32) for _ in range(3)]


said = jax.jit(lambda teacher, x: teacher(x))  # teachers are pytrees: arguments of a program


def softmax(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def probabilities(teacher, *args, **kwargs):
    return softmax(said(teacher, *args, **kwargs).logits)


P = np.stack([softmax(X @ w) for w in WS])  # [k, B, V]


@pytest.fixture(scope="module")
def model():
    config = LlamaConfig(vocab_size=32, dim=16, ffn_dim=16, num_layers=2, num_heads=2,
                         num_kv_heads=1, head_dim=8, tied=True)  # fmt: skip
    return Model(config, init_params(config, jax.random.key(0), std=0.5))


TOKENS = jnp.asarray(RNG.integers(0, 32, (2, 6)), jnp.int32)


@pytest.mark.smoke
def test_every_kind_of_teacher_has_a_constructor_and_unknown_ones_are_named():
    assert set(CONSTRUCTORS) == set(TeacherModelType)
    with pytest.raises(ValueError, match="unknown TeacherModelType 'x'; known: neural_network"):
        make_teacher("x")


def test_no_gradient_passes_through_a_teacher():
    def loss(w):
        teacher = make_teacher("neural_network", linear, w)
        return distill_loss(KnowledgeDistillationOptions(), Outputs(logits=X @ WS[1]), teacher(X))

    assert not np.any(jax.grad(loss)(WS[0]))


# --- ensembles -----------------------------------------------------------------------------------

WEIGHTS = np.array([0.5, 0.2, 0.3])


def normalised(p):
    return p / p.sum(-1, keepdims=True)


EXPECTED = {
    "weighted_average": np.einsum("k,kbv->bv", WEIGHTS, P),
    "geometric_mean": normalised(np.prod(P ** WEIGHTS[:, None, None], axis=0)),
    "maximum": normalised(P.max(0)),
    "median": normalised(np.median(P, axis=0)),
}


@pytest.mark.parametrize("how", list(EnsembleAggregation))
def test_an_ensemble_aggregates_as_it_says(how):
    members = [make_teacher("neural_network", linear, w) for w in WS]
    weighted = how in ("weighted_average", "geometric_mean")
    teacher = make_teacher("ensemble", members, list(2 * WEIGHTS) if weighted else None,
                           aggregation=how)  # fmt: skip
    np.testing.assert_allclose(probabilities(teacher, X), EXPECTED[how], rtol=1e-5)
    same = make_teacher("ensemble", members[:1] * 3, aggregation=how)
    np.testing.assert_allclose(probabilities(same, X), P[0], rtol=1e-5)
    if not weighted:
        with pytest.raises(ValueError, match="no effect"):
            make_teacher("ensemble", members, [1, 1, 1], aggregation=how)


def test_ensembles_refuse_and_survive_what_is_odd():
    for bad in ([1.0], [1.0, -1.0, 1.0], [0.0, 0.0, 0.0]):
        with pytest.raises(ValueError, match="weights"):
            ensemble_logits(jnp.zeros((3, 2)), bad)
    sure = jnp.log(jnp.eye(3))  # three teachers, each sure of its own class: every median is zero
    np.testing.assert_allclose(jnp.exp(ensemble_logits(sure, aggregation="median")), [1 / 3] * 3,
                               rtol=1e-5)  # fmt: skip
    one = ensemble_logits(sure, [1.0, 0.0, 0.0], aggregation="geometric_mean")
    np.testing.assert_allclose(jnp.exp(one), [1, 0, 0], atol=1e-6)
    assert set(EXPECTED) == set(EnsembleAggregation)


# --- distributed ---------------------------------------------------------------------------------


def vote(p):
    return np.eye(p.shape[-1])[p.argmax(-1)].mean(0)


def mesh_of(n):
    return jax.make_mesh((n,), ("teachers",), devices=jax.devices()[:n])


def test_voting_is_not_averaging():
    """Two teachers barely prefer class 0, one is sure of class 1: votes and averages disagree."""
    biases = [jnp.log(jnp.array([[a, b]])) for a, b in ((0.55, 0.45), (0.55, 0.45), (0.01, 0.99))]
    zero = jnp.zeros((1, 2))
    found = {
        how: probabilities(
            make_teacher("distributed", lambda b, x: x + b, biases, mesh_of(1), aggregation=how),
            zero,
        )[0]
        for how in DistributedAggregation
    }
    np.testing.assert_allclose(found["average"], [0.37, 0.63], rtol=1e-5)
    np.testing.assert_allclose(found["voting"], [2 / 3, 1 / 3], rtol=1e-5)
    assert found["average"].argmax() != found["voting"].argmax()


@pytest.mark.parametrize("how", list(DistributedAggregation))
def test_a_distributed_teacher_is_its_formula_and_its_loss_is_finite(how):
    expected = P.mean(0) if how == "average" else vote(P)
    plain = distributed_teacher(linear, WS, mesh_of(1), aggregation=how)
    np.testing.assert_allclose(np.exp(said(plain, X).logits), expected, rtol=1e-5, atol=1e-7)
    smooth = distributed_teacher(linear, WS, mesh_of(1), aggregation=how, smoothing=0.1)
    np.testing.assert_allclose(np.exp(said(smooth, X).logits), 0.9 * expected + 0.1 / 4, rtol=1e-5)
    # A class without a vote has probability zero: the loss and its gradient must bear that.
    loss = lambda s, t: distill_loss(KnowledgeDistillationOptions(), Outputs(logits=s), t(X))
    value, grad = jax.jit(jax.value_and_grad(loss))(X @ WS[0], plain)
    assert np.isfinite(value) and np.isfinite(grad).all()
    with pytest.raises(ValueError, match="0 teachers over 1 devices"):
        distributed_teacher(linear, [], mesh_of(1))


SPREAD = """
import jax, jax.numpy as jnp, numpy as np
from aidx.distill import distributed_teacher
rng = np.random.default_rng(0)
params = [jnp.asarray(rng.normal(size=(3, 4)), jnp.float32) for _ in range(8)]
x = jnp.asarray(rng.normal(size=(5, 3)), jnp.float32)
for how in ("average", "voting"):
    said = []
    for n in (1, 4):
        mesh = jax.make_mesh((n,), ("teachers",), devices=jax.devices()[:n])
        teacher = distributed_teacher(lambda w, x: x @ w, params, mesh, aggregation=how)
        assert len(jax.tree.leaves(teacher.params)[0].addressable_shards) == n
        program = jax.jit(lambda t, x: t(x).logits)
        if n == 4:
            assert "all-reduce" in program.lower(teacher, x).compile().as_text()
        said.append(np.exp(program(teacher, x)))
    np.testing.assert_allclose(*said, rtol=1e-5)
try:
    distributed_teacher(lambda w, x: x, params[:3], mesh)
except ValueError as error:
    assert "3 teachers over 4 devices" in str(error)
else:
    raise AssertionError
"""


def test_the_number_of_devices_does_not_matter():
    env = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, "-c", SPREAD], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


# --- decoders ------------------------------------------------------------------------------------


def test_a_transformer_teaches_with_features_and_maps(model):
    teacher = make_teacher("transformer", model, features=[0, -1], attention=[1])
    out = said(teacher, TOKENS)
    assert out.logits.shape == (2, 6, 32)
    assert [f.shape for f in out.features] == [(2, 6, 16)] * 2
    [maps] = out.attention
    assert maps.shape == (2, 2, 6, 6)
    np.testing.assert_allclose(maps.sum(-1), 1, rtol=1e-5)
    assert not np.triu(maps, 1).any()
    # The last features are what the model unembeds, before its norm.
    x = np.asarray(out.features[1], np.float64)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.config.norm_eps)
    logits = x * np.asarray(model.params["norm"]) @ np.asarray(model.params["embed"]).T
    np.testing.assert_allclose(out.logits, logits, rtol=2e-4, atol=2e-4)
    # A change of a later token leaves earlier outputs as they are.
    later = said(teacher, TOKENS.at[:, 4].add(1))
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(later), strict=True):
        axis = 2 if a.ndim == 4 else 1
        np.testing.assert_array_equal(np.take(a, range(4), axis), np.take(b, range(4), axis))


@pytest.mark.parametrize(
    "options", [{}, dict(window=2, scale=0.7, soft_cap=1.5, sinks=np.float32([0.5, -1, 2, 0]))]
)
def test_the_maps_are_those_that_the_model_attends_with(options):
    q, k, v = (jnp.asarray(RNG.normal(size=(2, 5, n, 8)), jnp.float32) for n in (4, 2, 2))
    out, _ = no_cache_attend()(None, 0, q, k, v, **options)
    maps = attention_map(q, k, **options)
    mixed = np.einsum("bnts,bsnh->btnh", maps, np.repeat(v, 2, axis=2))
    np.testing.assert_allclose(mixed, out, rtol=1e-4, atol=1e-5)


def test_packed_documents_do_not_see_each_other(model):
    teacher = make_teacher("transformer", model)
    places = jnp.asarray([[0, 1, 2, 0, 1, 2]], jnp.int32)
    segments = jnp.asarray([[0, 0, 0, 1, 1, 1]], jnp.int32)
    inputs = {"tokens": TOKENS[:1], "positions": places, "segment_ids": segments}
    packed = said(teacher, inputs).logits
    alone = said(teacher, {"tokens": TOKENS[:1, 3:]}).logits
    np.testing.assert_allclose(packed[:, 3:], alone, rtol=1e-4, atol=1e-4)


def test_a_pretrained_directory_teaches(model, tmp_path):
    save_model(model, tmp_path)
    teacher = make_teacher("pretrained", tmp_path)
    expected = said(make_teacher("transformer", model), TOKENS).logits
    np.testing.assert_allclose(said(teacher, TOKENS).logits, expected, rtol=1e-4, atol=1e-4)


def test_layers_that_are_not_there_are_refused(model):

    call = lambda params, **which: decoder_outputs(
        model.forward, params, TOKENS, TOKENS, no_cache_attend(), **which
    )
    with pytest.raises(ValueError, match=r"layers \[2\] of a model that has 2"):
        call(model.params, features=[2])
    with pytest.raises(ValueError, match="unstack_layers"):
        call(stack_layers(model.params))


# --- the others ----------------------------------------------------------------------------------


def test_modalities_are_fused_and_missing_ones_left_out():
    teachers = {name: make_teacher("neural_network", linear, w)
                for name, w in zip("abc", WS, strict=True)}  # fmt: skip
    teacher = make_teacher("multi_modal", teachers, dict(zip("abc", WEIGHTS, strict=True)))
    everything = probabilities(teacher, dict.fromkeys("abc", X))
    np.testing.assert_allclose(everything, EXPECTED["weighted_average"], rtol=1e-5)
    two = probabilities(teacher, {"c": X, "a": X})
    np.testing.assert_allclose(two, (0.5 * P[0] + 0.3 * P[2]) / 0.8, rtol=1e-5)
    for bad in ({}, {"d": X}):
        with pytest.raises(ValueError, match="modalities"):
            teacher(bad)


LOGITS = jnp.log(jnp.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [1 / 3, 1 / 3, 1 / 3]]))
LABELS = jnp.array([0, 2, 0])


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("accuracy_based", [0, 1, 0]),
        ("confidence_based", [0.3, 0.2, 2 / 3]),
        ("entropy_based", [0.8018186 / np.log(3), 0.639032 / np.log(3), 1]),
    ],
)
def test_an_adaptive_teacher_is_softer_where_the_student_struggles(metric, expected):
    labels = LABELS if metric == "accuracy_based" else None
    np.testing.assert_allclose(difficulty(LOGITS, labels, metric=metric), expected, rtol=1e-5)
    base = make_teacher("neural_network", lambda w, x: x, 0)
    teacher = make_teacher("adaptive", base, metric=metric, min_temperature=2.0,
                           max_temperature=6.0, decay=0.75)  # fmt: skip
    out = teacher(LOGITS, student_logits=LOGITS, labels=LABELS)
    np.testing.assert_allclose(out.temperature, 2 + 4 * np.array(expected), rtol=1e-5)
    seen = teacher.observe(LOGITS, LABELS)
    np.testing.assert_allclose(seen.running, 0.75 * 0.5 + 0.25 * np.mean(expected), rtol=1e-5)
    np.testing.assert_allclose(seen(LOGITS).temperature, [2 + 4 * float(seen.running)] * 3,
                               rtol=1e-6)  # fmt: skip


def test_the_temperature_of_an_adaptive_teacher_reaches_the_loss():
    base = make_teacher("neural_network", linear, WS[0])
    out = make_teacher("adaptive", base, min_temperature=4.0, max_temperature=4.0)(X)
    student = Outputs(logits=X @ WS[1])
    adaptive = distill_loss(KnowledgeDistillationOptions(), student, out)
    fixed = distill_loss(KnowledgeDistillationOptions(temperature=4.0), student, base(X))
    assert float(adaptive) == pytest.approx(float(fixed), rel=1e-6)
    other = distill_loss(KnowledgeDistillationOptions(), student, base(X))
    assert float(adaptive) != pytest.approx(float(other), rel=1e-3)


def test_accuracy_is_that_of_classifiers_tokens_and_sequences():
    assert is_correct(LOGITS, LABELS).tolist() == [True, False, True]
    onehot = jax.nn.one_hot(LABELS, 3)
    assert is_correct(LOGITS, onehot).tolist() == [True, False, True]
    assert is_correct(jnp.array([[2.0], [-1.0]]), jnp.array([1, 1])).tolist() == [True, False]
    assert is_correct(jnp.array([[2.0]]), jnp.array([[1.0]])).tolist() == [True]
    tokens = jnp.stack([LOGITS, LOGITS])
    labels = jnp.array([[0, 1, 0], [0, 2, -1]])
    assert is_correct(tokens, labels).tolist() == [[True, True, True], [True, False, False]]
    assert is_correct(tokens, labels, sequence=True).tolist() == [True, False]
    weights = jnp.array([[1, 1, 1], [1, 0, 1]])
    assert is_correct(tokens, labels, weights, sequence=True).tolist() == [True, True]
    assert not is_correct(tokens, jnp.full((2, 3), -1), sequence=True).any()  # no token, no credit
    with pytest.raises(ValueError, match="labels"):
        is_correct(LOGITS, LABELS[:2])
    with pytest.raises(ValueError, match="no axis of tokens"):
        is_correct(LOGITS, LABELS, sequence=True)


@pytest.mark.parametrize("how", list(OnlineUpdate))
def test_an_online_teacher_really_updates(how):
    options = {"ema": dict(decay=0.75), "gradient_based": dict(rate=0.5),
               "momentum_based": dict(decay=0.5, rate=0.1)}[how]  # fmt: skip
    p, s = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([3.0, -2.0])}
    teacher = make_teacher("online", lambda w, x: x * w["w"][None], p, how=how, **options)
    given = {"grads": s} if how == "gradient_based" else {"student_params": s}
    step = jax.jit(lambda t: t.update(**given))
    teacher = step(step(teacher))
    w, g = np.array([1.0, 2.0]), np.array([3.0, -2.0])
    if how == "ema":
        expected = 0.75 * (0.75 * w + 0.25 * g) + 0.25 * g
    elif how == "gradient_based":
        expected = w - g
    else:
        v = g - w
        first = w + 0.1 * v
        expected = first + 0.1 * (0.5 * v + g - first)
    np.testing.assert_allclose(teacher.params["w"], expected, rtol=1e-6)
    np.testing.assert_allclose(teacher(jnp.ones((1, 2))).logits[0], expected, rtol=1e-6)
    assert int(teacher.steps) == 2
    with pytest.raises(ValueError, match="takes"):
        teacher.update(**({"student_params": s} if "grads" in given else {"grads": s}))


def test_a_curriculum_really_orders():
    logits = jnp.asarray(np.diag([9.0, 1.0, 0.0, 5.0]), jnp.float32)  # entropy: 2 > 1 > 3 > 0
    base = make_teacher("neural_network", lambda w, x: x, 0)
    firsts = {}
    for order in CurriculumOrder:
        teacher = make_teacher("curriculum", base, order=order, total_steps=4, start=0.25)
        taken, entered = np.zeros(4), []
        for step in range(5):
            weights = np.asarray(teacher.replace(step=jnp.int32(step))(logits).weights)
            assert (weights >= taken).all()  # who is in stays in
            entered += np.flatnonzero(weights - taken).tolist()
            taken = weights
        assert taken.all()
        firsts[order] = entered
        assert int(teacher.advance(3).step) == 3
    assert firsts["easy_to_hard"][0] == 0 and firsts["easy_to_hard"][-1] == 2
    assert firsts["hard_to_easy"] == firsts["easy_to_hard"][::-1] == [2, 1, 3, 0]
    # With labels the teacher's own loss decides: a confident mistake is hard.
    teacher = make_teacher("curriculum", base, total_steps=4, start=0.25)
    weights = teacher(logits, labels=jnp.array([1, 1, 2, 3])).weights
    assert weights.tolist() == [0, 0, 0, 1]
    sequences = teacher(jnp.stack([logits, logits * 3])).weights
    assert sequences.shape == (2, 4) and sequences.sum(1).tolist() == [0, 4]


def test_the_weights_of_a_curriculum_reach_the_loss():
    base = make_teacher("neural_network", linear, WS[0])
    teacher = make_teacher("curriculum", base, total_steps=10, start=0.4)
    student = Outputs(logits=X @ WS[1])
    out = teacher(X)
    assert 0 < out.weights.sum() < 5
    one = distill_loss(KnowledgeDistillationOptions(), student, out)
    kept = np.flatnonzero(out.weights)
    other = distill_loss(
        KnowledgeDistillationOptions(), Outputs(logits=student.logits[kept]), base(X[kept])
    )
    assert float(one) == pytest.approx(float(other), rel=1e-5)


def test_a_self_teacher_outlives_the_donation_of_its_student():
    params = jnp.ones((3, 4))
    teacher = make_teacher("self", linear, params)
    train = jax.jit(lambda p: p + 1, donate_argnums=0)
    params = train(params)
    np.testing.assert_array_equal(teacher(X).logits, X @ jnp.ones((3, 4)))
    later = teacher.next_generation(params)
    train(params)
    np.testing.assert_allclose(later(X).logits, X @ jnp.full((3, 4), 2.0), rtol=1e-6)
    assert int(later.generation) == 1 and int(teacher.generation) == 0


def test_a_quantised_teacher_is_int8_and_near(model):
    quantised = quantize_params(model.params)
    bits = [x for x in jax.tree.leaves(quantised, is_leaf=lambda x: isinstance(x, Int8))
            if isinstance(x, Int8)]  # fmt: skip
    assert bits and all(x.values.dtype == jnp.int8 for x in bits)
    size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
    assert size(quantised) < 0.35 * size(model.params)
    for leaf, q in zip(
        jax.tree.leaves(model.params), jax.tree.leaves(dequantize_params(quantised)), strict=True
    ):
        if leaf.ndim > 1:
            assert (np.abs(leaf - q) <= np.abs(leaf).max(0) / 127 * 0.5001).all()
        else:
            np.testing.assert_array_equal(leaf, q)
    from aidx.distill import decoder_apply

    teacher = make_teacher("quantized", decoder_apply(model), model.params)
    exact = said(make_teacher("transformer", model), TOKENS).logits
    gap = np.abs(said(teacher, TOKENS).logits - exact).max()
    assert 0 < gap < 0.1 * float(np.abs(exact).max())
