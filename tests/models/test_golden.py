"""aidx equals transformers: loaded from disk, every family and feature; and would notice if not."""

import dataclasses

import numpy as np
import pytest

import aidx.models.llama as llama
from aidx.models import load_model
from aidx.ops.rope import Rope
from tests.models.golden import (
    TOLERANCE,
    distance,
    golden_cases,
    greedy_tokens,
    prompt_logits,
)

SMOKE = ("llama_rope_llama3", "mistral_window", "qwen3", "gpt2")


CASES = [
    pytest.param(name, marks=[pytest.mark.smoke] if name in SMOKE else [])
    for name in golden_cases()
]


def load(name, directory, **config):
    case = golden_cases()[name]
    model = load_model(
        case.write(directory, **config), max_model_len=case.max_len, allow_long_max_model_len=True
    )
    return case, model


@pytest.mark.parametrize("name", CASES)
def test_logits_and_greedy_tokens_equal_transformers(name, tmp_path):
    case, model = load(name, tmp_path)
    logits = prompt_logits(model.config, model.params, case.tokens)
    assert logits.dtype == np.float32
    assert distance(logits, case) < TOLERANCE
    tokens = greedy_tokens(model.config, model.params, case.tokens, len(case.greedy))
    np.testing.assert_array_equal(tokens, case.greedy)


def without(rope, **changes):
    return lambda c: dataclasses.replace(c, rope=dataclasses.replace(rope, **changes))


# feature -> (a case that has it, the config or parameters with the feature broken)
THETA = 1000.0
PLAIN = Rope(theta=THETA)


def drop(*names):
    """Biases to zero, norm scales to one: what forgetting a tensor would do."""

    def change(path_leaf):
        name, leaf = path_leaf
        if name not in names:
            return leaf
        return np.zeros_like(leaf) if name.endswith("bias") else np.ones_like(leaf)

    return lambda params: (
        params
        | {"layers": tuple({k: change((k, v)) for k, v in p.items()} for p in params["layers"])}
    )


CONFIG_MUTATIONS = {
    "rope at all": ("llama", lambda c: dataclasses.replace(c, rope=Rope(theta=1e30))),
    "rope theta": ("llama", lambda c: dataclasses.replace(c, rope=Rope(theta=1100.0))),
    "linear rope": ("llama_rope_linear", without(PLAIN)),
    "dynamic rope": ("llama_rope_dynamic", without(PLAIN)),
    "dynamic rope's length": ("llama_rope_dynamic", lambda c: c.with_max_model_len(96)),
    "llama3 rope": ("llama_rope_llama3", without(PLAIN)),
    "yarn rope": ("llama_rope_yarn", without(PLAIN)),
    "yarn's factor on cos and sin": (
        "llama_rope_yarn",
        lambda c: dataclasses.replace(c, rope=dataclasses.replace(c.rope, attention_factor=1.0)),
    ),
    "yarn's truncation": (
        "llama_rope_yarn_options",
        lambda c: dataclasses.replace(c, rope=dataclasses.replace(c.rope, truncate=True)),
    ),
    "yarn's mscale": (
        "llama_rope_yarn_options",
        lambda c: dataclasses.replace(c, rope=dataclasses.replace(c.rope, mscale=None)),
    ),
    "window": ("mistral_window", lambda c: dataclasses.replace(c, windows=(None, None))),
    "window off by one": ("mistral_window", lambda c: dataclasses.replace(c, windows=(13, 13))),
    "windows per layer": (
        "qwen3_layer_types",
        lambda c: dataclasses.replace(c, windows=c.windows[::-1]),
    ),
    "max_window_layers": (
        "qwen2_max_window_layers",
        lambda c: dataclasses.replace(c, windows=c.windows[::-1]),
    ),
    "q/k norm": ("qwen3", lambda c: dataclasses.replace(c, qk_norm=False)),
    "norm epsilon": ("llama", lambda c: dataclasses.replace(c, norm_eps=0.1)),
    "activation": ("llama_mlp_bias", lambda c: dataclasses.replace(c, activation="silu")),
    "gpt2's score scale": (
        "gpt2_scaling",
        lambda c: dataclasses.replace(c, scale_attn_weights=True),
    ),
    "gpt2's scale per layer": (
        "gpt2_scaling",
        lambda c: dataclasses.replace(c, scale_attn_by_inverse_layer_idx=False),
    ),
    "gpt2's tanh gelu": ("gpt2", lambda c: dataclasses.replace(c, activation="silu")),
}
PARAM_MUTATIONS = {
    "attention bias": ("llama_attention_bias", drop("qkv_bias")),
    "output bias": ("llama_attention_bias", drop("o_bias")),
    "mlp bias": ("llama_mlp_bias", drop("gate_up_bias")),
    "mlp output bias": ("llama_mlp_bias", drop("down_bias")),
    "qwen2's bias": ("qwen2", drop("qkv_bias")),
    "q norm's scale": ("qwen3", drop("q_norm")),
    "k norm's scale": ("qwen3", drop("k_norm")),
    "norm scales": ("llama", drop("attn_norm", "mlp_norm")),
    "gpt2's bias": ("gpt2", drop("qkv_bias")),
    "tying": ("llama_tied", lambda p: p | {"lm_head": p["embed"][::-1]}),
    "untying": ("llama", lambda p: p | {"lm_head": p["embed"]}),
    "positions of gpt2": ("gpt2", lambda p: p | {"pos_embed": 0 * p["pos_embed"]}),
    "kv head order": (
        "llama",
        lambda p: p | {"layers": tuple(x | {"qkv": x["qkv"][:, ::-1]} for x in p["layers"])},
    ),
    "gate and up": (
        "llama",
        lambda p: (
            p | {"layers": tuple(x | {"gate_up": x["gate_up"][:, ::-1]} for x in p["layers"])}
        ),
    ),
}


@pytest.mark.parametrize("feature", CONFIG_MUTATIONS)
def test_the_oracle_notices_a_changed_config(feature, tmp_path):
    name, mutate = CONFIG_MUTATIONS[feature]
    case, model = load(name, tmp_path)
    broken = mutate(model.config)
    assert broken != model.config
    assert distance(prompt_logits(broken, model.params, case.tokens), case) > 100 * TOLERANCE


@pytest.mark.parametrize("feature", PARAM_MUTATIONS)
def test_the_oracle_notices_a_changed_parameter(feature, tmp_path):
    name, mutate = PARAM_MUTATIONS[feature]
    case, model = load(name, tmp_path)
    logits = prompt_logits(model.config, mutate(model.params), case.tokens)
    assert distance(logits, case) > 100 * TOLERANCE


def test_tanh_gelu_is_told_from_the_exact_one():
    """They differ by less than the oracle's margin for a mutation, so they are told apart here."""
    x = np.linspace(-3, 3, 101, dtype=np.float32)
    new, exact = (np.asarray(llama.ACTIVATIONS[k](x)) for k in ("gelu_new", "gelu"))
    want = 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(new, want, atol=1e-6)
    assert np.abs(new - exact).max() > 1e-4
