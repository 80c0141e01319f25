"""What the tuner may do: the mode, pinned tables, where the disk cache lies."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from .table import Tuning

MODES = ("off", "cached-only", "on")


@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a context; part of the key of jit's caches.

    `mode`: "off" times nothing, "cached-only" makes a miss an error, "on" times what is not known.
    `pinned`: tables that come first, the last of them before the others.  `cache`: folder of the
    disk cache, None for none.  `device`: the kind of device that programs are for, None for the one
    at hand.  `timer`: `timer(trial, config) -> seconds` in place of the device's time.
    """

    mode: str = "off"
    pinned: tuple[Tuning, ...] = ()
    cache: str | None = None
    device: str | None = None
    timer: Callable[..., float] | None = None

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"the mode of the tuner is one of {MODES}, not {self.mode!r}")


def default_cache() -> str | None:
    """`$AIDX_TUNING_CACHE` (empty: none), else a folder of the user's cache."""
    given = os.environ.get("AIDX_TUNING_CACHE")
    if given is not None:
        return given or None
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return str(pathlib.Path(base) / "aidx" / "tuning")


def settings() -> Settings:
    """Those of this context; outside of any, those of the environment (mode: `AIDX_AUTOTUNE`).

    >>> settings().mode
    'off'
    """
    inner = _context.value
    if inner is not None:
        return inner
    return Settings(os.environ.get("AIDX_AUTOTUNE", "off"), cache=default_cache())


@contextlib.contextmanager
def mode(name: str | None = None, **changes: Any) -> Iterator[Settings]:
    """Calls traced in this context (of this thread) are tuned so; see `Settings` for the changes.

    Raises:
      ValueError: no such mode.

    >>> with mode("cached-only", cache=None) as inside:
    ...     print(inside.mode, settings() is inside)
    cached-only True
    """
    if name is not None:
        changes["mode"] = name
    with _context(dataclasses.replace(settings(), **changes)):
        yield settings()


def pinned(table: Tuning) -> contextlib.AbstractContextManager:
    """The context in which `table` comes before what is pinned already.

    >>> with pinned(Tuning()):
    ...     len(settings().pinned)
    1
    """
    return mode(pinned=(*settings().pinned, table))


_context = jax.make_user_context(None)
