"""When two results are the same, and where they differ most."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Mismatch:
    """The place where two results differ most."""

    what: str
    error: float = float("inf")

    def __str__(self) -> str:
        return self.what


def _host(x: Any) -> np.ndarray:
    """x as numpy; floats (bfloat16 too) as float64."""
    x = np.asarray(x)
    return x.astype(np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def differs(got: Any, want: Any, tolerance: float, *, types: bool = False) -> Mismatch | float:
    """The largest `|got - want| / (1 + |want|)` where it is within tolerance, else a Mismatch.

    NaN matches NaN, an infinity matches the same infinity; integers match exactly.  With `types`
    dtypes have to agree as well.

    >>> differs(np.array([1.0, np.nan]), np.array([1.0, np.nan]), 0.0)
    0.0
    >>> print(differs(np.array([1, 2]), np.array([1, 3]), 0.5))
    at [1]: got 2, want 3
    """
    paths, tree = jax.tree_util.tree_flatten_with_path(got)
    if jax.tree.structure(want) != tree:
        return Mismatch(f"got the structure {tree}, want {jax.tree.structure(want)}")
    worst = 0.0
    for (path, a), b in zip(paths, jax.tree.leaves(want), strict=True):
        where = jax.tree_util.keystr(path)
        if a.shape != b.shape or (types and a.dtype != b.dtype):
            return Mismatch(f"output{where}: got {a.dtype}{a.shape}, want {b.dtype}{b.shape}")
        error, index = _worst(_host(a), _host(b), tolerance)
        if error > tolerance:
            got_value, want_value = (x.flat[index] for x in (np.asarray(a), np.asarray(b)))
            at = [int(i) for i in np.unravel_index(index, a.shape)]
            return Mismatch(f"{where}at {at}: got {got_value}, want {want_value}", error)
        worst = max(worst, error)
    return worst


def _worst(a: np.ndarray, b: np.ndarray, tolerance: float) -> tuple[float, int]:
    """The largest error and its flat index."""
    if a.size == 0:
        return 0.0, 0
    if a.dtype != np.float64:
        error = np.where(a == b, 0.0, np.inf)
    else:
        with np.errstate(invalid="ignore"):
            error = np.abs(a - b) / (1.0 + np.abs(b))
        same = (np.isnan(a) & np.isnan(b)) | (a == b)
        error = np.where(same, 0.0, np.where(np.isnan(error), np.inf, error))
    index = int(np.argmax(error))
    return float(error.flat[index]), index


def bits_differ(got: Any, want: Any) -> Mismatch | float:
    """0.0 where two results are bitwise the same, else a Mismatch.

    >>> bits_differ(np.array([0.0]), np.array([-0.0])).what
    'at [0]: got 0.0, want -0.0'
    """
    found = differs(got, want, 0.0, types=True)
    if isinstance(found, Mismatch):
        return found
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.tobytes() == b.tobytes():
            continue
        rows = [x.reshape(-1, 1).view(np.uint8) for x in (a, b)]
        index = int(np.argmax((rows[0] != rows[1]).any(axis=1)))
        at = [int(i) for i in np.unravel_index(index, a.shape)]
        return Mismatch(f"at {at}: got {a.flat[index]}, want {b.flat[index]}")
    return 0.0
