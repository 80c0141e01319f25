"""What an engine has done and where it stands, in numbers."""

import collections
import dataclasses

import numpy as np

from aidx.engine.outputs import RequestOutput

WINDOW = 1024  # finished requests that latencies are taken over


@dataclasses.dataclass(frozen=True)
class Latency:
    """Mean and percentiles over the last finished requests, in seconds; NaN before the first.

    Example:
        >>> latency([0.1, 0.3]).mean
        0.2
    """

    mean: float
    p50: float
    p95: float
    p99: float


def latency(seconds) -> Latency:
    """`Latency` of a list of seconds.

    Example:
        >>> latency([1.0]).p99
        1.0
    """
    if not len(seconds):
        return Latency(*[float("nan")] * 4)
    values = np.asarray(seconds)
    p50, p95, p99 = np.percentile(values, (50, 95, 99))
    return Latency(float(values.mean()), float(p50), float(p95), float(p99))


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """A snapshot.

    Attributes:
        running, waiting: sequences now.
        preempted: preemptions so far.
        swapped: those that took their blocks along to host memory.
        steps: steps issued.
        finished: requests that ended, by finish_reason of their first sample.
        prompt_tokens: computed by prefills (cached ones not counted).
        generated_tokens: handed out.
        tokens_per_second: generated_tokens over the time that some request was unfinished.
        time_to_first_token, inter_token_latency, queue_time: over the last finished requests.
        cache_hit_rate: prompt tokens found in the prefix cache, or shared with another sample of
            the same request, over prompt tokens admitted.
        pool_use: held blocks over all blocks.
        pool_utilization: tokens stored over tokens that the held blocks have room for.
    """

    running: int
    waiting: int
    preempted: int
    swapped: int
    steps: int
    finished: dict[str, int]
    prompt_tokens: int
    generated_tokens: int
    tokens_per_second: float
    time_to_first_token: Latency
    inter_token_latency: Latency
    queue_time: Latency
    cache_hit_rate: float
    pool_use: float
    pool_utilization: float


@dataclasses.dataclass
class Meter:
    """The counters behind `EngineStats`; owned by the engine."""

    steps: int = 0
    preempted: int = 0
    swapped: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    admitted_tokens: int = 0
    generated_tokens: int = 0
    busy_seconds: float = 0.0
    finished: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    recent: collections.deque = dataclasses.field(
        default_factory=lambda: collections.deque(maxlen=WINDOW)
    )

    def snapshot(
        self, *, running: int, waiting: int, pool_use: float, pool_utilization: float
    ) -> EngineStats:
        """The counters as they are now."""

        def over(name):
            values = (getattr(metrics, name) for metrics in self.recent)
            return latency([value for value in values if value is not None])

        return EngineStats(
            running=running,
            waiting=waiting,
            preempted=self.preempted,
            swapped=self.swapped,
            steps=self.steps,
            finished=dict(self.finished),
            prompt_tokens=self.prompt_tokens,
            generated_tokens=self.generated_tokens,
            tokens_per_second=self.generated_tokens / self.busy_seconds
            if self.busy_seconds
            else 0.0,
            time_to_first_token=over("time_to_first_token"),
            inter_token_latency=over("inter_token_latency"),
            queue_time=over("queue_time"),
            cache_hit_rate=self.cached_tokens / max(self.admitted_tokens, 1),
            pool_use=pool_use,
            pool_utilization=pool_utilization,
        )

    def finish(self, output: RequestOutput) -> None:
        """A request ended."""
        self.finished[output.outputs[0].finish_reason] += 1
        self.recent.append(output.metrics)
