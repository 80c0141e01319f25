"""Bring your own kernel: declare it, check it, use it like any function."""

from .builder import KernelBuilder as KernelBuilder
from .catalog import REGISTRY as REGISTRY
from .catalog import CustomKernelRegistry as CustomKernelRegistry
from .foreign import build_library as build_library
from .foreign import load_library as load_library
from .kernel import CustomKernel as CustomKernel
from .kernel import Fold as Fold
from .kernel import Tolerance as Tolerance
from .op_check import Case as Case
from .op_check import CounterExample as CounterExample
from .op_check import Report as Report
from .op_check import op_check as op_check
from .op_check import standard_cases as standard_cases
from .register import register as register
from .sharding import ShardingRule as ShardingRule
