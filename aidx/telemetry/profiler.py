"""Where a program's time goes: on the host by scope, and on the device by the same names.

    with Profiler(device_trace=True) as profiler:
        for batch in data:
            with profile_scope("step"):
                state, metrics = step(state, batch)
    print(profiler.report(programs=[compiled]).table())

A host scope measures the host: under asynchronous dispatch that is the time to enqueue, not the
work.  The work is read from the device's own trace, whose events carry instruction names; the
compiled program says under which `jax.named_scope` each instruction was traced.  A fused kernel is
charged to its root's scope, what has no name to `(unattributed)`.
"""

import collections
import csv
import dataclasses
import functools
import html
import io
import json
import math
import pathlib
import re
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

UNATTRIBUTED = "(unattributed)"
MAX_EVENTS = 1_000_000  # of the timeline; the statistics go on

type Path = tuple[str, ...]

_active: "Profiler | None" = None
_here = threading.local()


class profile_scope:
    """A named part of the program: `with profile_scope("x"):`, or a decorator.

    Scopes nest, in every thread by itself.  In code that is traced it is `jax.named_scope` as
    well, so the compiled instructions carry the name.  Without a running profiler it is that only.

    >>> @profile_scope("twice")
    ... def twice(x): return 2 * x
    >>> with Profiler() as profiler:
    ...     with profile_scope("outer"):
    ...         _ = twice(1), twice(2)
    >>> [(row.path, row.count) for row in profiler.report().host]
    [(('outer',), 1), (('outer', 'twice'), 2)]
    """

    def __init__(self, name: str):
        self.name = name
        self._open: list[tuple] = []

    def __enter__(self) -> Self:
        scope = jax.named_scope(self.name)
        scope.__enter__()
        profiler = _active
        entry = None
        if profiler is not None:
            path = (*getattr(_here, "path", ()), self.name)
            _here.path = path
            entry = (profiler, path, live_bytes(), time.perf_counter())
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
            profiler.add(path, begun, now - begun, live_bytes() - before)
        scope.__exit__(kind, error, trace)

    def __call__(self, function: Callable) -> Callable:
        """The function, in a scope of its own at every call."""

        @functools.wraps(function)
        def scoped(*args: Any, **kwargs: Any) -> Any:
            with profile_scope(self.name):
                return function(*args, **kwargs)

        return scoped


class Profiler:
    """Collects host scopes, and with device_trace what the devices did, between start and stop.

    Args:
      device_trace: record the devices with `jax.profiler`; the report then has device time.

    One profiler runs at a time; scopes of all threads go to it.
    """

    def __init__(self, *, device_trace: bool = False):
        self.device_trace = device_trace
        self._lock = threading.Lock()
        self._durations: dict[Path, list[float]] = collections.defaultdict(list)
        self._compiling: dict[Path, float] = collections.defaultdict(float)
        self._memory: dict[Path, int] = collections.defaultdict(int)
        self._timeline: list[tuple[Path, float, float, int]] = []
        self._folder: str | None = None
        self._events: list[DeviceEvent] = []
        self._begun = self.seconds = 0.0

    def start(self) -> None:
        """Begin.

        Raises:
          RuntimeError: another profiler runs.
        """
        global _active
        if _active is not None:
            raise RuntimeError("a profiler is running; stop it first")
        if self.device_trace:
            self._folder = tempfile.mkdtemp(prefix="aidx-profile-")
            jax.profiler.start_trace(self._folder)
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
        if self._folder is not None:
            jax.profiler.stop_trace()
            self._events += read_trace(self._folder)
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

    def add(self, path: Path, begun: float, seconds: float, grown: int) -> None:
        """Count one passage through a scope (`profile_scope` calls it)."""
        with self._lock:
            self._durations[path].append(seconds)
            self._memory[path] += grown
            if len(self._timeline) < MAX_EVENTS:
                self._timeline.append((path, begun, seconds, threading.get_ident()))

    def _compiled(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if "/compile/" in event:
            with self._lock:
                self._compiling[getattr(_here, "path", ())] += duration_secs

    def report(
        self,
        programs: Iterable[Any] = (),
        costs: Mapping[Path, "Cost"] | None = None,
    ) -> "ProfileReport":
        """What was found.

        Args:
          programs: compiled programs (`step.lower(...).compile()`) whose instructions the device's
            events are looked up in.
          costs: operations by scope, of `scope_costs`, for one call of the programs.
        """
        programs = list(programs)
        with self._lock:
            host = [
                host_row(path, times, self._compiling.get(path, 0.0), self._memory[path])
                for path, times in sorted(self._durations.items())
            ]
            timeline = tuple(self._timeline)
        device = device_rows(self._events, [p.as_text() for p in programs], costs or {})
        return ProfileReport(
            seconds=self.seconds,
            host=tuple(host),
            device=tuple(device),
            device_busy=busy_seconds(self._events),
            programs=tuple(program_memory(p) for p in programs),
            timeline=timeline,
        )


@dataclasses.dataclass(frozen=True)
class HostRow:
    """A host scope: seconds of its passages; `compiling` of them compiled, `grown` device bytes."""

    path: Path
    count: int
    total: float
    mean: float
    min: float
    p50: float
    p95: float
    p99: float
    max: float
    compiling: float
    grown: int


@dataclasses.dataclass(frozen=True)
class DeviceRow:
    """A device scope: seconds of its own kernels, how many, and operations where they are known."""

    path: Path
    seconds: float
    kernels: int
    flops: float | None = None
    bytes: float | None = None


@dataclasses.dataclass(frozen=True)
class DeviceEvent:
    """A kernel as the trace has it; `seconds` without what ran within it."""

    program: str
    instruction: str
    begun: float
    ended: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """Operations and bytes of a scope's equations."""

    flops: float = 0.0
    bytes: float = 0.0


@dataclasses.dataclass(frozen=True)
class ProfileReport:
    """A finished profile; every format is a function of it.

    Attributes:
      seconds: between start and stop.
      host: by path.
      device: by path, longest first.
      device_busy: seconds in which a device did anything.
      programs: `{name: bytes}` of each program: arguments, outputs, temporary, code.
      timeline: (path, begun, seconds, thread) of host scopes.
    """

    seconds: float
    host: tuple[HostRow, ...]
    device: tuple[DeviceRow, ...] = ()
    device_busy: float = 0.0
    programs: tuple[dict[str, Any], ...] = ()
    timeline: tuple[tuple[Path, float, float, int], ...] = ()

    def table(self) -> str:
        """For a terminal."""
        lines = [HOST_HEAD.expandtabs(1)]
        for r in self.host:
            name = "  " * (len(r.path) - 1) + r.path[-1]
            numbers = "".join(f"{1e3 * x:10.3f}" for x in (r.total, r.mean, r.p50, r.p95, r.p99))
            lines.append(f"{name[:32]:32}{r.count:8}{numbers}{1e3 * r.compiling:10.1f}")
        if self.device:
            lines += ["", f"{'device scope':48}{'ms':>10}{'share':>8}{'kernels':>9}{'TFLOP/s':>9}"]
        for r in self.device:
            share = r.seconds / self.device_busy if self.device_busy else 0.0
            rate = f"{r.flops / r.seconds / 1e12:9.2f}" if r.flops and r.seconds else ""
            name = "/".join(r.path)
            lines.append(f"{name[-48:]:48}{1e3 * r.seconds:10.3f}{share:8.1%}{r.kernels:9}{rate}")
        return "\n".join(lines)

    def to_json(self) -> str:
        """All but the timeline; `from_json` reads it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["timeline"]
        return json.dumps(fields, default=dataclasses.asdict, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "ProfileReport":
        """What `to_json` wrote."""
        fields = json.loads(text)
        path = lambda row: row | {"path": tuple(row["path"])}
        fields["host"] = tuple(HostRow(**path(row)) for row in fields["host"])
        fields["device"] = tuple(DeviceRow(**path(row)) for row in fields["device"])
        fields["programs"] = tuple(fields["programs"])
        return cls(**fields)

    def to_csv(self) -> str:
        """The host's rows."""
        out = io.StringIO()
        names = [f.name for f in dataclasses.fields(HostRow)]
        writer = csv.DictWriter(out, names)
        writer.writeheader()
        for row in self.host:
            writer.writerow(dataclasses.asdict(row) | {"path": "/".join(row.path)})
        return out.getvalue()

    def to_markdown(self) -> str:
        """Both tables."""
        lines = ["| scope | count | total ms | mean ms | p95 ms | compiling ms |"]
        lines.append("|---|---|---|---|---|---|")
        for r in self.host:
            cells = [f"{1e3 * x:.3f}" for x in (r.total, r.mean, r.p95, r.compiling)]
            lines.append(f"| {'/'.join(r.path)} | {r.count} | {' | '.join(cells)} |")
        if self.device:
            lines += ["", "| device scope | ms | kernels |", "|---|---|---|"]
        for r in self.device:
            lines.append(f"| {'/'.join(r.path)} | {1e3 * r.seconds:.3f} | {r.kernels} |")
        return "\n".join(lines) + "\n"

    def to_chrome_trace(self) -> str:
        """The host's timeline for chrome://tracing and Perfetto."""
        events = [
            {"name": path[-1], "ph": "X", "ts": 1e6 * begun, "dur": 1e6 * seconds, "pid": 1,
             "tid": thread, "args": {"path": "/".join(path)}}
            for path, begun, seconds, thread in self.timeline
        ]  # fmt: skip
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})

    def to_html(self) -> str:
        """Flame graphs of host and device scopes, in one page without scripts."""
        host = {r.path: r.total for r in self.host}
        device: dict[Path, float] = collections.defaultdict(float)
        for r in self.device:
            for depth in range(1, len(r.path) + 1):
                device[r.path[:depth]] += r.seconds
        parts = [flame("host", host), flame("device", device) if device else ""]
        return f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{''.join(parts)}"

    def compare(self, baseline: "ProfileReport", tolerance: float = 0.1) -> "Comparison":
        """What became slower than `1 + tolerance` times the baseline: medians, device seconds.

        Raises:
          ValueError: a negative tolerance.
        """
        if tolerance < 0:
            raise ValueError(f"{tolerance=} must not be negative")
        found = []
        pairs = [
            ("host", {r.path: r.p50 for r in self.host}, {r.path: r.p50 for r in baseline.host}),
            ("device", {r.path: r.seconds for r in self.device},
             {r.path: r.seconds for r in baseline.device}),
        ]  # fmt: skip
        for kind, now, then in pairs:
            for path in sorted(set(now) & set(then)):
                if now[path] > (1 + tolerance) * then[path]:
                    found.append((kind, path, then[path], now[path]))
        return Comparison(tuple(found))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Scopes that became slower: (host or device, path, seconds then, seconds now)."""

    slower: tuple[tuple[str, Path, float, float], ...]

    @property
    def exit_code(self) -> int:
        """1 where anything became slower: for continuous integration."""
        return int(bool(self.slower))

    def __str__(self) -> str:
        return "\n".join(
            f"{kind} {'/'.join(path)}: {1e3 * then:.3f} -> {1e3 * now:.3f} ms"
            for kind, path, then, now in self.slower
        )


HOST_HEAD = f"{'host scope (ms)':32}{'count':>8}" + "".join(
    f"{name:>10}" for name in ("total", "mean", "p50", "p95", "p99", "compiling")
)
STYLE = (
    "body{font:12px sans-serif}.b{position:absolute;height:17px;overflow:hidden;white-space:nowrap;"
    "border:1px solid #fff;box-sizing:border-box;background:#f4a259;padding:0 3px}"
    ".g{position:relative;width:100%}"
)


def flame(title: str, totals: Mapping[Path, float]) -> str:
    """Nested bars, as wide as their share of the roots' seconds.

    >>> "width:50.00%" in flame("host", {("a",): 2.0, ("a", "b"): 1.0})
    True
    """
    whole = sum(seconds for path, seconds in totals.items() if len(path) == 1) or 1.0
    starts: dict[Path, float] = {}
    ends: dict[Path, float] = collections.defaultdict(float)
    bars = []
    for path in sorted(totals, key=lambda p: (len(p), p)):
        parent = path[:-1]
        if parent and parent not in starts:
            continue
        at = ends[parent] if ends[parent] else starts.get(parent, 0.0)
        starts[path], ends[parent] = at, at + totals[path]
        text = html.escape(f"{path[-1]} {1e3 * totals[path]:.3f} ms")
        box = f"left:{at / whole:.2%};width:{totals[path] / whole:.2%};top:{18 * (len(path) - 1)}px"
        bars.append(f'<div class=b style="{box}" title="{text}">{text}</div>')
    depth = max((len(path) for path in totals), default=1)
    return f'<h3>{title}</h3><div class=g style="height:{18 * depth}px">{"".join(bars)}</div>'


def host_row(path: Path, times: Sequence[float], compiling: float, grown: int) -> HostRow:
    """The statistics of a scope's passages.

    >>> host_row(("a",), [1.0, 3.0], 0.0, 0).mean
    2.0
    """
    p50, p95, p99 = (float(x) for x in np.percentile(times, (50, 95, 99)))
    total = math.fsum(times)
    return HostRow(
        path, len(times), total, total / len(times), min(times), p50, p95, p99, max(times),
        compiling, grown,
    )  # fmt: skip


def live_bytes() -> int:
    """Bytes in use on the first local device; 0 where it does not tell.

    >>> live_bytes() >= 0
    True
    """
    stats = jax.local_devices()[0].memory_stats()
    return 0 if stats is None else int(stats.get("bytes_in_use", 0))


def program_memory(compiled: Any) -> dict[str, Any]:
    """What a compiled program needs, of the compiler's own analysis.

    >>> found = program_memory(jax.jit(lambda x: x + 1).lower(1.0).compile())
    >>> found["arguments"], found["outputs"]
    (4, 4)
    """
    analysis = compiled.memory_analysis()
    header = re.match(r"HloModule (\S+?),", compiled.as_text())
    return {
        "program": header.group(1) if header else "?",
        "arguments": analysis.argument_size_in_bytes,
        "outputs": analysis.output_size_in_bytes,
        "temporary": analysis.temp_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }


# --- the device's trace --------------------------------------------------------------------------


def read_trace(folder: str | pathlib.Path) -> list[DeviceEvent]:
    """The instructions that devices executed, from the files of `jax.profiler`.

    Raises:
      FileNotFoundError: there is no trace in the folder.
    """
    files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no trace")
    found: list[DeviceEvent] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the binding's own types
        for file in files:
            for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
                for line in plane.lines:
                    if plane.name.startswith("/device:GPU") and "Stream" not in line.name:
                        continue  # the same kernels again, by other headings
                    found += line_events(line.events)
    return found


def line_events(events: Iterable[Any]) -> list[DeviceEvent]:
    """The events of one stream or thread with their own time: less what ran within them."""
    raw = []
    for event in events:
        stats = dict(event.stats)
        if "hlo_op" in stats:
            ended = event.start_ns + event.duration_ns
            raw.append((event.start_ns, -ended, str(stats.get("hlo_module", "")), stats["hlo_op"]))
    found: list[DeviceEvent] = []
    open_: list[list[Any]] = []  # [begun, ended, program, instruction, own]

    def close(until: float) -> None:
        while open_ and open_[-1][1] <= until:
            begun, ended, program, instruction, own = open_.pop()
            event = DeviceEvent(program, instruction, 1e-9 * begun, 1e-9 * ended, 1e-9 * own)
            found.append(event)

    for begun, negative, program, instruction in sorted(raw):
        close(begun)
        if open_:
            open_[-1][4] -= -negative - begun
        open_.append([begun, -negative, program, str(instruction), -negative - begun])
    close(math.inf)
    return found


def busy_seconds(events: Sequence[DeviceEvent]) -> float:
    """Seconds covered by at least one event.

    >>> one = DeviceEvent("p", "a", 0.0, 2.0, 2.0)
    >>> busy_seconds([one, dataclasses.replace(one, begun=1.0, ended=3.0)])
    3.0
    """
    busy, reached = 0.0, -math.inf
    for event in sorted(events, key=lambda e: e.begun):
        busy += max(0.0, event.ended - max(event.begun, reached))
        reached = max(reached, event.ended)
    return busy


def device_rows(
    events: Sequence[DeviceEvent], texts: Sequence[str], costs: Mapping[Path, Cost]
) -> list[DeviceRow]:
    """The events by scope, longest first.

    Args:
      events: of `read_trace`.
      texts: HLO of the compiled programs.
      costs: operations by scope, for one call.
    """
    names: dict[tuple[str, str], str] = {}
    for text in texts:
        header = re.match(r"HloModule (\S+?),", text)
        program = header.group(1) if header else ""
        for match in re.finditer(r'%?(\S+) = .*metadata=\{[^}]*op_name="([^"]*)"', text):
            names[program, match.group(1)] = match.group(2)
    seconds: dict[Path, float] = collections.defaultdict(float)
    kernels: dict[Path, int] = collections.defaultdict(int)
    for event in events:
        path = scope_path(names.get((event.program, event.instruction), ""))
        seconds[path] += event.seconds
        kernels[path] += 1
    rows = []
    for path, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        cost = costs.get(path)
        known = (None, None) if cost is None else (cost.flops, cost.bytes)
        rows.append(DeviceRow(path, spent, kernels[path], *known))
    return rows


def scope_path(op_name: str) -> Path:
    """The scopes of an instruction's op_name, without programs, transformations and the primitive.

    What a transposition made is under `backward`.

    >>> scope_path("jit(step)/layer_0/attention/dot_general")
    ('layer_0', 'attention')
    >>> scope_path("jit(step)/transpose(jvp(layer_0))/mul")
    ('backward', 'layer_0')
    >>> scope_path("jit(f)/add"), scope_path("")
    (('(no scope)',), ('(unattributed)',))
    """
    if not op_name:
        return (UNATTRIBUTED,)
    parts, depth, part = [], 0, ""
    for letter in op_name:
        depth += (letter == "(") - (letter == ")")
        if letter == "/" and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += letter
    path: list[str] = ["backward"] if "transpose(" in op_name else []
    for name in parts:  # the primitive, behind the last stroke, is no scope
        if re.match(r"p?jit\(", name):
            continue
        while match := re.fullmatch(r"(?:transpose|jvp|vmap|rematted_computation)\((.*)\)", name):
            name = match.group(1)
        path += [n for n in name.split("/") if n and n not in WRAPPERS]
    return tuple(path) or ("(no scope)",)


# What JAX itself puts into a name.
WRAPPERS = (
    "checkpoint", "rematted_computation", "while", "body", "cond", "closed_call", "eval_jaxpr",
    "custom_vjp_call", "custom_jvp_call",
)  # fmt: skip


# --- operations by scope -------------------------------------------------------------------------


def scope_costs(function: Callable, *args: Any) -> dict[Path, Cost]:
    """Matmul operations and the bytes of their operands by scope, of a function's jaxpr.

    A scan's body counts as often as it runs, which XLA's own analysis does not do.  Kernels of our
    own and elementwise work are not counted.

    Args:
      function: what is compiled; paths are those of its program.
      args: its arguments; `ShapeDtypeStruct`s will do.

    >>> def f(x):
    ...     with jax.named_scope("mm"): return x @ x
    >>> scope_costs(f, np.ones((4, 4), np.float32))[("mm",)].flops
    128.0
    """
    found: dict[Path, list[float]] = collections.defaultdict(lambda: [0.0, 0.0])

    def walk(jaxpr: Any, outer: str, times: float) -> None:
        for equation in jaxpr.eqns:
            stack = "/".join(p for p in (outer, str(equation.source_info.name_stack)) if p)
            if equation.primitive.name == "dot_general":
                (contract, _), _ = equation.params["dimension_numbers"]
                left, right = (v.aval for v in equation.invars)
                out = equation.outvars[0].aval
                inner = math.prod(left.shape[i] for i in contract)
                total = found[scope_path(f"{stack}/dot_general" if stack else "jit(f)/dot")]
                total[0] += times * 2.0 * inner * math.prod(out.shape)
                total[1] += times * sum(a.size * a.dtype.itemsize for a in (left, right, out))
            runs = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    body = getattr(inner, "jaxpr", inner)
                    if hasattr(body, "eqns"):
                        walk(body, stack, runs)

    walk(jax.make_jaxpr(function)(*args).jaxpr, "", 1.0)
    return {path: Cost(*total) for path, total in found.items()}
