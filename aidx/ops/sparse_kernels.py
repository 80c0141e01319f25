"""The door to `pallas_kernels.sparse`: what `aidx.arrays` registers for its products.

>>> block_sample.__module__
'pallas_kernels.sparse.block_sample'
"""

from pallas_kernels.sparse import block_sample as block_sample
from pallas_kernels.sparse import entry_matmul as entry_matmul
from pallas_kernels.sparse import row_sample as row_sample
from pallas_kernels.sparse import two_four_matmul as two_four_matmul
from pallas_kernels.sparse import vector_scatter as vector_scatter

from ._sparse_tuning import block_matmul as block_matmul
from ._sparse_tuning import row_matmul as row_matmul
from ._sparse_tuning import vector_matmul as vector_matmul
