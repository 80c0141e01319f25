"""Arrays and maps with cheap versions: every change gives a new version and the old one stays.

The newest version is a plain numpy array or dict; an older one remembers what to change to come
back to itself, and becomes the newest when it is read ("rerooting": Baker, "Shallow binding makes
functional arrays fast", 1991).  A change costs what it changes, as long as one works on the newest
version, which is what a scheduler does; going back to a version costs the changes made since.

Every `len(data) + 64` changed entries the data are copied once.  That bounds how far apart two
versions of the same buffer can be, hence the memory that a version kept for long holds on to.
"""

import threading
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import numpy as np

Index = slice | np.ndarray
_ABSENT = object()


class _Versioned:
    """A version: `_change is None` and `_base` is the data, or `_base` is a newer version."""

    __slots__ = ("_base", "_change", "_debt", "_lock")

    def __init__(self, data: Any, debt: int = 0, lock: Any = None):
        self._base: Any = data
        self._change: Any = None
        self._debt = debt  # entries changed in this buffer since it was copied
        self._lock = lock or threading.RLock()

    @staticmethod
    def _apply(data: Any, change: Any) -> Any:
        """Change `data` in place and return the change that undoes it."""
        raise NotImplementedError

    def _reroot(self) -> Any:
        """Make this version the one that owns the buffer; the caller holds the lock."""
        if self._change is None:
            return self._base
        path = [self]
        while path[-1]._change is not None:
            path.append(path[-1]._base)
        newer = path.pop()
        data = newer._base
        while path:
            older = path.pop()
            undo = self._apply(data, older._change)
            newer._base, newer._change = older, undo
            older._base, older._change = data, None
            newer = older
        return data

    def _next(self, change: Any, cost: int) -> Any:
        """The version after `change`, which touches `cost` entries."""
        with self._lock:
            data = self._base if self._change is None else self._reroot()
            debt = self._debt + cost
            if debt > len(data) + 64:
                data = data.copy()
                self._apply(data, change)
                return type(self)(data, 0, self._lock)
            undo = self._apply(data, change)
            newer = type(self)(data, debt, self._lock)
            self._base, self._change = newer, undo
            return newer


class PersistentArray(_Versioned):
    """A numpy array whose `set` returns a new version.

    Example:
        >>> a = PersistentArray(np.zeros(4, np.int32))
        >>> b = a.set(np.array([1, 2]), 7)
        >>> a.to_numpy().tolist(), b.to_numpy().tolist()
        ([0, 0, 0, 0], [0, 7, 7, 0])
    """

    __slots__ = ()

    @staticmethod
    def _apply(data, change):
        index, values = change
        before = data[index]
        if type(index) is slice:
            before = before.copy()
        data[index] = values
        return index, before

    def __len__(self) -> int:
        with self._lock:
            return len(self._reroot())

    def __getitem__(self, index: Index) -> Any:
        """The entries at `index`, never a view."""
        with self._lock:
            entries = (self._base if self._change is None else self._reroot())[index]
            return entries.copy() if type(index) is slice else entries

    def set(self, index: Index, values: Any) -> "PersistentArray":
        """The version with `values` at `index` (a slice with its ends, or distinct indices)."""
        cost = index.stop - index.start if type(index) is slice else len(index)
        return self._next((index, values), cost) if cost > 0 else self

    def to_numpy(self) -> np.ndarray:
        """A copy of all entries."""
        return self[:]


class PersistentMap(_Versioned):
    """A dict whose `update` and `delete` return a new version.

    Example:
        >>> a = PersistentMap({"x": 1})
        >>> b = a.update({"y": 2}).delete(["x"])
        >>> a.get("x"), b.get("x"), b.get("y")
        (1, None, 2)
    """

    __slots__ = ()

    @staticmethod
    def _apply(data, change):
        undo = {}
        for key, value in change.items():
            undo[key] = data.get(key, _ABSENT)
            if value is _ABSENT:
                data.pop(key, None)
            else:
                data[key] = value
        return undo

    def __len__(self) -> int:
        with self._lock:
            return len(self._reroot())

    def get(self, key: Hashable, default: Any = None) -> Any:
        """The value of `key`, or `default`."""
        with self._lock:
            return self._reroot().get(key, default)

    def get_all(self, keys: Iterable[Hashable]) -> list[Any]:
        """The value of each key, None where it is absent."""
        with self._lock:
            return list(map(self._reroot().get, keys))

    def update(self, entries: Mapping) -> "PersistentMap":
        """The version with `entries` added or replaced."""
        return self._next(dict(entries), len(entries)) if entries else self

    def delete(self, keys: Iterable[Hashable]) -> "PersistentMap":
        """The version without `keys`; absent ones are passed over."""
        change = dict.fromkeys(keys, _ABSENT)
        return self._next(change, len(change)) if change else self

    def to_dict(self) -> dict:
        """A copy of all entries."""
        with self._lock:
            return self._reroot().copy()
