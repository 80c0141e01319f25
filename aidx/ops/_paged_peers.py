"""The GPU implementation of paged attention: our Pallas Mosaic kernels."""

from __future__ import annotations

import importlib
from typing import Any

from ._paged_spec import PagedOperands, PagedSpec


def mosaic_forward(spec: PagedSpec, ops: PagedOperands) -> Any:
    """(out, lse) by the Hopper kernels, imported at their first use: they need Mosaic GPU."""
    try:
        module = importlib.import_module("pallas_kernels.paged_attention")
    except ImportError as missing:
        raise NotImplementedError(f"this JAX cannot import the kernels: {missing}") from missing
    if not hasattr(module, "paged_attention"):
        raise NotImplementedError("this build has no paged attention kernels")
    raise NotImplementedError("this build has no paged attention kernels")
