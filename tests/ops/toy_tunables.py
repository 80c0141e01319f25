"""Tunables for the tests of the tuner, which a worker process imports by name."""

import os
import time

import jax
import jax.numpy as jnp

from aidx.ops import autotune


def scale(config, x, *, factor=2.0):
    """`factor * x` in so many pieces; some configurations are no good."""
    if config == 3:
        raise NotImplementedError("three pieces do not fit")
    if config == 5:
        return factor * x + 1.0  # wrong
    if config == 7:  # hangs, when it runs
        return jax.pure_callback(lambda x: time.sleep(600), x, x)
    if config == 9:  # takes its process along, when it is compiled
        os._exit(9)
    return jnp.concatenate([factor * piece for piece in jnp.split(x, config)])


TOY = autotune.Tunable(
    "toy/scale",
    run=scale,
    candidates=lambda x, *, factor=2.0: [c for c in (1, 2, 3, 4, 5) if x.shape[0] >= c],
    reference=lambda x, *, factor=2.0: factor * x,
    sources=("tests.ops.toy_tunables",),
    case=lambda text: ((jax.ShapeDtypeStruct((autotune.sizes(text)["n"],), jnp.float32),), {}),
    shapes=("n=8",),
)
DEADLY = autotune.Tunable(
    "toy/deadly",
    run=scale,
    candidates=lambda x: (1, 7, 9, 2),
    reference=lambda x: 2.0 * x,
    sources=("tests.ops.toy_tunables",),
    case=TOY.case,
    shapes=("n=8",),
)

if os.environ.get("AIDX_TEST_TOYS"):
    for toy in (TOY, DEADLY):
        autotune.register(toy)
