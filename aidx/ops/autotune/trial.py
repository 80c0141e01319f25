"""One configuration after the other on one set of operands: right first, then how long."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .table import Entry, Measurement
from .tunable import Tunable, config_text

CACHE_BYTES = 100 << 20  # twice the L2 of an H200: rotated operands come from memory
MOST_SETS = 16
ROUNDS = 8  # of all sets in a program
QUEUE = 4  # programs in flight
TURNS = 9  # of the best and the default

Timer = Callable[["Trial", Hashable], float]

# What a configuration raises that does not fit or is wrong; anything else is a mistake of ours.
FAILURES = (NotImplementedError, ValueError, TypeError, ExceptionGroup, jax.errors.JaxRuntimeError)


@dataclasses.dataclass(frozen=True, eq=False)
class Trial:
    """Operands with values, and what the reference makes of the first set of them."""

    tunable: Tunable
    sets: tuple[tuple[Any, ...], ...]
    static: dict[str, Any]
    want: Any

    def call(self, config: Hashable) -> Callable[..., Any]:
        """The function of the operands in this configuration."""
        return functools.partial(self.tunable.run, config, **self.static)


def prepare(
    tunable: Tunable, operands: tuple[Any, ...], static: dict[str, Any], *, seed: int = 0
) -> Trial:
    """Random operands of these shapes, several sets so that no cache holds what comes next.

    >>> def run(config, x):
    ...     return x + x
    >>> doc = Tunable("doc/trial", run, lambda x: (1, 2), lambda x: 2 * x, ())
    >>> trial = prepare(doc, (jax.ShapeDtypeStruct((4,), jnp.float32),), {})
    >>> len(trial.sets), attempt(Programs(trial, lambda trial, config: 0.5), 1).seconds
    (16, 0.5)
    """
    return drawn(tunable, operands, static, seed=seed)()


def drawn(
    tunable: Tunable, operands: tuple[Any, ...], static: dict[str, Any], *, seed: int = 0
) -> Callable[[], Trial]:
    """Operands are drawn and the reference compiled; what this returns runs it, for the trial.

    >>> doc = Tunable("doc/drawn", lambda config, x: x, lambda x: (1,), lambda x: 2 * x, ())
    >>> trial = drawn(doc, (jax.ShapeDtypeStruct((4,), jnp.float32),), {})
    >>> trial().want.shape
    (4,)
    """
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    abstract = jax.tree.map(shape, tuple(operands))
    make = tunable.inputs or random_inputs
    rng = np.random.default_rng(seed)
    first = make(rng, *abstract, **static)
    nbytes = sum(x.nbytes for x in jax.tree.leaves(first))
    count = int(np.clip(CACHE_BYTES // max(nbytes, 1), 1, MOST_SETS))
    sets = (first, *(make(rng, *abstract, **static) for _ in range(count - 1)))
    exact = jax.tree.map(_float32, first)
    with jax.default_matmul_precision("highest"):
        program = jax.jit(functools.partial(tunable.reference, **static)).lower(*exact).compile()
    return lambda: Trial(tunable, sets, dict(static), jax.block_until_ready(program(*exact)))


def compiled(trial: Trial, config: Hashable, chain: bool = True) -> Any:
    """The program of a configuration, of all sets: (total, outputs of the first set).

    Without `chain` (where another clock is used) it is that one call alone.
    """
    call = jax.jit(trial.call(config))  # traced and lowered once, however often it is called
    program = chained(call, ROUNDS) if chain else lambda *sets: (0.0, call(*sets[0]))
    return jax.jit(program).lower(*trial.sets).compile()


class Programs:
    """The compiled programs of a trial's configurations, made when they are first asked for."""

    def __init__(self, trial: Trial, timer: Timer | None = None):
        """`timer` is a clock in place of the device's time."""
        self.trial, self.timer = trial, timer
        self._made: dict[str, Any] = {}

    def get(self, config: Hashable) -> Any:
        """What `compiled` gives."""
        text = config_text(config)
        if text not in self._made:
            self._made[text] = compiled(self.trial, config, chain=self.timer is None)
        return self._made[text]

    def seconds(self, config: Hashable, repeats: int) -> float:
        """Device seconds of a call: the median of `repeats` samples."""
        if self.timer is not None:
            return self.timer(self.trial, config)
        return device_seconds(self.get(config), self.trial.sets, repeats=repeats)


def tuned(
    programs: Programs, entry: Entry, space: Mapping[str, Hashable], missing: Sequence[str]
) -> Entry:
    """`entry` with the `missing` configurations of a space (the default first) timed.

    The best two and the default are timed again in turns, so that what changes with time (clocks,
    heat, neighbours) is the same for all of them.
    """
    for text in missing:
        entry = entry.updated([attempt(programs, space[text])])
    finalists = {text: space[text] for text in entry.finalists(tuple(space))}
    return entry.confirmed(in_turns(programs, finalists))


def attempt(programs: Programs, config: Hashable) -> Measurement:
    """What becomes of one configuration: its seconds, if its result is right, or its failure.

    What fails in a way that this does not know raises; in a worker process that ends the process,
    which is recorded as well.
    """
    text, trial = config_text(config), programs.trial
    try:
        got = jax.block_until_ready(programs.get(config)(*trial.sets))[1]
        error = (trial.tunable.error or relative_error)(got, trial.want)
        limit = trial.tunable.limit(trial.sets[0])
        if not error <= limit:
            return Measurement(text, error=_finite(error), failure=f"wrong: error {error:.2g} is "
                               f"above {limit:.2g}")  # fmt: skip
        return Measurement(text, seconds=programs.seconds(config, 5), error=error)
    except FAILURES as error:
        return Measurement(text, failure=_reason(error))


def in_turns(programs: Programs, configs: Mapping[str, Hashable]) -> dict[str, float]:
    """The median seconds of each configuration, over rounds in which each has its turn."""
    if len(configs) < 2:
        return {}
    samples: dict[str, list[float]] = {text: [] for text in configs}
    for _ in range(TURNS):
        for text, config in configs.items():
            samples[text].append(programs.seconds(config, 1))
    return {text: median(values) for text, values in samples.items()}


def _finite(error: float) -> float | None:
    return error if np.isfinite(error) else None  # JSON knows no infinity


def _reason(error: Exception) -> str:
    if isinstance(error, ExceptionGroup):
        return "; ".join(_reason(e) for e in error.exceptions)
    said = " ".join(str(error).split())[:300]
    return (
        f"{'refused' if isinstance(error, NotImplementedError) else type(error).__name__}: {said}"
    )


def _float32(x: jax.Array) -> jax.Array:
    wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
    return x.astype(jnp.float32) if wide else x


def random_inputs(rng: np.random.Generator, *operands: Any, **static: Any) -> tuple[Any, ...]:
    """Standard normal floats, and zeros.

    >>> x, i = random_inputs(np.random.default_rng(0), jnp.zeros(3), jnp.zeros(2, jnp.int32))
    >>> print(bool(jnp.all(x != 0)), i)
    True [0 0]
    """
    del static  # values depend on shapes alone

    def one(x: Any) -> jax.Array:
        if not jnp.issubdtype(x.dtype, jnp.floating):
            return jnp.zeros(x.shape, x.dtype)
        key = jax.random.key(int(rng.integers(1 << 31)))
        return _normal(key, x.shape, jnp.dtype(x.dtype).name)

    return jax.tree.map(one, operands)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def relative_error(got: Any, want: Any, *, floor: float | None = None) -> float:
    """The largest `|got - want| / (floor + |want|)`; infinite where one is not finite alone.

    The floor is the root mean square of an output by default: outputs may be as small as they like,
    an error counts beside the size of what it is an error of.

    >>> want = jnp.array([0.03, -0.03, jnp.nan])
    >>> print(round(relative_error(want.at[0].set(0.06), want), 3), relative_error(want, want))
    0.551 0.0
    >>> relative_error(want.at[2].set(0.0), want)
    inf
    """
    if jax.tree.structure(got) != jax.tree.structure(want):
        raise ValueError(f"outputs {jax.tree.structure(got)}, not {jax.tree.structure(want)}")
    pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True))
    for a, b in pairs:
        if a.shape != b.shape:
            raise ValueError(f"an output is {a.shape}, not {b.shape}")
    return max((float(_worst(a, b, floor)) for a, b in pairs if a.size), default=0.0)


@functools.partial(jax.jit, static_argnums=2)
def _worst(got: jax.Array, want: jax.Array, floor: float | None) -> jax.Array:
    got, want = got.astype(jnp.float32), want.astype(jnp.float32)
    finite = jnp.isfinite(want)
    size = jnp.where(finite, jnp.abs(want), 0.0)
    least = jnp.sqrt(jnp.mean(size * size)) if floor is None else floor
    error = jnp.abs(got - want) / (least + size)
    same = (got == want) | (jnp.isnan(got) & jnp.isnan(want))
    error = jnp.where(finite & jnp.isfinite(got), error, jnp.inf)
    return jnp.max(jnp.where(same, 0.0, error))


# --- time ----------------------------------------------------------------------------------------


def chained(f: Callable[..., Any], rounds: int) -> Callable[..., tuple[jax.Array, Any]]:
    """One program that calls f on every set of operands in turn, `rounds` times, one by one.

    One more call, of the first set, comes after them for its outputs.
    """

    def body(_: Any, state: Any) -> Any:
        total, *sets = state
        for i in range(len(sets)):
            # Without the barrier XLA would compute only the elements read below.
            out = jax.lax.optimization_barrier(f(*sets[i]))
            read = [x.ravel()[0].astype(jnp.float32) for x in jax.tree.leaves(out) if x.size]
            # The next call waits: its operands come out of a barrier with what was read.
            total, *sets = jax.lax.optimization_barrier((sum(read, total), *sets))
        return (total, *sets)

    def program(*sets: Any) -> tuple[jax.Array, Any]:
        total, first, *_ = jax.lax.fori_loop(0, rounds, body, (jnp.float32(0), *sets))
        return total, f(*first)

    return program


def device_seconds(
    chain: Any,
    sets: Sequence[Any],
    *,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Median device seconds of one call of a compiled chain.

    Programs of many calls are queued; the time of one is taken off that of several, so that
    dispatch and the way back do not count.  Nothing else may run in the process meanwhile: threads
    that compile would hold up the dispatch of short calls.
    """

    def took(count: int) -> float:
        start = clock()
        jax.block_until_ready([chain(*sets) for _ in range(count)])
        return clock() - start

    took(1)
    samples = [took(QUEUE) - took(1) for _ in range(repeats)]
    return max(median(samples) / ((QUEUE - 1) * (ROUNDS * len(sets) + 1)), 1e-9)


def median(values: Sequence[float]) -> float:
    """The middle one, the lower of two.

    >>> median([3.0, 1.0, 2.0])
    2.0
    """
    return sorted(values)[(len(values) - 1) // 2]
