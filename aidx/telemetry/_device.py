"""What the devices did, of the trace of `jax.profiler`, joined with the programs in it."""

import collections
import dataclasses
import heapq
import pathlib
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax

from ._costs import Cost
from ._scopes import Path, scope_path
from ._wire import Instruction, Program, traced_programs

CLOCK = "aidx-clock"  # an annotation whose time the host noted, too


@dataclasses.dataclass(frozen=True)
class DeviceEvent:
    """An instruction that a device executed.

    `seconds` is its share of the device's time: at every moment that belongs to the innermost of
    the events that run on each stream, in equal parts where streams overlap.  So the seconds of all
    events make up the time in which the device was busy.
    """

    program: str
    instruction: str
    begun: float
    ended: float
    seconds: float
    program_id: int = -1
    device: str = ""
    kernel: str = ""


@dataclasses.dataclass(frozen=True)
class Trace:
    """A trace: events of all devices, the programs by id, and seconds from its clock to the
    host's `time.perf_counter` (None without a clock's mark)."""

    events: tuple[DeviceEvent, ...] = ()
    programs: Mapping[int, Program] = dataclasses.field(default_factory=dict)
    clock: float | None = None


@dataclasses.dataclass(frozen=True)
class DeviceRow:
    """A device scope: seconds of its own kernels, how many, and what they had to do, where that is
    known: operations of matmuls and bytes of memory, of the whole trace."""

    path: Path
    seconds: float
    kernels: int
    flops: float | None = None
    bytes: float | None = None


def read_trace(folder: str | pathlib.Path, noted: float | None = None) -> Trace:
    """The trace in a folder of `jax.profiler`.

    Args:
      folder: searched for `*.xplane.pb`.
      noted: `time.perf_counter()` where the annotation `CLOCK` was made.

    Raises:
      FileNotFoundError: there is no trace in the folder.
    """
    files = sorted(pathlib.Path(folder).rglob("*.xplane.pb"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no trace")
    events: list[DeviceEvent] = []
    programs: dict[int, Program] = {}
    clock = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the binding's own types
        for file in files:
            raw = file.read_bytes()
            programs |= traced_programs(raw)
            for plane in jax.profiler.ProfileData.from_serialized_xspace(raw).planes:
                gpu = plane.name.startswith("/device:GPU")
                lines = []
                for line in plane.lines:
                    if gpu and "Stream" not in line.name:
                        continue  # the same kernels again, by other headings
                    found, mark = line_events(line.events, plane.name, every=gpu)
                    lines.append(found)
                    if mark is not None and noted is not None:
                        clock = noted - mark
                events += shared(lines)
    return Trace(tuple(identified(events, programs)), programs, clock)


def line_events(
    events: Iterable[Any], device: str = "", every: bool = False
) -> tuple[list[DeviceEvent], float | None]:
    """(the instructions of one stream or thread, when its clock's mark was made); with every, also
    what has no instruction, such as a copy to the host."""
    found, mark = [], None
    for event in events:
        stats = dict(event.stats)
        begun = 1e-9 * event.start_ns
        if event.name == CLOCK:
            mark = begun
        if "hlo_op" in stats or every:
            ended = begun + 1e-9 * event.duration_ns
            found.append(
                DeviceEvent(
                    str(stats.get("hlo_module", "")), str(stats.get("hlo_op", event.name)),
                    begun, ended, 0.0, int(stats.get("program_id", -1)), device, event.name,
                )
            )  # fmt: skip
    return found, mark


def shared(lines: Sequence[Sequence[DeviceEvent]]) -> list[DeviceEvent]:
    """The events of a device's streams, each with its share of the device's time.

    >>> outer = DeviceEvent("p", "while", 0.0, 4.0, 0.0)
    >>> inner = dataclasses.replace(outer, instruction="dot", begun=1.0, ended=3.0)
    >>> other = dataclasses.replace(outer, instruction="copy", begun=2.0, ended=3.0)
    >>> [(e.instruction, e.seconds) for e in shared([[outer, inner], [other]])]
    [('while', 2.0), ('dot', 1.5), ('copy', 0.5)]
    """
    events = [(e, line) for line, found in enumerate(lines) for e in found]
    events.sort(key=lambda pair: (pair[0].begun, -pair[0].ended))
    seconds = [0.0] * len(events)
    open_: list[list[int]] = [[] for _ in lines]  # by stream, innermost last
    ends: list[tuple[float, int]] = []  # of what is open
    closed = [False] * len(events)
    reached = 0.0

    def advance(until: float) -> None:
        nonlocal reached
        inner = [stack[-1] for stack in open_ if stack]
        for i in inner:
            seconds[i] += (until - reached) / len(inner)
        reached = until

    def close(until: float) -> None:
        while ends and ends[0][0] <= until:
            end, i = heapq.heappop(ends)
            advance(end)
            closed[i] = True
            stack = open_[events[i][1]]
            while stack and closed[stack[-1]]:
                stack.pop()

    for i, (event, line) in enumerate(events):
        close(event.begun)
        advance(event.begun)
        open_[line].append(i)
        heapq.heappush(ends, (event.ended, i))
    close(float("inf"))
    return [dataclasses.replace(e, seconds=s) for (e, _), s in zip(events, seconds, strict=True)]


def busy_seconds(events: Sequence[DeviceEvent]) -> float:
    """Seconds in which a device did something, of all devices together.

    >>> one = DeviceEvent("p", "a", 0.0, 2.0, 2.0)
    >>> busy_seconds([one, dataclasses.replace(one, begun=1.0, ended=3.0)])
    3.0
    """
    busy, reached = 0.0, collections.defaultdict(lambda: -float("inf"))
    for event in sorted(events, key=lambda e: e.begun):
        busy += max(0.0, event.ended - max(event.begun, reached[event.device]))
        reached[event.device] = max(reached[event.device], event.ended)
    return busy


def parsed_program(text: str) -> Program:
    """The names in a program's text: for traces that do not carry their programs.

    >>> text = 'HloModule f, x\\n  ROOT %a.1 = f32[] add(x), metadata={op_name="jit(f)/s/add"}\\n'
    >>> parsed_program(text).instructions["a.1"].op_name
    'jit(f)/s/add'
    """
    header = re.match(r"HloModule (\S+?),", text)
    found = {}
    for line in text.splitlines():  # some are a kernel's code: megabytes
        at = line.find('op_name="')
        name = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line[:400])
        if at >= 0 and name:
            op_name = line[at + 9 : line.index('"', at + 9)]
            found[name.group(1)] = Instruction(op_name, 0.0, 0.0)
    return Program(header.group(1) if header else "", found)


def identified(events: Sequence[DeviceEvent], programs: Mapping[int, Program]) -> list[DeviceEvent]:
    """The events with the ids of the programs that they belong to, -1 where there is none.

    A program that was loaded from a compilation cache runs under the id that it had where it was
    compiled; then its name tells it, and among several of that name its instructions.

    >>> program = Program("f", {"dot": Instruction("", 0.0, 0.0)})
    >>> event = DeviceEvent("f", "dot", 0.0, 1.0, 1.0, program_id=69)
    >>> identified([event], {2: Program("f", {}), 3: program, 69: Program("g", {})})[0].program_id
    3
    """
    seen: dict[tuple[int, str], set[str]] = collections.defaultdict(set)
    for event in events:
        seen[event.program_id, event.program].add(event.instruction)
    ids = {}
    for (number, name), instructions in seen.items():
        alike = [i for i, program in programs.items() if program.name == name]
        hits = lambda i, names=instructions: len(names & programs[i].instructions.keys())
        ids[number, name] = number if number in alike else max(alike, key=hits, default=-1)
    return [dataclasses.replace(e, program_id=ids[e.program_id, e.program]) for e in events]


def instruction_of(event: DeviceEvent, program: Program | None) -> Instruction | None:
    """What an event executed.

    Kernels that were launched together, as a command buffer (a CUDA graph), carry that one's name:
    then the kernel's own name tells the fusion, or the like of it in another layer that shares the
    code, and a library's kernel stays unknown.
    """
    if program is None:
        return None
    found = program.instructions.get(event.instruction)
    if found is None and event.instruction.startswith("command_buffer"):
        found = program.kernels.get(event.kernel)
    return found


def executions(trace: Trace) -> dict[int, int]:
    """How often each program ran: as often as the instructions that run once in it."""
    counts: dict[tuple[int, str, str], int] = collections.Counter(
        (e.program_id, e.instruction, e.device) for e in trace.events
    )
    found: dict[int, list[int]] = collections.defaultdict(list)
    for (number, instruction, _), count in counts.items():
        if number in trace.programs and instruction in trace.programs[number].entry:
            found[number].append(count)
    return {number: sorted(counts)[len(counts) // 2] for number, counts in found.items()}


def device_rows(
    trace: Trace,
    texts: Sequence[str] = (),
    costs: Mapping[Path, Cost] | None = None,
    calls: int = 1,
) -> list[DeviceRow]:
    """The events by scope, longest first.

    Args:
      trace: of `read_trace`.
      texts: HLO of programs that the trace does not carry.
      costs: operations and bytes by scope, for one call; None takes the instructions' own.
      calls: how many calls there were.
    """
    by_name = {p.name: p for p in map(parsed_program, texts)}
    totals: dict[Path, list[float]] = collections.defaultdict(lambda: [0.0, 0, 0.0, 0.0])
    known = False
    for event in trace.events:
        program = trace.programs.get(event.program_id) or by_name.get(event.program)
        found = instruction_of(event, program)
        total = totals[scope_path(found.op_name if found else "")]
        total[0] += event.seconds
        total[1] += 1
        if found is not None:
            total[2] += found.flops
            total[3] += found.bytes
            known |= found.bytes > 0
    for path in costs or {}:
        totals[path]  # a scope that the compiler left no instruction of its own
    rows = []
    for path, (seconds, kernels, flops, moved) in totals.items():
        if costs is not None:
            cost = costs.get(path, Cost())
            flops, moved = calls * cost.flops, moved if known else calls * cost.bytes
        has = costs is not None or known
        rows.append(
            DeviceRow(path, seconds, int(kernels), *((flops, moved) if has else (None, None)))
        )
    return sorted(rows, key=lambda row: -row.seconds)
