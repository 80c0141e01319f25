"""A jaxpr as TensorBoard's graph: one node an equation, grouped by `jax.named_scope`."""

import collections
import re
from typing import Any

from tensorboardX.proto.attr_value_pb2 import AttrValue  # pyright: ignore
from tensorboardX.proto.graph_pb2 import GraphDef  # pyright: ignore
from tensorboardX.proto.node_def_pb2 import NodeDef  # pyright: ignore
from tensorboardX.proto.tensor_shape_pb2 import TensorShapeProto  # pyright: ignore
from tensorboardX.proto.versions_pb2 import VersionDef  # pyright: ignore

NESTED = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint")


def graph_of(closed: Any) -> GraphDef:
    """The graph of a closed jaxpr; calls are opened, loops are one node.

    >>> import jax
    >>> graph = graph_of(jax.make_jaxpr(lambda x: jax.numpy.sin(x) * 2.0)(1.0))
    >>> [(node.name, node.op) for node in graph.node]
    [('in_0', 'Input'), ('sin', 'sin'), ('mul', 'mul'), ('out_0', 'Output')]
    """
    nodes: list[NodeDef] = []
    counts: collections.Counter = collections.Counter()

    def add(op: str, scope: str, inputs: list[str], aval: Any) -> str:
        base = f"{scope}/{op}" if scope else op
        counts[base] += 1
        name = base if counts[base] == 1 else f"{base}_{counts[base] - 1}"
        shape = TensorShapeProto(
            dim=[TensorShapeProto.Dim(size=int(n)) for n in getattr(aval, "shape", ())]
        )
        attributes = {
            "_output_shapes": AttrValue(list=AttrValue.ListValue(shape=[shape])),
            "dtype": AttrValue(s=str(getattr(aval, "dtype", "")).encode()),
        }
        nodes.append(NodeDef(name=name, op=op, input=inputs, attr=attributes))
        return name

    def walk(jaxpr: Any, names: dict, outer: str) -> list[str]:
        read = lambda v: "" if hasattr(v, "val") else names.get(v, "")  # a literal has a value
        for equation in jaxpr.eqns:
            scope = "/".join(p for p in (outer, clean(equation.source_info.name_stack)) if p)
            inputs = [name for name in map(read, equation.invars) if name]
            inner = opened(equation)
            if inner is not None and len(inner.invars) == len(equation.invars):
                given = {v: read(w) for v, w in zip(inner.invars, equation.invars, strict=True)}
                outputs = walk(inner, given, scope)
                names.update(zip(equation.outvars, outputs, strict=True))
                continue
            aval = equation.outvars[0].aval if equation.outvars else None
            name = add(equation.primitive.name, scope, inputs, aval)
            names.update(dict.fromkeys(equation.outvars, name))
        return [read(v) for v in jaxpr.outvars]

    inputs = {v: f"in_{i}" for i, v in enumerate(closed.jaxpr.invars)}
    for v, name in inputs.items():
        add(name, "", [], v.aval)
        nodes[-1].op = "Input"
    outputs = walk(closed.jaxpr, dict(inputs), "")
    for i, (name, v) in enumerate(zip(outputs, closed.jaxpr.outvars, strict=True)):
        add(f"out_{i}", "", [name] if name else [], v.aval)
        nodes[-1].op = "Output"
    return GraphDef(node=nodes, versions=VersionDef(producer=22))


def opened(equation: Any) -> Any:
    """The jaxpr that a call runs once, or None.

    >>> import jax
    >>> opened(jax.make_jaxpr(jax.jit(lambda x: x + 1))(1.0).eqns[0]) is not None
    True
    """
    if equation.primitive.name not in NESTED:
        return None
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = equation.params.get(name)
        if inner is not None:
            return getattr(inner, "jaxpr", inner)
    return None


def clean(stack: Any) -> str:
    """A name stack as a path that TensorBoard accepts.

    >>> clean("jvp(layer 0)/attention")
    'jvp_layer_0/attention'
    """
    parts = [re.sub(r"[^A-Za-z0-9_.\\-]+", "_", p).strip("_") for p in str(stack).split("/")]
    return "/".join(p for p in parts if p)
