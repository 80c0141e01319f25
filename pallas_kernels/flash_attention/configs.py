"""Every configuration that `heuristics` ships, as programs for `scripts/compile_sm90a.py`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention.attention import flash_attention_bwd, flash_attention_fwd
from pallas_kernels.flash_attention.mask import Band, Bounds

BANDS = {"full": Band(), "causal": Band(right=0), "window": Band(left=1023, right=0)}


def compile_cases() -> Iterator[tuple[str, Callable, tuple]]:
    """(name, function, abstract arguments); names start with `flash/`.

    >>> names = [name for name, _, _ in compile_cases()]
    >>> len(names) == len(set(names)), names[0]
    (True, 'flash/H64 full fwd')
    """
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
    batch, tokens, heads, kv_heads = 2, 1032, 8, 2  # a ragged end, and grouped heads
    lse = shape(batch, tokens, heads, dtype=jnp.float32)
    ints: Any = shape(1, tokens, dtype=jnp.int32)
    for head_dim in (64, 128, 256):
        q, k = shape(batch, tokens, heads, head_dim), shape(batch, tokens, kv_heads, head_dim)
        for mask in (*BANDS, "packed"):
            band = BANDS.get(mask, BANDS["causal"])
            extra = (Bounds(ints, ints, ints, ints),) if mask == "packed" else ()

            def fwd(q, k, v, *bounds, band=band):
                return flash_attention_fwd(
                    q, k, v, band=band, bounds=bounds[0] if bounds else None, scale=0.1
                )

            def bwd(q, k, v, o, lse, do, *bounds, band=band, deterministic=False):
                return flash_attention_bwd(
                    q, k, v, o, lse, do, band=band, bounds=bounds[0] if bounds else None,
                    scale=0.1, deterministic=deterministic,
                )  # fmt: skip

            name = f"flash/H{head_dim} {mask}"
            yield f"{name} fwd", fwd, (q, k, k, *extra)
            grads = (q, k, k, q, lse, q, *extra)
            yield f"{name} bwd", bwd, grads
            repeatable = functools.partial(bwd, deterministic=True)
            yield f"{name} bwd deterministic", repeatable, grads
