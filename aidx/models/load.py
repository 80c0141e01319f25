"""`load_model` and `save_model`: a Hugging Face directory in, a `Model` out, and back."""

import functools
import pathlib
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ..typing import Params
from .checkpoint import (
    DTYPES,
    Checkpoint,
    check,
    open_checkpoint,
    read_entries,
    read_json,
    write_json,
    write_shards,
)
from .hf import Entry, Layout, config_from_hf, config_to_hf, tensor_table
from .model import Model, ModelConfig, is_shape, param_shapes
from .sharding import param_shardings
from .tokenizer import Tokenizer

PARAM_DTYPES = ("float32", "bfloat16", "float16")


def load_model(
    path_or_name: str | pathlib.Path,
    *,
    revision: str | None = None,
    dtype: Any = "auto",
    mesh: Mesh | None = None,
    max_model_len: int | None = None,
    allow_long_max_model_len: bool = False,
) -> Model:
    """Load a checkpoint in Hugging Face's layout.

    Everything that can be wrong is found before a weight reaches the device: the config, the
    tokenizer, and from the headers of the files every tensor's name, shape and dtype.  Tensors are
    then read one parameter at a time.

    Args:
      path_or_name: a directory, or `org/name` on the Hugging Face hub.
      revision: branch, tag or commit on the hub.
      dtype: `auto` (the checkpoint's; float32 on a CPU), or float32, bfloat16, float16.
      mesh: devices to spread the parameters over (see `aidx.models.sharding`); None is the default
        device.
      max_model_len: the longest context to be served; None takes the config's.  `dynamic` rotary
        embeddings fix their frequencies by it.
      allow_long_max_model_len: take one that is longer than the rotary embedding is made for.

    Returns:
      A `Model`; its tokenizer is None where the directory has none.

    Raises:
      FileNotFoundError: no such directory, repository, revision or weights.
      ValueError: anything in the files that cannot be loaded as it is; the message names it and
        says how to convert what can be converted.

    >>> load_model("no/such/directory")
    Traceback (most recent call last):
    FileNotFoundError: no/such/directory is neither a directory nor a name on the hub (org/name)
    """
    directory = find_directory(path_or_name, revision)
    hf = read_config(directory)
    config = config_from_hf(hf)
    if max_model_len is not None:
        config = config.with_max_model_len(
            max_model_len, allow_long_max_model_len=allow_long_max_model_len
        )
    generation = {}
    if (directory / "generation_config.json").is_file():
        generation = read_json(directory / "generation_config.json")
    tokenizer = Tokenizer.from_directory(directory)
    table = tensor_table(config)
    checkpoint = open_checkpoint(directory, config)
    check(checkpoint, table, config)
    shardings = None if mesh is None else param_shardings(config, mesh)
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    params = read_params(
        checkpoint, table, param_dtype(dtype, hf, checkpoint, device.platform), device, shardings
    )
    return Model(
        config=config,
        params=params,
        tokenizer=tokenizer,
        generation_config=MappingProxyType(generation),
        eos_token_ids=eos_token_ids(generation, hf, tokenizer),
        bos_token_id=_first_id(
            hf.get("bos_token_id"),
            generation.get("bos_token_id"),
            None if tokenizer is None else tokenizer.bos_token_id,
        ),
    )


def find_directory(path_or_name: str | pathlib.Path, revision: str | None) -> pathlib.Path:
    """A local directory as it is, or a snapshot of a repository of the hub."""
    directory = pathlib.Path(path_or_name).expanduser()
    if directory.is_dir():
        if revision is not None:
            raise ValueError(f"{revision=} has no meaning for the local directory {directory}")
        return directory
    name = str(path_or_name)
    parts = name.split("/")
    if directory.exists():
        raise ValueError(f"{name} is a file; pass the directory that holds config.json")
    if len(parts) != 2 or not all(parts) or parts[0] in (".", "..", "~"):
        raise FileNotFoundError(f"{name} is neither a directory nor a name on the hub (org/name)")
    return _download(name, revision)


def _download(name: str, revision: str | None) -> pathlib.Path:
    import huggingface_hub
    from huggingface_hub import errors

    try:
        snapshot = huggingface_hub.snapshot_download(
            name,
            revision=revision,
            allow_patterns=["*.json", "*.safetensors", "*.jinja", "tokenizer.model"],
            ignore_patterns=["consolidated*", "original/*", "onnx/*"],
        )
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, errors.HFValidationError) as e:
        at = f" at revision {revision}" if revision else ""
        raise FileNotFoundError(f"cannot get {name}{at} from the hub: {e}") from e
    return pathlib.Path(snapshot)


def read_config(directory: pathlib.Path) -> dict[str, Any]:
    """config.json of a directory.

    Raises:
      FileNotFoundError: there is none.
      ValueError: it is not a JSON object.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(f"{directory} has no config.json")
    return read_json(directory / "config.json")


def param_dtype(
    asked: Any, hf: Mapping[str, Any], checkpoint: Checkpoint, platform: str
) -> np.dtype:
    """The dtype of the parameters: as asked, or the checkpoint's (float32 on a CPU).

    Raises:
      ValueError: not a dtype that parameters can have.
    """
    if isinstance(asked, str) and asked == "auto":
        if platform == "cpu":
            return np.dtype(np.float32)
        said = hf.get("dtype") or hf.get("torch_dtype") or _widest(checkpoint)
        asked = str(said).removeprefix("torch.")
    try:
        dtype = jnp.dtype(asked)
    except TypeError as error:
        raise ValueError(
            f"dtype {asked!r} is not one of auto, {', '.join(PARAM_DTYPES)}"
        ) from error
    if dtype.name not in PARAM_DTYPES:
        raise ValueError(f"dtype {dtype.name!r} is not one of auto, {', '.join(PARAM_DTYPES)}")
    return dtype


def _widest(checkpoint: Checkpoint) -> str:
    """The dtype of most bytes; norms are often kept wider than the matrices."""
    count: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        count[info.dtype] = count.get(info.dtype, 0) + int(np.prod(info.shape))
    return DTYPES[max(count, key=count.__getitem__)].name


def read_params(
    checkpoint: Checkpoint,
    table: list[Entry],
    dtype: np.dtype,
    device: Any,
    shardings: Params | None = None,
) -> Params:
    """Read, arrange, cast and place the parameters, one at a time.

    The host holds the tensors of one parameter.  On a CPU numpy arranges them; elsewhere the device
    transposes and joins at its own memory's speed, which the host's would be a fraction of.
    """
    params: dict[str, Any] = {}
    layers: dict[int, dict[str, Any]] = {}
    for entry, tensors in read_entries(checkpoint, table):
        if device.platform == "cpu":
            value = np.ascontiguousarray(entry.layout.join(np, *tensors).astype(dtype, copy=False))
        else:
            value = _join_on_device(entry.layout, dtype, *jax.device_put(tensors, device))
        target = _leaf(shardings, entry.path) if shardings is not None else device
        value = jax.device_put(value, target)
        # One parameter in flight: without this the host would run ahead and hold many.
        value.block_until_ready()
        tree: dict[Any, Any] = params
        path = entry.path
        if path[0] == "layers":
            tree, path = layers.setdefault(int(path[1]), {}), path[2:]
        for key in path[:-1]:
            tree = tree.setdefault(key, {})
        tree[path[-1]] = value
    return params | {"layers": tuple(layers[i] for i in sorted(layers))}


@functools.partial(jax.jit, static_argnums=(0, 1))
def _join_on_device(layout: Layout, dtype: np.dtype, *tensors: jax.Array) -> jax.Array:
    return layout.join(jnp, *tensors).astype(dtype)


def _leaf(tree: Any, path: tuple[str | int, ...]) -> Any:
    return functools.reduce(lambda node, key: node[key], path, tree)


def eos_token_ids(
    generation: Mapping[str, Any], hf: Mapping[str, Any], tokenizer: Tokenizer | None
) -> tuple[int, ...]:
    """Every id that ends a sequence: generation_config.json's, config.json's, the tokenizer's.

    >>> eos_token_ids({"eos_token_id": [2, 5]}, {"eos_token_id": 2}, None)
    (2, 5)
    """
    ids: dict[int, None] = {}
    for said in (generation.get("eos_token_id"), hf.get("eos_token_id")):
        for i in said if isinstance(said, list) else [said]:
            ids |= {} if i is None else {int(i): None}
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids[tokenizer.eos_token_id] = None
    return tuple(ids)


def _first_id(*ids: int | None) -> int | None:
    return next((i for i in ids if i is not None), None)


# --- saving ---------------------------------------------------------------------------------


def save_model(
    model: Model, directory: str | pathlib.Path, *, max_shard_bytes: int = 5 * 2**30
) -> pathlib.Path:
    """Write a directory that `transformers` and `load_model` read.

    Args:
      model: params may lie on any device or mesh; one shard at a time is fetched to the host.
      directory: created if needed; the model files in it are replaced.
      max_shard_bytes: the largest safetensors file, as far as one tensor allows.

    Returns:
      The directory.

    Raises:
      ValueError: the config cannot be said in Hugging Face's terms, or the parameters do not have
        its shapes.

    >>> import tempfile
    >>> from aidx.models import LlamaConfig, init_params
    >>> config = LlamaConfig(97, 32, 64, 2, 4, 2, 8)
    >>> model = Model(config, init_params(config, jax.random.key(0)))
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     load_model(save_model(model, directory)).config == config
    True
    """
    hf = config_to_hf(model.config)
    table = tensor_table(model.config)
    _check_params(model.config, model.params)
    dtype = model.dtype.name
    hf |= {"torch_dtype": dtype, "bos_token_id": model.bos_token_id}
    hf["eos_token_id"] = _one_or_list(model.eos_token_ids)
    itemsize = model.dtype.itemsize
    sizes = {
        name: int(np.prod(shape)) * itemsize for entry in table for name, shape in entry.tensors
    }
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_shards(directory, _hf_tensors(model, table), sizes, max_shard_bytes)
    if model.tokenizer is not None:
        model.tokenizer.save(directory)
    if model.generation_config:
        write_json(directory / "generation_config.json", dict(model.generation_config))
    write_json(directory / "config.json", hf)
    return directory


def _hf_tensors(model: Model, table: list[Entry]) -> Iterator[tuple[str, np.ndarray]]:
    for entry in table:
        value = np.asarray(jax.device_get(_leaf(model.params, entry.path)))
        parts = entry.layout.split(np, value)
        for (name, shape), part in zip(entry.tensors, parts, strict=True):
            yield name, np.ascontiguousarray(part.reshape(shape), dtype=model.dtype)


def _check_params(config: ModelConfig, params: Params) -> None:
    wanted, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config), is_leaf=is_shape)
    found = jax.tree.structure(params)
    if found != tree:
        raise ValueError(
            f"the parameters are not a tree of this config (stacked layers? see unstack_layers): "
            f"{found} instead of {tree}"
        )
    for (path, shape), leaf in zip(wanted, jax.tree.leaves(params), strict=True):
        if leaf.shape != shape:
            raise ValueError(f"{jax.tree_util.keystr(path)} has {leaf.shape}, expected {shape}")


def _one_or_list(ids: tuple[int, ...]) -> int | list[int] | None:
    return (ids[0] if len(ids) == 1 else list(ids)) if ids else None
