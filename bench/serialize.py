"""How fast do trees become bytes and come back?  Gigabytes a second, beside safetensors and pickle.

    python bench/serialize.py                 # writes bench/results/cpu/serialize.json
    python bench/serialize.py --megabytes 16  # any machine: does it run

Cases: one large NumPy array, the same bytes as 64 JAX arrays (a checkpoint; f32, for safetensors
cannot read its own bf16 into NumPy), and a thousand small arrays, where only the overhead per array
counts.  `round trip` is bytes / (time to write + time to read); JAX leaves are on the device at
both ends.  pickle checks nothing, runs what it is given, and its arrays are JAX's only after a
copy through NumPy; safetensors has no checksum and no tree: it gets a flat dict.
"""

import argparse
import datetime
import importlib.metadata
import json
import pathlib
import pickle
import platform
import time

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.flax
import safetensors.numpy

from aidx.arrays import deserialize, serialize

ROOT = pathlib.Path(__file__).resolve().parent


def cases(megabytes: int) -> dict[str, dict]:
    """Flat dicts, which all three can write."""
    n = megabytes << 20
    x = np.random.default_rng(0).standard_normal(n // 4, np.float32)
    rows = jnp.asarray(x).reshape(64, -1)
    small = x[: 1000 * 64].reshape(1000, 64)
    return {
        "one NumPy array, f32": {"x": x},
        "64 JAX arrays, f32": {
            str(i): jax.block_until_ready(row + 0) for i, row in enumerate(rows)
        },
        "1000 arrays of 256 bytes": {str(i): np.array(row) for i, row in enumerate(small)},
    }


def implementations(tree: dict) -> dict:
    """name -> (write, read)."""
    format = (
        safetensors.flax if isinstance(next(iter(tree.values())), jax.Array) else safetensors.numpy
    )
    return {
        "aidx": (serialize, deserialize),
        "safetensors": (format.save, format.load),
        "pickle": (lambda x: pickle.dumps(x, protocol=5), pickle.loads),
    }


def measure(write, read, tree: dict, repeats: int) -> tuple[float, float]:
    """The best times to write and to read, in seconds."""
    best = [float("inf")] * 2
    for _ in range(repeats):
        begun = time.perf_counter()
        data = write(tree)
        written = time.perf_counter()
        back = jax.block_until_ready(read(data))
        best = [min(best[0], written - begun), min(best[1], time.perf_counter() - written)]
        same = lambda a, b: np.asarray(a).tobytes() == np.asarray(b).tobytes()
        first = next(iter(tree))
        if len(back) != len(tree) or not same(back[first], tree[first]):
            raise AssertionError("what was read is not what was written")
        del data, back
    return best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "results" / "cpu")
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for case, tree in cases(args.megabytes).items():
        size = sum(leaf.nbytes for leaf in tree.values())
        for name, (write, read) in implementations(tree).items():
            times = measure(write, read, tree, args.repeats)
            speeds = {"write": times[0], "read": times[1], "round trip": sum(times)}
            for metric, seconds in speeds.items():
                value = round(size / seconds / 1e9, 3)
                rows.append(dict(case=case, implementation=name, metric=metric, value=value,
                                 unit="GB/s"))  # fmt: skip
                print(f"{case:28} {name:12} {metric:11} {value:8.3f} GB/s", flush=True)
    versions = {p: importlib.metadata.version(p) for p in ("jax", "numpy", "safetensors")}
    meta = {
        "command": f"python bench/serialize.py --megabytes {args.megabytes}",
        "date": datetime.date.today().isoformat(),
        "device": platform.processor() or platform.machine(),
        "versions": versions,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "serialize.json").write_text(
        json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
