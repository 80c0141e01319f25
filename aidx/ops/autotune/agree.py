"""One decision for all processes of a program: the first one's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any, Protocol

import jax

TIMEOUT_MS = 600_000  # the first process may have to tune


class Store(Protocol):
    """What the coordination service of `jax.distributed` offers."""

    def key_value_set(self, key: str, value: str) -> None:
        """Make a value known to all."""
        ...

    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str:
        """Wait for it."""
        ...


def shared_store() -> tuple[int, Store] | None:
    """(this process, the store), None where the program is one process."""
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return None
    # JAX offers the service's store to its own modules only.
    from jax._src import distributed

    client: Any = distributed.global_state.client
    return jax.process_index(), client


def agreed(name: str, decide: Callable[[], str], rank: int, store: Store) -> str:
    """What process 0 decides; the others wait for it.  A name is decided once.

    No collective: a process that never asks keeps nobody waiting.

    >>> class Dictionary(dict):
    ...     key_value_set = dict.__setitem__
    ...     blocking_key_value_get = lambda self, key, timeout: self[key]
    >>> store = Dictionary()
    >>> agreed("shape", lambda: "fast", 0, store), agreed("shape", lambda: "slow", 1, store)
    ('fast', 'fast')
    """
    key = f"aidx/autotune/{hashlib.sha256(name.encode()).hexdigest()}"
    if rank:
        return store.blocking_key_value_get(key, TIMEOUT_MS)
    text = decide()
    store.key_value_set(key, text)
    return text
