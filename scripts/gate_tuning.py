"""Record which configurations of the GPU kernels may be timed inside a user's process.

    python scripts/gate_tuning.py [--op OP ...] [--check]

Compiles every candidate of every tunable for sm_90a, at the shapes that the tunable names, without
a GPU (see `compile_sm90a.py` for what that needs).  A configuration passes with 0 bytes of spills
and no serialised wgmma.  The record, aidx/data/tuning/gate-sm90a.json, holds the hash of the
kernels' code: what was recorded for other code counts for nothing, so run this after the last
change of a kernel.  `--check` compiles nothing and fails where the record is not of this code.
"""

import argparse
import functools
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import compile_sm90a  # noqa: E402 - sets what has to be set before jax is imported

from aidx.cli.tune import MODULES  # noqa: E402
from aidx.ops import autotune  # noqa: E402
from aidx.ops.autotune import store  # noqa: E402
from aidx.ops.autotune.tunable import case_of, code_hash, config_text, load  # noqa: E402

RECORD = store.SHIPPED / store.GATE


def passed(tunable, problems_of, report=print):
    """Rows of the record: (op, code, family, config) of every candidate without problems.

    `problems_of(f, operands)` compiles; shapes of one family are compiled once.
    """
    rows, seen, code = set(), set(), code_hash(tunable.sources)
    for text in tunable.shapes:
        operands, static = case_of(tunable, text)
        family = tunable.family_text(operands, static)
        for config in tunable.candidates(*operands, **static):
            name = config_text(config)
            if (family, name) in seen:
                continue
            seen.add((family, name))
            try:
                problems = problems_of(functools.partial(tunable.run, config, **static), operands)
            except (NotImplementedError, ValueError, TypeError) as refusal:
                problems = [f"{type(refusal).__name__}: {refusal}"]
            if not problems:
                rows.add((tunable.name, code, family, name))
            report(f"{tunable.name}  {text}  {name}: {'; '.join(problems) or 'ok'}"[:300])
    return rows


def stale(tunables, record):
    """The names of tunables of which the record says nothing, or only of other code."""
    current = {(op, code) for op, code, _, _ in record}
    return [t.name for t in tunables if (t.name, code_hash(t.sources)) not in current]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", default=[None])
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    load(MODULES)
    gated = [t for op in options.op for t in autotune.tunables(op) if t.gated and t.shapes]
    record = store.read_gate(RECORD.read_text()) if RECORD.is_file() else frozenset()
    if options.check:
        old = stale(gated, record)
        print(f"not of this code: {', '.join(old)}" if old else "the record is of this code")
        return len(old)
    problems_of = lambda f, operands: compile_sm90a.compiled(f, operands)[0]
    report = functools.partial(print, flush=True)
    for tunable in gated:
        kept = {row for row in record if row[0] != tunable.name}
        record = frozenset(kept | passed(tunable, problems_of, report))
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        RECORD.write_text(store.gate_json(record))  # after each: what is cut short is not lost
    return 0


if __name__ == "__main__":
    sys.exit(main())
