"""Paged attention on one GPU: aidx beside JAX's own op, device time inside one program.

    python bench/paged_attention.py [--sections large,small,chunk,narrow,cascade,layout,fixed,peer]
        [--variants] [--limit S] [--rows REGEX] [--dry]
    python bench/paged_attention.py --sections check [--rows REGEX]
    python bench/paged_attention.py --sections write [--rows REGEX]
    python bench/paged_attention.py --sections swap
    python bench/paged_attention.py --sections duel [--rows REGEX]

check   outputs of ragged mixes against a dense f32 reference; every slot that no sequence owns
        holds NaN, tables are padded with ids outside the pool, five runs have to be bitwise equal
large   TB/s of K and V over pools of 4.3 GB, tables shuffled, blocks of 16 and 64; 64 calls chained
        through q inside one program, the combine and the work list included
small   rows that last microseconds: CUPTI sum of kernel durations per call
chunk   chunked prefill and a mixed call, TFLOP/s, beside dense flash attention
narrow  rows of `large` over int8 and float8_e4m3fn pools with scales: also tokens of context per us
cascade decodes that share a prefix, with and without telling the kernel
layout  rows of `large` over pools whose tokens come first, as a contiguous cache lies
fixed   rows of `large` in the deterministic mode, and its bits: rows alone, among others, in chunks
swap    (alone) blocks to pinned host memory and back, beside a plain copy over the same bus
write   (alone) new keys and values into their slots by one kernel and by XLA, the latter's queries
        and keys rotated by a fusion of their own
duel    (alone) variants in turns, each checked before its time counts: `paged_duel.py`
gaps    (alone) rows of `large` in programs of 16 and of 64 calls in turns, before anything else has
        run: what a call takes inside a program is the difference of the two over 48
peer    the rows of `large` by JAX's own op (deprecated)
`--variants` times other configurations too; `--dry` compiles everything for sm_90a without a GPU.
Writes bench/results/<device>/paged_attention.json, or into $OUT where that is set.  Several
processes may compile beside one another and time in turns: AIDX_BENCH_LOCK, see `device_time.py`.
"""

import argparse
import concurrent.futures
import functools
import os
import re
import time

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
import numpy as np
import paged_checks
import paged_duel
import paged_memory
from device_time import alone
from paged_common import (
    CALLS,
    CHUNKS,
    LARGE,
    NARROW,
    T0,
    TOKENS_FIRST,
    H,
    K,
    N,
    aidx_call,
    arguments,
    copy_rate,
    cupti,
    decode,
    dense,
    dry_shapes,
    fresh_pools,
    lower,
    narrow_call,
    operations,
    row,
    say,
    seconds,
    tables,
    write,
)

from pallas_kernels import paged_attention as pa

S, C, P = pa.SplitConfig, pa.ClusterConfig, pa.PrefillConfig
SMALL = {"1x1k": [1024], "1x4k": [4096], "1x32k": [32768], "8x4k": [4096] * 8}
LARGE_VARIANTS = {"c132t128": S(ctas=132, stages=3, key_tile=128)}
# one program after another leaves the device idle for some 10 us: a program of few calls shows it
PASSES = {"large": 4, "narrow": 4, "peer": 4}
SMALL_BLOCKS = ("large", "small", "chunk", "narrow", "peer")  # sections that blocks of 16 matter to
NARROW_ROWS = ("64x4k", "256x4k", "16x32k")
# rows of (tokens of the prefix that they share, context lengths)
CASCADE = {
    "64x(2k+512)": (2048, [2560] * 64),
    "256x(2k+256)": (2048, [2304] * 256),
    "32x(8k+256)": (8192, [8448] * 32),
    "8x(32k+256)": (32768, [33024] * 8),
    "128x(1k+256)": (1024, [1280] * 128),
    "128x(2k+256)": (2048, [2304] * 128),
}
LAYOUT_ROWS = ("64x4k", "256x1k", "16x32k")
FIXED_ROWS = ("64x1k", "64x4k", "16x32k")
SMALL_VARIANTS = {
    "k4w2": C(4, 2, 3),
    "split": S(ctas=264, stages=3),
}
CHUNK_VARIANTS = {"kv64s4": P(2, 64, 4), "kv64s3": P(2, 64, 3), "kv192s1": P(2, 192, 1)}


def shared_call(shared, cascade):
    """All rows begin with the blocks of the first row's prefix; read it once, or by every row."""

    def call(q, k, v, table, lens, indptr):
        blocks = shared // k.shape[2]
        prefix = table[:1, :blocks]
        table = table.at[:, :blocks].set(prefix)
        group = jnp.zeros(lens.shape, jnp.int32)
        given = (prefix, jnp.full((1,), shared, jnp.int32), group) if cascade else None
        return pa.paged_attention(q, k, v, table, lens, indptr, max_q=1, cascade=given)

    return call


def jax_call(q, k, v, table, lens, indptr):
    """JAX's own op: deprecated, Triton, pools as `[K, P, block_size, H]`."""
    from jax.experimental.pallas.ops.gpu import paged_attention as op

    return op.paged_attention(q, k, v, jnp.minimum(table, k.shape[1] - 1), lens)


def program(call, passes):
    """CALLS calls a pass, each reading the output of the one before, through tables of its own."""
    one = jax.jit(call)

    def run(q, k, v, tabs, lens, indptr):
        for t in tabs * passes:
            q = one(q, k, v, t, lens, indptr)
        return q

    return jax.jit(run)


def jobs_of(sections, variants, pattern):
    """(section, case, rows, label, call, kind of pools) in the order of running."""
    for name, rows in CHUNKS.items() if "chunk" in sections else ():
        yield "chunk", name, rows, "aidx", aidx_call(None, 512), "bf16"
        for kind in NARROW if len(rows) < 9 else ():
            yield "chunk", f"{name} {kind}", rows, "aidx", narrow_call(None, 512), kind
        for label, config in CHUNK_VARIANTS.items() if variants and len(rows) < 9 else ():
            yield "chunk", name, rows, label, aidx_call(config, 512), "bf16"
    for section, shapes, configs in (
        ("large", LARGE, LARGE_VARIANTS),
        ("small", SMALL, SMALL_VARIANTS),
    ):
        for name, lens in shapes.items() if section in sections else ():
            yield section, name, decode(lens), "aidx", aidx_call(None), "bf16"
            for label, config in configs.items() if variants else ():
                yield section, name, decode(lens), label, aidx_call(config), "bf16"
    for name, (shared, lens) in CASCADE.items() if "cascade" in sections else ():
        yield "cascade", name, decode(lens), "aidx", shared_call(shared, True), "bf16"
        yield "cascade", name, decode(lens), "aidx, alone", shared_call(shared, False), "bf16"
    for name in FIXED_ROWS if "fixed" in sections else ():
        call = aidx_call(None, deterministic=True)
        yield "fixed", f"{name} deterministic", decode(LARGE[name]), "aidx", call, "bf16"
    for name in LAYOUT_ROWS if "layout" in sections else ():
        call = aidx_call(None, tokens_first=True)
        yield "layout", f"{name} tokens first", decode(LARGE[name]), "aidx", call, TOKENS_FIRST
    for kind in NARROW if "narrow" in sections else ():
        for name in NARROW_ROWS:
            case, rows = f"{name} {kind}", decode(LARGE[name])
            yield "narrow", case, rows, "aidx", narrow_call(None), kind
    for name, lens in LARGE.items() if "peer" in sections else ():
        yield "peer", name, decode(lens), "jax", jax_call, "jax"


def lower_all(sections, variants, pattern, limit, sds):
    """Compiles in threads while the next program is lowered: (block size, job, future)."""
    threads, out = concurrent.futures.ThreadPoolExecutor(8), []
    for size in (64, 16):
        for job in jobs_of(sections, variants, pattern):
            section, name, rows, label, call, kind = job
            small = section in SMALL_BLOCKS and label in ("aidx", "jax")
            if not re.search(pattern, name) or (size == 16 and not small):
                continue
            if time.time() - T0 > limit:
                say("lowering cut short at", size, name, label)
                return out
            try:
                lowered = lower(program(call, PASSES.get(section, 1)), rows, size, sds, kind)
                out.append((size, job, threads.submit(lowered.compile)))
            except Exception as e:
                say(size, name, label, "LOWER FAIL", type(e).__name__, str(e)[:300])
    return out


def timed(sections, variants, pattern, limit, sds, dry, rows_out):
    """Times of all rows, then their kernels by CUPTI, which may slow what is launched later."""
    jobs = lower_all(sections, variants, pattern, limit - 20, sds)
    say(f"{len(jobs)} programs lowered")
    in_turns(jobs, limit, dry, measure_row, rows_out)
    if "chunk" in sections and not dry:
        with alone():
            dense(rows_out)
    if not dry:
        profiled = [j for j in jobs if j[1][0] not in ("chunk", "peer")]
        in_turns(profiled, limit, dry, kernel_row, rows_out)
    if "fixed" in sections and not dry:
        fixed_bits(rows_out)


def in_turns(jobs, limit, dry, measure, rows_out):
    """`measure` of every program, with the pools and tables that it wants."""
    pools = last = layout = None
    for size, (section, name, rows, label, _, kind), future in jobs:
        if time.time() - T0 > limit:
            say("out of time")
            return
        try:
            compiled = future.result()
            if dry:
                continue
            with alone():
                if layout != (size, kind):
                    layout, pools, last = (size, kind), None, None
                    pools = fresh_pools(size, kind)
                    if kind == "bf16" and measure is measure_row:
                        rate = copy_rate(pools[0])
                        say(f"copy {rate:.2f} TB/s")
                        rows_out.append(
                            row(f"copy block {size}", "device", "bandwidth", rate, "TB/s")
                        )
                if last != (name, layout):
                    last, args = (name, layout), arguments(rows, size, pools)
                measure(section, f"{name} block {size}", label, rows, compiled, args, rows_out)
                write(rows_out, "paged_attention")  # a cut run keeps its rows
        except Exception as e:
            say(size, name, label, "FAIL", type(e).__name__, str(e)[:300])


def measure_row(section, case, label, rows, compiled, args, rows_out):
    calls = CALLS * PASSES.get(section, 1)
    us = sorted(seconds(compiled, args) for _ in range(3))[1] / calls * 1e6
    if section == "chunk":
        rate = operations(rows) / us / 1e6
        say(f"{case:28s} {label:9s} {us:8.2f} us {rate:6.1f} TFLOP/s")
        rows_out.append(row(case, label, "time", us, "us"))
        rows_out.append(row(case, label, "rate", rate, "TFLOP/s"))
        return
    tokens = sum(n for n, _ in rows)
    bytes_ = (H + 4) * 2 if section == "narrow" else H * 4  # a scale takes 4
    rate = tokens * K * bytes_ / us / 1e6
    rows_out.append(row(case, label, "context", tokens / us, "tokens/us"))
    say(f"{case:26s} {label:11s} {us:8.2f} us {rate:5.2f} TB/s {tokens / us:7.1f} tok/us")
    if section != "cascade":  # bytes that are read once for all rows are no bandwidth
        rows_out.append(row(case, label, "bandwidth", rate, "TB/s"))


def gaps(pattern, limit, sds, dry, rows_out):
    """Time between the calls of a program: programs of one pass and of four, five turns each."""
    names = [name for name in LARGE if re.search(pattern, name)]
    compiled = {
        (name, passes): lower(
            program(aidx_call(None), passes), decode(LARGE[name]), 64, sds, "bf16"
        ).compile()
        for name in names
        for passes in (1, 4)
    }
    if dry:
        return
    pools = fresh_pools(64, "bf16")
    for name in names:
        if time.time() - T0 > limit:
            say("out of time")
            return
        args = arguments(decode(LARGE[name]), 64, pools)
        times = {1: [], 4: []}
        for _ in range(5):
            for passes, taken in times.items():
                taken.append(seconds(compiled[name, passes], args) * 1e6)
        short, long = (sorted(taken)[2] for taken in times.values())
        us = (long - short) / (3 * CALLS)
        rate = sum(LARGE[name]) * K * H * 4 / us / 1e6
        per_call = f"{short / CALLS:.2f} us a call of 16, {long / CALLS / 4:.2f} of 64"
        say(f"{name:12s} {per_call}, {us:.2f} inside: {rate:.2f} TB/s")
        rows_out.append(row(f"{name} block 64", "aidx", "time inside a program", us, "us"))
        rows_out.append(row(f"{name} block 64", "aidx", "bandwidth inside a program", rate, "TB/s"))


def kernel_row(section, case, label, rows, compiled, args, rows_out):
    kernels, parts = cupti(compiled, args, CALLS * PASSES.get(section, 1))
    parts = " ".join(f"{a}={b:.2f}" for a, b in parts.items())
    say(f"{case:26s} {label:11s} cupti {kernels:.2f} us {parts}")
    rows_out.append(row(case, label, "kernel time", kernels, "us"))


def fixed_bits(rows_out):
    """The deterministic mode: a prompt of 700 tokens in chunks, alone and beside other rows."""
    rng = np.random.default_rng(5)
    size, total, others = 64, 700, [(3000, 1), (90, 5), (1500, 300)]
    table = jnp.asarray(tables([total] + [n for n, _ in others], size, 200, rng, sets=1)[0])
    pools = [jax.random.normal(jax.random.key(i), (200, K, size, H), jnp.bfloat16) for i in (0, 1)]
    q = jax.random.normal(jax.random.key(2), (total, N, H), jnp.bfloat16)
    more = jax.random.normal(jax.random.key(3), (sum(n for _, n in others), N, H), jnp.bfloat16)

    def attend(begin, end, beside):
        queries, rows = [q[begin:end]], [(end, end - begin)]
        if beside:
            queries, rows = [more, *queries], [*others, *rows]
        lens, new = zip(*rows, strict=True)
        own = jnp.concatenate([table[1:], table[:1]]) if beside else table[:1]
        indptr = jnp.asarray(np.concatenate([[0], np.cumsum(new)]), jnp.int32)
        f = functools.partial(pa.paged_attention, max_q=512, deterministic=True)
        out = jax.jit(f)(
            jnp.concatenate(queries), *pools, own, jnp.asarray(lens, jnp.int32), indptr
        )
        return np.asarray(out[-(end - begin) :], np.float32)

    whole = np.concatenate([attend(0, 350, False), attend(350, 700, False)])
    found = {
        "other chunks": np.concatenate(
            [attend(a, b, False) for a, b in ((0, 100), (100, 227), (227, 699), (699, 700))]
        ),
        "beside others": np.concatenate([attend(a, b, True) for a, b in ((0, 350), (350, 700))]),
    }
    for name, out in found.items():
        differ = int((out != whole).sum())
        say(f"deterministic, {name}: {differ} of {whole.size} values differ")
        rows_out.append(
            row(f"deterministic, {name}", "aidx", "values that differ", differ, "values")
        )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sections", default="large,small,chunk,peer")
    parser.add_argument("--rows", default="")
    parser.add_argument("--variants", action="store_true")
    parser.add_argument("--limit", type=float, default=170)
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    sections, rows = args.sections.split(","), []
    if not args.dry:
        say("jax", jax.__version__, jax.devices()[0].device_kind)
    if sections == ["check"]:
        paged_checks.check(rows, args.rows)
        write(rows, "paged_attention_check")
    elif sections == ["write"]:
        paged_memory.writes(rows, args.rows)
        write(rows, "paged_write")
    elif sections == ["swap"]:
        paged_memory.swaps(rows)
        write(rows, "swap")
    elif sections == ["gaps"]:
        sds = dry_shapes() if args.dry else jax.ShapeDtypeStruct
        gaps(args.rows, args.limit, sds, args.dry, rows)
        if not args.dry:
            write(rows, "paged_gaps")
    elif sections == ["duel"]:
        sds = dry_shapes() if args.dry else jax.ShapeDtypeStruct
        paged_duel.run(args.rows, args.limit, sds, args.dry, rows)
    else:
        sds = dry_shapes() if args.dry else jax.ShapeDtypeStruct
        timed(sections, args.variants, args.rows, args.limit, sds, args.dry, rows)
        if not args.dry:
            write(rows, "paged_attention")
    say("done")


if __name__ == "__main__":
    main()
