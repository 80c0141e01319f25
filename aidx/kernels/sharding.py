"""How a kernel is split over the devices of a jitted program: one rule in einsum's notation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from ..ops import registry as ops
from ..ops._loops import _varying

type Axes = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class ShardingRule:
    """`"... d, ... d, d -> ... d"`: the factor of every axis of every operand and output.

    Axes that share a name are split alike; `...` stands for any number of leading axes.  A kernel
    on a shard must compute the shard of its outputs, so a factor that is missing in an output, or
    named in `replicated`, is never split.  Where an operand lacks a factor, its gradient is summed
    over the devices that split it.

    Raises:
      ValueError: a rule that does not read as `operands -> outputs`.

    >>> ShardingRule("... d, d -> ... d", replicated=("d",)).operands
    (('...', 'd'), ('d',))
    """

    rule: str
    replicated: tuple[str, ...] = ()

    def __post_init__(self):
        if self.rule.count("->") != 1:
            raise ValueError(f"a sharding rule reads 'operands -> outputs', not {self.rule!r}")
        known = {factor for axes in (*self.operands, *self.outputs) for factor in axes}
        for factor in self.replicated:
            if factor not in known:
                raise ValueError(f"{factor!r} is no factor of {self.rule!r}")
        for axes in (*self.operands, *self.outputs):
            if len(set(axes)) != len(axes) or "..." in axes[1:]:
                raise ValueError(f"{' '.join(axes)!r} in {self.rule!r} repeats a factor")

    @property
    def operands(self) -> tuple[Axes, ...]:
        """The factors of each operand."""
        return _factors(self.rule.split("->")[0])

    @property
    def outputs(self) -> tuple[Axes, ...]:
        """The factors of each output."""
        return _factors(self.rule.split("->")[1])


def _factors(side: str) -> tuple[Axes, ...]:
    return tuple(tuple(part.split()) for part in side.split(","))


def partitioned(rule: ShardingRule | None, call: ops.Call, args: tuple[Any, ...]) -> Any:
    """`ops.dispatch(call, *args)`, split by `rule` where the compiler splits the program.

    >>> table = (ops.Implementation("doc_same", "jnp", lambda spec, operands: operands[0]),)
    >>> call = ops.Call("doc_same", ("jnp",), None, table=table)
    >>> partitioned(None, call, ((3.0,),))
    Array(3., dtype=float32, weak_type=True)
    """
    leaves, tree = jax.tree.flatten(args)
    # Inside a shard_map the program is split already.
    if rule is None or any(_varying(x) for x in leaves):
        return ops.dispatch(call, *args)
    run = lambda *leaves: jax.tree.leaves(ops.dispatch(call, *jax.tree.unflatten(tree, leaves)))
    closed, shapes = jax.make_jaxpr(lambda *a: ops.dispatch(call, *a), return_shape=True)(*args)
    if closed.effects:  # callbacks (an interpreted kernel) cannot be split
        return ops.dispatch(call, *args)
    ins, outs = _axes_of(rule, call, args, shapes)
    split = custom_partitioning(run)
    split.def_partition(
        partition=_Partition(rule, call, run, ins, outs),
        sharding_rule=_text(ins, outs),
        need_replication_factors=_in_order(_whole(rule, ins, outs), (*ins, *outs)),
    )
    return jax.tree.unflatten(jax.tree.structure(shapes), split(*leaves))


@dataclasses.dataclass(frozen=True)
class _Partition:
    """The partitioner's callback: (mesh, shards of args, shards of results) -> a local program."""

    rule: ShardingRule
    call: ops.Call
    run: Any
    ins: tuple[Axes, ...]
    outs: tuple[Axes, ...]

    def __call__(self, mesh: Any, arg_shapes: Any, result_shapes: Any) -> Any:
        given = [x.sharding for x in (*arg_shapes, *jax.tree.leaves(result_shapes))]
        placed = _place((*self.ins, *self.outs), given, _whole(self.rule, self.ins, self.outs))
        shard = lambda axes: NamedSharding(mesh, P(*(placed.get(f) for f in axes)))

        def local(*leaves: Any) -> Any:
            results = self.run(*leaves)
            if self.call.direction != "backward":
                return results
            # The gradient of what is whole on every device is the sum of what each device found.
            return [
                jax.lax.psum(x, names) if (names := _missing(axes, placed)) else x
                for x, axes in zip(results, self.outs, strict=True)
            ]

        return mesh, local, [shard(a) for a in self.outs], tuple(shard(a) for a in self.ins)


def _missing(axes: Axes, placed: dict[str, Any]) -> tuple[str, ...]:
    names: list[str] = []
    for factor, mesh_axes in placed.items():
        if factor not in axes:
            names += [mesh_axes] if isinstance(mesh_axes, str) else list(mesh_axes)
    return tuple(names)


def _place(axes: Any, shardings: list[Any], whole: set[str]) -> dict[str, Any]:
    """The mesh axes of each factor; a factor keeps the first, a mesh axis serves one factor."""
    placed: dict[str, Any] = {}
    taken: set[str] = set()
    for factors, sharding in zip(axes, shardings, strict=True):
        spec = (*sharding.spec, *[None] * (len(factors) - len(sharding.spec)))
        for factor, names in zip(factors, spec, strict=True):
            flat = {names} if isinstance(names, str) else set(names or ())
            if flat and factor not in placed and factor not in whole and not flat & taken:
                placed[factor] = names
                taken |= flat
    return placed


def _axes_of(rule: ShardingRule, call: ops.Call, args: Any, results: Any) -> Any:
    """The factors of the leaves of args and results, vmapped axes included."""
    spec: Any = call.spec
    operands = jax.tree.leaves(args[0])
    if len(operands) != len([x for x in args[0] if x is not None]):
        raise ValueError(f"the sharding rule {rule.rule!r} takes arrays, not pytrees of arrays")
    levels = len(spec.batched)
    given = [axes for axes, x in zip(rule.operands, args[0], strict=True) if x is not None]
    inputs = []
    for i, (axes, x) in enumerate(zip(given, operands, strict=True)):
        lead = tuple(f"vmapped{n}" for n in reversed(range(levels)) if spec.batched[n][i])
        inputs.append((*lead, *_expand(axes, x.ndim - len(lead), rule)))
    all_levels = tuple(f"vmapped{n}" for n in reversed(range(levels)))
    outputs = lambda leaves: tuple(
        (*all_levels, *_expand(axes, x.ndim - levels, rule))
        for axes, x in zip(rule.outputs, leaves, strict=True)
    )
    if call.direction != "backward":
        return tuple(inputs), outputs(jax.tree.leaves(results))
    saved = outputs(jax.tree.leaves(args[1]))
    cotangents = tuple(
        axes
        for axes, c in zip(
            saved, jax.tree.leaves(args[2], is_leaf=lambda x: x is None), strict=True
        )
        if c is not None
    )
    # Gradients have every vmapped axis, whether or not their operand has.
    own = iter(axes[sum(f.startswith("vmapped") for f in axes) :] for axes in inputs)
    placed = [next(own) if x is not None else () for x in args[0]]
    gradients = tuple(
        (*all_levels, *axes) for axes, g in zip(placed, results, strict=True) if g is not None
    )
    return (*inputs, *saved, *cotangents), gradients


def _expand(axes: Axes, ndim: int, rule: ShardingRule) -> Axes:
    dots = "..." in axes
    lead = ndim - len(axes) + dots
    if lead < 0 or (lead and not dots):
        raise ValueError(f"{' '.join(axes)!r} of {rule.rule!r} does not fit {ndim} axes")
    return (*(f"lead{lead - i}" for i in range(lead)), *axes[dots:])


def _whole(rule: ShardingRule, ins: tuple[Axes, ...], outs: tuple[Axes, ...]) -> set[str]:
    """Factors that are never split: the named ones, and those that some output lacks."""
    kept = set(rule.replicated)
    found = {factor for axes in (*ins, *outs) for factor in axes}
    if "..." in kept:
        kept |= {factor for factor in found if factor.startswith("lead")}
    for axes in rule.outputs:
        leading = "..." in axes
        kept |= {f for f in found if not f.startswith(("vmapped", "lead")) and f not in axes}
        kept |= set() if leading else {f for f in found if f.startswith("lead")}
    return kept & found


def _in_order(factors: set[str], axes: tuple[Axes, ...]) -> Axes:
    """Factors as they first appear, which is how the compiler wants them."""
    return tuple(dict.fromkeys(f for own in axes for f in own if f in factors))


def _text(ins: tuple[Axes, ...], outs: tuple[Axes, ...]) -> str:
    side = lambda operands: ", ".join(" ".join(axes) for axes in operands)
    return f"{side(ins)} -> {side(outs)}"
