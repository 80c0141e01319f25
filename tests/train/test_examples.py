"""The examples run, and do what they say."""

import importlib
import pathlib
import sys

import jax
import pytest
import tokenizers

from aidx.models import LlamaConfig, Model, Tokenizer, init_params, load_model, save_model

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in ("finetune", "lora", "train_nnx"):
        sys.modules.pop(name, None)


@pytest.mark.slow
def test_an_nnx_module_and_plain_functions_train_to_the_same_classifier(example):
    found = example("train_nnx").main(["--steps", "150"])
    assert found["nnx"]["accuracy"] > 0.9
    assert found["nnx"]["loss"] == pytest.approx(found["plain"]["loss"], rel=1e-3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A checkpoint of a byte model, and text."""
    folder = tmp_path_factory.mktemp("tiny")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=257, special_tokens=["<end>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([], trainer)
    config = LlamaConfig(257, 16, 32, 1, 2, 1, 8, tied=True)
    tokenizer = Tokenizer(backend, {"eos_token": "<end>"})
    params = init_params(config, jax.random.key(0))
    save_model(Model(config, params, tokenizer, eos_token_ids=(0,)), folder / "base")
    (folder / "text.txt").write_text("to be or not to be, that is the question\n" * 20)
    return folder


@pytest.mark.parametrize("name", ["lora", pytest.param("finetune", marks=pytest.mark.slow)])
def test_a_checkpoint_is_tuned_and_saved(example, tiny, tmp_path, capsys, name):
    arguments = [str(tiny / "text.txt"), "--model", str(tiny / "base"), "--out", str(tmp_path)]
    extra = {"finetune": ["--dtype", "float32"], "lora": ["--rank", "2"]}[name]
    sizes = ["--steps", "6", "--batch", "2", "--length", "16", "--learning-rate", "0.03"]
    example(name).main([*arguments, *extra, *sizes])
    loss = float(capsys.readouterr().out.split("loss ")[-1].split(";")[0])
    assert loss < 5.5  # ln 257 is 5.55
    base, tuned = (load_model(path) for path in (tiny / "base", tmp_path))
    assert (base.params["layers"][0]["o"] != tuned.params["layers"][0]["o"]).any()
    assert ((base.params["embed"] == tuned.params["embed"]).all()) == (name == "lora")
