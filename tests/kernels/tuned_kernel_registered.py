"""As a package that offers a kernel: importing it registers the kernel."""

from aidx.kernels import REGISTRY

from .tuned_kernel import build

KERNEL = build(REGISTRY)
