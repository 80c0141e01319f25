"""What the benchmarks of paged attention share: shapes, pools, clocks and results."""

import datetime
import functools
import json
import os
import pathlib
import re
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pallas_kernels import paged_attention as pa  # noqa: E402

T0 = time.time()
N, K, H = 32, 8, 128
POOL_TOKENS = 256 * 4096 + 4096
CALLS = 16  # of a program, each with tables of its own; as many layers share a work list
LARGE = {
    "1x32k": [32768],
    "64x1k": [1024] * 64,
    "64x4k": [4096] * 64,
    "256x1k": [1024] * 256,
    "256x4k": [4096] * 256,
    "16x32k": [32768] * 16,
    "32k+255x512": [32768] + [512] * 255,
}
NARROW = ("int8", "float8_e4m3fn")
TOKENS_FIRST = "tokens first"  # a kind of pools
# rows of (context, new tokens), chunks first
CHUNKS = {
    "1x512 over 8k": [(8704, 512)],
    "8x512 over 8k": [(8704, 512)] * 8,
    "64x4k + 512 over 8k": [(8704, 512)] + [(4096, 1)] * 64,
}


def say(*words):
    print(f"[{time.time() - T0:5.0f}s]", *words, flush=True)


def tables(lens, size, num_blocks, rng, sets=CALLS):
    """Block tables over a shuffled pool, disjoint between sets while the pool lasts."""
    need = [-(-n // size) for n in lens]
    total, out = sum(need), []
    perm = rng.permutation(num_blocks).astype(np.int32)
    for s in range(sets):
        ids = perm[(np.arange(total) + s * total) % num_blocks]
        table = np.full((len(lens), max(need)), num_blocks + 7, np.int32)
        begin = 0
        for r, n in enumerate(need):
            table[r, :n] = ids[begin : begin + n]
            begin += n
        out.append(table)
    return out


def normal_pool(key, shape):
    """bf16 normals made in slices, so that the f32 scratch stays small."""
    parts = 8
    make = lambda k: jax.random.normal(k, (shape[0] // parts, *shape[1:]), jnp.bfloat16)
    pool = jax.lax.map(make, jax.random.split(key, parts))
    return pool.reshape(-1, *shape[1:])


def decode(lens):
    """Rows of (context, new tokens) that decode one token each."""
    return [(n, 1) for n in lens]


def row(case, implementation, metric, value, unit):
    return dict(case=case, implementation=implementation, metric=metric, value=value, unit=unit)


def aidx_call(config, max_q=1, **options):
    return functools.partial(pa.paged_attention, max_q=max_q, config=config, **options)


def narrow_call(config, max_q=1):
    """Pools with scales of tokens and heads."""

    def call(q, k, v, table, lens, indptr):
        rows = (table, lens, indptr)
        options = dict(max_q=max_q, config=config, k_scale=k[1], v_scale=v[1])
        return pa.paged_attention(q, k[0], v[0], *rows, **options)

    return call


def dense_call(q, k, v, band):
    """Our dense flash attention at the operations of a chunk: `[R, 512]` queries over keys."""
    from pallas_kernels import flash_attention as fa

    return fa.flash_attention_fwd(q, k, v, band=band, scale=H**-0.5)[0]


def seconds(compiled, args):
    """Device time of one program: the slope between one program and five in a queue."""

    def queue(n):
        t = time.perf_counter()
        for _ in range(n):
            out = compiled(*args)
        jax.block_until_ready(out)
        return time.perf_counter() - t

    queue(2)
    one = sorted(queue(1) for _ in range(5))[2]
    five = sorted(queue(5) for _ in range(5))[2]
    return (five - one) / 4


def copy_rate(x):
    """TB/s read and written by the device copying `x`."""
    f = jax.jit(jnp.copy).lower(x).compile()
    return 2 * x.nbytes / seconds(f, (x,)) / 1e12


def pool_shape(size, kind):
    """Of a pool of about POOL_TOKENS; JAX's own op wants the heads first."""
    blocks = POOL_TOKENS // size // 8 * 8
    shapes = {"jax": (K, blocks, size, H), TOKENS_FIRST: (blocks, size, K, H)}
    return shapes.get(kind, (blocks, K, size, H))


def fresh_pools(size, kind):
    """K and V of normals; pairs of (pool, scales) where a value takes one byte."""
    shape = pool_shape(size, kind)
    make = jax.jit(functools.partial(normal_pool, shape=shape))
    pools = [make(jax.random.key(i)) for i in (0, 1)]
    if kind not in NARROW:
        return pools
    times, scale = (40.0, 1 / 40) if kind == "int8" else (1.0, 1.0)
    cast = jax.jit(lambda x: (x * times).astype(kind), donate_argnums=0)
    return [(cast(x), jnp.full(shape[:3], scale, jnp.float32)) for x in pools]


def lower(program, rows, size, sds, kind):
    """`program` for rows of (context, new tokens), lowered."""
    r, m = len(rows), -(-max(n for n, _ in rows) // size)
    shape = pool_shape(size, kind)
    pool = sds(shape, jnp.bfloat16)
    if kind in NARROW:
        pool = sds(shape, jnp.dtype(kind)), sds(shape[:3], jnp.float32)
    i32 = lambda *s: sds(s, jnp.int32)
    q = sds((sum(n for _, n in rows), N, H), jnp.bfloat16)
    return program.lower(q, pool, pool, [i32(r, m)] * CALLS, i32(r), i32(r + 1))


def arguments(rows, size, pools):
    rng = np.random.default_rng(1)
    lens, new = zip(*rows, strict=True)
    tabs = [jnp.asarray(t) for t in tables(lens, size, POOL_TOKENS // size // 8 * 8, rng)]
    indptr = jnp.asarray(np.concatenate([[0], np.cumsum(new)]), jnp.int32)
    q = jax.random.normal(jax.random.key(3), (sum(new), N, H), jnp.bfloat16)
    return q, *pools, tabs, jnp.asarray(lens, jnp.int32), indptr


def cupti(compiled, args, calls=CALLS):
    """Microseconds of kernels per call, and the part of each kernel."""
    from jax.experimental.mosaic.gpu import profiler

    _, kernels = profiler.measure(compiled, aggregate=False)(*args)
    parts = {}
    for name, ms in kernels:
        name = re.sub(r"[^a-z_].*", "", name.replace("mosaic_gpu_", ""))[:24]
        parts[name] = parts.get(name, 0.0) + ms * 1e3 / calls
    return sum(parts.values()), parts


def operations(rows):
    """4 * N * H for every query and every key that it sees."""
    return sum(4 * N * H * (new * (n - new) + new * (new + 1) // 2) for n, new in rows)


def dense(rows_out):
    """Our dense flash attention over contiguous keys, at the operations of the chunks."""
    from pallas_kernels import flash_attention as fa

    for name in list(CHUNKS)[:2]:
        rows = CHUNKS[name]
        r, (n, new) = len(rows), rows[0]
        keys = [jax.random.key(i) for i in range(3)]
        make = lambda k, *s: jax.random.normal(k, s, jnp.bfloat16)
        q, k, v = make(keys[0], r, new, N, H), make(keys[1], r, n, K, H), make(keys[2], r, n, K, H)
        one = functools.partial(dense_call, band=fa.Band(right=0, offset=n - new))
        run = lambda q, k, v: jax.lax.fori_loop(0, CALLS, lambda _, q: one(q, k, v), q)
        try:
            us = seconds(jax.jit(run).lower(q, k, v).compile(), (q, k, v)) / CALLS * 1e6
        except Exception as e:
            say(name, "dense FAIL", type(e).__name__, str(e)[:300])
            continue
        rate = operations(rows) / us / 1e6
        say(f"{name:28s} dense     {us:8.2f} us {rate:6.1f} TFLOP/s")
        for size in (64, 16):
            rows_out.append(row(f"{name} block {size}", "dense flash", "rate", rate, "TFLOP/s"))


def write(rows, name):
    folder = pathlib.Path(os.environ.get("OUT") or ROOT / "bench" / "results" / "h200")
    folder.mkdir(parents=True, exist_ok=True)
    meta = dict(
        command=" ".join(["python bench/paged_attention.py", *sys.argv[1:]]),
        date=datetime.date.today().isoformat(),
        device=jax.devices()[0].device_kind,
        versions=dict(jax=jax.__version__),
    )
    (folder / f"{name}.json").write_text(json.dumps(dict(meta=meta, rows=rows), indent=1))


def dry_shapes():
    """`ShapeDtypeStruct` on an H200 that is not here."""
    from jax.experimental import topologies
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    target = (ROOT / "scripts" / "h200.txtpb").read_text()
    topo = topologies.get_topology_desc(platform="cuda", target_config=target, topology="1x1x1")
    sharding = NamedSharding(Mesh(np.array(topo.devices[:1]), ("x",)), PartitionSpec())
    return functools.partial(jax.ShapeDtypeStruct, sharding=sharding)
