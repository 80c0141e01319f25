"""The shapes on which `op_check` tries the fused kernels, by name of the kernel."""

import numpy as np
from jax.sharding import PartitionSpec as P

from aidx.kernels import Case

NORMS = {
    "rms_norm": lambda rows, d: (rows, d),
    "residual_rms_norm": lambda rows, d: (rows, rows, d),
    "layer_norm": lambda rows, d: (rows, d, d),
    "residual_layer_norm": lambda rows, d: (rows, rows, d, d),
}


def operands(name, rows, width):
    """Of the kernel `name`: rows are the leading axes, width is that of a row."""
    if name in NORMS:
        return NORMS[name]((*rows, width), (width,))
    if name == "apply_rope":
        return (*rows, 3, width), (*rows, width // 2), (*rows, width // 2)
    if name == "gated":
        return ((*rows, 2, width),)
    targets = np.arange(-1, int(np.prod(rows)) - 1, dtype=np.int32).reshape(rows)
    return (*rows, width), targets


def case(name, rows, width, **options):
    """A case named after its shape."""
    vmap = None
    if name in NORMS:  # the rows alone, and everything
        here = [0 if len(x) > 1 else None for x in operands(name, (2,), 8)]
        vmap = ((0,) * len(here), tuple(here))
    return Case(f"{rows} x {width}", operands(name, rows, width), vmap=vmap, **options)


def split(name, rows=8, width=16):
    """The first axis over eight devices; vectors whole."""
    given = operands(name, (rows,), width)
    whole = lambda x: len(x if isinstance(x, tuple) else x.shape) == 1 and name in NORMS
    ins = tuple(P() if whole(x) else P("devices") for x in given)
    pair = name.startswith("residual") or name == "softmax_cross_entropy"
    return ins, (P("devices"),) * 2 if pair else P("devices")
