"""Directories of safetensors: read one tensor at a time after everything has been checked.

A `Checkpoint` knows from the files' headers alone which tensors exist, where, with which shape and
dtype.  `check` compares that with a model's table, so that every mistake is found before the first
byte of a weight is read.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .hf import Entry, canonical_name, is_known_extra

INDEX = "model.safetensors.index.json"
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies and what its header says."""

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The tensors of a directory by their canonical names."""

    directory: pathlib.Path
    tensors: Mapping[str, TensorInfo]


def open_checkpoint(directory: pathlib.Path, config: Any) -> Checkpoint:
    """Read the headers of a directory's safetensors, single or sharded.

    Raises:
      FileNotFoundError: no weights, or a shard that the index names is absent.
      ValueError: only weights of another format, a truncated file, a tensor twice, or an index
        that names tensors which no file holds.
    """
    tensors: dict[str, TensorInfo] = {}
    files, indexed = weight_files(directory)
    for file in files:
        for info in read_header(file):
            name = canonical_name(config, info.name)
            if name in tensors and not is_known_extra(config, name):
                raise ValueError(f"tensor {name} is in {tensors[name].file} and again in {file}")
            tensors[name] = info
    if absent := {canonical_name(config, name) for name in indexed} - set(tensors):
        raise ValueError(f"{directory / INDEX} names tensors that no file holds: {_some(absent)}")
    return Checkpoint(directory, tensors)


def weight_files(directory: pathlib.Path) -> tuple[list[pathlib.Path], list[str]]:
    """The safetensors files of a checkpoint, and the tensor names of its index (empty if none).

    Raises:
      FileNotFoundError: there are no weights.
      ValueError: there are only weights of another format, or the index is broken.
    """
    index = directory / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map")
        if strange := [f for f in weight_map.values() if pathlib.PurePath(f).name != f]:
            raise ValueError(f"{index} names files outside its directory: {_some(strange)}")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        if absent := [f.name for f in files if not f.is_file()]:
            raise FileNotFoundError(f"{index} names files that are absent: {_some(absent)}")
        return files, sorted(weight_map)
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"], []
    others = sorted(
        f.name
        for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.msgpack", "*.h5", "*.safetensors")
        for f in directory.glob(pattern)
    )
    if others:
        raise ValueError(
            f"{directory} has no model.safetensors, only {_some(others)}; convert it with "
            "transformers: AutoModelForCausalLM.from_pretrained(directory)"
            ".save_pretrained(directory)"
        )
    raise FileNotFoundError(f"{directory} holds no model.safetensors and no {INDEX}")


def read_header(file: pathlib.Path) -> list[TensorInfo]:
    """Names, shapes and dtypes of a safetensors file, without reading its tensors.

    Raises:
      ValueError: the file is truncated or not safetensors.
    """
    try:
        with safe_open(file, framework="np") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118 - not a dict
            return [
                TensorInfo(file, name, tuple(s.get_shape()), s.get_dtype())
                for name, s in slices.items()
            ]
    except SafetensorError as error:
        raise ValueError(f"{file} is truncated or not safetensors: {error}") from error


def check(checkpoint: Checkpoint, table: Sequence[Entry], config: Any) -> None:
    """Compare the headers with what the model needs.

    Raises:
      ValueError: tensors that are missing or unexpected, or a wrong shape or dtype; all the names
        of the first kind found are in the message.
    """
    wanted = {name: shape for entry in table for name, shape in entry.tensors}
    found = checkpoint.tensors
    where = checkpoint.directory
    if missing := [name for name in wanted if name not in found]:
        raise ValueError(f"{where} lacks tensors: {_some(missing)}")
    extra = [n for n in found if n not in wanted and not is_known_extra(config, n)]
    if extra:
        raise ValueError(
            f"{where} holds tensors that a {config.model_type} of this config "
            f"does not have: {_some(extra)}"
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            raise ValueError(
                f"{found[name].file}: {name} has shape {found[name].shape}, "
                f"the config needs {shape}"
            )
        if found[name].dtype not in DTYPES:
            raise ValueError(
                f"{found[name].file}: {name} has dtype {found[name].dtype}; "
                f"supported: {', '.join(DTYPES)}"
            )


def read_entries(
    checkpoint: Checkpoint, table: Sequence[Entry]
) -> Iterator[tuple[Entry, list[np.ndarray]]]:
    """Each parameter with its tensors in the host's memory, one parameter at a time."""
    with contextlib.ExitStack() as stack:
        handles: dict[pathlib.Path, Any] = {}
        for entry in table:
            arrays = []
            for name, _ in entry.tensors:
                info = checkpoint.tensors[name]
                if info.file not in handles:
                    handles[info.file] = stack.enter_context(safe_open(info.file, framework="np"))
                arrays.append(handles[info.file].get_tensor(info.name))
            yield entry, arrays


def write_shards(
    directory: pathlib.Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    sizes: Mapping[str, int],
    max_shard_bytes: int,
) -> None:
    """Write tensors, which arrive in the order of sizes, into as few files as the limit allows.

    One file is `model.safetensors`; more are `model-00001-of-0000n.safetensors` and an index.
    Files get their names only when they are complete, and what an older checkpoint left is removed.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name, size in sizes.items():
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    n = len(shards)
    names = (
        ["model.safetensors"]
        if n == 1
        else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    )
    arriving = iter(tensors)
    for file, shard in zip(names, shards, strict=True):
        part = dict(next(arriving) for _ in shard)
        save_file(part, directory / f"{file}.part", metadata={"format": "pt"})
    for old in (*directory.glob("model*.safetensors"), directory / INDEX):
        old.unlink(missing_ok=True)
    for file in names:
        (directory / f"{file}.part").rename(directory / file)
    if n > 1:
        weight_map = {t: file for file, shard in zip(names, shards, strict=True) for t in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(directory / INDEX, index)


def read_json(file: pathlib.Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
      ValueError: the file is not a JSON object.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} holds a {type(value).__name__}, not an object")
    return value


def write_json(file: pathlib.Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, readable by people."""
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _some(names: Iterable[str], limit: int = 8) -> str:
    names = sorted(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
