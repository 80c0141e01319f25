"""A run of `aidx.train.fit` on TensorBoard: a callback by its methods."""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import jax

from .profiler import Profiler

if TYPE_CHECKING:
    from .tensorboard import SummaryWriter


class TensorBoardCallback:
    """Writes a run of `aidx.train.fit`: scalars, histograms, samples, hyperparameters.

    Args:
      writer: where to; it stays open.
      scalars_every: steps between two of the training's scalars.
      histograms_every: steps between two histograms of all parameters; None for none.
      sample: `state -> {tag: text or picture [C, H, W]}`, called `sample_every` steps.
      sample_every: None for none.
      hparams: written at the end with the last metrics.
      profile_steps: steps that are profiled, host and device, and shown as a dashboard.  Not the
        first, which compiles; before and after them the run waits for the device.

    Raises:
      ValueError: an interval that is not positive, sample without sample_every, or profile_steps
        that are empty, begin with step 0 or leave steps out.

    >>> import tempfile
    >>> from aidx.telemetry.tensorboard import SummaryWriter
    >>> with SummaryWriter(tempfile.mkdtemp()) as writer:
    ...     TensorBoardCallback(writer, hparams={"lr": 0.1}).on_step(0, {"loss": 1.0})
    """

    def __init__(
        self,
        writer: "SummaryWriter",
        *,
        scalars_every: int = 1,
        histograms_every: int | None = None,
        sample: Callable[[Any], Mapping[str, Any]] | None = None,
        sample_every: int | None = None,
        hparams: Mapping[str, Any] | None = None,
        profile_steps: range | None = None,
    ):
        for name, every in (
            ("scalars_every", scalars_every),
            ("histograms_every", histograms_every),
            ("sample_every", sample_every),
        ):
            if every is not None and every < 1:
                raise ValueError(f"{name}={every} must be positive")
        if (sample is None) != (sample_every is None):
            raise ValueError(f"sample and {sample_every=} need one another")
        if profile_steps is not None and (
            not profile_steps or profile_steps.start < 1 or profile_steps.step != 1
        ):
            raise ValueError(f"{profile_steps=} must be steps from 1 on, one after another")
        self.writer, self.scalars_every = writer, scalars_every
        self.histograms_every = histograms_every
        self.sample, self.sample_every = sample, sample_every
        self.hparams = dict(hparams or {})
        self.profile_steps = profile_steps
        self.profiler: Profiler | None = None
        self.last: dict[str, float] = {}

    def gradients(self, every: int) -> Callable[[Any, jax.Array], None]:
        """A hook for `make_train_step(on_gradients=)`: histograms of the gradient, from the step.

        The device counts every `every` steps only.
        """

        def hook(grads: Any, step: jax.Array) -> None:
            write = lambda: self.writer.add_histograms("gradients", grads, step)
            jax.lax.cond(step % every == 0, write, lambda: None)

        return hook

    def on_begin(self, state: Any, steps: int) -> None:
        """Put what belongs together on one chart."""
        del state, steps
        lines = lambda *tags: ["Multiline", list(tags)]
        charts = {
            "training": {
                "loss": lines("train/loss", "evaluation/loss"),
                "accuracy": lines("train/accuracy", "evaluation/accuracy"),
                "norms": lines(*(f"train/{n}_norm" for n in ("grad", "param", "update"))),
            },
            "speed": {
                "tokens a second": lines("train/tokens_per_second"),
                "MFU": lines("train/mfu"),
                "seconds of a step": lines("train/step_seconds"),
            },
            "memory": {"device, GiB": lines("memory/in_use_gib", "memory/peak_gib")},
        }
        if self.profile_steps is not None:
            charts["profile"] = {
                "device, ms by scope": lines("profile/device_ms/.*"),
                "share of the bf16 peak": lines("profile/of_flops_peak/.*"),
                "share of the memory's bandwidth": lines("profile/of_hbm/.*"),
                "host, ms by scope": lines("profile/host_ms/.*"),
            }
        self.writer.add_custom_scalars(charts)

    def on_state(self, step: int, state: Any) -> None:
        """Histograms of the parameters, reduced before the state is donated; samples."""
        self._profile(step + 1, state)
        if self.histograms_every is not None and step % self.histograms_every == 0:
            self.writer.add_histograms("params", state.params, step)
        if self.sample is not None and step % (self.sample_every or 1) == 0:
            for tag, value in self.sample(state).items():
                if isinstance(value, str):
                    self.writer.add_text(tag, value, step)
                else:
                    self.writer.add_image(tag, value, step)

    def _profile(self, coming: int, state: Any) -> None:
        """Begin or end the profile between the step before and the coming one."""
        steps = self.profile_steps
        if steps is None or coming not in (steps.start, steps.stop):
            return
        jax.block_until_ready(state)
        if coming == steps.start:
            self.profiler = Profiler(device_trace=True)
            self.profiler.start()
        elif self.profiler is not None:
            self.profiler.stop()
            self.writer.add_profile("profile", self.profiler.report(), coming - 1)
            self.profiler = None

    def on_step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of a step."""
        self.last = {f"train/{name}": value for name, value in metrics.items()}
        if step % self.scalars_every == 0:
            for tag, value in self.last.items():
                self.writer.add_scalar(tag, value, step)
            for tag, value in memory_in_use().items():
                self.writer.add_scalar(tag, value, step)

    def on_evaluate(self, step: int, metrics: Mapping[str, float]) -> None:
        """Scalars of an evaluation."""
        for name, value in metrics.items():
            self.writer.add_scalar(f"evaluation/{name}", value, step)

    def on_save(self, step: int) -> None:
        """Checkpoints are no curve."""

    def on_end(self, reason: str) -> None:
        """Hyperparameters with what came of them; everything to disk."""
        if self.profiler is not None:  # the run ended within the steps
            self.profiler.stop()
            self.profiler = None
        if self.hparams and self.last:
            metrics = {f"hparam/{name}": value for name, value in self.last.items()}
            self.writer.add_hparams(self.hparams, metrics, run_name="hparams")
        self.writer.add_text("run", json.dumps({"ended": reason}))
        self.writer.flush()


def memory_in_use() -> dict[str, float]:
    """GiB in use and at most in use of the first local device, where it tells.

    >>> all(tag.startswith("memory/") for tag in memory_in_use())
    True
    """
    stats = jax.local_devices()[0].memory_stats() or {}
    names = {"bytes_in_use": "memory/in_use_gib", "peak_bytes_in_use": "memory/peak_gib"}
    return {tag: stats[name] / 2**30 for name, tag in names.items() if name in stats}
