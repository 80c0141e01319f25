"""Stages of `bench/attention.py` for options: each is compared with what it should cost.

A stage is a list of `Case`s: programs that share their inputs, forward and forward + backward, and
the operations that their visible scores need.  Everything of aidx goes through the public door.
"""

import concurrent.futures
import dataclasses
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from aidx.ops.attention_mask import block_mask  # noqa: E402
from aidx.ops.flash_attention import flash_attention  # noqa: E402
from bench.device_time import alone, chained, seconds, shuffled  # noqa: E402
from pallas_kernels import flash_attention as fa  # noqa: E402
from tests.ops.cases import packed_lengths  # noqa: E402

SHARE = {"fwd": 1.0, "fwd+bwd": 3.5}
ROUNDS = 5


@dataclasses.dataclass(frozen=True)
class Case:
    """`programs[name](q, k, v) -> out` over one shape; `pairs`: visible scores of a head."""

    name: str
    shape: tuple[int, int, int, int, int]  # batch, tokens, heads, KV heads, head_dim
    pairs: float
    programs: dict[str, Callable[..., jax.Array]]
    metrics: tuple[str, ...] = ("fwd", "fwd+bwd")
    alike: bool = False  # the programs compute the same: each is compared with the first

    def operations(self, metric):
        """Floating-point operations of the visible scores."""
        batch, _, heads, _, head_dim = self.shape
        return 4 * batch * heads * self.pairs * head_dim * SHARE[metric]

    def calls(self, metric):
        """Calls of a program: about 20 ms of them, in which the clock settles at the power limit.

        In programs of 6 ms the same causal call ran at 654 TFLOP/s, of 20 ms at 626.
        """
        return int(np.clip(1e13 / self.operations(metric), 4, 100)) // 4 * 4


def inputs(shape):
    """q, k, v and the cotangent of out, bf16 normal."""
    batch, tokens, heads, kv_heads, head_dim = shape
    keys = jax.random.split(jax.random.key(0), 4)
    return [
        jax.random.normal(key, (batch, tokens, n, head_dim), jnp.bfloat16)
        for key, n in zip(keys, (heads, kv_heads, kv_heads, heads), strict=True)
    ]


def both(f):
    """(out, dq, dk, dv) of an attention function."""

    def run(q, k, v, d_out):
        out, pull = jax.vjp(f, q, k, v)
        return out, *pull(d_out)

    return run


def aidx(**options):
    """Our kernels through the door; what they cannot do is refused, not computed otherwise."""
    return functools.partial(flash_attention, implementation="mosaic_gpu", **options)


def compiled(case, workers):
    """{(metric, name): program, or the refusal as text}."""
    shapes, found, futures = jax.eval_shape(lambda: inputs(case.shape)), {}, {}
    refusals = (NotImplementedError, ExceptionGroup, ValueError, RuntimeError)
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for metric in case.metrics:
            for name, f in case.programs.items():
                program = f if metric == "fwd" else both(f)
                args = shapes[: 3 if metric == "fwd" else 4]
                jitted = jax.jit(chained(program, case.calls(metric)))
                try:
                    futures[metric, name] = pool.submit(jitted.lower(*args).compile)
                except refusals as refusal:
                    found[metric, name] = refusal
        for key, future in futures.items():
            try:
                found[key] = future.result()
            except refusals as refusal:
                found[key] = refusal
    return found


def compare(case, args, workers):
    """Prints how far every program of a case is from the first, relative RMS."""
    shapes, programs = jax.eval_shape(lambda: inputs(case.shape)), {}
    both_passes = "fwd+bwd" in case.metrics
    count = 4 if both_passes else 3
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        for name, f in case.programs.items():
            try:
                lowered = jax.jit(both(f) if both_passes else f).lower(*shapes[:count])
                programs[name] = pool.submit(lowered.compile)
            except (NotImplementedError, ExceptionGroup, ValueError):
                continue  # reported where it is timed
    want, worst = None, []
    distance = jax.jit(lambda a, b: jnp.linalg.norm((a - b).astype(jnp.float32).ravel()))
    programs = {name: future.result() for name, future in programs.items()}
    with alone():
        for name, program in programs.items():
            got = jax.tree.leaves(program(*args[:count]))
            want = want or got
            pairs = zip(got, want, strict=True)
            far = max(float(distance(a, b) / distance(b, 0 * b)) for a, b in pairs)
            worst.append(f"{name} {far:.1e}" + ("" if far < 1e-2 else " WRONG"))
    print(f"{case.name}: relative RMS from {next(iter(programs))}: {', '.join(worst)}", flush=True)


def measure(case, results, workers):
    """TFLOP/s of every program of a case, printed and kept: the median of `ROUNDS` turns."""
    args = inputs(case.shape)
    programs = compiled(case, workers)
    if case.alike:
        compare(case, args, workers)
    for metric in case.metrics:
        given = args[: 3 if metric == "fwd" else 4]
        times = {}
        for name in case.programs:
            program = programs[metric, name]
            if isinstance(program, Exception):
                reason = " ".join(str(program).split())[:120]
                print(f"  {case.name} {metric} {name}: {type(program).__name__} {reason}")
            else:
                times[name] = []
        with alone():
            for turn in range(ROUNDS):
                for name in shuffled(times, turn):
                    program = programs[metric, name]
                    times[name].append(seconds(program, given, case.calls(metric), repeats=1))
        line = []
        for name, taken in times.items():
            rate = case.operations(metric) / sorted(taken)[ROUNDS // 2] / 1e12
            results.add(case.name, name, metric, rate, "TFLOP/s")
            line.append(f"{name} {rate:.0f}")
        print(f"{case.name:24s} {metric:8s} {'  '.join(line)}", flush=True)
    results.write()


def tiles(band, cu=None, backward=None, forward=None):
    """Our kernels with changes of the tiles that they choose, the forward's and the backward's."""

    def call(q, k):
        lengths, bounds = (q.shape[1], k.shape[1]), None
        if cu is not None:
            bounds = fa.dynamic_bounds(band, *lengths, borders=(cu[None], cu[None]))
        return dict(band=band, bounds=bounds, scale=q.shape[-1] ** -0.5)

    def run(q, k, v):
        config = None if forward is None else fa.ForwardConfig(**forward)
        return fa.flash_attention_fwd(q, k, v, config=config, **call(q, k))

    @jax.custom_vjp
    def f(q, k, v):
        return run(q, k, v)[0]

    def save(q, k, v):
        out, lse = run(q, k, v)
        return out, (q, k, v, out, lse)

    def pull(saved, d_out):
        q, k = saved[:2]
        config = None if backward is None else fa.BackwardConfig(**backward)
        return fa.flash_attention_bwd(*saved, d_out, config=config, **call(q, k))[:3]

    f.defvjp(save, pull)
    return f


PERSISTENT, LATE = dict(persistent=True), dict(late_sum=True)
TIGHT, ROWS = dict(tight_masks=True), dict(row_major=True)
PACKED_FORWARD = {"base": dict(), "default": None, "as they lie": dict(**PERSISTENT, **TIGHT)}
PACKED_BACKWARD = {  # head_dim: tiles
    128: {"base": dict(), "default": None, "as they lie": TIGHT},
    64: {
        "base": dict(block_q=128),
        "default": None,
        "tight": dict(block_q=128, by_sequence=4, **TIGHT),
    },
}
WINDOW = dict(**PERSISTENT, **ROWS, **TIGHT, deal="zigzag back")
SLIDING = dict(block_kv=192, sliding_blocks=True, lazy_rescale=True)
WINDOW_FORWARD = {
    "base": PERSISTENT,
    "default": None,
    "128": dict(**WINDOW, **LATE),
    "128 lazy": dict(**WINDOW, lazy_rescale=True),
    "192": dict(**WINDOW, **SLIDING, o_in_ring=True),
    "192 late": dict(**WINDOW, **SLIDING, **LATE, o_in_ring=True),
    "192, one tile": dict(**ROWS, **TIGHT, **SLIDING),
}


# --- the cases -----------------------------------------------------------------------------------


def causal_pairs(tokens, window=None):
    """Visible pairs of a causal mask, with a window that counts the query's own key."""
    seen = np.arange(1, tokens + 1, dtype=np.float64)
    return float((seen if window is None else np.minimum(seen, window)).sum())


def cudnn_packed(lengths, tokens):
    """jax's cuDNN with packed sequences (its internal door: jax.nn has none)."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    borders = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    sizes, offsets = jnp.asarray(lengths)[None], jnp.asarray(borders)[None]

    def f(q, k, v):
        return cudnn.dot_product_attention(
            q, k, v, q_seqlen=sizes, kv_seqlen=sizes, q_offsets=offsets, kv_offsets=offsets,
            scale=q.shape[-1] ** -0.5, mask_type=cudnn.MaskType.PADDING_CAUSAL,
        )  # fmt: skip

    return f


def varlen_cases():
    """Packed causal sequences, and dense ones of the length that costs as much a token."""
    tokens = 16384
    lengths = packed_lengths(tokens)
    cu = jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)
    mean = float((lengths.astype(np.float64) ** 2).sum() / lengths.sum())
    mean = round(mean / 8) * 8  # other lengths are padded to a multiple of 8: a copy
    for name, heads, kv_heads, head_dim in (
        ("H128", 16, 16, 128), ("gqa", 32, 8, 128), ("H64", 32, 32, 64),
    ):  # fmt: skip
        yield Case(
            f"varlen {name}",
            (1, tokens, heads, kv_heads, head_dim),
            sum(causal_pairs(n) for n in lengths),
            {
                "aidx": aidx(causal=True, cu_seqlens=cu),
                "cudnn_jax": cudnn_packed(lengths, tokens),
            },
        )
        batch = tokens // mean
        yield Case(
            f"dense {mean} {name}",
            (batch, mean, heads, kv_heads, head_dim),
            causal_pairs(mean),
            {"aidx": aidx(causal=True), "cudnn_jax": cudnn(is_causal=True)},
        )


def packed_tile_cases():
    """Tiles of packed sequences, the order of the backward's, and dense sequences beside them."""
    tokens, causal = 16384, fa.Band(right=0)
    lengths = packed_lengths(tokens)
    cu = jnp.asarray(np.concatenate([[0], np.cumsum(lengths)]), jnp.int32)
    pairs = sum(causal_pairs(n) for n in lengths)
    dense = 1064
    for name, heads, kv_heads, head_dim in (
        ("gqa", 32, 8, 128), ("H128", 16, 16, 128), ("H64", 32, 32, 64),
    ):  # fmt: skip
        shape = (1, tokens, heads, kv_heads, head_dim)
        more = dict(consumers=3) if head_dim == 64 else {}
        table = {n: c if c is None else more | c for n, c in PACKED_FORWARD.items()}
        chosen = {n: tiles(causal, cu, forward=c) for n, c in table.items()}
        yield Case(f"packed {name}", shape, pairs, chosen, ("fwd",), alike=True)
        chosen = {n: tiles(causal, cu, c) for n, c in PACKED_BACKWARD[head_dim].items()}
        yield Case(f"packed {name} both", shape, pairs, chosen, ("fwd+bwd",), alike=True)
        shape = (tokens // dense, dense, heads, kv_heads, head_dim)
        yield Case(f"dense {name}", shape, causal_pairs(dense), {"door": aidx(causal=True)})


def window_tile_cases():
    """Tiles of a window of 1024."""
    tokens, band = 16384, fa.Band(left=1023, right=0)
    for name, heads, kv_heads in (("H128", 16, 16), ("gqa", 32, 8)):
        shape, pairs = (1, tokens, heads, kv_heads, 128), causal_pairs(tokens, 1024)
        chosen = {n: tiles(band, forward=c) for n, c in WINDOW_FORWARD.items()}
        yield Case(f"window {name}", shape, pairs, chosen, ("fwd",), alike=True)
        plain = {"aidx": aidx(causal=True)}
        yield Case(f"no window {name}", shape, causal_pairs(tokens), plain, ("fwd",))


def cudnn(**options):
    """jax.nn's cuDNN."""
    return functools.partial(jax.nn.dot_product_attention, implementation="cudnn", **options)


def window_cases():
    """A window of 1024 in 16384 tokens, beside the whole causal mask at its own rate."""
    for name, heads, kv_heads in (("H128", 16, 16), ("gqa", 32, 8)):
        shape, tokens = (1, 16384, heads, kv_heads, 128), 16384
        yield Case(
            f"window 1024 {name}",
            shape,
            causal_pairs(tokens, 1024),
            {
                "aidx": aidx(causal=True, window=1024),
                "cudnn_jax": cudnn(is_causal=True, local_window_size=(1023, 0)),
            },
        )
        yield Case(f"no window {name}", shape, causal_pairs(tokens), {"aidx": aidx(causal=True)})


SHAPES = {
    "H128": (4, 4096, 16, 16, 128),
    "H64": (4, 4096, 32, 32, 64),
    "H256": (4, 4096, 8, 8, 256),
    "gqa": (4, 4096, 32, 8, 128),
}


def deterministic_cases():
    """The backward whose bits repeat, beside the default."""
    for name, shape in SHAPES.items():
        programs = {
            "aidx": aidx(causal=True),
            "aidx:deterministic": aidx(causal=True, deterministic=True),
        }
        pairs = causal_pairs(shape[1])
        yield Case(f"deterministic {name}", shape, pairs, programs, ("fwd+bwd",))


def dropout_cases():
    """Dropout of 0.1 beside none."""
    key = jax.random.key(7)
    for name, shape in SHAPES.items():
        programs = {
            "aidx": aidx(causal=True),
            "aidx:dropout": aidx(causal=True, dropout_rate=0.1, dropout_key=key),
        }
        yield Case(f"dropout {name}", shape, causal_pairs(shape[1]), programs)


def mod_cases():
    """What a score_mod or mask_mod costs beside the option that is built in."""
    for name in ("H128", "H64"):
        shape = SHAPES[name]
        tokens, heads = shape[1], shape[2]
        pairs = causal_pairs(tokens)
        slopes = 2.0 ** -(jnp.arange(1, heads + 1) * 8.0 / heads)
        cap = lambda x, b, n, t, s: 30.0 * jnp.tanh(x / 30.0)
        alibi = lambda x, b, n, t, s: x - slopes[n] * jnp.abs(t - s)
        yield Case(
            f"soft cap {name}",
            shape,
            pairs,
            {
                "aidx": aidx(causal=True),
                "aidx:option": aidx(causal=True, logits_soft_cap=30.0),
                "aidx:score_mod": aidx(causal=True, score_mod=cap),
            },
        )
        yield Case(
            f"alibi {name}",
            shape,
            pairs,
            {
                "aidx:option": aidx(causal=True, alibi_slopes=slopes),
                "aidx:score_mod": aidx(causal=True, score_mod=alibi),
            },
        )
        ids = jnp.arange(tokens, dtype=jnp.int32) // 1000
        document = lambda b, n, t, s: ids[t] == ids[s]
        both_masks = lambda b, n, t, s: (ids[t] == ids[s]) & (s <= t)
        sizes = np.bincount(np.asarray(ids))
        blocks = block_mask(both_masks, tokens, tokens)
        yield Case(
            f"documents {name}",
            shape,
            sum(causal_pairs(n) for n in sizes),
            {
                "aidx:option": aidx(
                    causal=True, segment_ids=jnp.broadcast_to(ids, (shape[0], tokens))
                ),
                "aidx:block_mask": aidx(block_mask=blocks),
                "aidx:mask_mod": aidx(causal=True, mask_mod=document),
            },
        )
        table = jax.random.normal(jax.random.key(3), (1, heads, tokens, tokens), jnp.bfloat16)
        yield Case(
            f"bias {name}",
            shape,
            pairs,
            {"aidx": aidx(causal=True), "aidx:bias": aidx(causal=True, bias=table)},
        )


STAGES = {
    "varlen": varlen_cases,
    "window": window_cases,
    "packed_tiles": packed_tile_cases,
    "window_tiles": window_tile_cases,
    "deterministic": deterministic_cases,
    "dropout": dropout_cases,
    "mods": mod_cases,
}


def check_memory(results):
    """Peak of forward + backward over 131072 tokens of one head group; what XLA would need."""
    shape = (1, 131072, 4, 1, 128)
    xla = functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="xla")
    for name, f in (("aidx", aidx(causal=True)), ("xla_jax", xla)):
        try:
            shapes = jax.eval_shape(lambda: inputs(shape))
            program = jax.jit(both(f)).lower(*shapes).compile()
        except (RuntimeError, ValueError) as refusal:
            print(f"memory 131072 {name}: {' '.join(str(refusal).split())[:160]}", flush=True)
            continue
        need: Any = program.memory_analysis()
        planned = need.temp_size_in_bytes + need.output_size_in_bytes + need.argument_size_in_bytes
        results.add("memory 131072", name, "planned", planned / 2**30, "GiB")
        line = f"memory 131072 {name}: planned {planned / 2**30:.2f} GiB"
        if planned < 100 * 2**30:
            jax.block_until_ready(program(*inputs(shape)))
            peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
            results.add("memory 131072", name, "peak", peak / 2**30, "GiB")
            line += f", peak of the process {peak / 2**30:.2f} GiB"
        print(line, flush=True)
    results.write()
