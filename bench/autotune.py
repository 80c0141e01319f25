"""What tuning gains over the heuristics: the default configuration beside the fastest.

    python bench/autotune.py [--op OP ...] [--shapes TEXT ...] [--limit SECONDS] [--workers COUNT]
        [--memory SHARE]

Every configuration is timed in a worker process (`aidx.ops.autotune`): device time, operands
rotated, only where its result is within tolerance of the reference.  Several workers, each with a
case of its own, compile at the same time; the device is timed by one at a time.  Rows go to
bench/results/<device>/autotune.json, or into $OUT where that is set; beside them `tuning.json` is
the table itself, which `aidx.ops.autotune.Tuning.load` reads and aidx/data/tuning ships.
"""

import argparse
import collections
import datetime
import json
import os
import pathlib
import queue
import sys
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aidx.cli.tune import MODULES, row, short  # noqa: E402
from aidx.ops.autotune import Tuning  # noqa: E402
from aidx.ops.autotune.tune import START_SECONDS, table, tune  # noqa: E402
from aidx.ops.autotune.worker import Worker  # noqa: E402
from bench.device_time import alone  # noqa: E402

ROWS = "8192x4096:bfloat16"
CASES = (  # what a run without arguments times, the most telling first
    ("flash_attention/forward", "B=4 T=4096 N=32 K=8 H=128 causal"),
    ("paged_attention/forward", "R=1 n=1 ctx=4096 N=32 K=8 H=128 block=64"),
    ("flash_attention/backward", "B=4 T=4096 N=32 K=8 H=128 causal"),
    ("paged_attention/forward", "R=64 n=1 ctx=1024 N=32 K=8 H=128 block=64"),
    ("spmm/rows", "M=100000 N=100000 nse=1000000 n=32"),
    ("residual_rms_norm/mosaic_gpu", f"{ROWS} {ROWS} 4096:bfloat16"),
    ("paged_attention/forward", "R=4 n=512 ctx=2048 N=32 K=8 H=128 block=64"),
    ("softmax_cross_entropy/mosaic_gpu", "8192x128256:bfloat16 8192:int32"),
    ("flash_attention/forward", "B=1 T=16384 N=16 H=128"),
    ("gated/mosaic_gpu", "8192x2x14336:bfloat16"),
    ("spmm/blocks", "M=8192 N=8192 n=8192 block=128 nse=409"),
    ("paged_attention/forward", "R=8 n=1 ctx=4096 N=32 K=8 H=128 block=64"),
    ("flash_attention/forward", "B=4 T=4096 N=32 H=64 causal"),
    ("flash_attention/forward", "B=4 T=4096 N=8 H=256 causal"),
    ("flash_attention/backward", "B=4 T=4096 N=32 H=64 causal"),
    ("layer_norm/mosaic_gpu", f"{ROWS} 4096:bfloat16 4096:bfloat16"),
    ("flash_attention/backward", "B=4 T=4096 N=8 H=256 causal"),
    ("spmm/rows", "M=100000 N=100000 nse=1000000 n=256"),
    ("paged_attention/forward", "R=64 n=5 ctx=2048 N=32 K=8 H=128 block=64"),
    ("paged_attention/forward", "R=1 n=1 ctx=1024 N=32 K=8 H=128 block=64"),
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--op", nargs="+", default=[])
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--import", nargs="+", default=[], dest="modules")
    parser.add_argument("--limit", type=float, default=float("inf"), help="seconds, of everything")
    parser.add_argument("--timeout", type=float, default=60.0, help="seconds, of a configuration")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--memory", type=float, default=0.8, help="of the device, of all workers")
    parser.add_argument("--device", default="h200", help="folder of the results")
    options = parser.parse_args()
    begun, outcomes = time.monotonic(), []
    folder = pathlib.Path(os.environ.get("OUT") or ROOT / "bench" / "results" / options.device)
    modules = (*MODULES, *options.modules)
    cases, device, output = queue.SimpleQueue(), OneAtATime(), threading.Lock()
    for case in listed(options, modules):
        cases.put(case)

    def work():
        share = options.memory / options.workers
        with Worker(modules, memory_fraction=share) as worker:
            while True:
                try:
                    case = cases.get_nowait()
                except queue.Empty:
                    return
                ends = begun + options.limit
                how = dict(cache=None, timeout=options.timeout, deadline=ends, device=device)
                (outcome,) = tune([case], worker, **how)
                with output:
                    outcomes.append(outcome)
                    show(outcome, time.monotonic() - begun)
                    write(outcomes, folder, options)  # what a run that is cut short has found

    threads = [threading.Thread(target=work) for _ in range(options.workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


class OneAtATime:
    """The device, for one of our threads and for one of the processes of AIDX_BENCH_LOCK."""

    def __init__(self):
        self.threads, self.held = threading.Lock(), None

    def __enter__(self):
        self.threads.acquire()
        self.held = alone()
        self.held.__enter__()

    def __exit__(self, *_):
        self.held.__exit__(None, None, None)
        self.threads.release()


def listed(options, modules):
    """The cases of the command line, or CASES."""
    if not options.op:
        return CASES
    with Worker(modules, environment={"JAX_PLATFORMS": "cpu"}) as worker:
        found = worker.ask(START_SECONDS, do="list", ops=options.op)
    return [(name, text) for name, own in found for text in options.shapes or own]


def show(outcome, seconds):
    found = row(outcome)
    print(f"[{seconds:4.0f} s] {outcome.op}  {outcome.case}")
    if outcome.problem:
        print(f"  {outcome.problem}", flush=True)
        return
    for m in sorted((m for m in outcome.entry.measurements if m.seconds), key=lambda m: m.seconds):
        note = " <- default" if m.config == outcome.default else ""
        config = short(json.loads(m.config))
        print(f"  {m.seconds * 1e6:9.1f} us  error {m.error:.3f}  {config}{note}")
    for reason, count in collections.Counter(found["failures"].values()).items():
        print(f"  {count} failed: {reason[:150]}")
    sys.stdout.flush()


def write(outcomes, folder, options):
    known = [outcome for outcome in outcomes if outcome.entry is not None]
    rows = []
    for outcome in known:
        found, case = row(outcome), f"{outcome.op} {outcome.case}"
        for name, label in (("best_seconds", "aidx"), ("default_seconds", "heuristic")):
            if found[name] is not None:
                value = {"metric": "time", "value": found[name] * 1e6, "unit": "us"}
                rows.append({"case": case, "implementation": label, **value})
    if not known:
        return
    entry = known[0].entry
    meta = {
        "command": f"python bench/autotune.py {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.date.today().isoformat(),
        "device": entry.device,
        "versions": {"jax": entry.jax},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "autotune.json").write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n")
    file = folder / "tuning.json"
    (Tuning.load(file) | table(known) if file.is_file() else table(known)).save(file)


if __name__ == "__main__":
    main()
