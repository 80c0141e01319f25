"""Compile the variants of `bench/attention.py` for sm_90a without a GPU, before they are timed.

    python scripts/gate_attention.py [--stages NAMES] [--rows REGEX] [--only REGEX]

Stages: `variants` and those of `bench/attention_options.py`, forward only; `--rows` and `--only` as
there.  See `compile_sm90a.py` for what that needs and for what passes; the exit status is the
number of failures.
"""

import argparse
import functools
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import compile_sm90a  # noqa: E402 - sets what has to be set before jax is imported
import jax  # noqa: E402

from bench import attention, attention_options  # noqa: E402


def programs(stage, rows, only):
    """(name, function, abstract arguments) of a stage."""
    if stage != "variants":
        for case in attention_options.STAGES[stage]():
            if re.search(rows, case.name) and "fwd" in case.metrics:
                shapes = jax.eval_shape(functools.partial(attention_options.inputs, case.shape))
                for name, f in case.programs.items():
                    yield f"{case.name}: {name}", f, shapes[:3]
        return
    for row in (row for row in attention.ROWS if re.search(rows, row)):
        shapes = jax.eval_shape(functools.partial(attention.inputs, row))
        for causal in (False, True):
            for name, f in attention.variants(row, causal, "fwd", only).items():
                mask = "causal" if causal else "full"
                yield f"{row} {mask}: {name}", functools.partial(f, causal=causal), shapes[:3]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", default="variants,window_tiles")
    parser.add_argument("--rows", default=".")
    parser.add_argument("--only", default=".")
    options = parser.parse_args()
    failures = 0
    for stage in options.stages.split(","):
        for name, f, args in programs(stage, options.rows, options.only):
            try:
                problems, registers = compile_sm90a.compiled(f, args)
            except (NotImplementedError, ExceptionGroup) as refusal:
                problems, registers = [f"refused: {refusal}"[:90]], 0
            failures += bool(problems)
            print(f"{name:45s} {registers:4d} registers  {'; '.join(problems) or 'ok'}", flush=True)
    return failures


if __name__ == "__main__":
    sys.exit(min(main(), 100))
