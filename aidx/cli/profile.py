"""`aidx profile`: a script under the profiler, and what its devices did under the code's names."""

import argparse
import os
import pathlib
import sys
import traceback
from typing import Any

# XLA launches kernels in groups (CUDA graphs) whose members have no names in a trace.
ONE_BY_ONE = "--xla_gpu_enable_command_buffer="


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "profile",
        help="where a script's time goes, on the host and on its devices",
        description="Run a Python script under the profiler. Scopes are those of "
        "aidx.telemetry.profiler.profile_scope and jax.named_scope; device time is the device's "
        "own. Writes report.json, report.html, report.md, report.csv and trace.json (Perfetto).",
        epilog="examples:\n"
        "  aidx profile examples/train_nnx.py --steps 20\n"
        "  aidx profile --out now -- script.py --its --own options\n"
        "  aidx profile --baseline then/report.json script.py   exit code 1: a scope is slower\n"
        "  aidx profile -m package.module",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    path = pathlib.Path
    add("--out", type=path, default=path("profile"), metavar="FOLDER", help="of the report")
    add("--baseline", type=path, metavar="FILE", help="report.json of an earlier run: compare")
    add("--tolerance", type=float, default=0.1, metavar="SHARE", help="slower by less is noise")
    add("--least", type=float, default=1e-4, metavar="SECONDS", help="compare no shorter scopes")
    add("--host-only", action="store_true", help="no trace of the devices")
    help = "leave XLA's command buffers on: kernels of libraries lose their scopes"
    add("--command-buffers", action="store_true", help=help)
    add("-m", dest="module", action="store_true", help="script is a module's name")
    add("script", help="the script, and behind it its own arguments")
    add("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the script, print the table and write the report.

    Returns:
      The script's exit code where that is not 0; else that of the comparison.

    Raises:
      FileNotFoundError: no such script, or no such baseline.
    """
    # Both are found out before minutes of work.
    if not args.module and not pathlib.Path(args.script).is_file():
        raise FileNotFoundError(f"there is no script {args.script}")
    baseline = args.baseline.read_text(encoding="utf-8") if args.baseline else None
    if not (args.host_only or args.command_buffers):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_BY_ONE}".strip()
    import jax

    from aidx.telemetry.profiler import Profiler, ProfileReport

    # A CPU has no queue whose end could be waited for when the script has dropped its results.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    profiler = Profiler(device_trace=not args.host_only)
    with profiler:
        code = run_script(args.script, args.arguments, args.module)
        # A device that has a queue works through it in order.
        jax.block_until_ready([jax.device_put(0, device) + 1 for device in jax.local_devices()])
    report = profiler.report()
    print(report.table())
    write_report(report, args.out)
    print(f"\n{args.out}/report.html, .json, .md, .csv and trace.json", file=sys.stderr)
    if baseline is None:
        return code
    found = report.compare(ProfileReport.from_json(baseline), args.tolerance, args.least)
    print(str(found) or "nothing became slower")
    return code or found.exit_code


def write_report(report: Any, folder: pathlib.Path) -> None:
    """Every form of a report, into a folder.

    >>> import tempfile
    >>> from aidx.telemetry.profiler import Profiler
    >>> folder = pathlib.Path(tempfile.mkdtemp())
    >>> write_report(Profiler().report(), folder)
    >>> sorted(file.name for file in folder.iterdir())
    ['report.csv', 'report.html', 'report.json', 'report.md', 'trace.json']
    """
    folder.mkdir(parents=True, exist_ok=True)
    forms = {
        "report.json": report.to_json(),
        "report.html": report.to_html(),
        "report.md": report.to_markdown(),
        "report.csv": report.to_csv(),
        "trace.json": report.to_chrome_trace(),
    }
    for name, text in forms.items():
        (folder / name).write_text(text, encoding="utf-8")


def run_script(script: str, arguments: list[str], module: bool) -> int:
    """Run a script or a module as `python` would; its exit code.  An error of its own is printed
    and is 1."""
    import runpy

    before = sys.argv, sys.path[:]
    sys.argv = [script, *arguments]
    sys.path[0] = os.getcwd() if module else str(pathlib.Path(script).resolve().parent)
    try:
        if module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(script, run_name="__main__")
    except SystemExit as leaving:
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
            return 1
        return leaving.code or 0
    except Exception:  # the script's, whatever it is: what was measured before is still reported
        traceback.print_exc()
        return 1
    finally:
        sys.argv, sys.path[:] = before
    return 0
