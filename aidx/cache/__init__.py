"""Contiguous and paged KV caches, and the block pool.

Contiguous: `KVCache`, one buffer per row, for a fixed batch.  Paged: `PagedKVCache` on the device,
`BlockPool` and `BlockTable` on the host, for a batch that comes and goes.  A model sees either only
through an `Attend` (`contiguous_attend`, `paged_attend`, `no_cache_attend`).
`CachedMultiHeadAttention`, a Flax module, is imported when it is first asked for.
"""

from typing import TYPE_CHECKING

from aidx.cache.attend import contiguous_attend as contiguous_attend
from aidx.cache.attend import no_cache_attend as no_cache_attend
from aidx.cache.attend import paged_attend as paged_attend
from aidx.cache.block_pool import NULL_BLOCK as NULL_BLOCK
from aidx.cache.block_pool import BlockKey as BlockKey
from aidx.cache.block_pool import BlockPool as BlockPool
from aidx.cache.block_pool import BlockPoolStats as BlockPoolStats
from aidx.cache.block_pool import OutOfBlocks as OutOfBlocks
from aidx.cache.block_pool import block_keys as block_keys
from aidx.cache.block_table import BlockTable as BlockTable
from aidx.cache.block_table import pad_tables as pad_tables
from aidx.cache.config import KVCacheConfig as KVCacheConfig
from aidx.cache.contiguous import CacheOverflow as CacheOverflow
from aidx.cache.contiguous import KVCache as KVCache
from aidx.cache.contiguous import KVCacheStats as KVCacheStats
from aidx.cache.paged import PagedKVCache as PagedKVCache
from aidx.cache.paged import defragment as defragment
from aidx.cache.swap import SwappedBlocks as SwappedBlocks
from aidx.cache.swap import swap_in as swap_in
from aidx.cache.swap import swap_out as swap_out
from aidx.cache.swap import swap_piece as swap_piece

if TYPE_CHECKING:
    from aidx.cache.cached_attention import CachedMultiHeadAttention as CachedMultiHeadAttention


def __getattr__(name: str):
    if name == "CachedMultiHeadAttention":  # imports flax.nnx, which few need
        from aidx.cache.cached_attention import CachedMultiHeadAttention

        return CachedMultiHeadAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
