"""`aidx info`: devices, versions, and which implementation each op takes and why."""

import argparse
import importlib.metadata
import json
import platform
from typing import Any

PACKAGES = ("aidx", "jax", "jaxlib", "jax-cuda13-plugin", "numpy", "flax", "safetensors",
            "tokenizers", "huggingface_hub", "optax", "fastapi")  # fmt: skip


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "info",
        help="devices, versions, and what each op runs on",
        description="Show the devices and versions, and for typical shapes which implementation "
        "each op takes here and why the others were passed over.",
        epilog="examples:\n  aidx info\n  aidx info --json\n  aidx info --head-dim 64 --kv-heads 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object, for programs")
    parser.add_argument("--heads", type=int, default=32, help="query heads of the shapes")
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default=None, help="default: bfloat16, float32 on a CPU")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print it all."""
    found = gather(args.heads, args.kv_heads, args.head_dim, args.dtype)
    if args.json:
        print(json.dumps(found, indent=1))
        return 0
    import rich.console
    from rich.table import Table

    console = rich.console.Console()
    print(f"python {found['python']} on {found['machine']}")
    print(", ".join(f"{name} {version}" for name, version in found["packages"].items()))
    for device in found["devices"]:
        memory = f", {device['memory_gib']:.1f} GiB" if device["memory_gib"] else ""
        print(f"device {device['id']}: {device['kind']} ({device['platform']}{memory})")
    table = Table(title="implementations, in order of preference")
    for column in ("op", "case", "implementation", "taken", "why not, or how"):
        table.add_column(column, overflow="fold")
    for line in found["ops"]:
        how = "; ".join(line["configs"])
        reason = line["reason"] or (how if line["chosen"] else "an earlier one can do it")
        table.add_row(
            line["op"], line["case"], line["name"], "yes" if line["chosen"] else "", reason
        )
    console.print(table)
    for kernel in found["custom_kernels"]:
        entries = ", ".join(
            f"{e['name']} ({', '.join(e['platforms'])})" if e["platforms"] else e["name"]
            for e in kernel["implementations"]
        )
        tuned = f"; tuned: {', '.join(kernel['tuned'])}" if kernel["tuned"] else ""
        print(f"kernel {kernel['name']}: {entries}{tuned}")
    tuning = found["tuning"]
    print(f"tuning: mode {tuning['mode']}, {tuning['shipped']} shapes shipped for this device, "
          f"disk cache {tuning['cache'] or 'off'}")  # fmt: skip
    return 0


def gather(heads: int, kv_heads: int, head_dim: int, dtype: str | None) -> dict[str, Any]:
    """Everything `aidx info` knows, as plain data."""
    import jax
    import jax.numpy as jnp

    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"--heads {heads} must be a multiple of --kv-heads {kv_heads}")
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    shape = (heads, kv_heads, head_dim, jnp.dtype(dtype))
    cases = {
        ("flash_attention", "training, causal 4096"): explain_flash(*shape),
        ("paged_attention", "prefill, 4 x 512 at 2048"): explain_paged_shape(*shape, 4, 512),
        ("paged_attention", "decode, 64 x 1 at 2048"): explain_paged_shape(*shape, 64, 1),
    }
    return {
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "packages": {name: v for name in PACKAGES if (v := version(name))},
        "devices": [
            {
                "id": d.id,
                "kind": d.device_kind,
                "platform": d.platform,
                "memory_gib": memory_gib(d),
            }
            for d in jax.local_devices()
        ],
        "ops": [
            {
                **{"op": op, "case": case, "name": e.name, "chosen": e.chosen, "reason": e.reason},
                "configs": [str(choice) for choice in e.configs],
            }
            for (op, case), lines in cases.items()
            for e in lines
        ],
        "custom_kernels": custom_kernels(),
        "tuning": tuning(),
    }


def custom_kernels() -> list[dict[str, Any]]:
    """The kernels that are registered here, those that installed packages offer among them.

    >>> isinstance(custom_kernels(), list)
    True
    """
    from aidx.ops import autotune, registry
    from aidx.ops.autotune.tunable import load

    load(["aidx.kernels.fused", "aidx.kernels.installed"])  # for what they register
    tuned = [tunable.name for tunable in autotune.tunables()]
    return [
        {
            "name": op,
            "implementations": [
                {"name": entry.name, "platforms": list(entry.platforms)}
                for entry in registry.implementations(op)
            ],
            "tuned": [name for name in tuned if name.split("/")[0] == op],
        }
        for op in registry.custom_ops()
    ]


def tuning() -> dict[str, Any]:
    """What the tuner may do, and how many shapes are known for the first device."""
    import jax

    from aidx.ops import autotune
    from aidx.ops.autotune.store import shipped

    kind = jax.local_devices()[0].device_kind
    settings = autotune.settings()
    known = sum(entry.device == kind for entry in shipped().entries)
    return {"mode": settings.mode, "cache": settings.cache, "shipped": known}


def version(package: str) -> str | None:
    """The installed version of a distribution, None where it is absent.

    >>> version("no-such-package") is None
    True
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def memory_gib(device: Any) -> float | None:
    """What JAX may allocate on a device, None where it does not say."""
    limit = (device.memory_stats() or {}).get("bytes_limit")
    return None if limit is None else limit / 2**30


def explain_flash(heads: int, kv_heads: int, head_dim: int, dtype: Any) -> tuple[Any, ...]:
    """What a causal training call of flash attention takes."""
    import jax

    import aidx.ops.flash_attention  # noqa: F401 - registers the implementations
    from aidx.ops.registry import explain

    q = jax.ShapeDtypeStruct((1, 4096, heads, head_dim), dtype)
    kv = jax.ShapeDtypeStruct((1, 4096, kv_heads, head_dim), dtype)
    return abstractly(lambda q, k, v: explain("flash_attention", q, k, v, causal=True), q, kv, kv)


def explain_paged(model: Any, kind: str) -> tuple[Any, ...]:
    """What a `decode` or `prefill` step of this model takes."""
    rows, count = (8, 1) if kind == "decode" else (4, 64)
    shape = (model.num_heads, model.num_kv_heads, model.head_dim, model.dtype)
    return explain_paged_shape(*shape, rows, count)


def explain_paged_shape(
    heads: int, kv_heads: int, head_dim: int, dtype: Any, rows: int, count: int
) -> tuple[Any, ...]:
    """What paged attention of `rows` rows of `count` queries takes."""
    import jax
    import jax.numpy as jnp

    import aidx.ops.paged_attention  # noqa: F401 - registers the implementations
    from aidx.ops.registry import explain

    integers = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    pool = jax.ShapeDtypeStruct((1024, kv_heads, 16, head_dim), dtype)
    q = jax.ShapeDtypeStruct((rows * count, heads, head_dim), dtype)
    return abstractly(
        lambda *args: explain("paged_attention", *args, max_q=count),
        q, pool, pool, integers(rows, 128), integers(rows), integers(rows + 1),
    )  # fmt: skip


def abstractly(ask: Any, *shapes: Any) -> tuple[Any, ...]:
    """`ask(*arrays)` on arrays that are only shapes: nothing is allocated or compiled."""
    import jax

    answers = []

    def trace(*args):
        answers.append(ask(*args))
        return ()

    jax.eval_shape(trace, *shapes)
    return answers[0]
