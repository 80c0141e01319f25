"""What enters a score or hides it, as the Hopper kernels take it: one program and its arrays.

Bias, ALiBi, score_mod on one side and mask, mask_mod, block mask on the other become one scalar
function each (`pallas_kernels.flash_attention.program`).  The gradient of an array comes back in
the shape that the kernel loaded and is pulled back to what the caller passed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.dropout import dropout_rows

from ._flash_spec import FlashOperands, FlashSpec

Array = jax.Array


class Score(NamedTuple):
    """The score's modifier, which of its arrays get gradients, and where those go."""

    modifier: Any
    wanted: tuple[int, ...]
    pull: Callable[[tuple[Array, ...]], dict[str, Any]]  # to fields of FlashOperands


def _loaded(x: Array, T: int, S: int) -> tuple[str, Array]:
    """(kind, array) of a [b, n, 1 or T, 1 or S] operand; only whole tiles stay narrow."""
    t, s = x.shape[2:]
    if (t, s) == (T, S) and min(T, S) > 1:
        return "tile", x
    if s == S and S > 1:
        return "key", x[:, :, 0]
    if t == T and T > 1:
        return "query", x[:, :, :, 0]
    return "scalar", x[:, :, 0, 0]


def builtin_alibi(spec: FlashSpec, ops: FlashOperands) -> bool:
    """Whether the forward kernel's own ALiBi can do it: static positions, nothing else added."""
    dynamic = (
        ops.q_lens, ops.kv_lens, ops.q_segments, ops.q_positions, ops.key_ranges, ops.bias
    )  # fmt: skip
    return (
        ops.alibi_slopes is not None
        and ops.alibi_slopes.shape[0] == 1
        and spec.score_mod is None
        and all(x is None for x in dynamic)
    )


def score(kernels: Any, spec: FlashSpec, ops: FlashOperands, alibi: bool) -> Score | None:
    """Bias, ALiBi (where `alibi`) and score_mod as one modifier; None where there is none."""
    (B, T, N, _), S = ops.q.shape, ops.k.shape[1]
    kinds, arrays = [], []

    def add(kind: str, x: Array) -> int:
        kinds.append(kind)
        arrays.append(x)
        return len(arrays) - 1

    bias = slope = position = None
    if ops.bias is not None:
        kind, x = _loaded(ops.bias, T, S)
        bias = add(kind, x if kind == "tile" else x.astype(jnp.float32))
    if alibi:
        slope = add("scalar", ops.alibi_slopes)
        if ops.q_positions is not None:
            position = add("query", ops.q_positions[:, None])
    parts, first = None, len(arrays)
    if spec.score_mod is not None:
        program = spec.score_mod
        parts = kernels.split(program.jaxpr, True, (B, N, T, S), program.period)
        for kind, x in zip(parts.program.kinds, parts.arrays(ops.score_captured), strict=True):
            add(kind, x)
    if not arrays and parts is None:
        return None

    def modify(x, t, s, *values):
        if bias is not None:
            x = x + values[bias]
        if slope is not None:
            at = t + (spec.query_offset or 0) if position is None else values[position]
            x = x - values[slope] * jnp.abs(at - s).astype(jnp.float32)
        return x if parts is None else parts.program(x, t, s, *values[first:])[0]

    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    types = [jnp.float32 if is_float(x) else jnp.int32 for x in arrays]
    modifier = kernels.Modifier(kernels.scalar_program(modify, kinds, types), tuple(arrays))
    wanted = tuple(i for i, x in enumerate(arrays) if is_float(x))

    def pull(gradients: tuple[Array, ...]) -> dict[str, Any]:
        given, found = dict(zip(wanted, gradients, strict=True)), {}
        if bias is not None:
            found["bias"] = given[bias].reshape(ops.bias.shape).astype(ops.bias.dtype)
        if slope is not None:
            found["alibi_slopes"] = given[slope].reshape(ops.alibi_slopes.shape)
        if parts is not None:
            own = [i for i in wanted if i >= first]
            found["score_captured"] = _to_captured(
                parts, ops.score_captured, [i - first for i in own], [given[i] for i in own]
            )
        return found

    return Score(modifier, wanted, pull)


def _to_captured(
    parts: Any, captured: tuple[Array, ...], places: list[int], gradients: list[Array]
) -> tuple[Any, ...]:
    """Gradients of the captured arrays from those of the loaded ones; None for integers."""
    floats = [i for i, c in enumerate(captured) if jnp.issubdtype(c.dtype, jnp.floating)]

    def loaded(*chosen: Array) -> list[Array]:
        full = list(captured)
        for i, x in zip(floats, chosen, strict=True):
            full[i] = x
        arrays = parts.arrays(full)
        return [arrays[i] for i in places]

    _, pull = jax.vjp(loaded, *[captured[i] for i in floats])
    found = dict(zip(floats, pull(gradients), strict=True))
    return tuple(found.get(i) for i in range(len(captured)))


def mask(kernels: Any, spec: FlashSpec, ops: FlashOperands) -> Any:
    """mask, mask_mod and the block mask's mask_mod as one modifier; None where there is none.

    A block mask of ranges is none: the kernels take those as bounds.
    """
    (B, T, N, _), S = ops.q.shape, ops.k.shape[1]
    kinds, arrays, programs = [], [], []
    if ops.mask is not None:
        kind, x = _loaded(ops.mask, T, S)
        kinds.append(kind)
        arrays.append(x.astype(jnp.bfloat16 if kind == "tile" else jnp.float32))
    for program, captured in (
        (spec.mask_mod, ops.mask_captured),
        (None if ops.key_ranges is not None else spec.block_mask_mod, ops.block_captured),
    ):
        if program is not None:
            parts = kernels.split(program.jaxpr, False, (B, N, T, S), program.period)
            programs.append((parts.program, len(arrays)))
            kinds += parts.program.kinds
            arrays += parts.arrays(captured)
    if not programs and not arrays:
        return None

    def seen(t, s, *values):
        shown = [] if ops.mask is None else [values[0] != 0]
        for program, first in programs:
            shown.append(program(t, s, *values[first : first + len(program.kinds)])[0])
        out = shown[0]
        for more in shown[1:]:
            out = out & more
        return out

    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    types = [jnp.float32 if is_float(x) else jnp.int32 for x in arrays]
    program = kernels.scalar_program(seen, kinds, types, scored=False)
    return kernels.Modifier(program, tuple(arrays))


def blocks(kernels: Any, spec: FlashSpec, ops: FlashOperands) -> Any:
    """The kinds of the block mask's tiles; None without one, and where it is one of ranges."""
    if spec.block_mask is None or ops.key_ranges is not None:
        return None
    return kernels.BlockKinds(ops.block_kinds, *spec.block_mask, ops.q.shape[1], ops.k.shape[1])


def dropout(kernels: Any, spec: FlashSpec, ops: FlashOperands) -> Any:
    """The rate and the word of every query; None without dropout."""
    if not spec.dropout_rate:
        return None
    B, T, N, _ = ops.q.shape
    b, n, t = (jnp.arange(size, dtype=jnp.int32) for size in (B, N, T))
    if spec.batch_period:
        b = b % spec.batch_period
    if spec.dropout_broadcast:
        b, n = b * 0, n * 0
    words = dropout_rows(
        ops.dropout_key[:, None, None, :], b[:, None, None], n[None, :, None], t[None, None, :]
    )
    return kernels.Dropout(spec.dropout_rate, words)
