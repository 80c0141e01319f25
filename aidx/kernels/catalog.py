"""`CustomKernelRegistry`: which custom kernels there are, and what stands in for one."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from typing import Any

from ..ops import autotune
from ..ops import registry as ops
from .kernel import CustomKernel, _newest, _replaced, current

ENTRY_POINTS = "aidx.kernels"


class CustomKernelRegistry:
    """Kernels by name; `REGISTRY` is the one that `KernelBuilder.build` fills.

    A registered kernel is an op like aidx's own: `aidx.implementations(name)` and
    `aidx.explain(name, *args)` know it.

    >>> from aidx.kernels import REGISTRY, KernelBuilder
    >>> kernel = KernelBuilder("doc_listed").reference(lambda x: x).build()
    >>> "doc_listed" in REGISTRY.list(), REGISTRY.get("doc_listed") is kernel
    (True, True)
    >>> REGISTRY.unregister("doc_listed")
    """

    def __init__(self) -> None:
        self._kernels: dict[str, CustomKernel] = {}
        self._loaded: set[tuple[str, str]] = set()

    def list(self) -> tuple[str, ...]:
        """The names, sorted."""
        return tuple(sorted(self._kernels))

    def get(self, name: str) -> CustomKernel:
        """The kernel of that name, or what replaces it here.

        Raises:
          ValueError: no such kernel.
        """
        if name not in self._kernels:
            raise ValueError(f"no kernel named {name!r}; there are {list(self.list())}")
        return current(self._kernels[name])

    def register(self, kernel: CustomKernel) -> CustomKernel:
        """Add a kernel.

        Raises:
          ValueError: there is an op of that name.
        """
        ops.register_op(
            kernel.name,
            lambda: self.get(kernel.name).table,
            lambda *args, **kwargs: self.get(kernel.name).prepare(*args, **kwargs),
        )
        self._kernels[kernel.name] = kernel
        _newest[kernel.lineage] = kernel
        _make_tunable((), kernel.tunables)
        return kernel

    def unregister(self, name: str) -> None:
        """Forget a kernel.  The object stays callable.

        Raises:
          ValueError: no such kernel.
        """
        if name not in self._kernels:
            raise ValueError(f"no kernel named {name!r}; there are {list(self.list())}")
        ops.unregister_op(name)
        _make_tunable(self._kernels[name].tunables, ())
        del _newest[self._kernels.pop(name).lineage]

    def update(self, kernel: CustomKernel) -> None:
        """Let every holder of a registered kernel call this newer version of it.

        Programs that were traced before keep what they were traced with.

        Raises:
          ValueError: it is no version of a kernel that is registered here.
        """
        old = self._kernels.get(kernel.name)
        if old is None or old.lineage is not kernel.lineage:
            raise ValueError(f"{kernel!r} is no version of a registered kernel")
        self._kernels[kernel.name] = _newest[kernel.lineage] = kernel
        _make_tunable(old.tunables, kernel.tunables)

    @contextlib.contextmanager
    def replace(self, name: str, kernel: CustomKernel) -> Iterator[CustomKernel]:
        """Let every call of the kernel `name` in this context (of this thread) run `kernel`.

        The replacement is part of the key of jit's caches: a jitted function is traced anew inside,
        and takes its old trace again outside.

        Raises:
          ValueError: no such kernel.

        >>> from aidx.kernels import REGISTRY, KernelBuilder
        >>> one = KernelBuilder("doc_one").reference(lambda x: x + 1).build()
        >>> two = KernelBuilder("doc_two").reference(lambda x: x + 2).build(registry=None)
        >>> with REGISTRY.replace("doc_one", two):
        ...     print(one(1.0))
        3.0
        >>> print(one(1.0))
        2.0
        >>> REGISTRY.unregister("doc_one")
        """
        if name not in self._kernels:
            raise ValueError(f"no kernel named {name!r}; there are {list(self.list())}")
        with _replaced((*_replaced.value, (self._kernels[name].lineage, kernel))):
            yield kernel

    def load_entry_points(self) -> tuple[str, ...]:
        """Register what installed packages offer as entry points of the group `aidx.kernels`.

        An entry point names a `CustomKernel`, which is registered unless it has been, or a function
        that is called with this registry.  Each is loaded once.

        Returns:
          The names of the entry points that were loaded now.

        Raises:
          TypeError: an entry point names something else.
        """
        names = []
        for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
            if (entry.name, entry.value) in self._loaded:
                continue
            found: Any = entry.load()
            if isinstance(found, CustomKernel):
                if found.lineage not in _newest:
                    self.register(found)
            elif callable(found):
                found(self)
            else:
                raise TypeError(
                    f"entry point {entry.name} = {entry.value} is neither a CustomKernel nor a "
                    f"function: {type(found)}"
                )
            self._loaded.add((entry.name, entry.value))
            names.append(entry.name)
        return tuple(names)


def _make_tunable(old: Sequence[autotune.Tunable], new: Sequence[autotune.Tunable]) -> None:
    """`aidx tune` knows the newest version of what is registered."""
    for tunable in old:
        autotune.unregister(tunable.name)
    for tunable in new:
        autotune.register(tunable)


REGISTRY = CustomKernelRegistry()
