"""Where a program's time goes: on the host by scope, and on the device by the same names.

    with Profiler(device_trace=True) as profiler:
        for batch in data:
            with profile_scope("step"):
                state, metrics = step(state, batch)
    print(profiler.report().table())

A host scope measures the host: under asynchronous dispatch that is the time to enqueue, not the
work.  The work is read from the device's own trace, whose events carry instruction names; the
programs, which the trace carries as well, say under which `jax.named_scope` each instruction was
traced.  A fused kernel is charged to its root's scope, what has no name to `(unattributed)`.
"""

import collections
import functools
import os
import re
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import jax

from ._costs import Cost as Cost
from ._costs import Peak as Peak
from ._costs import device_peak as device_peak
from ._costs import register_cost as register_cost
from ._costs import scope_costs as scope_costs
from ._device import (
    CLOCK,
    Trace,
    busy_seconds,
    device_rows,
    executions,
    instruction_of,
    read_trace,
)
from ._device import DeviceRow as DeviceRow
from ._report import Comparison as Comparison
from ._report import HostRow as HostRow
from ._report import ProfileReport as ProfileReport
from ._report import ScopeRow as ScopeRow
from ._report import host_row
from ._scopes import UNATTRIBUTED as UNATTRIBUTED
from ._scopes import Path, scope_path

MAX_EVENTS = 1_000_000  # of the timelines; the statistics go on
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

_active: "Profiler | None" = None
_here = threading.local()


class profile_scope:
    """A named part of the program: `with profile_scope("x"):`, or a decorator.

    Scopes nest, in every thread by itself.  In code that is traced it is `jax.named_scope` as
    well, so the compiled instructions carry the name (unless named is False).  Without a running
    profiler it is that only.

    >>> @profile_scope("twice")
    ... def twice(x): return 2 * x
    >>> with Profiler() as profiler:
    ...     with profile_scope("outer"):
    ...         _ = twice(1), twice(2)
    >>> [(row.path, row.count) for row in profiler.report().host]
    [(('outer',), 1), (('outer', 'twice'), 2)]
    """

    def __init__(self, name: str, *, named: bool = True):
        self.name, self.named = name, named
        self._open: list[tuple] = []

    def __enter__(self) -> Self:
        scope = None
        if self.named:
            scope = jax.named_scope(self.name)
            scope.__enter__()
        profiler = _active
        entry = None
        if profiler is not None:
            path = (*getattr(_here, "path", ()), self.name)
            _here.path = path
            entry = (profiler, path, profiler.memory(), time.perf_counter())
        self._open.append((scope, entry))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        now = time.perf_counter()
        scope, entry = self._open.pop()
        if entry is not None:
            profiler, path, before, begun = entry
            _here.path = path[:-1]
            profiler.add(path, begun, now - begun, before, profiler.memory())
        if scope is not None:
            scope.__exit__(kind, error, trace)

    def __call__(self, function: Callable) -> Callable:
        """The function, in a scope of its own at every call."""

        @functools.wraps(function)
        def scoped(*args: Any, **kwargs: Any) -> Any:
            with profile_scope(self.name, named=self.named):
                return function(*args, **kwargs)

        return scoped


def profiling() -> bool:
    """Whether a profiler runs: for hooks that would cost something without one.

    >>> profiling()
    False
    """
    return _active is not None


class Profiler:
    """Collects host scopes, and with device_trace what the devices did, between start and stop.

    Args:
      device_trace: record the devices with `jax.profiler`; the report then has device time.
      memory: read the bytes in use, of the first device and of the process, around every scope.

    One profiler runs at a time; scopes of all threads go to it.  It may be started again: times
    add up.
    """

    def __init__(self, *, device_trace: bool = False, memory: bool = True):
        self.device_trace = device_trace
        self._memory_wanted = memory
        self._lock = threading.Lock()
        self._device = jax.local_devices()[0]
        self._durations: dict[Path, list[float]] = collections.defaultdict(list)
        self._compiling: dict[Path, float] = collections.defaultdict(float)
        self._memory: dict[Path, list[int]] = {}  # live before, live after, grown, host grown
        self._timeline: list[tuple[Path, float, float, int, int]] = []
        self._folder: str | None = None
        self._traces: list[Trace] = []
        self._programs: list[dict[str, Any]] = []
        self._statm = -1
        self._noted = 0.0
        self._host_peak = 0
        self._begun = self.seconds = 0.0

    def start(self) -> None:
        """Begin.

        Raises:
          RuntimeError: another profiler runs.
        """
        global _active
        if _active is not None:
            raise RuntimeError("a profiler is running; stop it first")
        if self._memory_wanted and os.path.exists("/proc/self/statm"):
            self._statm = os.open("/proc/self/statm", os.O_RDONLY)
        if self.device_trace:
            self._folder = tempfile.mkdtemp(prefix="aidx-profile-")
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # a call of every Python function is no small cost
            jax.profiler.start_trace(self._folder, profiler_options=options)
            with jax.profiler.TraceAnnotation(CLOCK):
                self._noted = time.perf_counter()
        jax.monitoring.register_event_duration_secs_listener(self._compiled)
        self._begun = time.perf_counter()
        _active = self

    def stop(self) -> None:
        """End; scopes that are open are not counted."""
        global _active
        if _active is not self:
            return
        _active = None
        self.seconds += time.perf_counter() - self._begun
        jax.monitoring.unregister_event_duration_listener(self._compiled)
        if self._statm >= 0:
            os.close(self._statm)
            self._statm = -1
        if self._folder is not None:
            jax.profiler.stop_trace()
            trace = read_trace(self._folder, self._noted)
            self._traces.append(trace)
            self._programs += memory_of_live({event.program for event in trace.events})
            shutil.rmtree(self._folder)
            self._folder = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def memory(self) -> tuple[int, int]:
        """Bytes in use now: (of the first device, of this process); zeros where they are not told
        or not wanted."""
        if not self._memory_wanted:
            return 0, 0
        resident = 0
        if self._statm >= 0:
            try:
                resident = PAGE * int(os.pread(self._statm, 128, 0).split()[1])
            except OSError:  # a thread's scope ended while the profiler stopped
                resident = 0
        return live_bytes(self._device), resident

    def add(
        self,
        path: Path,
        begun: float,
        seconds: float,
        before: tuple[int, int] = (0, 0),
        after: tuple[int, int] = (0, 0),
    ) -> None:
        """Count one passage through a scope, with `memory` at its ends (`profile_scope` does)."""
        with self._lock:
            self._durations[path].append(seconds)
            memory = self._memory.setdefault(path, [before[0], 0, 0, 0])
            memory[1] = after[0]
            memory[2] += after[0] - before[0]
            memory[3] += after[1] - before[1]
            self._host_peak = max(self._host_peak, after[1])
            if len(self._timeline) < MAX_EVENTS:
                thread = threading.get_ident()
                self._timeline.append((path, begun, seconds, thread, after[0]))

    def _compiled(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "/compile/" in event:
            with self._lock:
                self._compiling[getattr(_here, "path", ())] += duration_secs

    def report(
        self,
        programs: Iterable[Any] = (),
        costs: Mapping[Path, Cost] | None = None,
        calls: int | None = None,
        peak: Peak | None = None,
    ) -> ProfileReport:
        """What was found.

        Args:
          programs: compiled programs (`step.lower(...).compile()`): their memory, and the names of
            instructions where the trace does not carry the program itself.
          costs: operations by scope, of `scope_costs`, for one call.  None counts the matmuls that
            XLA kept, but no kernel's operations.  Bytes are those of the compiled instructions.
          calls: how often the function of costs was called; None: as often as the program ran that
            took the longest.
          peak: of the device; None looks it up.
        """
        programs = list(programs)
        with self._lock:
            host = [
                host_row(path, times, self._compiling.get(path, 0.0), **self._memory_row(path))
                for path, times in sorted(self._durations.items())
            ]
            timeline = tuple(self._timeline)
        trace = joined(self._traces)
        unknown = any(event.program_id not in trace.programs for event in trace.events)
        texts = [p.as_text() for p in programs] if unknown else []
        if calls is None:
            calls = runs_of_longest(trace)
        rows = device_rows(trace, texts, costs, calls)
        known = {p["program"]: p for p in self._programs}
        known |= {p["program"]: p for p in map(program_memory, programs)}
        return ProfileReport(
            seconds=self.seconds,
            host=tuple(host),
            device=tuple(rows) if trace.events else (),
            device_busy=busy_seconds(trace.events),
            programs=tuple(known.values()),
            timeline=timeline,
            device_timeline=kernel_timeline(trace),
            peak=peak or device_peak(jax.local_devices()[0].device_kind),
            host_peak=self._host_peak,
        )

    def _memory_row(self, path: Path) -> dict[str, int]:
        names = ("live_before", "live_after", "grown", "host_grown")
        return dict(zip(names, self._memory[path], strict=True))


def joined(traces: Iterable[Trace]) -> Trace:
    """Several traces of one process as one.

    >>> joined([]).events
    ()
    """
    events, programs, clock = [], {}, None
    for trace in traces:
        events += trace.events
        programs |= trace.programs
        clock = trace.clock if clock is None else clock
    return Trace(tuple(events), programs, clock)


def runs_of_longest(trace: Trace) -> int:
    """How often the program ran that took the longest.

    >>> runs_of_longest(Trace())
    1
    """
    seconds: dict[int, float] = collections.defaultdict(float)
    for event in trace.events:
        seconds[event.program_id] += event.seconds
    times = executions(trace)
    known = [number for number in seconds if number in times]
    return times[max(known, key=lambda number: seconds[number])] if known else 1


def kernel_timeline(trace: Trace) -> tuple[tuple[Path, float, float, str], ...]:
    """(path, begun, seconds, device) of the first million kernels, on the host's clock.

    >>> kernel_timeline(Trace())
    ()
    """
    found = []
    for event in trace.events[:MAX_EVENTS]:
        about = instruction_of(event, trace.programs.get(event.program_id))
        path = (*scope_path(about.op_name if about else ""), event.kernel or event.instruction)
        begun = event.begun + (trace.clock or 0.0)
        found.append((path, begun, event.ended - event.begun, event.device))
    return tuple(found)


def live_bytes(device: Any = None) -> int:
    """Bytes in use on a device (the first local one); 0 where it does not tell.

    >>> live_bytes() >= 0
    True
    """
    stats = (device or jax.local_devices()[0]).memory_stats()
    return 0 if stats is None else int(stats.get("bytes_in_use", 0))


def program_memory(compiled: Any) -> dict[str, Any]:
    """What a compiled program needs, of the compiler's own analysis, in bytes.

    `peak` is what a device holds while it runs: arguments, outputs that are not arguments, and
    temporary arrays.

    >>> found = program_memory(jax.jit(lambda x: x + 1).lower(1.0).compile())
    >>> found["arguments"], found["outputs"]
    (4, 4)
    """
    header = re.match(r"HloModule (\S+?),", compiled.as_text())
    return sizes_of(header.group(1) if header else "?", compiled.memory_analysis())


def memory_of_live(names: set[str]) -> list[dict[str, Any]]:
    """`program_memory` of the programs of these names that the process holds."""
    found = []
    for executable in jax.local_devices()[0].client.live_executables():
        name = executable.hlo_modules()[0].name
        if name in names:
            found.append(sizes_of(name, executable.get_compiled_memory_stats()))
    return found


def sizes_of(name: str, analysis: Any) -> dict[str, Any]:
    """An analysis of XLA's as a dict."""
    sizes = {
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "aliased": analysis.alias_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }
    peak = sizes["arguments"] + sizes["outputs"] - sizes["aliased"] + sizes["temporary"]
    return {"program": name, **sizes, "peak": peak + sizes["code"]}
