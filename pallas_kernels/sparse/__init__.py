"""Sparse products for Hopper: blocks on the tensor cores."""

from .block_matmul import MatmulConfig as MatmulConfig
from .block_matmul import block_matmul as block_matmul
from .block_sample import SampleConfig as SampleConfig
from .block_sample import block_sample as block_sample
