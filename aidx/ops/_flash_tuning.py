"""What may be tuned of the flash attention kernels: their tiles, forward and backward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _flash_peers, _flash_xla, autotune
from ._flash_spec import FlashOperands, FlashSpec

SOURCES = ("pallas_kernels.flash_attention", "pallas_kernels._mgpu")
# 16k tokens and N * H = 2048, as the attention benchmarks of the literature have it.
SHAPES = tuple(
    f"{sizes}{causal}"
    for sizes in (
        "B=4 T=4096 N=16 H=128",
        "B=1 T=16384 N=16 H=128",
        "B=4 T=4096 N=32 H=64",
        "B=1 T=16384 N=32 H=64",
        "B=4 T=4096 N=8 H=256",
        "B=1 T=16384 N=8 H=256",
        "B=4 T=4096 N=32 K=8 H=128",
        "B=1 T=16384 N=32 K=8 H=128",
    )
    for causal in ("", " causal")
)
# What is changed of the heuristic's choice; what does not fit a shape is left out.
GRID: dict[str, Any] = {"persistent": False, "chained": False, "q_stages": 1, "o_in_ring": False}
WALK: dict[str, Any] = {**GRID, "persistent": True}
CHAIN: dict[str, Any] = {**WALK, "chained": True, "q_stages": 2}
RING: dict[str, Any] = {**WALK, "block_kv": 192, "o_in_ring": True, "lazy_rescale": True}
FORWARD_CHANGES: tuple[dict[str, Any], ...] = (
    {"block_kv": 64, **GRID},
    {"block_kv": 128, **GRID},
    {"block_kv": 192, "late_sum": False, **GRID},
    {"block_kv": 192, "late_sum": True, **GRID},
    {"stages": 3},
    {"late_sum": True},
    {"late_sum": False},
    {"lazy_rescale": True},
    {"lazy_rescale": False},
    {"release": "mbar"},
    WALK,
    {"block_kv": 128, "late_sum": False, **WALK},
    {"block_kv": 128, "late_sum": True, **WALK},
    {"block_kv": 128, "late_sum": True, **CHAIN},
    {**RING, "late_sum": True},
    {**RING, "late_sum": False},
)
BACKWARD_CHANGES: tuple[dict[str, Any], ...] = (
    {"block_q": 64},
    {"block_q": 128},
    {"stages": 1},
    {"stages": 3},
    {"do_stages": 1},
    {"early_free": True},
    {"early_free": False},
)


def forward_config(spec: FlashSpec, ops: FlashOperands) -> Any:
    """The forward's tiles; None (the kernels' own choice) for calls that are not tuned."""
    return autotune.choose(FORWARD, (ops,), {"spec": spec}) if _plain(spec, ops) else None


def backward_config(spec: FlashSpec, ops: FlashOperands, outputs: Any, d_out: Any) -> Any:
    """The backward's tiles; None (the kernels' own choice) for calls that are not tuned."""
    if not _plain(spec, ops):
        return None
    return autotune.choose(BACKWARD, (ops, outputs, d_out), {"spec": spec})


def _plain(spec: FlashSpec, ops: FlashOperands) -> bool:
    """Whether a random call is a fair one: lengths, ids, masks and functions are the caller's."""
    functions = (spec.score_mod, spec.mask_mod, spec.block_mask_mod)
    return _given(ops) <= {"q", "k", "v", "sinks"} and functions == (None, None, None)


def _given(ops: FlashOperands) -> set[str]:
    return {name for name, x in ops._asdict().items() if jax.tree.leaves(x)}


# --- candidates ----------------------------------------------------------------------------------


def _variants(
    default: Any, changes: Sequence[dict[str, Any]], widths: tuple[int, int]
) -> tuple[Any, ...]:
    """`default` and the changes of it that are consistent and fit shared memory and registers."""
    found = {default: None}
    for change in changes:
        try:
            config = dataclasses.replace(default, **change)
            config.check(*widths)
        except (ValueError, NotImplementedError):
            continue  # no candidate for this head size
        found[config] = None
    return tuple(found)


def _forward_candidates(ops: FlashOperands, *, spec: FlashSpec) -> tuple[Any, ...]:
    kernels = _flash_peers._kernels()
    wide, wide_v = kernels.forward_widths(ops.q.shape[-1], ops.v.shape[-1])
    options = _options(kernels, spec)
    default = kernels.forward_config(wide, wide_v, options, keys=ops.k.shape[1])
    return _variants(default, FORWARD_CHANGES, (wide, wide_v))


def _backward_candidates(
    ops: FlashOperands, outputs: Any, d_out: Any, *, spec: FlashSpec
) -> tuple[Any, ...]:
    kernels = _flash_peers._kernels()
    wide, wide_v = kernels.backward_widths(ops.q.shape[-1], ops.v.shape[-1])
    options = _options(kernels, spec)
    default = kernels.backward_config(wide, wide_v, options)
    return _variants(default, BACKWARD_CHANGES, (wide, wide_v))


def _options(kernels: Any, spec: FlashSpec) -> Any:
    """What the heuristics look at."""
    band = kernels.Band(spec.left, spec.right, spec.query_offset or 0)
    return kernels.Options(band, spec.scale, soft_cap=spec.soft_cap)


# --- running, references, cases ------------------------------------------------------------------


def _forward_reference(ops: FlashOperands, *, spec: FlashSpec) -> Any:
    return _flash_xla.forward(spec, ops)


def _backward_reference(ops: FlashOperands, outputs: Any, d_out: Any, *, spec: FlashSpec) -> Any:
    exact = _forward_reference(ops, spec=spec)
    zero = jnp.zeros_like(exact[1])
    return _flash_xla.backward(spec, ops, exact, (d_out, zero))


def _run_backward(
    config: Any, ops: FlashOperands, outputs: Any, d_out: Any, *, spec: FlashSpec
) -> Any:
    return _flash_peers.run_backward(spec, ops, outputs, (d_out, None), config)


def _backward_inputs(
    rng: np.random.Generator, ops: FlashOperands, outputs: Any, d_out: Any, *, spec: FlashSpec
) -> Any:
    """Random q, k, v and cotangent, with the forward's own outputs."""
    from .autotune.trial import random_inputs

    values, cotangent = random_inputs(rng, ops, d_out)
    forward = jax.jit(lambda ops: _flash_peers.run_forward(spec, ops, None))
    return values, forward(values), cotangent


def _case(text: str) -> tuple[tuple[FlashOperands], dict[str, Any]]:
    """`"B=4 T=4096 N=16 H=128 causal"`: also S, K, Hv, window, soft_cap, dtype."""
    from .flash_attention import _explained  # the door, which imports this module

    given = autotune.sizes(text)
    B, T, N, H = given.pop("B", 1), given.pop("T"), given.pop("N"), given.pop("H")
    S, K, Hv = given.pop("S", T), given.pop("K", N), given.pop("Hv", H)
    dtype = jnp.dtype(given.pop("dtype", "bfloat16"))
    options = {"causal": given.pop("causal", False), "window": given.pop("window", None)}
    options["logits_soft_cap"] = given.pop("soft_cap", None)
    if given:
        raise ValueError(f"{text!r}: {sorted(given)} are no sizes of flash attention")
    shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, Hv))
    specs: list[FlashSpec] = []

    def door(*arrays: Any) -> tuple[()]:
        specs.append(_explained(*arrays, **options)[0])
        return ()

    q, k, v = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    jax.eval_shape(door, q, k, v)
    return (FlashOperands(q, k, v),), {"spec": specs[0]}


def _backward_case(text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    (ops,), static = _case(text)
    out = jax.ShapeDtypeStruct((*ops.q.shape[:3], ops.v.shape[3]), ops.q.dtype)
    lse = jax.ShapeDtypeStruct(ops.q.shape[:3], jnp.float32)
    return (ops, (out, lse), out), static


def _key(ops: FlashOperands, *others: Any, spec: FlashSpec) -> dict[str, Any]:
    """What a timing depends on."""
    (B, T, N, H), (S, K, Hv) = ops.q.shape, ops.v.shape[1:]
    return {
        **{"B": B, "T": T, "S": S, "N": N, "K": K, "H": H, "Hv": Hv, "dtype": ops.q.dtype.name},
        "band": [spec.left, spec.right, spec.query_offset],
        "soft_cap": spec.soft_cap is not None,
        "sinks": ops.sinks is not None,
        "deterministic": spec.deterministic,
    }


def _family(ops: FlashOperands, *others: Any, spec: FlashSpec) -> dict[str, Any]:
    """What the compiled code depends on: not how many rows, heads and tiles there are."""
    return {
        "head_dim": [ops.q.shape[3], ops.v.shape[3]],
        "group": ops.q.shape[2] // ops.k.shape[2],
        "dtype": ops.q.dtype.name,
        "ragged": [ops.q.shape[1] % 384 != 0, ops.k.shape[1] % 384 != 0],
        "band": [spec.left is not None, spec.right is not None],
        "soft_cap": spec.soft_cap is not None,
        "deterministic": spec.deterministic,
        "given": sorted(_given(ops)),
    }


FORWARD = autotune.register(
    autotune.Tunable(
        "flash_attention/forward",
        run=lambda config, ops, *, spec: _flash_peers.run_forward(spec, ops, config),
        candidates=_forward_candidates,
        reference=_forward_reference,
        sources=SOURCES,
        key=_key,
        family=_family,
        case=_case,
        shapes=SHAPES,
        platforms=("cuda",),
    )
)
BACKWARD = autotune.register(
    autotune.Tunable(
        "flash_attention/backward",
        run=_run_backward,
        candidates=_backward_candidates,
        reference=_backward_reference,
        sources=SOURCES,
        inputs=_backward_inputs,
        # The first rows of a causal call are far larger than the root mean square that their
        # rounding is compared with (measured on an H200: 0.12 at 4096 tokens).
        tolerance={"float32": 1e-3, "float16": 5e-2, "bfloat16": 0.3},
        key=_key,
        family=_family,
        case=_backward_case,
        shapes=SHAPES,
        platforms=("cuda",),
    )
)
