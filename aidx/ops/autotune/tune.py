"""`tune`: time every configuration of some cases in a worker process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from . import store
from .table import Entry, Measurement, Tuning
from .worker import Worker, WorkerFailure

START_SECONDS = 180.0  # to import everything, make operands and run the reference
AHEAD = 6  # configurations that are compiled before the first of them is timed


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a run is: case `case` of `op`, `done` of `total` configurations known."""

    op: str
    case: str
    done: int
    total: int
    last: Measurement | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case: its entry and the candidates, or why there is none."""

    op: str
    case: str
    entry: Entry | None = None
    candidates: tuple[str, ...] = ()  # the default first
    problem: str = ""

    @property
    def default(self) -> str:
        """The default's configuration.

        >>> Outcome("op/part", "8", candidates=("1", "2")).default
        '1'
        """
        return self.candidates[0]

    @property
    def best(self) -> Measurement | None:
        """The configuration that calls will take, None where there is none.

        >>> Outcome("op/part", "8", problem="no such device").best is None
        True
        """
        return self.entry and self.entry.best(self.candidates)

    @property
    def gain(self) -> float | None:
        """How many times faster the best is than the default; None where one of them has no time.

        >>> Outcome("op/part", "8", problem="no such device").gain is None
        True
        """
        best = self.best
        base = self.entry and self.entry.find(self.default)
        if not best or not base or not best.seconds or not base.seconds:
            return None
        return base.seconds / best.seconds


def tune(
    cases: Sequence[tuple[str, str]],
    worker: Worker,
    *,
    cache: str | None,
    timeout: float = 120.0,
    again: bool = False,
    report: Callable[[Progress], Any] = lambda progress: None,
    deadline: float = math.inf,
    device: contextlib.AbstractContextManager[Any] | None = None,
) -> list[Outcome]:
    """Time what the disk cache does not know of each (tunable's name, case) and keep it there.

    Every configuration has an answer: a time, or the reason of its failure (it does not compile, it
    is wrong, its process died or was killed after `timeout` seconds).  With `again` everything is
    timed anew.  At `deadline` (of `time.monotonic`) it ends: what has no answer by then has none.

    Several runs with a worker each may share a device through the lock `device`, which is held
    while something is timed: they compile at the same time.
    """
    asked = _Asked(worker, timeout, deadline, device or contextlib.nullcontext())
    outcomes = []
    for op, case in cases:
        try:
            outcomes.append(_tune_case(op, case, asked, cache, again, report))
        except (ValueError, WorkerFailure, _TimeUp) as error:
            outcomes.append(Outcome(op, case, problem=str(error)))
    return outcomes


def table(outcomes: Sequence[Outcome]) -> Tuning:
    """The entries of some outcomes.

    >>> table([Outcome("op/part", "8", problem="no such device")])
    Tuning(entries=())
    """
    found = Tuning()
    for outcome in outcomes:
        if outcome.entry is not None:
            found |= Tuning((outcome.entry,))
    return found


class _TimeUp(Exception):
    """The deadline has come."""


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A worker, with the time that it has."""

    worker: Worker
    timeout: float
    deadline: float
    device: contextlib.AbstractContextManager[Any]

    def __call__(self, least: float = 0.0, **message: Any) -> Any:
        """The answer within the timeout, or `least` seconds if that is longer.

        Raises:
          _TimeUp: the deadline came first; where the worker was at work it is killed.
          WorkerFailure, ValueError: of `Worker.ask`.
        """
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise _TimeUp("not begun: the time was up")
        try:
            return self.worker.ask(min(max(self.timeout, least), left), **message)
        except WorkerFailure:
            if time.monotonic() >= self.deadline:
                raise _TimeUp("not ended: the time was up") from None
            raise

    def ready(self, ahead: Sequence[str], **case: Any) -> None:
        """The reference's result is there, and what is `ahead` is compiled."""
        with self.device:
            self(START_SECONDS, do="prepare", **case)
        if ahead:
            self(START_SECONDS, do="prepare", ahead=ahead, **case)

    def measured(self, config: str, ahead: Sequence[str], **case: Any) -> Measurement:
        """One configuration's measurement, once those `ahead` are compiled.

        Raises:
          WorkerFailure: alone, the case itself cannot be prepared; else, who is to blame is not
            known.
        """
        self.ready(ahead, **case)
        try:
            with self.device:
                return Measurement(**self(do="time", config=config, **case))
        except WorkerFailure as failure:
            if ahead:
                raise
            return Measurement(config, failure=str(failure))


def _tune_case(
    op: str,
    case: str,
    asked: _Asked,
    cache: str | None,
    again: bool,
    report: Callable[[Progress], Any],
) -> Outcome:
    about = asked(START_SECONDS, do="describe", op=op, case=case)
    configs = about["configs"]
    place = (op, *(about[name] for name in ("device", "jax", "code", "key")))
    entry = (None if again else store.read(cache, place)) or Entry(*place)
    missing = [config for config in configs if entry.find(config) is None]
    report(Progress(op, case, len(configs) - len(missing), len(configs)))
    together = True
    try:
        if missing:
            asked(START_SECONDS, do="draw", op=op, case=case)
        for index, config in enumerate(missing):
            ask = functools.partial(asked.measured, config, op=op, case=case)
            first = index // AHEAD * AHEAD
            try:
                measured = ask(missing[first : first + AHEAD] if together else [])
            except WorkerFailure:
                # Others were being compiled at the same time: alone, it answers for itself.
                measured, together = ask([]), False
            entry = entry.updated([measured])
            store.write(cache, entry)
            known = len(configs) - len(missing) + index + 1
            report(Progress(op, case, known, len(configs), measured))
        if missing:
            entry = _confirmed(asked, op, case, entry, configs)
            store.write(cache, entry)
    except _TimeUp:
        if not entry.measurements:
            raise
    return Outcome(op, case, entry, tuple(configs))


def _confirmed(asked: _Asked, op: str, case: str, entry: Entry, configs: Sequence[str]) -> Entry:
    """The best two and the default, timed again in turns; what does not survive that has failed."""
    finalists = entry.finalists(configs)
    if len(finalists) < 2:
        return entry
    try:
        asked.ready(finalists, op=op, case=case)
        with asked.device:
            return entry.confirmed(asked(do="turns", op=op, case=case, configs=finalists))
    except WorkerFailure as failure:
        others = [config for config in finalists if config != configs[0]]
        reason = f"{failure} (when it was timed again)"
        return entry.updated([Measurement(config, failure=reason) for config in others])
