"""Ragged rows beside padding to the longest, and beside torch.nested (jagged).

    python bench/ragged.py                  # into bench/results/<device>/ragged.json
    python bench/ragged.py --tiny           # any machine: does it run

Row lengths are drawn so that a batch padded to its longest row would be a quarter full.  `padded`
is the same operation on the whole padded batch; `padded, lengths` is attention told the lengths,
which passes over blocks of padding, on a batch that is padded already; `pad, lengths, unpad` is
that from packed rows and back to them.  Gradients are of the sum of squares.  On a GPU the metric
is device time of calls on copies of the first argument in one program (torch: of queued calls),
else the best call.
"""

import argparse
import concurrent.futures
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import aidx
from aidx.arrays import Ragged, ragged
from aidx.ops.norm import layer_norm
from bench.device_time import milliseconds, seconds, side_by_side
from bench.record import RESULTS, Record

CALLS = 2  # in one program


def lengths_of(rows, longest, fill=0.25, seed=0):
    """`rows` lengths, the longest `longest`, their mean about `fill` of it."""
    share = np.random.default_rng(seed).beta(0.6, 0.6 * (1 - fill) / fill, rows)
    share *= (fill * rows - 1) / share[1:].sum()  # what the longest row leaves
    lengths = np.clip(np.round(share * longest), 1, longest).astype(np.int32)
    lengths[0] = longest
    return lengths


def attention_calls(lengths, heads, head_dim, dtype):
    """(implementation, op, function, arguments) over the same rows."""
    longest, capacity = int(lengths.max()), int(lengths.sum())
    values = jax.random.normal(jax.random.key(0), (3, capacity, heads, head_dim), dtype)
    rows = Ragged.from_lengths(values[0], lengths)
    packed = rows, values[1], values[2]  # one array of offsets, as projections of one x have it
    padded = tuple(rows.with_values(v).to_padded(longest) for v in values)
    alike = lambda q, k, v: (q, Ragged(k, q.offsets), Ragged(v, q.offsets))
    lens = dict(q_lens=jnp.asarray(lengths), kv_lens=jnp.asarray(lengths))

    def ours(q, k, v):
        return ragged.attention(*alike(q, k, v), causal=True).values

    def dense(q, k, v):
        return aidx.flash_attention(q, k, v, causal=True)

    def told(q, k, v):
        return aidx.flash_attention(q, k, v, causal=True, **lens)

    def there_and_back(q, k, v):
        out = told(*(r.to_padded(longest) for r in alike(q, k, v)))
        return Ragged.from_padded(out, lens["q_lens"], capacity=capacity).values

    for name, f, args in (
        ("aidx", ours, packed),
        ("padded", dense, padded),
        ("padded, lengths", told, padded),
        ("pad, lengths, unpad", there_and_back, packed),
    ):
        yield name, "attention", f, args
        if name != "pad, lengths, unpad":
            yield name, "attention grad", gradient(f), args


def gradient(f):
    """Of the sum of squares with respect to the floating leaves."""

    def run(*args):
        loss = lambda *args: jnp.sum(f(*args).astype(jnp.float32) ** 2)
        return jax.tree.leaves(aidx.grad(loss, tuple(range(len(args))))(*args))

    return run


def norm_calls(lengths, features, dtype):
    capacity, longest = int(lengths.sum()), int(lengths.max())
    values = jax.random.normal(jax.random.key(0), (capacity, features), dtype)
    packed = Ragged.from_lengths(values, lengths)
    scale, bias = jnp.ones(features, dtype), jnp.zeros(features, dtype)
    ours = lambda x, scale, bias: ragged.layer_norm(x, scale, bias).values
    for name, f, x in (
        ("aidx", ours, packed),
        ("padded", layer_norm, packed.to_padded(longest)),
    ):
        yield name, "layer_norm", f, (x, scale, bias)
        yield name, "layer_norm grad", gradient(f), (x, scale, bias)


def torch_calls(lengths, heads, head_dim, features):
    """torch.nested (jagged) on a GPU; nothing where there is none."""
    try:
        import torch
    except ImportError:
        return
    if not torch.cuda.is_available():
        return
    make = lambda *tail: torch.nested.nested_tensor(
        [torch.randn(int(n), *tail, device="cuda") for n in lengths],
        layout=torch.jagged,
        device="cuda",
        dtype=torch.bfloat16,
        requires_grad=True,
    )

    def both(op, f, *args):
        def backward():
            (f().values().float() ** 2).sum().backward()
            for x in args:
                x.grad = None

        yield op, f
        yield f"{op} grad", backward

    q, k, v = (make(heads, head_dim) for _ in range(3))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    turned = lambda: (x.transpose(1, 2) for x in (q, k, v))
    yield from both("attention", lambda: sdpa(*turned(), is_causal=True).transpose(1, 2), q, k, v)
    x = make(features)
    kinds = dict(device="cuda", dtype=torch.bfloat16, requires_grad=True)
    scale, bias = torch.ones(features, **kinds), torch.zeros(features, **kinds)
    norm = lambda: torch.nn.functional.layer_norm(x, (features,), scale, bias)
    yield from both("layer_norm", norm, x, scale, bias)


def torch_milliseconds(f, calls=10):
    """Best of several queues of calls."""
    import torch

    times = []
    for _ in range(4):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            f()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return min(times[1:])


def jax_times(calls, gpu):
    """(call, milliseconds), all compiled before the first is timed."""

    def prepared(call):
        _, _, f, args = call
        if not gpu:
            return jax.jit(f).lower(*args).compile(), args
        program, args = side_by_side(f, args, CALLS)
        return jax.jit(program).lower(*args).compile(), args

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        programs = list(pool.map(prepared, calls))
    for call, (program, args) in zip(calls, programs, strict=True):
        if gpu:
            yield call, seconds(program, args, CALLS) * 1e3
        else:
            yield call, milliseconds(lambda program=program, args=args: program(*args))


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
    out = args.out or RESULTS / ("h200" if gpu else "cpu") / "ragged.json"
    record = Record(None if args.tiny else out)
    shape = f"{rows}x{longest} fill {lengths.mean() / longest:.0%} {jnp.dtype(dtype).name}"

    def add(op, name, value):
        record.add(f"{op} {shape}", name, value)
        print(f"{op:16s} {name:20s} {value:9.4f} ms", flush=True)

    print(shape, flush=True)
    ours = [
        *norm_calls(lengths, features, dtype),
        *attention_calls(lengths, heads, head_dim, dtype),
    ]
    for grad in (False, True):
        chosen = [c for c in ours if c[1].endswith("grad") == grad]
        for (name, op, *_), value in jax_times(chosen, gpu):
            add(op, name, value)
        for op, f in torch_calls(lengths, heads, head_dim, features) if gpu else ():
            if op.endswith("grad") != grad:
                continue
            try:
                add(op, "torch.nested", torch_milliseconds(f))
            except (RuntimeError, NotImplementedError) as refusal:
                print("torch.nested", op, str(refusal)[:100], flush=True)


if __name__ == "__main__":
    main()
