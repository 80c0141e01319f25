"""What moves keys and values: the write into their slots, and swaps to the host and back.

python bench/paged_attention.py --sections write [--rows REGEX]
python bench/paged_attention.py --sections swap
"""

import itertools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from device_time import alone
from paged_common import CALLS, NARROW, H, K, N, copy_rate, cupti, row, say, write

from pallas_kernels import paged_attention as pa

WRITES = {"8k": 8192, "256": 256, "8": 8}
WRITE_KINDS = ("bf16", *NARROW)


def write_calls(kind, rotate):
    """name -> function (pools, k, v, q, cos, sin, slots) -> (pools, q): our kernel, and XLA's."""
    from aidx.ops.rope import apply_rope
    from aidx.ops.write_kv import write_kv as scatter

    scaled = kind in NARROW

    def kernel(pools, k, v, q, cos, sin, slots):
        if rotate:
            k, q = apply_rope(k, cos, sin), apply_rope(q, cos, sin)
        scales = dict(k_scale=pools[2], v_scale=pools[3]) if scaled else {}
        out = pa.write_kv(*pools[:2], k, v, slots, **scales)
        return tuple(x for x in out if x is not None), q

    def xla(pools, k, v, q, cos, sin, slots):
        if rotate:
            k, q = apply_rope(k, cos, sin), apply_rope(q, cos, sin)
        scales = dict(k_scale=pools[2], v_scale=pools[3]) if scaled else {}
        options = scales | dict(implementation="xla")
        return tuple(scatter(*pools[:2], k, v, slots, **options)), q

    return {"aidx": kernel, "xla": xla}


def write_arguments(tokens, kind, in_order):
    """(pools, [(k, v, q, cos, sin, slots)] of 4 sets, so that L2 does not hold what is read).

    Slots are drawn one by one, or `in_order`: the tokens of a prompt in blocks drawn one by one.
    """
    size, sets = 64, 4
    blocks = max(4 * tokens, 4096) // size * 4
    shape = (blocks, K, size, H)
    pools = [jnp.zeros(shape, jnp.bfloat16 if kind == "bf16" else kind) for _ in range(2)]
    if kind in NARROW:
        pools += [jnp.zeros(shape[:3], jnp.float32) for _ in range(2)]
    draw = np.random.default_rng(0).permutation
    slots = draw(blocks * size)
    if in_order:
        slots = (draw(blocks)[:, None] * size + np.arange(size)).reshape(-1)
    slots = slots.astype(np.int32)
    make = lambda i, *s: jax.random.normal(jax.random.key(i), s, jnp.bfloat16)
    out = []
    for i in range(sets):
        angles = jax.random.uniform(jax.random.key(i), (tokens, H // 2))
        k, v, q = make(i, tokens, K, H), make(i + 9, tokens, K, H), make(i + 18, tokens, N, H)
        place = jnp.asarray(slots[i * tokens : (i + 1) * tokens])
        out.append((k, v, q, jnp.cos(angles), jnp.sin(angles), place))
    return tuple(pools), out


def writes(rows_out, pattern):
    """Time of a write, with and without the rotation of q and k, beside the copy rate."""
    with alone():
        rate = copy_rate(jnp.ones((1 << 29,), jnp.bfloat16))
    say(f"copy {rate:.2f} TB/s")
    rows_out.append(row("copy", "device", "bandwidth", rate, "TB/s"))
    for kind, (name, tokens), in_order, rotate in itertools.product(
        WRITE_KINDS, WRITES.items(), (False, True), (False, True)
    ):
        case = f"write {name} {kind}" + " in order" * in_order + " rotated" * rotate
        if (in_order and (name != "8k" or rotate)) or not re.search(pattern, case):
            continue
        pools, sets = write_arguments(tokens, kind, in_order)
        calls = write_calls(kind, rotate)
        want = jax.jit(calls["xla"])(pools, *sets[0])
        for label, call in calls.items():
            try:
                differ = differing(jax.jit(call)(pools, *sets[0]), want)
                if differ > 0.01:
                    say(f"{case:32s} {label:7s} WRONG: {differ:.2%} of the values")
                    continue
                one_write(case, label, call, pools, sets, tokens, kind, rotate, rows_out)
            except Exception as e:
                say(case, label, "FAIL", type(e).__name__, str(e)[:300])
        write(rows_out, "paged_write")


@jax.jit
def differing(got, want):
    """Part of the values that differ by 1% or more, in the array where most do."""
    far = lambda a, b: (jnp.abs(a - b) > 1e-2 * jnp.abs(b)).mean()
    wide = lambda tree: [x.astype(jnp.float32) for x in jax.tree.leaves(tree)]
    return jnp.max(jnp.stack([far(*x) for x in zip(wide(got), wide(want), strict=True)]))


def one_write(case, label, call, pools, sets, tokens, kind, rotate, rows_out):
    def run(pools, sets):
        def rounds(_, pools):
            out = []
            for given in sets:
                pools, q = call(pools, *given)
                out.append(q)
            # the rotated queries have to be made, and may not be hoisted out of the loop
            return jax.lax.optimization_barrier((pools, out))[0]

        return jax.lax.fori_loop(0, CALLS // len(sets), rounds, pools)

    donated = jax.jit(run, donate_argnums=0).lower(pools, sets).compile()
    kept = jax.jit(run).lower(pools, sets).compile()
    state = jax.tree.map(jnp.copy, pools)

    def queue(n):
        nonlocal state
        t = time.perf_counter()
        for _ in range(n):
            state = donated(state, sets)
        jax.block_until_ready(state)
        return time.perf_counter() - t

    with alone():
        queue(2)
        one, many = (sorted(queue(n) for _ in range(5))[2] for n in (1, 9))
        us = (many - one) / 8 / CALLS * 1e6
        _, parts = cupti(kept, (pools, sets))
    parts = {k: v for k, v in parts.items() if "copy" not in k}
    value = 2 if kind == "bf16" else 1
    bytes_ = 2 * tokens * K * H * (2 + value) + (4 * tokens * N * H + 2 * tokens * H * 2) * rotate
    kernels = sum(parts.values())
    rate = bytes_ / kernels / 1e6
    text = " ".join(f"{a}={b:.2f}" for a, b in parts.items())
    say(f"{case:32s} {label:7s} {us:8.2f} us cupti {kernels:7.2f} us {rate:5.2f} TB/s {text}")
    rows_out.append(row(case, label, "time", us, "us"))
    rows_out.append(row(case, label, "kernel time", kernels, "us"))
    rows_out.append(row(case, label, "bandwidth", rate, "TB/s"))


def swaps(rows_out):
    """GB/s of 64 blocks of a model of 32 layers to the host and back, beside a copy of as much."""
    from aidx.cache import PagedKVCache, swap_in, swap_out

    cache = PagedKVCache.create(
        num_layers=32, num_blocks=256, block_size=64, num_kv_heads=K, head_dim=H
    )
    blocks = np.random.default_rng(0).permutation(256)[:64]
    bytes_ = cache.memory_bytes // 4

    def best(f, reset=lambda x: x):
        times = []
        for _ in range(6):
            t = time.perf_counter()
            out = jax.block_until_ready(f())
            times.append(time.perf_counter() - t)
            reset(out)
        return bytes_ / min(times[1:]) / 1e9

    x = jnp.ones((bytes_ // 2,), jnp.bfloat16)
    host = x.sharding.with_memory_kind("pinned_host")
    kept = jax.device_put(x, host)
    swapped = swap_out(cache, blocks)

    def back():
        nonlocal cache
        cache = swap_in(cache, swapped, blocks)
        return cache

    rates = {
        ("copy", "to the host"): best(lambda: jax.device_put(x, host)),
        ("copy", "from the host"): best(lambda: jax.device_put(kept, x.sharding)),
        ("aidx", "to the host"): best(lambda: swap_out(cache, blocks)),
        ("aidx", "from the host"): best(back),
    }
    for (name, way), rate in rates.items():
        say(f"swap {way:14s} {name:5s} {rate:6.1f} GB/s")
        rows_out.append(row(f"swap {way}", name, "rate", rate, "GB/s"))
