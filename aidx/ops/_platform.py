"""XLA's names of platforms."""

from __future__ import annotations

import jax


def platform_of(backend: str) -> str:
    """XLA's platform name of a JAX backend (`gpu` is `cuda` unless the device is AMD's).

    >>> platform_of("cpu")
    'cpu'
    """
    if backend != "gpu":
        return backend
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"
