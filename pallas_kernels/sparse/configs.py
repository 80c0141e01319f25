"""The programs that `scripts/compile_sm90a.py` compiles: each kernel at shapes it is chosen for."""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from .block_matmul import block_matmul
from .block_sample import block_sample
from .rows import RowConfig, entry_matmul, row_matmul, row_sample
from .two_four import two_four_matmul
from .vector import VectorConfig, vector_matmul, vector_scatter


def compile_cases() -> Iterator[tuple[str, Callable, tuple]]:
    """(name, function, abstract arguments).

    >>> sorted({name.split()[0] for name, _, _ in compile_cases()})
    ['sparse/block', 'sparse/entry', 'sparse/row', 'sparse/two', 'sparse/vector']
    """
    sds, i32 = jax.ShapeDtypeStruct, jnp.int32
    for bh, bw in ((128, 128), (64, 64), (32, 32), (128, 32)):
        data, entries = sds((400, bh, bw), jnp.bfloat16), sds((400,), i32)
        indptr, x = sds((65,), i32), sds((64 * bw, 4096), jnp.bfloat16)
        yield f"sparse/block matmul {bh}x{bw}", block_matmul, (data, x, entries, indptr)
        turned = functools.partial(block_matmul, turned=True)
        x = sds((64 * bh, 4096), jnp.bfloat16)
        f = lambda d, x, m, p, o, f=turned: f(d, x, m, p, order=o)
        yield f"sparse/block turned {bh}x{bw}", f, (data, x, entries, indptr, entries)
        g, x = (sds((64 * side, 4096), jnp.bfloat16) for side in (bh, bw))
        f = functools.partial(block_sample, block=(bh, bw))
        yield f"sparse/block sample {bh}x{bw}", f, (g, x, entries, entries)
    w = sds((1024, 2, 4096), jnp.bfloat16), sds((512, 4096), jnp.uint8)
    yield "sparse/two four matmul", two_four_matmul, (sds((256, 4096), jnp.bfloat16), *w)
    for n, dtype in ((8, "float32"), (32, "float32"), (256, "float32"), (64, "bfloat16")):
        x, g, data = sds((1000, n), dtype), sds((900, n), dtype), sds((10**5,), dtype)
        entries, indptr, case = sds((10**5,), i32), sds((901,), i32), f"x{n} {dtype}"
        yield f"sparse/row matmul {case}", row_matmul, (data, x, entries, entries, indptr)
        scatter = functools.partial(entry_matmul, rows=900)
        yield f"sparse/entry matmul {case}", scatter, (data, x, entries, entries)
        yield f"sparse/row sample {case}", row_sample, (g, x, entries, entries)
    for n in (32, 256):  # results too large to begin as zeros
        x, config = sds((1000, n), "float32"), RowConfig.of(10**7, n, 10**6)
        f = functools.partial(row_matmul, config=config)
        yield (
            f"sparse/row matmul x{n} cut",
            f,
            (sds((10**5,), "float32"), x, entries, entries, indptr),
        )
    for chunk, dtype in ((128, "float32"), (256, "float32"), (256, "bfloat16")):
        data, x = sds((10**5,), dtype), sds((1000,), dtype)
        f = functools.partial(vector_matmul, config=VectorConfig(chunk))
        yield f"sparse/vector {chunk} {dtype}", f, (data, x, entries, entries, indptr)
        f = functools.partial(vector_scatter, rows=900, config=VectorConfig(chunk))
        yield f"sparse/vector scatter {chunk} {dtype}", f, (data, x, entries, entries)
