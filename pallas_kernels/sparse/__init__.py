"""Sparse products for Hopper: blocks on the tensor cores, rows of numbers by equal entries."""

from .block_matmul import MatmulConfig as MatmulConfig
from .block_matmul import block_matmul as block_matmul
from .block_sample import SampleConfig as SampleConfig
from .block_sample import block_sample as block_sample
from .rows import RowConfig as RowConfig
from .rows import entry_matmul as entry_matmul
from .rows import row_matmul as row_matmul
from .rows import row_sample as row_sample
from .two_four import two_four_matmul as two_four_matmul
from .vector import VectorConfig as VectorConfig
from .vector import vector_matmul as vector_matmul
from .vector import vector_scatter as vector_scatter
