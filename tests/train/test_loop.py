"""`fit`: what happens when, in which order, and what stops it."""

import functools
import io
import math
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from aidx.models import LlamaConfig
from aidx.train import (
    Callback,
    Checkpoints,
    NonFiniteError,
    ProgressBar,
    fit,
    init_state,
    loss_scale,
    make_evaluate,
    make_train_step,
    train_flops_per_token,
)

OPTIMIZER = optax.sgd(0.1)


def loss_fn(p, batch, key):
    error = (p["w"][None] - batch["x"]) * batch["boost"]
    return (error**2).sum(), error.size, {"abs": jnp.abs(error).sum()}


@functools.cache
def train_step():
    return make_train_step(loss_fn, OPTIMIZER)


def batch(step, boost=1.0):
    return {"x": np.full((2, 3), 1.0 + step % 2, np.float32), "boost": np.float32(boost)}


def start(**options):
    return init_state(
        {"b": jnp.ones(1), "w": jnp.zeros(3)}, OPTIMIZER, jax.random.key(0), **options
    )


class Log(Callback):
    def __init__(self, stop_at=None):
        self.events, self.metrics, self.stop_at = [], [], stop_at

    def on_begin(self, state, steps):
        self.events.append(("begin", int(state.step), steps))

    def on_state(self, step, state):
        self.events.append(("state", step))
        assert not state.params["w"].is_deleted()

    def on_step(self, step, metrics):
        self.events.append(("step", step))
        self.metrics.append(metrics)
        return step == self.stop_at

    def on_evaluate(self, step, metrics):
        self.events.append(("evaluate", step))

    def on_save(self, step):
        self.events.append(("save", step))

    def on_end(self, reason):
        self.events.append(("end", reason))


@pytest.mark.smoke
def test_metrics_come_one_step_late_in_order_and_complete(tmp_path):
    log = Log()
    evaluate = make_evaluate(loss_fn, [batch(0), batch(1)])
    with Checkpoints(tmp_path) as checkpoints:
        result = fit(
            train_step(), start(), batch, steps=5, callbacks=[log], evaluate=evaluate,
            eval_every=2, checkpoints=checkpoints, save_every=4, flops_per_token=1.0,
        )  # fmt: skip
        assert checkpoints.steps == [4, 5]
    assert log.events == [
        ("begin", 0, 5),
        ("state", 0), ("state", 1), ("step", 0), ("step", 1), ("evaluate", 2),
        ("state", 2), ("state", 3), ("step", 2), ("step", 3), ("evaluate", 4), ("save", 4),
        ("state", 4), ("step", 4), ("evaluate", 5), ("save", 5),
        ("end", "done"),
    ]  # fmt: skip
    assert result.reason == "done" and int(result.state.step) == 5
    assert {"loss", "grad_norm", "param_norm", "update_norm", "weight", "abs"} <= set(
        log.metrics[0]
    )
    assert "tokens_per_second" not in log.metrics[0]
    # a batch without `tokens`: what the loss weighs is counted
    counted = log.metrics[1]["tokens_per_second"] * log.metrics[1]["step_seconds"]
    assert counted == pytest.approx(log.metrics[1]["weight"]) == 6
    assert result.metrics == log.metrics[-1]
    assert result.best == (result.evaluation["loss"], 5)


def test_evaluation_weighs_batches_by_their_weight():
    counts = [(1.0, 6), (3.0, 2)]
    evaluate = make_evaluate(
        lambda p, b, key: (b[0] * b[1], b[1], {"m": b[0] * b[1]}), [np.array(c) for c in counts]
    )
    found = evaluate(start())
    assert found["loss"] == found["m"] == 1.5
    assert found["perplexity"] == pytest.approx(math.exp(1.5))
    with pytest.raises(ValueError, match="no batch"):
        make_evaluate(loss_fn, [])(start())
    with pytest.raises(ValueError, match="no moving average"):
        make_evaluate(loss_fn, [batch(0)], ema=True)(start())
    averaged = make_evaluate(lambda p, b, key: (p["w"].sum(), 1), lambda: [batch(0)], ema=True)
    assert averaged(start(ema=True).replace(params={"w": jnp.ones(3)}))["loss"] == 0


def test_a_run_stops_when_evaluations_stop_getting_better_and_keeps_the_best(tmp_path):
    values = iter([3.0, 2.0, 2.5, 2.0, 1.0])
    with Checkpoints(tmp_path, keep=1) as best:
        result = fit(
            train_step(), start(), batch, steps=50, eval_every=3, patience=2, best=best,
            evaluate=lambda state: {"loss": next(values)},
        )  # fmt: skip
        assert best.steps == [6]
    assert result.reason == "early_stop" and int(result.state.step) == 12
    assert result.best == (2.0, 6)


def test_patience_survives_a_restart(tmp_path):
    values = {2: 1.0, 4: 2.0, 6: 3.0, 8: 4.0}
    options = dict(eval_every=2, patience=3, evaluate=lambda s: {"loss": values[int(s.step)]})
    with Checkpoints(tmp_path) as checkpoints:
        first = fit(
            train_step(), start(), batch, steps=4, checkpoints=checkpoints, save_every=1, **options
        )
        assert first.reason == "done" and first.best == (1.0, 2)
        second = fit(train_step(), start(), batch, steps=20, checkpoints=checkpoints, **options)
    assert (second.reason, int(second.state.step), second.best) == ("early_stop", 8, (1.0, 2))


@pytest.mark.smoke
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_leaf(tmp_path):
    log = Log()
    spoiled = lambda step: batch(step, boost=np.inf if step == 7 else 1.0)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(NonFiniteError, match=r"step 7: the gradient of w is not finite"):
            fit(
                train_step(), start(), spoiled, steps=20, checkpoints=checkpoints, save_every=4,
                callbacks=[log],
            )  # fmt: skip
        checkpoints.wait()
        assert checkpoints.steps == [4]  # not 8, whose last step was bad
        good, _ = checkpoints.restore(start())
    assert np.isfinite(np.asarray(good.params["w"])).all()
    assert log.events[-1] == ("end", "failed")


def test_a_loss_scale_above_one_is_searching_not_failing():
    spoiled = lambda step: batch(step, boost=np.inf if step == 1 else 1.0)
    result = fit(train_step(), start(loss_scale=loss_scale(4.0)), spoiled, steps=4)
    assert float(result.state.loss_scale.scale) == 2
    with pytest.raises(NonFiniteError):
        fit(train_step(), start(loss_scale=loss_scale(1.0)), spoiled, steps=4)


def test_a_callback_may_end_the_run_and_what_batches_raise_is_raised():
    result = fit(train_step(), start(), batch, steps=50, callbacks=[Log(stop_at=3)])
    assert result.reason == "callback" and int(result.state.step) == 5  # one was in flight

    def broken(step):
        if step == 2:
            raise OSError("the disk is gone")
        return batch(step)

    log = Log()
    with pytest.raises(OSError, match="the disk is gone"):
        fit(train_step(), start(), broken, steps=5, callbacks=[log])
    assert log.events[-1] == ("end", "failed")


def test_sigterm_saves_then_takes_its_course(tmp_path):
    taken = []

    class Terminate(Callback):
        def on_state(self, step, state):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: taken.append("theirs"))
    try:
        with Checkpoints(tmp_path) as checkpoints:
            result = fit(
                train_step(), start(), batch, steps=9, checkpoints=checkpoints,
                callbacks=[Terminate()],
            )  # fmt: skip
            assert checkpoints.steps == [3]
    finally:
        signal.signal(signal.SIGTERM, before)
    assert result.reason == "terminated" and taken == ["theirs"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": -1}, "steps=-1"),
        ({"save_every": 3}, "save_every=3 without checkpoints"),
        ({"eval_every": 0, "evaluate": print}, "eval_every=0"),
        ({"patience": 2}, "without evaluate"),
        ({"patience": 0, "evaluate": print}, "patience=0"),
        ({"evaluate": lambda s: {"loss": 1.0}, "monitor": "nll"}, "monitor='nll'"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fit(train_step(), start(), batch, **({"steps": 1} | options))


def test_the_progress_bar_prints_lines_elsewhere_than_on_a_terminal():
    file = io.StringIO()
    evaluate = lambda state: {"loss": 0.5}
    fit(
        train_step(), start(), batch, steps=4, evaluate=evaluate, eval_every=2,
        callbacks=[ProgressBar(every=3, file=file)],
    )  # fmt: skip
    lines = file.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["2", "3/4", "4/4", "4"]
    assert "evaluation: loss 0.5000" in lines[0] and "tokens_per_second" in lines[2]


def test_operations_per_token_are_those_of_the_matrices_and_of_causal_attention():
    config = LlamaConfig(100, 32, 64, 2, 4, 2, 8, tied=True)
    matrices = 2 * (32 * 2 * 4 * 8 + 32 * 32 + 32 * 128 + 64 * 32) + 100 * 32
    attention = 3 * 2 * 4 * 4 * 8 * 128 / 2
    assert train_flops_per_token(config, 128) == 6 * matrices + attention
    untied = LlamaConfig(100, 32, 64, 2, 4, 2, 8)
    assert train_flops_per_token(untied, 128) == train_flops_per_token(config, 128)
    windowed = LlamaConfig(100, 32, 64, 2, 4, 2, 8, tied=True, windows=(None, 16))
    fewer = train_flops_per_token(config, 128) - train_flops_per_token(windowed, 128)
    seen = np.minimum(np.arange(128) + 1, 16).mean()
    assert fewer == pytest.approx(12 * 4 * 8 * (64 - seen))
