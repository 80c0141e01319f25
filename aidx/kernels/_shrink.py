"""Hypothesis makes the values of a counterexample simple; its shapes stay (each is a compile)."""

from __future__ import annotations

import contextlib
import importlib.util
import random
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

GROUPS = 32  # the elements of larger arrays are changed together, every 32nd


def shrink(
    operands: tuple[Any, ...],
    fails: Callable[[tuple[Any, ...]], bool],
    *,
    tries: int = 150,
) -> tuple[Any, ...]:
    """Operands that fail too, the simplest of `tries`: elements are 0, else 1, else whole.

    Without hypothesis installed, or where the failure comes and goes, the operands as they are.

    >>> import jax.numpy as jnp
    >>> found = shrink((jnp.array([1.5, -2.5, 0.25]),), lambda o: bool((o[0] < 0).any()))
    >>> print(found[0])
    [ 0. -2.  0.]
    """
    floats = [i for i, x in enumerate(operands) if x is not None and _is_float(x) and x.size]
    if importlib.util.find_spec("hypothesis") is None or not floats:
        return operands
    import hypothesis
    from hypothesis import errors
    from hypothesis import strategies as st

    host = {i: np.asarray(operands[i]).astype(np.float64) for i in floats}
    sizes = [min(host[i].size, GROUPS) for i in floats]
    # 0: zero, 1: one, 2: rounded, the others: as it was, so that most draws keep most elements.
    levels = st.lists(st.integers(0, 9), min_size=sum(sizes), max_size=sum(sizes))

    def build(picked: list[int]) -> tuple[Any, ...]:
        made, start = list(operands), 0
        for i, size in zip(floats, sizes, strict=True):
            x = host[i]
            level = np.resize(np.array(picked[start : start + size]), x.shape)
            x = np.select([level == 0, level == 1, level == 2], [0.0, 1.0, np.round(x)], x)
            made[i] = jnp.asarray(x, operands[i].dtype)
            start += size
        return tuple(made)

    best, left = operands, tries

    def condition(picked: list[int]) -> bool:
        nonlocal best, left
        left -= 1
        candidate = build(picked)
        if left < 0 or not fails(candidate):
            return False
        best = candidate  # hypothesis goes from simple to simpler
        return True

    every: Any = hypothesis.HealthCheck
    settings = hypothesis.settings(
        max_examples=60,
        deadline=None,
        database=None,
        suppress_health_check=list(every),
    )
    # Out of tries, the condition fails where it held before.
    with contextlib.suppress(errors.NoSuchExample, errors.Flaky):
        hypothesis.find(levels, condition, settings=settings, random=random.Random(0))
    return best


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)
