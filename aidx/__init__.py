"""aidx: attention at the speed of the hardware for JAX, and a language-model stack on top of it.

Everything is a pure function over pytrees; the names below are the public ones.
"""

from typing import TYPE_CHECKING

from aidx.cache import BlockPool as BlockPool
from aidx.cache import BlockTable as BlockTable
from aidx.cache import CacheOverflow as CacheOverflow
from aidx.cache import KVCache as KVCache
from aidx.cache import KVCacheConfig as KVCacheConfig
from aidx.cache import OutOfBlocks as OutOfBlocks
from aidx.cache import PagedKVCache as PagedKVCache
from aidx.cache import contiguous_attend as contiguous_attend
from aidx.cache import defragment as defragment
from aidx.cache import no_cache_attend as no_cache_attend
from aidx.cache import paged_attend as paged_attend
from aidx.cli.options import embedded_path as embedded_path
from aidx.engine import BeamSearchParams as BeamSearchParams
from aidx.engine import CompletionOutput as CompletionOutput
from aidx.engine import ContinuousBatcher as ContinuousBatcher
from aidx.engine import Engine as Engine
from aidx.engine import EngineConfig as EngineConfig
from aidx.engine import RequestOutput as RequestOutput
from aidx.engine import SamplingParams as SamplingParams
from aidx.llm import LLM as LLM
from aidx.llm import AsyncLLM as AsyncLLM
from aidx.models import Model as Model
from aidx.models import init_params as init_params
from aidx.models import load_model as load_model
from aidx.models import save_model as save_model
from aidx.ops.attention_mask import BlockMask as BlockMask
from aidx.ops.attention_mask import block_mask as block_mask
from aidx.ops.flash_attention import FlashAttentionConfig as FlashAttentionConfig
from aidx.ops.flash_attention import flash_attention as flash_attention
from aidx.ops.paged_attention import Cascade as Cascade
from aidx.ops.paged_attention import PagedAttentionConfig as PagedAttentionConfig
from aidx.ops.paged_attention import paged_attention as paged_attention
from aidx.ops.registry import explain as explain
from aidx.ops.registry import implementations as implementations
from aidx.ops.sampling import sample as sample
from aidx.ops.write_kv import write_kv as write_kv

if TYPE_CHECKING:
    from aidx.cache import CachedMultiHeadAttention as CachedMultiHeadAttention

__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "CachedMultiHeadAttention":  # imports flax.nnx, which few need
        from aidx.cache import CachedMultiHeadAttention

        return CachedMultiHeadAttention
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
