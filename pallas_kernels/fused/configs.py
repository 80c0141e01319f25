"""The programs that `scripts/compile_sm90a.py` compiles: each kernel at shapes it is chosen for."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from .cross_entropy import cross_entropy_backward, log_normaliser
from .gated import ACTIVATIONS, gated, gated_backward
from .norm import norm, norm_backward
from .rope import rope

ROWS, BF16, F32 = 8192, jnp.bfloat16, jnp.float32


def compile_cases() -> Iterator[tuple[str, Callable, tuple]]:
    """(name, function, abstract arguments).

    >>> sorted({name.split()[0] for name, _, _ in compile_cases()})
    ['fused/cross_entropy', 'fused/gated', 'fused/layer_norm', 'fused/rms_norm', 'fused/rope']
    """
    yield from norm_cases()
    sds, f32 = jax.ShapeDtypeStruct, jnp.float32
    for heads, dim, dtype in ((32, 128, jnp.bfloat16), (3, 48, f32)):
        angles = sds((ROWS, dim // 2), f32)
        yield f"fused/rope {heads} x {dim}", rope, (sds((ROWS, heads, dim), dtype), angles, angles)
    for activation in ACTIVATIONS:
        width = 14336 if activation == "silu" else 11016
        both, one = sds((ROWS, 2, width), jnp.bfloat16), sds((ROWS, width), jnp.bfloat16)
        options = dict(activation=activation)
        yield f"fused/gated {activation}", functools.partial(gated, **options), (both,)
        back = functools.partial(gated_backward, **options)
        yield f"fused/gated {activation} backward", back, (both, one)
    for V, dtype in ((128256, jnp.bfloat16), (50264, f32)):
        logits, row, targets = sds((ROWS, V), dtype), sds((ROWS,), f32), sds((ROWS,), jnp.int32)
        forward = functools.partial(log_normaliser, total=dtype == f32)
        yield f"fused/cross_entropy {V}", forward, (logits, targets)
        back = (logits, targets, row, row, row, *([row] if dtype == f32 else []))
        yield f"fused/cross_entropy {V} backward", cross_entropy_backward, back


def norm_cases() -> Iterator[tuple[str, Callable, tuple]]:
    """Both norms, bare and with everything, at one vector a thread and at the longest rows.

    >>> len(list(norm_cases()))
    18
    """
    sds = jax.ShapeDtypeStruct
    for width, dtype in ((1024, BF16), (2048, BF16), (4096, BF16), (8192, BF16), (4096, F32)):
        x, vector = sds((ROWS, width), dtype), sds((width,), dtype)
        name = f"{width} {jnp.dtype(dtype).name}"
        plain = dict(eps=1e-6, centred=False)
        if dtype == BF16:
            yield f"fused/rms_norm {name}", functools.partial(norm, **plain), (x, vector)
            back = functools.partial(norm_backward, **plain)
            yield f"fused/rms_norm {name} backward", back, (x, vector, x)
        full = dict(eps=1e-6, centred=True)
        everything = (x, vector, vector, x)
        yield f"fused/layer_norm {name} residual", functools.partial(norm, **full), everything
        back = functools.partial(norm_backward, **full, biased=True)
        yield f"fused/layer_norm {name} residual backward", back, (x, vector, x, x)
