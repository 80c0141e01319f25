"""Softmax cross-entropy over a large vocabulary: one read forward, one read and write backward.

A warpgroup goes along a row.  Every thread keeps running maxima and sums of its own, rescaled once
for eight vectors, and the threads meet at the end of the row: `[rows, V]` in f32 exists nowhere.
The backward writes the gradient where the logits were.
"""

import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels._mgpu import (
    HOPPER_SMS,
    MASKED,
    in_place,
    interpret_params,
    store_scalar,
    taken,
)

from ._vectors import Vectors, checked_rows
from .config import CROSS_ENTROPY, CrossEntropyConfig

LOG2E = math.log2(math.e)
LARGE = 2.0**126


def log_normaliser(
    logits: jax.Array,
    targets: jax.Array,
    *,
    total: bool = False,
    config: CrossEntropyConfig = CROSS_ENTROPY,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """What the loss of a row is made of: `log sum exp(l)`, the target's logit, `sum l`.

    Args:
      logits: `[rows, V]` bf16, f16 or f32, V a multiple of 8.
      targets: i32 `[rows]`; one outside of 0 to V - 1 gives 0 for its logit.
      total: whether the sum of the logits is wanted.
      config: how the rows are shared out.
      interpret: True runs the GPU interpreter.

    Returns:
      `(lse, target, total or None)`, f32 `[rows]`.

    Raises:
      NotImplementedError: what this kernel cannot do.

    References:
      Milakov & Gimelshein, Online normalizer calculation for softmax, 2018.

    >>> x = jnp.ones((4, 64), jnp.bfloat16)
    >>> jax.eval_shape(log_normaliser, x, jnp.arange(4))[0].shape
    (4,)
    """
    _check(logits, targets)
    rows, V = logits.shape
    ctas = min(rows, HOPPER_SMS * config.ctas) if config.ctas else rows
    tile = Vectors.piece(logits.dtype, interpret)
    step = tile.size * config.vectors
    whole = V // step

    def body(logits_ref, targets_ref, *refs):
        *out, scratch = refs
        cta = lax.axis_index("cta")

        def along(row_ref, parts, carry):
            """The running (maximum, sum of powers, sum) of every lane after some more parts."""
            m, s, *sums = carry
            # An infinite logit makes the sum infinite; an infinite maximum would make it NaN.
            new = jnp.minimum(functools.reduce(jnp.maximum, parts, m), LARGE)
            base = new * LOG2E
            s = s * jnp.exp2(m * LOG2E - base)
            for part in parts:
                s = s + jnp.exp2(part * LOG2E - base)
            return new, s, *sums

        @pl.loop(0, lax.div(rows - 1 - cta + ctas, jnp.int32(ctas)))
        def _(i):
            row = cta + i * ctas
            row_ref = logits_ref.at[row]
            added = lambda sums, parts: [functools.reduce(jnp.add, parts, x) for x in sums]

            def some(k, carry):
                begin = lambda j: k * step + j * tile.size
                parts = [tile.load(row_ref, begin(j), inside=True) for j in range(config.vectors)]
                m, s, *sums = along(row_ref, parts, carry)
                return (m, s, *added(sums, parts))

            zero = tile.zeros()
            carry = (zero + MASKED, zero, *([zero] if total else []))
            m, s, *sums = lax.fori_loop(0, whole, some, carry)
            rest = range(whole * step, V, tile.size)
            if rest:
                parts = [tile.load(row_ref, at, fill=-math.inf) for at in rest]
                m, s, *sums = along(row_ref, parts, (m, s, *sums))
                if total:
                    sums = added(sums, [tile.load(row_ref, at) for at in rest])
            top = tile.total(m, scratch, "max")
            s = tile.total(s * jnp.exp2((m - top) * LOG2E), scratch)
            lse = top + jnp.log2(s) / LOG2E
            target = targets_ref[row]
            known = (target >= 0) & (target < V)
            at = jnp.where(known, target, 0)
            picked = jnp.where(known, logits_ref[row, at].astype(jnp.float32), 0.0)
            found = [lse, picked, *(tile.total(x, scratch) for x in sums)]
            for ref, value in zip(out, found, strict=True):
                store_scalar(ref, row, value, bool(interpret))

    like = jax.ShapeDtypeStruct((rows,), jnp.float32)
    with jax.named_scope("cross_entropy"):
        out = plgpu.kernel(
            body,
            out_type=(like,) * (3 if total else 2),
            scratch_types=[plgpu.SMEM((4,), jnp.float32)],
            grid=(ctas,),
            grid_names=("cta",),
            interpret=interpret_params(interpret),
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(logits, targets.astype(jnp.int32))
    return out[0], out[1], out[2] if total else None


def cross_entropy_backward(
    logits: jax.Array,
    targets: jax.Array,
    lse: jax.Array,
    power: jax.Array,
    hit: jax.Array,
    every: jax.Array | None = None,
    *,
    config: CrossEntropyConfig = CROSS_ENTROPY,
    interpret: Any = None,
) -> jax.Array:
    """`d l = power * exp(l - lse) - hit * onehot(target) - every`, in place of the logits.

    Args:
      logits: `[rows, V]`; where nothing else needs them the gradient takes their memory.
      targets: i32 `[rows]`.
      lse: f32 `[rows]`, of `log_normaliser`.
      power: f32 `[rows]`, the cotangent of every probability.
      hit: f32 `[rows]`, what the target's logit gets besides.
      every: f32 `[rows]`, what all get besides; None is nothing.
      config, interpret: of `log_normaliser`.

    Returns:
      `[rows, V]` in the logits' dtype.

    Raises:
      NotImplementedError: what this kernel cannot do.

    >>> x, w = jnp.ones((4, 64), jnp.bfloat16), jnp.ones(4)
    >>> jax.eval_shape(cross_entropy_backward, x, jnp.arange(4), w, w, w).shape
    (4, 64)
    """
    _check(logits, targets)
    rows, V = logits.shape
    ctas = min(rows, HOPPER_SMS * config.backward_ctas) if config.backward_ctas else rows
    tile = Vectors.piece(logits.dtype, interpret)
    step = tile.size * config.backward_vectors
    whole = V // step

    def body(*refs):
        targets_ref, *row_refs, logits_ref = refs
        cta = lax.axis_index("cta")

        @pl.loop(0, lax.div(rows - 1 - cta + ctas, jnp.int32(ctas)))
        def _(i):
            row = cta + i * ctas
            target, row_ref = targets_ref[row], logits_ref.at[row]
            lse, power, hit, *rest = (ref[row] for ref in row_refs)

            def write(begins, inside):
                parts = [tile.load(row_ref, at, inside=inside) for at in begins]
                for at, part in zip(begins, parts, strict=True):
                    d = jnp.exp2((part - lse) * LOG2E) * power
                    d = d - jnp.where(tile.indices() == target - at, hit, 0.0)
                    d = d - rest[0] if rest else d
                    tile.store(row_ref, d, at, inside=inside)

            @pl.loop(0, whole)
            def _(k):
                write([k * step + j * tile.size for j in range(config.backward_vectors)], True)

            write(list(range(whole * step, V, tile.size)), False)

    given = [lse, power, hit] + ([] if every is None else [every])
    with jax.named_scope("cross_entropy_backward"):
        state = in_place(logits)
        plgpu.kernel(
            body,
            out_type=(),
            grid=(ctas,),
            grid_names=("cta",),
            interpret=interpret_params(interpret),
            compiler_params=plgpu.CompilerParams(approx_math=True),
        )(targets.astype(jnp.int32), *(x.astype(jnp.float32) for x in given), state)
        return taken(state)


def _check(logits, targets) -> None:
    """What the shapes and dtypes have to be."""
    if logits.ndim != 2 or targets.shape != logits.shape[:1]:
        raise ValueError(f"{logits.shape=} and {targets.shape=} must be [rows, V] and [rows]")
    checked_rows(logits=logits)
