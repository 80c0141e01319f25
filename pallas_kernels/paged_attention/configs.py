"""The programs that `scripts/compile_sm90a.py` compiles: each kernel at shapes it is chosen for."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from .api import paged_attention


def arguments(tokens, rows, *, heads=32, kv_heads=8, dim=128, size=64, width=64):
    """Abstract arguments of a call with `width` blocks of `size` keys a row."""
    sds, i32 = jax.ShapeDtypeStruct, jnp.int32
    pool = sds((1024, kv_heads, size, dim), jnp.bfloat16)
    q = sds((tokens, heads, dim), jnp.bfloat16)
    return q, pool, pool, sds((rows, width), i32), sds((rows,), i32), sds((rows + 1,), i32)


def compile_cases() -> Iterator[tuple[str, Callable, tuple]]:
    """(name, function, abstract arguments).

    >>> sorted({name.split()[0] for name, _, _ in compile_cases()})
    ['paged/chunk', 'paged/cluster', 'paged/decode', 'paged/deterministic', 'paged/mixed', ...]
    """
    everything = dict(window=1000, logits_soft_cap=30.0, return_lse=True)
    for dim, kv_heads in ((64, 8), (128, 8), (256, 8)):
        shapes = functools.partial(arguments, dim=dim, kv_heads=kv_heads)
        calls = [
            (f"cluster h{dim}", shapes(1, 1), dict(max_q=1)),
            (f"decode h{dim} b16", shapes(64, 64, size=16, width=256), dict(max_q=1)),
            (f"verify h{dim}", shapes(320, 64), dict(max_q=5)),
            (f"mixed h{dim}", shapes(576, 65), dict(max_q=512)),
        ]
        if dim == 128:
            calls += [
                ("decode mha", arguments(64, 64, kv_heads=32), dict(max_q=1)),
                ("decode mqa16", arguments(64, 64, heads=16, kv_heads=1), dict(max_q=1)),
                ("decode options", shapes(64, 64), dict(max_q=1, **everything)),
                ("chunk options", shapes(2048, 4), dict(max_q=512, **everything)),
                ("deterministic", shapes(64, 64), dict(max_q=1, deterministic=True)),
            ]
        for name, args, options in calls:
            yield f"paged/{name}", functools.partial(paged_attention, **options), args
