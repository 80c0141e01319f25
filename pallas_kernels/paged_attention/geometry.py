"""Static facts of one call: shapes, how queries become columns, what scores go through."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import MASKED, cdiv

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)


@dataclasses.dataclass(frozen=True)
class Geometry:
    """Shapes of one call (`house words`: T tokens, N heads, K KV heads, R rows, M blocks a row).

    The queries of `q_tokens` consecutive tokens of a row and of the `group` heads that share a KV
    head are packed as the columns of one *query tile*: column `i * group + g` is token i, head g.

    >>> g = Geometry(4, 32, 8, 128, 128, 100, 16, 4, 10, max_q=1)
    >>> g.group, g.cols, g.packed, g.num_q_tiles
    (4, 8, True, 4)
    >>> dataclasses.replace(g, max_q=5, q_tokens=5).cols
    24
    """

    num_tokens: int  # T
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    value_dim: int  # Hv
    num_blocks: int  # P
    block_size: int
    num_rows: int  # R
    blocks_per_row: int  # M
    max_q: int  # no row owns more query tokens
    q_tokens: int = 1  # tokens of a query tile
    tokens_first: bool = False  # pools are [P, block_size, K, H], not [P, K, block_size, H]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @property
    def cols(self) -> int:
        """Columns of a query tile: wgmma's N is a multiple of 8."""
        return 8 * cdiv(self.q_tokens * self.group, 8)

    @property
    def packed(self) -> bool:
        """Eight neighbouring heads of q are a tile as they lie: the group and heads to ignore."""
        return self.q_tokens == 1 and 8 % self.group == 0 and self.num_heads % 8 == 0

    @property
    def num_q_tiles(self) -> int:
        """Static bound on `sum(ceil(n_r / q_tokens))`."""
        if self.max_q <= self.q_tokens:
            return self.num_rows
        per_row = self.num_rows * cdiv(self.max_q, self.q_tokens)
        return min(per_row, self.num_rows + self.num_tokens // self.q_tokens)

    def first_column(self, head):
        """The column of the group's first head (`head` is the KV head, an i32 scalar)."""
        return lax.rem(head * self.group, jnp.int32(8)) if self.packed else jnp.int32(0)

    def column_block(self, head):
        """Which block of packed columns holds KV head `head`."""
        return lax.div(head * self.group, jnp.int32(8)) if self.packed else head


@dataclasses.dataclass(frozen=True)
class Scoring:
    """What happens to a score between q @ k and the softmax; base-2 logits throughout."""

    scale: float
    window: int | None = None
    soft_cap: float | None = None
    alibi: bool = False
    sinks: bool = False


def pack_queries(q: jax.Array, geom: Geometry, first_token: jax.Array | None = None) -> jax.Array:
    """q `[T, N, H]` as blocks of `cols` rows that one TMA box fetches.

    `[T, N / 8, 8, H]` where 8 heads as they lie hold a group (no copy); `[T, K, cols, H]` for
    single tokens; `[U, K, cols, H]` for tiles of several tokens, which begin at `first_token [U]`.
    """
    t, n, h = q.shape
    k, group, cols = geom.num_kv_heads, geom.group, geom.cols
    if geom.packed:
        return q.reshape(t, n // 8, 8, h)
    if geom.q_tokens > 1 and first_token is not None:
        index = first_token[:, None] + jnp.arange(geom.q_tokens, dtype=jnp.int32)[None, :]
        tiles = q[jnp.clip(index, 0, t - 1)]  # [U, q_tokens, N, H]
        tiles = tiles.reshape(-1, geom.q_tokens, k, group, h).transpose(0, 2, 1, 3, 4)
    else:
        tiles = q.reshape(t, k, 1, group, h)
    tiles = tiles.reshape(tiles.shape[0], k, geom.q_tokens * group, h)
    return jnp.pad(tiles, ((0, 0), (0, 0), (0, cols - tiles.shape[2]), (0, 0)))


def pack_columns(x: jax.Array, geom: Geometry) -> jax.Array:
    """A per-head vector `[N]` laid out like the columns of `pack_queries`: f32 `[blocks, cols]`."""
    x = x.astype(jnp.float32)
    if geom.packed:
        return x.reshape(-1, 8)
    x = jnp.tile(x.reshape(geom.num_kv_heads, geom.group), (1, geom.q_tokens))
    return jnp.pad(x, ((0, 0), (0, geom.cols - x.shape[1])))


def unpack_lse(lse: jax.Array, first: jax.Array, count: jax.Array, geom: Geometry) -> jax.Array:
    """Base-2 values by column `[U, K, cols]` -> natural, f32 `[T, N]`.

    Query tile u covers `count[u]` tokens from `first[u]`; tokens of no tile get -inf.
    """
    heads = jnp.arange(geom.num_heads, dtype=jnp.int32)
    kv = heads // geom.group
    start = jax.vmap(geom.first_column)(kv)
    i = jnp.arange(geom.q_tokens, dtype=jnp.int32)[None, :, None]
    column = (start + heads % geom.group)[None, None] + i * geom.group  # [1, q_tokens, N]
    tile = jnp.arange(lse.shape[0], dtype=jnp.int32)[:, None, None]
    value = lse[tile, kv[None, None], column]
    value = jnp.where(value > MASKED / 2, value * LN2, -jnp.inf)
    i = i[..., 0]
    token = jnp.where(i < count[:, None], first[:, None] + i, geom.num_tokens)
    out = jnp.full((geom.num_tokens + 1, geom.num_heads), -jnp.inf, jnp.float32)
    return out.at[token].set(value)[: geom.num_tokens]
