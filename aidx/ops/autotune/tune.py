"""`tune`: time every configuration of some cases in a worker process."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

from . import store
from .table import Entry, Measurement, Tuning
from .worker import Worker, WorkerFailure

START_SECONDS = 180.0  # to import everything, make operands and run the reference


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
) -> list[Outcome]:
    """Time what the disk cache does not know of each (tunable's name, case) and keep it there.

    Every configuration has an answer: a time, or the reason of its failure (it does not compile, it
    is wrong, its process died or was killed after `timeout` seconds).  With `again` everything is
    timed anew.
    """
    outcomes = []
    for op, case in cases:
        try:
            outcomes.append(_tune_case(op, case, worker, cache, timeout, again, report))
        except (ValueError, WorkerFailure) as error:
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


def _measure(
    worker: Worker, timeout: float, op: str, case: str, config: str, ahead: Sequence[str]
) -> Measurement:
    """One configuration's measurement, while those `ahead` are compiled.

    Raises:
      WorkerFailure: alone, the case itself cannot be prepared; else, who is to blame is not known.
    """
    worker.ask(max(timeout, START_SECONDS), do="prepare", op=op, case=case, ahead=ahead)
    try:
        return Measurement(**worker.ask(timeout, do="time", op=op, case=case, config=config))
    except WorkerFailure as failure:
        if ahead:
            raise
        return Measurement(config, failure=str(failure))


def _tune_case(
    op: str,
    case: str,
    worker: Worker,
    cache: str | None,
    timeout: float,
    again: bool,
    report: Callable[[Progress], Any],
) -> Outcome:
    about = worker.ask(max(timeout, START_SECONDS), do="describe", op=op, case=case)
    configs = about["configs"]
    place = (op, *(about[name] for name in ("device", "jax", "code", "key")))
    entry = (None if again else store.read(cache, place)) or Entry(*place)
    missing = [config for config in configs if entry.find(config) is None]
    report(Progress(op, case, len(configs) - len(missing), len(configs)))
    ahead = True
    for index, config in enumerate(missing):
        ask = functools.partial(_measure, worker, timeout, op, case, config)
        try:
            measured = ask(missing[index:] if ahead else [])
        except WorkerFailure:
            # Others were being compiled at the same time: alone, it answers for itself.
            measured, ahead = ask([]), False
        entry = entry.updated([measured])
        store.write(cache, entry)
        known = len(configs) - len(missing) + index + 1
        report(Progress(op, case, known, len(configs), measured))
    if missing:
        entry = _confirmed(worker, timeout, op, case, entry, configs)
        store.write(cache, entry)
    return Outcome(op, case, entry, tuple(configs))


def _confirmed(
    worker: Worker, timeout: float, op: str, case: str, entry: Entry, configs: Sequence[str]
) -> Entry:
    """The best two and the default, timed again in turns; what does not survive that has failed."""
    finalists = entry.finalists(configs)
    if len(finalists) < 2:
        return entry
    try:
        worker.ask(max(timeout, START_SECONDS), do="prepare", op=op, case=case, ahead=finalists)
        return entry.confirmed(worker.ask(timeout, do="turns", op=op, case=case, configs=finalists))
    except WorkerFailure as failure:
        others = [config for config in finalists if config != configs[0]]
        reason = f"{failure} (when it was timed again)"
        return entry.updated([Measurement(config, failure=reason) for config in others])
