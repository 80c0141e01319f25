"""Laws of the training step: what must not change a result does not."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aidx.train import init_state, loss_scale, make_train_step, remat
from aidx.train.step import clip, leaf_name, split_batch

KEY = jax.random.key(3)
B, T, D, V = 8, 5, 4, 7


def params():
    draw = lambda i, *shape: jax.random.normal(jax.random.fold_in(KEY, i), shape)
    return {"embed": draw(0, V, D), "layers": ({"w": draw(1, D, D)},), "head": draw(2, D, V)}


def batch(masked=True):
    rng = np.random.default_rng(0)
    mask = np.ones((B, T), np.float32)
    if masked:  # every row has another number of tokens, one has none
        mask = (np.arange(T) < np.array([5, 1, 0, 3, 2, 5, 4, 1])[:, None]).astype(np.float32)
    return {
        "tokens": jnp.asarray(rng.integers(0, V, (B, T))),
        "targets": jnp.asarray(rng.integers(0, V, (B, T))),
        "mask": jnp.asarray(mask),
    }


def loss_fn(p, batch, key, boost=None):
    x = jnp.tanh(p["embed"][batch["tokens"]] @ p["layers"][0]["w"])
    if boost is not None:
        x = x * boost
    log_p = jax.nn.log_softmax((x @ p["head"]).astype(jnp.float32))
    nll = -jnp.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
    correct = (log_p.argmax(-1) == batch["targets"]) * batch["mask"]
    return (nll * batch["mask"]).sum(), batch["mask"].sum(), {"accuracy": correct.sum()}


def noisy_loss(p, batch, key):
    total, weight, _ = loss_fn(p, batch, key)
    return total + weight * (jax.random.normal(key, p["head"].shape) * p["head"]).sum(), weight


def mean_loss(p, data):
    total, weight, _ = loss_fn(p, data, None)
    return total / weight


OPTIMIZER = optax.inject_hyperparams(optax.adamw)(learning_rate=0.01, weight_decay=0.1)


def one(state_options=None, data=None, loss=loss_fn, p=None, rest=(), **options):
    state = init_state(p or params(), OPTIMIZER, KEY, **(state_options or {}))
    return make_train_step(loss, OPTIMIZER, **options)(state, data or batch(), *rest)


@pytest.mark.smoke
def test_a_step_is_the_gradient_of_the_mean_over_tokens_through_the_optimiser():
    state, metrics = one()
    loss, grads = jax.value_and_grad(mean_loss)(params(), batch())
    updates, _ = OPTIMIZER.update(grads, OPTIMIZER.init(params()), params())
    wanted = optax.apply_updates(params(), updates)
    chex.assert_trees_all_close(state.params, wanted, rtol=1e-6)
    norm = lambda tree: np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(tree)))
    assert metrics.loss == pytest.approx(float(loss), rel=1e-6)
    assert metrics.grad_norm == pytest.approx(norm(grads), rel=1e-5)
    assert metrics.param_norm == pytest.approx(norm(wanted), rel=1e-5)
    assert metrics.update_norm == pytest.approx(norm(updates), rel=1e-5)
    assert (float(metrics.weight), int(metrics.bad_leaf), int(state.step)) == (21, -1, 1)
    assert metrics.learning_rate == pytest.approx(0.01)
    assert 0 <= float(metrics.extra["accuracy"]) <= 1


@pytest.mark.smoke
@pytest.mark.parametrize("n", [2, 4, 8])
def test_microbatches_of_unequal_token_counts_are_one_batch(n):
    whole, m1 = one()
    split, mn = one(microbatches=n)
    chex.assert_trees_all_close(whole.params, split.params, rtol=1e-5, atol=1e-7)
    # With Adam the first step hides the gradient's size; its norm does not.
    for field in ("loss", "weight", "grad_norm", "update_norm"):
        assert getattr(mn, field) == pytest.approx(float(getattr(m1, field)), rel=1e-5), field
    assert mn.extra["accuracy"] == pytest.approx(float(m1.extra["accuracy"]), rel=1e-6)


def test_microbatch_i_has_the_rows_i_by_n_and_a_bad_split_names_the_leaf():
    assert split_batch({"x": jnp.arange(6)}, 3)["x"].tolist() == [[0, 3], [1, 4], [2, 5]]
    with pytest.raises(ValueError, match=r"mask.*\(8, 5\).*3 microbatches"):
        one(microbatches=3)


def test_no_token_at_all_is_no_gradient_and_no_nan():
    data = batch() | {"mask": jnp.zeros((B, T))}
    for n in (1, 2):
        _, metrics = one(data=data, microbatches=n)
        assert (float(metrics.loss), float(metrics.grad_norm), int(metrics.bad_leaf)) == (0, 0, -1)


def test_clipping_is_by_the_global_norm():
    grads = jax.grad(mean_loss)(params(), batch())
    norm = float(np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(grads))))
    clipped, found, bad = clip(grads, norm / 2)
    chex.assert_trees_all_close(clipped, jax.tree.map(lambda g: g / 2, grads), rtol=1e-5)
    assert found == pytest.approx(norm, rel=1e-6) and int(bad) == -1
    loose, _, _ = clip(grads, norm * 2)
    chex.assert_trees_all_equal(loose, grads)
    sgd = optax.sgd(1.0)
    step = make_train_step(loss_fn, sgd, clip_norm=norm / 2)
    _, metrics = step(init_state(params(), sgd, KEY), batch())
    assert metrics.update_norm == pytest.approx(norm / 2, rel=1e-5)
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-5)


def test_mixed_precision_computes_in_bf16_and_keeps_f32_masters():
    seen = []

    def spy(p, data, key):
        seen.append({str(x.dtype) for x in jax.tree.leaves(p)})
        return loss_fn(p, data, key)

    state, half = one(loss=spy, compute_dtype=jnp.bfloat16)
    assert seen == [{"bfloat16"}]
    assert {str(x.dtype) for x in jax.tree.leaves(state.params)} == {"float32"}
    _, full = one()
    assert half.loss == pytest.approx(float(full.loss), rel=0.02)
    assert half.grad_norm == pytest.approx(float(full.grad_norm), rel=0.05)
    _, metrics = one(compute_dtype=jnp.bfloat16, microbatches=4)
    assert metrics.grad_norm == pytest.approx(float(half.grad_norm), rel=0.02)


def test_a_loss_scale_changes_no_gradient_and_saves_what_f16_would_flush():
    plain, _ = one()
    for n in (1, 2):
        scaled, metrics = one({"loss_scale": loss_scale(1024.0)}, microbatches=n)
        chex.assert_trees_all_close(plain.params, scaled.params, rtol=1e-5, atol=1e-7)
        assert float(metrics.loss_scale) == 1024
    small = lambda p, data, key: ((p["w"] * 1e-4 * data).sum(dtype=jnp.float32) * 1e-4, 1)
    p, data, sgd = {"w": jnp.ones(3)}, jnp.full(3, 0.1, jnp.float16), optax.sgd(1.0)
    norms = {}
    for scale in (None, loss_scale(2.0**15)):
        step = make_train_step(small, sgd, compute_dtype=jnp.float16)
        norms[bool(scale)] = step(init_state(p, sgd, KEY, loss_scale=scale), data)[1].grad_norm
    assert float(norms[False]) == 0
    assert norms[True] == pytest.approx(3**0.5 * 1e-9, rel=0.05)


def test_the_loss_scale_halves_on_overflow_without_an_update_and_grows_after_the_interval():
    state = init_state(params(), OPTIMIZER, KEY, loss_scale=loss_scale(64.0, growth_interval=2))
    step = make_train_step(loss_fn, OPTIMIZER)
    before = jax.tree.map(np.asarray, (state.params, state.opt_state))
    state, metrics = step(state, batch(), jnp.float32(np.inf))
    assert int(metrics.bad_leaf) >= 0 and float(state.loss_scale.scale) == 32
    chex.assert_trees_all_equal((state.params, state.opt_state), before)
    scales = []
    for _ in range(4):
        state, _ = step(state, batch(), jnp.float32(1))
        scales.append(float(state.loss_scale.scale))
    assert scales == [32, 64, 64, 128] and int(state.step) == 5


@pytest.mark.smoke
def test_a_gradient_that_is_not_finite_is_named_and_leaves_the_state_alone():
    p = params()
    p["layers"][0]["w"] = p["layers"][0]["w"].at[0, 0].set(jnp.nan)
    state, metrics = one({"ema": True}, p=p, ema_decay=0.9)
    chex.assert_trees_all_equal(state.params, p)
    chex.assert_trees_all_equal(state.ema, p)
    assert int(state.step) == 1 and int(metrics.bad_leaf) == 0
    only = lambda q, data, key: ((q["layers"][0]["w"] * jnp.inf).sum(), 1)
    _, metrics = one(loss=only)
    assert leaf_name(params(), int(metrics.bad_leaf)) == "layers/0/w"
    state, _ = one(p=p, skip_nonfinite=False)
    assert np.isnan(np.asarray(state.params["head"])).any()


def test_the_average_follows_the_parameters():
    state, _ = one({"ema": True}, ema_decay=0.75)
    wanted = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, params(), state.params)
    chex.assert_trees_all_close(state.ema, wanted, rtol=1e-6)
    with pytest.raises(ValueError, match="ema_decay=None"):
        one({"ema": True})
    with pytest.raises(ValueError, match="ema=False"):
        one(ema_decay=0.5)


def test_the_key_of_a_step_is_a_function_of_the_runs_key_and_the_step_alone():
    step = make_train_step(noisy_loss, OPTIMIZER)
    run, losses = init_state(params(), OPTIMIZER, KEY), []
    for _ in range(3):
        run, metrics = step(run, batch())
        losses.append(float(metrics.loss))
    again = init_state(params(), OPTIMIZER, KEY)
    again, _ = step(again, batch())
    saved = jax.tree.map(lambda x: jnp.array(x, copy=True), again)  # as if resumed from step 1
    for wanted in losses[1:]:
        saved, metrics = step(saved, batch())
        assert float(metrics.loss) == wanted
    chex.assert_trees_all_equal(jax.random.key_data(saved.key), jax.random.key_data(run.key))
    chex.assert_trees_all_equal(saved.params, run.params)
    assert len(set(losses)) == 3


@pytest.mark.smoke
def test_the_step_is_traced_once_and_its_state_aliases():
    traced = chex.assert_max_traces(loss_fn, n=1)
    step = make_train_step(traced, OPTIMIZER, microbatches=1)
    p = params()
    state = init_state(p, OPTIMIZER, KEY, ema=False)
    text = step.lower(state, batch()).as_text()
    assert text.count("tf.aliasing_output") >= len(jax.tree.leaves((state.params, state.opt_state)))
    first = state.params["head"]
    for _ in range(3):
        state, _ = step(state, batch())
    assert first.is_deleted() and not p["head"].is_deleted()


def test_further_arguments_reach_the_loss_and_are_kept():
    boost = jnp.float32(0.5)
    _, metrics = one(rest=(boost,), microbatches=2)
    total, weight, _ = loss_fn(params(), batch(), None, boost)
    assert metrics.loss == pytest.approx(float(total / weight), rel=1e-6)
    assert not boost.is_deleted()


def test_arguments_of_the_update_come_from_the_batch():
    sgd = optax.chain(
        optax.GradientTransformationExtraArgs(
            lambda p: optax.EmptyState(),
            lambda g, s, p, *, rate: (jax.tree.map(lambda x: -rate * x, g), s),
        )
    )
    step = make_train_step(
        lambda p, b, key: loss_fn(p, b["data"], key),
        sgd,
        update_args=lambda b: {"rate": b["rate"]},
    )
    state, _ = step(init_state(params(), sgd, KEY), {"data": batch(), "rate": jnp.float32(0)})
    chex.assert_trees_all_equal(state.params, params())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"microbatches": 0}, "microbatches=0"),
        ({"clip_norm": -1.0}, "clip_norm=-1.0"),
        ({"ema_decay": 1.0}, "ema_decay=1.0"),
        ({"compute_dtype": jnp.int8}, "int8"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make_train_step(loss_fn, OPTIMIZER, **options)


def test_wrong_losses_states_and_policies_are_refused():
    with pytest.raises(TypeError, match="must return"):
        one(loss=lambda p, b, key: p["head"].sum())
    with pytest.raises(TypeError, match="scalars"):
        one(loss=lambda p, b, key: (p["head"], 1))
    with pytest.raises(TypeError, match="dict"):
        one(loss=lambda p, b, key: (p["head"].sum(), 1, 3))
    with pytest.raises(TypeError, match="typed"):
        init_state(params(), OPTIMIZER, jax.random.PRNGKey(0))
    with pytest.raises(TypeError, match=r"\['n'\].*int32"):
        init_state({"n": jnp.arange(3)}, OPTIMIZER, KEY)
    with pytest.raises(ValueError, match="everything"):
        remat("everything")
    with pytest.raises(ValueError, match=r"initial=0.5"):
        loss_scale(0.5)
    with pytest.raises(ValueError, match=r"growth_interval=0"):
        loss_scale(1.0, 0)


def test_norms_are_left_out_where_they_are_not_wanted_and_change_nothing_else():
    loss_fn = lambda p, x, key: (((p - x) ** 2).sum(), x.size)
    optimizer = optax.adam(0.1)
    found = []
    for norms in (True, False):
        state = init_state(jnp.zeros(3), optimizer, jax.random.key(0))
        step = make_train_step(loss_fn, optimizer, norms=norms)
        found.append(step(state, jnp.arange(3.0)))
    (with_norms, told), (without, untold) = found
    chex.assert_trees_all_equal(with_norms.params, without.params)
    assert untold.param_norm is None and untold.update_norm is None
    assert told.param_norm > 0 and told.update_norm > 0 and told.grad_norm == untold.grad_norm
