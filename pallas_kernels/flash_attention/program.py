"""A user's scalar function of one score, split into what a kernel loads and what it computes.

`split` walks the function's jaxpr.  What depends on (b, n), on (b, n, t) or on (b, n, s) alone, any
gather included, is computed outside the kernel, one array each, and loaded by tile; what mixes t
and s, or takes the score, is a small graph of elementwise operations that `Program.on_tile`
evaluates on the tile, 8 columns at a time.

    score_mod = lambda score, b, n, t, s: score - slopes[n] * abs(t - s)
                                                  scalar      tile
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core as jex_core

INDICES = ("b", "n", "t", "s")
KINDS = ("scalar", "query", "key", "tile")  # [b, n], [b, n, T], [b, n, S], [b, n, T, S]


@dataclasses.dataclass(eq=False)
class Node:
    """One value of a traced scalar function: an input (`equation` is None) or an operation."""

    aval: Any
    needs: frozenset[str]
    equation: Any = None
    inputs: tuple[Any, ...] = ()  # Nodes or constants
    output: int = 0
    name: str = ""

    @property
    def scalar(self) -> bool:
        """Whether a kernel could hold it: one number a score."""
        return self.aval.shape == ()

    @property
    def mixed(self) -> bool:
        """Whether it must be computed on the tile."""
        return "score" in self.needs or {"t", "s"} <= self.needs


INLINED = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")


def _body(equation: Any) -> tuple[Any, Sequence[Any]] | None:
    """(jaxpr, constants) of an equation that is a call."""
    if equation.primitive.name not in INLINED:
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    if hasattr(inner, "jaxpr"):
        return inner.jaxpr, inner.consts
    return inner, ()


def _graph(jaxpr: Any, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
    """The outputs of a jaxpr as Nodes, calls inlined."""
    known: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    known.update(zip(jaxpr.invars, args, strict=True))
    read = lambda v: v.val if isinstance(v, jex_core.Literal) else known[v]
    for equation in jaxpr.eqns:
        inputs = tuple(read(v) for v in equation.invars)
        body = _body(equation)
        if body is not None:
            outs = _graph(*body, inputs)
        else:
            nodes = [x for x in inputs if isinstance(x, Node)]
            needs = frozenset().union(*(x.needs for x in nodes))
            outs = [
                Node(v.aval, needs, equation, inputs, i) for i, v in enumerate(equation.outvars)
            ]
        known.update(zip(equation.outvars, outs, strict=True))
    return [read(v) for v in jaxpr.outvars]


def _compute(node: Any, known: dict[int, Any]) -> Any:
    """The value of a Node by JAX itself; `known` maps id(Node) to values."""
    if not isinstance(node, Node):
        return node
    if id(node) not in known:
        e = node.equation
        inputs = [_compute(x, known) for x in node.inputs]
        out = e.primitive.bind(*inputs, **e.primitive.get_bind_params(e.params))
        outs = out if e.primitive.multiple_results else [out]
        known[id(node)] = outs[node.output]
    return known[id(node)]


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """What is left to compute on a tile: outputs of (score, t, s, *values), all of them scalars.

    `kinds` says how each value is indexed.
    """

    outputs: tuple[Any, ...]
    inputs: tuple[Node, ...]  # score (if any), t, s, then the values
    kinds: tuple[str, ...]
    scored: bool

    @functools.cached_property
    def additive(self) -> bool:
        """Whether the score is only added to: its slope is 1."""
        slope = self.slope().outputs[1]
        return not isinstance(slope, Node) and float(slope) == 1.0

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """At scalars, by JAX itself."""
        known = {id(node): x for node, x in zip(self.inputs, args, strict=True)}
        return tuple(_compute(x, known) for x in self.outputs)

    def _traced(self, f: Callable[..., Any]) -> "Program":
        avals = [jax.ShapeDtypeStruct((), x.aval.dtype) for x in self.inputs]
        closed = jax.make_jaxpr(f)(*avals)
        outputs = _graph(closed.jaxpr, closed.consts, self.inputs)
        _check_on_tile(outputs)
        return dataclasses.replace(self, outputs=tuple(outputs))

    def slope(self) -> "Program":
        """Outputs (value, d value / d score)."""

        def f(score, *rest):
            value = lambda score: self(score, *rest)[0]
            return jax.jvp(value, (score,), (jnp.ones_like(score),))

        return self._traced(f)

    def partials(self, which: Sequence[int]) -> "Program":
        """Outputs (value, d value / d value i for i in which)."""
        first = 3 if self.scored else 2

        def f(*args):
            def value(*chosen):
                full = list(args)
                for i, x in zip(which, chosen, strict=True):
                    full[first + i] = x
                return self(*full)[0]

            out, pull = jax.vjp(value, *[args[first + i] for i in which])
            return out, *pull(jnp.ones_like(out))

        return self._traced(f)

    def on_tile(self, score: Any, t: "Index", s: "Index", values: Sequence[Any]) -> tuple[Any, ...]:
        """The outputs on one group of columns; every argument has the group's shape."""
        given = (score,) * self.scored + (t, s, *values)
        known: dict[int, Any] = {id(n): x for n, x in zip(self.inputs, given, strict=True)}
        shape = jnp.shape(t.ints())
        return tuple(_number(_on_tile(x, known), shape) for x in self.outputs)


def scalar_program(
    f: Callable[..., Any], kinds: Sequence[str], dtypes: Sequence[Any], *, scored: bool = True
) -> Program:
    """A `Program` of `f(score?, t, s, *values)` whose values are arrays already.

    >>> Program = scalar_program(lambda x, t, s, slope: x - slope * (t - s), ["scalar"], ["f4"])
    >>> print(Program(jnp.float32(1), jnp.int32(3), jnp.int32(1), jnp.float32(0.25))[0])
    0.5
    """
    index = jax.ShapeDtypeStruct((), jnp.int32)
    values = [jax.ShapeDtypeStruct((), jnp.dtype(d)) for d in dtypes]
    score = [jax.ShapeDtypeStruct((), jnp.float32)] * scored
    closed = jax.make_jaxpr(f)(*score, index, index, *values)
    needs = [*["score"] * scored, "t", "s", *(_needs_of(kind) for kind in kinds)]
    nodes = tuple(
        Node(v.aval, frozenset(n if isinstance(n, tuple) else (n,)), name=str(n))
        for v, n in zip(closed.jaxpr.invars, needs, strict=True)
    )
    outputs = _graph(closed.jaxpr, closed.consts, nodes)
    _check_on_tile(outputs)
    return Program(tuple(outputs), nodes, tuple(kinds), scored)


def _needs_of(kind: str) -> tuple[str, ...]:
    return {
        "scalar": (),
        "query": ("t",),
        "key": ("s",),
        "tile": ("t", "s"),
    }[kind]


# --- splitting -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
    """`program` for the tile, and `arrays(captured)`: what it loads."""

    program: Program
    arrays: Callable[[Sequence[jax.Array]], tuple[jax.Array, ...]]


def split(jaxpr: Any, scored: bool, sizes: tuple[int, int, int, int], period: int = 0) -> Split:
    """Split a scalar function `f(score?, b, n, t, s)` whose captured arrays are its constants.

    `sizes` are those of b, n, t and s; with `period` the batch index wraps.

    Raises:
      NotImplementedError: an array is indexed by a mix of t and s, or the tile would need an
        operation that the kernels lack.

    >>> doc = jnp.array([0, 0, 1])
    >>> traced = jax.make_jaxpr(lambda b, n, t, s: doc[t] == doc[s])(*[jnp.int32(0)] * 4)
    >>> parts = split(traced.jaxpr, False, (1, 1, 3, 3))
    >>> parts.program.kinds, [x.tolist() for x in parts.arrays([doc])]
    (('query', 'key'), [[[[0, 0, 1]]], [[[0, 0, 1]]]])
    """
    names = ("score",) * scored + INDICES
    nodes = [Node(v.aval, frozenset([n]), name=n) for v, n in zip(jaxpr.invars, names, strict=True)]
    captured = [Node(v.aval, frozenset(), name="captured") for v in jaxpr.constvars]
    outputs = _graph(jaxpr, captured, nodes)
    score, (b, n, t, s) = nodes[:scored], nodes[scored:]
    loaded: list[Node] = []
    new: dict[int, Any] = {id(x): x for x in (*score, t, s)}

    def keep(node: Any) -> Any:
        """The node on the tile; what need not be computed there becomes an input."""
        if not isinstance(node, Node):
            return node
        if id(node) in new:
            return new[id(node)]
        if node.mixed or _affine_node(node):
            inputs = tuple(keep(x) for x in node.inputs)
            fresh = Node(node.aval, node.needs, node.equation, inputs, node.output)
        else:
            if not node.scalar:
                raise NotImplementedError(
                    f"an array of shape {node.aval.shape} meets a mix of t and s; pass it as bias"
                )
            loaded.append(node)
            fresh = Node(jax.ShapeDtypeStruct((), _loaded_dtype(node.aval.dtype)), node.needs)
            if node.aval.dtype == jnp.bool_:
                fresh = _as_bool(fresh)
        new[id(node)] = fresh
        return fresh

    kept = tuple(keep(x) for x in outputs)
    _check_on_tile(kept)
    kinds = tuple(_kind(x) for x in loaded)
    values = [new[id(x)] for x in loaded]
    values = [x.inputs[0] if x.equation is not None else x for x in values]
    program = Program(kept, (*score, t, s, *values), kinds, scored)

    def arrays(consts: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        fixed = {id(node): x for node, x in zip(captured, consts, strict=True)}
        return tuple(_array(x, fixed, (b, n, t, s), sizes, period) for x in loaded)

    return Split(program, arrays)


def _affine_node(node: Any) -> bool:
    """Whether a value is t or s, or made of one and small constants: cheaper computed than read."""
    if not isinstance(node, Node):
        return abs(float(node)) < SMALL
    if node.equation is None:
        return node.name in ("t", "s")
    return (
        node.scalar
        and node.aval.dtype == jnp.int32
        and node.equation.primitive.name in AFFINE
        and all(_affine_node(x) for x in node.inputs)
    )


def _kind(node: Node) -> str:
    return "query" if "t" in node.needs else "key" if "s" in node.needs else "scalar"


def _loaded_dtype(dtype: Any) -> Any:
    """Floats travel as f32, the rest as i32."""
    return jnp.dtype("float32" if jnp.issubdtype(dtype, jnp.floating) else "int32")


def _as_bool(node: Node) -> Node:
    """`node != 0`: bools travel as integers."""
    closed = jax.make_jaxpr(lambda x: x != 0)(jnp.int32(0))
    (out,) = _graph(closed.jaxpr, closed.consts, [node])
    return out


def _array(
    node: Node, fixed: dict[int, Any], indices: Sequence[Node], sizes: Sequence[int], period: int
) -> jax.Array:
    """A loaded value at all its indices: `[b or 1, n or 1]`, then T or S where it needs them."""
    axes = [i for i, name in enumerate(INDICES) if name in node.needs]

    def at(*values: jax.Array) -> Any:
        known = dict(fixed)
        known.update((id(indices[i]), x) for i, x in zip(axes, values, strict=True))
        return jnp.asarray(_compute(node, known))

    f = at
    for place in reversed(range(len(axes))):
        f = jax.vmap(f, tuple(0 if i == place else None for i in range(len(axes))))
    wrap = lambda i, x: x % period if INDICES[i] == "b" and period else x
    x = f(*(wrap(i, jnp.arange(sizes[i], dtype=jnp.int32)) for i in axes))
    shape = [sizes[i] if i in axes else 1 for i in (0, 1)]
    rest = [sizes[i] for i in (2, 3) if i in axes]
    return x.astype(_loaded_dtype(x.dtype)).reshape(*shape, *rest)


# --- on the tile ---------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Index:
    """An integer made of t, s and small numbers: kept as i32 and, where asked for, as f32.

    Both are exact below 2^24, and an f32 difference of two indices that were converted once is
    cheaper than converting every difference.
    """

    ints: Callable[[], Any]
    floats: Callable[[], Any]


def index(ints: Any, offset: int = 0, floats: Any = None) -> Index:
    """The index `ints + offset`; floats is `ints` as f32 where that is at hand."""
    shifted = functools.cache(lambda: ints + offset if offset else ints)
    if floats is None:
        return Index(shifted, functools.cache(lambda: shifted().astype(jnp.float32)))
    return Index(shifted, functools.cache(lambda: floats + float(offset) if offset else floats))


SMALL = 1 << 20  # a constant that may be added to an index without leaving 2^24
AFFINE = {
    "add": operator.add,
    "sub": operator.sub,
    "max": jnp.maximum,
    "min": jnp.minimum,
    "neg": operator.neg,
    "abs": jnp.abs,
}
BINARY = {
    **{name: AFFINE[name] for name in ("add", "sub", "max", "min")},
    "add_any": operator.add,
    "mul": operator.mul,
    "div": lax.div,
    "rem": lax.rem,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
    "shift_left": lax.shift_left,
    "shift_right_logical": lax.shift_right_logical,
    "shift_right_arithmetic": lax.shift_right_arithmetic,
}
UNARY = {
    "neg": operator.neg,
    "abs": jnp.abs,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "tanh": jnp.tanh,
    "logistic": lambda x: 1.0 / (1.0 + jnp.exp(-x)),
    "log": jnp.log,
    "rsqrt": lax.rsqrt,
    "sqrt": lambda x: x * lax.rsqrt(x),
    "sin": jnp.sin,
    "cos": jnp.cos,
    "square": lambda x: x * x,
    "one_minus_square": lambda x: 1.0 - x * x,
    "copy": lambda x: x,
    "copy_p": lambda x: x,
    "stop_gradient": lambda x: x,
}
OTHER = (
    "integer_pow",
    "convert_element_type",
    "select_n",
    "not",
    "sign",
    "clamp",
    "broadcast_in_dim",
    "reshape",
    "squeeze",
    "pvary",
    "pcast",
)
WIDE = (jnp.int32, jnp.uint32, jnp.float32, jnp.bool_)


def _check_on_tile(outputs: Sequence[Any]) -> None:
    """Raises NotImplementedError for a node that `_on_tile` could not compute."""
    seen: set[int] = set()

    def visit(node: Any) -> None:
        if not isinstance(node, Node) or id(node) in seen:
            return
        seen.add(id(node))
        if node.equation is None:
            return
        name = node.equation.primitive.name
        if not node.scalar:
            raise NotImplementedError(f"{name} of shape {node.aval.shape} for every score")
        if name not in BINARY and name not in UNARY and name not in OTHER:
            raise NotImplementedError(f"the kernels cannot compute {name} for every score")
        for x in node.inputs:
            visit(x)

    for x in outputs:
        visit(x)


def _number(x: Any, shape: Any = None) -> Any:
    """A group of numbers, from an index or a constant as well."""
    if isinstance(x, Index):
        return x.ints()
    if shape is not None and jnp.shape(x) == ():
        return jnp.full(shape, x)
    return x


def _tile_dtype(dtype: Any) -> Any:
    """The type in which a tile computes: narrow floats as f32, narrow integers as i32."""
    dtype = jnp.dtype(dtype)
    if dtype in WIDE:
        return dtype
    return _loaded_dtype(dtype)


def _constant(x: Any) -> Any:
    x = jnp.asarray(x)
    return x.astype(_tile_dtype(x.dtype))


def _on_tile(node: Any, known: dict[int, Any]) -> Any:
    """The value of a Node on a group of columns: an array, an Index or a scalar constant."""
    if not isinstance(node, Node):
        return _constant(node) if not isinstance(node, Index) else node
    if id(node) not in known:
        name = node.equation.primitive.name
        inputs = [_on_tile(x, known) for x in node.inputs]
        known[id(node)] = _operation(name, node, inputs)
    return known[id(node)]


def _operation(name: str, node: Node, inputs: list[Any]) -> Any:
    if name in AFFINE and any(isinstance(x, Index) for x in inputs):
        found = _affine(name, inputs, node.inputs)
        if found is not None:
            return found
    if name == "convert_element_type":
        return _convert(inputs[0], _tile_dtype(node.equation.params["new_dtype"]))
    shape = next((jnp.shape(_number(x)) for x in inputs if jnp.shape(_number(x))), ())
    inputs = [_number(x) for x in inputs]
    if name in BINARY:
        return BINARY[name](*_same_shape(inputs, shape))
    if name in UNARY:
        return UNARY[name](inputs[0])
    if name == "integer_pow":
        return _power(inputs[0], node.equation.params["y"])
    if name == "not":
        (x,) = inputs
        return x ^ jnp.full(shape, True if x.dtype == jnp.bool_ else -1, x.dtype)
    if name == "sign":
        (x,) = inputs
        one, zero = jnp.full(shape, 1, x.dtype), jnp.full(shape, 0, x.dtype)
        return jnp.where(x > zero, one, jnp.where(x < zero, -one, zero))
    if name == "select_n":
        return _select(_same_shape(inputs, shape))
    if name == "clamp":
        low, x, high = _same_shape(inputs, shape)
        return jnp.minimum(jnp.maximum(x, low), high)
    return inputs[0]  # a change of shape between scalars, or of nothing that a tile has


def _affine(name: str, inputs: list[Any], nodes: Sequence[Any]) -> Index | None:
    """The operation in both forms, where every input is an index or a small constant."""
    forms = []
    for x, node in zip(inputs, nodes, strict=True):
        if isinstance(x, Index):
            forms.append(x)
        elif not isinstance(node, Node) and abs(int(node)) < SMALL:
            number = int(node)
            forms.append(Index(lambda n=number: n, lambda n=number: float(n)))
        else:
            return None
    f = AFFINE[name]
    return Index(
        functools.cache(lambda: f(*(x.ints() for x in forms))),
        functools.cache(lambda: f(*(x.floats() for x in forms))),
    )


def _convert(x: Any, dtype: Any) -> Any:
    if isinstance(x, Index):
        return x.floats() if dtype == jnp.float32 else x.ints().astype(dtype)
    if x.dtype == jnp.bool_ and dtype != jnp.bool_:
        one = jnp.full(jnp.shape(x), 1, dtype)
        return jnp.where(x, one, jnp.zeros_like(one))
    if dtype == jnp.bool_ and x.dtype != jnp.bool_:
        return x != jnp.zeros_like(x)
    return x.astype(dtype)


def _same_shape(inputs: Sequence[Any], shape: tuple[int, ...]) -> list[Any]:
    return [jnp.full(shape, x) if jnp.shape(x) != shape else x for x in inputs]


def _select(inputs: list[Any]) -> Any:
    which, *cases = inputs
    if which.dtype == jnp.bool_:
        if cases[0].dtype == jnp.bool_:
            return (which & cases[1]) | ((which ^ jnp.full(which.shape, True)) & cases[0])
        return jnp.where(which, cases[1], cases[0])
    out = cases[-1]
    for i in reversed(range(len(cases) - 1)):
        out = jnp.where(which <= i, cases[i], out)
    return out


def _power(x: Any, y: int) -> Any:
    if y < 0:
        return 1.0 / _power(x, -y)
    out, square = None, x
    while y:
        if y & 1:
            out = square if out is None else out * square
        square, y = square * square, y >> 1
    return jnp.full(jnp.shape(x), 1, x.dtype) if out is None else out
