"""A finished profile and its forms: table, JSON, CSV, Markdown, Chrome trace, flame graph."""

import collections
import csv
import dataclasses
import html
import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ._costs import Peak
from ._device import DeviceRow
from ._scopes import Path


@dataclasses.dataclass(frozen=True)
class HostRow:
    """A host scope: seconds of its passages, `compiling` of them spent compiling.

    Memory is in bytes: what the first device held before the first passage and after the last, by
    how much all passages together made that grow, and the process's own memory on the host.
    """

    path: Path
    count: int
    total: float
    mean: float
    min: float
    p50: float
    p95: float
    p99: float
    max: float
    compiling: float = 0.0
    live_before: int = 0
    live_after: int = 0
    grown: int = 0
    host_grown: int = 0


@dataclasses.dataclass(frozen=True)
class ScopeRow:
    """A device scope with what lies under it: seconds (`own` without the scopes within), kernels,
    operations and bytes, and the shares of the device's busy time and of its peaks."""

    path: Path
    seconds: float
    own: float
    kernels: int
    share: float
    flops: float | None
    bytes: float | None
    of_flops_peak: float | None
    of_bytes_peak: float | None


@dataclasses.dataclass(frozen=True)
class ProfileReport:
    """A finished profile; every format is a function of it.

    Attributes:
      seconds: between start and stop.
      host: by path.
      device: by path, longest first; their seconds add up to device_busy.
      device_busy: seconds in which a device did anything.
      programs: `{name: bytes}` of each program: arguments, outputs, temporary, code, peak.
      timeline: (path, begun, seconds, thread, device bytes at its end) of host scopes.
      device_timeline: (path, begun, seconds, device) of kernels, on the host's clock.
      peak: of the device, where it is known.
      host_peak: bytes that the process held at most.
    """

    seconds: float
    host: tuple[HostRow, ...]
    device: tuple[DeviceRow, ...] = ()
    device_busy: float = 0.0
    programs: tuple[dict[str, Any], ...] = ()
    timeline: tuple[tuple[Path, float, float, int, int], ...] = ()
    device_timeline: tuple[tuple[Path, float, float, str], ...] = ()
    peak: Peak | None = None
    host_peak: int = 0

    def scopes(self, merge: bool = True) -> list[ScopeRow]:
        """The tree of device scopes, each after its parent, the longest of siblings first.

        Args:
          merge: count scopes that differ in a number only (`layer_0`, `layer_1`) as one.

        >>> rows = (DeviceRow(("layer_0", "a"), 1.0, 2), DeviceRow(("layer_1",), 3.0, 1))
        >>> report = ProfileReport(4.0, (), rows, 4.0)
        >>> [(row.path, row.seconds, row.own) for row in report.scopes()]
        [(('layer_*',), 4.0, 3.0), (('layer_*', 'a'), 1.0, 1.0)]
        """
        totals: dict[Path, list[float]] = collections.defaultdict(lambda: [0.0] * 5)
        known = any(row.flops is not None for row in self.device)
        for row in self.device:
            path = tuple(re.sub(r"_\d+$", "_*", p) for p in row.path) if merge else row.path
            numbers = (row.seconds, row.kernels, row.flops or 0.0, row.bytes or 0.0)
            for depth in range(1, len(path) + 1):
                total = totals[path[:depth]]
                for i, number in enumerate(numbers):
                    total[i] += number
            totals[path][4] += row.seconds
        order = lambda path: [(-totals[path[:n]][0], path[n - 1]) for n in range(1, len(path) + 1)]
        found = []
        for path in sorted(totals, key=order):
            seconds, kernels, flops, moved, own = totals[path]
            of_flops = of_bytes = None
            if self.peak and known and seconds:
                of_flops = flops / seconds / self.peak.flops
                of_bytes = moved / seconds / self.peak.bytes
            share = seconds / self.device_busy if self.device_busy else 0.0
            found.append(
                ScopeRow(
                    path, seconds, own, int(kernels), share, flops if known else None,
                    moved if known else None, of_flops, of_bytes,
                )
            )  # fmt: skip
        return found

    def table(self, least: float = 0.002, merge: bool = True) -> str:
        """For a terminal.

        Args:
          least: device scopes with a smaller share of the busy time are left out.
          merge: of `scopes`.
        """
        lines = [HOST_HEAD]
        for r in self.host:
            name = "  " * (len(r.path) - 1) + r.path[-1]
            numbers = "".join(f"{1e3 * x:10.3f}" for x in (r.total, r.mean, r.p50, r.p95, r.p99))
            memory = f"{r.live_after / MIB:10.1f}{r.grown / MIB:10.1f}{r.host_grown / MIB:10.1f}"
            lines.append(
                f"{name[:32]:32}{r.count:8}{numbers}{1e3 * r.max:10.3f}{1e3 * r.compiling:10.1f}"
                f"{memory}"
            )
        if self.device:
            lines += ["", f"device busy {1e3 * self.device_busy:.3f} ms", DEVICE_HEAD]
        for s in self.scopes(merge):
            if s.share >= least:
                name = "  " * (len(s.path) - 1) + s.path[-1]
                shares = "".join(
                    f"{x:8.1%}" if x is not None else f"{'':8}"
                    for x in (s.of_flops_peak, s.of_bytes_peak)
                )
                rates = "".join(
                    f"{x / s.seconds / 1e12:9.2f}" if x and s.seconds else f"{'':9}"
                    for x in (s.flops, s.bytes)
                )
                lines.append(
                    f"{name[:44]:44}{1e3 * s.seconds:11.3f}{1e3 * s.own:11.3f}{s.share:8.1%}"
                    f"{s.kernels:9}{rates}{shares}".rstrip()
                )
        if self.programs:
            lines += ["", PROGRAM_HEAD]
        for p in sorted(self.programs, key=lambda p: -p["peak"])[:MOST_PROGRAMS]:
            sizes = "".join(f"{p[name] / MIB:12.1f}" for name in PROGRAM_SIZES)
            lines.append(f"{p['program'][:32]:32}{sizes}")
        if self.host_peak:
            lines += ["", f"the process held at most {self.host_peak / MIB:.0f} MiB on the host"]
        return "\n".join(lines)

    def to_json(self) -> str:
        """All but the timelines; `from_json` reads it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del fields["timeline"], fields["device_timeline"]
        return json.dumps(fields, default=dataclasses.asdict, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "ProfileReport":
        """What `to_json` wrote."""
        fields = json.loads(text)
        path = lambda row: row | {"path": tuple(row["path"])}
        fields["host"] = tuple(HostRow(**path(row)) for row in fields["host"])
        fields["device"] = tuple(DeviceRow(**path(row)) for row in fields["device"])
        fields["programs"] = tuple(fields["programs"])
        fields["peak"] = Peak(**fields["peak"]) if fields["peak"] else None
        return cls(**fields)

    def to_csv(self) -> str:
        """Host and device scopes in one table; what does not apply is empty."""
        out = io.StringIO()
        names = ["kind", *(f.name for f in dataclasses.fields(HostRow))]
        names += [f.name for f in dataclasses.fields(ScopeRow) if f.name not in names]
        writer = csv.DictWriter(out, names, restval="")
        writer.writeheader()
        for kind, rows in (("host", self.host), ("device", self.scopes(merge=False))):
            for row in rows:
                path = {"kind": kind, "path": "/".join(row.path)}
                writer.writerow(dataclasses.asdict(row) | path)
        return out.getvalue()

    def to_markdown(self) -> str:
        """Both tables."""
        lines = ["| scope | count | total ms | mean ms | p95 ms | compiling ms | grown MiB |"]
        lines.append("|---|---|---|---|---|---|---|")
        for r in self.host:
            cells = [f"{1e3 * x:.3f}" for x in (r.total, r.mean, r.p95, r.compiling)]
            cells.append(f"{r.grown / MIB:.1f}")
            lines.append(f"| {'/'.join(r.path)} | {r.count} | {' | '.join(cells)} |")
        if self.device:
            lines += ["", "| device scope | ms | share | kernels | TFLOP/s | of peak | of HBM |"]
            lines += ["|---|---|---|---|---|---|---|"]
        for s in self.scopes():
            rate = f"{s.flops / s.seconds / 1e12:.1f}" if s.flops and s.seconds else ""
            shares = [
                f"{x:.1%}" if x is not None else "" for x in (s.of_flops_peak, s.of_bytes_peak)
            ]
            lines.append(
                f"| {'/'.join(s.path)} | {1e3 * s.seconds:.3f} | {s.share:.1%} | {s.kernels} "
                f"| {rate} | {' | '.join(shares)} |"
            )
        return "\n".join(lines) + "\n"

    def to_chrome_trace(self) -> str:
        """Host scopes, device memory and kernels on one clock, for Perfetto."""
        host = [
            {"name": path[-1], "ph": "X", "ts": 1e6 * begun, "dur": 1e6 * seconds, "pid": 1,
             "tid": thread, "args": {"path": "/".join(path)}}
            for path, begun, seconds, thread, _ in self.timeline
        ]  # fmt: skip
        memory = [
            {"name": "device bytes", "ph": "C", "ts": 1e6 * (begun + seconds), "pid": 1,
             "args": {"live": live}}
            for _, begun, seconds, _, live in self.timeline if live
        ]  # fmt: skip
        devices = {
            name: 2 + i for i, name in enumerate(sorted({d for *_, d in self.device_timeline}))
        }
        kernels = [
            {"name": path[-1], "ph": "X", "ts": 1e6 * begun, "dur": 1e6 * seconds,
             "pid": devices[device], "tid": 0, "args": {"path": "/".join(path)}}
            for path, begun, seconds, device in self.device_timeline
        ]  # fmt: skip
        names = [
            {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": name}}
            for name, pid in {"host": 1, **devices}.items()
        ]
        events = [*names, *host, *memory, *kernels]
        return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})

    def to_html(self) -> str:
        """Flame graphs of host and device scopes, in one page without scripts."""
        host = {r.path: r.total for r in self.host}
        device = {s.path: s.seconds for s in self.scopes()}
        parts = [flame("host", host), flame("device", device) if device else ""]
        page = f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{''.join(parts)}"
        return page + f"<pre>{html.escape(self.table())}</pre>"

    def compare(
        self, baseline: "ProfileReport", tolerance: float = 0.1, least: float = 0.0
    ) -> "Comparison":
        """What became slower than `1 + tolerance` times the baseline: medians, device seconds.

        Args:
          baseline: another report of the same program.
          tolerance: the share that is noise.
          least: seconds under which a scope is not looked at.

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
                if now[path] >= least and now[path] > (1 + tolerance) * then[path]:
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


MIB = 2**20
MOST_PROGRAMS = 8  # that a table shows
HOST_HEAD = f"{'host scope (ms, MiB)':32}{'count':>8}" + "".join(
    f"{name:>10}"
    for name in ("total", "mean", "p50", "p95", "p99", "max", "compiling", "live", "grown", "host")
)
DEVICE_HEAD = (
    f"{'device scope':44}{'ms':>11}{'own':>11}{'share':>8}{'kernels':>9}{'TFLOP/s':>9}{'TB/s':>9}"
    f"{'of peak':>8}{'of HBM':>8}"
)
PROGRAM_SIZES = ("arguments", "outputs", "aliased", "temporary", "code", "peak")
PROGRAM_HEAD = f"{'program (MiB)':32}" + "".join(f"{name:>12}" for name in PROGRAM_SIZES)
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


def host_row(path: Path, times: Sequence[float], compiling: float = 0.0, **memory: int) -> HostRow:
    """The statistics of a scope's passages; memory are fields of `HostRow`.

    >>> host_row(("a",), [1.0, 3.0]).mean
    2.0
    """
    p50, p95, p99 = (float(x) for x in np.percentile(times, (50, 95, 99)))
    total = math.fsum(times)
    return HostRow(
        path, len(times), total, total / len(times), min(times), p50, p95, p99, max(times),
        compiling, **memory,
    )  # fmt: skip
