"""Everything about sparse matrices in one place.

>>> import jax.numpy as jnp
>>> from aidx.arrays import sparse
>>> a = sparse.CSR.from_dense(jnp.array([[0.0, 2.0], [3.0, 4.0]]))
>>> sparse.softmax(a).sum(axis=1).tolist()
[1.0, 1.0]
"""

from .construct import block_diag as block_diag
from .construct import diagonal as diagonal
from .construct import diags as diags
from .construct import eye as eye
from .construct import hstack as hstack
from .construct import random as random
from .construct import resize as resize
from .construct import stack as stack
from .construct import unstack as unstack
from .construct import vstack as vstack
from .convert import bsr_from_dense as bsr_from_dense
from .convert import coalesce as coalesce
from .convert import from_dense as from_dense
from .convert import sort as sort
from .convert import to_bsr as to_bsr
from .convert import to_coo as to_coo
from .convert import to_csc as to_csc
from .convert import to_csr as to_csr
from .convert import to_dense as to_dense
from .elementwise import add as add
from .elementwise import divide as divide
from .elementwise import map_values as map_values
from .elementwise import mask as mask
from .elementwise import multiply as multiply
from .elementwise import prune as prune
from .elementwise import sample as sample
from .elementwise import tril as tril
from .elementwise import triu as triu
from .embedding import RowSparse as RowSparse
from .embedding import distinct_rows as distinct_rows
from .embedding import embedding_value_and_grad as embedding_value_and_grad
from .embedding import update_rows as update_rows
from .formats import BSC as BSC
from .formats import BSR as BSR
from .formats import COO as COO
from .formats import CSC as CSC
from .formats import CSR as CSR
from .formats import SparseMatrix as SparseMatrix
from .formats import checked as checked
from .interop import bsr_from_scipy as bsr_from_scipy
from .interop import from_jax as from_jax
from .interop import from_scipy as from_scipy
from .interop import to_jax as to_jax
from .interop import to_scipy as to_scipy
from .matmul import count_products as count_products
from .matmul import matmul as matmul
from .matmul import sampled_addmm as sampled_addmm
from .matmul import sampled_matmul as sampled_matmul
from .reduce import log_softmax as log_softmax
from .reduce import max as max
from .reduce import mean as mean
from .reduce import min as min
from .reduce import softmax as softmax
from .reduce import sum as sum
from .select import slice_columns as slice_columns
from .select import slice_rows as slice_rows
from .select import take_rows as take_rows
from .serialize import register as _register
from .solve import bicgstab as bicgstab
from .solve import cg as cg
from .solve import gmres as gmres
from .solve import triangular_solve as triangular_solve
from .two_four import TwoFour as TwoFour
from .two_four import two_four as two_four
from .two_four import two_four_matmul as two_four_matmul

# What is saved with `save_tree` is checked when it is read.
for _cls in (COO, CSR, CSC, BSR, BSC):
    _register(_cls, validate=checked)
_register(TwoFour)
_register(RowSparse)
