"""The paged KV cache: blocks on the device, moved by programs that update them in place."""

import dataclasses
from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from aidx.cache.block_pool import NULL_BLOCK, BlockPool
from aidx.cache.block_table import BlockTable
from aidx.cache.config import STORAGE, KVCacheConfig
from aidx.cache.contiguous import dequantize, static_layer
from aidx.ops.write_kv import QUANTISED_MAX, write_kv


@struct.dataclass
class PagedKVCache:
    """The blocks of all sequences, one pool per layer.

    A token's slot is `block * block_size + offset`; who owns which block is known to the host alone
    (`BlockPool`, `BlockTable`).  Nothing here is ever read outside live slots: their content is
    undefined and may be NaN.

    Example:
        >>> cache = PagedKVCache.create(
        ...     num_layers=2, num_blocks=4, block_size=2, num_kv_heads=1, head_dim=4
        ... )
        >>> cache.k[0].shape, cache.num_blocks, cache.block_size
        ((4, 1, 2, 4), 4, 2)
    """

    k: tuple[jax.Array, ...]  # per layer [P, K, block_size, H]
    v: tuple[jax.Array, ...]  # per layer [P, K, block_size, H]
    k_scale: tuple[jax.Array, ...] | None = None  # quantised: per layer [P, K, block_size] f32
    v_scale: tuple[jax.Array, ...] | None = None

    @classmethod
    def create(
        cls,
        *,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: jax.typing.DTypeLike = "bfloat16",
        sharding: jax.sharding.Sharding | None = None,
    ) -> "PagedKVCache":
        """Zeroed pools.

        Args:
            num_layers, num_blocks, block_size, num_kv_heads, head_dim: the geometry; block 0 is the
                null block.
            dtype: bf16, f16 or f32, which should be the model's; or int8 or float8_e4m3fn with one
                f32 scale per token and head.
            sharding: of every pool; heads are axis 1 of `[P, K, block_size, H]`.

        Raises:
            ValueError: a size below 1, or another dtype.
        """
        sizes = dict(
            num_layers=num_layers,
            num_blocks=num_blocks,
            block_size=block_size,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
        )
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if jnp.dtype(dtype).name not in STORAGE:
            raise ValueError(f"{dtype=} is none of {', '.join(STORAGE)}")
        shape = (num_blocks, num_kv_heads, block_size, head_dim)

        def pools(shape, dtype, sharding):
            make = jax.jit(partial(jnp.zeros, shape, dtype), out_shardings=sharding)
            return tuple(make() for _ in range(num_layers))

        values = (shape, dtype, sharding)
        if jnp.dtype(dtype) not in QUANTISED_MAX:
            return cls(pools(*values), pools(*values))
        if isinstance(sharding, NamedSharding):  # scales have no feature axis
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:3]))
        scales = (shape[:-1], jnp.float32, sharding)
        return cls(pools(*values), pools(*values), pools(*scales), pools(*scales))

    @classmethod
    def from_config(
        cls, config: KVCacheConfig, pool: BlockPool, sharding: jax.sharding.Sharding | None = None
    ) -> "PagedKVCache":
        """The device's side of `pool`, for the geometry of `config`."""
        return cls.create(
            num_layers=config.num_layers,
            num_blocks=pool.num_blocks,
            block_size=pool.block_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=config.dtype,
            sharding=sharding,
        )

    @property
    def num_blocks(self) -> int:
        """P, the null block included."""
        return self.k[0].shape[0]

    @property
    def block_size(self) -> int:
        """Tokens per block."""
        return self.k[0].shape[2]

    @property
    def memory_bytes(self) -> int:
        """Bytes of all pools."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self))

    def write(self, layer: int, k: jax.Array, v: jax.Array, slots: jax.Array) -> "PagedKVCache":
        """K and V `[T, K, H]` into `slots` `[T]` i32 of one layer; slot -1 writes nothing.

        In place when the cache is donated to the program that calls this.
        """
        layer = static_layer(layer, len(self.k))

        def put(pools, new):
            return (*pools[:layer], new, *pools[layer + 1 :])

        if self.k_scale is None or self.v_scale is None:
            new_k, new_v = write_kv(self.k[layer], self.v[layer], k, v, slots)
            return dataclasses.replace(self, k=put(self.k, new_k), v=put(self.v, new_v))
        new_k, new_v, k_scale, v_scale = write_kv(
            self.k[layer],
            self.v[layer],
            k,
            v,
            slots,
            k_scale=self.k_scale[layer],
            v_scale=self.v_scale[layer],
        )
        return dataclasses.replace(
            self,
            k=put(self.k, new_k),
            v=put(self.v, new_v),
            k_scale=put(self.k_scale, k_scale),
            v_scale=put(self.v_scale, v_scale),
        )

    def copy_blocks(self, src: Sequence[int] | np.ndarray, dst: Sequence[int] | np.ndarray):
        """Block `dst[i]` becomes a copy of block `src[i]` in every layer, in place: donates self.

        All sources are read before anything is written.  The number of pairs is rounded up to a
        power of two, so that a handful of compiled programs serve every call.

        Raises:
            ValueError: lengths differ, a block is outside the pool, a destination is named twice.
        """
        src, dst = (np.asarray(blocks, np.int32).reshape(-1) for blocks in (src, dst))
        both = np.concatenate([src, dst])
        if len(src) != len(dst) or len(np.unique(dst)) != len(dst):
            raise ValueError(f"cannot copy blocks {src.tolist()} to {dst.tolist()}")
        if len(both) and (both.min() < 0 or both.max() >= self.num_blocks):
            raise ValueError(f"blocks {both.tolist()} in a pool of {self.num_blocks}")
        if not len(src):
            return self
        padding = (1 << (len(src) - 1).bit_length()) - len(src)
        # A destination past the end writes nothing.
        pairs = np.stack(
            [np.pad(src, (0, padding)), np.pad(dst, (0, padding), constant_values=self.num_blocks)]
        )
        return _copy_blocks(self, pairs)

    def resize(self, num_blocks: int) -> "PagedKVCache":
        """The first `num_blocks` blocks, zeroed ones added where there were fewer.

        `BlockPool.resize` says whether anything is lost; this does not look.
        """
        kept = min(num_blocks, self.num_blocks)

        def leaf(pool):
            added = jnp.zeros((num_blocks - kept, *pool.shape[1:]), pool.dtype)
            return jnp.concatenate([pool[:kept], added])

        return jax.tree.map(leaf, self)

    def read(self, layer: int, slots: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        """K and V `[T, K, H]` at `slots` `[T]`, as stored, or scaled in f32."""
        block, offset = jnp.divmod(jnp.asarray(slots, jnp.int32), self.block_size)

        def values(pool, scale):
            at = pool[layer][block, :, offset]
            return dequantize(at, scale and scale[layer][block, :, offset])

        return values(self.k, self.k_scale), values(self.v, self.v_scale)


@partial(jax.jit, donate_argnums=0)
def _copy_blocks(cache: PagedKVCache, pairs: jax.Array) -> PagedKVCache:
    src, dst = pairs
    with jax.named_scope("copy_blocks"):
        return jax.tree.map(lambda pool: pool.at[dst].set(pool[src], mode="drop"), cache)


def defragment(
    cache: PagedKVCache, pool: BlockPool, tables: Sequence[BlockTable], *, shrink: bool = False
) -> tuple[PagedKVCache, BlockPool, list[BlockTable]]:
    """Move all blocks in use to the front and rewrite `tables`, which must be all that hold blocks.

    The prefix cache follows its blocks.  With `shrink` the pool then ends at the last block in use
    (at least one block is kept), and the memory behind it is given back.  Donates `cache`.

    Raises:
        ValueError: a block has other holders than `tables`; nothing has been moved.

    Example:
        >>> pool = BlockPool.create(num_blocks=8, block_size=2)
        >>> cache = PagedKVCache.create(
        ...     num_layers=1, num_blocks=8, block_size=2, num_kv_heads=1, head_dim=2
        ... )
        >>> a, b = BlockTable.empty(2), BlockTable.empty(2)
        >>> pool, a, _ = a.append(pool, 6)
        >>> pool, b, _ = b.append(pool, 2)
        >>> cache, pool, [b] = defragment(cache, a.free(pool), [b], shrink=True)
        >>> b.blocks.tolist(), pool.num_blocks, cache.num_blocks
        ([1], 2, 2)
    """
    tables, holders = list(tables), np.zeros(pool.num_blocks, np.int32)
    for table in tables:
        np.add.at(holders, table.blocks, 1)
    holders[NULL_BLOCK] = 0
    strange = np.flatnonzero(holders != pool.refs.to_numpy())
    if len(strange):
        raise ValueError(f"blocks {strange.tolist()} have other holders than the tables given")
    pool, moves = pool.defragment()
    src = np.flatnonzero(moves != np.arange(len(moves)))
    cache = cache.copy_blocks(src, moves[src])
    if shrink:
        in_use = pool.num_blocks - 1 - pool.num_unused
        pool = pool.resize(max(in_use, 1) + 1)
        cache = cache.resize(pool.num_blocks)
    return cache, pool, [table.remap(moves) for table in tables]
