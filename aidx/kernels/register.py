"""`register`: one more implementation of an op that exists, as a decorator."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from ..ops import registry as ops
from .builder import extended
from .catalog import REGISTRY
from .kernel import REFERENCE


def register(
    op: str,
    name: str,
    *,
    backward: Callable[..., Any] | None = None,
    platforms: Sequence[str] = (),
    compute_capability: Sequence[str] = (),
    when: Callable[..., str | None] | None = None,
    before: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that adds an implementation to `op`: a registered custom kernel, or one of aidx's.

    For a custom kernel the function has the reference's signature, `backward` is as in
    `KernelBuilder.vjp` and the place is in front of the reference.  For aidx's own ops (such as
    "flash_attention") the function is `forward(spec, operands)` as in `aidx.ops.registry` and the
    place is the end.  `before` names the one it should precede.

    Args:
      op: the op's name.
      name: what `implementation=` calls it.
      backward: its gradient.
      platforms: XLA's names ("cuda", "cpu"); none means all.
      compute_capability: of the GPU ("9.0"), custom kernels only.
      when: gives the reason why it cannot do a call, or None; takes what the function takes.
      before: the implementation in front of which it goes.

    Raises:
      ValueError: no such op, a name taken already, or a signature that differs (saying where).

    >>> from aidx.kernels import KernelBuilder
    >>> double = KernelBuilder("doc_doubled").reference(lambda x: x + x).build()
    >>> @register("doc_doubled", "times_two")
    ... def times_two(x):
    ...     return 2 * x
    >>> [line.name for line in double.explain(1.0) if line.chosen]
    ['times_two']
    >>> REGISTRY.unregister("doc_doubled")
    """
    if op in REGISTRY.list():

        def add(fn: Callable[..., Any]) -> Callable[..., Any]:
            kernel = extended(
                REGISTRY._kernels[op],
                name,
                fn,
                backward=backward,
                platforms=platforms,
                compute_capability=compute_capability,
                when=when,
                before=before or REFERENCE,
            )
            REGISTRY.update(kernel)
            return fn

        return add
    ops.implementations(op)  # raises where there is no such op
    if compute_capability:
        raise ValueError(f"{op} is one of aidx's ops: test the compute capability in `when`")

    def add_to_op(fn: Callable[..., Any]) -> Callable[..., Any]:
        forward = fn if when is None else functools.partial(_unless, when, fn)
        ops.register(op, name, backward=backward, platforms=platforms, before=before)(forward)
        return fn

    return add_to_op


def _unless(when: Callable[..., str | None], fn: Callable[..., Any], *args: Any) -> Any:
    reason = when(*args)
    if reason:
        raise NotImplementedError(reason)
    return fn(*args)
