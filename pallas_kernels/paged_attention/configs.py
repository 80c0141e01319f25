"""The programs that `scripts/compile_sm90a.py` compiles: each kernel at shapes it is chosen for."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from .api import paged_attention
from .write import write_kv


def arguments(
    tokens, rows, *, heads=32, kv_heads=8, dim=128, size=64, width=64, dtype=jnp.bfloat16
):
    """Abstract arguments of a call with `width` blocks of `size` keys a row."""
    sds, i32 = jax.ShapeDtypeStruct, jnp.int32
    pool = sds((1024, kv_heads, size, dim), dtype)
    q = sds((tokens, heads, dim), jnp.bfloat16)
    return q, pool, pool, sds((rows, width), i32), sds((rows,), i32), sds((rows + 1,), i32)


def turned(*args):
    """`arguments` with pools whose tokens come first."""
    q, pool, _, *rest = arguments(*args)
    p, k, size, h = pool.shape
    pool = jax.ShapeDtypeStruct((p, size, k, h), pool.dtype)
    return q, pool, pool, *rest


def compile_cases() -> Iterator[tuple[str, Callable, tuple]]:
    """(name, function, abstract arguments).

    >>> sorted({name.split()[0] for name, _, _ in compile_cases()})
    ['paged/cascade', 'paged/chunk', 'paged/cluster', 'paged/decode', ..., 'paged/write']
    """
    window: dict[str, Any] = dict(window=1000)
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
                ("decode short", shapes(64, 64, width=16), dict(max_q=1)),
                ("cluster options", shapes(1, 1), dict(max_q=1, **everything)),
                ("chunk options", shapes(2048, 4), dict(max_q=512, **everything)),
                ("chunk b128", shapes(2048, 4, size=128), dict(max_q=512)),
                ("deterministic", shapes(64, 64), dict(max_q=1, deterministic=True)),
                ("decode tokens first", turned(64, 64), dict(max_q=1, tokens_first=True)),
                ("mixed tokens first", turned(576, 65), dict(max_q=512, tokens_first=True)),
            ]
        for name, args, options in calls:
            yield f"paged/{name}", functools.partial(paged_attention, **options), args
        for dtype in (jnp.int8, jnp.float8_e4m3fn):
            for name, args, options in (
                ("decode b64", shapes(64, 64, dtype=dtype), {}),
                ("decode b16", shapes(64, 64, dtype=dtype, size=16, width=256), {}),
                ("verify", shapes(320, 64, dtype=dtype), dict(max_q=5)),
                ("chunk", shapes(2048, 4, dtype=dtype), dict(max_q=512)),
                *[
                    ("decode window", shapes(64, 64, dtype=dtype, size=16, width=256), window),
                    ("chunk window", shapes(2048, 4, dtype=dtype), dict(max_q=512, **window)),
                ]
                * (dim == 128),
            ):
                f = functools.partial(scaled, **{"max_q": 1, **options})
                scale = jax.ShapeDtypeStruct(args[1].shape[:3], jnp.float32)
                yield f"paged/{name} h{dim} {jnp.dtype(dtype).name}", f, (*args, scale, scale)
    slopes = jax.ShapeDtypeStruct((32,), jnp.float32)
    yield "paged/chunk slopes", functools.partial(sloped, max_q=512), (*arguments(2048, 4), slopes)
    sds, bits = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((320, 1), jnp.uint32)
    args = arguments(320, 64)
    yield "paged/tree", functools.partial(tree, max_q=5), (*args, bits)
    shared = sds((2, 32), jnp.int32), sds((2,), jnp.int32), sds((64,), jnp.int32)
    yield "paged/cascade", functools.partial(cascade, max_q=5), (*args, *shared)
    *args, scale = (*arguments(64, 64, dtype=jnp.float8_e4m3fn), sds((1024, 8, 64), jnp.float32))
    args = (*args, *shared, scale, scale)
    yield "paged/cascade float8_e4m3fn", functools.partial(scaled_cascade, max_q=1), args
    for dtype in (jnp.bfloat16, jnp.int8, jnp.float8_e4m3fn):
        for dim, heads in ((128, 8), (64, 2), (256, 8)):
            pool, new = sds((1024, heads, 64, dim), dtype), sds((256, heads, dim), jnp.bfloat16)
            extra = ()
            if jnp.dtype(dtype).itemsize == 1:
                extra = (sds(pool.shape[:3], jnp.float32),) * 2
            args = (pool, pool, new, new, sds((256,), jnp.int32), *extra)
            yield f"paged/write h{dim} {jnp.dtype(dtype).name}", write, args


def scaled(*args, **options):
    """The call with the scales of K and V as its last arguments."""
    *args, k_scale, v_scale = args
    return paged_attention(*args, k_scale=k_scale, v_scale=v_scale, **options)


def scaled_cascade(*args, **options):
    """The call with a cascade and the scales of K and V as its last arguments."""
    *args, k_scale, v_scale = args
    return cascade(*args, k_scale=k_scale, v_scale=v_scale, **options)


def sloped(*args, **options):
    """The call with ALiBi's slopes, which serve as sinks too, as its last argument."""
    *args, slopes = args
    return paged_attention(*args, alibi_slopes=slopes, sinks=slopes, **options)


def tree(*args, **options):
    """The call with a tree mask as its last argument, and everything a tree may come with."""
    *args, mask = args
    positions = jnp.arange(args[0].shape[0], dtype=jnp.int32)
    slopes = jnp.ones(args[0].shape[1])
    extra = dict(tree_mask=mask, positions=positions, alibi_slopes=slopes, window=1000)
    return paged_attention(*args, **extra, **options)


def write(*args):
    """Keys and values into pools that may have scales."""
    names = ("k_scale", "v_scale")
    return write_kv(*args[:5], **dict(zip(names, args[5:], strict=False)))


def cascade(*args, **options):
    """The call with a cascade as its last three arguments."""
    return paged_attention(*args[:-3], cascade=args[-3:], **options)
