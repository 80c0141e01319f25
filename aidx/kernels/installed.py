"""Importing this module registers the kernels that installed packages offer (entry points).

For programs that start from names, such as `aidx tune` and its worker; see
`CustomKernelRegistry.load_entry_points`.
"""

from .catalog import REGISTRY

LOADED = REGISTRY.load_entry_points()
