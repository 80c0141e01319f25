"""`Tuning`: what was timed, as JSON; merged with `|`, pinned with `with`."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

FORMAT = "aidx tuning 1"
MARGIN = 0.02  # what a configuration has to be faster by than the default


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What became of one configuration: `seconds`, or the reason of its `failure`.

    `config` is its JSON (`config_text`), `error` how far its result was from the reference's.
    """

    config: str
    seconds: float | None = None
    error: float | None = None
    failure: str | None = None

    def __post_init__(self):
        if (self.seconds is None) == (self.failure is None):
            raise ValueError(f"a measurement has seconds or a failure: {self}")


@dataclasses.dataclass(frozen=True)
class Entry:
    """The configurations of one op at one key (JSON), on one kind of device, of one code."""

    op: str
    device: str
    jax: str
    code: str
    key: str
    measurements: tuple[Measurement, ...] = ()

    @property
    def place(self) -> tuple[str, ...]:
        """What a timing is known by."""
        return (self.op, self.device, self.jax, self.code, self.key)

    def find(self, config: str) -> Measurement | None:
        """What became of this configuration, None where it was not tried."""
        return next((m for m in self.measurements if m.config == config), None)

    def best(self, among: Sequence[str]) -> Measurement | None:
        """The fastest that gave the right result, among these configurations, the default first.

        The default stays where the fastest is not faster by `MARGIN`: less is noise.

        >>> entry = Entry("op/part", "cpu", "", "", "{}", (Measurement("1", 1.0),))
        >>> [entry.updated([Measurement("2", s)]).best(["1", "2"]).config for s in (0.9, 0.99)]
        ['2', '1']
        """
        order = self.ranked(among)
        if not order:
            return None
        default = next((m for m in order if m.config == among[0]), order[0])
        won = (order[0].seconds or 0.0) < (1 - MARGIN) * (default.seconds or 0.0)
        return order[0] if won else default

    def ranked(self, among: Sequence[str]) -> list[Measurement]:
        """What gave the right result, among these configurations, the fastest first."""
        timed = [m for m in self.measurements if m.seconds is not None and m.config in among]
        return sorted(timed, key=lambda m: m.seconds or 0.0)

    def finalists(self, among: Sequence[str]) -> list[str]:
        """The default and the two fastest others: what is timed again, in turns.

        >>> timed = [Measurement(str(s), float(s)) for s in (4, 3, 2, 1)]
        >>> Entry("op/part", "cpu", "", "", "{}", tuple(timed)).finalists(["4", "3", "2", "1"])
        ['4', '1', '2']
        """
        order = [m.config for m in self.ranked(among)]
        others = [config for config in order if config != among[0]][:2]
        return [config for config in order if config == among[0]] + others

    def confirmed(self, seconds: Mapping[str, float]) -> Entry:
        """With these times in place of the first ones."""
        again = lambda m: dataclasses.replace(m, seconds=seconds.get(m.config, m.seconds))
        return dataclasses.replace(self, measurements=tuple(map(again, self.measurements)))

    def updated(self, measurements: Iterable[Measurement]) -> Entry:
        """With these in place of what is known of the same configurations."""
        found = {m.config: m for m in (*self.measurements, *measurements)}
        return dataclasses.replace(self, measurements=tuple(found.values()))


@dataclasses.dataclass(frozen=True)
class Tuning:
    """Timings of any number of ops.

    `a | b` has both, b's where both know a configuration.  `with tuning:` pins it: calls traced
    inside, on the device that it was made on, take its fastest configurations before anything else,
    whatever version of the code they were timed on.

    >>> entry = Entry("op/part", "cpu", "0.11", "abc", "{}", (Measurement("1", 1e-3),))
    >>> tuning = Tuning((entry,))
    >>> Tuning.from_json(tuning.to_json()) == tuning
    True
    >>> len((tuning | Tuning()).entries)
    1
    """

    entries: tuple[Entry, ...] = ()

    def __post_init__(self):
        places = [entry.place for entry in self.entries]
        if len(set(places)) != len(places):
            raise ValueError("two entries of the same op, device, version, code and key")

    @functools.cached_property
    def _places(self) -> dict[tuple[str, ...], Entry]:
        return {entry.place: entry for entry in self.entries}

    @functools.cached_property
    def _shapes(self) -> dict[tuple[str, str, str], list[Entry]]:
        found: dict[tuple[str, str, str], list[Entry]] = {}
        for entry in self.entries:
            found.setdefault((entry.op, entry.device, entry.key), []).append(entry)
        return found

    @functools.cached_property
    def _hash(self) -> int:
        return hash(self.entries)

    def __hash__(self) -> int:
        return self._hash  # asked for in every call of a jitted function inside `with tuning:`

    def get(self, place: tuple[str, ...]) -> Entry | None:
        """The entry of exactly this op, device, JAX version, code and key."""
        return self._places.get(place)

    def of_shape(self, op: str, device: str, key: str) -> tuple[Entry, ...]:
        """The entries of a key whatever the versions, the newest of the table first."""
        return tuple(reversed(self._shapes.get((op, device, key), [])))

    def __or__(self, other: Tuning) -> Tuning:
        if not isinstance(other, Tuning):
            return NotImplemented
        found = dict(self._places)
        for entry in other.entries:
            # The later one last: it is the newest of its shape.
            mine = found.pop(entry.place, entry)
            found[entry.place] = mine.updated(entry.measurements)
        return Tuning(tuple(found.values()))

    # --- pinning ---

    def __enter__(self) -> Tuning:
        from .settings import pinned  # which holds tables

        _open.stack = [*getattr(_open, "stack", []), pinned(self)]
        _open.stack[-1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        inner: AbstractContextManager = _open.stack.pop()
        inner.__exit__(*error)

    # --- JSON ---

    def to_json(self) -> str:
        """As text that `from_json` takes back."""
        entries = [
            {
                **{name: getattr(entry, name) for name in ("op", "device", "jax", "code")},
                "key": json.loads(entry.key),
                "configs": [_measured(m) for m in entry.measurements],
            }
            for entry in self.entries
        ]
        return json.dumps({"format": FORMAT, "entries": entries}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Tuning:
        """What `to_json` wrote.

        Raises:
          ValueError: it is something else.

        >>> Tuning.from_json("{}")
        Traceback (most recent call last):
        ValueError: this is no 'aidx tuning 1': its format is None
        """
        data = json.loads(text)
        found = data.get("format") if isinstance(data, dict) else type(data)
        if found != FORMAT:
            raise ValueError(f"this is no {FORMAT!r}: its format is {found!r}")
        dump = lambda value: json.dumps(value, sort_keys=True)
        entries = []
        for entry in data["entries"]:
            rows = [Measurement(**{**row, "config": dump(row["config"])})
                    for row in entry["configs"]]  # fmt: skip
            names = {name: entry[name] for name in ("op", "device", "jax", "code")}
            entries.append(Entry(**names, key=dump(entry["key"]), measurements=tuple(rows)))
        return cls(tuple(entries))

    def save(self, path: str | os.PathLike) -> None:
        """Write a file, in one step: a reader sees the old one or the new one."""
        path = pathlib.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(self.to_json())
        os.chmod(file.name, 0o644)  # a temporary file is its owner's alone
        os.replace(file.name, path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tuning:
        """What `save` wrote."""
        return cls.from_json(pathlib.Path(path).read_text())


_open = threading.local()  # contexts that `with tuning:` has entered, in this thread


def _measured(m: Measurement) -> dict[str, Any]:
    known = {n: v for n, v in dataclasses.asdict(m).items() if v is not None}
    return {**known, "config": json.loads(m.config)}
