"""LoRA, recipes and `aidx train`: text in, a served model out."""

import functools
import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tokenizers

from aidx.cli import main
from aidx.cli.train import read_sections
from aidx.models import LlamaConfig, Tokenizer, bind_forward, init_params, load_model
from aidx.train import (
    Lora,
    Recipe,
    init_state,
    language_model_loss,
    make_train_step,
    next_token_batch,
)
from aidx.train.recipe import OPTIMIZERS, SCHEDULES, OptimizerRecipe, make_optimizer

CONFIG = LlamaConfig(97, 32, 64, 2, 4, 2, 8, tied=True)
TEXT = "the quick brown fox jumps over the lazy dog and runs away from the cat\n"


@functools.cache
def base():
    return init_params(CONFIG, jax.random.key(0), std=0.1)


def test_a_fresh_lora_is_the_base_and_a_trained_one_adds_a_low_rank():
    lora = Lora(rank=3, alpha=6.0, targets=("qkv", "down"))
    adapters = lora.init(base(), jax.random.key(1))
    chex.assert_trees_all_equal(lora.merge(base(), adapters), base())
    adapters = jax.tree.map(lambda x: x + 0.1, adapters)
    merged = lora.merge(base(), adapters)
    for i, layer in enumerate(merged["layers"]):
        for name in ("qkv", "down", "o"):
            added = np.asarray(layer[name] - base()["layers"][i][name])
            matrix = added.reshape(added.shape[0], -1)
            if name == "o":
                assert not added.any()
                continue
            assert np.linalg.matrix_rank(matrix, tol=1e-4) <= 3
            a, b = (np.asarray(adapters[f"layers.{i}.{name}"][k]) for k in "ab")
            np.testing.assert_allclose(matrix, 2.0 * a @ b.reshape(3, -1), atol=1e-5)


def test_only_the_adapters_are_trained():
    lora, sgd = Lora(rank=2, targets=("o",)), optax.sgd(1.0)
    loss_fn = language_model_loss(bind_forward(CONFIG), params_of=lora.params_of)
    step = make_train_step(loss_fn, sgd)
    adapters = lora.init(base(), jax.random.key(1))
    state = init_state(adapters, sgd, jax.random.key(2))
    batch = next_token_batch(jax.random.randint(jax.random.key(3), (2, 9), 0, 97))
    before = jax.tree.map(np.asarray, base())
    losses = []
    for _ in range(3):
        state, metrics = step(state, batch, base())
        losses.append(float(metrics.loss))
    chex.assert_trees_all_equal(base(), before)
    assert losses[0] > losses[1] > losses[2]
    moved = {k for k, v in state.params.items() if (v["b"] != 0).any()}
    assert moved == set(adapters) == {"layers.0.o", "layers.1.o"}


def test_wrong_loras_are_refused():
    with pytest.raises(ValueError, match="rank=0"):
        Lora(rank=0)
    with pytest.raises(ValueError, match="'attn'"):
        Lora(targets=("attn",))
    with pytest.raises(ValueError, match="none of the targets"):
        Lora(targets=("up",)).init(base(), jax.random.key(0))
    with pytest.raises(ValueError, match="unstack_layers"):
        Lora().init({"layers": {}}, jax.random.key(0))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimiser_lowers_a_loss_and_tells_its_rate(name):
    optimizer = make_optimizer(
        OptimizerRecipe(name=name, learning_rate=0.05, warmup_steps=2, weight_decay=0.0), 8
    )
    loss_fn = lambda p, x, key: (((p["layers"][0]["o"] @ x - 1.0) ** 2).sum(), 1)
    step = make_train_step(loss_fn, optimizer)
    state = init_state({"layers": ({"o": jnp.zeros((2, 2))},)}, optimizer, jax.random.key(0))
    found = []
    for _ in range(8):
        state, metrics = step(state, jnp.eye(2))
        found.append((float(metrics.loss), float(metrics.learning_rate)))
    assert found[-1][0] < found[0][0]
    assert found[1][1] == pytest.approx(0.025) and found[2][1] == pytest.approx(0.05)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_rise_and_end_where_they_say(name):
    recipe = OptimizerRecipe(learning_rate=1.0, schedule=name, warmup_steps=4, final_share=0.1)
    optimizer = make_optimizer(recipe, 44)
    params = {"w": jnp.ones(1)}
    state, rates = optimizer.init(params), []
    update = jax.jit(optimizer.update)
    for _ in range(45):
        rates.append(float(state.hyperparams["learning_rate"]))
        _, state = update(params, state, params)
    assert rates[:3] == pytest.approx([0.0, 0.0, 0.25])  # the state shows the rate last used
    assert max(rates) == pytest.approx(1.0) and (np.diff(rates[:6]) >= 0).all()
    assert rates[-1] == pytest.approx({"constant": 1.0}.get(name, 0.1), abs=0.13)
    assert (np.diff(rates[6:]) <= 1e-6).all()


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Text in a folder, a held-out file, and a byte tokenizer's directory."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "train").mkdir()
    (folder / "tokenizer").mkdir()
    for i in range(4):
        (folder / "train" / f"{i}.txt").write_text(TEXT * 6)
    (folder / "heldout.txt").write_text(TEXT * 4)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TEXT], trainer)
    Tokenizer(backend, {"eos_token": "<end>"}).save(folder / "tokenizer")
    return folder


def sections(text, folder, **changes):
    shape = {
        "dim": 32, "ffn_dim": 64, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
        "head_dim": 16, "tied": True,
    }  # fmt: skip
    made = {
        "model": {"shape": shape, "tokenizer": str(text / "tokenizer")},
        "data": {
            "train": [str(text / "train")], "heldout": [str(text / "heldout.txt")],
            "length": 16, "batch_size": 4, "eval_batches": 1,
        },
        "optimizer": {"learning_rate": 0.02, "warmup_steps": 2},
        "train": {"steps": 20, "dtype": "float32"},
        "output": {"folder": str(folder), "save_every": 10, "eval_every": 10,
                   "tensorboard": False},
    }  # fmt: skip
    for name, options in changes.items():
        made[name] = made.get(name, {}) | options
    return made


def train(made, capsys, *arguments):
    file = f"{made['output']['folder']}.json"
    with open(file, "w") as f:
        json.dump(made, f)
    code = main(["train", "--config", file, "--quiet", *arguments])
    out, err = capsys.readouterr()
    return code, json.loads(out) if code == 0 else err


def test_text_on_disk_becomes_a_model_that_is_served_then_adapted(text, tmp_path, capsys):
    code, report = train(sections(text, tmp_path / "run"), capsys)
    assert code == 0 and report["steps"] == 20 and report["reason"] == "done"
    assert report["heldout_loss"] < 0.7 * np.log(300)
    # Started again with more steps, the run goes on from its last checkpoint.
    _, longer = train(sections(text, tmp_path / "run"), capsys, "--set", "train.steps=24")
    assert longer["steps"] == 24
    from aidx import LLM, SamplingParams

    llm = LLM(report["model"], max_model_len=32, num_blocks=9, block_size=16, warmup=False)
    (output,) = llm.generate(["the quick"], SamplingParams(temperature=0, max_tokens=4))
    assert len(output.outputs[0].token_ids) == 4
    # A LoRA of what was trained, on the same text.
    adapted = sections(text, tmp_path / "lora", lora={"rank": 2, "targets": ["qkv", "o"]})
    adapted["model"] = {"path": report["model"]}
    adapted["output"]["tensorboard"] = True
    code, tuned = train(adapted, capsys, "--set", "train.steps=10")
    assert code == 0 and tuned["heldout_loss"] < report["heldout_loss"]
    assert list((tmp_path / "lora" / "tensorboard").glob("events*"))
    old, new = (load_model(path).params["layers"][0] for path in (report["model"], tuned["model"]))
    assert (old["down"] == new["down"]).all() and (old["o"] != new["o"]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modle": {}}, r"unknown sections \['modle'\]"),
        ({"data": {"lenght": 4}}, r"\[data\] has no \['lenght'\]"),
        ({"data": {"batch_size": "8"}}, "batch_size='8' is not"),
        ({"data": {"train": "a.txt"}}, "train='a.txt' is not"),
        ({"data": {"train": []}}, "names no file"),
        ({"train": {"epochs": 1}}, "needs epochs or steps"),
        ({"train": {"dtype": "int8"}}, "'int8' is not one of"),
        ({"optimizer": {"name": "adam"}}, "'adam' is not one of"),
        ({"optimizer": {"schedule": "step"}}, "'step' is not one of"),
        ({"model": {"path": "x"}}, "path .* or shape"),
        ({"model": {"tokenizer": None}}, "needs a tokenizer"),
        ({"lora": {"rank": 2}}, "needs a checkpoint"),
        ({"lora": {"rank": 0}}, "rank=0"),
        ({"data": {"heldout": []}, "output": {"patience": 2}}, "patience needs"),
        ({"data": {"train": ["no/such/file"]}}, "no/such/file"),
        ({"model": {"shape": {"dims": 3}}}, "not a LlamaConfig"),
    ],
)
def test_wrong_recipes_are_refused_in_one_line(text, tmp_path, capsys, changes, message):
    code, err = train(sections(text, tmp_path / "run", **changes), capsys)
    assert code == 1 and len(err.splitlines()) == 1
    assert re.search(message, err), err


def test_options_of_the_command_line_lie_over_the_file(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('[data]\ntrain = ["a"]\n')
    changes = ["data.length=7", "model.path=embedded", 'data.train=["b", "c"]']
    assert read_sections(str(file), changes) == {
        "data": {"train": ["b", "c"], "length": 7}, "model": {"path": "embedded"},
    }  # fmt: skip
    with pytest.raises(ValueError, match="length=7"):
        read_sections(str(file), ["length=7"])
    file.write_text("[data")
    with pytest.raises(ValueError, match="cannot be read"):
        read_sections(str(file), [])
    assert (
        Recipe.parse(
            {"model": {"path": "m"}, "data": {"train": ["a"]}, "train": {"epochs": 1}}
        ).train.epochs
        == 1
    )
