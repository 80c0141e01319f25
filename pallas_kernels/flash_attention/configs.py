"""Every configuration that `heuristics` ships, as programs for `scripts/compile_sm90a.py`."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.flash_attention import heuristics
from pallas_kernels.flash_attention.attention import flash_attention_bwd, flash_attention_fwd
from pallas_kernels.flash_attention.mask import Band, BlockKinds, Bounds
from pallas_kernels.flash_attention.problem import Dropout, Modifier
from pallas_kernels.flash_attention.program import scalar_program, split

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
            if mask == "causal":
                yield from modified_cases(head_dim)
            if mask in ("full", "causal"):  # the tiles change with the length
                for keys in (heuristics.SHORT + 8, heuristics.LONG + 8, heuristics.LONG // 2):
                    x = shape(1, keys, kv_heads, head_dim)
                    yield f"{name} {keys} fwd", fwd, (x, x, x)


def modified_cases(head_dim: int) -> Iterator[tuple[str, Callable, tuple]]:
    """Causal attention with dropout, a score_mod, a bias, a mask_mod and a block mask."""
    shape = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
    batch, tokens, heads, kv_heads = 2, 1032, 8, 2
    q, k = shape(batch, tokens, heads, head_dim), shape(batch, tokens, kv_heads, head_dim)
    lse = shape(batch, tokens, heads, dtype=jnp.float32)
    index = (jax.ShapeDtypeStruct((), jnp.int32),) * 4
    score = (jax.ShapeDtypeStruct((), jnp.float32),)
    sizes = (batch, heads, tokens, tokens)
    ids, slopes = jnp.zeros(tokens, jnp.int32), jnp.zeros(heads)
    alibi = lambda x, b, n, t, s: x - slopes[n] * jnp.abs(t - s)
    documents = lambda b, n, t, s: ids[t] == ids[s]
    moved = split(jax.make_jaxpr(alibi)(*score, *index).jaxpr, True, sizes).program
    hidden = split(jax.make_jaxpr(documents)(*index).jaxpr, False, sizes).program
    added = scalar_program(lambda x, t, s, u: x + u, ["tile"], [jnp.float32])
    f32, i32 = jnp.float32, jnp.int32
    rows = shape(1, 1, tokens, dtype=i32)
    blocks = shape(1, 1, 9, 9, dtype=jnp.int8)
    table = shape(1, heads, tokens, tokens)
    cases: dict[str, tuple[tuple, Callable[..., dict[str, Any]]]] = {
        "soft cap": ((), lambda: dict(soft_cap=30.0)),
        "dropout": (
            (shape(batch, heads, tokens, dtype=jnp.uint32),),
            lambda words: dict(dropout=Dropout(0.1, words)),
        ),
        "score_mod": (
            (shape(1, heads, dtype=f32),),
            lambda x: dict(score=Modifier(moved, (x,))),
        ),
        "bias": ((table,), lambda x: dict(score=Modifier(added, (x,)))),
        "mask_mod": ((rows, rows), lambda a, b: dict(mask=Modifier(hidden, (a, b)))),
        "blocks": (
            (rows, rows, blocks),
            lambda a, b, kinds: dict(
                mask=Modifier(hidden, (a, b)),
                blocks=BlockKinds(kinds, 128, 128, tokens, tokens),
            ),
        ),
    }
    for name, (extra, make) in cases.items():

        def fwd(q, k, v, *extra, make=make):
            return flash_attention_fwd(q, k, v, band=BANDS["causal"], scale=0.1, **make(*extra))

        def bwd(q, k, v, o, lse, do, *extra, make=make, deterministic=False, wanted=()):
            return flash_attention_bwd(
                q, k, v, o, lse, do, band=BANDS["causal"], scale=0.1, wanted=wanted,
                deterministic=deterministic, **make(*extra),
            )  # fmt: skip

        grads = (q, k, k, q, lse, q, *extra)
        yield f"flash/H{head_dim} {name} fwd", fwd, (q, k, k, *extra)
        wanted = (0,) if name in ("score_mod", "bias") else ()
        yield f"flash/H{head_dim} {name} bwd", functools.partial(bwd, wanted=wanted), grads
        if name == "dropout":
            repeatable = functools.partial(bwd, deterministic=True)
            yield f"flash/H{head_dim} {name} bwd deterministic", repeatable, grads
