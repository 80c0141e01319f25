"""The fused kernels that aidx ships, declared as anybody's: norms, rotary embedding, gated
activations, softmax cross-entropy.

Each is a function of `aidx.ops` with its options, and `implementation=` and `config=` on top.
`docs/kernels_fused.md` says what was measured, and who is taken where.

    from aidx.kernels import fused

    y, h = fused.residual_rms_norm(x, delta, scale, eps=1e-5)
    loss, lse = fused.softmax_cross_entropy(logits, targets, z_loss=1e-4)
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..ops import activations, cross_entropy, norm, rope
from .builder import KernelBuilder
from .kernel import Tolerance

MODULES = tuple(f"pallas_kernels.fused.{name}" for name in ("_vectors", "config"))


def _kernels(name: str) -> Any:
    """A module of kernels, imported at its first use: it needs Mosaic GPU."""
    try:
        return importlib.import_module(f"pallas_kernels.fused.{name}")
    except ImportError as missing:
        raise NotImplementedError(f"this JAX cannot import the kernels: {missing}") from missing


def _rows(x: jax.Array | None, trailing: int = 1) -> jax.Array | None:
    """All leading axes as one."""
    if x is None:
        return None
    return x.reshape(math.prod(x.shape[: x.ndim - trailing]), *x.shape[x.ndim - trailing :])


# --- norms ---------------------------------------------------------------------------------------


def _normalise(x, scale, bias, residual, eps: float, centred: bool) -> Any:
    flat = _rows(x)
    y, h = _kernels("norm").norm(flat, scale, bias, _rows(residual), eps=eps, centred=centred)
    return y.reshape(x.shape) if h is None else (y.reshape(x.shape), h.reshape(x.shape))


def _normalise_backward(h, scale, bias, dy, dh, eps: float, centred: bool) -> tuple[Any, ...]:
    dx, d_scale, d_bias = _kernels("norm").norm_backward(
        _rows(h), scale, _rows(dy), _rows(dh), eps=eps, centred=centred, biased=bias is not None
    )
    return dx.reshape(h.shape), d_scale, d_bias


def _rms_norm(x, scale, *, eps=1e-6):
    return _normalise(x, scale, None, None, eps, False)


def _rms_norm_backward(operands, outputs, dy, *, eps):
    x, scale = operands
    return _normalise_backward(x, scale, None, dy, None, eps, False)[:2]


def _residual_rms_norm(x, residual, scale, *, eps=1e-6):
    return _normalise(x, scale, None, residual, eps, False)


def _residual_rms_norm_backward(operands, outputs, cotangents, *, eps):
    dy, dh = cotangents
    dx, d_scale, _ = _normalise_backward(outputs[1], operands[2], None, dy, dh, eps, False)
    return dx, dx, d_scale


def _layer_norm(x, scale, bias=None, *, eps=1e-5):
    return _normalise(x, scale, bias, None, eps, True)


def _layer_norm_backward(operands, outputs, dy, *, eps):
    x, scale, bias = operands
    return _normalise_backward(x, scale, bias, dy, None, eps, True)


def _residual_layer_norm(x, residual, scale, bias=None, *, eps=1e-5):
    return _normalise(x, scale, bias, residual, eps, True)


def _residual_layer_norm_backward(operands, outputs, cotangents, *, eps):
    dx, *others = _normalise_backward(outputs[1], *operands[2:], *cotangents, eps=eps, centred=True)
    return dx, dx, *others


def _declared(name: str, reference: Any, fn: Any, backward: Any, rule: str) -> Any:
    kernel = KernelBuilder(name).reference(reference)
    kernel = kernel.implementation("mosaic_gpu", fn, backward=backward, platforms=("cuda",))
    return kernel.sharding(rule, replicated=("d",)).tolerance(Tolerance(float32=2e-5))


rms_norm = _declared(
    "rms_norm", norm.rms_norm, _rms_norm, _rms_norm_backward, "... d, d -> ... d"
).build()
residual_rms_norm = _declared(
    "residual_rms_norm",
    norm.residual_rms_norm,
    _residual_rms_norm,
    _residual_rms_norm_backward,
    "... d, ... d, d -> ... d, ... d",
).build()
layer_norm = _declared(
    "layer_norm", norm.layer_norm, _layer_norm, _layer_norm_backward, "... d, d, d -> ... d"
).build()
residual_layer_norm = _declared(
    "residual_layer_norm",
    norm.residual_layer_norm,
    _residual_layer_norm,
    _residual_layer_norm_backward,
    "... d, ... d, d, d -> ... d, ... d",
).build()


# --- rotary embedding ----------------------------------------------------------------------------


def _apply_rope(x, cos, sin):
    if x.ndim < 3 or cos.shape != (*x.shape[:-2], x.shape[-1] // 2):
        raise ValueError(f"{x.shape=} needs cos and sin [*B, T, H/2]: {cos.shape=}, {sin.shape=}")
    return _kernels("rope").rope(_rows(x, 2), _rows(cos), _rows(sin)).reshape(x.shape)


def _apply_rope_backward(operands, outputs, dy):
    x, cos, sin = operands
    halves = lambda a: jnp.split(a.astype(jnp.float32), 2, axis=-1)
    (x1, x2), (d1, d2) = halves(x), halves(dy)
    # What nobody asks for, XLA does not compute.
    d_cos, d_sin = jnp.sum(x1 * d1 + x2 * d2, axis=-2), jnp.sum(x1 * d2 - x2 * d1, axis=-2)
    return _apply_rope(dy, cos, -sin), d_cos, d_sin


apply_rope = (
    KernelBuilder("apply_rope")
    .reference(rope.apply_rope)
    .implementation("mosaic_gpu", _apply_rope, backward=_apply_rope_backward, platforms=("cuda",))
    .sharding("... n h, ... c, ... c -> ... n h", replicated=("h", "c"))
    .build()
)


# --- gated activations ---------------------------------------------------------------------------


def _gated(gate_up, *, activation="silu"):
    fused = _kernels("gated")
    y = fused.gated(_rows(gate_up, 2), activation=activation)
    return y.reshape(*gate_up.shape[:-2], gate_up.shape[-1])


def _gated_backward(operands, outputs, dy, *, activation):
    (gate_up,) = operands
    d = _kernels("gated").gated_backward(_rows(gate_up, 2), _rows(dy), activation=activation)
    return (d.reshape(gate_up.shape),)


gated = (
    KernelBuilder("gated")
    .reference(activations.gated)
    .implementation("mosaic_gpu", _gated, backward=_gated_backward, platforms=("cuda",))
    .sharding("... g f -> ... f", replicated=("g",))
    .build()
)


# --- cross-entropy -------------------------------------------------------------------------------


def _softmax_cross_entropy(logits, targets, *, label_smoothing=0.0, z_loss=0.0):
    cross_entropy.check(logits, targets, label_smoothing, z_loss)
    made = _kernels("cross_entropy").log_normaliser(
        _rows(logits), _rows(targets, 0), total=label_smoothing > 0
    )
    lse, picked, total = (x if x is None else x.reshape(targets.shape) for x in made)
    V = logits.shape[-1]
    loss = cross_entropy.loss_of(V, targets, lse, picked, total, label_smoothing, z_loss)
    return loss, lse


def _softmax_cross_entropy_backward(operands, outputs, cotangents, *, label_smoothing, z_loss):
    (logits, targets), (_, lse) = operands, outputs
    factors = cross_entropy.gradient_factors(
        logits.shape[-1], targets, lse, cotangents, label_smoothing, z_loss
    )
    flat = lambda x: _rows(x, 0)
    d = _kernels("cross_entropy").cross_entropy_backward(
        _rows(logits), flat(targets), flat(lse), *map(flat, factors)
    )
    return d.reshape(logits.shape), None


softmax_cross_entropy = (
    KernelBuilder("softmax_cross_entropy")
    .reference(cross_entropy.softmax_cross_entropy)
    .implementation(
        "mosaic_gpu",
        _softmax_cross_entropy,
        backward=_softmax_cross_entropy_backward,
        platforms=("cuda",),
    )
    .implementation(
        "xla",
        cross_entropy.softmax_cross_entropy,
        backward=cross_entropy.softmax_cross_entropy_backward,
    )
    .sharding("... v, ... -> ..., ...", replicated=("v",))
    .build()
)
