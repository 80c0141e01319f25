"""Compile every shipped kernel for sm_90a without a GPU, and say what ptxas thinks of it.

    python scripts/compile_sm90a.py [REGEX on the case names] [--list]

Needs the CUDA plugin of JAX (`jax-cuda13-plugin`, `jax-cuda13-pjrt`) and ptxas on PATH.  The cases
come from `compile_cases()` of every `pallas_kernels/*/configs.py`.  A case passes with 0 bytes of
spills and no serialised wgmma (ptxas C7510-C7518); the exit status is the number of failures.
Shared memory above the limit fails in the lowering.
"""

import argparse
import importlib
import os
import pathlib
import re
import sys
import tempfile
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["MOSAIC_GPU_DUMP_PTXAS"] = "1"

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def cases():
    """(name, function, abstract arguments) of every kernel package."""
    for path in sorted((ROOT / "pallas_kernels").glob("*/configs.py")):
        module = importlib.import_module(f"pallas_kernels.{path.parent.name}.configs")
        yield from module.compile_cases()


def captured(f):
    """(what f returned, what was written to stdout and stderr meanwhile, by C code as well)."""
    with tempfile.TemporaryFile() as sink:
        sys.stdout.flush(), sys.stderr.flush()
        saved = os.dup(1), os.dup(2)
        os.dup2(sink.fileno(), 1), os.dup2(sink.fileno(), 2)
        try:
            result = f()
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os.dup2(saved[0], 1), os.dup2(saved[1], 2)
            os.close(saved[0]), os.close(saved[1])
        sink.seek(0)
        return result, sink.read().decode(errors="replace")


def verdict(log):
    """(problems, registers) in what ptxas printed."""
    problems = [f"{n} B spilled" for n in re.findall(r"(\d+) bytes spill stores", log) if int(n)]
    problems += sorted(set(re.findall(r"C751[0-8]", log)))
    if "spill stores" not in log:
        problems.append("ptxas said nothing")
    return problems, max(map(int, re.findall(r"Used (\d+) registers", log)), default=0)


def program(f, args):
    """(the program, what ptxas printed) of f compiled for an H200 at these abstract arguments."""
    target = (ROOT / "scripts" / "h200.txtpb").read_text()
    topology = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    on_gpu = NamedSharding(Mesh(np.array([topology.devices[0]]), ("x",)), PartitionSpec())
    place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_gpu)
    lowered = jax.jit(f).lower(*jax.tree.map(place, args))
    return captured(lowered.compile)


def compiled(f, args):
    """(problems, registers) of f compiled for an H200 at these abstract arguments."""
    return verdict(program(f, args)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pattern", nargs="?", default=".")
    parser.add_argument("--list", action="store_true", help="name the cases and stop")
    options = parser.parse_args()
    chosen = [case for case in cases() if re.search(options.pattern, case[0])]
    if options.list:
        print("\n".join(name for name, _, _ in chosen))
        return 0
    failures = 0
    for name, f, args in chosen:
        start = time.time()
        problems, registers = compiled(f, args)
        failures += bool(problems)
        status = "; ".join(problems) or "ok"
        print(
            f"{name:45s} {registers:4d} registers {time.time() - start:5.1f} s  {status}",
            flush=True,
        )
    print(f"{len(chosen) - failures} of {len(chosen)} pass")
    return failures


if __name__ == "__main__":
    sys.exit(min(main(), 100))
