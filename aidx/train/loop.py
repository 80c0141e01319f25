"""`fit`: the loop around a pure step.  It reads a step's metrics while the next one runs."""

import collections
import contextlib
import dataclasses
import math
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from ..telemetry.profiler import profile_scope
from ..typing import PyTree
from .checkpoint import Checkpoints
from .data import prefetch
from .state import TrainState
from .step import LossFn, Metrics, cast_floating, checked, leaf_name
from .throughput import model_flops_utilisation


class NonFiniteError(FloatingPointError):
    """A loss or gradient that is not finite; the message names step and leaf."""


class Callback:
    """What a run tells others; every method does nothing until it is overridden.

    >>> class Losses(Callback):
    ...     def on_step(self, step, metrics): print(step, metrics["loss"])
    >>> Losses().on_step(1, {"loss": 0.5})
    1 0.5
    """

    def on_begin(self, state: TrainState, steps: int) -> None:
        """Before the first step, with the state it starts from and the step it ends at."""

    def on_state(self, step: int, state: TrainState) -> None:
        """After step number `step` was dispatched; the state is donated to the next, keep none."""

    def on_step(self, step: int, metrics: dict[str, float]) -> bool | None:
        """When the metrics of a step are on the host; True ends the run."""

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> bool | None:
        """After an evaluation; True ends the run."""

    def on_save(self, step: int) -> None:
        """When the checkpoint of a step was begun."""

    def on_end(self, reason: str) -> None:
        """At the end, also of a run that failed; the reason is that of `FitResult`."""


class StepFn(Protocol):
    """`step(state, batch, *rest) -> (state, metrics)`, as `make_train_step` makes it."""

    def __call__(self, state: TrainState, batch: PyTree, *rest: Any) -> tuple[TrainState, Metrics]:
        """See the class."""
        ...


@dataclasses.dataclass(frozen=True)
class FitResult:
    """How a run ended.

    Attributes:
      state: after the last step.
      reason: `done`, `early_stop` (no better evaluation for `patience` of them) or `callback`.
      metrics: of the last step.
      evaluation: the last evaluation.
      best: the best monitored value, and the step it was found at.
    """

    state: TrainState
    reason: str
    metrics: dict[str, float]
    evaluation: dict[str, float]
    best: tuple[float, int] | None


def fit(
    step: StepFn,
    state: TrainState,
    batch: Callable[[int], PyTree],
    *,
    steps: int,
    rest: tuple = (),
    checkpoints: Checkpoints | None = None,
    save_every: int | None = None,
    resume: bool = True,
    evaluate: Callable[[TrainState], dict[str, float]] | None = None,
    eval_every: int | None = None,
    monitor: str = "loss",
    patience: int | None = None,
    best: Checkpoints | None = None,
    callbacks: Sequence[Callback] = (),
    flops_per_token: float | None = None,
    sharding: jax.sharding.Sharding | None = None,
    prefetch_depth: int = 2,
) -> FitResult:
    """Take steps until `steps` have been taken in all.

    A step's metrics are read after the next one was dispatched, so the device never waits for the
    host.  With checkpoints a run that was killed goes on where it was, batch for batch and bit for
    bit (on a GPU as far as its operations are deterministic).  SIGTERM saves, then takes its usual
    course.

    Args:
      step: of `make_train_step`.
      state: where to start; donated.
      batch: the batch of a step number on the host (`PackedTokens(...).batch`).
      steps: the last step's number plus one.
      rest: further arguments of step.
      checkpoints: where the state is saved: every `save_every` steps, at the end and on SIGTERM.
      save_every: steps between two checkpoints; None saves at the end only.
      resume: start from the last checkpoint where there is one.
      evaluate: `state -> {name: value}`, every `eval_every` steps and at the end
        (`make_evaluate`).
      eval_every: steps between two evaluations.
      monitor: which of its values is to fall.
      patience: evaluations in a row without a new best after which the run ends.
      best: keeps the state of the best evaluation (give it `keep=1`).
      callbacks: told what happens, in order.
      flops_per_token: of `train_flops_per_token`; then the metrics tell the MFU.
      sharding: of the batch's leaves.
      prefetch_depth: batches made ahead.

    Returns:
      A `FitResult`.  The metrics are those of `Metrics` as floats, and `tokens_per_second`,
      `step_seconds` and `mfu` where they are known.

    Raises:
      ValueError: options that need one another.
      NonFiniteError: a loss or gradient is not finite (with a loss scale: at scale 1).  The
        checkpoints of before are complete, and no later one was written.

    >>> import optax
    >>> from aidx.train import init_state, make_train_step
    >>> optimizer = optax.sgd(0.5)
    >>> step = make_train_step(lambda p, x, key: (((p - x) ** 2).sum(), x.size), optimizer)
    >>> state = init_state(jnp.zeros(3), optimizer, jax.random.key(0))
    >>> result = fit(step, state, lambda i: np.ones(3, np.float32), steps=20)
    >>> result.reason, int(result.state.step), result.metrics["loss"] < 1e-3
    ('done', 20, True)
    """
    check_fit(steps, checkpoints, save_every, evaluate, eval_every, patience, best)
    run = _Run(callbacks, checkpoints, best, evaluate, monitor, patience, flops_per_token)
    if checkpoints is not None and resume and checkpoints.latest is not None:
        state, meta = checkpoints.restore(state)
        run.resume(meta)
    run.leaves = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state.params)
    start, stop = int(state.step), None
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: [c.on_end(run.reason) for c in callbacks])
        terminated = stack.enter_context(sigterm())
        for c in callbacks:
            c.on_begin(state, steps)
        coming = prefetch(batch, range(start, steps), depth=prefetch_depth, sharding=sharding)
        stack.callback(coming.close)
        while (made := next_batch(coming)) is not None:
            number, data = made
            done = number + 1
            with profile_scope("step"):
                state, metrics = step(state, data, *rest)
            run.pending.append((number, count_tokens(data), metrics))
            for c in callbacks:
                c.on_state(number, state)
            stop = run.read(1)
            last = done == steps or stop is not None or terminated.is_set()
            if not terminated.is_set() and (last or done % (eval_every or steps) == 0):
                stop = run.assess(done, state) or stop
            if last or stop or (save_every and done % save_every == 0):
                run.save(done, state)
            if stop or terminated.is_set():
                break
        stop = run.read(0) or stop
        for kept in (checkpoints, best):
            if kept is not None:
                kept.wait()
        run.reason = "terminated" if terminated.is_set() else stop or "done"
    return FitResult(state, run.reason, run.metrics, run.evaluation, run.found)


@profile_scope("data")
def next_batch(coming: Iterator[tuple[int, PyTree]]) -> tuple[int, PyTree] | None:
    """The next of an iterator, or None: where the loop waits for data.

    >>> next_batch(iter([(0, "a")]))
    (0, 'a')
    """
    return next(coming, None)


class _Run:
    """What `fit` remembers on the host between two steps."""

    def __init__(
        self,
        callbacks: Sequence[Callback],
        checkpoints: Checkpoints | None,
        best: Checkpoints | None,
        evaluate: Callable[[TrainState], dict[str, float]] | None,
        monitor: str,
        patience: int | None,
        flops_per_token: float | None,
    ):
        self.callbacks, self.checkpoints, self.best = callbacks, checkpoints, best
        self.evaluate, self.monitor, self.patience = evaluate, monitor, patience
        self.flops_per_token = flops_per_token
        self.reason = "failed"  # until the end is reached
        # (step, tokens where the batch tells, device metrics)
        self.pending: collections.deque = collections.deque()
        self.leaves: PyTree = None
        self.metrics: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}
        self.best_value, self.best_step, self.waited = math.inf, -1, 0
        self.ended: float | None = None  # when the last step's end was seen

    @property
    def found(self) -> tuple[float, int] | None:
        """The best evaluation and its step."""
        return None if self.best_step < 0 else (self.best_value, self.best_step)

    def read(self, in_flight: int) -> str | None:
        """Bring metrics to the host until so many steps are in flight; why to end, or None."""
        ending = False
        while len(self.pending) > in_flight:
            number, tokens, metrics = self.pending.popleft()
            with profile_scope("read"):
                found = host_metrics(jax.device_get(metrics))
            check_finite(number, found, self.leaves)
            self.metrics = found | self.speed(found.get("weight") if tokens is None else tokens)
            ending |= any([c.on_step(number, self.metrics) for c in self.callbacks])
        return "callback" if ending else None

    def speed(self, tokens: float | None) -> dict[str, float]:
        """Seconds since the end of the step before, and what follows from them."""
        now, before = time.perf_counter(), self.ended
        self.ended = now
        if before is None:  # the first step compiles; an evaluation is no step
            return {}
        found = {"step_seconds": now - before}
        if tokens is None:
            return found
        rate = tokens / (now - before)
        found["tokens_per_second"] = rate
        mfu = None
        if self.flops_per_token is not None:
            mfu = model_flops_utilisation(rate, self.flops_per_token)
        return found if mfu is None else found | {"mfu": mfu}

    def assess(self, number: int, state: TrainState) -> str | None:
        """Evaluate after `number` steps; why to end, or None."""
        if self.evaluate is None:
            return None
        ending = self.read(0) is not None
        with profile_scope("evaluate"):
            found = self.evaluate(state)
        self.evaluation = {name: float(value) for name, value in found.items()}
        self.ended = None
        if self.monitor not in self.evaluation:
            raise ValueError(f"monitor={self.monitor!r} is not one of {sorted(self.evaluation)}")
        if self.evaluation[self.monitor] < self.best_value:
            self.best_value, self.best_step = self.evaluation[self.monitor], number
            self.waited = 0
            if self.best is not None:
                self.best.save(number, state, self.meta())
        else:
            self.waited += 1
        ending |= any([c.on_evaluate(number, self.evaluation) for c in self.callbacks])
        if self.patience is not None and self.waited >= self.patience:
            return "early_stop"
        return "callback" if ending else None

    def save(self, number: int, state: TrainState) -> None:
        """Begin the checkpoint of a state, once it is known to be finite."""
        if self.checkpoints is not None:
            self.read(0)
            with profile_scope("save"):
                self.checkpoints.save(number, state, self.meta())
            for c in self.callbacks:
                c.on_save(number)

    def resume(self, meta: dict[str, Any]) -> None:
        """Go on from what `meta` gave."""
        self.best_value = math.inf if meta["best"] is None else meta["best"]
        self.best_step, self.waited = meta["best_step"], meta["waited"]

    def meta(self) -> dict[str, Any]:
        """What resuming needs beside the state."""
        value = None if math.isinf(self.best_value) else self.best_value
        return {"best": value, "best_step": self.best_step, "waited": self.waited}


def check_fit(
    steps: int,
    checkpoints: Checkpoints | None,
    save_every: int | None,
    evaluate: Callable | None,
    eval_every: int | None,
    patience: int | None,
    best: Checkpoints | None,
) -> None:
    """Raise ValueError for options of `fit` that have no effect or no sense.

    >>> check_fit(3, None, None, None, 10, None, None)
    Traceback (most recent call last):
    ValueError: eval_every=10, patience=None or best without evaluate
    """
    if steps < 0:
        raise ValueError(f"{steps=} must not be negative")
    for name, value in (("save_every", save_every), ("eval_every", eval_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be positive")
    if save_every is not None and checkpoints is None:
        raise ValueError(f"{save_every=} without checkpoints")
    if evaluate is None and (eval_every, patience, best) != (None, None, None):
        raise ValueError(f"{eval_every=}, {patience=} or best without evaluate")
    if patience is not None and patience < 1:
        raise ValueError(f"{patience=} must be positive")


def count_tokens(batch: PyTree) -> int | None:
    """The entries of `tokens` in a batch; None where it has none: the loss's weight counts then.

    >>> count_tokens({"tokens": np.zeros((2, 3))}), count_tokens(np.zeros((4, 2)))
    (6, None)
    """
    if isinstance(batch, dict) and "tokens" in batch:
        return int(np.prod(batch["tokens"].shape))
    return None


def host_metrics(metrics: Any) -> dict[str, float]:
    """Metrics as one flat dict of floats; what is None is left out.

    >>> host_metrics({"loss": np.float32(1), "extra": {"nll": np.float32(2)}})
    {'loss': 1.0, 'nll': 2.0}
    """
    fields = metrics if isinstance(metrics, dict) else vars(metrics)
    extra = fields.get("extra") or {}
    flat = {k: v for k, v in fields.items() if k != "extra" and v is not None}
    if clash := set(flat) & set(extra):
        raise ValueError(f"the loss reports {sorted(clash)}, which a step reports itself")
    return {name: float(value) for name, value in (flat | extra).items()}


def check_finite(step: int, metrics: dict[str, float], params: PyTree) -> None:
    """Raise NonFiniteError where a step's loss or gradient is not finite.

    With a loss scale above 1 it is how the scale is found, and no error.

    >>> check_finite(7, {"loss": 1.0, "bad_leaf": 1.0}, {"a": 0, "b": 0})
    Traceback (most recent call last):
    aidx.train.loop.NonFiniteError: step 7: the gradient of b is not finite (loss 1.0)
    """
    if metrics.get("loss_scale", 1.0) > 1:
        return
    bad, loss = int(metrics.get("bad_leaf", -1)), metrics.get("loss", 0.0)
    if bad >= 0:
        name = leaf_name(params, bad) or "the parameters"
        raise NonFiniteError(f"step {step}: the gradient of {name} is not finite (loss {loss})")
    if not math.isfinite(loss):
        raise NonFiniteError(f"step {step}: the loss is {loss}, its gradient is finite")


@contextlib.contextmanager
def sigterm() -> Iterator[threading.Event]:
    """An event that SIGTERM sets; on leaving, a signal that came is raised as it was meant.

    Elsewhere than in the main thread, signals cannot be caught and none is.

    >>> with sigterm() as event:
    ...     event.is_set()
    False
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)
        if event.is_set():
            signal.raise_signal(signal.SIGTERM)


def make_evaluate(
    loss_fn: LossFn,
    batches: Sequence[PyTree] | Callable[[], Iterable[PyTree]],
    *,
    rest: tuple = (),
    compute_dtype: Any = None,
    ema: bool = False,
    key: jax.Array | None = None,
) -> Callable[[TrainState], dict[str, float]]:
    """`evaluate(state) -> {"loss", "perplexity", and the loss's sums}` over all batches.

    Args:
      loss_fn: as of `make_train_step`; totals and weights are summed over the batches.
      batches: evaluated every time, in order; or what makes them.
      rest: further arguments of loss_fn.
      compute_dtype: the parameters are cast to it.
      ema: evaluate the moving average.
      key: given to loss_fn; None is `jax.random.key(0)`.

    Raises:
      ValueError: when called: the state has no average, or there is no batch.

    >>> from aidx.train import init_state
    >>> import optax
    >>> evaluate = make_evaluate(lambda p, x, key: ((p * x).sum(), x.size), [jnp.ones(2)])
    >>> evaluate(init_state(jnp.full(2, 3.0), optax.sgd(1.0), jax.random.key(0)))["loss"]
    3.0
    """
    key = jax.random.key(0) if key is None else key

    @jax.jit
    def one(params: PyTree, batch: PyTree, key: jax.Array, *rest: Any) -> tuple:
        return checked(loss_fn(cast_floating(params, compute_dtype), batch, key, *rest))

    def evaluate(state: TrainState) -> dict[str, float]:
        params = state.ema if ema else state.params
        if params is None:
            raise ValueError("the state has no moving average to evaluate")
        found = None
        for batch in batches() if callable(batches) else batches:
            sums = one(params, batch, key, *rest)
            found = sums if found is None else jax.tree.map(jnp.add, found, sums)
        if found is None:
            raise ValueError("there is no batch to evaluate")
        total, weight, sums = jax.device_get(found)
        loss = float(total / weight)
        means = {name: float(value / weight) for name, value in sums.items()}
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **means}

    return evaluate


class ProgressBar(Callback):
    """A rich progress bar on a terminal; elsewhere a line every `every` steps.

    Args:
      every: steps between two lines.
      file: where to; None is standard error.

    >>> bar = ProgressBar(every=1, file=sys.stdout)
    >>> bar.on_begin(None, 2); bar.on_step(0, {"loss": 1.0, "tokens_per_second": 5e4})
    1/2  loss 1.0000  tokens_per_second 50000
    """

    def __init__(self, every: int = 10, file: Any = None):
        from rich.console import Console

        self.every = every
        self.steps = 0
        self.console = Console(file=file or sys.stderr)
        self.bar: Any = None
        self.task: Any = None

    def on_begin(self, state: TrainState, steps: int) -> None:
        """Show the bar."""
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining

        self.steps = steps
        if self.console.is_terminal:
            columns = (
                BarColumn(),
                MofNCompleteColumn(),
                Remaining(),
                TextColumn("{task.fields[text]}"),
            )
            self.bar = Progress(*columns, console=self.console)
            self.bar.start()
            self.task = self.bar.add_task("", total=steps, completed=int(state.step), text="")

    def on_step(self, step: int, metrics: dict[str, float]) -> None:
        """Move it."""
        text = shown(metrics)
        if self.bar is not None:
            self.bar.update(self.task, completed=step + 1, text=text)
        elif (step + 1) % self.every == 0 or step + 1 == self.steps:
            self.console.print(f"{step + 1}/{self.steps}  {text}", highlight=False, soft_wrap=True)

    def on_evaluate(self, step: int, metrics: dict[str, float]) -> None:
        """Print it."""
        text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())
        self.console.print(f"{step}  evaluation: {text}", highlight=False, soft_wrap=True)

    def on_end(self, reason: str) -> None:
        """Take it away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def shown(metrics: dict[str, float]) -> str:
    """The few metrics that fit on a line.

    >>> shown({"loss": 2.0, "grad_norm": 0.5, "weight": 8.0})
    'loss 2.0000  grad_norm 0.500'
    """
    formats = {"loss": ".4f", "grad_norm": ".3f", "tokens_per_second": ".0f", "mfu": ".1%"}
    return "  ".join(f"{k} {metrics[k]:{f}}" for k, f in formats.items() if k in metrics)
