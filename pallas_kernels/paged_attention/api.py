"""`paged_attention`: validation, the choice of a kernel, and the call."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels._mgpu import HOPPER_SMS, SMEM_BYTES

from . import cluster, prefill, split
from . import worklist as wl
from .cluster import ClusterConfig
from .geometry import Geometry, Scoring, pack_columns, pack_queries, unpack_lse
from .prefill import PrefillConfig
from .split import SplitConfig

Config = ClusterConfig | SplitConfig | PrefillConfig
Plan = tuple[Config] | tuple[SplitConfig, PrefillConfig]
# a cluster serves one row: a long one beside short ones waits for its own few CTAs, so tables that
# can hold more keys than this a row go to the kernel of equal shares
MAX_UNEVEN = 4096
FIXED_CHUNK = 4096  # keys between the borders of the deterministic mode
MAX_COLS = 64  # query columns of a tile: beyond, accumulators spill


def paged_attention(
    q: jax.Array,
    k_pool: jax.Array,
    v_pool: jax.Array,
    block_tables: jax.Array,
    context_lens: jax.Array,
    q_indptr: jax.Array,
    *,
    max_q: int,
    scale: float | None = None,
    window: int | None = None,
    logits_soft_cap: float | None = None,
    alibi_slopes: jax.Array | None = None,
    sinks: jax.Array | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    config: Config | None = None,
    interpret: Any = None,
) -> Any:
    """Causal attention of ragged rows of queries over their blocks of a pool, on Hopper.

    `out_i = sum_j softmax_j(scale * q_i . k_j) v_j`, keys j at or before query i of its row.
    Row r owns the queries `q_indptr[r]:q_indptr[r + 1]`, at most `max_q` of them, and the first
    `context_lens[r]` slots of `block_tables[r]`; its queries stand at the end of them.

    Args:
      q: bf16 or f16 `[T, N, H]`; queries of no row give zeros.
      k_pool: `[P, K, block_size, H]`, q's dtype, N a multiple of K.
      v_pool: `[P, K, block_size, Hv]`.  Slots past a row's context may hold anything, NaN too.
      block_tables: i32 `[R, M]`; entries past a row's context are never followed.
      context_lens: i32 `[R]`, keys of a row, its new tokens' included; 0 is an empty row.
      q_indptr: i32 `[R + 1]`, ascending from 0.
      max_q: static bound on the queries of a row; 1 is pure decode.
      scale: `1 / sqrt(H)` by default.
      window: number of keys that a query sees, its own included.
      logits_soft_cap: c in `c * tanh(x / c)`.
      alibi_slopes: f32 `[N]`, subtracts slope * distance.
      sinks: f32 `[N]`, a logit that joins the denominator only.
      return_lse: also the natural log-sum-exp, f32 `[T, N]`, the sink left out, -inf for no key.
      deterministic: a row's output has the same bits whatever else is in the batch and however
        its prompt was chunked: one kernel for all rows, keys cut at fixed positions.
      config: which kernel and how; by default chosen from the static shapes.
      interpret: True runs the GPU interpreter (with race detection) on any machine.

    Returns:
      out `[T, N, Hv]` in q's dtype, or (out, lse).

    Raises:
      ValueError, TypeError: arguments that do not fit each other, with their values.
      NotImplementedError: what these kernels cannot do.

    PagedAttention: Kwon et al., 2023.  Flash-Decoding: Dao et al., 2023.

    >>> q = jnp.ones((2, 8, 64), jnp.bfloat16)
    >>> pool = jnp.ones((3, 2, 64, 64), jnp.bfloat16)
    >>> rows = jnp.array([[2], [0]]), jnp.array([5, 64]), jnp.array([0, 1, 2])
    >>> f = jax.jit(lambda *a: paged_attention(*a, max_q=1))
    >>> jax.eval_shape(f, q, pool, pool, *rows).shape
    (2, 8, 64)
    """
    geom = _geometry(q, k_pool, v_pool, block_tables, context_lens, q_indptr, max_q)
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is not None and x.shape != (geom.num_heads,):
            raise ValueError(f"{name} has shape {x.shape}, not ({geom.num_heads},)")
    if window is not None and window < 1:
        raise ValueError(f"{window=} has to be positive")
    if logits_soft_cap is not None and logits_soft_cap <= 0:
        raise ValueError(f"{logits_soft_cap=} has to be positive")
    scoring = Scoring(geom.head_dim**-0.5 if scale is None else scale, window, logits_soft_cap)
    if config is not None and deterministic:
        raise ValueError(f"deterministic=True brings its own configuration, not {config=}")
    plan = default_plan(geom, q.dtype.itemsize) if config is None else (config,)
    if deterministic:
        plan = (_deterministic(geom, q.dtype.itemsize),)
    return _jitted(
        q,
        k_pool,
        v_pool,
        *(x.astype(jnp.int32) for x in (block_tables, context_lens, q_indptr)),
        alibi_slopes,
        sinks,
        geom=geom,
        scoring=scoring,
        plan=plan,
        interpret=interpret,
        return_lse=return_lse,
    )


@functools.partial(jax.jit, static_argnames=("geom", "scoring", "plan", "interpret", "return_lse"))
def _jitted(*arrays, geom, scoring, plan, interpret, return_lse):
    """One trace and one lowering for all layers of a model that make the same call."""
    out, lse = _run(_Call(*arrays, geom=geom, scoring=scoring, interpret=interpret), plan)
    out = out.reshape(geom.num_tokens, geom.num_heads, geom.value_dim)
    return (out, lse()) if return_lse else out


@dataclasses.dataclass(frozen=True)
class _Call:
    """One validated call."""

    q: jax.Array
    k_pool: jax.Array
    v_pool: jax.Array
    block_tables: jax.Array
    context_lens: jax.Array
    q_indptr: jax.Array
    slopes: jax.Array | None
    sinks: jax.Array | None
    geom: Geometry
    scoring: Scoring
    interpret: Any

    @property
    def pools(self):
        """What every kernel reads."""
        return self.k_pool, self.v_pool, self.block_tables

    def options(self, geom: Geometry, pack: Callable) -> dict[str, Any]:
        """Keyword arguments that every kernel takes."""
        packed = [None if x is None else pack(x, geom) for x in (self.slopes, self.sinks)]
        return dict(
            geom=geom,
            scoring=self.scoring,
            slopes=packed[0],
            sinks=packed[1],
            interpret=self.interpret,
        )


def _run(call: _Call, plan: Plan) -> tuple[jax.Array, Callable[[], jax.Array]]:
    """Output `[T, K, G, Hv]`, and a function that gives the log-sum-exp."""
    match plan:
        case (ClusterConfig() as config,):
            return _run_cluster(call, config)
        case (SplitConfig() as config,):
            return _run_split(call, config, call.geom.max_q)
        case (PrefillConfig() as config,):
            geom = call.geom
            shape = (geom.num_tokens, geom.num_kv_heads, geom.group, geom.value_dim)
            return _run_prefill(call, config, 0, jnp.zeros(shape, call.q.dtype))
        case (SplitConfig() as few, PrefillConfig() as many):
            small = few_tokens(call.geom)
            out, lse_few = _run_split(call, few, small)
            out, lse_many = _run_prefill(call, many, small, out)
            return out, lambda: jnp.maximum(lse_few(), lse_many())
    raise TypeError(f"{plan} is not a ClusterConfig, a SplitConfig, a PrefillConfig or two of them")


def _run_cluster(call: _Call, config: ClusterConfig):
    geom = _in_columns(call.geom, call.geom.max_q)
    first = cluster.first_tokens(call.q_indptr, geom)
    out, lse = cluster.cluster_attention(
        pack_queries(call.q, geom, first),
        *call.pools,
        call.context_lens,
        call.q_indptr,
        config=config,
        **call.options(geom, pack_columns),
    )
    count = jnp.repeat(call.q_indptr[1:], cluster.tiles_per_row(geom)) - first
    return out, lambda: unpack_lse(lse, first, count, geom)


def _run_split(call: _Call, config: SplitConfig, max_tokens: int):
    """The rows that own at most `max_tokens` tokens, and zeros for the tokens of no row."""
    geom = _in_columns(call.geom, max_tokens, fixed=config.fixed_chunk is not None)
    work = wl.make_work_list(
        call.context_lens,
        call.q_indptr,
        geom,
        key_tile=config.key_tile,
        ctas=split.num_shares(config, geom),
        chunk=config.fixed_chunk,
        window=call.scoring.window,
        max_tokens=None if max_tokens == call.geom.max_q else max_tokens,
    )
    first = work.tiles[:, wl.FIRST_TOKEN]
    out, lse = split.split_attention(
        pack_queries(call.q, geom, first),
        *call.pools,
        work,
        config=config,
        **call.options(geom, pack_columns),
    )
    count = jnp.where(work.tiles[:, wl.COUNT] > 0, work.tiles[:, wl.NUM_TOKENS], 0)
    return out, lambda: unpack_lse(lse, first, count, geom)


def _run_prefill(call: _Call, config: PrefillConfig, min_tokens: int, out: jax.Array):
    """The rows that own more than `min_tokens` tokens, into `out`."""
    geom = prefill.prefill_geometry(call.geom, config)
    with jax.named_scope("paged_attention.work_list"):
        tiles = wl.query_tiles(
            call.context_lens,
            call.q_indptr,
            geom,
            key_tile=config.block_kv,
            window=call.scoring.window,
            min_tokens=min_tokens,
        )
    out, lse = prefill.prefill_attention(
        prefill.pack_tiles(call.q, tiles, geom, config),
        *call.pools,
        tiles,
        out,
        config=config,
        **call.options(geom, prefill.pack_rows),
    )
    return out, lambda: prefill.unpack_rows(lse, tiles, geom)


def _geometry(q, k_pool, v_pool, block_tables, context_lens, q_indptr, max_q) -> Geometry:
    """The shapes, checked."""
    ranks = (q.ndim, k_pool.ndim, v_pool.ndim, block_tables.ndim)
    if ranks != (3, 4, 4, 2):
        raise ValueError(
            f"{q.shape=}, {k_pool.shape=}, {v_pool.shape=}, {block_tables.shape=}: ranks {ranks} "
            "are not (3, 4, 4, 2)"
        )
    t, n, h = q.shape
    p, k, size, h_k = k_pool.shape
    rows, per_row = block_tables.shape
    if h != h_k or v_pool.shape[:3] != (p, k, size):
        raise ValueError(f"{q.shape=}, {k_pool.shape=} and {v_pool.shape=} do not fit")
    if k == 0 or n % k:
        raise ValueError(f"{n} query heads are not a multiple of {k} KV heads")
    if context_lens.shape != (rows,) or q_indptr.shape != (rows + 1,):
        raise ValueError(
            f"{context_lens.shape=} and {q_indptr.shape=} do not fit {block_tables.shape=}"
        )
    if max_q < 1:
        raise ValueError(f"{max_q=} has to be positive")
    if k_pool.dtype != q.dtype or v_pool.dtype != q.dtype:
        raise NotImplementedError(f"{q.dtype=}, {k_pool.dtype=}, {v_pool.dtype=} differ")
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"{q.dtype=} is not bfloat16 or float16")
    value_dim = v_pool.shape[-1]
    if h % 64 or value_dim % 64 or h > 256 or value_dim > 256:
        raise NotImplementedError(f"head sizes {h} and {value_dim} are not 64, 128, 192 or 256")
    if min(t, rows, per_row, p) == 0:
        raise NotImplementedError(f"{q.shape=}, {k_pool.shape=}, {block_tables.shape=}: empty")
    if n // k > MAX_COLS:
        raise NotImplementedError(f"{n // k} query heads a KV head are more than {MAX_COLS}")
    return Geometry(t, n, k, h, value_dim, p, size, rows, per_row, min(max_q, t))


def _in_columns(geom: Geometry, max_tokens: int, fixed: bool = False) -> Geometry:
    """Query tiles for the kernels of `columns.py`: as many tokens as the columns hold.

    `fixed`: the same tile for every `max_tokens`, so that the kernel is one and the same.
    """
    tokens = MAX_COLS // geom.group if fixed else min(max_tokens, MAX_COLS // geom.group)
    return dataclasses.replace(geom, max_q=max_tokens, q_tokens=tokens)


def few_tokens(geom: Geometry) -> int:
    """Where both kernels run, rows with at most so many tokens go to the split-KV kernel."""
    return max(1, 16 // geom.group)


def default_plan(geom: Geometry, itemsize: int = 2) -> Plan:
    """The kernels for these static shapes.

    One launch for few segments; equal shares of all keys for many, and for rows of more tokens
    than columns that together do not give every second SM a tile of the prefill kernel; for the
    rest both the split-KV and the prefill kernel, each with its rows.

    >>> one = Geometry(1, 32, 8, 128, 128, 99, 64, 1, 64, max_q=1)
    >>> chunk = dataclasses.replace(one, num_tokens=512, max_q=512)
    >>> [type(c).__name__ for g in (one, chunk) for c in default_plan(g)]
    ['ClusterConfig', 'SplitConfig', 'PrefillConfig']
    """
    if geom.max_q * geom.group <= MAX_COLS:
        columns = _in_columns(geom, geom.max_q)
        segments = geom.num_rows * cluster.tiles_per_row(columns) * geom.num_kv_heads
        even = geom.blocks_per_row * geom.block_size <= MAX_UNEVEN or 8 * segments <= HOPPER_SMS
        if 2 * segments <= HOPPER_SMS and even:
            return (cluster.pick_config(columns, itemsize),)
        return (_split_config(columns, itemsize),)
    config = prefill.pick_prefill(geom, itemsize)
    per_tile = prefill.prefill_geometry(geom, config).q_tokens
    if 2 * (geom.num_tokens // per_tile) * geom.num_kv_heads < HOPPER_SMS:
        return (_split_config(_in_columns(geom, geom.max_q), itemsize),)
    return _split_config(_in_columns(geom, few_tokens(geom)), itemsize), config


def _deterministic(geom: Geometry, itemsize: int) -> SplitConfig:
    """Large query tiles and chunks of fixed size, whatever the call."""
    config = _split_config(_in_columns(geom, geom.max_q, fixed=True), itemsize)
    return dataclasses.replace(config, fixed_chunk=FIXED_CHUNK)


def _split_config(geom: Geometry, itemsize: int) -> SplitConfig:
    """Two CTAs per SM where their rings fit."""
    for ctas, stages in ((2 * HOPPER_SMS, 3), (HOPPER_SMS, 3), (HOPPER_SMS, 2), (HOPPER_SMS, 1)):
        config = SplitConfig(ctas=ctas, stages=stages)
        if split.smem_bytes(config, geom, itemsize) * (ctas // HOPPER_SMS) <= SMEM_BYTES:
            return config
    raise NotImplementedError(f"no configuration fits shared memory for {geom}")
