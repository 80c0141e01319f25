"""`paged_attention`: ragged rows of queries over a pool of key and value blocks."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from . import _paged_peers, _paged_xla, registry
from ._paged_spec import PagedAttentionConfig, PagedOperands, PagedSpec
from .write_kv import QUANTISED_MAX

Array = jax.Array


class Cascade(NamedTuple):
    """Prefixes that several rows share: the answer is the same, the prefix is read once.

    A row of group g sees the first `shared_lens[g]` keys through `shared_tables[g]`, the others
    through its own table, whose first entries are then not read.
    """

    shared_tables: Array  # [C, M'] i32
    shared_lens: Array  # [C] i32, at most the context of every row of the group less its new tokens
    group: Array  # [R] i32, -1 for none


def paged_attention(
    q: Array,
    k_pool: Array,
    v_pool: Array,
    block_tables: Array,
    context_lens: Array,
    q_indptr: Array,
    *,
    max_q: int | None = None,
    positions: Array | None = None,
    window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: Array | None = None,
    sinks: Array | None = None,
    tree_mask: Array | None = None,
    cascade: Cascade | tuple[Array, Array, Array] | None = None,
    scale: float | None = None,
    k_scale: Array | None = None,
    v_scale: Array | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    tokens_first: bool = False,
    implementation: registry.ImplementationChoice = None,
    config: PagedAttentionConfig | None = None,
) -> Any:
    """Causal attention of ragged rows of queries over their blocks of a pool.

    Row r owns queries `q_indptr[r]:q_indptr[r + 1]` (one: decode; k + 1: verification; hundreds: a
    chunk of prefill) and the first `context_lens[r]` slots of `block_tables[r]`, its new tokens'
    keys the last of them.  Query i of n stands at `context_lens[r] - n + i` and sees what is not
    after it.  Slots that no query sees may hold anything, NaN too.

    Args:
      q: `[T, N, H]`; queries of no row give zeros.
      k_pool: `[P, K, block_size, H]` in q's dtype, or int8 or float8_e4m3fn with k_scale.
      v_pool: `[P, K, block_size, Hv]`.
      block_tables: i32 `[R, M]`; entries past the context may be anything.
      context_lens: i32 `[R]`, keys of a row after this step's write; 0 is an empty row.
      q_indptr: i32 `[R + 1]`, ascending from 0.
      max_q: static bound on the queries of a row (1: pure decode); T by default.
      positions: i32 `[T]`: where queries, and the keys of the same new tokens, stand for `window`
        and ALiBi, in place of their index (trees: the depth).
      window: keys a query sees, its own included.
      logits_soft_cap: c in c * tanh(x / c).
      alibi_slopes: f32 `[N]`: subtracts slope * distance.
      sinks: f32 `[N]`, a learned logit of the denominator.
      tree_mask: u32 `[T, ceil(nodes / 32)]`: bit j says that a query sees its row's j-th new token,
        in place of causality among the new ones.
      cascade: `(shared_tables [C, M'], shared_lens [C], group [R])`, see `Cascade`.
      scale: 1 / sqrt(H) by default.
      k_scale: f32 `[P, K, block_size]`, or `[K]` (see `write_kv`).  The Hopper kernel for few
        queries splits them into terms of the pool's type: over int8 a score errs by at most
        `scale * k_scale * max|q| * sum|k| / 32512` (k as stored, whole numbers), which is
        `max|q| / mean|q|` 128ths of what rounding k may cost; over float8_e4m3fn by no more than
        the tensor core's sums.  The one for chunks rounds k_scale * k to q's dtype instead.
      v_scale: as k_scale.
      return_lse: also the natural log-sum-exp `[T, N]` f32, the sink left out.
      deterministic: a row's output does not depend on what else is in the batch.
      tokens_first: the pools are `[P, block_size, K, H]`: a contiguous cache `[B, S, K, H]` is one,
        reshaped (`xla` transposes it, which costs a copy).  Scales are as ever.
      implementation: None, a name or a sequence of names (see `aidx.ops.registry`).
      config: tile sizes.

    Returns:
      out `[T, N, Hv]` in q's dtype, or (out, lse).

    Raises:
      TypeError, ValueError: arguments that do not fit, with their values.
      ExceptionGroup: no implementation can do this.

    PagedAttention: Kwon et al. 2023.  Cascade: Ye et al. 2024 (FlashInfer).

    >>> q = jnp.ones((2, 4, 8)); pool = jnp.ones((3, 2, 16, 8))
    >>> out = paged_attention(q, pool, pool, jnp.array([[2]]), jnp.array([5]), jnp.array([0, 1]))
    >>> print(out[:, 0, 0])
    [1. 0.]
    """
    arguments = {name: value for name, value in locals().items() if name != "implementation"}
    spec, operands = _prepare(**arguments)
    names = tuple(entry.name for entry in registry.resolve("paged_attention", implementation))
    out, lse = _call(names, spec, operands)
    return (out, lse) if return_lse else out


@functools.partial(jax.jit, static_argnums=(0, 1))
def _call(names: tuple[str, ...], spec: PagedSpec, operands: PagedOperands) -> Any:
    return registry.dispatch(registry.Call("paged_attention", names, spec), operands)


# --- from arguments to the canonical form --------------------------------------------------------


def _prepare(
    *,
    q: Array,
    k_pool: Array,
    v_pool: Array,
    block_tables: Any,
    context_lens: Any,
    q_indptr: Any,
    max_q: int | None,
    positions: Any,
    window: int | None,
    logits_soft_cap: float | None,
    alibi_slopes: Any,
    sinks: Any,
    tree_mask: Any,
    cascade: Any,
    scale: float | None,
    k_scale: Any,
    v_scale: Any,
    return_lse: bool,
    deterministic: bool,
    tokens_first: bool,
    config: PagedAttentionConfig | None,
) -> tuple[PagedSpec, PagedOperands]:
    """Validate a call and bring it to `(PagedSpec, PagedOperands)`."""
    _check_pools(q, k_pool, v_pool, k_scale, v_scale, tokens_first)
    T, N, H = q.shape
    tables = _integers("block_tables", block_tables, 2)
    R = tables.shape[0]
    lens = _integers("context_lens", context_lens, 1, (R,))
    indptr = _integers("q_indptr", q_indptr, 1, (R + 1,))
    max_q = T if max_q is None else max_q
    if max_q < 1 and T > 0:
        raise ValueError(f"max_q must be at least 1, not {max_q}")
    _check_rows(indptr, lens, tables, k_pool.shape[1 if tokens_first else 2], T, max_q)
    if window is not None and (not isinstance(window, int) or window < 1):
        raise ValueError(f"window counts keys and must be an int of at least 1, not {window!r}")
    if logits_soft_cap is not None and not logits_soft_cap > 0:
        raise ValueError(f"logits_soft_cap must be positive, not {logits_soft_cap}")
    if positions is not None:
        positions = _integers("positions", positions, 1, (T,))
    if tree_mask is not None:
        tree_mask = jnp.asarray(tree_mask)
        if tree_mask.ndim != 2 or tree_mask.shape[0] != T or tree_mask.dtype != jnp.uint32:
            raise TypeError(
                f"tree_mask must be u32 [{T}, words], not {tree_mask.dtype}{tree_mask.shape}"
            )
    spec = PagedSpec(
        scale=1.0 / math.sqrt(H) if scale is None else float(scale),
        max_q=min(max_q, max(T, 1)),
        window=window,
        soft_cap=None if logits_soft_cap is None else float(logits_soft_cap),
        deterministic=bool(deterministic),
        return_lse=bool(return_lse),
        tokens_first=bool(tokens_first),
        config=config or PagedAttentionConfig(),
    )
    operands = PagedOperands(
        q=q,
        k_pool=k_pool,
        v_pool=v_pool,
        block_tables=tables,
        context_lens=lens,
        q_indptr=indptr,
        positions=positions,
        alibi_slopes=_per_head("alibi_slopes", alibi_slopes, N),
        sinks=_per_head("sinks", sinks, N),
        tree_mask=tree_mask,
        k_scale=k_scale,
        v_scale=v_scale,
        **_cascade(cascade, R),
    )
    return spec, operands


def _check_pools(
    q: Array, k_pool: Array, v_pool: Array, k_scale: Any, v_scale: Any, tokens_first: bool
) -> None:
    if q.ndim != 3:
        raise ValueError(f"q must be [T, N, H], not {q.shape}")
    if k_pool.ndim != 4 or v_pool.ndim != 4 or k_pool.shape[:3] != v_pool.shape[:3]:
        raise ValueError(
            f"pools must be [P, K, block_size, H] alike, not {k_pool.shape=} {v_pool.shape=}"
        )
    heads = 2 if tokens_first else 1
    scales = (k_pool.shape[0], k_pool.shape[heads], k_pool.shape[3 - heads])
    if q.shape[2] != k_pool.shape[3]:
        raise ValueError(f"{q.shape=} and {k_pool.shape=} differ in head_dim")
    if k_pool.shape[heads] == 0 or q.shape[1] % k_pool.shape[heads]:
        raise ValueError(
            f"query heads of {q.shape=} are no multiple of the heads of {k_pool.shape=}"
        )
    if min(k_pool.shape) == 0:
        raise ValueError(f"the pool is empty: {k_pool.shape=}")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise TypeError(f"q must be a float array, not {q.dtype}")
    for name, pool, scale in (("k", k_pool, k_scale), ("v", v_pool, v_scale)):
        quantised = jnp.dtype(pool.dtype) in QUANTISED_MAX
        if quantised != (scale is not None):
            raise ValueError(
                f"{name}_scale goes with int8 and float8_e4m3fn pools; {name}_pool is {pool.dtype}"
            )
        if not quantised and not jnp.issubdtype(pool.dtype, jnp.floating):
            raise TypeError(f"{name}_pool must be floats, int8 or float8_e4m3fn, not {pool.dtype}")
        if quantised and scale.shape not in (scales, scales[1:2]):
            raise ValueError(f"{name}_scale must be {scales} or {scales[1:2]}, not {scale.shape}")


def _check_rows(
    indptr: Array, lens: Array, tables: Array, block_size: int, T: int, max_q: int
) -> None:
    """What a trace cannot know is checked where the values are at hand."""
    if isinstance(indptr, Tracer) or isinstance(lens, Tracer):
        return
    borders, context = np.asarray(indptr), np.asarray(lens)
    counts = np.diff(borders)
    if borders[0] != 0 or (counts < 0).any() or borders[-1] > T:
        raise ValueError(f"q_indptr must ascend from 0 to at most T={T}: {borders}")
    if counts.size and counts.max() > max_q:
        raise ValueError(f"a row has {counts.max()} queries, more than {max_q=}")
    if (context < counts).any() or (context > tables.shape[1] * block_size).any():
        raise ValueError(
            f"context_lens must hold the row's own queries and fit its table of "
            f"{tables.shape[1]} x {block_size} slots: {context}"
        )


def _integers(name: str, x: Any, ndim: int, shape: tuple[int, ...] | None = None) -> Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be integers, not {x.dtype}")
    if x.ndim != ndim or (shape is not None and x.shape != shape):
        raise ValueError(f"{name} must have {shape or f'{ndim} axes'}, not {x.shape}")
    return x.astype(jnp.int32)


def _per_head(name: str, x: Any, N: int) -> Any:
    if x is None:
        return None
    x = jnp.asarray(x)
    if x.shape != (N,) or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be [{N}] floats, not {x.dtype}{x.shape}")
    return x.astype(jnp.float32)


def _cascade(cascade: Any, R: int) -> dict[str, Any]:
    if cascade is None:
        return {}
    shared_tables, shared_lens, group = cascade
    shared_tables = _integers("cascade shared_tables", shared_tables, 2)
    return {
        "shared_tables": shared_tables,
        "shared_lens": _integers("cascade shared_lens", shared_lens, 1, shared_tables.shape[:1]),
        "shared_group": _integers("cascade group", group, 1, (R,)),
    }


# In order of preference.
registry.register("paged_attention", "mosaic_gpu", platforms=("cuda",))(_paged_peers.mosaic_forward)


@registry.register("paged_attention", "xla")
def _xla(spec: PagedSpec, ops: PagedOperands) -> tuple[Array, Array]:
    """Gathers and matmuls, over pools whose heads come first."""
    if not spec.tokens_first:
        return _paged_xla.forward(spec, ops)
    spec = dataclasses.replace(spec, tokens_first=False)
    heads_first = lambda pool: jnp.swapaxes(pool, 1, 2)
    ops = ops._replace(k_pool=heads_first(ops.k_pool), v_pool=heads_first(ops.v_pool))
    return _paged_xla.forward(spec, ops)


def _explained(*args: Any, **kwargs: Any) -> tuple[PagedSpec, PagedOperands]:
    bound = _SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    given = {n: value for n, value in bound.arguments.items() if n != "implementation"}
    return _prepare(**given)


_SIGNATURE = inspect.signature(paged_attention)
registry.register_door("paged_attention", _explained)
