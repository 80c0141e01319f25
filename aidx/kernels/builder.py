"""`KernelBuilder`: from a reference to a `CustomKernel`, one declaration after the other."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

from ..ops import autotune
from ..ops import registry as ops
from ..ops.autotune.trial import relative_error
from ..ops.autotune.tunable import array_words
from .catalog import REGISTRY, CustomKernelRegistry
from .kernel import (
    REFERENCE,
    TOLERANCES,
    Backward,
    CustomKernel,
    Fold,
    Forward,
    Tolerance,
    operand_names,
)
from .sharding import ShardingRule

DEFAULT_TOLERANCE = Tolerance()
RESERVED = ("implementation", "config")  # options of every kernel


@dataclasses.dataclass(frozen=True)
class _Declared:
    """An implementation as the builder was given it."""

    name: str
    fn: Callable[..., Any]
    backward: Callable[..., Any] | None
    platforms: tuple[str, ...]
    compute_capability: tuple[str, ...]
    when: Callable[..., str | None] | None


@dataclasses.dataclass(frozen=True)
class KernelBuilder:
    """Declares a kernel; every method returns a new builder, `build` the `CustomKernel`.

    Only the reference is needed.  What is not declared has a default that is right for every
    kernel: the gradient is the reference's, vmap is JAX's own.

    >>> import jax.numpy as jnp
    >>> def scaled(x, scale, *, eps=0.0):
    ...     return x * scale + eps
    >>> kernel = (
    ...     KernelBuilder("doc_scaled")
    ...     .reference(scaled)
    ...     .implementation("swapped", lambda x, scale, *, eps=0.0: scale * x + eps)
    ...     .sharding("n, n -> n")
    ...     .build(registry=None)
    ... )
    >>> print(kernel(jnp.ones(2), jnp.ones(2), eps=1.0), [i.name for i in kernel.table])
    [2. 2.] ['swapped', 'reference']
    """

    name: str
    _reference: Callable[..., Any] | None = None
    _declared: tuple[_Declared, ...] = ()
    _backward: Callable[..., Any] | None = None
    _batching: Any = "vmap"
    _sharding: ShardingRule | None = None
    _tuning: tuple[Hashable, ...] = ()
    _sources: tuple[str, ...] = ()
    _shapes: tuple[str, ...] = ()
    _tolerance: Tolerance = DEFAULT_TOLERANCE

    def reference(self, fn: Callable[..., Any]) -> KernelBuilder:
        """What the kernel computes, in jnp: the oracle, the last implementation, the signature.

        Its positional parameters are arrays (pytrees, None), its keyword-only ones are static.
        """
        return dataclasses.replace(self, _reference=fn)

    def implementation(
        self,
        name: str,
        fn: Callable[..., Any],
        *,
        backward: Callable[..., Any] | None = None,
        platforms: Sequence[str] = (),
        compute_capability: Sequence[str] = (),
        when: Callable[..., str | None] | None = None,
    ) -> KernelBuilder:
        """Another way to compute it; the order of declaration is the order of preference.

        Args:
          name: what `implementation=` calls it.
          fn: has the reference's signature, and `config` where it is tuned.  It raises
            NotImplementedError for what it cannot do, and the next one is tried.
          backward: its own gradient, see `vjp`.
          platforms: XLA's names ("cuda", "cpu"); none means all.
          compute_capability: of the GPU ("9.0"); none means all.
          when: `when(*operands, **static)` gives the reason why fn cannot do a call, or None.
        """
        entry = _Declared(
            name, fn, backward, tuple(platforms), tuple(compute_capability), when
        )  # fmt: skip
        return dataclasses.replace(self, _declared=(*self._declared, entry))

    def vjp(self, backward: Callable[..., Any]) -> KernelBuilder:
        """The gradient of implementations that have none of their own (default: the reference's).

        `backward(operands, outputs, cotangents, **static)` gives one cotangent for each operand,
        None where there is none; outputs that are no floats have the cotangent None.  What it needs
        besides operands has to be an output.
        """
        return dataclasses.replace(self, _backward=backward)

    def batching(self, rule: Any) -> KernelBuilder:
        """What `jax.vmap` does.

        Args:
          rule: "vmap" (JAX batches the implementation), "sequential" (one element after the other),
            `Fold(names)` (the axis becomes part of the operands' leading axis) or a function
            `rule(apply, axis_size, in_batched, *operands) -> (outputs, out_batched)`; there the
            vmapped axis is the first one, `apply(*operands)` is the call itself and out_batched one
            bool or a tree of them.  A rule is for the forward; gradients take "vmap".
        """
        return dataclasses.replace(self, _batching=rule)

    def sharding(self, rule: str, *, replicated: Sequence[str] = ()) -> KernelBuilder:
        """How jit may split it over devices, see `ShardingRule`; without it the compiler decides,
        which for an opaque kernel means that it gathers the operands.
        """
        return dataclasses.replace(self, _sharding=ShardingRule(rule, tuple(replicated)))

    def tuning(
        self,
        configs: Iterable[Hashable],
        *,
        sources: Sequence[str] = (),
        shapes: Sequence[str] = (),
    ) -> KernelBuilder:
        """The configurations that implementations with a parameter `config` may be given, the
        default first; a call that names none takes what `aidx.ops.autotune.choose` says.

        Args:
          configs: hashable; frozen dataclasses, numbers, strings, tuples of them.
          sources: modules whose code decides the time, beside the implementation's own.
          shapes: what `aidx tune` times by default: operands, then options
            ("8192x4096:bfloat16 4096:bfloat16 eps=1e-6").
        """
        named = {"_sources": tuple(sources), "_shapes": tuple(shapes)}
        return dataclasses.replace(self, _tuning=tuple(configs), **named)

    def tolerance(self, tolerance: Tolerance) -> KernelBuilder:
        """How far implementations may be from the reference."""
        return dataclasses.replace(self, _tolerance=tolerance)

    def build(self, registry: CustomKernelRegistry | None = REGISTRY) -> CustomKernel:
        """The kernel, registered unless `registry` is None.

        Raises:
          ValueError: no reference, a name taken already, a signature that differs from the
            reference's (saying where), or declarations that do not go together.
        """
        reference = self._reference
        if reference is None:
            raise ValueError(
                f"{self.name} has no reference: KernelBuilder.reference(fn) gives it one"
            )
        _check_reference(self.name, reference)
        _check_tuning(self.name, self._tuning, self._declared)
        _check_batching(self.name, self._batching, reference)
        if self._sharding is not None:
            given, wanted = len(self._sharding.operands), operand_names(reference)
            if given != len(wanted):
                raise ValueError(
                    f"{self.name}: the sharding rule {self._sharding.rule!r} has {given} operands, "
                    f"the reference {len(wanted)}: {wanted}"
                )
        kernel = CustomKernel(
            self.name,
            reference,
            (ops.Implementation(self.name, REFERENCE, Forward(reference), Backward(reference)),),
            self._batching,
            self._sharding,
            self._tuning,
            self._tolerance,
            self._backward,
            self._sources,
            self._shapes,
        )
        for entry in self._declared:
            kernel = extended(kernel, **vars(entry))
        if registry is not None:
            registry.register(kernel)
        return kernel


def extended(
    kernel: CustomKernel,
    name: str,
    fn: Callable[..., Any],
    *,
    backward: Callable[..., Any] | None = None,
    platforms: Sequence[str] = (),
    compute_capability: Sequence[str] = (),
    when: Callable[..., str | None] | None = None,
    before: str = REFERENCE,
) -> CustomKernel:
    """`kernel` with one more implementation, in front of `before`.

    Raises:
      ValueError: the name is taken, or the signature differs from the reference's.

    >>> kernel = KernelBuilder("doc_extended").reference(lambda x: x + x).build(registry=None)
    >>> extended(kernel, "times_two", lambda x: 2 * x)
    CustomKernel('doc_extended', ['times_two', 'reference'])
    """
    differences = signature_differences(kernel.reference, fn)
    if differences:
        raise ValueError(
            f"{name!r} of {kernel.name} has another signature than the reference: "
            + "; ".join(differences)
        )
    tunable = None
    if "config" in inspect.signature(fn).parameters:
        if not kernel.tuning:
            raise ValueError(f"{name!r} of {kernel.name} takes a config; declare a tuning space")
        tunable = tunable_of(kernel, name, fn, tuple(platforms))
    forward = Forward(fn, when, tuple(compute_capability), tunable)
    pull = Backward(kernel.reference, backward or kernel.backward)
    entry = ops.Implementation(kernel.name, name, forward, pull, tuple(platforms))
    return dataclasses.replace(kernel, table=ops.with_entry(kernel.table, entry, before))


def tunable_of(
    kernel: CustomKernel, name: str, fn: Callable[..., Any], platforms: tuple[str, ...]
) -> autotune.Tunable:
    """How the tuner times the implementation `name` of a kernel.

    >>> kernel = KernelBuilder("doc_tunable").reference(lambda x: x + x).tuning((1, 2))
    >>> kernel = kernel.implementation("own", lambda x, *, config: 2 * x).build(registry=None)
    >>> kernel.table[0].forward.tunable.name
    'doc_tunable/own'
    """

    def run(config: Hashable, *operands: Any, **static: Any) -> Any:
        return fn(*operands, config=config, **static)

    def case(text: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        given, options = array_words(text)
        bound = inspect.signature(kernel.reference).bind(*given, **options)
        bound.apply_defaults()  # as a call's are
        names = operand_names(kernel.reference)
        static = {name: x for name, x in bound.arguments.items() if name not in names}
        return tuple(bound.arguments[name] for name in names), static

    own = getattr(fn, "func", fn)  # func: of a partial
    return autotune.Tunable(
        f"{kernel.name}/{name}",
        run=run,
        candidates=lambda *operands, **static: kernel.tuning,
        reference=kernel.reference,
        sources=tuple(dict.fromkeys((own, *kernel.sources))),
        case=case,
        shapes=kernel.shapes,
        tolerance={dtype: kernel.tolerance.of(dtype) for dtype in TOLERANCES},
        error=functools.partial(relative_error, floor=1.0),
        platforms=platforms,
    )


def signature_differences(reference: Callable[..., Any], fn: Callable[..., Any]) -> list[str]:
    """How the parameters of `fn` differ from the reference's; `config` is fn's own.

    >>> signature_differences(lambda x, *, eps=1e-6: x, lambda y, *, eps=1e-5: y)
    ["operand 0 is 'y', not 'x'", 'the default of eps is 1e-05, not 1e-06']
    """
    ours = inspect.signature(reference).parameters
    theirs = {n: p for n, p in inspect.signature(fn).parameters.items() if n != "config"}
    found = []
    names, others = operand_names(reference), [n for n in operand_names(fn) if n != "config"]
    if len(names) != len(others):
        found.append(f"it takes {len(others)} operands {tuple(others)}, not {len(names)} {names}")
    for i, (name, other) in enumerate(zip(names, others, strict=False)):
        if name != other:
            found.append(f"operand {i} is {other!r}, not {name!r}")
    options = lambda parameters, arrays: {n for n in parameters if n not in arrays}
    mine, its = options(ours, names), options(theirs, others)
    found += [f"it lacks the option {name!r}" for name in sorted(mine - its)]
    found += [f"it has an option {name!r} of its own" for name in sorted(its - mine)]
    for name in ours:
        if name in theirs and ours[name].default != theirs[name].default:
            default = _default(theirs[name])
            found.append(f"the default of {name} is {default}, not {_default(ours[name])}")
    return found


def _default(parameter: inspect.Parameter) -> str:
    return "absent" if parameter.default is parameter.empty else repr(parameter.default)


def _check_reference(name: str, reference: Callable[..., Any]) -> None:
    for parameter in inspect.signature(reference).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"the reference of {name} takes {parameter}: name every parameter")
        if parameter.name in RESERVED:
            raise ValueError(f"the reference of {name} has a parameter {parameter.name!r}, which "
                             "is an option of every kernel")  # fmt: skip


def _check_tuning(name: str, space: tuple[Hashable, ...], declared: Sequence[_Declared]) -> None:
    unhashable = [config for config in space if type(config).__hash__ is None]
    if unhashable:
        raise ValueError(f"{name}: configurations must be hashable (frozen), not {unhashable}")
    if len(set(space)) != len(space) or None in space:
        raise ValueError(f"{name}: configurations must be distinct and not None: {space}")
    if space and not any("config" in inspect.signature(d.fn).parameters for d in declared):
        raise ValueError(f"{name} has a tuning space, and no implementation takes a config")


def _check_batching(name: str, rule: Any, reference: Callable[..., Any]) -> None:
    if isinstance(rule, Fold):
        unknown = set(rule.operands) - set(operand_names(reference))
        if unknown or not rule.operands:
            raise ValueError(
                f"{name}: {rule} names no operands of {operand_names(reference)}: {sorted(unknown)}"
            )
    elif rule not in ("vmap", "sequential") and not callable(rule):
        raise ValueError(f"{name}: batching is 'vmap', 'sequential', Fold or a rule, not {rule!r}")
