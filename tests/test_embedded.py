"""The embedded checkpoints, and the script that trains them."""

import importlib
import json
import math
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers

from aidx.models import LlamaConfig, init_params, load_model, stack_layers

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def scripts():
    """The two modules under examples/, which is no package."""
    sys.path.insert(0, str(ROOT / "examples"))
    try:
        yield importlib.import_module("train_embedded"), importlib.import_module("stdlib_corpus")
    finally:
        sys.path.remove(str(ROOT / "examples"))


@pytest.fixture(scope="module")
def data(scripts, tmp_path_factory):
    """What `prepare` makes of six small modules."""
    _, corpus = scripts
    root, folder = tmp_path_factory.mktemp("lib"), tmp_path_factory.mktemp("data")
    for i in range(40):
        (root / f"file{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n\n\n" * 20)
    (root / "broken.py").write_bytes(b"# \xff\n")
    (root / "copy.py").write_bytes((root / "file1.py").read_bytes())
    (root / "site-packages").mkdir()
    (root / "site-packages" / "theirs.py").write_text("x = 1\n")
    return folder, corpus.prepare(folder, vocab_size=300, root=root), root


def test_the_corpus_is_distinct_files_of_the_standard_library(scripts, data):
    _, corpus = scripts
    folder, meta, root = data
    names = [name for name, _ in corpus.source_files(root)]
    assert names == sorted(names) and len(names) == 40
    assert "broken.py" not in names and "copy.py" in names  # the first of two equal files stays
    assert "file1.py" not in names
    held = [n for n in names if corpus.held_out(n)]
    assert held and meta["heldout"]["files"] == len(held)
    for part in ("train", "heldout"):
        tokens = np.fromfile(folder / f"{part}.bin", np.uint16)
        assert tokens.size == meta[part]["tokens"] and tokens.max() < meta["vocab_size"]
        assert (tokens == 0).sum() == meta[part]["files"]  # one end of text a document


def test_the_tokenizer_survives_any_text_and_splits_at_line_ends(scripts, data):
    tokenizer = tokenizers.Tokenizer.from_file(str(data[0] / "tokenizer.json"))
    for text in ("def f(x):\n    return x\n", "naïve 漢字 🙂 \t\r\n x", "\x00\x7f", "   lead"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text
    # A prompt may end after a line end or after the indentation without changing its tokens.
    whole = tokenizer.encode("def f(x):\n    return x").ids
    for prompt in ("def f(x):\n", "def f(x):\n    "):
        assert whole[: len(tokenizer.encode(prompt).ids)] == tokenizer.encode(prompt).ids


def test_the_schedule_warms_up_holds_and_falls_to_zero(scripts):
    train, _ = scripts
    rate = lambda step, progress: float(train.schedule(jnp.int32(step), jnp.float32(progress)))
    assert rate(0, 0) == pytest.approx(1 / train.WARMUP)
    assert rate(train.WARMUP, 0.1) == rate(10_000, 0.3) == 1.0
    rates = [rate(10_000, progress) for progress in (0.4, 0.6, 0.8, 1.0)]
    np.testing.assert_allclose(rates, [1, 2 / 3, 1 / 3, 0], atol=1e-6)
    assert rate(10_000, 1.5) == 0  # past the deadline


def test_dropout_keeps_the_mean_and_differs_between_layers(scripts):
    train, _ = scripts
    layer = lambda x, cache, params: (x + params, cache + 1)
    x = jnp.ones((64, 64))
    wrap = train.dropping(jax.random.key(0), 0.25)
    (first, cache), (second, _) = (wrap(layer)(x, 0, 2.0) for _ in range(2))
    assert cache == 1
    np.testing.assert_allclose(np.unique(first), [1, 1 + 2 / 0.75], rtol=1e-6)
    assert float((first == 1).mean()) == pytest.approx(0.25, abs=0.03)
    assert float(first.mean()) == pytest.approx(3.0, abs=0.1)
    assert (first != second).any()
    again, _ = train.dropping(jax.random.key(0), 0.25)(layer)(x, 0, 2.0)
    assert (first == again).all()


@pytest.mark.slow
def test_every_matrix_of_a_layer_is_orthogonalised_by_itself(scripts):
    train, _ = scripts
    config = LlamaConfig(64, 16, 24, 2, 4, 2, 8, tied=True)
    params = stack_layers(init_params(config, jax.random.key(0)))
    transform = train.optimizer(train.Recipe(weight_decay=0.0))
    updates, _ = transform.update(params, transform.init(params), params)
    qkv = np.asarray(updates["layers"]["qkv"])  # [L, D, K, G+2, H]
    for layer, kv, part in np.ndindex(2, 2, 4):
        singular = np.linalg.svd(qkv[layer, :, kv, part], compute_uv=False)
        assert (singular / (0.2 * 4)).min() > 0.5 and (singular / (0.2 * 4)).max() < 1.3


@pytest.mark.slow
def test_a_short_run_writes_two_checkpoints_that_load(scripts, data, tmp_path, monkeypatch):
    train, _ = scripts
    monkeypatch.setattr(train, "TINY", LlamaConfig(300, 16, 24, 1, 1, 1, 8, tied=True,
                                                   max_position_embeddings=32))  # fmt: skip
    train.main(["--stage", "train", "--tiny", "--data", str(data[0]), "--out", str(tmp_path),
                "--epochs", "0.5", "--draft-epochs", "0.5", "--batch", "4"])  # fmt: skip
    for name in ("embedded", "embedded-draft"):
        model = load_model(tmp_path / name)
        assert model.eos_token_ids == (0,) and model.config.tied
        assert model.tokenizer.encode_chat([{"role": "user", "content": "1 + 1"}])
        report = json.loads((tmp_path / name / "training.json").read_text())
        assert report["heldout_nll"] < math.log(300) - 0.2  # learned something
        assert report["steps"] <= report["planned_steps"] and report["recipe"]["batch"] == 4
    assert report["agreement_with_teacher"] > 0.2


# --- the checkpoints themselves ------------------------------------------------------------------

DATA = ROOT / "aidx" / "data"


@pytest.fixture(scope="module")
def models():
    return {name: load_model(DATA / name) for name in ("embedded", "embedded-draft")}


@pytest.mark.smoke
def test_the_embedded_checkpoints_are_small_and_share_a_tokenizer(models):
    limits = {"embedded": 12e6, "embedded-draft": 2e6}
    for name, limit in limits.items():
        assert sum(f.stat().st_size for f in (DATA / name).iterdir()) <= limit
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (DATA / "embedded" / file).read_bytes() == (
            DATA / "embedded-draft" / file
        ).read_bytes()
    target, draft = models["embedded"], models["embedded-draft"]
    assert target.vocab_size == draft.vocab_size == len(target.tokenizer)
    assert target.max_model_len == draft.max_model_len == 2048
    sizes = {n: sum(x.size for x in jax.tree.leaves(m.params)) for n, m in models.items()}
    assert 8 < sizes["embedded"] / sizes["embedded-draft"] < 12


def nats_a_token(model, tokens, scripts):
    train, _ = scripts
    logits, _ = jax.jit(model.forward, static_argnums=3)(
        model.params, tokens[:-1], jnp.arange(tokens.size - 1), unbatched, None
    )
    return float(train.losses(logits[None], tokens[None, 1:], None)[0])


def unbatched(cache, layer, q, k, v, *, window=None, scale=None, soft_cap=None, sinks=None):
    out = jax.nn.dot_product_attention(q[None], k[None], v[None], is_causal=True)
    return out[0], cache


def test_the_embedded_models_know_python(models, scripts):
    # Written for this test, in no standard library.
    source = """class Inventory:
    \"\"\"Count how many of each item there are.\"\"\"

    def __init__(self, items=None):
        self.items = dict(items or {})

    def add(self, name, count=1):
        if count < 0:
            raise ValueError("count must not be negative: %r" % count)
        self.items[name] = self.items.get(name, 0) + count

    def __len__(self):
        return sum(self.items.values())

    def __repr__(self):
        return "%s(%r)" % (self.__class__.__name__, self.items)
"""
    tokenizer = models["embedded"].tokenizer
    tokens = jnp.asarray(tokenizer.encode(source))
    assert tokenizer.decode(tokens.tolist()) == source
    bits = tokens.size / len(source) / math.log(2)
    target = nats_a_token(models["embedded"], tokens, scripts) * bits
    draft = nats_a_token(models["embedded-draft"], tokens, scripts) * bits
    shuffled = jax.random.permutation(jax.random.key(0), tokens)
    assert target < 1.0 and target < draft < 1.5
    assert nats_a_token(models["embedded"], shuffled, scripts) * bits > 3


def test_the_embedded_report_says_how_good_they_are():
    reports = {
        name: json.loads((DATA / name / "training.json").read_text())
        for name in ("embedded", "embedded-draft")
    }
    card = (DATA / "README.md").read_text()
    for report in reports.values():
        assert f"{report['heldout_nll']:.3f}" in card
        assert f"{report['heldout_bits_per_byte']:.3f}" in card
    assert f"{100 * reports['embedded-draft']['agreement_with_teacher']:.1f}%" in card
