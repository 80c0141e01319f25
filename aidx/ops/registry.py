"""One rule for choosing among the implementations of an op: `implementation=None | name | names`.

Every op has an ordered table.  An implementation that cannot do a case raises `NotImplementedError`
and the next one is tried; if all fail, an `ExceptionGroup` says why each did.  An implementation
tied to a platform (a GPU kernel) is chosen when the program is *lowered*, not when it is traced:
the same trace lowered for CUDA on a machine without a GPU takes the kernel, and tracing on a CPU
never pays for tracing the kernel.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir
from jax.sharding import get_abstract_mesh
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import func

from . import _kernel_store, autotune
from ._loops import one_by_one
from ._platform import platform_of as platform_of

type ImplementationChoice = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute `op`.

    `forward(spec, operands)` returns the op's outputs; `spec` is hashable, `operands` a pytree of
    arrays.  `backward(spec, operands, outputs, cotangents)` returns the cotangent of `operands`
    (None where there is none); it may rely on outputs made by its own `forward`.  `platforms` are
    XLA's names (`cuda`, `rocm`, `cpu`); empty means all.
    """

    op: str
    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any] | None = None
    platforms: tuple[str, ...] = ()

    def runs_on(self, platform: str | None) -> bool:
        """Whether it may be lowered for `platform` (None: a platform nobody names)."""
        return not self.platforms or platform in self.platforms


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Why an implementation is or is not taken: `reason` is empty when it could do the case.

    `configs` are the configurations that it would run in, each with where that comes from.
    """

    op: str
    name: str
    platforms: tuple[str, ...]
    chosen: bool
    reason: str
    configs: tuple[autotune.Choice, ...] = ()


_TABLES: dict[str, tuple[Implementation, ...]] = {}
_PREPARE: dict[str, Callable[..., tuple[Hashable, Any]]] = {}
_PROVIDERS: dict[str, Callable[[], tuple[Implementation, ...]]] = {}


def register(
    op: str,
    name: str,
    *,
    backward: Callable[..., Any] | None = None,
    platforms: Sequence[str] = (),
    before: str | None = None,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator that appends `forward` to the table of `op`, or puts it in front of `before`; the
    order of the table is the order of preference.

    Raises:
      ValueError: the op has an implementation of that name already, or none named `before`.

    >>> @register("doc_double", "xla")
    ... def double(spec, operands):
    ...     return operands * 2
    >>> [i.name for i in implementations("doc_double")]
    ['xla']
    """

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        if op in _PROVIDERS:
            raise ValueError(f"{op} is a custom kernel: add to it with aidx.kernels.register")
        entry = Implementation(op, name, forward, backward, tuple(platforms))
        _TABLES[op] = with_entry(_TABLES.get(op, ()), entry, before)
        return forward

    return decorate


def with_entry(
    table: tuple[Implementation, ...], entry: Implementation, before: str | None
) -> tuple[Implementation, ...]:
    """`table` with `entry` in front of the implementation named `before` (None: at the end).

    Raises:
      ValueError: an implementation of that name is there already, or none named `before`.

    >>> old, new = Implementation("op", "old", abs), Implementation("op", "new", abs)
    >>> [i.name for i in with_entry((old,), new, before="old")]
    ['new', 'old']
    """
    names = [other.name for other in table]
    if entry.name in names:
        raise ValueError(f"{entry.op} has an implementation named {entry.name!r} already")
    if before is not None and before not in names:
        raise ValueError(f"{entry.op} has no implementation {before!r}; it has {names}")
    at = len(table) if before is None else names.index(before)
    return (*table[:at], entry, *table[at:])


def register_door(op: str, prepare: Callable[..., tuple[Hashable, Any]]) -> None:
    """Tell `explain` how the public arguments of `op` become `(spec, operands)`."""
    _PREPARE[op] = prepare


def register_op(
    op: str,
    table: Callable[[], tuple[Implementation, ...]],
    prepare: Callable[..., tuple[Hashable, Any]],
) -> None:
    """Make an op whose table is kept elsewhere known to `implementations` and `explain`.

    Raises:
      ValueError: there is an op of that name.

    >>> table = (Implementation("doc_kept", "jnp", abs),)
    >>> register_op("doc_kept", lambda: table, lambda x: (None, x))
    >>> [i.name for i in implementations("doc_kept")]
    ['jnp']
    >>> unregister_op("doc_kept")
    """
    if op in _TABLES or op in _PROVIDERS:
        raise ValueError(f"there is an op named {op!r} already")
    _PROVIDERS[op], _PREPARE[op] = table, prepare


def unregister_op(op: str) -> None:
    """Forget what `register_op` was told.

    Raises:
      ValueError: no such op was registered by it.

    >>> unregister_op("flash_attention")
    Traceback (most recent call last):
    ValueError: 'flash_attention' was not registered by register_op
    """
    if op not in _PROVIDERS:
        raise ValueError(f"{op!r} was not registered by register_op")
    del _PROVIDERS[op], _PREPARE[op]


def ops() -> tuple[str, ...]:
    """The names of all ops that are registered, custom kernels among them.

    >>> import aidx.ops.flash_attention
    >>> "flash_attention" in ops()
    True
    """
    return tuple(sorted([*_TABLES, *_PROVIDERS]))


def custom_ops() -> tuple[str, ...]:
    """The names of the ops that `register_op` was told of: custom kernels.

    >>> "flash_attention" in custom_ops()
    False
    """
    return tuple(sorted(_PROVIDERS))


def implementations(op: str) -> tuple[Implementation, ...]:
    """The implementations of `op` in order of preference.

    Raises:
      ValueError: no such op.

    >>> import aidx.ops.flash_attention
    >>> [i.name for i in implementations("flash_attention")]
    ['mosaic_gpu', 'cudnn', 'xla']
    """
    if op in _PROVIDERS:
        return _PROVIDERS[op]()
    if op not in _TABLES:
        raise ValueError(f"no op named {op!r}; there are {list(ops())}")
    return _TABLES[op]


def resolve(
    op: str,
    implementation: ImplementationChoice,
    table: tuple[Implementation, ...] | None = None,
) -> tuple[Implementation, ...]:
    """The candidates that `implementation` (None, a name or a sequence of names) stands for, out of
    `table` (None: what is registered for op).

    Raises:
      ValueError: an unknown name, or an empty sequence.

    >>> import aidx.ops.flash_attention
    >>> [i.name for i in resolve("flash_attention", ("xla", "cudnn"))]
    ['xla', 'cudnn']
    """
    table = implementations(op) if table is None else table
    if implementation is None:
        return table
    names = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    known = {entry.name: entry for entry in table}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"{op} has no implementation {unknown or names}; it has {list(known)}")
    return tuple(known[name] for name in names)


# --- choosing ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Call:
    """One direction of an op, applied by the first of `names` that can do it.

    `forward` needs no gradient.  `residual` is the forward of a differentiated call and `backward`
    its other half: both take an implementation only if it can do both directions, so that a
    backward never meets another implementation's outputs.
    """

    op: str
    names: tuple[str, ...]
    spec: Hashable
    direction: Literal["forward", "residual", "backward"] = "forward"
    table: tuple[Implementation, ...] | None = None  # None: what is registered for the op

    def entries(self) -> tuple[Implementation, ...]:
        """The named implementations."""
        return resolve(self.op, self.names, self.table)

    def candidates(self, platform: str | None) -> tuple[Implementation, ...]:
        """The named implementations that may be lowered for `platform`."""
        return tuple(i for i in self.entries() if i.runs_on(platform))

    def bound(self, entry: Implementation) -> Callable[..., Any]:
        """The function of the operands that `entry` offers for this direction."""
        if self.direction == "backward":
            return _bind(_backward_of(entry), self.spec)
        return _bind(entry.forward, self.spec)

    def check(self, entry: Implementation, args: Sequence[Any]) -> None:
        """Trace what `entry` offers; raises NotImplementedError where it cannot do the case."""
        outputs = jax.eval_shape(_bind(entry.forward, self.spec), args[0])
        if self.direction != "forward":
            jax.eval_shape(_bind(_backward_of(entry), self.spec), args[0], outputs, outputs)


@functools.lru_cache(maxsize=512)
def _bind(method: Callable[..., Any], spec: Hashable) -> Callable[..., Any]:
    """One jitted function per (method, spec): asking for its shapes and calling it trace once."""
    return jax.jit(functools.partial(method, spec))


def _backward_of(entry: Implementation) -> Callable[..., Any]:
    if entry.backward is None:
        raise NotImplementedError("it has no gradient")
    return entry.backward


def first_that_can(
    call: Call, candidates: Sequence[Implementation], args: Sequence[Any]
) -> Implementation:
    """The first candidate that does not refuse.

    Raises:
      ExceptionGroup: of the `NotImplementedError` of each candidate.
    """
    refusals = []
    for entry in candidates:
        try:
            call.check(entry, args)
            return entry
        except NotImplementedError as refusal:
            refusals.append(NotImplementedError(f"{entry.name}: {refusal}"))
    if not refusals:
        names = ", ".join(call.names)
        refusals = [NotImplementedError(f"none of {names} runs on this platform")]
    raise ExceptionGroup(f"no implementation of {call.op} can do this", refusals)


def dispatch(call: Call, *args: Any) -> Any:
    """Apply `call` to pytrees of arrays, choosing per platform at lowering.

    Works under jit and vmap; gradients belong around it (`jax.custom_vjp`).  Under vmap a kernel of
    a platform runs one element after the other, as may what stands in for it there; the others are
    batched by JAX.  An op that folds a vmapped axis into its own batch says so around this
    (`custom_vmap`).

    >>> import jax.numpy as jnp
    >>> @register("doc_negate", "xla")
    ... def negate(spec, operands):
    ...     return -operands
    >>> print(dispatch(Call("doc_negate", ("xla",), None), jnp.float32(2)))
    -2.0
    """
    everywhere = call.candidates(None)
    named = sorted({p for entry in call.entries() for p in entry.platforms})
    if not everywhere:
        entry = first_that_can(call, call.entries(), args)
        branches = {p: _sequential(call.bound(entry)) for p in entry.platforms}
        refuse = _deferred(call, entry, args)
        return jax.lax.platform_dependent(*args, **branches, default=refuse)
    entry = first_that_can(call, everywhere, args)
    # A platform whose preferred candidate is the same needs no branch of its own.
    special = [p for p in named if call.candidates(p)[0] is not entry]
    if not special:
        return call.bound(entry)(*args)
    later = _deferred(call, entry, args)
    return jax.lax.platform_dependent(
        *args, **{p: later for p in special}, default=call.bound(entry)
    )


@functools.lru_cache(maxsize=512)
def _sequential(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn` of one element after the other under vmap: a GPU kernel has no batched form."""
    apply = custom_vmap(fn)

    @apply.def_vmap
    def rule(axis_size: int, in_batched: Any, *args: Any) -> Any:
        results = _one_by_one(apply, tuple(jax.tree.leaves(in_batched)), args)
        return results, jax.tree.map(lambda _: True, results)

    return apply


@functools.partial(jax.jit, static_argnums=(0, 1))
def _one_by_one(fn: Callable[..., Any], flags: tuple[bool, ...], args: tuple[Any, ...]) -> Any:
    """`one_by_one` of leaves' flags; jitted, so that a vmap outside of jit compiles it once."""
    return one_by_one(fn, flags, args)


def explain(op: str, *args: Any, **kwargs: Any) -> tuple[Explanation, ...]:
    """Which implementation and configuration these arguments take on the default backend, and why
    not the others.  Takes what the op's public function takes.

    >>> import jax.numpy as jnp
    >>> import aidx.ops.flash_attention
    >>> x = jnp.zeros((8, 2, 16))
    >>> for line in explain("flash_attention", x, x, x, causal=True):
    ...     print(line.name, line.chosen, line.reason)
    mosaic_gpu False ...
    cudnn False ...
    xla True
    """
    wanted = resolve(op, kwargs.pop("implementation", None))
    spec, operands = _PREPARE[op](*args, **kwargs)
    return explain_call(Call(op, tuple(entry.name for entry in wanted), spec), operands)


def explain_call(call: Call, operands: Any) -> tuple[Explanation, ...]:
    """`explain` of a call in its canonical form.

    >>> @register("doc_explained", "xla")
    ... def same(spec, operands):
    ...     return operands
    >>> explain_call(Call("doc_explained", ("xla",), None), 1.0)[0].chosen
    True
    """
    platform = platform_of(jax.default_backend())
    lines, found = [], False
    for entry in call.entries():
        reason, configs = "", ()
        if not entry.runs_on(platform):
            reason = f"runs on {', '.join(entry.platforms)}; this is {platform}"
        else:
            try:
                with autotune.recording() as seen:
                    # a new function: what is traced already would choose nothing
                    jax.eval_shape(functools.partial(entry.forward, call.spec), operands)
                configs = tuple(dict.fromkeys(seen))
            except NotImplementedError as refusal:
                reason = str(refusal)
        chosen = not reason and not found
        lines.append(Explanation(call.op, entry.name, entry.platforms, chosen, reason, configs))
        found = found or not reason
    return tuple(lines)


# --- a branch that is traced when it is lowered --------------------------------------------------

_deferred_p = Primitive("aidx_dispatch")
_deferred_p.multiple_results = True


def _deferred(call: Call, entry: Implementation, args: Sequence[Any]) -> Callable[..., Any]:
    """A function of the operands that picks and traces its implementation at lowering.

    It returns what `entry` returns, to the last detail of the types (axes of a shard_map included).
    """
    closed, shapes = jax.make_jaxpr(call.bound(entry), return_shape=True)(*args)
    avals, out_tree = tuple(closed.out_avals), jax.tree.structure(shapes)

    def apply(*args: Any) -> Any:
        leaves, in_tree = jax.tree.flatten(args)
        return jax.tree.unflatten(out_tree, _Later(call, in_tree, avals)(*leaves))

    return apply


@dataclasses.dataclass(frozen=True)
class _Later:
    """The primitive's parameters, as a function of its operands."""

    call: Call
    in_tree: Any
    out_avals: tuple[Any, ...]

    def __call__(self, *leaves: Any) -> list[Any]:
        params = {"call": self.call, "in_tree": self.in_tree, "out_avals": self.out_avals}
        return _deferred_p.bind(*leaves, **params)


def _batch(leaves: Sequence[Any], axes: Sequence[Any], **params: Any) -> Any:
    """vmap: one element after the other, for what will be chosen is not known before lowering."""
    flags = tuple(axis is not None for axis in axes)
    args = tuple(
        jnp.moveaxis(x, axis, 0) if flag else x
        for x, axis, flag in zip(leaves, axes, flags, strict=True)
    )
    results = _one_by_one(_Later(**params), flags, args)
    return results, [0] * len(results)


def _run(*leaves: Any, call: Call, in_tree: Any, platform: str) -> list[Any]:
    args = jax.tree.unflatten(in_tree, leaves)
    entry = first_that_can(call, call.candidates(platform), args)
    return jax.tree.leaves(call.bound(entry)(*args))


def _lower(ctx: Any, *operands: Any, call: Call, in_tree: Any, out_avals: Any) -> Any:
    platforms = ctx.module_context.platforms
    if len(platforms) != 1:
        raise NotImplementedError(f"{call.op} lowers for one platform at a time, not {platforms}")
    platform = platforms[0]
    run = functools.partial(_run, call=call, in_tree=in_tree, platform=platform)
    meshes = [get_abstract_mesh(), *(aval.sharding.mesh for aval in ctx.avals_in)]
    if platform != "cuda" or not all(mesh.empty for mesh in meshes):
        return mlir.lower_fun(run, multiple_results=True)(ctx, *operands)
    # Lowering a kernel takes a second or two of Python: once a process, whatever programs call it.
    avals = tuple((aval.shape, aval.dtype, aval.weak_type) for aval in ctx.avals_in)
    precision = jax.config.jax_default_matmul_precision
    state = (jax.config.jax_enable_x64, precision, autotune.settings())
    code = _lowered(call, call.candidates(platform), in_tree, platform, avals, state)
    module = ir.Module.parse(code, ctx.module_context.context)
    main: Any = ir.SymbolTable(module.operation)["main"]
    types = main.type.results  # merging moves the function out of its module
    context = ctx.module_context
    name = mlir.merge_mlir_modules(context.module, call.op, module, context.symbol_table)
    return func.CallOp(types, ir.FlatSymbolRefAttr.get(name), list(operands)).results


@functools.lru_cache(maxsize=256)
def _lowered(
    call: Call, candidates: Any, in_tree: Any, platform: str, avals: Any, state: Any
) -> bytes:
    """The MLIR of `_run` on operands of these (shape, dtype, weak_type), as bytecode.

    `candidates` and `state` tell apart what has to be lowered anew.
    """
    name = _kernel_name(call, candidates, in_tree, platform, avals, state)
    kept = None if name is None else _kernel_store.load(name)
    if kept is not None:
        # Where a kernel finds its runtime is set by this import, which lowering it would have done.
        importlib.import_module("jax.experimental.mosaic.gpu")
        return kept
    run = functools.partial(_run, call=call, in_tree=in_tree, platform=platform)
    leaves = [jax.ShapeDtypeStruct(s, d, weak_type=weak) for s, d, weak in avals]
    lowered = jax.jit(run, keep_unused=True).trace(*leaves).lower(lowering_platforms=(platform,))
    module: Any = lowered.compiler_ir()
    code = mlir.module_to_bytecode(module)
    if name is not None:
        _kernel_store.store(name, code)
    return code


def _kernel_name(
    call: Call, candidates: Any, in_tree: Any, platform: str, avals: Any, state: Any
) -> str | None:
    """What a lowered kernel is called on disk; None: it is not kept there."""
    *flags, settings = state
    tuner = autotune.fingerprint(settings)
    own = all(i.forward.__module__.partition(".")[0] == "aidx" for i in candidates)
    if call.table is not None or not own or tuner is None:
        return None
    names = tuple(i.name for i in candidates)
    avals = tuple((shape, str(dtype), weak) for shape, dtype, weak in avals)
    return _kernel_store.key(
        (call.op, names, call.spec, call.direction, str(in_tree), platform, avals, tuner, *flags)
    )


_deferred_p.def_abstract_eval(lambda *_, call, in_tree, out_avals: list(out_avals))
_deferred_p.def_impl(
    lambda *leaves, call, in_tree, out_avals: _run(
        *leaves, call=call, in_tree=in_tree, platform=platform_of(jax.default_backend())
    )
)
mlir.register_lowering(_deferred_p, _lower)
batching.primitive_batchers[_deferred_p] = _batch
