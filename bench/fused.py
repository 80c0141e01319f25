"""Device time of the fused kernels beside XLA's fusions and tokamax, and beside a copy.

    python bench/fused.py [REGEX on the cases] [--variants] [--out FILE]

The time of a call is that of its kernels (CUPTI), the median over calls; what a kernel has to read
and write once, over that time, is compared with what a copy of the same size reaches in the same
run.  Every result is compared with float32 arithmetic first.
"""

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import pathlib
import re
import statistics

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from device_time import alone

from aidx.ops.norm import layer_norm, rms_norm
from aidx.ops.rope import apply_rope
from pallas_kernels.fused import config, gated, norm
from pallas_kernels.fused import cross_entropy as ce
from pallas_kernels.fused._vectors import Vectors
from pallas_kernels.fused.rope import rope

ROWS, CALLS, EPS = 8192, 8, 1e-6
DEFAULTS = {
    "rms_norm": config.NORM,
    "layer_norm": config.NORM,
    "rope": None,
    "gated": config.GATED,
    "cross_entropy": config.CROSS_ENTROPY,
}


def microseconds(compiled, args, skip=None):
    """Of the kernels of one call; those whose name matches `skip` are left out."""
    from jax.experimental.mosaic.gpu import profiler

    _, calls = profiler.measure(compiled, aggregate=False, iterations=CALLS)(*args)
    kept = lambda name: skip is None or not re.search(skip, name)
    total = lambda kernels: sum(ms for name, ms in kernels if kept(name)) * 1e3
    parts = [f"{re.sub(r'_[0-9]+$', '', name)[:24]} {ms * 1e3:.1f}" for name, ms in calls[-1]]
    return statistics.median(map(total, calls)), ", ".join(parts)


@functools.cache
def copying(traffic):
    """Microseconds of the faster of two copies that read and write `traffic` bytes together."""
    x = jnp.ones((max(traffic // 4 // 1024, 1), 1024), jnp.bfloat16)
    tile = Vectors.piece(x.dtype, None)

    def body(x_ref, y_ref):
        row = jax.lax.axis_index("row")
        tile.store(y_ref.at[row], tile.load(x_ref.at[row]))

    how = {"grid": (x.shape[0],), "grid_names": ("row",)}
    own = plgpu.kernel(body, out_type=jax.ShapeDtypeStruct(x.shape, x.dtype), **how)
    times = [microseconds(jax.jit(f).lower(x).compile(), (x,))[0] for f in (own, jnp.negative)]
    print(f"copy of {traffic} bytes: own {times[0]:.2f} us, XLA {times[1]:.2f} us", flush=True)
    return min(times)


def pulled(f, count):
    """`(operands, cotangent) -> cotangents of the operands`."""
    return lambda *args: jax.vjp(f, *args[:count])[1](args[count])


def norms(rows, width, biased):
    """(case, bytes, {label: function}, operands) of RMSNorm or LayerNorm."""
    key = jax.random.split(jax.random.key(0), 6)
    x, r, dy, dh = (jax.random.normal(k, (rows, width), jnp.bfloat16) for k in key[:4])
    scale, bias = (jax.random.normal(k, (width,), jnp.bfloat16) for k in key[4:])
    name, plain = ("layer_norm", layer_norm) if biased else ("rms_norm", rms_norm)
    extra = (bias,) if biased else ()
    options = dict(eps=EPS, centred=biased)
    forward = lambda c: lambda x, s, *b: norm.norm(x, s, *b, **options, config=c)[0]

    def added(c):
        def call(x, r, s, *b):
            return norm.norm(x, s, *(b or (None,)), r, **options, config=c)

        return call

    def back(c):
        def call(x, s, *rest):
            found = norm.norm_backward(x, s, rest[-1], **options, biased=biased, config=c)
            dx, *others = found[: 2 + biased]
            return dx, *(g.astype(s.dtype) for g in others)

        return call

    def back_added(c):
        def call(h, s, *rest):
            found = norm.norm_backward(h, s, *rest[-2:], **options, biased=biased, config=c)
            dx, *others = found[: 2 + biased]
            return dx, *(g.astype(s.dtype) for g in others)

        return call

    def plain_added(x, r, s, *b):
        h = x + r
        return plain(h, s, *b, eps=EPS), h

    def plain_back_added(h, s, *rest):
        dh, *others = pulled(functools.partial(plain, eps=EPS), 2 + biased)(h, s, *rest[:-1])
        return dh + rest[-1], *others

    peers = {}
    if importlib.util.find_spec("tokamax"):
        import tokamax

        def toka(x, s, b=None):
            return tokamax.layer_norm(x, s, b, epsilon=EPS, subtract_mean=biased)

        peers = {"forward": toka, "backward": pulled(toka, 2 + biased)}
    fwd = {f"ctas={n}": norm.NormConfig(ctas=n) for n in (16,)}
    tried = {1024: [(8, 2)], 4096: [(3, 3), (4, 1), (4, 2)], 8192: [(2, 2), (3, 1)]}
    bwd = {f"wg={w} stages={n}": norm.NormConfig(0, w, n) for w, n in tried.get(width, [])}
    size, case = x.nbytes, f"{name} [{rows}, {width}]"
    p = functools.partial(plain, eps=EPS)
    yield (
        f"{case} forward",
        2 * size,
        forward,
        fwd,
        {"xla": p, **_only(peers, "forward")},
        (
            x,
            scale,
            *extra,
        ),
    )
    yield (
        f"{case} residual forward",
        4 * size,
        added,
        fwd,
        {"xla": plain_added},
        (
            x,
            r,
            scale,
            *extra,
        ),
    )
    yield (
        f"{case} backward",
        3 * size,
        back,
        bwd,
        {"xla": pulled(p, 2 + biased), **_only(peers, "backward")},
        (x, scale, *extra, dy),
    )
    yield (
        f"{case} residual backward",
        4 * size,
        back_added,
        bwd,
        {"xla": plain_back_added},
        (x, scale, *extra, dy, dh),
    )


def _only(peers, direction):
    return {"tokamax": peers[direction]} if direction in peers else {}


def gates(rows, width):
    """SwiGLU and GEGLU of a packed projection."""
    x = jax.random.normal(jax.random.key(0), (rows, 2, width), jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(1), (rows, width), jnp.bfloat16)
    acts = {"silu": jax.nn.silu, "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True)}
    configs = {f"vectors={n}": gated.GatedConfig(n) for n in (2,)}
    for name, act in acts.items():

        def plain(x, act=act):
            # Split: its gradient is one concatenation, that of slices pads twice and adds.
            gate, up = (half[:, 0].astype(jnp.float32) for half in jnp.split(x, 2, axis=1))
            return (act(gate) * up).astype(x.dtype)

        own = lambda c, name=name: functools.partial(gated.gated, activation=name, config=c)
        back = lambda c, name=name: functools.partial(
            gated.gated_backward, activation=name, config=c
        )
        case = f"gated {name} [{rows}, 2, {width}]"
        yield f"{case} forward", 3 * dy.nbytes, own, configs, {"xla": plain}, (x,)
        peers = {"xla": lambda x, dy, f=plain: jax.vjp(f, x)[1](dy)[0]}
        yield f"{case} backward", 5 * dy.nbytes, back, configs, peers, (x, dy)


def rotations(rows, heads, width):
    """Rotary embedding of the queries of `rows` tokens."""
    x = jax.random.normal(jax.random.key(0), (rows, heads, width), jnp.bfloat16)
    angles = jax.random.uniform(jax.random.key(1), (rows, width // 2)) * 6
    args = x, jnp.cos(angles), jnp.sin(angles)
    case = f"rope [{rows}, {heads}, {width}]"
    traffic = 2 * x.nbytes + 2 * angles.nbytes
    yield f"{case} forward", traffic, lambda c: rope, {}, {"xla": apply_rope}, args


def losses(rows, vocabulary):
    """Softmax cross-entropy of logits."""
    x = jax.random.normal(jax.random.key(0), (rows, vocabulary), jnp.bfloat16)
    targets = jax.random.randint(jax.random.key(1), (rows,), 0, vocabulary)
    weights = jax.random.uniform(jax.random.key(2), (rows,))
    case = f"cross_entropy [{rows}, {vocabulary}]"

    def loss(lse, target):
        return lse - target, lse

    def plain(x, targets):
        x = x.astype(jnp.float32)
        lse = jax.nn.logsumexp(x, axis=-1)
        return loss(lse, jnp.take_along_axis(x, targets[:, None], -1)[:, 0])

    def plain_back(x, targets, lse, weights):
        d = jnp.exp(x.astype(jnp.float32) - lse[:, None])
        d = d - (jnp.arange(vocabulary, dtype=jnp.int32)[None] == targets[:, None])
        return (weights[:, None] * d).astype(x.dtype)

    own = lambda c: lambda x, t: loss(*ce.log_normaliser(x, t, config=c)[:2])
    back = lambda c: lambda x, t, lse, w: ce.cross_entropy_backward(x, t, lse, w, w, config=c)
    configs = {
        f"ctas={n} vectors={v}": ce.CrossEntropyConfig(ctas=n, vectors=v)
        for n, v in ((0, 4), (0, 6))
    }
    yield f"{case} forward", x.nbytes, own, configs, {"xla": plain}, (x, targets)
    lse = jax.jit(plain)(x, targets)[1]
    configs = {
        f"ctas={n} vectors={v}": ce.CrossEntropyConfig(backward_ctas=n, backward_vectors=v)
        for n, v in ((0, 8), (0, 6))
    }
    args = x, targets, lse, weights
    yield f"{case} backward", 2 * x.nbytes, back, configs, {"xla": plain_back}, args


def jobs(sizes):
    """(case, bytes, function of a config, configs, peers, operands) of everything."""
    rows, width, ffn, vocabulary = sizes
    for biased in (False, True):
        yield from norms(rows, width, biased)
    yield from rotations(rows, 32 * width // 4096, 128)
    yield from gates(rows, ffn)
    yield from losses(rows, vocabulary)
    for few in (1, 64, 512):
        yield from list(norms(few, width, False))[:2]
    yield from norms(rows, 2 * width, False)
    yield from norms(rows * 4, width // 4, False)


def error(got, want):
    """The largest `|got - want| / (1 + |want|)` of any output."""
    far = 0.0
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        far = max(far, float(_distance(a, b)))
    return far


@jax.jit
def _distance(a, b):
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.max(jnp.abs(a - b) / (1 + jnp.abs(b)))


def measured(job, variants, say):
    """Rows of the table for one case."""
    case, traffic, own, configs, peers, args = job
    in_place = "cross_entropy" in case and "backward" in case
    with alone():
        copy = copying(traffic)
    rate = lambda us: traffic / us / 1e6
    say(case, "copy", rate(copy), "TB/s", "")
    want = jax.jit(peers["xla"])(*args)
    chosen = {"": DEFAULTS[case.split()[0]]} | (configs if variants else {})
    calls = {f"aidx {label}".strip(): own(c) for label, c in chosen.items()} | peers
    for label, f in calls.items():
        skip = "copy" if in_place and label.startswith("aidx") else None
        try:
            compiled = jax.jit(f).lower(*args).compile()
            with alone():
                far = error(compiled(*args), want)
                us, parts = microseconds(compiled, args, skip)
        except Exception as problem:  # a peer that fails is a row too
            print(f"{case} {label}: {type(problem).__name__} {str(problem)[:150]}", flush=True)
            continue
        say(case, label, us, "us", f"{rate(us):.2f} TB/s {copy / us:4.0%} err {far:.1e} {parts}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pattern", nargs="?", default=".")
    parser.add_argument("--variants", action="store_true", help="all configurations")
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    parser.add_argument("--out", type=pathlib.Path, help="write JSON here (default: print only)")
    options = parser.parse_args()
    pattern = "" if options.pattern == "." else f" '{options.pattern}'"
    command = f"python bench/fused.py{pattern}{' --variants' * options.variants}"
    command += " --tiny" * options.tiny
    rows = []

    def say(case, label, value, unit, text):
        metric = {"us": "device_time", "TB/s": "bandwidth"}[unit]
        rows.append((case, label, metric, round(value, 3), unit))
        print(f"{case:42s} {label:22s} {value:8.2f} {unit:4s} {text[:130]}", flush=True)

    sizes = (256, 1024, 1024, 8192) if options.tiny else (ROWS, 4096, 14336, 128256)
    for job in jobs(sizes):
        if re.search(options.pattern, job[0]):
            measured(job, options.variants, say)
            if options.out:
                options.out.parent.mkdir(parents=True, exist_ok=True)
                options.out.write_text(json.dumps(table(rows, command), indent=1) + "\n")


def table(rows, command):
    """What is kept of a run."""
    meta = {
        "command": command,
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "versions": {p: importlib.metadata.version(p) for p in ("jax", "tokamax") if _installed(p)},
    }
    keys = ("case", "implementation", "metric", "value", "unit")
    return {"meta": meta, "rows": [dict(zip(keys, row, strict=True)) for row in rows]}


def _installed(package):
    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    main()
