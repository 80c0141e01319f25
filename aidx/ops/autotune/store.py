"""Where timings are kept: the disk cache, the shipped tables, the compile gate's record."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from typing import Any

from .settings import Settings
from .table import Entry, Tuning

SHIPPED = pathlib.Path(__file__).resolve().parents[2] / "data" / "tuning"
GATE = "gate-sm90a.json"
GATE_FORMAT = "aidx gate 1"

_read: dict[str, Entry | None] = {}  # by file: what this process has read or written


def _file(cache: str, place: tuple[str, ...]) -> pathlib.Path:
    digest = hashlib.sha256("\0".join(place).encode()).hexdigest()[:24]
    return pathlib.Path(cache) / f"{place[0].replace('/', '-')}-{digest}.json"


def read(cache: str | None, place: tuple[str, ...]) -> Entry | None:
    """The entry of the disk cache; a file is read once a process.

    >>> read(None, ("op/part", "cpu", "", "", "{}")) is None
    True
    """
    if cache is None:
        return None
    file = _file(cache, place)
    if str(file) not in _read:
        _read[str(file)] = Tuning.load(file).get(place) if file.is_file() else None
    return _read[str(file)]


def write(cache: str | None, entry: Entry) -> None:
    """Add an entry to the disk cache, to what others have written there meanwhile."""
    if cache is None:
        return
    file = _file(cache, entry.place)
    known = Tuning.load(file) if file.is_file() else Tuning()
    merged = known | Tuning((entry,))
    merged.save(file)
    _read[str(file)] = merged.get(entry.place)


@functools.cache
def shipped() -> Tuning:
    """The tables that come with the package.

    >>> isinstance(shipped(), Tuning)
    True
    """
    found = Tuning()
    for file in sorted(SHIPPED.glob("*.json")):
        if file.name != GATE:
            found |= Tuning.load(file)
    return found


def fingerprint(context: Settings) -> str | None:
    """What every choice of a context depends on beside the call: two of the same name choose alike.

    None in the mode "on", where a choice depends on what is timed.

    >>> off = Settings(cache=None)
    >>> fingerprint(off) == fingerprint(Settings(cache=None)) != fingerprint(Settings(device="x"))
    True
    """
    if context.mode == "on":
        return None
    folder = None if context.cache is None else pathlib.Path(context.cache)
    files = sorted(folder.glob("*.json")) if folder is not None and folder.is_dir() else []
    kept = [(file.name, file.stat().st_mtime_ns) for file in files]
    tables = [table.to_json() for table in (*context.pinned, shipped())]
    parts = repr((context.mode, context.device, kept, tables))
    return hashlib.sha256(parts.encode()).hexdigest()


# --- the record of the compile gate --------------------------------------------------------------


@functools.cache
def _gate() -> frozenset[tuple[str, str, str, str]]:
    file = SHIPPED / GATE
    return read_gate(file.read_text()) if file.is_file() else frozenset()


def passed_gate(op: str, code: str, family: str, config: str) -> bool:
    """Whether this configuration of this code compiled for sm_90a without spills.

    >>> passed_gate("op/part", "", "{}", "1")
    False
    """
    return (op, code, family, config) in _gate()


def read_gate(text: str) -> frozenset[tuple[str, str, str, str]]:
    """(op, code, family, config) of what passed.

    Raises:
      ValueError: it is no such record.

    >>> rows = frozenset({("op/part", "abc", "{}", "1")})
    >>> read_gate(gate_json(rows)) == rows
    True
    """
    data = json.loads(text)
    if data.get("format") != GATE_FORMAT:
        raise ValueError(f"this is no {GATE_FORMAT!r}: its format is {data.get('format')!r}")
    dump = lambda value: json.dumps(value, sort_keys=True)
    return frozenset(
        (record["op"], record["code"], dump(record["family"]), dump(config))
        for record in data["records"]
        for config in record["passed"]
    )


def gate_json(rows: frozenset[tuple[str, str, str, str]]) -> str:
    """What `read_gate` takes."""
    found: dict[tuple[str, str, str], list[Any]] = {}
    for op, code, family, config in sorted(rows):
        found.setdefault((op, code, family), []).append(json.loads(config))
    records = [
        {"op": op, "code": code, "family": json.loads(family), "passed": configs}
        for (op, code, family), configs in found.items()
    ]
    return json.dumps({"format": GATE_FORMAT, "records": records}, indent=1) + "\n"
