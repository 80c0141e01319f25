"""The laws of `op_check`: functions of the operands, so that hypothesis can shrink these."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ._compare import Mismatch, bits_differ, differs
from .kernel import Tolerance

type Outcome = Mismatch | float | str  # a str says why the law could not be tried


@dataclasses.dataclass(frozen=True, eq=False)
class Subject:
    """One implementation in one case and dtype."""

    call: Callable[..., Any]
    reference: Callable[..., Any]
    case: Any
    dtype: str
    tolerance: Tolerance
    custom_calls: tuple[str, ...] = ()
    repeatable: bool = True  # whether two runs have to agree to the last bit

    @functools.cached_property
    def floats(self) -> tuple[int, ...]:
        """Which operands are differentiated."""
        return tuple(i for i, x in enumerate(self.case.make(0, self.dtype)) if is_float(x))

    @functools.cached_property
    def run(self) -> Any:
        """The implementation, jitted."""
        return jax.jit(self.call)

    @functools.cached_property
    def both(self) -> Callable[..., Any]:
        """`(operands, cotangents) -> (outputs, gradients)`, jitted."""
        return jax.jit(self._pulled(self.call))

    @functools.cached_property
    def oracle(self) -> Callable[..., Any]:
        """The reference's `(outputs, gradients)`, jitted."""
        return jax.jit(self._pulled(self.reference))

    def same(self, got: Any, want: Any, tolerance: float) -> Outcome:
        """Whether two runs agree: to the last bit, or closely where the op does not repeat bits."""
        if self.repeatable:
            return bits_differ(got, want)
        return differs(got, want, tolerance, types=True)

    def _pulled(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        def pulled(operands: tuple[Any, ...], cotangents: Any) -> Any:
            if not self.case.gradients:
                return fn(*operands), ()

            def of(*floats: Any) -> Any:
                return fn(*with_floats(operands, self.floats, floats))

            outputs, pull = jax.vjp(of, *(operands[i] for i in self.floats))
            full = jax.tree.map(
                lambda y, c: (
                    c.astype(y.dtype) if is_float(y) else np.zeros(y.shape, jax.dtypes.float0)
                ),
                outputs,
                cotangents,
            )
            return outputs, pull(full)

        return pulled

    @functools.cached_property
    def cotangents(self) -> Any:
        """Fixed cotangents of the outputs."""
        rng = np.random.default_rng(7)
        shapes = jax.eval_shape(self.reference, *self.case.make(0, self.dtype))
        return jax.tree.map(lambda y: jnp.asarray(rng.normal(size=y.shape), jnp.float32), shapes)

    def wanted(self, operands: tuple[Any, ...]) -> Any:
        """The oracle's `(outputs, gradients)`: the reference in float32 at highest precision."""
        raised = tuple(x.astype(jnp.float32) if is_float(x) else x for x in operands)
        with jax.default_matmul_precision("highest"):
            return self.oracle(raised, self.cotangents)

    @property
    def near(self) -> float:
        """The tolerance of outputs."""
        return self.tolerance.of(self.dtype)

    @property
    def near_gradient(self) -> float:
        """The tolerance of gradients."""
        return self.near * self.tolerance.gradient


def is_float(x: Any) -> bool:
    """Whether x is an array of floats.

    >>> is_float(jnp.ones(1)), is_float(None)
    (True, False)
    """
    return x is not None and jnp.issubdtype(x.dtype, jnp.floating)


def with_floats(operands: tuple[Any, ...], at: tuple[int, ...], values: Any) -> tuple[Any, ...]:
    """Operands with those at `at` replaced.

    >>> with_floats((1, 2, 3), (0, 2), (7, 9))
    (7, 2, 9)
    """
    made = list(operands)
    for i, x in zip(at, values, strict=True):
        made[i] = x
    return tuple(made)


# --- values and gradients ------------------------------------------------------------------------


def equals_reference(subject: Subject, operands: tuple[Any, ...]) -> Outcome:
    """Outputs, their shapes and dtypes, against the reference."""
    got, _ = subject.both(operands, subject.cotangents)
    shapes = jax.eval_shape(subject.reference, *operands)
    if jax.tree.structure(shapes) != jax.tree.structure(got):
        return Mismatch(f"got {jax.tree.structure(got)}, want {jax.tree.structure(shapes)}")
    for y, x in zip(jax.tree.leaves(got), jax.tree.leaves(shapes), strict=True):
        if (y.shape, y.dtype) != (x.shape, x.dtype):
            return Mismatch(f"got {y.dtype}{y.shape}, want {x.dtype}{x.shape}")
    want, _ = subject.wanted(operands)
    return differs(got, want, subject.near)


def gradient_equals_reference(subject: Subject, operands: tuple[Any, ...]) -> Outcome:
    """The vjp against the reference's."""
    if not subject.case.gradients:
        return "no gradients in this case"
    got = subject.both(operands, subject.cotangents)[1]
    return differs(got, subject.wanted(operands)[1], subject.near_gradient)


def reference_equals_differences(subject: Subject, operands: tuple[Any, ...]) -> Outcome:
    """The reference's gradient against central differences of fourth order in float64."""
    if not subject.case.gradients:
        return "no gradients in this case"
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        raised = tuple(
            jnp.asarray(np.asarray(x).astype(np.float64)) if is_float(x) else x for x in operands
        )
        floats = tuple(raised[i] for i in subject.floats)
        along = tuple(jnp.asarray(rng.normal(size=x.shape)) for x in floats)
        weights = jax.tree.map(lambda c: np.asarray(c, np.float64), subject.cotangents)
        slope, difference, size = _slopes(subject, raised, floats, along, weights)
    error = abs(slope - difference) / (1.0 + size)
    if not error <= 1e-4:
        return Mismatch(f"the gradient has the slope {slope:.6g}, differences {difference:.6g}")
    return error


def _slopes(subject: Subject, operands: Any, floats: Any, along: Any, weights: Any) -> Any:
    """(slope by the gradient, slope by differences, size of the terms)."""

    @jax.jit
    def total(*floats: Any) -> Any:
        out = subject.reference(*with_floats(operands, subject.floats, floats))
        terms = [
            jnp.sum(y * w)
            for y, w in zip(jax.tree.leaves(out), jax.tree.leaves(weights), strict=True)
            if is_float(y)
        ]
        return sum(terms, jnp.zeros(()))

    gradients = jax.grad(total, tuple(range(len(floats))))(*floats)
    products = [jnp.sum(g * d) for g, d in zip(gradients, along, strict=True)]
    h = 1e-2
    at = lambda t: float(total(*(x + t * d for x, d in zip(floats, along, strict=True))))
    difference = (8 * (at(h) - at(-h)) - (at(2 * h) - at(-2 * h))) / (12 * h)
    size = sum(float(jnp.sum(jnp.abs(g * d))) for g, d in zip(gradients, along, strict=True))
    return float(sum(products)), difference, size + abs(at(0.0))


# --- transformations -----------------------------------------------------------------------------


def vmap_equals_loop(subject: Subject, operands: tuple[Any, ...]) -> Outcome:
    """vmap of outputs and gradients against one element after the other."""
    elements = [_varied(operands, n) for n in range(3)]
    worst = 0.0
    for axes in _vmap_axes(subject, operands):
        rows = [with_shared(element, operands, axes) for element in elements]
        stacked = tuple(
            jnp.stack([row[i] for row in rows]) if axis == 0 else operands[i]
            for i, axis in enumerate(axes)
        )
        got = _vmapped(subject, axes)(stacked, subject.cotangents)
        each = [subject.both(row, subject.cotangents) for row in rows]
        want = jax.tree.map(lambda *leaves: jnp.stack(leaves), *each)
        for a, b, near in zip(got, want, (subject.near, subject.near_gradient), strict=True):
            found = differs(a, b, near, types=True)
            if isinstance(found, Mismatch):
                return Mismatch(f"vmap over {axes}: {found}", found.error)
            worst = max(worst, found)
    return worst


@functools.lru_cache(maxsize=16)
def _vmapped(subject: Subject, axes: tuple[int | None, ...]) -> Callable[..., Any]:
    return jax.jit(jax.vmap(subject.both, in_axes=(axes, None)))


def _vmap_axes(subject: Subject, operands: tuple[Any, ...]) -> tuple[Any, ...]:
    if subject.case.vmap is not None:
        return tuple(subject.case.vmap)
    every = tuple(None if x is None else 0 for x in operands)
    first = tuple(0 if i == subject.floats[0] else None for i in range(len(operands)))
    return (every,) if first == every else (every, first)


def with_shared(element: Any, operands: Any, axes: Any) -> tuple[Any, ...]:
    """The operands of one element: its own where the axis is mapped, else the shared ones.

    >>> with_shared((1, 2), (7, 8), (0, None))
    (1, 8)
    """
    return tuple(e if a == 0 else x for e, x, a in zip(element, operands, axes, strict=True))


def _varied(operands: tuple[Any, ...], n: int) -> tuple[Any, ...]:
    """Other float values of the same kind; what is no float stays valid by staying."""
    return tuple(
        jnp.roll(x, n) * jnp.asarray((1, -1, 0.5)[n], x.dtype) if is_float(x) else x
        for x in operands
    )


def jit_equals_eager(subject: Subject, operands: tuple[Any, ...]) -> Outcome:
    """The jitted forward against the same call without jit."""
    return differs(
        subject.run(*operands), subject.call(*operands), subject.near, types=True
    )  # fmt: skip


def devices_equal_one(subject: Subject, operands: tuple[Any, ...]) -> Outcome:
    """shard_map, and jit of sharded operands, over all devices against one."""
    if subject.case.shard is None:
        return "the case names no shards"
    devices = jax.devices()[:8]
    if len(devices) == 1:
        return "there is one device"
    in_specs, out_specs = subject.case.shard
    mesh = Mesh(np.array(devices), ("devices",))
    mapped = jax.shard_map(subject.call, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    sharded = dataclasses.replace(subject, call=mapped)
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, spec))
    placed = tuple(
        None if x is None else place(x, spec) for x, spec in zip(operands, in_specs, strict=True)
    )
    want = subject.both(operands, subject.cotangents)
    worst = 0.0
    for name, both in (("shard_map", sharded.both), ("jit of shards", subject.both)):
        got = both(placed, subject.cotangents)
        for a, b, near in zip(got, want, (subject.near, subject.near_gradient), strict=True):
            found = differs(jax.device_get(a), jax.device_get(b), near)
            if isinstance(found, Mismatch):
                return Mismatch(f"{name} over {len(devices)} devices: {found}", found.error)
            worst = max(worst, found)
    return worst


def export_equals_jit(subject: Subject, operands: tuple[Any, ...]) -> Outcome:
    """Exported, serialised where flatbuffers is installed, and called, against jit."""
    allowed = [jax.export.DisabledSafetyCheck.custom_call(name) for name in subject.custom_calls]
    try:
        exported = jax.export.export(subject.run, disabled_checks=allowed)(*operands)
        if importlib.util.find_spec("flatbuffers") is not None:
            exported = jax.export.deserialize(exported.serialize())
    except (ValueError, NotImplementedError) as error:
        return Mismatch(f"it cannot be exported: {error}")
    return differs(exported.call(*operands), subject.run(*operands), subject.near, types=True)


# --- what a run must not do ----------------------------------------------------------------------


def runs_are_equal(subject: Subject, operands: tuple[Any, ...]) -> Outcome:
    """Outputs and gradients of four runs are bitwise the same."""
    first = subject.both(operands, subject.cotangents)
    for _ in range(3):
        found = bits_differ(subject.both(operands, subject.cotangents), first)
        if isinstance(found, Mismatch):
            return Mismatch(f"another run of the same program: {found}")
    return 0.0


def donation_changes_nothing(subject: Subject, operands: tuple[Any, ...]) -> Outcome:
    """Operands survive a call; donated ones give the same, and in place where the case says so."""
    before = jax.tree.map(np.array, operands)
    want = jax.block_until_ready(subject.run(*operands))
    found = bits_differ(operands, before)
    if isinstance(found, Mismatch):
        return Mismatch(f"the call changed its operand {found}")
    given = tuple(subject.case.donate) or _donatable(subject, operands, want)
    if not given:
        return "no operand has the type of an output"
    copies: tuple[Any, ...] = tuple(
        None if x is None else jnp.array(x, copy=True) for x in operands
    )
    places = {i: copies[i].unsafe_buffer_pointer() for i in given}
    with warnings.catch_warnings():  # "not usable" is found out, and said, below
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
        got = jax.jit(subject.call, donate_argnums=given)(*copies)
    found = subject.same(got, want, subject.near)
    if isinstance(found, Mismatch):
        return Mismatch(f"with operands {given} donated: {found}")
    used = {y.unsafe_buffer_pointer() for y in jax.tree.leaves(got)}
    for i in subject.case.donate:
        if places[i] not in used:
            return Mismatch(f"the donated operand {i} was copied, not written in place")
    return 0.0


def _donatable(subject: Subject, operands: Any, outputs: Any) -> tuple[int, ...]:
    """Operands of the type of an output, one for each output."""
    free = [(y.shape, y.dtype) for y in jax.tree.leaves(outputs) if y.size]
    found = []
    for i in subject.floats:
        kind = (operands[i].shape, operands[i].dtype)
        if kind in free:
            free.remove(kind)
            found.append(i)
    return tuple(found)


def unread_is_not_read(subject: Subject, operands: tuple[Any, ...]) -> Outcome:
    """NaN and infinities where the op must not read change nothing."""
    if subject.case.unread is None:
        return "the op reads everything"
    want = subject.both(operands, subject.cotangents)
    masks = subject.case.unread(*operands)
    for value in (np.nan, np.inf, -np.inf):
        filled = tuple(
            x if mask is None else jnp.where(mask, jnp.asarray(value, x.dtype), x)
            for x, mask in zip(operands, masks, strict=True)
        )
        found = subject.same(subject.both(filled, subject.cotangents), want, subject.near_gradient)
        if isinstance(found, Mismatch):
            return Mismatch(f"{value} where it must not be read: {found}")
    return 0.0


def nonfinite_as_reference(subject: Subject, operands: tuple[Any, ...]) -> Outcome:
    """NaN and infinities elsewhere come out where the reference's do."""
    masks = (None,) * len(operands)
    if subject.case.unread is not None:
        masks = subject.case.unread(*operands)
    worst = 0.0
    for i in subject.floats if subject.case.poison is None else subject.case.poison:
        read = np.ones(operands[i].shape, bool) if masks[i] is None else ~np.asarray(masks[i])
        places = np.flatnonzero(read)
        if not places.size:
            continue
        place = np.unravel_index(places[places.size // 2], read.shape)
        for value in (np.nan, np.inf, -np.inf):
            x = operands[i].at[place].set(value)
            poisoned = with_floats(operands, (i,), (x,))
            got, _ = subject.both(poisoned, subject.cotangents)
            found = differs(got, subject.wanted(poisoned)[0], subject.near)
            if isinstance(found, Mismatch):
                at = [int(n) for n in place]
                return Mismatch(f"{value} in operand {i} at {at}: {found}", found.error)
            worst = max(worst, found)
    return worst


def compiles_once(subject: Subject, operands: tuple[Any, ...]) -> Outcome:
    """New values of the same shapes compile nothing, with and without jit."""
    run = jax.jit(subject.call)
    for n in range(2):
        jax.block_until_ready((subject.call(*_varied(operands, n)), run(*_varied(operands, n))))
    third = jax.block_until_ready(_varied(operands, 2))
    for name, call in (("call", subject.call), ("jitted call", run)):
        with compilations() as count:
            jax.block_until_ready(call(*third))
        if count[0]:
            return Mismatch(f"the third {name} with the same shapes compiled {count[0]} programs")
    return 0.0


@contextlib.contextmanager
def compilations() -> Iterator[list[int]]:
    """Counts the programs that XLA is given in this context.

    >>> with compilations() as count:
    ...     _ = jax.jit(lambda x: x * 3 + 1.25)(1.0)
    >>> count
    [1]
    """
    count = [0]

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        count[0] += event == "/jax/core/compile/backend_compile_duration"

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield count
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


# Every case is tried for the first two, the thorough ones for all.
VALUES: Mapping[str, Callable[[Subject, tuple[Any, ...]], Outcome]] = {
    "reference": equals_reference,
    "gradient": gradient_equals_reference,
}
TRANSFORMATIONS: Mapping[str, Callable[[Subject, tuple[Any, ...]], Outcome]] = {
    "finite differences": reference_equals_differences,
    "vmap": vmap_equals_loop,
    "jit": jit_equals_eager,
    "devices": devices_equal_one,
    "determinism": runs_are_equal,
    "donation": donation_changes_nothing,
    "unread": unread_is_not_read,
    "nan and inf": nonfinite_as_reference,
    "export": export_equals_jit,
    "recompilation": compiles_once,
}
