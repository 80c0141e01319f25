"""A kernel with configurations, which the worker of `aidx tune` imports by name."""

import os

import jax.numpy as jnp

from aidx.kernels import REGISTRY, Fold, KernelBuilder


def reference(x, scale, *, power=1):
    return x * scale[None] ** power


def pieces(x, scale, *, power=1, config):
    if config == 3:
        raise NotImplementedError("three pieces do not fit")
    wrong = 1.0 if config == 5 else 0.0
    rows = jnp.array_split(x, config)
    return jnp.concatenate([row * scale[None] ** power + wrong for row in rows])


def build(registry):
    return (
        KernelBuilder("test_pieces")
        .reference(reference)
        .implementation("pieces", pieces)
        .batching(Fold(("x",)))
        .tuning((1, 2, 3, 5), shapes=("8x4 4",))
        .build(registry)
    )


if os.environ.get("AIDX_TEST_TOYS"):  # as a package that offers a kernel: importing it registers it
    build(REGISTRY)
