"""`aidx tune`: time the configurations of kernels on this machine's device."""

import argparse
import json
import pathlib
import time
from typing import Any

from aidx.cli.options import positive

# What these register is what there is to tune; custom kernels come by --import and entry points.
MODULES = (
    "aidx.ops.flash_attention",
    "aidx.ops.paged_attention",
    "aidx.ops.sparse_kernels",
    "aidx.kernels.fused",
    "aidx.kernels.installed",
)


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "tune",
        help="find the fastest configurations of kernels on this device",
        description="Time every configuration of kernels at some shapes, in a process with a "
        "bounded pool of device memory that is killed and started again where one hangs. Results "
        "go to the disk cache, where every later program finds them; what is there is not timed "
        "again.",
        epilog="examples:\n"
        "  aidx tune --list\n"
        "  aidx tune --op flash_attention --shapes 'B=4 T=4096 N=32 K=8 H=128 causal'\n"
        "  aidx tune --op paged_attention --output h200.json\n"
        "  aidx tune --op my_kernel --import my_package.kernels --shapes '8192x4096:bfloat16'",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--op", nargs="+", metavar="OP", help="ops, or parts of them (OP/PART)")
    parser.add_argument("--shapes", nargs="+", metavar="TEXT", help="default: those of the op")
    parser.add_argument("--list", action="store_true", help="what can be tuned, and its shapes")
    parser.add_argument("--import", nargs="+", default=[], metavar="MODULE", dest="modules",
                        help="modules that register kernels of their own")  # fmt: skip
    parser.add_argument("--timeout", type=float, default=120.0, metavar="SECONDS",
                        help="for one configuration, compiling included (default 120)")  # fmt: skip
    parser.add_argument("--memory-fraction", type=float, default=0.5, metavar="SHARE",
                        help="of the device's memory, all that is used (default 0.5)")  # fmt: skip
    parser.add_argument("--again", action="store_true", help="time what is known already, too")
    parser.add_argument("--cache", metavar="FOLDER", help="of the disk cache; '' for none")
    parser.add_argument("--output", type=pathlib.Path, metavar="FILE",
                        help="also write the results there, with what the file holds")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="one JSON object per case")
    parser.add_argument("--limit", type=positive, metavar="SECONDS",
                        help="begin no further case after so many seconds")  # fmt: skip
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Tune and print."""
    from aidx.ops.autotune.tune import START_SECONDS
    from aidx.ops.autotune.worker import Worker

    if not 0 < args.memory_fraction <= 1:
        raise ValueError(f"--memory-fraction {args.memory_fraction} is not a share of the memory")
    if args.timeout <= 0:
        raise ValueError(f"--timeout {args.timeout} is not positive")
    if args.op is None and not args.list:
        raise ValueError("say what to tune: --op OP, or --list for what there is")
    # This process touches no device: its memory is the worker's.
    with Worker((*MODULES, *args.modules), memory_fraction=args.memory_fraction) as worker:
        found = worker.ask(START_SECONDS, do="list", ops=args.op or [])
        if args.list:
            for name, shapes in found:
                print(name, *(f"  {shape}" for shape in shapes), sep="\n")
            return 0
        cases = [(name, shape) for name, shapes in found for shape in args.shapes or shapes]
        if not cases:
            raise ValueError(f"{' '.join(args.op or [])} names no shapes of its own: give --shapes")
        outcomes = _tune(cases, worker, args)
    return report(outcomes, args)


def report(outcomes: list[Any], args: argparse.Namespace) -> int:
    """Write and print; 1 where a case could not be tried."""
    from aidx.ops import autotune
    from aidx.ops.autotune.tune import table

    if args.output is not None:
        known = autotune.Tuning.load(args.output) if args.output.is_file() else autotune.Tuning()
        (known | table(outcomes)).save(args.output)
    if args.json:
        print("\n".join(json.dumps(row(outcome)) for outcome in outcomes))
    else:
        _print(outcomes)
    return int(any(outcome.problem for outcome in outcomes))


def _tune(cases: list[tuple[str, str]], worker: Any, args: Any) -> list[Any]:
    """The outcomes of all cases, behind a bar on standard error."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from aidx.ops import autotune
    from aidx.ops.autotune.tune import Outcome, tune

    cache = autotune.settings().cache if args.cache is None else args.cache or None
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
               TimeElapsedColumn())  # fmt: skip
    console = Console(stderr=True)
    begun, outcomes = time.monotonic(), []
    with Progress(*columns, console=console, disable=args.json) as bars:
        whole = bars.add_task("cases", total=len(cases))
        for op, case in cases:
            if args.limit is not None and time.monotonic() - begun > args.limit:
                outcomes.append(Outcome(op, case, problem="not begun: the time was up"))
                continue
            bar = bars.add_task(f"{op}  {case}", total=None)
            step = lambda p, bar=bar: bars.update(bar, total=p.total, completed=p.done)
            outcomes += tune([(op, case)], worker, cache=cache, timeout=args.timeout,
                             again=args.again, report=step)  # fmt: skip
            bars.advance(whole)
    return outcomes


def row(outcome: Any) -> dict[str, Any]:
    """An outcome as plain data.

    >>> from aidx.ops.autotune.tune import Outcome
    >>> row(Outcome("op/part", "8", problem="no such device"))
    {'op': 'op/part', 'case': '8', 'problem': 'no such device'}
    """
    found: dict[str, Any] = {"op": outcome.op, "case": outcome.case}
    if outcome.entry is None:
        return {**found, "problem": outcome.problem}
    best, default = outcome.best, outcome.entry.find(outcome.default)
    return {
        **found,
        "device": outcome.entry.device,
        "default": json.loads(outcome.default),
        "default_seconds": default and default.seconds,
        "best": best and json.loads(best.config),
        "best_seconds": best and best.seconds,
        "gain": outcome.gain,
        "timed": sum(m.seconds is not None for m in outcome.entry.measurements),
        "failures": {m.config: m.failure for m in outcome.entry.measurements if m.failure},
    }


def _print(outcomes: list[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="microseconds on the device, a call")
    for column in ("op", "case", "default", "best", "gain", "configuration", "failed"):
        table.add_column(column, overflow="fold")
    microseconds = lambda s: "failed" if s is None else f"{s * 1e6:.1f}"
    for outcome in outcomes:
        if outcome.problem:
            continue
        found = row(outcome)
        gain = "" if found["gain"] is None else f"{found['gain']:.3f}"
        same = found["best"] == found["default"]
        table.add_row(
            outcome.op,
            outcome.case,
            microseconds(found["default_seconds"]),
            microseconds(found["best_seconds"]),
            gain,
            "the default" if same else short(found["best"]),
            str(len(found["failures"])),
        )
    if table.row_count:
        Console().print(table)
    for outcome in outcomes:
        if outcome.problem:
            print(f"{outcome.op}  {outcome.case}: {outcome.problem}")


def short(config: Any) -> str:
    """A configuration on one line.

    >>> short({"type": "Tiles", "rows": 64})
    'Tiles(rows=64)'
    """
    if isinstance(config, list):
        return ", ".join(short(part) for part in config)
    if not isinstance(config, dict):
        return str(config)
    fields = ", ".join(f"{name}={short(v)}" for name, v in config.items() if name != "type")
    return f"{config.get('type', '')}({fields})"
