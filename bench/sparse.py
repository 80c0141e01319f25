"""Sparse products beside scipy.sparse, BCOO, BCSR and torch.sparse (cuSPARSE).

    python bench/sparse.py                  # into bench/results/<device>/sparse.json
    python bench/sparse.py --nonzeros 10000 1000000 --columns 1 32
    python bench/sparse.py --tiny           # any machine: does it run

A case is `op rows nse xN`: square matrices with about ten entries a row, places uniform or rows of
power-law length.  The metric is milliseconds a call, best of several; peers see the same matrix.
On an NVIDIA GPU BCOO also runs with JAX's cuSPARSE lowering (`jax_bcoo_cusparse_lowering`, off by
default), and BSR of 128x128 blocks, a tenth of them stored, is set beside the dense matmul.
"""

import argparse
import datetime
import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from aidx.arrays import BSR, CSR, sparse

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def matrix(kind, nonzeros, seed=0):
    """A scipy CSR with about `nonzeros` entries in nonzeros / 10 rows, f32."""
    import scipy.sparse

    rng = np.random.default_rng(seed)
    n = nonzeros // 10
    if kind == "uniform":
        row = rng.integers(0, n, nonzeros)
    else:  # lengths fall off as rank^-0.7; rows in random order
        weight = (1 + np.arange(n)) ** -0.7
        row = rng.permutation(n)[rng.choice(n, nonzeros, p=weight / weight.sum())]
    key = np.unique(row.astype(np.int64) * n + rng.integers(0, n, nonzeros))
    values = rng.standard_normal(key.size).astype(np.float32)
    return scipy.sparse.csr_array((values, (key // n, key % n)), shape=(n, n))


def milliseconds(f, wait, budget=1.0):
    """Best time of a call; `wait` makes its result arrive."""
    wait(f())
    best, end = float("inf"), time.perf_counter() + budget
    for _ in range(200):
        start = time.perf_counter()
        wait(f())
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return best * 1e3


def jax_functions(source, x):
    """name -> a call without arguments, of aidx and of jax.experimental.sparse."""
    from jax.experimental import sparse as peers

    a = CSR.from_scipy(source)
    spmm = jax.jit(sparse.matmul)
    yield "aidx", "spmm", functools.partial(spmm, a, x)

    @jax.jit
    def gradient(a, x):
        return jax.grad(lambda d, x: jnp.sum((a.with_data(d) @ x) ** 2), (0, 1))(a.data, x)

    yield "aidx", "grad", functools.partial(gradient, a, x)
    if x.ndim == 2:
        y = jnp.asarray(x.T)
        yield "aidx", "sddmm", functools.partial(jax.jit(sparse.sampled_matmul), a, x, y)
    bcoo = peers.BCOO.from_scipy_sparse(source.tocoo())
    bcoo = peers.BCOO(
        (bcoo.data, bcoo.indices), shape=bcoo.shape, indices_sorted=True, unique_indices=True
    )
    yield "bcoo", "spmm", functools.partial(jax.jit(lambda m, x: m @ x), bcoo, x)

    @jax.jit
    def peer_gradient(m, x):
        f = lambda d, x: jnp.sum((peers.BCOO((d, m.indices), shape=m.shape) @ x) ** 2)
        return jax.grad(f, (0, 1))(m.data, x)

    yield "bcoo", "grad", functools.partial(peer_gradient, bcoo, x)
    bcsr = peers.BCSR.from_bcoo(bcoo)
    yield "bcsr", "spmm", functools.partial(jax.jit(lambda m, x: m @ x), bcsr, x)
    if jax.default_backend() == "gpu":
        jax.config.update("jax_bcoo_cusparse_lowering", True)
        lowered = jax.jit(lambda m, x: m @ x).lower(bcoo, x).compile()
        jax.config.update("jax_bcoo_cusparse_lowering", False)
        yield "bcoo cusparse", "spmm", functools.partial(lowered, bcoo, x)
        for name in ("xla", "cusparse"):
            call = jax.jit(functools.partial(sparse.matmul, implementation=name))
            yield f"aidx {name}", "spmm", functools.partial(call, a, x)


def torch_functions(source, x):
    """cuSPARSE's (or MKL's, on a CPU) through torch.sparse; nothing where torch is missing."""
    try:
        import torch
    except ImportError:
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and jax.default_backend() != "cpu":
        return
    parts = (source.indptr.astype(np.int32), source.indices.astype(np.int32), source.data)
    crow, col, data = (torch.from_numpy(p).to(device) for p in parts)
    a = torch.sparse_csr_tensor(crow, col, data, source.shape)
    dense = torch.from_numpy(np.array(x)).to(device)
    wait = lambda _: torch.cuda.synchronize() if device == "cuda" else None
    yield "spmm", (lambda: a @ dense), wait
    if x.ndim == 2 and device == "cuda":
        c = torch.sparse_csr_tensor(crow, col, torch.zeros_like(data), source.shape)
        yield "sddmm", (lambda: torch.sparse.sampled_addmm(c, dense, dense.T)), wait


def product_rows(kind, nonzeros, columns):
    source = matrix(kind, nonzeros)
    n = source.shape[0]
    x = np.random.default_rng(1).standard_normal((n, columns) if columns > 1 else n)
    x = x.astype(np.float32)
    on_device = jnp.asarray(x)
    case = lambda op: f"{op} {kind} {nonzeros:.0e} x{columns}"
    for name, op, call in jax_functions(source, on_device):
        yield case(op), name, milliseconds(call, jax.block_until_ready)
    for op, call, wait in torch_functions(source, on_device):
        yield case(op), "torch.sparse", milliseconds(call, wait)
    if jax.default_backend() == "cpu":
        yield case("spmm"), "scipy", milliseconds(lambda: source @ x, lambda _: None)
        back = source.T.tocsr()
        cotangent = np.ones_like(x)

        def gradient():
            out = 2 * (source @ x) * cotangent
            rows = np.repeat(np.arange(n), np.diff(source.indptr))
            taken = out[rows] * x[source.indices]
            return back @ out, taken.sum(-1) if columns > 1 else taken

        yield case("grad"), "scipy", milliseconds(gradient, lambda _: None)


def block_rows(side, block, density, columns):
    """BSR beside the dense matmul of the same matrix."""
    grid = side // block
    rng = np.random.default_rng(0)
    count = max(1, round(density * grid * grid))
    flat = np.sort(rng.choice(grid * grid, count, replace=False))
    indptr = np.searchsorted(flat // grid, np.arange(grid + 1)).astype(np.int32)
    dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    data = jnp.asarray(rng.standard_normal((count, block, block)), dtype)
    a = BSR.from_parts(data, (flat % grid).astype(np.int32), indptr, (side, side))
    x, whole = jnp.ones((side, columns), dtype), a.to_dense()
    case = f"bsr {block}x{block} {density:.0%} {side}^2 x{columns} {jnp.dtype(dtype).name}"
    calls = {"aidx": (jax.jit(sparse.matmul), a), "dense": (jax.jit(jnp.matmul), whole)}
    for name, (f, m) in calls.items():
        yield case, name, milliseconds(functools.partial(f, m, x), jax.block_until_ready)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nonzeros", type=int, nargs="+")
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--kinds", nargs="+", default=["uniform", "power"])
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    gpu = jax.default_backend() == "gpu"
    nonzeros = args.nonzeros or [10**4, 10**5, 10**6] + [10**7] * gpu
    side = 8192 if gpu else 2048
    if args.tiny:
        nonzeros, side, args.columns = [2000], 256, [1, 8]
    rows = []

    def record(case, name, value):
        rows.append((case, name, "time", round(value, 4), "ms"))
        print(*rows[-1], flush=True)

    for kind in args.kinds:
        for count in nonzeros:
            for columns in args.columns:
                for row in product_rows(kind, count, columns):
                    record(*row)
    for row in block_rows(side, 128, 0.1, side):
        record(*row)
    if args.tiny:
        return
    out = args.out or RESULTS / ("h200" if gpu else "cpu") / "sparse.json"
    meta = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": {"jax": jax.__version__},
    }
    keys = ("case", "implementation", "metric", "value", "unit")
    table = {"meta": meta, "rows": [dict(zip(keys, row, strict=True)) for row in rows]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
