"""Distillation as training, on-policy batches, top-k logits on disk, drafts, and the example."""

import importlib
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers

from aidx.distill import (
    KnowledgeDistillationOptions,
    Outputs,
    acceptance,
    distill_loss_fn,
    expected_tokens,
    gkd_loss,
    init_projection,
    lm_distill_loss_fn,
    make_distill_step,
    make_teacher,
    matched_layers,
    measure_acceptance,
    on_policy_batch,
    projected,
    read_top_k,
    response_loss,
    top_k_loss,
    top_k_of,
    write_top_k,
)
from aidx.models import LlamaConfig, Model, Tokenizer, init_params, load_model, save_model
from aidx.train import init_state, make_train_step

ROOT = pathlib.Path(__file__).resolve().parents[2]
RNG = np.random.default_rng(0)
V, T = 24, 8


def tiny(seed, dim=16, vocab=V):
    config = LlamaConfig(vocab, dim, 16, 1, 2, 1, 8, tied=True)
    return Model(config, init_params(config, jax.random.key(seed), std=0.6))


STUDENT, TEACHER = tiny(0, dim=8), tiny(1)
TOKENS = jnp.asarray(RNG.integers(0, V, (4, T + 1)), jnp.int32)


def softmax(z):
    e = np.exp(np.asarray(z, np.float64) - np.max(z, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# --- steps ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_step():
    loss_fn = lm_distill_loss_fn(STUDENT.forward, TEACHER.forward, alpha=0.2, chunk=10)
    optimizer = optax.adam(2e-2)
    return loss_fn, optimizer, make_train_step(loss_fn, optimizer)


def test_the_loss_of_two_decoders_is_that_of_their_logits(lm_step):
    loss_fn, *_ = lm_step
    weights = jnp.asarray(RNG.integers(0, 2, (4, T)), jnp.float32)
    total, weight, sums = jax.jit(loss_fn)(
        STUDENT.params, {"tokens": TOKENS, "weights": weights}, jax.random.key(0), TEACHER.params
    )
    s, t = (
        jax.jit(make_teacher("transformer", m).apply)(m.params, TOKENS[:, :-1]).logits
        for m in (STUDENT, TEACHER)
    )
    expected = response_loss(s, t, TOKENS[:, 1:], temperature=1.0, alpha=0.2, weights=weights)
    assert float(weight) == weights.sum() and set(sums) == {"hard", "soft"}
    np.testing.assert_allclose(total / weight, expected, rtol=1e-4)


def test_a_draft_that_is_distilled_is_accepted_more(lm_step):
    _, optimizer, step = lm_step
    state = init_state(STUDENT.params, optimizer, jax.random.key(0))
    windows = np.asarray(TOKENS[:, :-1])
    before = measure_acceptance(STUDENT, TEACHER, windows)
    losses = []
    for _ in range(60):
        state, metrics = step(state, {"tokens": TOKENS}, TEACHER.params)
        losses.append(float(metrics.loss))
    after = measure_acceptance(STUDENT.replace(params=state.params), TEACHER, windows)
    assert losses[-1] < 0.5 * losses[0]
    assert after[1.0] > before[1.0] + 0.2 and after[0.0] > before[0.0]


def test_a_distill_step_takes_a_teacher_that_changes_without_another_trace():
    traces = []

    def apply(w, x):
        traces.append(1)
        return x @ w

    optimizer = optax.sgd(0.5)
    step = make_distill_step(apply, KnowledgeDistillationOptions(temperature=2.0), optimizer)
    state = init_state(jnp.zeros((3, 4)), optimizer, jax.random.key(0))
    teacher = make_teacher(
        "self", lambda w, x: x @ w, jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
    )
    batch = {
        "inputs": jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32),
        "labels": jnp.array([0, 1, 2, 3, 0, -1]),
        "weights": jnp.array([1.0, 1.0, 1.0, 1.0, 0.0, 1.0]),
    }
    weights = jax.tree.leaves(teacher.params)[0]
    state, first = step(state, batch, teacher)
    state, _ = step(state, batch, teacher.next_generation(state.params))
    assert len(traces) == 1 and float(first.weight) == 5
    assert not weights.is_deleted()  # the state is donated, the teacher is not
    s, t = batch["inputs"] @ jnp.zeros((3, 4)), batch["inputs"] @ weights
    expected = response_loss(s, t, batch["labels"], temperature=2.0, weights=batch["weights"])
    np.testing.assert_allclose(first.loss, expected, rtol=1e-5)


def test_microbatches_of_unequal_weight_are_one_batch():
    loss_fn = distill_loss_fn(lambda w, x: x @ w, KnowledgeDistillationOptions())
    optimizer = optax.sgd(1.0)
    teacher = make_teacher("neural_network", lambda w, x: x @ w, jnp.ones((3, 4)))
    batch = {
        "inputs": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32),
        "weights": jnp.array([1.0, 0.0, 3.0, 0.5]),
    }
    start = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
    after = [
        make_train_step(loss_fn, optimizer, microbatches=n)(
            init_state(start, optimizer, jax.random.key(0)), batch, teacher
        )[0].params
        for n in (1, 2)
    ]
    np.testing.assert_allclose(*after, rtol=1e-5)


def test_projections_are_trained_with_a_narrower_student():
    """Features of width 2 fit those of width 3 once a projection is learned beside them."""
    apply = projected(lambda w, x: Outputs(features=(x @ w,)))
    params = {
        "model": jnp.asarray(RNG.normal(size=(5, 2)), jnp.float32),
        "projections": [init_projection(jax.random.key(0), 2, 3)],
    }
    teacher = make_teacher(
        "neural_network",
        lambda w, x: Outputs(features=(x @ w,)),
        jnp.asarray(RNG.normal(size=(5, 1)) * [1.0, 2.0, -1.0], jnp.float32),  # of rank one
    )
    optimizer = optax.adam(5e-2)
    step = make_distill_step(apply, KnowledgeDistillationOptions("feature_based"), optimizer)
    state = init_state(params, optimizer, jax.random.key(0))
    batch = {"inputs": jnp.asarray(RNG.normal(size=(8, 5)), jnp.float32)}
    losses = []
    for _ in range(150):
        state, metrics = step(state, batch, teacher)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.01 * losses[0]
    kernels = params["projections"][0]["kernel"], state.params["projections"][0]["kernel"]
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    with pytest.raises(ValueError, match="no features to project"):
        projected(lambda w, x: x)(params, batch["inputs"])


# --- on policy -----------------------------------------------------------------------------------


def test_a_batch_has_the_weights_of_its_answers():
    asked = []

    def sampler(prompts):
        asked.extend(map(list, prompts))
        return [[50 + len(p)] * 2 for p in prompts]

    batch = on_policy_batch([[1, 2, 3], [4]], sampler, length=4, pad=9)
    assert asked == [[1, 2, 3], [4]]
    assert batch.tokens.tolist() == [[1, 2, 3, 53, 53], [4, 51, 51, 9, 9]]
    assert batch.weights.tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    cut = on_policy_batch([[1, 2, 3]], sampler, length=3)
    assert cut.tokens.tolist() == [[1, 2, 3, 53]] and cut.weights.tolist() == [[0, 0, 1]]


def test_a_share_of_the_answers_is_the_students():
    prompts, answers = [[i] for i in range(400)], [[1000 + i] for i in range(400)]
    sampler = lambda asked: [[2000 + p[0]] for p in asked]
    batch = on_policy_batch(prompts, sampler, length=1, answers=answers, fraction=0.25,
                            rng=np.random.default_rng(0))  # fmt: skip
    second = np.asarray(batch.tokens[:, 1])
    own = np.asarray(batch.own)
    assert (second == np.where(own, 2000, 1000) + np.arange(400)).all()
    assert 0.18 < own.mean() < 0.32
    none = on_policy_batch(prompts, None, length=1, answers=answers, fraction=0.0)
    assert not none.own.any()
    for options, match in (
        (dict(fraction=2.0), "fraction"),
        (dict(fraction=0.5), "rng"),
        (dict(fraction=0.0), "data's answers"),
        (dict(sampler=None), "no sampler"),
        (dict(sampler=lambda p: []), "answered 0 of 400"),
        (dict(prompts=[[]]), "empty"),
    ):
        with pytest.raises(ValueError, match=match):
            on_policy_batch(**({"prompts": prompts, "sampler": sampler, "length": 1} | options))


def test_gkd_lies_between_the_two_directions():
    s, t = (jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32) for _ in range(2))
    p, q = softmax(t), softmax(s)
    kl = lambda a, b: (a * np.log(a / b)).sum(-1).mean()
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        m = beta * p + (1 - beta) * q
        expected = {0.0: kl(p, q), 1.0: kl(q, p)}.get(beta, beta * kl(p, m) + (1 - beta) * kl(q, m))
        assert float(gkd_loss(s, t, beta=beta)) == pytest.approx(expected, rel=1e-5)
    with pytest.raises(ValueError, match="beta"):
        gkd_loss(s, t, beta=1.5)


# --- top-k logits on disk ------------------------------------------------------------------------

LOGITS = RNG.normal(size=(6, V)).astype(np.float32) * 3


def test_top_k_logits_survive_the_disk(tmp_path):
    batches = [top_k_of(jnp.asarray(part), 5) for part in (LOGITS[:4], LOGITS[4:])]
    stored = write_top_k(tmp_path / "a", batches, vocab_size=V)
    again = read_top_k(tmp_path / "a")
    assert len(again) == 6 and again.indices.dtype == np.uint16
    indices, log_probs = again[1:5]
    order = np.argsort(-LOGITS, axis=-1)[1:5, :5]
    np.testing.assert_array_equal(indices, order)
    exact = np.take_along_axis(np.log(softmax(LOGITS))[1:5], order, -1)
    np.testing.assert_allclose(log_probs, exact, rtol=1e-3)
    np.testing.assert_array_equal(stored[5][0], again[5][0])
    wide = write_top_k(
        tmp_path / "b", [(np.array([[70000]]), np.array([[-1.0]]))], vocab_size=1 << 17
    )
    assert wide.indices.dtype == np.uint32 and wide[0][0].tolist() == [70000]


@pytest.mark.smoke
def test_half_written_and_foreign_top_k_directories_are_refused(tmp_path):
    batch = (np.array([[1, 2]]), np.array([[-1.0, -2.0]]))
    for bad, match in (
        ([(np.array([[V]]), np.array([[-1.0]]))], "outside vocab_size"),
        ([(np.array([[1]]), np.array([[np.nan]]))], "NaN"),
        ([(np.array([[1]]), np.array([[0.5]]))], "positive"),
        ([batch, (np.array([[1]]), np.array([[-1.0]]))], "after k=2"),
        ([], "nothing"),
    ):
        with pytest.raises(ValueError, match=match):
            write_top_k(tmp_path, bad, vocab_size=V)
        with pytest.raises(ValueError, match="is missing"):  # no header, hence no data
            read_top_k(tmp_path)
    write_top_k(tmp_path, [batch], vocab_size=V)
    good = json.loads((tmp_path / "top_k.json").read_text())
    for change in (dict(version=2), dict(format="x"), dict(tokens=2), dict(k=3),
                   dict(indices="float64"), dict(tokens="x"), dict(tokens=-1)):  # fmt: skip
        (tmp_path / "top_k.json").write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=r"top_k.json|does not hold"):
            read_top_k(tmp_path)
    (tmp_path / "top_k.json").write_text(json.dumps(good))
    (tmp_path / "indices.bin").write_bytes(b"\0")
    with pytest.raises(ValueError, match=r"does not hold the 4 bytes"):
        read_top_k(tmp_path)


def test_the_loss_of_top_k_is_that_of_the_events_that_are_known():
    student = jnp.asarray(RNG.normal(size=(6, V)), jnp.float32)
    whole = response_loss(student, jnp.asarray(LOGITS), temperature=1.0)
    p, q = softmax(LOGITS), softmax(student)
    order = np.argsort(-LOGITS, axis=-1)
    previous = 0.0
    for k in (2, V - 1):
        indices, log_probs = jax.jit(top_k_of, static_argnums=1)(jnp.asarray(LOGITS), k)
        found = float(jax.jit(top_k_loss)(student, indices, log_probs))
        a, b = (np.take_along_axis(x, order[:, :k], -1) for x in (p, q))
        a, b = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (a, b))
        assert found == pytest.approx((a * np.log(a / b)).sum(-1).mean(), rel=1e-3)
        assert previous < found <= float(whole) * 1.001  # finer events tell more
        previous = found
    assert previous == pytest.approx(float(whole), rel=1e-3)
    indices, log_probs = top_k_of(jnp.asarray(LOGITS), 4)
    cut = lambda z: jnp.take_along_axis(jnp.asarray(z), indices, -1)
    found = top_k_loss(student, indices, log_probs, tail="renormalise", temperature=3.0)
    expected = response_loss(cut(student), cut(LOGITS), temperature=3.0)
    assert float(found) == pytest.approx(float(expected), rel=1e-5)
    grad = jax.jit(jax.grad(top_k_loss))(jnp.asarray(LOGITS), indices, log_probs)
    assert np.abs(grad).max() < 1e-5  # the teacher itself
    with pytest.raises(ValueError, match="temperature 1, not 2"):
        top_k_loss(student, indices, log_probs, temperature=2.0)
    with pytest.raises(ValueError, match="unknown tail"):
        top_k_loss(student, indices, log_probs, tail="drop")


# --- drafts --------------------------------------------------------------------------------------


def test_acceptance_is_what_rejection_sampling_accepts():
    draft, target = (jnp.asarray(RNG.normal(size=(V,)), jnp.float32) for _ in range(2))
    for temperature in (1.0, 0.5):
        p, q = softmax(np.asarray(target) / temperature), softmax(np.asarray(draft) / temperature)
        found = float(jax.jit(acceptance, static_argnames="temperature")(
            draft, target, temperature=temperature))  # fmt: skip
        assert found == pytest.approx(np.minimum(p, q).sum(), rel=1e-5)
        drawn = RNG.choice(V, 40_000, p=q)
        accepted = RNG.random(40_000) < p[drawn] / q[drawn]
        assert accepted.mean() == pytest.approx(found, abs=0.015)
    assert float(acceptance(draft, draft)) == pytest.approx(1.0)
    assert float(acceptance(draft, draft + 3, temperature=0)) == 1.0
    assert float(acceptance(draft, -draft, temperature=0)) == 0.0
    runs = RNG.random((40_000, 4)) < 0.7
    length = 1 + np.cumprod(runs, axis=1).sum(1)
    assert expected_tokens(0.7, 4) == pytest.approx(length.mean(), abs=0.02)
    with pytest.raises(ValueError, match="vocab_size"):
        other = LlamaConfig(V + 1, 8, 16, 1, 2, 1, 8, tied=True)
        measure_acceptance(Model(other, init_params(other, jax.random.key(0))), TEACHER, TOKENS)


def test_layers_are_matched_evenly_and_the_last_with_the_last():
    assert matched_layers(4, 4) == ((0, 0), (1, 1), (2, 2), (3, 3))
    assert matched_layers(4, 12) == ((0, 2), (1, 5), (2, 8), (3, 11))
    with pytest.raises(ValueError, match="teacher_layers=2"):
        matched_layers(3, 2)


@pytest.fixture(scope="module")
def example():
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        yield importlib.import_module("distill_embedded")
    finally:
        sys.path.remove(str(ROOT / "examples"))


@pytest.mark.slow
def test_the_example_distils_measures_and_writes_a_draft(example, tmp_path):
    lib = tmp_path / "lib"
    lib.mkdir()
    for i in range(4):  # file0.py is held out
        (lib / f"file{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n\n\n" * 40)
    words = example.aidx.embedded_path("embedded-draft")
    for seed, name in enumerate(("target", "student")):
        model = tiny(seed, vocab=4096)
        save_model(model.replace(tokenizer=Tokenizer.from_directory(words)), tmp_path / name)
    report = example.main(["--out", str(tmp_path / "draft"), "--tiny", "--root", str(lib),
                           "--target", str(tmp_path / "target"), "--steps", "2",
                           "--draft", str(tmp_path / "student"),
                           "--divergences", "forward_kl"])  # fmt: skip
    model = load_model(tmp_path / "draft")
    assert model.tokenizer is not None and model.config.dim == 16
    written = json.loads((tmp_path / "draft" / "training.json").read_text())
    assert 0 < written["before"]["acceptance"] == report["before"]["acceptance"] < 1
    assert 0 < written["acceptance"] < 1 and written["steps"] == 2
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}))
    words.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match="are not those of"):
        example.load_text(tmp_path / "draft", tmp_path, 8)
