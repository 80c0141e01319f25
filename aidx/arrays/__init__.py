"""Ragged and sparse arrays as pytrees, `vmap` over them, and their bytes."""

from aidx.cache import KVCache, KVCacheConfig, PagedKVCache

from . import ragged as ragged
from . import sparse as sparse
from .autodiff import combine as combine
from .autodiff import grad as grad
from .autodiff import partition as partition
from .autodiff import value_and_grad as value_and_grad
from .embedding import RowSparse as RowSparse
from .formats import BSC as BSC
from .formats import BSR as BSR
from .formats import COO as COO
from .formats import CSC as CSC
from .formats import CSR as CSR
from .formats import SparseMatrix as SparseMatrix
from .ragged_array import NestedTensor as NestedTensor
from .ragged_array import Ragged as Ragged
from .ragged_array import RaggedTensor as RaggedTensor
from .serialize import deserialize as deserialize
from .serialize import load_tree as load_tree
from .serialize import register as register
from .serialize import save_tree as save_tree
from .serialize import serialize as serialize
from .slicing import elementwise_multiply as elementwise_multiply
from .slicing import get_slice as get_slice
from .slicing import slice_along as slice_along
from .two_four import TwoFour as TwoFour
from .vmap import BatchedFunction as BatchedFunction
from .vmap import vmap as vmap

for _cls in (KVCache, KVCacheConfig, PagedKVCache):  # the caches stand below and cannot do it
    register(_cls)
