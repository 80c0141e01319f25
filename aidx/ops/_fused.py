"""The Pallas kernels of `pallas_kernels.fused` at any rank, as functions of the ops' operands.

`aidx.kernels.fused` declares them; a backward takes `(operands, outputs, cotangents)`.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.fused.config import CrossEntropyConfig as CrossEntropyConfig
from pallas_kernels.fused.config import GatedConfig as GatedConfig
from pallas_kernels.fused.config import NormConfig as NormConfig

from . import cross_entropy


def _kernels(name: str) -> Any:
    """A module of kernels, imported at its first use: it needs Mosaic GPU."""
    try:
        return importlib.import_module(f"pallas_kernels.fused.{name}")
    except ImportError as missing:
        raise NotImplementedError(f"this JAX cannot import the kernels: {missing}") from missing


def _rows(x: Any, trailing: int = 1) -> Any:
    """All leading axes as one; None stays None."""
    if x is None:
        return None
    lead = x.ndim - trailing
    return x.reshape(math.prod(x.shape[:lead]), *x.shape[lead:])


# --- norms ---------------------------------------------------------------------------------------


def _normalise(x, scale, bias, residual, eps: float, centred: bool, config: Any) -> Any:
    options = dict(eps=eps, centred=centred, config=config)
    y, h = _kernels("norm").norm(_rows(x), scale, bias, _rows(residual), **options)
    return y.reshape(x.shape) if h is None else (y.reshape(x.shape), h.reshape(x.shape))


def _normalise_backward(h, scale, bias, dy, dh, eps: float, centred: bool) -> tuple[Any, ...]:
    dx, d_scale, d_bias = _kernels("norm").norm_backward(
        _rows(h), scale, _rows(dy), _rows(dh), eps=eps, centred=centred, biased=bias is not None
    )
    return dx.reshape(h.shape), d_scale, d_bias


def rms_norm(x, scale, *, eps=1e-6, config):
    """`norm.rms_norm` by one kernel."""
    return _normalise(x, scale, None, None, eps, False, config)


def rms_norm_backward(operands, outputs, dy, *, eps):
    """Its gradient by one kernel and a sum of its CTAs' sums."""
    x, scale = operands
    return _normalise_backward(x, scale, None, dy, None, eps, False)[:2]


def residual_rms_norm(x, residual, scale, *, eps=1e-6, config):
    """`norm.residual_rms_norm` by one kernel."""
    return _normalise(x, scale, None, residual, eps, False, config)


def residual_rms_norm_backward(operands, outputs, cotangents, *, eps):
    """Its gradient; x and the residual have the same."""
    dy, dh = cotangents
    dx, d_scale, _ = _normalise_backward(outputs[1], operands[2], None, dy, dh, eps, False)
    return dx, dx, d_scale


def layer_norm(x, scale, bias=None, *, eps=1e-5, config):
    """`norm.layer_norm` by one kernel."""
    return _normalise(x, scale, bias, None, eps, True, config)


def layer_norm_backward(operands, outputs, dy, *, eps):
    """Its gradient by one kernel and a sum of its CTAs' sums."""
    x, scale, bias = operands
    return _normalise_backward(x, scale, bias, dy, None, eps, True)


def residual_layer_norm(x, residual, scale, bias=None, *, eps=1e-5, config):
    """`norm.residual_layer_norm` by one kernel."""
    return _normalise(x, scale, bias, residual, eps, True, config)


def residual_layer_norm_backward(operands, outputs, cotangents, *, eps):
    """Its gradient; x and the residual have the same."""
    (_, _, scale, bias), (dy, dh) = operands, cotangents
    dx, *others = _normalise_backward(outputs[1], scale, bias, dy, dh, eps, True)
    return dx, dx, *others


# --- rotary embedding, gated activations ----------------------------------------------------------


def apply_rope(x, cos, sin):
    """`rope.apply_rope` by one kernel."""
    if x.ndim < 3 or cos.shape != (*x.shape[:-2], x.shape[-1] // 2) or sin.shape != cos.shape:
        raise ValueError(f"{x.shape=} needs cos and sin [*B, T, H/2]: {cos.shape=}, {sin.shape=}")
    return _kernels("rope").rope(_rows(x, 2), _rows(cos), _rows(sin)).reshape(x.shape)


def apply_rope_backward(operands, outputs, dy):
    """The rotation back."""
    x, cos, sin = operands
    halves = lambda a: jnp.split(a.astype(jnp.float32), 2, axis=-1)
    (x1, x2), (d1, d2) = halves(x), halves(dy)
    # What nobody asks for, XLA does not compute.
    d_cos, d_sin = jnp.sum(x1 * d1 + x2 * d2, axis=-2), jnp.sum(x1 * d2 - x2 * d1, axis=-2)
    return apply_rope(dy, cos, -sin), d_cos, d_sin


def gated(gate_up, *, activation="silu", config):
    """`activations.gated` by one kernel."""
    y = _kernels("gated").gated(_rows(gate_up, 2), activation=activation, config=config)
    return y.reshape(*gate_up.shape[:-2], gate_up.shape[-1])


def gated_backward(operands, outputs, dy, *, activation):
    """Its gradient by one kernel."""
    (gate_up,) = operands
    d = _kernels("gated").gated_backward(_rows(gate_up, 2), _rows(dy), activation=activation)
    return (d.reshape(gate_up.shape),)


# --- cross-entropy -------------------------------------------------------------------------------


def softmax_cross_entropy(logits, targets, *, label_smoothing=0.0, z_loss=0.0, config):
    """`cross_entropy.softmax_cross_entropy` in one read of the logits."""
    cross_entropy.check(logits, targets, label_smoothing, z_loss)
    made = _kernels("cross_entropy").log_normaliser(
        _rows(logits), _rows(targets, 0), total=label_smoothing > 0, config=config
    )
    lse, picked, total = (x if x is None else x.reshape(targets.shape) for x in made)
    V = logits.shape[-1]
    loss = cross_entropy.loss_of(V, targets, lse, picked, total, label_smoothing, z_loss)
    return loss, lse


def softmax_cross_entropy_backward(operands, outputs, cotangents, *, label_smoothing, z_loss):
    """Its gradient in one read and one write, where the logits were."""
    (logits, targets), (_, lse) = operands, outputs
    factors = cross_entropy.gradient_factors(
        logits.shape[-1], targets, lse, cotangents, label_smoothing, z_loss
    )
    flat = lambda x: None if x is None else jax.lax.reshape(x, (x.size,))
    d = _kernels("cross_entropy").cross_entropy_backward(
        _rows(logits), flat(targets), flat(lse), *map(flat, factors)
    )
    return d.reshape(logits.shape), None
