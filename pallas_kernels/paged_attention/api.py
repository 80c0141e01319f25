"""`paged_attention`: validation, the choice of a kernel, and the call."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels._mgpu import HOPPER_SMS, SMEM_BYTES, cdiv

from . import cluster, explicit, prefill, quantised, split
from . import worklist as wl
from .cluster import ClusterConfig
from .geometry import Geometry, Scoring, pack_columns, pack_queries, unpack_lse
from .pages import PageTiles
from .prefill import PrefillConfig
from .split import SplitConfig

Config = ClusterConfig | SplitConfig | PrefillConfig
Plan = tuple[Config] | tuple[SplitConfig, PrefillConfig]
# a cluster serves one row: a long one beside short ones waits for its own few CTAs, so tables that
# can hold more keys than this a row go to the kernel of equal shares
MAX_UNEVEN = 4096
# where rows hold no more keys and there are two segments or more an SM, segments stay whole: shares
# are uneven by one segment at most, and there is no second kernel
UNCUT = 1024
FIXED_CHUNK = 4096  # keys between the borders of the deterministic mode
MAX_COLS = 64  # query columns of a tile
ACCUMULATOR = 8192  # values of a tile's output: beyond, it spills
SPECIAL_ACCUMULATOR = 4096  # where registers also hold converted keys, or masks of bits


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
    positions: jax.Array | None = None,
    tree_mask: jax.Array | None = None,
    cascade: tuple[jax.Array, jax.Array, jax.Array] | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    return_lse: bool = False,
    deterministic: bool = False,
    tokens_first: bool = False,
    config: Config | None = None,
    interpret: Any = None,
) -> Any:
    """Causal attention of ragged rows of queries over their blocks of a pool, on Hopper.

    `out_i = sum_j softmax_j(scale * q_i . k_j) v_j`, keys j at or before query i of its row.
    Row r owns the queries `q_indptr[r]:q_indptr[r + 1]`, at most `max_q` of them, and the first
    `context_lens[r]` slots of `block_tables[r]`; its queries stand at the end of them.

    Args:
      q: bf16 or f16 `[T, N, H]`; queries of no row give zeros.
      k_pool: `[P, K, block_size, H]`, q's dtype, N a multiple of K; or int8 or float8_e4m3fn.
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
      positions: i32 `[T]`, where queries, and the keys of the same new tokens, stand for `window`
        and ALiBi in place of their index.
      tree_mask: u32 `[T, words]`: bit j says that a query sees its row's j-th new token, in place
        of causality among the new ones.
      cascade: `(shared_tables [C, M'], shared_lens [C], group [R])`: rows of group g >= 0 see their
        first `shared_lens[g]` keys through `shared_tables[g]`, read once for the group.
      k_scale: f32 `[P, K, block_size]` or `[K]`, for pools of one byte a value: a key is
        `k_scale * k`.  Queries go as two terms of 7 bits over int8: a score errs by at most
        `scale * k_scale * max|q| * sum|k| / 32512`, whatever it is itself.  Over float8_e4m3fn they
        are right to 2^-19 of the largest.  The prefill kernel rounds `k_scale * k` to q's dtype.
      v_scale: as k_scale.
      return_lse: also the natural log-sum-exp, f32 `[T, N]`, the sink left out, -inf for no key.
      deterministic: a row's output has the same bits whatever else is in the batch and however
        its prompt was chunked: one kernel for all rows, keys cut at fixed positions.
      tokens_first: the pools are `[P, block_size, K, H]`, as a contiguous cache `[B, S, K, H]` is;
        scales are `[P, K, block_size]` all the same.
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
    geom = _geometry(q, k_pool, v_pool, block_tables, context_lens, q_indptr, max_q, tokens_first)
    for name, x in (("alibi_slopes", alibi_slopes), ("sinks", sinks)):
        if x is not None and x.shape != (geom.num_heads,):
            raise ValueError(f"{name} has shape {x.shape}, not ({geom.num_heads},)")
    if window is not None and window < 1:
        raise ValueError(f"{window=} has to be positive")
    if logits_soft_cap is not None and logits_soft_cap <= 0:
        raise ValueError(f"{logits_soft_cap=} has to be positive")
    _check_extras(geom, k_pool, positions, tree_mask, cascade, k_scale, v_scale)
    scoring = Scoring(geom.head_dim**-0.5 if scale is None else scale, window, logits_soft_cap)
    if config is not None and deterministic:
        raise ValueError(f"deterministic=True brings its own configuration, not {config=}")
    if window is None and alibi_slopes is None:
        positions = None  # nothing asks for a distance
    i32 = lambda x: None if x is None else x.astype(jnp.int32)
    arrays = _Arrays(
        q,
        k_pool,
        v_pool,
        block_tables.astype(jnp.int32),
        context_lens.astype(jnp.int32),
        q_indptr.astype(jnp.int32),
        alibi_slopes,
        sinks,
        i32(positions),
        tree_mask,
        None if cascade is None else tuple(x.astype(jnp.int32) for x in cascade),
        None if k_scale is None or v_scale is None else (k_scale, v_scale),
    )
    special = quantised.is_quantised(k_pool.dtype) or arrays.explicit
    if deterministic:
        plan = (_deterministic(geom, k_pool.dtype, special),)
    elif config is not None:
        plan = (config,)
    elif special:
        plan = _special_plan(geom, k_pool.dtype, explicit=arrays.explicit)
    else:
        plan = default_plan(geom)
    kinds = SplitConfig if arrays.explicit else (SplitConfig, PrefillConfig)
    if special and not isinstance(plan[0], kinds):
        raise NotImplementedError(f"{config} takes no one-byte pools, positions, trees, cascades")
    return _jitted(
        arrays,
        geom=geom,
        scoring=scoring,
        plan=plan,
        interpret=interpret,
        return_lse=return_lse,
    )


class _Arrays(NamedTuple):
    """The arrays of one validated call."""

    q: jax.Array
    k_pool: jax.Array
    v_pool: jax.Array
    block_tables: jax.Array
    context_lens: jax.Array
    q_indptr: jax.Array
    slopes: jax.Array | None = None
    sinks: jax.Array | None = None
    positions: jax.Array | None = None
    tree_mask: jax.Array | None = None
    cascade: tuple[jax.Array, ...] | None = None
    scales: tuple[jax.Array, jax.Array] | None = None

    @property
    def explicit(self) -> bool:
        """Whether queries do not stand at the end of all keys, in order."""
        return any(x is not None for x in (self.positions, self.tree_mask, self.cascade))


@functools.partial(jax.jit, static_argnames=("geom", "scoring", "plan", "interpret", "return_lse"))
def _jitted(arrays, *, geom, scoring, plan, interpret, return_lse):
    """One trace and one lowering for all layers of a model that make the same call."""
    if arrays.cascade is not None:
        out, lse = _run_cascade(arrays, arrays.cascade, geom, scoring, plan[0], interpret)
        return (out, lse) if return_lse else out
    call = _Call(**arrays._asdict(), geom=geom, scoring=scoring, interpret=interpret)
    out, lse = _run(call, plan)
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
    positions: jax.Array | None
    tree_mask: jax.Array | None
    cascade: tuple[jax.Array, ...] | None
    scales: tuple[jax.Array, jax.Array] | None
    geom: Geometry
    scoring: Scoring
    interpret: Any
    first: jax.Array | None = None  # [R] keys before it are read elsewhere
    shared: bool = False  # a query sees every key of its row, `positions` says where it stands

    @property
    def pools(self):
        """What every kernel reads."""
        return self.k_pool, self.v_pool, self.block_tables

    @property
    def explicit(self) -> bool:
        """Whether masks are not those of queries at the end of all keys, in order."""
        return self.positions is not None or self.tree_mask is not None or self.first is not None

    @property
    def special(self) -> bool:
        """Whether the kernel needs more registers than a plain one."""
        return self.explicit or quantised.is_quantised(self.k_pool.dtype)

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
            return _run_prefill(call, config, 0, None)
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
    fixed = config.fixed_chunk is not None
    geom = _in_columns(call.geom, max_tokens, fixed=fixed, special=call.special)
    first_key = _first_keys(call)
    work = wl.make_work_list(
        call.context_lens,
        call.q_indptr,
        geom,
        key_tile=config.key_tile,
        ctas=split.num_shares(config, geom),
        chunk=config.fixed_chunk,
        window=call.scoring.window if call.positions is None else None,
        max_tokens=None if max_tokens == call.geom.max_q else max_tokens,
        first=first_key,
        whole=call.shared or call.tree_mask is not None,
        uncut=config.uncut,
    )
    first = work.tiles[:, wl.FIRST_TOKEN]
    out, lse = split.split_attention(
        pack_queries(call.q, geom, first),
        *call.pools,
        work,
        config=config,
        explicit=_explicit(call, geom, work.tiles, config.key_tile, first_key),
        **_scales(call, geom),
        **call.options(geom, pack_columns),
    )
    count = jnp.where(work.tiles[:, wl.COUNT] > 0, work.tiles[:, wl.NUM_TOKENS], 0)
    return out, lambda: unpack_lse(lse, first, count, geom)


def _scales(call: _Call, geom: Geometry) -> dict[str, Any]:
    """The scales as the kernel takes them: `scales` of tokens or `gains` of heads."""
    if call.scales is None:
        return {}
    if call.scales[0].ndim == 1:
        return dict(gains=tuple(pack_columns(jnp.repeat(x, geom.group), geom) for x in call.scales))
    return dict(scales=tuple(x.astype(jnp.float32) for x in call.scales))


def _first_keys(call: _Call) -> jax.Array | None:
    """`[R]` first key of each row that is read, None for 0 or where the kernel knows the window."""
    window = call.scoring.window
    if window is None or call.positions is not None or not call.explicit:
        return call.first
    first = call.context_lens - jnp.diff(call.q_indptr) - window + 1
    return jnp.maximum(first, 0 if call.first is None else call.first)


def _explicit(call: _Call, geom: Geometry, tiles: jax.Array, key_tile: int, first_key):
    if call.shared and call.positions is not None:
        return explicit.pack_old_keys(tiles, call.context_lens, geom, key_tile, call.positions)
    if not call.explicit:
        return None
    return explicit.pack_new_keys(
        tiles,
        call.context_lens,
        call.q_indptr,
        geom,
        key_tile,
        positions=call.positions,
        tree_mask=call.tree_mask,
        first=first_key,
    )


def _run_cascade(
    arrays: _Arrays, cascade, geom: Geometry, scoring: Scoring, config: SplitConfig, interpret
):
    """(out, lse): every row past what it shares, every group over its prefix, merged by lse.

    The queries of a group are the row of a call of their own, over the shared table.
    """
    shared_tables, shared_lens, group = cascade
    t = geom.num_tokens
    indptr = arrays.q_indptr
    first = jnp.where(group >= 0, shared_lens[jnp.maximum(group, 0)], 0)
    bare = arrays._replace(cascade=None, sinks=None)
    common: dict[str, Any] = dict(scoring=scoring, interpret=interpret)
    own, own_lse = _run_split(
        _Call(**bare._asdict(), geom=geom, **common, first=first), config, geom.max_q
    )

    with jax.named_scope("paged_attention.cascade"):
        token = jnp.arange(t, dtype=jnp.int32)
        row = jnp.sum(indptr[None, 1:] <= token[:, None], axis=1, dtype=jnp.int32)
        owned, row = row < geom.num_rows, jnp.minimum(row, geom.num_rows - 1)
        groups = shared_tables.shape[0]
        mine = jnp.where(owned & (group[row] >= 0), group[row], groups)
        order = jnp.argsort(mine, stable=True).astype(jnp.int32)
        count = jnp.sum(mine[None, :] == jnp.arange(groups, dtype=jnp.int32)[:, None], axis=1)
        ends = jnp.cumsum(count, dtype=jnp.int32)
        stands = arrays.positions
        if stands is None:
            stands = arrays.context_lens[row] - indptr[row + 1] + token
        shared = bare._replace(
            q=arrays.q[order],
            block_tables=shared_tables,
            context_lens=shared_lens,
            q_indptr=jnp.concatenate([jnp.zeros((1,), jnp.int32), ends]),
            positions=stands[order],
            tree_mask=None,
        )
        wide = dataclasses.replace(
            geom, num_rows=groups, blocks_per_row=shared_tables.shape[1], max_q=t
        )
        config = _fitting(config, _in_columns(wide, t, special=True), arrays.k_pool.dtype)
        call = _Call(**shared._asdict(), geom=wide, **common, shared=True)
        prefix, prefix_lse = _run_split(call, config, t)
        back = jnp.zeros_like(order).at[order].set(token)
        parts = (own, own_lse()), (prefix[back], prefix_lse()[back])
        lse = jnp.logaddexp(parts[0][1], parts[1][1])
        total = lse
        if arrays.sinks is not None:
            total = jnp.logaddexp(lse, arrays.sinks.astype(jnp.float32)[None])
        total = jnp.where(jnp.isfinite(total), total, 0.0)
        shape = (t, geom.num_heads, geom.value_dim)
        weigh = lambda o, x: o.reshape(shape).astype(jnp.float32) * jnp.exp(x - total)[..., None]
        out = weigh(*parts[0]) + weigh(*parts[1])
    return out.astype(arrays.q.dtype), lse


def _run_prefill(call: _Call, config: PrefillConfig, min_tokens: int, out: jax.Array | None):
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
        dead = None
        if out is None:
            dead = wl.dead_tokens(call.context_lens, call.q_indptr, geom.num_tokens)
    out, lse = prefill.prefill_attention(
        call.q.reshape(geom.num_tokens, geom.num_kv_heads, geom.group, -1),
        *call.pools,
        tiles,
        out,
        config=config,
        scales=_prefill_scales(call, geom, config),
        dead=dead,
        **call.options(geom, prefill.pack_rows),
    )
    return out, lambda: prefill.unpack_rows(lse, tiles, geom)


def _prefill_scales(call: _Call, geom: Geometry, config: PrefillConfig):
    """Scales of one-byte pools as the prefill kernel takes them."""
    if call.scales is None:
        return None
    k_scale, v_scale = (x.astype(jnp.float32) for x in call.scales)
    if k_scale.ndim == 1:
        return k_scale, v_scale
    pack = PageTiles(geom, config.block_kv).pack_scales
    return pack(k_scale), pack(v_scale)


def _geometry(
    q, k_pool, v_pool, block_tables, context_lens, q_indptr, max_q, tokens_first
) -> Geometry:
    """The shapes, checked."""
    ranks = (q.ndim, k_pool.ndim, v_pool.ndim, block_tables.ndim)
    if ranks != (3, 4, 4, 2):
        raise ValueError(
            f"{q.shape=}, {k_pool.shape=}, {v_pool.shape=}, {block_tables.shape=}: ranks {ranks} "
            "are not (3, 4, 4, 2)"
        )
    t, n, h = q.shape
    p, k, size, h_k = k_pool.shape
    if tokens_first:
        k, size = size, k
    rows, per_row = block_tables.shape
    if h != h_k or v_pool.shape[:3] != k_pool.shape[:3]:
        raise ValueError(f"{q.shape=}, {k_pool.shape=} and {v_pool.shape=} do not fit")
    if k == 0 or n % k:
        raise ValueError(f"{n} query heads are not a multiple of {k} KV heads")
    if context_lens.shape != (rows,) or q_indptr.shape != (rows + 1,):
        raise ValueError(
            f"{context_lens.shape=} and {q_indptr.shape=} do not fit {block_tables.shape=}"
        )
    if max_q < 1:
        raise ValueError(f"{max_q=} has to be positive")
    fits = k_pool.dtype == q.dtype or quantised.is_quantised(k_pool.dtype)
    if k_pool.dtype != v_pool.dtype or not fits:
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
    max_q = min(max_q, t)
    return Geometry(t, n, k, h, value_dim, p, size, rows, per_row, max_q, tokens_first=tokens_first)


def _check_extras(geom, k_pool, positions, tree_mask, cascade, k_scale, v_scale) -> None:
    """Arguments that few calls have, checked."""
    t, shape = geom.num_tokens, (geom.num_blocks, geom.num_kv_heads, geom.block_size)
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (x is not None) != quantised.is_quantised(k_pool.dtype):
            raise ValueError(f"{name} goes with int8 and float8_e4m3fn, not {k_pool.dtype=}")
        if x is not None and x.shape not in (shape, shape[1:2]):
            raise ValueError(f"{name} has shape {x.shape}, not {shape} or {shape[1:2]}")
    if k_scale is not None and k_scale.ndim != v_scale.ndim:
        raise NotImplementedError(f"scales of two kinds: {k_scale.shape=}, {v_scale.shape=}")
    if positions is not None and positions.shape != (t,):
        raise ValueError(f"positions has shape {positions.shape}, not ({t},)")
    if tree_mask is not None and (
        tree_mask.ndim != 2 or tree_mask.shape[0] != t or tree_mask.dtype != jnp.uint32
    ):
        raise ValueError(f"tree_mask is {tree_mask.dtype}{tree_mask.shape}, not u32 [{t}, words]")
    if cascade is not None:
        tables, lens, group = cascade
        if tables.ndim != 2 or lens.shape != tables.shape[:1] or group.shape != (geom.num_rows,):
            raise ValueError(
                f"cascade of {tables.shape}, {lens.shape}, {group.shape} is not [C, M], [C], "
                f"[{geom.num_rows}]"
            )
        if min(tables.shape) == 0:
            raise NotImplementedError(f"cascade of {tables.shape=}: empty")


def _in_columns(
    geom: Geometry, max_tokens: int, fixed: bool = False, special: bool = False
) -> Geometry:
    """Query tiles for the kernels of `columns.py`: as many tokens as the columns hold.

    `fixed`: the same tile for every `max_tokens`, so that the kernel is one and the same.
    `special`: one-byte pools, or queries that do not stand at the end of their keys.
    """
    room = (SPECIAL_ACCUMULATOR if special else ACCUMULATOR) // geom.value_dim
    most = max(1, min(MAX_COLS, room) // geom.group)
    return dataclasses.replace(
        geom, max_q=max_tokens, q_tokens=most if fixed else min(max_tokens, most)
    )


def few_tokens(geom: Geometry) -> int:
    """Where both kernels run, rows with at most so many tokens go to the split-KV kernel."""
    return max(1, 16 // geom.group)


def default_plan(geom: Geometry) -> Plan:
    """The kernels for these static shapes.

    One launch for few segments; equal shares of all keys for many (of whole segments where rows are
    short, see `UNCUT`), and for rows of more tokens than columns that together do not give every
    second SM a tile of the prefill kernel; the prefill kernel alone for a few long chunks; for the
    rest both the split-KV and the prefill kernel, each with its rows.

    >>> one = Geometry(1, 32, 8, 128, 128, 99, 64, 1, 64, max_q=1)
    >>> chunk = dataclasses.replace(one, num_tokens=512, max_q=512)
    >>> mixed = dataclasses.replace(chunk, num_tokens=576, num_rows=65)
    >>> [[type(c).__name__[:5] for c in default_plan(g)] for g in (one, chunk, mixed)]
    [['Clust'], ['Prefi'], ['Split', 'Prefi']]
    >>> rows = [dataclasses.replace(one, num_rows=64, blocks_per_row=n) for n in (16, 64)]
    >>> [default_plan(g)[0].uncut for g in rows]
    [True, False]
    """
    if geom.max_q * geom.group <= MAX_COLS:
        columns = _in_columns(geom, geom.max_q)
        segments = geom.num_rows * cluster.tiles_per_row(columns) * geom.num_kv_heads
        even = geom.blocks_per_row * geom.block_size <= MAX_UNEVEN or 8 * segments <= HOPPER_SMS
        if 2 * segments <= HOPPER_SMS and even:
            return (cluster.pick_config(columns),)
        config = _split_config(columns)
        short = geom.blocks_per_row * geom.block_size <= UNCUT
        if short and segments >= 2 * HOPPER_SMS:  # as many to every CTA, where they are alike
            ctas = cdiv(segments, cdiv(segments, config.ctas))
            config = dataclasses.replace(config, uncut=True, ctas=ctas)
        return (config,)
    config = prefill.pick_prefill(geom)
    per_tile = prefill.prefill_geometry(geom, config).q_tokens
    if 2 * (geom.num_tokens // per_tile) * geom.num_kv_heads < HOPPER_SMS:
        return (_split_config(_in_columns(geom, geom.max_q)),)
    if _chunks_alone(geom):
        return (config,)
    return _split_config(_in_columns(geom, few_tokens(geom))), config


def _chunks_alone(geom: Geometry) -> bool:
    """Whether rows are so few for their tokens that one kernel serves them all."""
    return geom.num_tokens >= 256 * geom.num_rows


def _special_plan(geom: Geometry, pool_dtype: Any, *, explicit: bool) -> Plan:
    """The kernels for one-byte pools, and for queries that do not stand at the end of their keys.

    Chunks over one-byte pools go to the prefill kernel where its rings fit shared memory.
    """
    alone = (_split_config(_in_columns(geom, geom.max_q, special=True), pool_dtype),)
    narrow = geom.head_dim <= 128 and geom.value_dim <= 128
    if explicit or not narrow or geom.max_q * geom.group <= MAX_COLS:
        return alone
    config = prefill.pick_prefill(geom, pool_bytes=1)
    per_tile = prefill.prefill_geometry(geom, config).q_tokens
    if 2 * (geom.num_tokens // per_tile) * geom.num_kv_heads < HOPPER_SMS:
        return alone
    if _chunks_alone(geom):
        return (config,)
    few = _split_config(_in_columns(geom, few_tokens(geom), special=True), pool_dtype)
    return few, config


def _deterministic(geom: Geometry, pool_dtype: Any, special: bool = False) -> SplitConfig:
    """Large query tiles and chunks of fixed size, whatever the call."""
    columns = _in_columns(geom, geom.max_q, fixed=True, special=special)
    return dataclasses.replace(_split_config(columns, pool_dtype), fixed_chunk=FIXED_CHUNK)


def _fitting(config: SplitConfig, geom: Geometry, pool_dtype: Any) -> SplitConfig:
    """`config`, or the default one where its rings do not fit beside these query tiles."""
    need = split.smem_bytes(config, geom, jnp.dtype(pool_dtype).itemsize)
    if need * -(-config.ctas // HOPPER_SMS) <= SMEM_BYTES:
        return config
    return dataclasses.replace(_split_config(geom, pool_dtype), fixed_chunk=config.fixed_chunk)


def _candidates(geom: Geometry, pool_dtype: Any) -> list[SplitConfig]:
    """Configurations whose registers fit (ptxas says), the preferred first."""
    values = geom.cols * geom.value_dim
    one = [SplitConfig(ctas=HOPPER_SMS, stages=s) for s in (6, 3, 2, 1)]
    if not quantised.is_quantised(pool_dtype):
        two = [SplitConfig(ctas=2 * HOPPER_SMS, stages=3)]
        return two + one if values <= 2048 and geom.cols <= 24 else one
    if values > 1024 or geom.head_dim > 128:
        return one
    # 255 registers a thread for two CTAs of one warpgroup, 168 for three
    lone = [SplitConfig(ctas=3 * HOPPER_SMS, stages=s, alone=True) for s in (4, 3)]
    if geom.block_size % 128 == 0 or 128 % geom.block_size == 0:
        lone.insert(0, SplitConfig(key_tile=128, ctas=2 * HOPPER_SMS, alone=True))
    return [*lone, *one]


def _split_config(geom: Geometry, pool_dtype: Any = jnp.bfloat16) -> SplitConfig:
    """As many CTAs per SM as their registers and rings allow."""
    for config in _candidates(geom, pool_dtype):
        need = split.smem_bytes(config, geom, jnp.dtype(pool_dtype).itemsize)
        if need * (config.ctas // HOPPER_SMS) <= SMEM_BYTES:
            return config
    raise NotImplementedError(f"no configuration fits shared memory for {geom}")
