"""Training on one GPU: tokens a second, MFU and peak memory beside transformers on torch.

    python bench/training.py                  # every case, each in a process of its own
    python bench/training.py --cases 1b       # Llama-3.2-1B shape only
    python bench/training.py --tiny           # any machine: does it run

Both sides: random weights, random tokens, bf16 compute, f32 master weights and moments, AdamW with
decay and clipping by the global norm, causal attention, S = 4096, the same batch.  The peer is
transformers' LlamaForCausalLM under torch.compile with SDPA and bf16 autocast (the fused AdamW of
torch).  Neither reports norms of parameters and updates.  A rate is of the median step of ten after
three.  MFU counts 6P + 3 L 4 N H S / 2 a token over 989 TFLOP/s, recomputation not
(`aidx.train.train_flops_per_token`).

`cross-entropy` is the temporary memory of the loss's value and gradient at V = 128256, from the
compiler's own analysis: fused, beside logits that are whole.
`logging` is a step of the 1B case with a SummaryWriter that takes every step's scalars and, every
tenth, histograms of all parameters, beside a step without.
`tensorboard` is scalars a second and histograms of 100M elements (bf16, on the device, 100 leaves)
beside tensorboardX itself; `overhead` what five scopes cost a step of 5 ms, with and without a
profiler.  With `--profile FOLDER` a step's device time by scope, of a run by itself.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
CASES = {  # layers, batch
    "1b": ("llama-3.2-1b", 16, 8),
    "8b8": ("llama-3.1-8b", 8, 4),
}
PEER = "transformers + torch.compile + SDPA"
LENGTH, WARMUP, STEPS = 4096, 3, 10


def model_config(case: str, tiny: bool):
    """The aidx config of a case, its batch and its length."""
    from aidx.models import PRESETS, LlamaConfig

    name, layers, batch = CASES[case]
    if tiny:
        return LlamaConfig(512, 64, 128, 2, 4, 2, 16, tied=name.endswith("1b")), 2, 64
    config = dataclasses.replace(PRESETS[name], num_layers=layers, windows=())
    return config, batch, LENGTH


def report(case: str, who: str, metric: str, value: float, unit: str) -> None:
    print("ROW " + json.dumps([case, who, metric, float(f"{value:.5g}"), unit]), flush=True)


def speed_rows(case, who, config, batch, length, seconds, peak_bytes) -> None:
    from aidx.train import train_flops_per_token

    rate = batch * length / statistics.median(seconds)
    name = f"{case} B={batch} S={length}"
    report(name, who, "tokens", rate, "tokens/s")
    flops = train_flops_per_token(config, length)
    report(name, who, "mfu", 100 * rate * flops / 989.4e12, "% of 989 TFLOP/s")
    report(name, who, "step", 1e3 * statistics.median(seconds), "ms")
    if peak_bytes:
        report(name, who, "peak_memory", peak_bytes / 2**30, "GiB")


def aidx_step(config, remat: str, chunk: int | None, norms: bool = True):
    """The step and its state: all of it the library's public API."""
    import jax
    import optax

    from aidx.models import bind_forward, init_params
    from aidx.train import init_state, language_model_loss, make_train_step

    optimizer = optax.adamw(1e-4, weight_decay=0.1)
    loss_fn = language_model_loss(bind_forward(config), remat=remat, chunk_tokens=chunk)
    step = make_train_step(loss_fn, optimizer, clip_norm=1.0, compute_dtype="bfloat16", norms=norms)
    return step, init_state(init_params(config, jax.random.key(0)), optimizer, jax.random.key(1))


def measure_aidx(case: str, args: argparse.Namespace) -> None:
    import jax

    from aidx.train import next_token_batch

    config, batch, length = model_config(case, args.tiny)
    step, state = aidx_step(config, args.remat, args.chunk, norms=False)
    shape = (batch, length + 1)
    windows = [
        next_token_batch(jax.random.randint(jax.random.key(i), shape, 0, config.vocab_size))
        for i in range(2)
    ]
    begun = time.perf_counter()
    compiled = step.lower(state, windows[0]).compile()
    report(f"{case} B={batch} S={length}", "aidx", "compile", time.perf_counter() - begun, "s")
    seconds = []
    for i in range(WARMUP + STEPS):
        begun = time.perf_counter()
        state, metrics = compiled(state, windows[i % 2])
        metrics.loss.block_until_ready()
        seconds.append(time.perf_counter() - begun)
    stats = jax.devices()[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use", 0)
    speed_rows(case, "aidx", config, batch, length, seconds[WARMUP:], peak)
    print(f"loss {float(metrics.loss):.4f} grad_norm {float(metrics.grad_norm):.4f}", flush=True)


def measure_profile(case: str, args: argparse.Namespace) -> None:
    """Device time of three steps by scope, and by kernel; the shares of the rooflines."""
    import jax

    from aidx.telemetry.profiler import Profiler, profile_scope, scope_costs
    from aidx.train import next_token_batch

    config, batch, length = model_config(case, args.tiny)
    step, state = aidx_step(config, args.remat, args.chunk)
    shape = (batch, length + 1)
    data = next_token_batch(jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size))
    costs = scope_costs(step, state, data)
    compiled = step.lower(state, data).compile()
    for _ in range(2):
        state, metrics = compiled(state, data)
    metrics.loss.block_until_ready()
    with Profiler(device_trace=True) as profiler:
        for _ in range(3):
            with profile_scope("step"):
                state, metrics = compiled(state, data)
        jax.block_until_ready((state, metrics))
    report_ = profiler.report(programs=[compiled], costs=costs, calls=3)
    args.profile.mkdir(parents=True, exist_ok=True)
    (args.profile / f"{case}.json").write_text(report_.to_json())
    (args.profile / f"{case}.html").write_text(report_.to_html())
    kernels: dict[str, list[float]] = {}
    for path, _, seconds, _ in report_.device_timeline:
        kernels.setdefault("/".join(path), []).append(1e3 * seconds)
    rows = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:150]
    lines = [f"{sum(t) / 3:9.3f} ms {len(t) / 3:6.1f}x  {name}" for name, t in rows]
    table = report_.table(least=0.004)
    (args.profile / f"{case}.txt").write_text("\n".join([table, "", *lines]) + "\n")
    print(table, flush=True)


def measure_torch(case: str, args: argparse.Namespace) -> None:
    import torch
    import transformers

    config, batch, length = model_config(case, args.tiny)
    hf = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.ffn_dim,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tied,
        max_position_embeddings=length,
        attn_implementation="sdpa",
        use_cache=False,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_float32_matmul_precision("high")
    with torch.device(device):
        model = transformers.LlamaForCausalLM(hf).float().train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, weight_decay=0.1, fused=True)
    compiled = torch.compile(model)
    windows = [
        torch.randint(0, config.vocab_size, (batch, length), device=device) for _ in range(2)
    ]
    seconds = []
    for i in range(WARMUP + STEPS):
        begun = time.perf_counter()
        with torch.autocast(device, torch.bfloat16):
            loss = compiled(input_ids=windows[i % 2], labels=windows[i % 2]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - begun)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    speed_rows(case, PEER, config, batch, length, seconds[WARMUP:], peak)


def measure_cross_entropy(args: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    from aidx.train import cross_entropy, fused_cross_entropy

    N, D, V = (64, 32, 512) if args.tiny else (32768, 2048, 128256)
    shapes = [
        jax.ShapeDtypeStruct(s, d)
        for s, d in (((N, D), jnp.bfloat16), ((V, D), jnp.bfloat16), ((N,), jnp.int32))
    ]
    whole = lambda x, t, y: cross_entropy(jnp.einsum("td,vd->tv", x, t), y)[0]
    fused = lambda x, t, y: fused_cross_entropy(x, t, y, chunk_tokens=args.chunk)[0]
    for who, loss in (("aidx", fused), ("logits whole", whole)):
        compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(*shapes).compile()
        size = compiled.memory_analysis().temp_size_in_bytes
        report(f"cross-entropy N={N} V={V}", who, "temporary_memory", size / 2**30, "GiB")


def measure_logging(args: argparse.Namespace) -> None:
    import jax

    from aidx.telemetry.tensorboard import SummaryWriter, TensorBoardCallback
    from aidx.train import fit, next_token_batch

    config, batch, length = model_config("1b", args.tiny)
    step, state = aidx_step(config, args.remat, args.chunk)
    shape = (batch, length + 1)
    window = jax.random.randint(jax.random.key(0), shape, 0, config.vocab_size)
    data = next_token_batch(window)
    seconds = {}
    for who in ("without", "with"):
        steps = int(state.step) + 2 * STEPS + WARMUP
        with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
            logged = [TensorBoardCallback(writer, histograms_every=10)] if who == "with" else []
            writer.add_histograms("warm", state.params)  # compiled before the clock runs
            writer.flush()
            times = []
            run = fit(step, state, lambda i: data, steps=steps, callbacks=[*logged, Times(times)])
        state = run.state
        seconds[who] = sum(times[WARMUP:]) / len(times[WARMUP:])
        report(f"logging 1b B={batch} S={length}", f"aidx {who}", "step", 1e3 * seconds[who], "ms")
    report(
        f"logging 1b B={batch} S={length}", "aidx with", "overhead",
        100 * (seconds["with"] / seconds["without"] - 1), "%",
    )  # fmt: skip


def Times(into: list[float]):
    """A callback that keeps every step's seconds."""
    from aidx.train import Callback

    class Keep(Callback):
        def on_step(self, step, metrics):
            if "step_seconds" in metrics:
                into.append(metrics["step_seconds"])

    return Keep()


def measure_tensorboard(args: argparse.Namespace) -> None:
    """Scalars a second, and histograms of a tree of 100M elements, beside tensorboardX itself."""
    import jax
    import jax.numpy as jnp
    import tensorboardX

    from aidx.telemetry.tensorboard import SummaryWriter

    scalars, leaves, size = (500, 4, 1000) if args.tiny else (20_000, 100, 1_000_000)
    tree = {
        f"layer_{i:02}": jax.random.normal(jax.random.key(i), (size,)).astype(jnp.bfloat16)
        for i in range(leaves)
    }
    jax.block_until_ready(tree)
    peers = {"aidx": SummaryWriter, "tensorboardX": tensorboardX.SummaryWriter}
    for who, make in peers.items():
        rates = []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as folder, make(folder) as writer:
                begun = time.perf_counter()
                for i in range(scalars):
                    writer.add_scalar("loss", 0.5, i)
                writer.flush()
                rates.append(scalars / (time.perf_counter() - begun))
        report("scalars", who, "rate", statistics.median(rates), "scalars/s")
        with tempfile.TemporaryDirectory() as folder, make(folder) as writer:
            if who == "aidx":
                writer.add_histograms("warm", tree, 0)  # compiled before the clock runs
                writer.flush()
            begun = time.perf_counter()
            if who == "aidx":
                writer.add_histograms("params", tree, 1)
                called = time.perf_counter() - begun
                report(f"histograms {leaves * size:.0e} elements", who, "call", called, "s")
            else:
                for name, leaf in tree.items():
                    writer.add_histogram(f"params/{name}", np_of(leaf), 1)
            writer.flush()
            taken = time.perf_counter() - begun
        report(f"histograms {leaves * size:.0e} elements", who, "to disk", taken, "s")


def np_of(x):
    """What tensorboardX can take of an array."""
    import numpy as np

    return np.asarray(x).astype(np.float32)


def measure_overhead(args: argparse.Namespace) -> None:
    """A step of 5 ms with five scopes: without them, with them, with a profiler running."""
    import contextlib

    import jax
    import jax.numpy as jnp

    from aidx.telemetry.profiler import Profiler, profile_scope

    def wait(seconds: float) -> None:  # a step whose length does not depend on the machine
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    add = jax.jit(lambda x: x + 1)
    x = jnp.zeros(1024)

    def run(scope, n: int) -> list[float]:
        nonlocal x
        seconds = []
        for _ in range(n):
            begun = time.perf_counter()
            with scope("data"):
                pass
            with scope("step"):
                with scope("forward"), scope("inner"):
                    x = add(x)
                wait(0.005)
            with scope("read"):
                x.block_until_ready()
            seconds.append(time.perf_counter() - begun)
        return seconds

    none = lambda name: contextlib.nullcontext()
    times: dict[str, list[float]] = {"none": [], "off": [], "on": []}
    run(none, 10)
    for _ in range(3 if args.tiny else 12):  # in turns: clocks change
        times["none"] += run(none, 40)
        times["off"] += run(profile_scope, 40)
        with Profiler():
            times["on"] += run(profile_scope, 40)
    base = statistics.median(times["none"])
    for name in ("off", "on"):
        extra = statistics.median(times[name]) - base
        report("profiler 5 ms step, 5 scopes", f"aidx {name}", "overhead", 100 * extra / base, "%")
        with Profiler() if name == "on" else contextlib.nullcontext():
            begun = time.perf_counter()
            for _ in range(10_000):
                with profile_scope("alone"):
                    pass
            alone = (time.perf_counter() - begun) / 10_000
        report("profiler 5 ms step, 5 scopes", f"aidx {name}", "scope", 1e6 * alone, "us")


def run_one(name: str, args: argparse.Namespace) -> None:
    case, _, who = name.partition(":")
    if args.plain:
        from aidx.kernels import fused

        fused.SMALL = 1 << 62  # bytes: nothing is large
    if case == "cross-entropy":
        measure_cross_entropy(args)
    elif case == "tensorboard":
        measure_tensorboard(args)
    elif case == "overhead":
        measure_overhead(args)
    elif who == "profile":
        measure_profile(case, args)
    elif case == "logging":
        measure_logging(args)
    elif who == "torch":
        measure_torch(case, args)
    else:
        measure_aidx(case, args)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*CASES, "cross-entropy", "logging", "tensorboard", "overhead"]
    parser.add_argument("--cases", nargs="+", default=names, choices=names)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--remat", default="none", help="of the aidx step")
    parser.add_argument("--plain", action="store_true", help="norms and gates by XLA")
    parser.add_argument("--chunk", type=int, help="tokens of a chunk of the loss")
    parser.add_argument("--profile", type=pathlib.Path, help="folder for profiles of the steps")
    parser.add_argument("--no-peers", action="store_true", help="aidx alone")
    parser.add_argument("--deadline", type=float, default=1e9, help="start no case after (s)")
    parser.add_argument("--out", type=pathlib.Path, help="results (default: bench/results)")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        run_one(args.only, args)
        return
    peers = not args.no_peers and all(
        importlib.util.find_spec(p) for p in ("torch", "transformers")
    )
    todo = [
        f"{case}{who}"
        for case in args.cases
        for who in ((":aidx", ":torch", ":profile") if case in CASES else ("",))
        if (peers or who != ":torch") and (args.profile or who != ":profile")
    ]
    probe = "import jax; print(jax.devices()[0].device_kind)"
    found = subprocess.run([sys.executable, "-c", probe], stdout=subprocess.PIPE, text=True)
    device = found.stdout.strip()
    folder = args.out or RESULTS / ("h200" if "H200" in device else "cpu")
    begun, rows = time.perf_counter(), []
    for name in todo:
        if time.perf_counter() - begun > args.deadline:
            print(f"{name}: left out, the deadline has passed", flush=True)
            continue
        env = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92"}
        if name.endswith(":profile"):  # in command buffers, kernels of libraries have no names
            env["XLA_FLAGS"] = f"{env.get('XLA_FLAGS', '')} --xla_gpu_enable_command_buffer="
        command = [sys.executable, __file__, *sys.argv[1:], "--only", name]
        done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
        print(f"--- {name}: exit {done.returncode}, {time.perf_counter() - begun:.0f} s in all")
        for line in done.stdout.splitlines():
            print(line.removeprefix("ROW "), flush=True)
            if line.startswith("ROW "):
                keys = ("case", "implementation", "metric", "value", "unit")
                rows.append(dict(zip(keys, json.loads(line[4:]), strict=True)))
        write(rows, device, folder)  # after every case: the machine may be taken away


def write(rows: list[dict], device: str, folder: pathlib.Path) -> None:
    """The rows, beside those that the file has of other cases."""
    packages = ("jax", "optax", "torch", "transformers", "tensorboardX")
    versions = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
    given = sys.argv[1:]
    if "--out" in given:  # where the file happens to be
        at = given.index("--out")
        given = [*given[:at], *given[at + 2 :]]
    command = " ".join(["python bench/training.py", *given])
    file = folder / "training.json"
    earlier = json.loads(file.read_text()) if file.exists() else {"meta": {}, "rows": []}
    new = {(row["case"], row["implementation"]) for row in rows}
    kept = [r for r in earlier["rows"] if (r["case"], r["implementation"]) not in new]
    commands = [c for c in earlier["meta"].get("command", "").split("; ") if c and c != command]
    meta = {
        "command": "; ".join([*commands, command]) if kept else command,
        "date": datetime.date.today().isoformat(),
        "device": device,
        "versions": earlier["meta"].get("versions", {}) | versions,
    }
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"meta": meta, "rows": [*kept, *rows]}, indent=1) + "\n")


if __name__ == "__main__":
    main()
