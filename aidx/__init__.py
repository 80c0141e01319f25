"""aidx: attention at the speed of the hardware for JAX, and a language-model stack on top of it.

Everything is a pure function over pytrees; the names below are the public ones.
"""

import importlib
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
    from aidx import arrays as arrays
    from aidx import distill as distill
    from aidx import kernels as kernels
    from aidx import rl as rl
    from aidx import telemetry as telemetry
    from aidx import train as train
    from aidx.arrays import BSC as BSC
    from aidx.arrays import BSR as BSR
    from aidx.arrays import COO as COO
    from aidx.arrays import CSC as CSC
    from aidx.arrays import CSR as CSR
    from aidx.arrays import BatchedFunction as BatchedFunction
    from aidx.arrays import NestedTensor as NestedTensor
    from aidx.arrays import Ragged as Ragged
    from aidx.arrays import TwoFour as TwoFour
    from aidx.arrays import deserialize as deserialize
    from aidx.arrays import elementwise_multiply as elementwise_multiply
    from aidx.arrays import get_slice as get_slice
    from aidx.arrays import grad as grad
    from aidx.arrays import load_tree as load_tree
    from aidx.arrays import save_tree as save_tree
    from aidx.arrays import serialize as serialize
    from aidx.arrays import slice_along as slice_along
    from aidx.arrays import value_and_grad as value_and_grad
    from aidx.arrays import vmap as vmap
    from aidx.cache import CachedMultiHeadAttention as CachedMultiHeadAttention
    from aidx.ops import autotune as autotune
    from aidx.ops.attention_drop_ins import attention_fn as attention_fn
    from aidx.ops.attention_drop_ins import dot_product_attention as dot_product_attention
    from aidx.ops.attention_layer import FlashAttentionLayer as FlashAttentionLayer
    from aidx.ops.autotune import NotTuned as NotTuned
    from aidx.ops.autotune import Tuning as Tuning

__version__ = "0.1.0"

# Rooms that not everybody needs, some of which import optional packages: imported when asked for.
_ROOMS = {
    name: f"aidx.{name}" for name in ("arrays", "distill", "kernels", "rl", "telemetry", "train")
} | {"autotune": "aidx.ops.autotune"}
_LAZY = {
    name: module
    for module, names in {
        "aidx.arrays": "BSC BSR COO CSC CSR BatchedFunction NestedTensor Ragged "
        "TwoFour deserialize elementwise_multiply get_slice grad load_tree "
        "save_tree serialize slice_along value_and_grad vmap",
        "aidx.cache": "CachedMultiHeadAttention",
        "aidx.ops.attention_drop_ins": "attention_fn dot_product_attention",
        "aidx.ops.attention_layer": "FlashAttentionLayer",
        "aidx.ops.autotune": "NotTuned Tuning",
    }.items()
    for name in names.split()
}


def __getattr__(name: str):
    if name in _ROOMS:
        return importlib.import_module(_ROOMS[name])
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *_LAZY})
