"""Record what tests/telemetry/data holds: the trace of a small training step on a GPU.

    python tests/telemetry/record_trace.py FOLDER

Two files, `step.xplane.pb.gz` with kernels launched one by one, `graph.xplane.pb.gz` with them in
command buffers; of the trace only the GPU's plane and the step's own program are kept, without the
code of its kernels.
"""

import gzip
import os
import pathlib
import subprocess
import sys
import tempfile


def varint(number: int) -> bytes:
    parts = []
    while number > 127:
        parts.append(number & 127 | 128)
        number >>= 7
    return bytes([*parts, number])


def fields(data: bytes):
    """(number, wire type, value) of a message."""
    at = 0

    def read() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        tag = read()
        if tag & 7 == 0:
            yield tag >> 3, 0, read()
            continue
        size = {1: 8, 5: 4}.get(tag & 7) or read()
        yield tag >> 3, tag & 7, data[at : at + size]
        at += size


def rewritten(data: bytes, change) -> bytes:
    """A message with every field that is bytes replaced by change(number, bytes), None: dropped."""
    out = []
    for number, kind, value in fields(data):
        if kind == 0:
            out.append(varint(number << 3) + varint(value))
        elif kind != 2:
            out.append(varint(number << 3 | kind) + value)
        elif (new := change(number, value)) is not None:
            out.append(varint(number << 3 | 2) + varint(len(new)) + new)
    return b"".join(out)


def trimmed(xspace: bytes) -> bytes:
    """The GPU's plane, and of the metadata the training step without its kernels' code."""
    # Of HloProto the module, of that its name and computations, of an instruction what is asked of
    # it: no code of kernels, no names of files.
    only = lambda kept, change=lambda n, v: v: lambda n, v: change(n, v) if n in kept else None
    about_op = lambda n, v: rewritten(v, only({2})) if n == 7 else v
    short = lambda n, v: None if n == 43 and len(v) > 2000 else about_op(n, v)
    kept = {1, 2, 3, 7, 28, 30, 35, 36, 38, 43}
    instruction = lambda n, v: rewritten(v, only(kept, short)) if n == 2 else v
    computation = lambda n, v: rewritten(v, instruction) if n == 3 else v
    hlo = lambda n, v: rewritten(v, only({1, 3}, computation)) if n == 1 else None
    stat = lambda n, v: rewritten(v, hlo) if n == 6 else v
    about = lambda n, v: rewritten(v, stat) if n == 5 else v
    entry = lambda n, v: rewritten(v, about) if n == 2 else v
    in_metadata = lambda n, v: (
        (rewritten(v, entry) if b"jit_train_step" in v else None) if n == 4 else v
    )

    def plane(number: int, value: bytes) -> bytes | None:
        name = next((v for n, kind, v in fields(value) if n == 2 and kind == 2), b"")
        if number == 1 and name.startswith(b"/device:GPU"):
            return value
        return rewritten(value, in_metadata) if name == b"/host:metadata" else None

    return rewritten(xspace, plane)


def record(file: pathlib.Path) -> None:
    import jax
    import optax

    from aidx.models import LlamaConfig, bind_forward, init_params
    from aidx.train import init_state, language_model_loss, make_train_step, next_token_batch

    config = LlamaConfig(4096, 256, 512, 2, 4, 2, 64, tied=True)
    optimizer = optax.adamw(1e-3)
    step = make_train_step(
        language_model_loss(bind_forward(config)),
        optimizer,
        clip_norm=1.0,
        compute_dtype="bfloat16",
    )
    state = init_state(init_params(config, jax.random.key(0)), optimizer, jax.random.key(1))
    batch = next_token_batch(jax.random.randint(jax.random.key(2), (2, 513), 0, 4096))
    for _ in range(2):
        state, metrics = step(state, batch)
    jax.block_until_ready(metrics)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(3):
                state, metrics = step(state, batch)
            jax.block_until_ready((state, metrics))
        (found,) = pathlib.Path(folder).rglob("*.xplane.pb")
        file.write_bytes(gzip.compress(trimmed(found.read_bytes()), 9, mtime=0))
    print(file.name, file.stat().st_size, "bytes", flush=True)


if __name__ == "__main__":
    folder = pathlib.Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    if len(sys.argv) == 3:
        record(folder / sys.argv[2])
    else:
        for name, flags in (("step", "--xla_gpu_enable_command_buffer="), ("graph", "")):
            env = os.environ | {"XLA_FLAGS": flags}
            command = [sys.executable, __file__, folder, f"{name}.xplane.pb.gz"]
            subprocess.run(command, env=env, check=True)
