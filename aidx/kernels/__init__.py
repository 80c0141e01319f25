"""Bring your own kernel: declare it, check it, use it like any function."""

from .builder import KernelBuilder as KernelBuilder
from .catalog import REGISTRY as REGISTRY
from .catalog import CustomKernelRegistry as CustomKernelRegistry
from .kernel import CustomKernel as CustomKernel
from .kernel import Fold as Fold
from .kernel import Tolerance as Tolerance
from .register import register as register
from .sharding import ShardingRule as ShardingRule
