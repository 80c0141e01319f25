"""Sparse products beside scipy.sparse, BCOO, BCSR and torch.sparse (cuSPARSE).

    python bench/sparse.py                  # into bench/results/<device>/sparse.json
    python bench/sparse.py --nonzeros 10000 1000000 --columns 1 32
    python bench/sparse.py --variants       # configurations of the kernels, printed
    python bench/sparse.py --tiny           # any machine: does it run

A case is `op kind nonzeros xN`: square matrices with about ten entries a row, places uniform or
rows of power-law length; peers see the same matrix.  On a CPU the implementations of a case take
turns, and the metric is the best call of each.  On an NVIDIA GPU it is device time: products are
applied to their own result, up to 400 times in one program (of torch: in CUDA graphs), and one
program is taken off several; other calls are chained by a loop.  BCOO also runs with JAX's cuSPARSE
lowering (`jax_bcoo_cusparse_lowering`, off by default), `aidx xla` and `aidx cusparse` are ours
without the Pallas kernels, and BSR with a tenth of its blocks stored stands beside the dense
matmul.
"""

import argparse
import concurrent.futures
import functools
import itertools
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from aidx.arrays import BSR, CSR, sparse
from bench.device_time import chained, seconds
from bench.record import RESULTS, Record


@functools.lru_cache(maxsize=8)
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
    values = 0.3 * rng.standard_normal(key.size).astype(np.float32)  # products stay finite
    indptr = np.searchsorted(key // n, np.arange(n + 1))
    return scipy.sparse.csr_array((values, key % n, indptr), shape=(n, n))


# --- what is timed: (implementation, op, function, arguments) -------------------------------------


def our_calls(a, x, gpu, full):
    """`full` is with gradients."""
    yield "aidx", "spmm", sparse.matmul, (a, x)
    names = (("cusparse", "xla") if full else ("cusparse",)) if gpu else ()
    others = {f"aidx {n}": functools.partial(sparse.matmul, implementation=n) for n in names}
    for name, f in others.items():
        yield name, "spmm", f, (a, x)
    if x.ndim == 2:
        yield "aidx", "sddmm", sparse.sampled_matmul, (a, x, x.T + 0)
    if full:

        def gradient(a, x):
            return jax.grad(lambda d, x: jnp.sum((a.with_data(d) @ x) ** 2), (0, 1))(a.data, x)

        yield "aidx", "grad", gradient, (a, x)
        for name, f in {"aidx": sparse.matmul, **others}.items():
            if gpu:
                yield name, "spmm^T", f, (a.T, x)


def peer_calls(source, x, gpu, full):
    """`jax.experimental.sparse`."""
    from jax.experimental import sparse as peers

    bcoo = peers.BCOO.from_scipy_sparse(source.tocoo())
    bcoo = peers.BCOO(
        (bcoo.data, bcoo.indices), shape=bcoo.shape, indices_sorted=True, unique_indices=True
    )
    product = lambda m, x: m @ x
    yield "bcoo", "spmm", product, (bcoo, x)
    if gpu:
        yield "bcoo cusparse", "spmm", product, (bcoo, x)
    elif full:
        f = lambda d, m, x: jnp.sum((peers.BCOO((d, m.indices), shape=m.shape) @ x) ** 2)
        yield "bcoo", "grad", lambda m, x: jax.grad(f, (0, 2))(m.data, m, x), (bcoo, x)
    if not gpu:
        yield "bcsr", "spmm", product, (peers.BCSR.from_bcoo(bcoo), x)


def scipy_calls(source, x):
    yield "scipy", "spmm", lambda: source @ x
    back = source.T.tocsr()
    rows = np.repeat(np.arange(source.shape[0]), np.diff(source.indptr))

    def gradient():
        out = 2 * (source @ x)
        taken = out[rows] * x[source.indices]
        return back @ out, taken.sum(-1) if x.ndim > 1 else taken

    yield "scipy", "grad", gradient


def torch_calls(source, columns, gpu):
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
    n = source.shape[0]
    dense = torch.randn((n, columns) if columns > 1 else n, device=device)
    yield "spmm", lambda x: a @ x, dense
    if columns > 1 and gpu:
        c = torch.sparse_csr_tensor(crow, col, torch.zeros_like(data), source.shape)
        turned = dense.T.contiguous()
        yield "sddmm", lambda x: (torch.sparse.sampled_addmm(c, x, turned), x)[1], dense


# --- how it is timed ------------------------------------------------------------------------------


def repeats_of(work):
    """(calls in a row, times that such a row runs) in one program of a millisecond or so."""
    calls = 4e8 / max(work, 1)
    return (int(np.clip(calls, 2, 20)), int(np.clip(calls / 20, 1, 20)))


def applied(f, row, times):
    """One program that applies a square matrix again and again.

    Its loop makes a short graph of kernels run at the same addresses, without being made anew.
    """

    def run(a, x):
        def once(_, x):
            for _ in range(row):
                x = f(a, x)
            return x

        return once(0, x) if times == 1 else jax.lax.fori_loop(0, times, once, x)

    return run


def program_of(call, work):
    """(the calls it makes, a function) of one entry of `our_calls`."""
    _, op, f, *_ = call
    row, times = repeats_of(work)
    if op in ("spmm", "spmm^T"):
        return row * times, applied(f, row, times)
    return min(row * times, 100), chained(f, min(row * times, 100))


def device_times(calls):
    """(call, milliseconds) of JAX calls, (call, work) each, compiled side by side."""
    # Without this the zeros that every product begins with are made for all of them at once.
    apart = {"xla_disable_hlo_passes": "copy_fusion"} if jax.default_backend() == "gpu" else None

    def compiled(item):
        call, work = item
        return jax.jit(program_of(call, work)[1]).lower(*call[3]).compile(compiler_options=apart)

    switched = [c for c in calls if c[0][0] == "bcoo cusparse"]
    jax.config.update("jax_bcoo_cusparse_lowering", True)
    programs = [(c, compiled(c)) for c in switched]
    jax.config.update("jax_bcoo_cusparse_lowering", False)
    others = [c for c in calls if c[0][0] != "bcoo cusparse"]
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        programs = [*zip(others, pool.map(compiled, others), strict=True), *programs]
    for (call, work), program in programs:
        yield call, seconds(program, call[3], program_of(call, work)[0]) * 1e3


def in_turns(calls, budget, most=300):
    """Best milliseconds of each call, by turns, a call no longer than `budget` seconds in all.

    A neighbour who takes the machine for a moment takes it from all of them.
    """
    best, spent = [float("inf")] * len(calls), [0.0] * len(calls)
    for call in calls:
        call()
    for _ in range(most):
        for i, call in enumerate(calls):
            if spent[i] > budget:
                continue
            start = time.perf_counter()
            call()
            took = time.perf_counter() - start
            best[i], spent[i] = min(best[i], took), spent[i] + took
    return [1e3 * b for b in best]


def torch_milliseconds(f, x, work):
    """Of `x = f(x)`, on a GPU in one CUDA graph."""
    import torch

    count, stream = repeats_of(work)[0], torch.cuda.Stream()

    def run():
        y = x
        for _ in range(count):
            y = f(y)
        return y

    with torch.cuda.stream(stream):
        f(x)
    torch.cuda.synchronize()
    graph, replay = torch.cuda.CUDAGraph(), run
    try:
        with torch.cuda.graph(graph):
            kept = run()
        replay = lambda: (graph.replay(), kept)  # what a graph writes must live
    except RuntimeError as refusal:  # what allocates or waits cannot be captured
        print("no graph:", str(refusal)[:80], flush=True)
        torch.cuda.synchronize()
    times = []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats_of(work)[1]):
            replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return min(times[1:]) / (count * repeats_of(work)[1])


def operands(kind, nonzeros, columns):
    """(scipy's matrix, ours, x)."""
    source = matrix(kind, nonzeros)
    n = source.shape[0]
    shape = (n, columns) if columns > 1 else (n,)
    return source, CSR.from_scipy(source), jax.random.normal(jax.random.key(1), shape)


def error_of(source, x, got):
    """The largest error of a product, over its largest number, in two columns."""
    x, got = (np.asarray(v.reshape(v.shape[0], -1)[:, :2], np.float64) for v in (x, got))
    want = source.astype(np.float64) @ x
    return np.abs(got - want).max() / np.abs(want).max()


FIRST = ("aidx", "spmm")  # what is measured of all cases before the rest of any


def gpu_rows(record, kind, nonzeros, columns, rest):
    """Ours and torch's product at every number of columns, or the `rest`."""
    begun, calls = len(record.rows), []
    for n in columns:
        source, a, x = operands(kind, nonzeros, n)
        label, full = (
            f"{kind} {nonzeros:.0e} x{n}",
            rest and (nonzeros == 10**6 or nonzeros * n == 10**7),
        )
        found = list(our_calls(a, x, True, full))
        if rest:
            found = [c for c in (*found, *peer_calls(source, x, True, full)) if c[:2] != FIRST]
            if nonzeros * n > 10**9:  # it takes 20 ms
                found = [c for c in found if c[0] != "bcoo cusparse"]
        else:
            found = [c for c in found if c[:2] == FIRST]
            check(record, label, source, a, x)
        calls += [((*c, label), nonzeros * n) for c in found]
    for (name, op, *_, label), value in device_times(calls):
        record.add(f"{op} {label}", name, value)
    del calls, found
    for n in columns:
        for op, f, x in torch_calls(matrix(kind, nonzeros), n, True):
            if (op == "sddmm") == rest:
                value = torch_milliseconds(f, x, nonzeros * n)
                record.add(f"{op} {kind} {nonzeros:.0e} x{n}", "torch.sparse", value)
    show(record, begun)


def check(record, label, source, a, x):
    """The error of the product, and a line where it is wrong."""
    error = error_of(source, x, sparse.matmul(a, x))
    record.add(f"spmm {label}", "aidx", error, "error", "of the largest", 2)
    if not error < 1e-5:
        print("WRONG", label, error, flush=True)


def cpu_rows(record, kind, nonzeros, columns, with_torch, budget):
    """Everything, by turns."""
    for n in columns:
        source, a, x = operands(kind, nonzeros, n)
        begun, label = len(record.rows), f"{kind} {nonzeros:.0e} x{n}"
        check(record, label, source, a, x)
        jitted = (*our_calls(a, x, False, True), *peer_calls(source, x, False, True))
        calls = [(name, op, waited(f, args)) for name, op, f, args in jitted]
        calls += scipy_calls(source, np.asarray(x))
        if with_torch:
            torch = torch_calls(source, n, False)
            calls += [("torch.sparse", op, functools.partial(f, d)) for op, f, d in torch]
        for op in ("spmm", "sddmm", "grad"):
            chosen = {name: f for name, o, f in calls if o == op}
            for name, value in zip(chosen, in_turns(list(chosen.values()), budget), strict=True):
                record.add(f"{op} {label}", name, value)
        show(record, begun)


def waited(f, args):
    """A call that returns when its result is there."""
    f = jax.jit(f)
    return lambda: jax.block_until_ready(f(*args))


def block_rows(record, side, block, density, columns, gpu, budget):
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
    label = f"{block}x{block} {density:.0%} {side}^2 x{columns} {x.dtype.name}"
    calls = [
        ("aidx", "bsr", sparse.matmul, (a, x)),
        ("dense", "bsr", jnp.matmul, (a.to_dense(), x)),
        ("aidx", "bsr^T", sparse.matmul, (a.T, x)),
        ("aidx", "bsr sddmm", sparse.sampled_matmul, (a, x, x.T + 0)),
    ]
    begun, work = len(record.rows), count * block * block * columns / 200
    if gpu:
        values = [v for _, v in device_times([(c, work) for c in calls])]
    else:
        values = in_turns([waited(f, args) for _, _, f, args in calls], budget)
    for (name, op, _, _), value in zip(calls, values, strict=True):
        record.add(f"{op} {label}", name, value)
    show(record, begun)


def show(record, begun):
    """A line a case of the rows since `begun`."""
    rows = record.rows[begun:]
    for case in dict.fromkeys(r["case"] for r in rows):
        parts = [f"{r['implementation']} {r['value']:.4g}" for r in rows if r["case"] == case]
        print(f"{case:34s}", " | ".join(parts), flush=True)


# --- configurations of the kernels ----------------------------------------------------------------


def variants_of(a, x):
    """(name, product) of the configurations worth a look."""
    from pallas_kernels.sparse import RowConfig, VectorConfig, row_matmul, vector_matmul

    nse, n = a.nse, x.shape[1] if x.ndim == 2 else 1
    if n == 1:
        for chunk in (128, 256, 512):
            yield str(chunk), vector_matmul, VectorConfig(chunk)
        yield "256 twice", vector_matmul, VectorConfig(256, once=False)
        yield "256 long 16", vector_matmul, VectorConfig(256, 16)
        yield "256 long 64", vector_matmul, VectorConfig(256, 64)
        return
    default = RowConfig.of(nse, n)
    chunks = [c for c in (32, 64, 128, 256, 512) if default.chunk / 2 <= c <= default.chunk * 2]
    for chunk, zeroed in itertools.product(chunks, (True, False)):
        if not zeroed or a.shape[0] * n <= 2**26:
            config = RowConfig(chunk, default.vector, zeroed)
            yield f"{chunk}{' zeroed' * zeroed}", row_matmul, config


def variant_rows(record, kind, nonzeros, columns):
    """Every configuration of the product, checked, beside torch."""
    for n in columns:
        source, a, x = operands(kind, nonzeros, n)
        label = f"{kind} {nonzeros:.0e} x{n}"

        def call(variant, source=source, a=a, x=x, work=nonzeros * n):
            name, f, config = variant

            def product(a, x):
                row, column = a.coordinates()
                return f(a.data, x, row, column, a.indptr, config=config)

            error = error_of(source, x, jax.jit(product)(a, x))
            name = name if error < 1e-5 else f"{name} WRONG {error:.1e}"
            return (name, "spmm", product, (a, x)), work

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            calls = list(pool.map(call, variants_of(a, x)))
        begun = len(record.rows)
        for op, f, dense in torch_calls(source, n, True):
            if op == "spmm":
                value = torch_milliseconds(f, dense, nonzeros * n)
                record.add(f"{op} {label}", "torch.sparse", value)
        for (name, *_), value in device_times(calls):
            record.add(f"spmm {label}", name, value)
        show(record, begun)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nonzeros", type=int, nargs="*")
    parser.add_argument("--columns", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--kinds", nargs="+", default=["uniform", "power"])
    parser.add_argument("--blocks", type=int, nargs="*", help="sides of blocks")
    parser.add_argument("--seconds", type=float, default=1e9, help="start no case after these")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds a call, on a CPU")
    parser.add_argument("--no-torch", action="store_true", help="on a CPU: without torch.sparse")
    parser.add_argument("--variants", action="store_true", help="configurations, printed only")
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
        args.nonzeros, side, args.columns, args.budget = [2000], 256, [1, 8], 0.02
    out = args.out or RESULTS / ("h200" if gpu else "cpu") / "sparse.json"
    record = Record(None if args.tiny or args.variants else out)
    pairs = [(k, n) for n in sorted(args.nonzeros, reverse=True) for k in args.kinds]
    pool = concurrent.futures.ThreadPoolExecutor(len(pairs) or 1)
    made = [pool.submit(matrix, *pair) for pair in pairs]
    concurrent.futures.wait(made)
    part, columns, shape = functools.partial, args.columns, (side, gpu, args.budget)
    blocks = [part(block_rows, record, side, b, 0.1, *shape) for b in args.blocks]
    if args.variants:
        cases = [part(variant_rows, record, *pair, columns) for pair in pairs]
    elif gpu:
        of = lambda rest: [part(gpu_rows, record, *pair, columns, rest) for pair in pairs]
        cases = [*of(False), *blocks, *of(True)]
    else:
        more = columns, not args.no_torch, args.budget
        cases = [*[part(cpu_rows, record, *pair, *more) for pair in pairs], *blocks]
    for case in cases:
        if time.perf_counter() - begun > args.seconds:
            print("out of time", flush=True)
            break
        case()


if __name__ == "__main__":
    main()
