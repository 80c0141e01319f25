"""The command line: `aidx demo | generate | chat | train | profile | bench | tune | info`.

One module per command: `add_parser(commands)` says what it takes, `run(args)` does it and returns
the exit code.  0: done; 1: it could not be done, and one line on standard error says why; 2: the
command line is wrong; 130: interrupted.  `AIDX_DEBUG=1` shows tracebacks.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from aidx.cli import bench, chat, demo, generate, info, profile, train, tune

EXAMPLES = """\
examples:
  aidx demo                                   eight prompts at once, live
  aidx generate "def fibonacci(n):"           the embedded model goes on
  aidx generate --model org/name -n 2 "Once"  any Hugging Face checkpoint
  aidx chat --model path/to/checkpoint        a conversation
  aidx train --config run.toml                text in, a model out
  aidx profile script.py --its --options      where its time goes
  aidx bench --concurrency 1 8 32             tokens/s and latencies
  aidx tune --op flash_attention              the fastest tiles on this device
  aidx info                                   devices, and what each op runs on
"""


def parser() -> argparse.ArgumentParser:
    """The whole command line.

    >>> parser().parse_args(["generate", "def f(x):"]).prompts
    ['def f(x):']
    """
    root = argparse.ArgumentParser(
        prog="aidx",
        description="Language models on JAX: continuous batching over a paged KV cache.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    root.add_argument("--version", action="store_true", help="print the version and leave")
    commands = root.add_subparsers(metavar="command", dest="command")
    for module in (demo, generate, chat, train, profile, bench, tune, info):
        module.add_parser(commands)
    return root


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit code comes back.

    Args:
      argv: arguments without the program's name; None takes the process's.

    Returns:
      The exit code (see the module).

    >>> main(["--version"])
    aidx ...
    0
    """
    root = parser()
    try:
        args = root.parse_args(argv)
    except SystemExit as leaving:  # argparse prints and leaves; a function returns
        return int(leaving.code or 0)
    if args.version:
        from aidx import __version__

        print(f"aidx {__version__}")
        return 0
    if args.command is None:
        root.print_help(sys.stderr)
        return 2
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader left (`aidx generate ... | head`); Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, OSError, RuntimeError, ImportError, ExceptionGroup) as e:
        if os.environ.get("AIDX_DEBUG"):
            raise
        print(f"aidx: error: {one_line(e)}", file=sys.stderr)
        return 1


def one_line(error: BaseException) -> str:
    """What went wrong without line breaks; a group says what each of its members says.

    >>> one_line(ExceptionGroup("no way", [NotImplementedError("too\\nlong"), ValueError("odd")]))
    'no way: too long; odd'
    """
    if isinstance(error, ExceptionGroup):
        return f"{error.message}: {'; '.join(one_line(e) for e in error.exceptions)}"
    return " ".join(str(error).split()) or type(error).__name__
