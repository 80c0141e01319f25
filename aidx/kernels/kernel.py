"""`CustomKernel`: several implementations of one function behind a plain callable.

A call is brought to `(KernelSpec, operands)` and wrapped, from the outside in, by `jax.custom_vjp`
(gradients), `custom_vmap` (batching), `custom_partitioning` (sharding) and the rule of choice of
`aidx.ops.registry`.  So an implementation only computes.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_batching import custom_vmap

from ..ops import autotune
from ..ops import registry as ops
from ..ops._loops import one_by_one, varying_like
from .sharding import ShardingRule, partitioned

REFERENCE = "reference"  # the name of the implementation that every kernel has, the last in order


@dataclasses.dataclass(frozen=True)
class Tolerance:
    """How far a result may be from the reference: `|got - want| <= tolerance * (1 + |want|)`.

    One number for each floating dtype, which is the dtype of the operands; gradients may be
    `gradient` times as far, as their sums are longer.

    >>> Tolerance(bfloat16=0.05).of("bfloat16")
    0.05
    """

    float64: float = 1e-6  # references accumulate in float32
    float32: float = 1e-5
    float16: float = 4e-3
    bfloat16: float = 2e-2
    gradient: float = 4.0

    def of(self, dtype: Any) -> float:
        """The tolerance of results computed from operands of `dtype` (0 unless a float)."""
        name = jnp.dtype(dtype).name
        return float(getattr(self, name)) if name in TOLERANCES else 0.0


TOLERANCES = ("float64", "float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True)
class Fold:
    """Batching that folds a vmapped axis into the leading axis of these operands.

    The outputs must have the same leading axis.  Where another operand is vmapped, or (in
    gradients) is a float array, whose gradient the rows of the fold would share, the elements run
    one after the other.
    """

    operands: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class KernelSpec:
    """The static half of a call."""

    static: tuple[tuple[str, Hashable], ...] = ()
    config: Hashable = None  # None: what `aidx.ops.autotune.choose` says
    # One entry for each vmapped axis, the outermost last: which leaves of the operands have it.
    batched: tuple[tuple[bool, ...], ...] = ()


@dataclasses.dataclass(frozen=True)
class Forward:
    """What the registry calls: `fn` with the call's options, under its vmapped axes.

    Raises:
      NotImplementedError: what `when` says, another compute capability, or a `config` that fn does
        not take.
    """

    fn: Callable[..., Any]
    when: Callable[..., str | None] | None = None
    compute_capability: tuple[str, ...] = ()
    tunable: autotune.Tunable | None = None  # where fn has a parameter `config`

    @property
    def takes_config(self) -> bool:
        """Whether there is something to tune."""
        return self.tunable is not None

    def __call__(self, spec: KernelSpec, operands: tuple[Any, ...]) -> Any:
        """The outputs."""
        _check_capability(self.compute_capability)
        if self.tunable is None and spec.config is not None:
            raise NotImplementedError(f"it takes no config, and config={spec.config} was given")
        return _under_vmaps(functools.partial(self._one, spec), spec, operands)(operands)

    def _one(self, spec: KernelSpec, operands: tuple[Any, ...]) -> Any:
        options = dict(spec.static)
        reason = self.when(*operands, **options) if self.when else None
        if reason:
            raise NotImplementedError(reason)
        if self.tunable is not None:
            chosen = autotune.choose(self.tunable, operands, options, explicit=spec.config)
            options["config"] = chosen
        return self.fn(*operands, **options)


@dataclasses.dataclass(frozen=True)
class Backward:
    """`backward(operands, outputs, cotangents, **static)`, or the pullback of the reference."""

    reference: Callable[..., Any]
    backward: Callable[..., Any] | None = None

    def __call__(self, spec: KernelSpec, operands: Any, outputs: Any, cotangents: Any) -> Any:
        """The cotangents of the operands, None where there is none."""
        pull = functools.partial(self._one, dict(spec.static))
        return _under_vmaps(pull, spec, operands)(operands, outputs, cotangents)

    def _one(self, static: dict[str, Any], operands: Any, outputs: Any, cotangents: Any) -> Any:
        if self.backward is None:
            return _pull_back(functools.partial(self.reference, **static), operands, cotangents)
        gradients = tuple(self.backward(operands, outputs, cotangents, **static))
        if len(gradients) != len(operands):
            raise ValueError(
                f"backward gave {len(gradients)} cotangents for {len(operands)} operands"
            )
        return tuple(_like(g, x) for g, x in zip(gradients, operands, strict=True))


def _check_capability(wanted: tuple[str, ...]) -> None:
    """A GPU's compute capability; unknown (when lowering for one elsewhere) is no refusal."""
    have = getattr(jax.local_devices()[0], "compute_capability", None)
    if wanted and have is not None and have not in wanted:
        raise NotImplementedError(f"needs compute capability {', '.join(wanted)}, this is {have}")


def _is_float(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _under_vmaps(fn: Callable[..., Any], spec: KernelSpec, operands: Any) -> Callable[..., Any]:
    """`fn(operands, *others)` vmapped over the axes in `spec.batched`; others have all of them."""
    tree = jax.tree.structure(operands)

    def over(fn: Callable[..., Any], flags: tuple[bool, ...]) -> Callable[..., Any]:
        axes = jax.tree.unflatten(tree, [0 if flag else None for flag in flags])
        return lambda operands, *others: jax.vmap(fn, in_axes=(axes, *(0 for _ in others)))(
            operands, *others
        )

    for flags in spec.batched:
        fn = over(fn, flags)
    return fn


def _pull_back(fn: Callable[..., Any], operands: tuple[Any, ...], cotangents: Any) -> Any:
    """The vjp of fn at operands; None for what is no float array."""
    leaves, tree = jax.tree.flatten(operands)
    moving = [i for i, x in enumerate(leaves) if _is_float(x)]

    def of(floats: list[Any]) -> Any:
        filled = list(leaves)
        for i, x in zip(moving, floats, strict=True):
            filled[i] = x
        return fn(*jax.tree.unflatten(tree, filled))

    out, pull = jax.vjp(of, [leaves[i] for i in moving])
    given = jax.tree.leaves(cotangents, is_leaf=lambda x: x is None)
    full = [
        c if _is_float(y) else np.zeros(y.shape, jax.dtypes.float0)
        for c, y in zip(given, jax.tree.leaves(out), strict=True)
    ]
    (found,) = pull(jax.tree.unflatten(jax.tree.structure(out), full))
    gradients: list[Any] = [None] * len(leaves)
    for i, g in zip(moving, found, strict=True):
        gradients[i] = g
    return jax.tree.unflatten(tree, gradients)


def _like(gradient: Any, operand: Any) -> Any:
    """A cotangent that a backward returned, checked against its operand."""
    if gradient is None:
        return None

    def leaf(g: Any, x: Any) -> Any:
        if g.shape != x.shape:
            raise ValueError(f"backward gave a cotangent {g.shape} for an operand {x.shape}")
        return g.astype(x.dtype)

    return jax.tree.map(leaf, gradient, operand)


# --- the callable --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class CustomKernel:
    """A function with several implementations, made by `KernelBuilder.build`.

    Called as its reference is: positional parameters are arrays (or pytrees of them, None where
    there is none), keyword-only ones are static and hashable.  Two options come on top:
    `implementation` (None, a name or a sequence of names, see `aidx.ops.registry`) and `config`
    (one of `tuning`; by default the tuner's choice).  Works under jit, grad, vmap, shard_map,
    remat and export.

    >>> from aidx.kernels import KernelBuilder
    >>> double = KernelBuilder("doc_double").reference(lambda x: 2 * x).build(registry=None)
    >>> print(double(3.0), jax.grad(double)(3.0), jax.vmap(double)(jnp.arange(2.0)))
    6.0 2.0 [0. 2.]
    """

    name: str
    reference: Callable[..., Any]
    table: tuple[ops.Implementation, ...]
    batching: Any = "vmap"  # "vmap", "sequential", Fold or a rule
    sharding: ShardingRule | None = None
    tuning: tuple[Hashable, ...] = ()
    tolerance: Tolerance = Tolerance()
    backward: Callable[..., Any] | None = None
    sources: tuple[str, ...] = ()  # modules whose code decides the time, see `KernelBuilder.tuning`
    shapes: tuple[str, ...] = ()  # what `aidx tune` times by default
    lineage: Any = dataclasses.field(default_factory=object)  # the same for all versions of it

    def __post_init__(self):
        for attribute in ("__doc__", "__module__"):
            object.__setattr__(self, attribute, getattr(self.reference, attribute, None))
        object.__setattr__(self, "__name__", self.name)
        object.__setattr__(self, "__signature__", inspect.signature(self.reference))

    def __repr__(self) -> str:
        return f"CustomKernel({self.name!r}, {[entry.name for entry in self.table]})"

    def __call__(
        self,
        *args: Any,
        implementation: ops.ImplementationChoice = None,
        config: Hashable = None,
        **kwargs: Any,
    ) -> Any:
        """The reference's results, computed by the first implementation that can."""
        kernel = current(self)
        spec, operands = kernel.prepare(*args, config=config, **kwargs)
        chosen = ops.resolve(kernel.name, implementation, kernel.table)
        names = tuple(entry.name for entry in chosen)
        return _differentiable(kernel, names, spec, varying_like(operands, operands))

    def differentiated(self, *args: Any, **kwargs: Any) -> Any:
        """The reference itself; where its gradient is asked for, this kernel in both directions.

        For what XLA fuses well as long as nobody differentiates it.

        >>> from aidx.kernels import KernelBuilder
        >>> double = KernelBuilder("doc_other").reference(lambda x: 2 * x).build(registry=None)
        >>> print(double.differentiated(3.0), jax.grad(double.differentiated)(3.0))
        6.0 2.0
        """
        kernel = current(self)
        spec, operands = kernel.prepare(*args, **kwargs)
        names = tuple(entry.name for entry in kernel.table)
        return _plain(kernel, names, spec, varying_like(operands, operands))

    def prepare(
        self, *args: Any, config: Hashable = None, **kwargs: Any
    ) -> tuple[KernelSpec, tuple[Any, ...]]:
        """A call's `(spec, operands)`.

        Raises:
          TypeError: arguments that the reference does not take, or an option that is not hashable.
          ValueError: a config outside the tuning space.
        """
        signature = inspect.signature(self.reference)
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        operands, static = [], []
        for name, value in bound.arguments.items():
            if signature.parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY:
                operands.append(jax.tree.map(jnp.asarray, value))
                continue
            try:
                hash(value)
            except TypeError:
                raise TypeError(
                    f"{name} of {self.name} is static and must be hashable, not {type(value)}"
                ) from None
            static.append((name, value))
        if config is not None and config not in self.tuning:
            raise ValueError(f"{config=} is not in the tuning space of {self.name}: {self.tuning}")
        return KernelSpec(tuple(static), config), tuple(operands)

    @property
    def tunables(self) -> tuple[autotune.Tunable, ...]:
        """What there is to tune: an entry for each implementation that takes a config."""
        found = [getattr(entry.forward, "tunable", None) for entry in self.table]
        return tuple(tunable for tunable in found if tunable is not None)

    def explain(self, *args: Any, **kwargs: Any) -> tuple[ops.Explanation, ...]:
        """Which implementation these arguments take on the default backend, and why not others."""
        kernel = current(self)
        wanted = ops.resolve(kernel.name, kwargs.pop("implementation", None), kernel.table)
        spec, operands = kernel.prepare(*args, **kwargs)
        names = tuple(entry.name for entry in wanted)
        call = ops.Call(kernel.name, names, spec, table=kernel.table)
        return ops.explain_call(call, operands)


# The newest version of each registered lineage, and what stands in for it within a context.  The
# second is part of the key of jit's caches: a traced program never outlives its replacement.
_newest: dict[Any, CustomKernel] = {}
_replaced = jax.make_user_context(())


def current(kernel: CustomKernel) -> CustomKernel:
    """What a call of `kernel` runs: its replacement, its newest registered version, or itself."""
    for lineage, other in reversed(_replaced.value):
        if lineage is kernel.lineage:
            return other
    return _newest.get(kernel.lineage, kernel)


# --- gradients, batching, dispatch ---------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _differentiable(kernel: Any, names: Any, spec: KernelSpec, operands: Any) -> Any:
    return _jit_call(kernel, "forward", names, spec, operands)


def _fwd(kernel: Any, names: Any, spec: KernelSpec, operands: Any) -> Any:
    outputs = _jit_call(kernel, "residual", names, spec, operands)
    # A remat policy that saves this name never runs the forward twice.
    outputs = jax.tree.map(lambda x: checkpoint_name(x, f"{kernel.name}_out"), outputs)
    return outputs, (operands, outputs)


def _bwd(kernel: Any, names: Any, spec: KernelSpec, saved: Any, cotangents: Any) -> Any:
    operands, outputs = saved
    # What has no gradient (integers) has no cotangent: float0 arrays cannot enter a jit.
    cotangents = jax.tree.map(lambda c, y: c if _is_float(y) else None, cotangents, outputs)
    return (_jit_call(kernel, "backward", names, spec, operands, outputs, cotangents),)


_differentiable.defvjp(_fwd, _bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _plain(kernel: Any, names: Any, spec: KernelSpec, operands: Any) -> Any:
    return kernel.reference(*operands, **dict(spec.static))


_plain.defvjp(_fwd, _bwd)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _jit_call(kernel: CustomKernel, direction: Any, names: Any, spec: Any, *args: Any) -> Any:
    """Inside jit, so that equal layers share one trace."""
    with jax.named_scope(kernel.name):
        return _batched(kernel, direction, names, spec)(*args)


def _batched(kernel: CustomKernel, direction: Any, names: Any, spec: KernelSpec) -> Any:
    """The call as a function of its arrays, with the kernel's batching rule."""
    call = ops.Call(kernel.name, names, spec, direction, kernel.table)

    @custom_vmap
    def apply(*args: Any) -> Any:
        return partitioned(kernel.sharding, call, args)

    @apply.def_vmap
    def rule(size: int, in_batched: Any, *args: Any) -> Any:
        flags = tuple(in_batched)
        if kernel.batching == "sequential":
            out = one_by_one(apply, flags, args)
        elif isinstance(kernel.batching, Fold):
            out = _folded(apply, kernel, size, flags, args)
        elif callable(kernel.batching) and direction != "backward":
            own: Any = kernel.batching
            out, out_batched = own(apply_to(apply), size, flags[0], *args[0])
            return out, _full(out_batched, out)
        else:
            moved, leaves = _with_axis(size, flags, args)
            inner = dataclasses.replace(spec, batched=(*spec.batched, leaves))
            out = _batched(kernel, direction, names, inner)(*moved)
        return out, jax.tree.map(lambda _: True, out)

    return apply


def apply_to(apply: Callable[..., Any]) -> Callable[..., Any]:
    """The call that a batching rule is given: it takes the operands one by one."""
    return lambda *operands: apply(operands)


def _full(batched: Any, out: Any) -> Any:
    if isinstance(batched, bool):
        return jax.tree.map(lambda _: batched, out)
    return batched


def _with_axis(size: int, flags: Any, args: Any) -> tuple[Any, tuple[bool, ...]]:
    """args with the new axis where outputs and cotangents lack it, and which operands have it."""
    grow = lambda x, flag: x if flag else jnp.broadcast_to(x[None], (size, *x.shape))
    operands, on = args[0], jax.tree.leaves(flags[0])
    if not any(on):  # only cotangents are vmapped
        operands = jax.tree.map(grow, operands, flags[0])
        on = [True] * len(on)
    others = [jax.tree.map(grow, x, f) for x, f in zip(args[1:], flags[1:], strict=True)]
    return (operands, *others), tuple(on)


def _folded(apply: Any, kernel: CustomKernel, size: int, flags: Any, args: Any) -> Any:
    """The vmapped axis inside the leading axis of `kernel.batching.operands`."""
    names = operand_names(kernel.reference)
    rows = [name in kernel.batching.operands for name in names]
    shared = [(x, f) for x, f, row in zip(args[0], flags[0], rows, strict=True) if not row]
    if any(jax.tree.leaves([f for _, f in shared])):
        return one_by_one(apply, flags, args)
    if len(args) > 1 and any(_is_float(x) for x in jax.tree.leaves([x for x, _ in shared])):
        return one_by_one(apply, flags, args)

    def fold(x: Any, flag: bool) -> Any:
        x = x if flag else jnp.broadcast_to(x[None], (size, *x.shape))
        return x.reshape(-1, *x.shape[2:])

    operands = tuple(
        jax.tree.map(fold, x, f) if row else x
        for x, f, row in zip(args[0], flags[0], rows, strict=True)
    )
    others = [jax.tree.map(fold, x, f) for x, f in zip(args[1:], flags[1:], strict=True)]
    unfold = lambda x: x.reshape(size, x.shape[0] // size, *x.shape[1:])
    return jax.tree.map(unfold, apply(operands, *others))


def operand_names(reference: Callable[..., Any]) -> tuple[str, ...]:
    """The parameters of a reference that are arrays: all but the keyword-only ones.

    >>> operand_names(lambda x, scale, *, eps=1e-6: x)
    ('x', 'scale')
    """
    parameters = inspect.signature(reference).parameters.values()
    return tuple(p.name for p in parameters if p.kind is not inspect.Parameter.KEYWORD_ONLY)
