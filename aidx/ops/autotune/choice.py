"""Which configuration a call takes: explicit, pinned, cached, tuned, shipped, default; in order."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import threading
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import jax

from .._platform import platform_of
from . import agree, store
from .settings import Settings, settings
from .table import Entry
from .trial import Programs, prepare, tuned
from .tunable import Tunable, code_hash, config_text


class NotTuned(LookupError):
    """The mode is "cached-only", and nobody has timed this call."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """A configuration and where it comes from.

    `source` is one of "explicit", "pinned", "disk cache", "tuned", "shipped" and "default";
    `reason` says why nothing before it was taken, where that is not plain.
    """

    op: str
    config: Hashable
    source: str
    reason: str = ""

    def __str__(self) -> str:
        why = f" ({self.reason})" if self.reason else ""
        return f"{self.op}: {self.config} [{self.source}{why}]"


def choose(
    tunable: Tunable,
    operands: Sequence[Any],
    static: Mapping[str, Any] | None = None,
    *,
    explicit: Hashable = None,
) -> Any:
    """The configuration of a call, in this order:

    explicit, a pinned table, the disk cache, tuning (in the mode "on"), the table shipped for the
    device, the default (the first candidate).  A table's configuration counts only if it is a
    candidate for these shapes.

    Operands may be tracers: only their shapes count, and what is timed runs on random values
    outside the trace.  Among several processes the first one decides.

    Raises:
      NotTuned: in the mode "cached-only", where nothing before the default knows the call.
      NotImplementedError: no candidate at all.

    >>> import jax.numpy as jnp
    >>> scale = Tunable(
    ...     "doc/choose",
    ...     run=lambda config, x: x * 2,
    ...     candidates=lambda x: (8, 16) if x.size > 8 else (8,),
    ...     reference=lambda x: x + x,
    ...     sources=("aidx.ops.norm",),
    ... )
    >>> choose(scale, (jnp.ones(32),)), choose(scale, (jnp.ones(32),), explicit=4)
    (8, 4)
    """
    choice = _choose(tunable, tuple(operands), dict(static or {}), explicit)
    for seen in getattr(_local, "recorders", ()):
        seen.append(choice)
    return choice.config


@contextlib.contextmanager
def recording() -> Iterator[list[Choice]]:
    """The choices that are made in this context (of this thread) while programs are traced.

    >>> with recording() as choices:
    ...     pass
    >>> choices
    []
    """
    seen: list[Choice] = []
    _local.recorders = [*getattr(_local, "recorders", ()), seen]
    try:
        yield seen
    finally:
        _local.recorders = _local.recorders[:-1]


_local = threading.local()
_decided: dict[str, str] = {}  # among several processes: what has been agreed on


def _choose(tunable: Tunable, operands: Any, static: dict[str, Any], explicit: Any) -> Choice:
    if explicit is not None:
        return Choice(tunable.name, explicit, "explicit")
    space = tuple(tunable.candidates(*operands, **static))
    if not space:
        raise NotImplementedError(f"no configuration of {tunable.name} fits these operands")
    context = settings()
    device = context.device or device_kind(tunable)
    key = tunable.key_text(operands, static)
    if device is None or key is None or len(space) == 1:
        reason = "the only one" if len(space) == 1 else (
            "a static argument has no lasting name" if key is None else "no such device here"
        )  # fmt: skip
        return Choice(tunable.name, space[0], "default", reason)
    call = _Call(tunable, operands, static, space, device, key, context)
    shared = agree.shared_store()
    return call.choice() if shared is None else _agreed(call, *shared)


def device_kind(tunable: Tunable) -> str | None:
    """The kind of the device at hand, None where this kernel does not run on it."""
    platform = platform_of(jax.default_backend())
    if tunable.platforms and platform not in tunable.platforms:
        return None
    return jax.local_devices()[0].device_kind


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """A call for which there is something to choose."""

    tunable: Tunable
    operands: tuple[Any, ...]
    static: dict[str, Any]
    space: tuple[Hashable, ...]
    device: str
    key: str
    settings: Settings

    def choice(self) -> Choice:
        texts = {config_text(config): config for config in self.space}
        order = tuple(texts)  # the default first
        taken = lambda m, source: Choice(self.tunable.name, texts[m.config], source)
        shape = (self.tunable.name, self.device, self.key)
        for table in reversed(self.settings.pinned):
            for entry in table.of_shape(*shape):
                if found := entry.best(order):
                    return taken(found, "pinned")
        place = (*shape[:2], jax.__version__, code_hash(self.tunable.sources), self.key)
        entry = store.read(self.settings.cache, place) or Entry(*place)
        reason = ""
        missing = [text for text in texts if entry.find(text) is None]
        if self.settings.mode == "on" and missing:
            allowed = self._allowed(missing, entry.code)
            try:
                if allowed:
                    entry = _tune_here(self, entry, texts, allowed)
                    store.write(self.settings.cache, entry)
                    if found := entry.best(order):
                        return taken(found, "tuned")
            except jax.errors.JaxRuntimeError as error:  # no memory for operands or the reference
                reason = f"it could not be timed: {' '.join(str(error).split())[:200]}"
            if len(allowed) < len(missing):
                reason = f"{len(missing) - len(allowed)} of {len(texts)} are not through the gate"
        if found := entry.best(order):
            return taken(found, "disk cache")
        for entry in store.shipped().of_shape(*shape):
            if found := entry.best(order):
                return taken(found, "shipped")
        if self.settings.mode == "cached-only":
            raise NotTuned(f"nobody has timed {self.tunable.name} at {self.key} on {self.device}")
        return Choice(self.tunable.name, self.space[0], "default", reason)

    def _allowed(self, missing: Sequence[str], code: str) -> list[str]:
        """What may run in this process: the default, and what has passed the compile gate.

        A kernel that hangs cannot be cancelled, and one that faults takes the device with it.
        """
        if not self.tunable.gated:
            return list(missing)
        name, default = self.tunable.name, config_text(self.space[0])
        family = self.tunable.family_text(self.operands, self.static)
        passed = lambda text: store.passed_gate(name, code, family or "", text)
        found = [text for text in missing if text == default or passed(text)]
        alone = found == [default] and len(missing) > 1
        return [] if alone else found  # there would be nothing to compare it with


def _tune_here(
    call: _Call, entry: Entry, space: Mapping[str, Hashable], missing: Sequence[str]
) -> Entry:
    """Time configurations in a thread of their own, which knows nothing of the trace around."""

    def work() -> Entry:
        trial = prepare(call.tunable, call.operands, call.static)
        return tuned(Programs(trial, call.settings.timer), entry, space, missing)

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def _agreed(call: _Call, rank: int, shared: agree.Store) -> Choice:
    """The first process's choice, as text; what is refused there is refused everywhere."""
    tables = sorted(table.to_json() for table in call.settings.pinned)
    name = repr((call.tunable.name, call.device, call.key, call.settings.mode, tables))

    def decide() -> str:
        try:
            choice = call.choice()
        except NotTuned as miss:
            return json.dumps({"miss": str(miss)})
        said = {"source": choice.source, "reason": choice.reason}
        return json.dumps({"config": config_text(choice.config), **said})

    if name not in _decided:
        _decided[name] = agree.agreed(name, decide, rank, shared)
    found = json.loads(_decided[name])
    if "miss" in found:
        raise NotTuned(found["miss"])
    texts = {config_text(config): config for config in call.space}
    if found["config"] not in texts:
        raise ValueError(f"process 0 runs {call.tunable.name} as {found['config']}, which is no "
                         f"candidate in process {rank}: do both run the same code?")  # fmt: skip
    return Choice(call.tunable.name, texts[found["config"]], found["source"], found["reason"])
