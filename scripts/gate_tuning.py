"""Record which configurations of the GPU kernels may be timed inside a user's process.

    python scripts/gate_tuning.py [--op OP ...] [--jobs COUNT] [--check]

Compiles every candidate of every tunable for sm_90a, at the shapes that the tunable names, without
a GPU (see `compile_sm90a.py` for what that needs).  A configuration passes with 0 bytes of spills
and no serialised wgmma.  The record, aidx/data/tuning/gate-sm90a.json, holds the hash of the
kernels' code: what was recorded for other code counts for nothing, so run this after the last
change of a kernel; what is recorded of this code is not compiled again.  `--check` compiles
nothing and fails where the record is not of this code.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import compile_sm90a  # noqa: E402 - sets what has to be set before jax is imported

from aidx.cli.tune import MODULES  # noqa: E402
from aidx.ops import autotune  # noqa: E402
from aidx.ops.autotune import store  # noqa: E402
from aidx.ops.autotune.tunable import case_of, code_hash, config_text, get, load  # noqa: E402

RECORD = store.SHIPPED / store.GATE


def passed(tunable, problems_of, report=print, known=frozenset(), run=map):
    """Rows of the record: (op, code, family, config) of every candidate without problems.

    `problems_of(f, operands)` compiles; shapes of one family are compiled once, and what is `known`
    not at all.  `run` is a map: the one of a pool of processes does several at once.
    """
    rows, seen, code = set(), set(), code_hash(tunable.sources)
    jobs = []
    for text in tunable.shapes:
        operands, static = case_of(tunable, text)
        family = tunable.family_text(operands, static)
        for config in map(config_text, tunable.candidates(*operands, **static)):
            row = (tunable.name, code, family, config)
            if row in known:
                rows.add(row)
            elif row not in seen:
                jobs.append((row, text))
            seen.add(row)
    ask = functools.partial(problems, tunable.name, problems_of)
    answers = run(ask, [text for _, text in jobs], [row[-1] for row, _ in jobs])
    for (row, text), found in zip(jobs, answers, strict=True):
        if not found:
            rows.add(row)
        report(f"{tunable.name}  {text}  {row[-1]}: {'; '.join(found) or 'ok'}"[:300])
    return rows


def problems(name, problems_of, text, config):
    """Why this candidate does not pass at the shapes that text means; nothing where it does."""
    tunable = get(name)
    operands, static = case_of(tunable, text)
    found = {config_text(c): c for c in tunable.candidates(*operands, **static)}[config]
    try:
        return problems_of(functools.partial(tunable.run, found, **static), operands)
    except (NotImplementedError, ValueError, TypeError) as refusal:
        return [f"{type(refusal).__name__}: {refusal}"]


def spills(f, operands):
    """What ptxas has against f."""
    return compile_sm90a.compiled(f, operands)[0]


def stale(tunables, record):
    """The names of tunables of which the record says nothing, or only of other code."""
    current = {(op, code) for op, code, _, _ in record}
    return [t.name for t in tunables if (t.name, code_hash(t.sources)) not in current]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", default=[None])
    parser.add_argument("--jobs", type=int, default=1, help="processes that compile")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    load(MODULES)
    gated = [t for op in options.op for t in autotune.tunables(op) if t.gated and t.shapes]
    record = store.read_gate(RECORD.read_text()) if RECORD.is_file() else frozenset()
    if options.check:
        old = stale(gated, record)
        print(f"not of this code: {', '.join(old)}" if old else "the record is of this code")
        return len(old)
    report = functools.partial(print, flush=True)
    start = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(
        options.jobs, mp_context=start, initializer=load, initargs=(MODULES,)
    ) as pool:
        run = pool.map if options.jobs > 1 else map
        for tunable in gated:
            rows = passed(tunable, spills, report, record, run)
            record = frozenset({row for row in record if row[0] != tunable.name} | rows)
            RECORD.parent.mkdir(parents=True, exist_ok=True)
            RECORD.write_text(store.gate_json(record))  # after each: a run may be cut short
    return 0


if __name__ == "__main__":
    sys.exit(main())
