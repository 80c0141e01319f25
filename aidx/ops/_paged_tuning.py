"""What may be tuned of the paged attention kernels: which of them, and their tiles."""

from __future__ import annotations

import importlib
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _paged_peers, _paged_xla, autotune
from ._paged_spec import PagedOperands, PagedSpec

PLAIN = {"q", "k_pool", "v_pool", "block_tables", "context_lens", "q_indptr"}
# rows x context: decode, verification of four drafted tokens, a chunk of a prompt
SHAPES = tuple(
    f"R={rows} n={new} ctx={context} N=32 K=8 H=128 block=64"
    for rows, new, context in (
        (1, 1, 1024),
        (1, 1, 4096),
        (8, 1, 4096),
        (32, 1, 4096),
        (64, 1, 1024),
        (256, 1, 1024),
        (16, 1, 32768),
        (64, 5, 2048),
        (4, 512, 2048),
        (1, 2048, 8192),
    )
)


def config(spec: PagedSpec, ops: PagedOperands) -> Any:
    """The kernels' configuration; None (their own choice) for calls that are not tuned."""
    given = {name for name, x in ops._asdict().items() if x is not None}
    if spec.deterministic or spec.tokens_first or not given <= PLAIN | {"alibi_slopes", "sinks"}:
        return None
    if ops.k_pool.dtype.itemsize == 1:
        return None  # what holds one byte a value chooses by shared memory alone
    return _single(autotune.choose(TUNABLE, (ops,), {"spec": spec}))


def _single(chosen: Any) -> Any:
    """What the kernels take as `config`: their own plan, a tuple, is None there."""
    return None if isinstance(chosen, tuple) else chosen


def _geometry(spec: PagedSpec, ops: PagedOperands) -> Any:
    module = importlib.import_module("pallas_kernels.paged_attention.geometry")
    (T, N, H), (P, K, size, Hv), (R, M) = ops.q.shape, ops.v_pool.shape, ops.block_tables.shape
    return module.Geometry(T, N, K, H, Hv, P, size, R, M, max_q=spec.max_q)


def _candidates(ops: PagedOperands, *, spec: PagedSpec) -> tuple[Any, ...]:
    """The kernels' own plan first; what does not fit is refused when it is tried."""
    kernels = _paged_peers._kernels()
    geom = _geometry(spec, ops)
    plan = kernels.default_plan(geom)
    found: dict[Any, None] = {plan: None}
    if spec.max_q * geom.group > 64:  # chunks: tiles of queries against blocks of keys
        for consumers, block_kv, stages in itertools.product((1, 2, 3), (64, 128), (2, 3)):
            found[kernels.PrefillConfig(consumers, block_kv, stages)] = None
        for block_kv in (128, 192):
            found[kernels.PrefillConfig(2, block_kv, 2, late_sum=True)] = None
    else:
        for ctas, stages in ((132, 3), (132, 4), (132, 6), (264, 2), (264, 3)):
            found[kernels.SplitConfig(ctas=ctas, stages=stages)] = None
        found[kernels.SplitConfig(uncut=True)] = None  # nothing to merge: for rows of like lengths
        segments = geom.num_rows * geom.num_kv_heads
        for cluster, warpgroups, stages in itertools.product((2, 4, 8), (1, 2), (2, 3)):
            if segments * cluster <= 2 * 132:  # more would wait for each other
                found[kernels.ClusterConfig(cluster, warpgroups, stages)] = None
    if len(plan) == 1:  # the plan by another name
        found.pop(plan[0], None)
    return tuple(found)


def _reference(ops: PagedOperands, *, spec: PagedSpec) -> Any:
    return _paged_xla.forward(spec, ops)[0]


def _inputs(rng: np.random.Generator, ops: PagedOperands, *, spec: PagedSpec) -> Any:
    """Every row owns as many blocks as its table holds, all full, scattered over the pool.

    As many rows have `max_q` new tokens as there are tokens for; the others have one, as in a step
    that decodes beside a prompt.
    """
    from .autotune.trial import random_inputs

    (values,) = random_inputs(rng, ops)
    (R, M), P, size = ops.block_tables.shape, ops.k_pool.shape[0], ops.k_pool.shape[2]
    tables = rng.permutation(P)[: R * M] if R * M <= P else rng.integers(0, P, R * M)
    many = (ops.q.shape[0] - R) // (spec.max_q - 1) if spec.max_q > 1 else 0
    new = np.where(np.arange(R) < many, spec.max_q, 1)
    borders = np.minimum(np.concatenate([[0], np.cumsum(new)]), ops.q.shape[0])
    return (
        values._replace(
            block_tables=jnp.asarray(tables.reshape(R, M), jnp.int32),
            context_lens=jnp.full((R,), M * size, jnp.int32),
            q_indptr=jnp.asarray(borders, jnp.int32),
        ),
    )


def _case(text: str) -> tuple[tuple[PagedOperands], dict[str, Any]]:
    """`"R=64 n=1 ctx=1024 N=32 K=8 H=128 block=64"`: also window, soft_cap, dtype."""
    given = autotune.sizes(text)
    R, n, context, N, H = (given.pop(name) for name in ("R", "n", "ctx", "N", "H"))
    K, size, dtype = given.pop("K", N), given.pop("block", 16), given.pop("dtype", "bfloat16")
    window, soft_cap = given.pop("window", None), given.pop("soft_cap", None)
    if given:
        raise ValueError(f"{text!r}: {sorted(given)} are no sizes of paged attention")
    M = -(-context // size)
    shape, i32 = jax.ShapeDtypeStruct, jnp.int32
    pool = shape((R * M + 1, K, size, H), jnp.dtype(dtype))
    q = shape((R * n, N, H), pool.dtype)
    integers = shape((R, M), i32), shape((R,), i32), shape((R + 1,), i32)
    spec = PagedSpec(scale=H**-0.5, max_q=n, window=window, soft_cap=soft_cap)
    return (PagedOperands(q, pool, pool, *integers),), {"spec": spec}


def _key(ops: PagedOperands, *, spec: PagedSpec) -> dict[str, Any]:
    """What a timing depends on: not how many blocks the pool has."""
    (T, N, H), (_, K, size, Hv), (R, M) = ops.q.shape, ops.v_pool.shape, ops.block_tables.shape
    shape = {"T": T, "R": R, "M": M, "block": size, "N": N, "K": K, "H": H, "Hv": Hv}
    return {
        **shape,
        "dtype": ops.q.dtype.name,
        "max_q": spec.max_q,
        "window": spec.window,
        "soft_cap": spec.soft_cap is not None,
        "given": sorted(n for n, x in ops._asdict().items() if x is not None and n not in PLAIN),
    }


def _family(ops: PagedOperands, *, spec: PagedSpec) -> dict[str, Any]:
    """What the compiled code depends on: not how many rows, tokens and heads there are."""
    key = _key(ops, spec=spec)
    group, window = key["N"] // key["K"], spec.window is not None
    kept = {name: key[name] for name in ("block", "H", "Hv", "dtype", "max_q", "soft_cap", "given")}
    return {**kept, "group": group, "window": window}


TUNABLE = autotune.register(
    autotune.Tunable(
        "paged_attention/forward",
        run=lambda config, ops, *, spec: _paged_peers.run(spec, ops, _single(config))[0],
        candidates=_candidates,
        reference=_reference,
        sources=("pallas_kernels.paged_attention", "pallas_kernels._mgpu"),
        inputs=_inputs,
        key=_key,
        family=_family,
        case=_case,
        shapes=SHAPES,
        platforms=("cuda",),
    )
)
