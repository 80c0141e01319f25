"""Scopes in code that was written without them: an object's methods, an iterator, an engine.

A function of one's own takes `profile_scope` as its decorator; optimisers and Flax layers are in
`aidx.train.hooks`.
"""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from .profiler import profile_scope

ENGINE_SCOPES = {
    "step": "engine",
    "_issue": "dispatch",
    "_read": "read",
    "_report": "outputs",
}


@contextlib.contextmanager
def profile_methods(instance: Any, names: Mapping[str, str]) -> Iterator[Any]:
    """While it is open, methods of one object are scopes; nothing is left of it afterwards.

    Args:
      instance: any object that takes attributes.
      names: the scope's name by the method's.

    Raises:
      AttributeError: there is no such method.

    >>> from aidx.telemetry.profiler import Profiler
    >>> class Counter:
    ...     def add(self, n): return n + 1
    >>> with Profiler() as profiler, profile_methods(Counter(), {"add": "adding"}) as counter:
    ...     _ = counter.add(1)
    >>> [row.path for row in profiler.report().host]
    [('adding',)]
    """
    before = {method: vars(instance).get(method) for method in names}
    wrapped = {m: profile_scope(name)(getattr(instance, m)) for m, name in names.items()}
    try:
        for method, function in wrapped.items():
            setattr(instance, method, function)
        yield instance
    finally:
        for method, function in before.items():
            if method in vars(instance):
                delattr(instance, method)
            if function is not None:
                setattr(instance, method, function)


def profile_engine(engine: Any) -> contextlib.AbstractContextManager[Any]:
    """While it is open, `aidx.Engine.step` is a scope, with dispatching, reading and outputs in it.

    The device's share comes from the trace: the step is one compiled program whose instructions
    carry the model's scopes.

    >>> class Engine:
    ...     def step(self): return self._issue()
    ...     def _issue(self): return 1
    ...     def _read(self): return 2
    ...     def _report(self): return 3
    >>> from aidx.telemetry.profiler import Profiler
    >>> with Profiler() as profiler, profile_engine(Engine()) as engine:
    ...     _ = engine.step()
    >>> [row.path for row in profiler.report().host]
    [('engine',), ('engine', 'dispatch')]
    """
    return profile_methods(engine, ENGINE_SCOPES)


def profile_batches[T](batches: Iterable[T], name: str = "data") -> Iterator[T]:
    """The same batches; waiting for each is a scope.

    >>> from aidx.telemetry.profiler import Profiler
    >>> with Profiler() as profiler:
    ...     found = list(profile_batches([1, 2]))
    >>> found, profiler.report().host[0].count  # the end is asked for, too
    ([1, 2], 3)
    """
    coming = iter(batches)
    end = object()
    while True:
        with profile_scope(name):
            batch = next(coming, end)
        if batch is end:
            return
        yield batch  # pyright: ignore[reportReturnType]
