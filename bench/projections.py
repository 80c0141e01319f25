"""How should a layer's projections be stored?  One decode step's matmuls, four ways.

    python bench/projections.py            # Llama-3.1-8B shape, 8 layers, bf16; needs 4 GB
    python bench/projections.py --tiny     # any machine: does it run

Rows are the bytes of weights read per second: a decode step does nothing else.  `fused` joins
q, k, v and gate, up into one matmul each; `in,out` is x @ w, `out,in` is Hugging Face's layout.
aidx.models stores what is fastest here: fused, [in, out].
"""

import argparse
import datetime
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp


def weights(shapes, layers):
    """Per layer a tuple of distinct bf16 matrices."""
    make = lambda i, j, shape: jnp.full(shape, 1e-3 + 1e-4 * (i + j), jnp.bfloat16)
    return [tuple(make(i, j, s) for j, s in enumerate(shapes)) for i in range(layers)]


def gated(gate, up):
    return jax.nn.silu(gate) * up


def fused_in_out(x, layers, N, K, H, F):
    G = N // K
    for qkv, o, gate_up, down in layers:
        y = jnp.tensordot(x, qkv, axes=1)  # [T, K, G+2, H]
        mixed = (y[..., G, :] * y[..., G + 1, :]).reshape(-1, K * H).sum(-1, keepdims=True)
        x = x + (y[..., :G, :].reshape(-1, N * H) + mixed) @ o
        y = jnp.tensordot(x, gate_up, axes=1)  # [T, 2, F]
        x = x + gated(y[:, 0], y[:, 1]) @ down
    return x


def transposed_matmul(x, w):
    return jnp.einsum("td,fd->tf", x, w)


def fused_out_in(x, layers, N, K, H, F):
    q_end, k_end = N * H, (N + K) * H
    for qkv, o, gate_up, down in layers:
        y = transposed_matmul(x, qkv)
        mixed = (y[:, q_end:k_end] * y[:, k_end:]).sum(-1, keepdims=True)
        x = x + transposed_matmul(y[:, :q_end] + mixed, o)
        y = transposed_matmul(x, gate_up)
        x = x + transposed_matmul(gated(y[:, :F], y[:, F:]), down)
    return x


def separate(matmul):
    def step(x, layers, N, K, H, F):
        for q, k, v, o, gate, up, down in layers:
            mixed = (matmul(x, k) * matmul(x, v)).sum(-1, keepdims=True)
            x = x + matmul(matmul(x, q) + mixed, o)
            x = x + matmul(gated(matmul(x, gate), matmul(x, up)), down)
        return x

    return step


def variants(D, N, K, H, F):
    parts = [(D, N * H), (D, K * H), (D, K * H), (N * H, D), (D, F), (D, F), (F, D)]
    flip = lambda shapes: [s[::-1] for s in shapes]
    fused = [(D, (N + 2 * K) * H), (N * H, D), (D, 2 * F), (F, D)]
    grouped = [(D, K, N // K + 2, H), (N * H, D), (D, 2, F), (F, D)]
    return {
        "fused in,out": (fused_in_out, grouped),
        "fused out,in": (fused_out_in, flip(fused)),
        "separate in,out": (separate(jnp.matmul), parts),
        "separate out,in": (separate(transposed_matmul), flip(parts)),
    }


def seconds(f, *args, repeats=5, calls=20):
    """Best mean over calls dispatched one after another."""
    jax.block_until_ready(f(*args))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = f(*args)
        jax.block_until_ready(out)
        best = min(best, (time.perf_counter() - start) / calls)
    return best


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=pathlib.Path, help="write JSON here (default: print only)")
    args = parser.parse_args()
    D, N, K, H, F, layers = (64, 4, 1, 16, 96, 2) if args.tiny else (4096, 32, 8, 128, 14336, 8)
    rows = []
    for name, (step, shapes) in variants(D, N, K, H, F).items():
        made = weights(shapes, layers)
        size = sum(w.nbytes for w in jax.tree.leaves(made))
        f = jax.jit(lambda x, ws, step=step: step(x, ws, N, K, H, F))
        for T in (1, 64):
            rate = size / seconds(f, jnp.ones((T, D), jnp.bfloat16), made) / 1e12
            rows.append((f"T={T}", name, "weights_read", round(rate, 4), "TB/s"))
            print(*rows[-1])
    if args.out:
        meta = {
            "command": " ".join(["python", *sys.argv]),
            "date": datetime.date.today().isoformat(),
            "device": jax.devices()[0].device_kind,
            "versions": {"jax": jax.__version__},
        }
        keys = ("case", "implementation", "metric", "value", "unit")
        table = {"meta": meta, "rows": [dict(zip(keys, row, strict=True)) for row in rows]}
        args.out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
