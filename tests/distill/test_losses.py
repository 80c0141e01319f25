"""Every strategy and mode: its formula in float64, its slope, and the laws it obeys.

One program per loss serves all its tests: value and gradient, jitted, at one shape.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.distill import (
    DistillationStrategy,
    Gaussian,
    KnowledgeDistillationOptions,
    Outputs,
    distill_loss,
    make_loss,
)
from aidx.distill.features import init_projection, project
from aidx.distill.losses import TERMS
from aidx.distill.options import CHOICES
from aidx.distill.relations import contrastive_loss
from tests.distill import formulas as np64

B, X, N, D, V = 5, 3, 2, 4, 7
FIELDS = ("logits", "features", "attention", "embedding", "latent", "reconstruction", "exits",
          "exit_features")  # fmt: skip


def draw(seed):
    """Outputs of one model, as float64 NumPy arrays by field."""
    rng = np.random.default_rng(seed)
    maps = np.exp(rng.normal(size=(2, B, N, X, X)))
    return {
        "logits": rng.normal(size=(B, V)) * 2,
        "features": tuple(rng.normal(size=(2, B, X, D))),
        "attention": tuple(maps / maps.sum(-1, keepdims=True)),
        "embedding": rng.normal(size=(B, D)),
        "latent": tuple(rng.normal(size=(2, B, D)) * 0.5),
        "reconstruction": tuple(rng.normal(size=(2, B, X, D)) * 0.5),
        "exits": tuple(rng.normal(size=(2, B, V))),
        "exit_features": tuple(rng.normal(size=(2, B, X, D))),
    }


STUDENT, TEACHER = draw(0), draw(1)
ONES = np.ones(B, np.float32)


def outputs(fields):
    f32 = jax.tree.map(lambda x: np.asarray(x, np.float32), fields)
    return Outputs(
        **{k: v for k, v in f32.items() if k not in ("latent", "reconstruction")},
        latent=Gaussian(*f32["latent"]),
        reconstruction=Gaussian(*f32["reconstruction"]),
    )


def flat(x):
    return x.reshape(-1, x.shape[-1])


def opt(strategy, **options):
    return KnowledgeDistillationOptions(strategy, **options)


# (options, formula of the fields of student and teacher, whether equal outputs give zero)
CASES = {
    **{
        f"response {d}": (
            opt("response_based", divergence=d, **({"jsd_beta": 0.3} if d == "jsd" else {})),
            lambda s, t, d=d: np64.response(
                s["logits"], t["logits"], temperature=3.0, divergence=d, beta=0.3
            ),
            True,
        )
        for d in ("forward_kl", "reverse_kl", "jsd", "total_variation")
    },
    "feature": (
        opt("feature_based", layer_weights=(1, 3)),
        lambda s, t: (
            np64.feature(flat(s["features"][0]), flat(t["features"][0])) / 4
            + np64.feature(flat(s["features"][1]), flat(t["features"][1])) * 3 / 4
        ),
        True,
    ),
    **{
        f"attention {m}": (
            opt("attention_based", attention_matching=m),
            lambda s, t, m=m: np.mean(
                [np64.attention(a, b, m) for a, b in zip(s["attention"], t["attention"])]  # noqa: B905
            ),
            True,
        )
        for m in ("mse", "kl", "cosine")
    },
    **{
        f"relation {d}": (
            opt("relation_based", relational_distance=d),
            lambda s, t, d=d: np64.relation(s["embedding"], t["embedding"], d),
            True,
        )
        for d in ("euclidean", "cosine", "manhattan")
    },
    **{
        f"contrastive {m}": (
            opt("contrastive", contrastive_mode=m),
            lambda s, t, m=m: np64.contrastive(s["embedding"], t["embedding"], m),
            False,
        )
        for m in ("info_nce", "triplet", "nt_xent")
    },
    "similarity": (
        opt("similarity_preserving"),
        lambda s, t: np.mean(
            [
                np64.similarity(a.reshape(len(a), -1), b.reshape(len(a), -1))
                for a, b in zip(s["features"], t["features"], strict=True)
            ]
        ),
        True,
    ),
    "flow": (opt("flow_based"), lambda s, t: np64.flow(s["features"], t["features"]), True),
    "moments": (
        opt("probabilistic_transfer", moments=3),
        lambda s, t: np64.moments(s["embedding"], t["embedding"], 3),
        True,
    ),
    "mmd": (
        opt("probabilistic_transfer", probabilistic_mode="maximum_mean_discrepancy"),
        lambda s, t: np64.mmd(s["embedding"], t["embedding"]),
        True,
    ),
    "mmd bandwidth": (
        opt(
            "probabilistic_transfer", probabilistic_mode="maximum_mean_discrepancy", bandwidth=1.5
        ),
        lambda s, t: np64.mmd(s["embedding"], t["embedding"], 1.5),
        True,
    ),
    "entropy": (
        opt("probabilistic_transfer", probabilistic_mode="entropy_transfer"),
        lambda s, t: np64.entropies(s["logits"], t["logits"]),
        True,
    ),
    "elbo": (
        opt("variational_information", prior_weight=0.2),
        lambda s, t: np64.elbo(*s["reconstruction"], t["features"][1], s["latent"], 0.2),
        False,
    ),
    "bottleneck": (
        opt(
            "variational_information", variational_mode="information_bottleneck",
            prior_weight=0.2, temperature=2.0,
        ),
        lambda s, t: np64.bottleneck(s["logits"], t["logits"], s["latent"], 0.2, 2.0),
        False,
    ),
    "latent kl": (
        opt("variational_information", variational_mode="latent_space_kl"),
        lambda s, t: np64.normal_kl(*t["latent"], *s["latent"]).mean(),
        True,
    ),
    **{
        f"factor {m}": (
            opt("factor_transfer", factor_mode=m, **({"rank": 2} if m[0] == "l" else {})),
            lambda s, t, m=m: np64.factor(flat(s["features"][1]), flat(t["features"][1]), m),
            True,
        )
        for m in ("low_rank_approximation", "nuclear_norm_matching", "factor_matching")
    },
    "factor p 2": (
        opt("factor_transfer", norm_order=2),
        lambda s, t: np64.factor(
            flat(s["features"][1]), flat(t["features"][1]), "factor_matching", norm_order=2
        ),
        True,
    ),
    **{
        f"selectivity {m}": (
            opt("neuron_selectivity", selectivity_metric=m),
            lambda s, t, m=m: np64.selectivity(flat(s["features"][1]), flat(t["features"][1]), m),
            True,
        )
        for m in ("variance", "sparsity", "peak_to_average")
    },
    "self": (
        opt("self_distillation", temperature=2.0),
        lambda s, t: np.mean(
            [np64.response(e, t["logits"], temperature=2.0) for e in s["exits"]]
        ),
        True,
    ),
    "self features": (
        opt("self_distillation", feature_weight=0.7),
        lambda s, t: (
            np.mean([np64.response(e, t["logits"], temperature=3.0) for e in s["exits"]])
            + 0.7 * np.mean([np64.feature(flat(f), flat(t["features"][1]))
                             for f in s["exit_features"]])
        ),
        True,
    ),
    "hybrid": (
        opt("hybrid", hybrid={"response_based": 0.5, "feature_based": 2.0}, temperature=4.0),
        lambda s, t: (
            0.5 * np64.response(s["logits"], t["logits"], temperature=4.0)
            + np64.feature(flat(s["features"][0]), flat(t["features"][0]))
            + np64.feature(flat(s["features"][1]), flat(t["features"][1]))
        ),
        True,
    ),
}  # fmt: skip


@functools.cache
def program(name):
    """Loss, and its gradients by student and teacher, at the shapes of `draw`: one compile."""
    loss = make_loss(CASES[name][0])
    run = jax.jit(jax.value_and_grad(lambda s, t, w: loss(s, t, weights=w), argnums=(0, 1)))
    return lambda s, t, weights=ONES: run(s, t, weights)


def test_the_table_has_every_strategy_and_every_mode_of_every_enum():
    assert set(TERMS) | {DistillationStrategy.HYBRID} == set(DistillationStrategy)
    options = [case[0] for case in CASES.values()]
    for field, choice in CHOICES.items():
        assert {getattr(o, field) for o in options} == set(choice), field


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_the_papers_equation_and_its_gradient_the_slope(name):
    _, formula, _ = CASES[name]
    value, (grad, to_teacher) = program(name)(outputs(STUDENT), outputs(TEACHER))
    np.testing.assert_allclose(value, formula(STUDENT, TEACHER), rtol=2e-5)
    assert all(not np.any(g) for g in jax.tree.leaves(to_teacher))  # a teacher is not taught
    rng = np.random.default_rng(7)
    step = jax.tree.map(lambda x: rng.normal(size=x.shape), STUDENT)
    eps = 1e-6
    moved = [jax.tree.map(lambda x, d, e=e: x + e * d, STUDENT, step) for e in (eps, -eps)]
    slope = (formula(moved[0], TEACHER) - formula(moved[1], TEACHER)) / (2 * eps)
    # Leaf by leaf in the same order: Gaussian(mean, log_var) flattens as the pair does.
    named = {f: jax.tree.leaves(getattr(grad, f)) for f in FIELDS}
    along = sum(
        float((np.asarray(g, np.float64) * d).sum())
        for f in FIELDS
        for g, d in zip(named[f], jax.tree.leaves(step[f]), strict=True)
    )
    np.testing.assert_allclose(along, slope, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", [n for n, case in CASES.items() if case[2]])
def test_a_student_that_equals_its_teacher_has_no_loss_and_no_gradient(name):
    same = outputs(TEACHER)
    if name.startswith("self"):
        deepest = (same.features[-1],) * 2
        same = same.replace(exits=(same.logits, same.logits), exit_features=deepest)
    value, (grad, _) = program(name)(same, same)
    assert abs(float(value)) < 2e-6
    if name in ("factor factor_matching", "response total_variation"):
        return  # |x| has a kink there; with norm_order 2 it has none
    if name == "attention kl":  # of probabilities: only what keeps the sum of a row counts
        grad = grad.replace(attention=[g - g.mean(-1, keepdims=True) for g in grad.attention])
    for leaf in jax.tree.leaves(grad):
        np.testing.assert_allclose(leaf, 0, atol=2e-6)


@pytest.mark.parametrize("name", CASES)
def test_the_order_of_the_examples_does_not_matter(name):
    order = np.array([3, 1, 4, 0, 2])
    shuffled = [outputs(jax.tree.map(lambda x: x[order], fields)) for fields in (STUDENT, TEACHER)]
    value, (grad, _) = program(name)(*shuffled)
    plain, (plain_grad, _) = program(name)(outputs(STUDENT), outputs(TEACHER))
    np.testing.assert_allclose(value, plain, rtol=1e-5)
    np.testing.assert_allclose(grad.logits, plain_grad.logits[order], atol=1e-6)
    np.testing.assert_allclose(grad.embedding, plain_grad.embedding[order], atol=1e-5)


def scaled(fields, field, factor=1.0, shift=0.0):
    return {**fields, field: jax.tree.map(lambda x: factor * x + shift, fields[field])}


# (case, field of the student, factor, shift, power: the loss is multiplied by factor ** power)
LAWS = [
    ("response forward_kl", "logits", 1, 5.0, 0),  # a softmax does not see a shift
    ("response jsd", "logits", 1, -2.0, 0),
    ("entropy", "logits", 1, 3.0, 0),
    ("self", "exits", 1, 3.0, 0),
    ("relation euclidean", "embedding", 7.0, 2.0, 0),  # similar figures
    ("relation manhattan", "embedding", 7.0, 2.0, 0),
    ("relation cosine", "embedding", 7.0, 0.0, 0),
    ("similarity", "features", 3.0, 0.0, 0),
    ("contrastive info_nce", "embedding", 3.0, 0.0, 0),
    ("contrastive triplet", "embedding", 3.0, 0.0, 0),
    ("contrastive nt_xent", "embedding", 3.0, 0.0, 0),
    ("factor factor_matching", "features", 3.0, 0.0, 0),
    ("selectivity sparsity", "features", 3.0, 0.0, 0),
    ("selectivity peak_to_average", "features", 3.0, 0.0, 0),
    ("attention cosine", "attention", 3.0, 0.0, 0),
    ("feature", "features", 3.0, 0.0, 2),  # of both sides
    ("flow", "features", 3.0, 0.0, 4),
    ("factor nuclear_norm_matching", "features", 3.0, 0.0, 2),
    ("factor low_rank_approximation", "features", 3.0, 0.0, 2),
    ("selectivity variance", "features", 3.0, 0.0, 4),
    ("mmd", "embedding", 3.0, 1.0, 0),  # the median goes along
]


@pytest.mark.parametrize(("name", "field", "factor", "shift", "power"), LAWS)
def test_scale_and_shift(name, field, factor, shift, power):
    both = power or name == "mmd"
    student = scaled(STUDENT, field, factor, shift)
    teacher = scaled(TEACHER, field, factor, shift) if both else TEACHER
    value, _ = program(name)(outputs(student), outputs(teacher))
    plain, _ = program(name)(outputs(STUDENT), outputs(TEACHER))
    np.testing.assert_allclose(value, factor**power * plain, rtol=2e-4)


def test_temperature_is_squared_in_loss_and_gradient():
    """Hinton: the gradients of soft targets scale as 1/T^2, so the loss has T^2."""
    rng = np.random.default_rng(3)
    s, t = (Outputs(logits=rng.normal(size=(B, V)).astype(np.float32)) for _ in range(2))
    norms = []
    for T in (20.0, 200.0):
        loss = make_loss(opt("response_based", temperature=T))
        grad = jax.jit(jax.grad(loss))(s, t).logits
        norms.append(float(np.linalg.norm(grad)))
    assert norms[0] == pytest.approx(norms[1], rel=0.1)
    centred = lambda x: x - x.mean(-1, keepdims=True)  # at high T: 1/(B V) (s - t), eq. 4
    limit = (centred(s.logits) - centred(t.logits)) / (B * V)
    np.testing.assert_allclose(grad, limit, rtol=0.1, atol=2e-4)


def test_labels_alpha_and_the_soft_part_alone():
    labels = np.array([1, 6, 0, -1, 2], np.int32)
    s, t = outputs(STUDENT), outputs(TEACHER)
    options = opt("response_based", alpha=0.25, temperature=2.0)
    soft = np64.response(STUDENT["logits"], TEACHER["logits"], temperature=2.0)
    hard = np64.hard(STUDENT["logits"], labels, (labels >= 0).astype(float))
    assert float(distill_loss(options, s, t)) == pytest.approx(soft, rel=1e-5)
    both = distill_loss(options, s, t, labels)
    assert float(both) == pytest.approx(0.25 * hard + 0.75 * soft, rel=1e-5)
    # Class probabilities instead of ids are the same hard part.
    onehot = np.eye(V, dtype=np.float32)[np.maximum(labels, 0)] * (labels >= 0)[:, None]
    weights = (labels >= 0).astype(np.float32)
    ids = distill_loss(options, s, t, labels, weights=weights)
    assert float(distill_loss(options, s, t, onehot, weights=weights)) == pytest.approx(
        float(ids), rel=1e-6
    )


@pytest.mark.parametrize("name", CASES)
def test_an_example_of_weight_zero_is_as_if_it_were_not_there(name):
    cut = lambda fields: jax.tree.map(lambda x: x[:3], fields)
    _, formula, _ = CASES[name]
    poisoned = [jax.tree.map(np.copy, outputs(fields)) for fields in (STUDENT, TEACHER)]
    for leaf in jax.tree.leaves(poisoned):
        leaf[3:] = np.nan
    weights = np.array([1, 1, 1, 0, 0], np.float32)
    value, _ = program(name)(*poisoned, weights)
    np.testing.assert_allclose(value, formula(cut(STUDENT), cut(TEACHER)), rtol=3e-5)


def test_every_missing_field_is_named():
    empty = Outputs()
    for strategy in TERMS:
        options = opt(strategy)
        with pytest.raises(ValueError, match=r"needs|compares embeddings"):
            distill_loss(options, empty, empty)


def test_born_again_students_learn_features_too():
    """Without exits the student's own output and last features stand for them."""
    s, t = (outputs(x).replace(exits=(), exit_features=()) for x in (STUDENT, TEACHER))
    loss = jax.jit(make_loss(opt("self_distillation", feature_weight=2.0)))
    soft = np64.response(STUDENT["logits"], TEACHER["logits"], temperature=3.0)
    hint = np64.feature(flat(STUDENT["features"][1]), flat(TEACHER["features"][1]))
    assert float(loss(s, t)) == pytest.approx(soft + 2 * hint, rel=1e-5)
    with pytest.raises(ValueError, match="2 exits and features of 1"):
        loss(outputs(STUDENT).replace(exit_features=s.features[:1]), t)
    with pytest.raises(ValueError, match="features of its exits"):
        loss(s.replace(features=()), t)


@pytest.mark.smoke
def test_options_are_validated():
    with pytest.raises(
        ValueError, match=r"unknown DistillationStrategy 'x'; known: response_based"
    ):
        opt("x")
    for field, choice in CHOICES.items():
        with pytest.raises(ValueError, match=f"unknown {choice.__name__} 'nope'; known: .*"):
            KnowledgeDistillationOptions(**{"strategy": "response_based", field: "nope"})
    for bad in (
        dict(temperature=0.0), dict(temperature=-1.0), dict(temperature=float("inf")),
        dict(alpha=1.5), dict(jsd_beta=0.5001), dict(divergence="jsd", jsd_beta=1.0),
        dict(margin=2.0), dict(rank=3), dict(hybrid=(("feature_based", 1.0),)),
        dict(strategy="hybrid"), dict(strategy="hybrid", hybrid=(("hybrid", 1.0),)),
        dict(strategy="hybrid", hybrid=(("feature_based", 1.0), ("feature_based", 2.0))),
        dict(strategy="hybrid", hybrid=(("feature_based", -1.0),)),
        dict(strategy="factor_transfer", norm_order=3),
        dict(strategy="factor_transfer", rank=4),  # factor matching has no rank
        dict(strategy="contrastive", margin=0.2),  # info_nce has no margin
        dict(strategy="probabilistic_transfer", bandwidth=2.0),
        dict(strategy="probabilistic_transfer", moments=0),
        dict(strategy="feature_based", layer_weights=(-1.0,)),
        dict(strategy="feature_based", temperature=2.0),
        dict(strategy="feature_based", feature_weight=0.1),
        dict(strategy="self_distillation", feature_weight=-0.1),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"read|must|each strategy once|needs"):
            KnowledgeDistillationOptions(**bad)


def test_features_of_two_widths_are_projected():
    params = init_projection(jax.random.key(0), 3, 5)
    x = np.random.default_rng(0).normal(size=(2, 4, 3)).astype(np.float32)
    expected = x @ np.asarray(params["kernel"]) + params["bias"][None, None]
    np.testing.assert_allclose(project(params, x), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"\(2, 4, 3\) and teacher \(2, 4, 5\)"):
        distill_loss(opt("feature_based"), Outputs(features=(x,)),
                     Outputs(features=(np.zeros((2, 4, 5)),)))  # fmt: skip


def test_examples_of_one_label_are_no_negatives():
    s, t = STUDENT["embedding"], TEACHER["embedding"]
    labels = np.array([0, 0, 1, 1, 2])
    for mode in ("info_nce", "triplet", "nt_xent"):
        value = jax.jit(contrastive_loss, static_argnames="mode")(
            np.float32(s), np.float32(t), mode=mode, labels=labels
        )
        assert float(value) == pytest.approx(np64.contrastive(s, t, mode, labels=labels), rel=2e-5)


DEGENERATE = [
    *("relation euclidean", "contrastive triplet", "mmd", "moments", "similarity", "flow"),
    *("factor low_rank_approximation", "factor nuclear_norm_matching", "factor factor_matching"),
    *("selectivity sparsity", "selectivity peak_to_average"),
]


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_features_have_finite_gradients(name):
    zeros = {k: jax.tree.map(np.zeros_like, STUDENT[k]) for k in ("features", "embedding")}
    ones = {k: jax.tree.map(np.ones_like, STUDENT[k]) for k in zeros}
    value, (grad, _) = program(name)(outputs(STUDENT | zeros), outputs(TEACHER | ones))
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grad))


@pytest.mark.parametrize("strategy", ["response_based", "feature_based", "flow_based",
                                      "relation_based", "probabilistic_transfer"])  # fmt: skip
def test_no_weights_are_equal_weights(strategy):
    name = next(n for n, case in CASES.items() if case[0].strategy == strategy)
    plain = jax.jit(make_loss(CASES[name][0]))(outputs(STUDENT), outputs(TEACHER))
    value, _ = program(name)(outputs(STUDENT), outputs(TEACHER), np.full(B, 3, np.float32))
    np.testing.assert_allclose(plain, value, rtol=1e-5)


def test_a_class_that_the_teacher_excludes_costs_no_nan():
    t = Outputs(logits=jnp.array([[0.0, 1.0, -jnp.inf]]))
    s = Outputs(logits=jnp.array([[0.0, 1.0, 2.0]]))
    value, grad = jax.jit(jax.value_and_grad(make_loss(opt("response_based"))))(s, t)
    assert jnp.isfinite(value) and jnp.isfinite(grad.logits).all() and float(value) > 0
    both = make_loss(opt("response_based"))(t, t)
    assert float(both) == 0
