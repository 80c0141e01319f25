"""Checkpoints on disk: every layout that occurs loads to the same parameters, every fault is named
before anything reaches a device."""

import json
import re
import shutil
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import aidx.models.load
from aidx.models import init_params, load_model, save_model
from aidx.models.checkpoint import INDEX
from aidx.models.hf import config_from_hf, tensor_table
from aidx.models.model import Model, stack_layers
from tests.models.golden import ORACLES, golden_cases

LLAMA, TIED, GPT2 = "llama", "llama_tied", "gpt2"


def assert_equal_params(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert jax.tree.structure(a) == jax.tree.structure(b)


def shard(directory, n=3):
    """Split model.safetensors into n files with an index."""
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i in range(n):
        file = f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        part = {k: v for j, (k, v) in enumerate(sorted(tensors.items())) if j % n == i}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


# --- what loads -----------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("name", [LLAMA, GPT2])
def test_sharded_equals_single(name, tmp_path):
    case = golden_cases()[name]
    single = load_model(case.write(tmp_path / "a"))
    shard(case.write(tmp_path / "b"))
    assert_equal_params(load_model(tmp_path / "b").params, single.params)


@pytest.mark.parametrize(("name", "prefix"), [(TIED, "model."), (GPT2, "transformer.")])
def test_names_without_the_base_prefix(name, prefix, tmp_path):
    case = golden_cases()[name]

    def strip(tensors):
        return {k.removeprefix(prefix): v for k, v in tensors.items()}

    plain = load_model(case.write(tmp_path / "a"))
    stripped = load_model(case.write(tmp_path / "b", change=strip))
    assert_equal_params(plain.params, stripped.params)


def test_known_extras_are_skipped(tmp_path):
    mask = np.ones((1, 1, 8, 8), np.float32)

    def gpt2_masks(tensors):
        return tensors | {"h.0.attn.bias": mask, "transformer.h.1.attn.masked_bias": mask[0, 0, 0]}

    def llama_extras(tensors):
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"]}
        freq = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": mask[0, 0, 0] for i in (0, 1)}
        return tensors | head | freq

    for name, change in ((GPT2, gpt2_masks), (TIED, llama_extras)):
        case = golden_cases()[name]
        plain = load_model(case.write(tmp_path / name))
        extra = load_model(case.write(tmp_path / f"{name}_extra", change=change))
        assert_equal_params(plain.params, extra.params)
        assert "lm_head" not in extra.params


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_auto_is_float32_on_a_cpu_and_the_checkpoints_elsewhere(key, tmp_path):
    case = golden_cases()[LLAMA]
    directory = case.write(tmp_path, dtype=jnp.bfloat16)
    edit_config(**{key: "float16"})(directory)
    assert load_model(directory).dtype == jnp.float32
    config = json.loads((directory / "config.json").read_text())
    checkpoint = aidx.models.load.open_checkpoint(directory, config_from_hf(config))
    pick = aidx.models.load.param_dtype
    assert pick("auto", config, checkpoint, "gpu") == jnp.float16
    assert pick("auto", {}, checkpoint, "gpu") == jnp.bfloat16  # what the files hold
    assert pick("auto", {"torch_dtype": "torch.float16"}, checkpoint, "gpu") == jnp.float16
    assert pick("float16", config, checkpoint, "cpu") == jnp.float16
    assert pick(jnp.bfloat16, config, checkpoint, "cpu") == jnp.bfloat16


def test_casts_round_once(tmp_path):
    case = golden_cases()[LLAMA]
    exact = load_model(case.write(tmp_path / "f32"), dtype="bfloat16").params
    wide = load_model(case.write(tmp_path / "f64", dtype=np.float64)).params
    want = load_model(tmp_path / "f32").params
    assert_equal_params(wide, want)
    assert_equal_params(exact, jax.tree.map(lambda x: x.astype(jnp.bfloat16), want))


def test_arranging_on_a_device_equals_arranging_on_the_host():
    for name in (LLAMA, "llama_attention_bias", "llama_mlp_bias", GPT2):
        case = golden_cases()[name]
        for entry in tensor_table(config_from_hf(case.config)):
            tensors = [case.tensors[n] for n, _ in entry.tensors]
            host = entry.layout.join(np, *tensors)
            dtype = np.dtype(np.float32)
            device = aidx.models.load._join_on_device(entry.layout, dtype, *tensors)
            np.testing.assert_array_equal(host, device)
            for part, tensor in zip(entry.layout.split(np, host), tensors, strict=True):
                np.testing.assert_array_equal(part, tensor)


def test_eos_ids_of_all_files_and_generation_config(tmp_path):
    case = golden_cases()[LLAMA]
    directory = case.write(tmp_path, eos_token_id=7)
    said = {"eos_token_id": [9, 7], "temperature": 0.6}
    (directory / "generation_config.json").write_text(json.dumps(said))
    model = load_model(directory)
    assert model.eos_token_ids == (9, 7) and model.bos_token_id == 1
    assert model.generation_config["temperature"] == 0.6
    assert model.tokenizer is None
    shutil.copytree(ORACLES / "tokenizer", directory, dirs_exist_ok=True)
    model = load_model(directory)
    assert model.eos_token_ids == (9, 7, model.tokenizer.eos_token_id) == (9, 7, 3)


def test_host_memory_stays_near_the_largest_parameter(tmp_path):
    """The whole is 12 times the largest; numpy and safetensors report to tracemalloc, JAX not."""
    from aidx.models import LlamaConfig

    config = LlamaConfig(512, 128, 256, 20, 2, 2, 64, tied=True)
    params = init_params(config, jax.random.key(0))
    save_model(Model(config, params), tmp_path)
    total = sum(a.nbytes for a in jax.tree.leaves(params))
    largest = max(a.nbytes for a in jax.tree.leaves(params))
    assert total > 10 * largest
    load_model(tmp_path, dtype="bfloat16")  # imports and caches
    tracemalloc.start()
    loaded = load_model(tmp_path, dtype="bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    kept = sum(a.nbytes for a in jax.tree.leaves(loaded.params))  # may alias numpy on a CPU
    assert peak < kept + 3 * largest < total + 3 * largest


# --- the hub --------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local hub cache with tiny/llama at one commit, and no network."""
    from huggingface_hub import constants

    commit = "a" * 40
    repo = tmp_path / "models--tiny--llama"
    golden_cases()[LLAMA].write(repo / "snapshots" / commit)
    for ref in ("main", "v1"):
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / ref).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return repo / "snapshots" / commit


@pytest.mark.parametrize("revision", [None, "v1", "a" * 40])
def test_a_name_on_the_hub_is_taken_from_its_cache(hub, revision):
    model = load_model("tiny/llama", revision=revision)
    assert_equal_params(model.params, load_model(hub).params)


def test_an_absent_repository_or_revision_is_named(hub):
    with pytest.raises(FileNotFoundError, match="tiny/absent"):
        load_model("tiny/absent")
    with pytest.raises(FileNotFoundError, match="tiny/llama at revision v9"):
        load_model("tiny/llama", revision="v9")


# --- what is refused ------------------------------------------------------------------------


def edit_config(**changes):
    def edit(directory):
        config = json.loads((directory / "config.json").read_text()) | changes
        (directory / "config.json").write_text(json.dumps(config))

    return edit


def edit_tensors(change):
    def edit(directory):
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors")

    return edit


def truncate(at):
    def edit(directory):
        data = (directory / "model.safetensors").read_bytes()
        (directory / "model.safetensors").write_bytes(data[:at])

    return edit


def edit_index(change):
    def edit(directory):
        weight_map = shard(directory)
        change(directory, weight_map)
        (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))

    return edit


def only(*files):
    def edit(directory):
        for file in files:
            (directory / file).write_bytes(b"x")
        (directory / "model.safetensors").unlink()

    return edit


def write(file, text):
    return lambda directory: (directory / file).write_text(text)


Q = "model.layers.1.self_attn.q_proj.weight"
FAULTS = {
    "truncated body": (truncate(-100), "model.safetensors is truncated"),
    "truncated header": (truncate(20), "model.safetensors is truncated"),
    "empty file": (truncate(0), "model.safetensors is truncated"),
    "missing tensor": (edit_tensors(lambda t: t.pop(Q)), f"lacks tensors: {Q}"),
    "unexpected tensor": (
        edit_tensors(lambda t: t.update(strange=np.ones(2))),
        "does not have: model.strange",
    ),
    "unexpected bias": (
        edit_tensors(lambda t: t.update({Q.replace("weight", "bias"): np.ones(64)})),
        "q_proj.bias",
    ),
    "wrong shape": (
        edit_tensors(lambda t: t.update({Q: t[Q][1:]})),
        f"{Q} has shape (127, 48), the config needs (128, 48)",
    ),
    "transposed": (edit_tensors(lambda t: t.update({Q: t[Q].T.copy()})), "has shape (48, 128)"),
    "integers": (
        edit_tensors(lambda t: t.update({Q: t[Q].astype(np.int8)})),
        f"{Q} has dtype I8",
    ),
    "absent shard": (
        edit_index(lambda d, m: (d / "model-00002-of-00003.safetensors").unlink()),
        "files that are absent: model-00002-of-00003.safetensors",
    ),
    "index names nothing": (
        edit_index(lambda d, m: m.update(ghost="model-00001-of-00003.safetensors")),
        "no file holds: model.ghost",
    ),
    "index leaves the directory": (
        edit_index(lambda d, m: m.update({Q: "../x.safetensors"})),
        "outside its directory: ../x.safetensors",
    ),
    "tensor in two shards": (
        edit_index(
            lambda d, m: save_file(
                load_file(d / "model-00001-of-00003.safetensors"),
                d / "model-00002-of-00003.safetensors",
            )
        ),
        "and again in",
    ),
    "empty index": (write(INDEX, "{}"), "has no weight_map"),
    "broken index": (write(INDEX, "{"), f"{INDEX} is not JSON"),
    "no weights": (only(), "holds no model.safetensors"),
    "only .bin": (only("pytorch_model.bin"), "only pytorch_model.bin; convert it with"),
    "only consolidated": (only("consolidated.safetensors"), "only consolidated.safetensors"),
    "only tokenizer.model": (write("tokenizer.model", ""), "only tokenizer.model; convert it"),
    "broken tokenizer": (write("tokenizer.json", "{}"), "tokenizer.json is not a tokenizer"),
    "no config": (lambda d: (d / "config.json").unlink(), "has no config.json"),
    "config is a list": (write("config.json", "[]"), "holds a list, not an object"),
    "broken generation config": (write("generation_config.json", "?"), "is not JSON"),
    "unknown architecture": (edit_config(model_type="rwkv"), "unknown architecture"),
    "unknown rope": (edit_config(rope_scaling={"type": "su"}), "unknown rope type 'su'"),
    "untied without a head": (
        edit_tensors(lambda t: t.pop("lm_head.weight")),
        "lacks tensors: lm_head.weight",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named_before_anything_reaches_the_device(fault, tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("a weight was read before the checkpoint was checked")

    break_it, message = FAULTS[fault]
    break_it(golden_cases()[LLAMA].write(tmp_path))
    monkeypatch.setattr(aidx.models.load, "read_params", forbidden)
    monkeypatch.setattr(jax, "device_put", forbidden)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        load_model(tmp_path)


def test_arguments_without_a_meaning_are_refused(tmp_path):
    directory = golden_cases()[LLAMA].write(tmp_path)
    with pytest.raises(ValueError, match="revision='main'"):
        load_model(directory, revision="main")
    with pytest.raises(ValueError, match="pass the directory"):
        load_model(directory / "config.json")
    with pytest.raises(FileNotFoundError, match="neither a directory nor"):
        load_model(tmp_path / "absent")
    for dtype in ("int8", "bf16", "float64"):
        with pytest.raises(ValueError, match=f"dtype '{dtype}'"):
            load_model(directory, dtype=dtype)


# --- saving ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(golden_cases()))
def test_saving_gives_back_the_same_tensors(name, tmp_path):
    case = golden_cases()[name]
    model = load_model(case.write(tmp_path / "a"))
    save_model(model, tmp_path / "b")
    saved = load_file(tmp_path / "b" / "model.safetensors")
    assert sorted(saved) == sorted(case.tensors)
    for key, value in saved.items():
        np.testing.assert_array_equal(value, case.tensors[key])
    again = load_model(tmp_path / "b")
    assert again.config == model.config
    assert again.eos_token_ids == model.eos_token_ids == (2,)
    assert again.bos_token_id == 1


def test_saving_in_shards_replaces_what_was_there(tmp_path):
    model = load_model(golden_cases()[LLAMA].write(tmp_path / "a"), dtype="bfloat16")
    save_model(model, tmp_path / "b")
    save_model(model, tmp_path / "b", max_shard_bytes=20_000)
    shards = sorted(f.name for f in (tmp_path / "b").glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert_equal_params(load_model(tmp_path / "b", dtype="bfloat16").params, model.params)
    save_model(model, tmp_path / "b")
    assert [f.name for f in (tmp_path / "b").glob("*.safetensors*")] == ["model.safetensors"]


def test_parameters_of_another_shape_are_not_written(tmp_path):
    model = load_model(golden_cases()[LLAMA].write(tmp_path / "a"))
    with pytest.raises(ValueError, match="unstack_layers"):
        save_model(model.replace(params=stack_layers(model.params)), tmp_path / "b")
    wrong = model.params | {"norm": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"\['norm'\] has \(3,\), expected \(48,\)"):
        save_model(model.replace(params=wrong), tmp_path / "b")
    assert not (tmp_path / "b").exists()
