"""What may be tuned of the sparse kernels: products of rows of numbers, and of blocks."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import sparse as kernels

from . import autotune

SOURCES = ("pallas_kernels.sparse", "pallas_kernels._mgpu")


def row_matmul(data: Any, x: Any, row: Any, column: Any, indptr: Any) -> jax.Array:
    """`pallas_kernels.sparse.row_matmul` in the tuner's configuration."""
    operands = (data, x, row, column, indptr)
    return kernels.row_matmul(*operands, config=autotune.choose(ROWS, operands))


def vector_matmul(data: Any, x: Any, row: Any, column: Any, indptr: Any) -> jax.Array:
    """`pallas_kernels.sparse.vector_matmul` in the tuner's configuration."""
    operands = (data, x, row, column, indptr)
    return kernels.vector_matmul(*operands, config=autotune.choose(VECTORS, operands))


def block_matmul(
    data: Any, x: Any, minor: Any, indptr: Any, *, order: Any = None, turned: bool = False
) -> jax.Array:
    """`pallas_kernels.sparse.block_matmul` in the tuner's configuration."""
    operands = (data, x, minor, indptr, order)
    config = autotune.choose(BLOCKS, operands, {"turned": turned})
    return _run_blocks(config, *operands, turned=turned)


def _ascending(indptr: jax.Array, count: int) -> jax.Array:
    """The row of each entry."""
    return jnp.searchsorted(indptr, jnp.arange(count), side="right").astype(jnp.int32) - 1


def _borders(rng: np.random.Generator, rows: int, count: int) -> jax.Array:
    """Entries that fall on rows at random."""
    filled = np.bincount(rng.integers(0, rows, count), minlength=rows)
    return jnp.asarray(np.concatenate([[0], np.cumsum(filled)]), jnp.int32)


# --- rows of numbers -----------------------------------------------------------------------------


def _row_candidates(data: Any, x: Any, row: Any, column: Any, indptr: Any) -> tuple[Any, ...]:
    nse, n = row.shape[0], x.shape[1]
    default = kernels.RowConfig.of(nse, n, indptr.shape[0] - 1)
    found = {default: None}
    for chunk, vector in itertools.product((32, 64, 128, 256, 512), (1, 2, 4)):
        if n % vector == 0:
            found[kernels.RowConfig(chunk, vector, default.zeroed)] = None
    return tuple(found)


def _vector_candidates(data: Any, *_: Any) -> tuple[Any, ...]:
    default = kernels.VectorConfig.of(data.shape[0])
    others = (dataclasses.replace(default, chunk=c) for c in (128, 256, 512, 1024))
    return tuple(dict.fromkeys((default, *others)))


def _row_inputs(rng: np.random.Generator, data: Any, x: Any, *others: Any) -> tuple[Any, ...]:
    """Entries at places of a uniform distribution."""
    from .autotune.trial import random_inputs

    nse, rows = data.shape[0], others[2].shape[0] - 1
    indptr = _borders(rng, rows, nse)
    column = jnp.asarray(rng.integers(0, x.shape[0], nse), jnp.int32)
    return (*random_inputs(rng, data, x), _ascending(indptr, nse), column, indptr)


def _row_reference(data: Any, x: Any, row: Any, column: Any, indptr: Any) -> jax.Array:
    """Column by column, so that no more than nse products exist at a time."""
    rows = indptr.shape[0] - 1
    one = lambda c: jax.ops.segment_sum(data * c[column], row, rows)
    return jax.lax.map(one, x.T).T


def _vector_reference(data: Any, x: Any, row: Any, column: Any, indptr: Any) -> jax.Array:
    return jax.ops.segment_sum(data * x[column], row, indptr.shape[0] - 1)


def _row_case(text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`"M=100000 N=100000 nse=1000000 n=32"`: also dtype."""
    given = autotune.sizes(text)
    M, N, nse, n = (given.pop(name) for name in ("M", "N", "nse", "n"))
    dtype = jnp.dtype(given.pop("dtype", "float32"))
    _nothing_left(text, given)
    shape, i32 = jax.ShapeDtypeStruct, jnp.int32
    entries = shape((nse,), i32)
    operands = (shape((nse,), dtype), shape((N, n), dtype), entries, entries, shape((M + 1,), i32))
    return operands, {}


def _vector_case(text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`"M=100000 N=100000 nse=1000000"`: also dtype."""
    (data, x, *entries), options = _row_case(f"{text} n=1")
    return (data, jax.ShapeDtypeStruct(x.shape[:1], x.dtype), *entries), options


def _nothing_left(text: str, given: dict[str, Any]) -> None:
    if given:
        raise ValueError(f"{text!r}: {sorted(given)} are no sizes of a sparse product")


ROWS = autotune.register(
    autotune.Tunable(
        "spmm/rows",
        run=lambda config, *operands: kernels.row_matmul(*operands, config=config),
        candidates=_row_candidates,
        reference=_row_reference,
        sources=SOURCES,
        inputs=_row_inputs,
        family=lambda data, x, *_: {"dtype": data.dtype.name, "n": x.shape[1]},
        case=_row_case,
        shapes=tuple(f"M=100000 N=100000 nse=1000000 n={n}" for n in (32, 256)),
        platforms=("cuda",),
    )
)

VECTORS = autotune.register(
    autotune.Tunable(
        "spmm/vector",
        run=lambda config, *operands: kernels.vector_matmul(*operands, config=config),
        candidates=_vector_candidates,
        reference=_vector_reference,
        sources=SOURCES,
        inputs=_row_inputs,
        family=lambda data, *_: {"dtype": data.dtype.name},
        case=_vector_case,
        shapes=("M=100000 N=100000 nse=1000000", "M=1000000 N=1000000 nse=10000000"),
        platforms=("cuda",),
    )
)


# --- blocks --------------------------------------------------------------------------------------


def _run_blocks(
    config: Any, data: Any, x: Any, minor: Any, indptr: Any, order: Any, *, turned: bool
) -> jax.Array:
    return kernels.block_matmul(
        data, x, minor, indptr, order=order, turned=turned, config=config
    )  # fmt: skip


def _block_candidates(
    data: Any, x: Any, minor: Any, indptr: Any, order: Any, *, turned: bool
) -> tuple[Any, ...]:
    default = kernels.MatmulConfig.of(data.shape[2 if turned else 1], x.shape[1])
    found = {default: None}
    for tile_n, stages in itertools.product((128, 256), (3, 4, 5, 6)):
        found[dataclasses.replace(default, tile_n=tile_n, stages=stages)] = None
    return tuple(found)


def _block_inputs(
    rng: np.random.Generator,
    data: Any,
    x: Any,
    minor: Any,
    indptr: Any,
    order: Any,
    *,
    turned: bool,
) -> tuple[Any, ...]:
    """Blocks at places of a uniform distribution, stored in order or in any."""
    from .autotune.trial import random_inputs

    nse, width = data.shape[0], data.shape[1 if turned else 2]
    minor = jnp.asarray(rng.integers(0, x.shape[0] // width, nse), jnp.int32)
    if order is not None:
        order = jnp.asarray(rng.permutation(nse), jnp.int32)
    return *random_inputs(rng, data, x), minor, _borders(rng, indptr.shape[0] - 1, nse), order


def _block_reference(
    data: Any, x: Any, minor: Any, indptr: Any, order: Any, *, turned: bool
) -> jax.Array:
    data = data if order is None else data[order]
    data = data.swapaxes(1, 2) if turned else data
    nse, _, width = data.shape
    parts = jnp.einsum("ehw,ewn->ehn", data, x.reshape(-1, width, x.shape[1])[minor])
    rows = jax.ops.segment_sum(parts, _ascending(indptr, nse), indptr.shape[0] - 1)
    return rows.reshape(-1, x.shape[1])


def _block_case(text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`"M=8192 N=8192 n=8192 block=128 nse=410"`: also dtype, order, turned."""
    given = autotune.sizes(text)
    M, N, n, side, nse = (given.pop(name) for name in ("M", "N", "n", "block", "nse"))
    dtype = jnp.dtype(given.pop("dtype", "bfloat16"))
    ordered, turned = given.pop("order", False), given.pop("turned", False)
    _nothing_left(text, given)
    shape, i32 = jax.ShapeDtypeStruct, jnp.int32
    entries = shape((nse,), i32)
    data, x = shape((nse, side, side), dtype), shape((N, n), dtype)
    operands = (data, x, entries, shape((M // side + 1,), i32), entries if ordered else None)
    return operands, {"turned": turned}


def _block_family(data: Any, x: Any, *others: Any, turned: bool) -> dict[str, Any]:
    sides = list(data.shape[1:])
    return {"dtype": data.dtype.name, "block": sides, "n": x.shape[1], "turned": turned}


BLOCKS = autotune.register(
    autotune.Tunable(
        "spmm/blocks",
        run=_run_blocks,
        candidates=_block_candidates,
        reference=_block_reference,
        sources=SOURCES,
        inputs=_block_inputs,
        family=_block_family,
        case=_block_case,
        shapes=tuple(
            f"M=8192 N=8192 n=8192 block={side} nse={(8192 // side) ** 2 // 10}"
            for side in (128, 64, 32)
        ),
        platforms=("cuda",),
    )
)
