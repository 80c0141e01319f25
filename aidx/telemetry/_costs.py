"""What a program has to do at least, by scope: operations of its matmuls and bytes that it moves.

XLA's own analysis counts the body of a loop once and knows nothing of a kernel; a jaxpr has the
length of every scan, and the kernels of aidx are one equation each, whose operations follow from
shapes (`register_cost`).
"""

import collections
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ._scopes import Path, scope_path

DISPATCH = "aidx_dispatch"  # the equation of an op whose kernel is chosen at lowering


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations and bytes of a scope's equations."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class Peak:
    """What a device does at best: dense bf16 FLOP/s, and bytes/s of its memory."""

    flops: float
    bytes: float


# Of the makers' data sheets, without sparsity.
PEAKS = {
    "H200": Peak(989.4e12, 4.8e12),
    "H100": Peak(989.4e12, 3.35e12),
    "GH200": Peak(989.4e12, 4.0e12),
    "A100": Peak(312e12, 2.039e12),
    "L40S": Peak(362e12, 0.864e12),
    "L4": Peak(121e12, 0.3e12),
}


def device_peak(kind: str) -> Peak | None:
    """The peak of a device by its `device_kind`; None where it is not known (a CPU).

    >>> device_peak("NVIDIA H200").bytes, device_peak("cpu")
    (4800000000000.0, None)
    """
    words = kind.replace("-", " ").split()
    return next((PEAKS[name] for name in PEAKS if name in words), None)


type Rule = Callable[[Any, tuple, Any], Cost]

_rules: dict[str, Rule] = {}


def register_cost(op: str, rule: Rule) -> None:
    """Say what a call of an op of `aidx.ops.registry` (a custom kernel's, too) costs.

    Args:
      op: its name.
      rule: `rule(call, args, outputs) -> Cost`, of the `Call` (`call.spec`, `call.direction`) and
        the shapes of its arguments and outputs.

    Raises:
      ValueError: there is a rule of that name.

    >>> register_cost("doc_twice", lambda call, args, outputs: Cost(flops=args[0].size))
    >>> register_cost("doc_twice", print)
    Traceback (most recent call last):
    ValueError: the cost of 'doc_twice' is registered
    """
    if op in _rules:
        raise ValueError(f"the cost of {op!r} is registered")
    _rules[op] = rule


def flash_cost(call: Any, args: tuple, outputs: Any) -> Cost:
    """Of flash attention: `2 (H + Hv)` operations per head and pair that the mask shows, and
    `6 H + 4 Hv` backward (five matmuls); packed documents are counted as one."""
    q, k, v = args[0].q, args[0].k, args[0].v
    B, T, N, H = q.shape
    S, Hv = k.shape[1], v.shape[-1]
    spec = call.spec
    pairs = visible_pairs(T, S, spec.left, spec.right, spec.query_offset)
    a_pair = 6 * H + 4 * Hv if call.direction == "backward" else 2 * (H + Hv)
    return Cost(float(B * N * pairs * a_pair), array_bytes((args, outputs)))


def paged_cost(call: Any, args: tuple, outputs: Any) -> Cost:
    """Of paged attention with every table full: what its bounds allow, not what a batch holds."""
    T, N, H = args[0].q.shape
    K, size = args[0].k_pool.shape[1:3]
    Hv = args[0].v_pool.shape[-1]
    R, M = args[0].block_tables.shape
    keys = min(M * size, call.spec.window or M * size)
    item = args[0].k_pool.dtype.itemsize
    moved = R * keys * K * (H + Hv) * item + array_bytes((args[0].q, outputs))
    return Cost(2.0 * T * N * keys * (H + Hv), float(moved))


register_cost("flash_attention", flash_cost)
register_cost("paged_attention", paged_cost)


def visible_pairs(
    T: int, S: int, left: int | None, right: int | None, offset: int | None = None
) -> int:
    """How many of `T x S` pairs a mask shows: a query at p sees the keys p - left .. p + right.

    >>> visible_pairs(4, 4, None, 0), visible_pairs(4, 4, None, None), visible_pairs(4, 4, 1, 0)
    (10, 16, 7)
    """
    p = np.arange(T) + (S - T if offset is None else offset)
    first = np.zeros(T, int) if left is None else np.clip(p - left, 0, S)
    last = np.full(T, S) if right is None else np.clip(p + right + 1, 0, S)
    return int(np.maximum(last - first, 0).sum())


def array_bytes(tree: Any) -> float:
    """Bytes of all arrays, or shapes of arrays, in a tree.

    >>> array_bytes([np.zeros((2, 3), np.float32), None])
    24.0
    """
    leaves = [x for x in jax.tree.leaves(tree) if hasattr(x, "dtype") and hasattr(x, "shape")]
    sizes = (math.prod(x.shape) * getattr(x.dtype, "itemsize", 0) for x in leaves)
    return float(sum(sizes))


def scope_costs(function: Callable, *args: Any) -> dict[Path, Cost]:
    """What one call of a function costs, by scope, of its jaxpr.

    Counted are matmuls, convolutions, and the attention of aidx and registered kernels by formula
    (`register_cost`): their operations, and the bytes of their operands and results.  A scan's body
    counts as often as it runs, a `while` once, of branches the most expensive.

    Args:
      function: what is compiled; paths are those of its program.
      args: its arguments; `ShapeDtypeStruct`s will do.

    >>> def f(x):
    ...     with jax.named_scope("mm"): return x @ x
    >>> scope_costs(f, np.ones((4, 4), np.float32))[("mm",)].flops
    128.0
    """
    found = jaxpr_costs(jax.make_jaxpr(function)(*args).jaxpr, "")[0]
    return {path: Cost(*total) for path, total in found.items()}


type Totals = dict[Path, list[float]]


def jaxpr_costs(jaxpr: Any, outer: str) -> tuple[Totals, bool]:
    """(costs by scope, whether a kernel by formula is among them) of a jaxpr."""
    found: Totals = collections.defaultdict(lambda: [0.0, 0.0])
    formula = False
    for equation in jaxpr.eqns:
        stack = "/".join(p for p in (outer, str(equation.source_info.name_stack)) if p)
        own = equation_cost(equation)
        if own is not None and equation.primitive.name == DISPATCH:
            call = equation.params["call"]  # a kernel is a scope of its own
            stack += f"/{call.op}_{'bwd' if call.direction == 'backward' else 'fwd'}"
        if own is not None:
            total = found[scope_path(f"{stack}/op" if stack else "jit(f)/op")]
            total[0] += own.flops
            total[1] += own.bytes
            formula |= equation.primitive.name == DISPATCH
            continue
        inner = [jaxpr_costs(body, stack) for body in bodies(equation)]
        if equation.primitive.name == "cond":
            # A kernel's branch stands for the op on every platform.
            rank = lambda one: (one[1], sum(t[0] for t in one[0].values()))
            inner = [max(inner, key=rank)]
        times = runs(equation)
        for totals, has_formula in inner:
            formula |= has_formula
            for path, (flops, moved) in totals.items():
                found[path][0] += times * flops
                found[path][1] += times * moved
    return found, formula


def runs(equation: Any) -> float:
    """How often an equation's body runs."""
    if equation.primitive.name == "scan":
        return equation.params["length"]
    grid = getattr(equation.params.get("grid_mapping"), "grid", ())
    return math.prod(n for n in grid if isinstance(n, int))


def bodies(equation: Any) -> list[Any]:
    """The jaxprs that an equation runs."""
    found = []
    for value in equation.params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            body = getattr(one, "jaxpr", one)
            if hasattr(body, "eqns"):
                found.append(body)
    return found


def equation_cost(equation: Any) -> Cost | None:
    """The cost of an equation that is counted itself; None for one whose bodies are."""
    name, params = equation.primitive.name, equation.params
    ins, outs = [v.aval for v in equation.invars], [v.aval for v in equation.outvars]
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        inner = math.prod(ins[0].shape[i] for i in contract)
        return Cost(2.0 * inner * outs[0].size, array_bytes((ins, outs)))
    if name == "conv_general_dilated":
        features = ins[1].shape[params["dimension_numbers"].rhs_spec[0]]
        return Cost(2.0 * outs[0].size * ins[1].size / features, array_bytes((ins, outs)))
    estimate = params.get("cost_estimate")
    if estimate is not None:  # of a Pallas kernel
        return Cost(float(estimate.flops), float(estimate.bytes_accessed))
    if name == DISPATCH:
        rule = _rules.get(params["call"].op)
        if rule is None:
            return Cost(0.0, array_bytes((ins, outs)))
        return rule(params["call"], jax.tree.unflatten(params["in_tree"], ins), outs)
    return None
