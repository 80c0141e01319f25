"""Ragged rows beside padding to the longest, and beside torch.nested (jagged).

    python bench/ragged.py                  # into bench/results/<device>/ragged.json
    python bench/ragged.py --tiny           # any machine: does it run

Row lengths are drawn so that a batch padded to its longest row would be a quarter full.  `padded`
is the same operation on the whole padded batch; `padded, lengths` is attention told the lengths,
which passes over blocks of padding.  The metric is milliseconds a call, best of several.
"""

import argparse
import datetime
import functools
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import aidx
from aidx.arrays import Ragged, ragged
from bench.device_time import milliseconds

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def lengths_of(rows, longest, fill=0.25, seed=0):
    """`rows` lengths, the longest `longest`, their mean about `fill` of it."""
    share = np.random.default_rng(seed).beta(0.6, 0.6 * (1 - fill) / fill, rows)
    share *= (fill * rows - 1) / share[1:].sum()  # what the longest row leaves
    lengths = np.clip(np.round(share * longest), 1, longest).astype(np.int32)
    lengths[0] = longest
    return lengths


def attention_calls(lengths, heads, head_dim, dtype):
    """name -> (forward, forward and gradient) over the same rows."""
    longest = int(lengths.max())
    capacity = int(lengths.sum())
    values = jax.random.normal(jax.random.key(0), (3, capacity, heads, head_dim), dtype)
    packed = [Ragged.from_lengths(v, lengths) for v in values]
    padded = [p.to_padded(longest) for p in packed]
    kv_lens = jnp.asarray(lengths)

    def ours(q, k, v):
        return ragged.attention(q, k, v, causal=True).values

    def dense(q, k, v):
        return aidx.flash_attention(q, k, v, causal=True)

    def told(q, k, v):
        return aidx.flash_attention(q, k, v, causal=True, q_lens=kv_lens, kv_lens=kv_lens)

    def gradient_of(f, floats):
        def run(q, k, v):
            loss = lambda parts: jnp.sum(
                f(*[floats(x, p) for x, p in zip((q, k, v), parts, strict=True)]) ** 2
            )
            return jax.grad(loss)([x.values if isinstance(x, Ragged) else x for x in (q, k, v)])

        return run

    with_values = lambda x, p: x.replace(values=p) if isinstance(x, Ragged) else p
    cases = ("aidx", ours, packed), ("padded", dense, padded), ("padded, lengths", told, padded)
    for name, f, args in cases:
        yield name, "attention", functools.partial(jax.jit(f), *args)
        yield name, "attention grad", functools.partial(jax.jit(gradient_of(f, with_values)), *args)


def norm_calls(lengths, features, dtype):
    capacity, longest = int(lengths.sum()), int(lengths.max())
    values = jax.random.normal(jax.random.key(0), (capacity, features), dtype)
    packed = Ragged.from_lengths(values, lengths)
    padded = packed.to_padded(longest)
    scale, bias = jnp.ones(features, dtype), jnp.zeros(features, dtype)
    ours = jax.jit(lambda x: ragged.layer_norm(x, scale, bias).values)
    from aidx.ops.norm import layer_norm

    dense = jax.jit(lambda x: layer_norm(x, scale, bias))
    yield "aidx", "layer_norm", functools.partial(ours, packed)
    yield "padded", "layer_norm", functools.partial(dense, padded)


def torch_calls(lengths, heads, head_dim, features, half):
    """torch.nested (jagged) on a GPU; nothing where there is none."""
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    dtype = torch.bfloat16 if half else torch.float32
    wait = lambda _: torch.cuda.synchronize()
    make = lambda *tail: torch.nested.nested_tensor(
        [torch.randn(int(n), *tail, device="cuda") for n in lengths],
        layout=torch.jagged,
        device="cuda",
        dtype=dtype,
    )
    q, k, v = (make(heads, head_dim).transpose(1, 2) for _ in range(3))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    yield "torch.nested", "attention", (lambda: sdpa(q, k, v, is_causal=True)), wait
    x = make(features)
    scale, bias = (torch.ones(features, device="cuda", dtype=dtype) for _ in range(2))
    norm = torch.nn.functional.layer_norm
    yield "torch.nested", "layer_norm", (lambda: norm(x, (features,), scale, bias)), wait


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int)
    parser.add_argument("--longest", type=int)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if gpu else jnp.float32
    rows, longest, heads, head_dim, features = (64, 4096, 16, 128, 4096) if gpu else (
        16, 1024, 4, 64, 1024)  # fmt: skip
    rows, longest = args.rows or rows, args.longest or longest
    if args.tiny:
        rows, longest, heads, head_dim, features = 4, 64, 1, 16, 32
    lengths = lengths_of(rows, longest)
    table = []

    def record(op, name, value):
        fill = lengths.mean() / longest
        case = f"{op} {rows}x{longest} fill {fill:.0%} {jnp.dtype(dtype).name}"
        table.append((case, name, "time", round(value, 4), "ms"))
        print(*table[-1], flush=True)

    for name, op, call in norm_calls(lengths, features, dtype):
        record(op, name, milliseconds(call))
    for name, op, call, wait in torch_calls(lengths, heads, head_dim, features, gpu):
        try:
            record(op, name, milliseconds(call, wait))
        except (RuntimeError, NotImplementedError) as refusal:
            print(name, op, refusal, flush=True)
    for name, op, call in attention_calls(lengths, heads, head_dim, dtype):
        record(op, name, milliseconds(call))
    if args.tiny:
        return
    out = args.out or RESULTS / ("h200" if gpu else "cpu") / "ragged.json"
    meta = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
    }
    keys = ("case", "implementation", "metric", "value", "unit")
    rows_out = [dict(zip(keys, row, strict=True)) for row in table]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"meta": meta, "rows": rows_out}, indent=1) + "\n")


if __name__ == "__main__":
    main()
