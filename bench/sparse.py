"""Sparse products beside scipy.sparse, BCOO, BCSR and torch.sparse (cuSPARSE).

    python bench/sparse.py                  # into bench/results/<device>/sparse.json
    python bench/sparse.py --nonzeros 10000 1000000 --columns 1 32
    python bench/sparse.py --tiny           # any machine: does it run

A case is `op kind nonzeros xN`: square matrices with about ten entries a row, places uniform or
rows of power-law length; peers see the same matrix.  On a CPU the metric is the best of several
calls.  On an NVIDIA GPU it is device time: JAX programs chain calls and one of them is taken off
several, torch's calls are captured in a CUDA graph where they can be, else queued in bursts.  BCOO
also runs with JAX's cuSPARSE lowering (`jax_bcoo_cusparse_lowering`, off by default), `aidx xla`
and `aidx cusparse` are ours without the Pallas kernels, and BSR with a tenth of its blocks stored
is set beside the dense matmul.
"""

import argparse
import concurrent.futures
import datetime
import functools
import json
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from aidx.arrays import BSR, CSR, sparse
from bench.device_time import chained, milliseconds, seconds

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


@functools.lru_cache(maxsize=1)
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
    indptr = np.searchsorted(key // n, np.arange(n + 1))
    return scipy.sparse.csr_array((values, key % n, indptr), shape=(n, n))


# --- what is timed: (implementation, op, function, arguments) -------------------------------------


def our_calls(a, x, gpu, with_gradient):
    yield "aidx", "spmm", sparse.matmul, (a, x)
    if x.ndim == 2:
        yield "aidx", "sddmm", sparse.sampled_matmul, (a, x, x.T + 0)
    if with_gradient:

        def gradient(a, x):
            return jax.grad(lambda d, x: jnp.sum((a.with_data(d) @ x) ** 2), (0, 1))(a.data, x)

        yield "aidx", "grad", gradient, (a, x)
    if not gpu:
        return
    for name in ("cusparse", "xla") if with_gradient else ("cusparse",):
        f = functools.partial(sparse.matmul, implementation=name)
        yield f"aidx {name}", "spmm", f, (a, x)
        if with_gradient:
            yield f"aidx {name}", "spmm^T", f, (a.T, x)
    if with_gradient:
        yield "aidx", "spmm^T", sparse.matmul, (a.T, x)


def peer_calls(source, x, gpu, with_gradient):
    """`jax.experimental.sparse`."""
    from jax.experimental import sparse as peers

    bcoo = peers.BCOO.from_scipy_sparse(source.tocoo())
    bcoo = peers.BCOO(
        (bcoo.data, bcoo.indices), shape=bcoo.shape, indices_sorted=True, unique_indices=True
    )
    yield "bcoo", "spmm", lambda m, x: m @ x, (bcoo, x)
    if gpu:
        yield "bcoo cusparse", "spmm", lambda m, x: m @ x, (bcoo, x)
    elif with_gradient:
        f = lambda d, m, x: jnp.sum((peers.BCOO((d, m.indices), shape=m.shape) @ x) ** 2)
        yield "bcoo", "grad", lambda m, x: jax.grad(f, (0, 2))(m.data, m, x), (bcoo, x)
    if not gpu:
        yield "bcsr", "spmm", lambda m, x: m @ x, (peers.BCSR.from_bcoo(bcoo), x)


def scipy_calls(source, x):
    yield "spmm", lambda: source @ x
    back = source.T.tocsr()
    rows = np.repeat(np.arange(source.shape[0]), np.diff(source.indptr))

    def gradient():
        out = 2 * (source @ x)
        taken = out[rows] * x[source.indices]
        return back @ out, taken.sum(-1) if x.ndim > 1 else taken

    yield "grad", gradient


def torch_calls(source, x, gpu):
    """cuSPARSE's (or MKL's, on a CPU) through torch.sparse; nothing where torch is missing."""
    try:
        import torch
    except ImportError:
        return
    if gpu and not torch.cuda.is_available():
        return
    device = "cuda" if gpu else "cpu"
    parts = (source.indptr.astype(np.int32), source.indices.astype(np.int32), source.data)
    crow, col, data = (torch.from_numpy(p).to(device) for p in parts)
    a = torch.sparse_csr_tensor(crow, col, data, source.shape)
    dense = torch.from_numpy(np.array(x)).to(device)
    yield "spmm", lambda: a @ dense
    if x.ndim == 2 and gpu:
        c = torch.sparse_csr_tensor(crow, col, torch.zeros_like(data), source.shape)
        turned = dense.T.contiguous()
        yield "sddmm", lambda: torch.sparse.sampled_addmm(c, dense, turned)


# --- how it is timed ------------------------------------------------------------------------------


def repeats_of(work):
    """Calls in one program, so that it takes a millisecond or more."""
    return int(np.clip(4e8 / max(work, 1), 2, 100))


def device_times(calls, work):
    """(implementation, op, milliseconds) of JAX calls on a GPU, compiled side by side."""
    count = repeats_of(work)

    def compiled(call):
        _, _, f, args = call
        return jax.jit(chained(f, count)).lower(*args).compile()

    switched = [c for c in calls if c[0] == "bcoo cusparse"]
    jax.config.update("jax_bcoo_cusparse_lowering", True)
    programs = [(c, compiled(c)) for c in switched]
    jax.config.update("jax_bcoo_cusparse_lowering", False)
    others = [c for c in calls if c[0] != "bcoo cusparse"]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        programs += zip(others, pool.map(compiled, others), strict=True)
    for (name, op, _, args), program in programs:
        yield name, op, seconds(program, args, count) * 1e3


def host_times(calls):
    for name, op, f, args in calls:
        yield name, op, milliseconds(functools.partial(jax.jit(f), *args))


def torch_milliseconds(f, work):
    import torch

    if not torch.cuda.is_available():
        return milliseconds(f, lambda _: None)
    count, stream = repeats_of(work), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        f()
    torch.cuda.synchronize()
    run, graph = (lambda: [f() for _ in range(count)]), torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
        run = graph.replay
    except RuntimeError:  # what allocates or waits cannot be captured
        torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / count


def product_rows(kind, nonzeros, columns, gpu):
    source = matrix(kind, nonzeros)
    n = source.shape[0]
    x = np.random.default_rng(1).standard_normal((n, columns) if columns > 1 else n)
    x = x.astype(np.float32)
    a, on_device = CSR.from_scipy(source), jnp.asarray(x)
    case = lambda op: f"{op} {kind} {nonzeros:.0e} x{columns}"
    with_gradient = not gpu or nonzeros == 10**6
    calls = [
        *our_calls(a, on_device, gpu, with_gradient),
        *peer_calls(source, on_device, gpu, with_gradient),
    ]
    work = nonzeros * columns
    for name, op, value in device_times(calls, work) if gpu else host_times(calls):
        yield case(op), name, value
    for op, call in torch_calls(source, x, gpu):
        yield case(op), "torch.sparse", torch_milliseconds(call, work)
    if not gpu:
        for op, call in scipy_calls(source, x):
            yield case(op), "scipy", milliseconds(call, lambda _: None)


def block_rows(side, block, density, columns, gpu):
    """BSR beside the dense matmul of the same matrix."""
    grid = side // block
    rng = np.random.default_rng(0)
    count = max(1, round(density * grid * grid))
    flat = np.sort(rng.choice(grid * grid, count, replace=False))
    indptr = np.searchsorted(flat // grid, np.arange(grid + 1)).astype(np.int32)
    dtype = jnp.bfloat16 if gpu else jnp.float32
    data = jax.random.normal(jax.random.key(0), (count, block, block), dtype)
    a = BSR.from_parts(data, (flat % grid).astype(np.int32), indptr, (side, side))
    x = jax.random.normal(jax.random.key(1), (side, columns), dtype)
    case = lambda op: f"{op} {block}x{block} {density:.0%} {side}^2 x{columns} {x.dtype.name}"
    calls = [
        ("aidx", "bsr", sparse.matmul, (a, x)),
        ("dense", "bsr", jnp.matmul, (a.to_dense(), x)),
        ("aidx", "bsr^T", sparse.matmul, (a.T, x)),
        ("aidx", "bsr sddmm", sparse.sampled_matmul, (a, x, x.T + 0)),
    ]
    work = count * block * block * columns / 200
    for name, op, value in device_times(calls, work) if gpu else host_times(calls):
        yield case(op), name, value


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nonzeros", type=int, nargs="*")
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--kinds", nargs="+", default=["uniform", "power"])
    parser.add_argument("--blocks", type=int, nargs="*", help="sides of blocks")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after these")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=pathlib.Path)
    args = parser.parse_args()
    gpu, begun = jax.default_backend() == "gpu", time.perf_counter()
    if args.nonzeros is None:
        args.nonzeros = [10**4, 10**5, 10**6] + [10**7] * gpu
    if args.blocks is None:
        args.blocks = [128, 64, 32] if gpu else [128]
    side = 8192 if gpu else 2048
    if args.tiny:
        args.nonzeros, side, args.columns = [2000], 256, [1, 8]
    cases = [functools.partial(block_rows, side, b, 0.1, side, gpu) for b in args.blocks]
    for count in sorted(args.nonzeros, reverse=True):
        for kind in args.kinds:
            for columns in args.columns:
                cases.append(functools.partial(product_rows, kind, count, columns, gpu))
    rows = []
    for case in cases:
        if time.perf_counter() - begun > args.seconds:
            print("out of time", flush=True)
            break
        for name, implementation, value in case():
            rows.append((name, implementation, "time", round(value, 4), "ms"))
            print(*rows[-1], flush=True)
    if args.tiny:
        return
    out = args.out or RESULTS / ("h200" if gpu else "cpu") / "sparse.json"
    versions = {
        m: sys.modules[m].__version__ for m in ("jax", "scipy", "torch") if m in sys.modules
    }
    meta = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": versions,
    }
    keys = ("case", "implementation", "metric", "value", "unit")
    table = {"meta": meta, "rows": [dict(zip(keys, row, strict=True)) for row in rows]}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
