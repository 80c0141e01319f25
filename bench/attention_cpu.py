"""flash_attention's tiled XLA path beside jax.nn's, on the CPU: time and peak memory, one run.

    python bench/attention_cpu.py [--quick]

Per length S (causal and full, one row of 8 heads of 64, f32): the best of interleaved repeats in
milliseconds, wall time and processor time (the sum over cores; other processes disturb it less),
and the temporaries of the compiled program in bytes.  Writes
`bench/results/cpu/attention.json`.
"""

import argparse
import datetime
import functools
import itertools
import json
import pathlib
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np

from aidx.ops.flash_attention import flash_attention

RESULTS = pathlib.Path(__file__).resolve().parent / "results" / "cpu" / "attention.json"
HEADS, HEAD_DIM = 8, 64


def arguments(length):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (1, length, HEADS, HEAD_DIM)) for key in keys]


def programs(length, causal, backward):
    """Compiled forward, or gradient of q, k and v, of each implementation."""
    peers = {
        "aidx": functools.partial(flash_attention, causal=causal, implementation="xla"),
        "jax.nn": functools.partial(
            jax.nn.dot_product_attention, is_causal=causal, implementation="xla"
        ),
    }
    if backward:
        loss = lambda f, *a: jnp.sum(jnp.sin(f(*a)))
        peers = {name: jax.grad(functools.partial(loss, f), (0, 1, 2)) for name, f in peers.items()}
    example = arguments(length)
    return {name: jax.jit(f).lower(*example).compile() for name, f in peers.items()}, example


def measure(compiled, example, repeats):
    """Best (wall, processor) time of each program in ms over at most 10 s of turns.

    The programs take turns, so that a busy moment of the machine hits all of them.

    Their outputs have to agree.
    """
    outputs = {name: jax.tree.leaves(run(*example)) for name, run in compiled.items()}
    for ours, theirs in zip(outputs["aidx"], outputs["jax.nn"], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)
    best = dict.fromkeys(compiled, (float("inf"), float("inf")))
    began = time.perf_counter()
    for turn in range(repeats):
        if turn >= 2 and time.perf_counter() - began > 10:
            break
        for name, run in compiled.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(run(*example))
            spent = 1e3 * (time.perf_counter() - wall), 1e3 * (time.process_time() - cpu)
            best[name] = tuple(map(min, best[name], spent))
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="up to S = 2048, few repeats")
    quick = parser.parse_args().quick
    rows = []
    lengths = (512, 1024, 2048) if quick else (512, 1024, 2048, 4096, 8192)
    for length, causal, backward in itertools.product(lengths, (False, True), (False, True)):
        if backward and length > 2048:
            continue  # jax.nn's scores and their gradients no longer fit a small machine
        compiled, example = programs(length, causal, backward)
        times = measure(compiled, example, max(3, (20 if quick else 60) * 512 // length))
        mask, passes = "causal" if causal else "full", "fwd+bwd" if backward else "fwd"
        case, memory = f"S{length} {mask} {passes}", {}
        for name, program in compiled.items():
            memory[name] = program.memory_analysis().temp_size_in_bytes
            rows.append([case, name, "time", round(times[name][0], 3), "ms"])
            rows.append([case, name, "processor time", round(times[name][1], 3), "ms"])
            rows.append([case, name, "temporaries", memory[name], "bytes"])
        line = "  ".join(
            f"{name} {times[name][0]:8.2f} {times[name][1]:8.2f} ms {memory[name] / 2**20:7.1f} MiB"
            for name in compiled
        )
        wall, cpu = (a / b for a, b in zip(times["jax.nn"], times["aidx"], strict=True))
        print(f"{case:20} {line}  {wall:5.2f}x {cpu:5.2f}x", flush=True)
    names = ("case", "implementation", "metric", "value", "unit")
    meta = {
        "command": "python bench/attention_cpu.py" + (" --quick" if quick else ""),
        "date": datetime.date.today().isoformat(),
        "device": f"cpu, {jax.device_count()} device, {platform.machine()}",
        "versions": {"jax": jax.__version__, "numpy": np.__version__},
        "shape": f"q, k, v [1, S, {HEADS}, {HEAD_DIM}] {jnp.float32.dtype}",
    }
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    table = {"meta": meta, "rows": [dict(zip(names, row, strict=True)) for row in rows]}
    RESULTS.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
