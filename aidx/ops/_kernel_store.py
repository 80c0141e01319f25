"""Lowered kernels on disk, beside JAX's compiled programs.

Lowering a Mosaic kernel is seconds of Python, and JAX's cache of compiled programs is asked only
after it: a second start of a server would spend most of its time there.  So the MLIR of a kernel is
kept in the same directory (none, unless the user or `LLM` set one), under a hash of everything that
it is made from: the sources of all kernels, the versions of JAX, the device, and the call.

A call is kept only if its `repr` says all about it: one that carries a function of the user's, a
table of its own or the settings of a tuner is lowered anew by every process.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import os
import pathlib
import tempfile
from typing import Any

import jax
import jaxlib
import numpy as np

import pallas_kernels

SUFFIX = ".aidx-kernel"


def directory() -> pathlib.Path | None:
    """Where kernels are kept: JAX's directory of compiled programs, if there is a local one.

    >>> directory() is None or directory().is_dir()
    True
    """
    name = jax.config.jax_compilation_cache_dir
    if name is None or not jax.config.jax_enable_compilation_cache or not os.path.isdir(name):
        return None
    return pathlib.Path(name)


def key(parts: Any) -> str | None:
    """The name of what `parts` make, or None where they do not say all about it.

    >>> key(("paged_attention", 3)) == key(("paged_attention", 3)) != key(("paged_attention", 4))
    True
    >>> key((print, 3)) is None
    True
    """
    if not _plain(parts):
        return None
    return hashlib.sha256(f"{_origin()} {parts!r}".encode()).hexdigest()


def _plain(x: Any) -> bool:
    """Whether the repr of a value is all that there is to it."""
    if x is None or isinstance(x, bool | int | float | str | bytes | enum.Enum | np.dtype):
        return True
    if isinstance(x, tuple):
        return all(map(_plain, x))
    if dataclasses.is_dataclass(x) and not isinstance(x, type):
        fields = dataclasses.fields(x)
        return all(f.repr for f in fields) and all(_plain(getattr(x, f.name)) for f in fields)
    return False


@functools.cache
def _origin() -> str:
    """What a kernel is made from beside its call: sources, versions, device."""
    sources = hashlib.sha256()
    for root in (pathlib.Path(str(pallas_kernels.__file__)).parent, pathlib.Path(__file__).parent):
        for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".json")):
            sources.update(f"{path.relative_to(root)} ".encode() + path.read_bytes())
    versions = (jax.__version__, jaxlib.__version__)
    return f"{sources.hexdigest()} {versions} {jax.devices()[0].device_kind}"


def load(name: str) -> bytes | None:
    """What was stored under the name; None where nothing was, or not all of it is there."""
    place = directory()
    if place is None:
        return None
    try:
        held = (place / f"{name}{SUFFIX}").read_bytes()
    except OSError:
        return None
    digest, code = held[:32], held[32:]
    return code if hashlib.sha256(code).digest() == digest else None


def store(name: str, code: bytes) -> None:
    """Keep the bytes, completely or not at all; a full or read-only disk keeps nothing."""
    place = directory()
    if place is None:
        return
    part = None
    try:
        handle, part = tempfile.mkstemp(dir=place, prefix=".aidx-")
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(code).digest() + code)
        os.replace(part, place / f"{name}{SUFFIX}")
    except OSError:
        if part is not None:
            pathlib.Path(part).unlink(missing_ok=True)
