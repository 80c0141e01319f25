"""config.json: both spellings mean the same, what is unknown is refused by name."""

import dataclasses

import pytest

from aidx.models import GPT2Config, LlamaConfig
from aidx.models.hf import config_from_hf, config_to_hf, rope_from_hf
from aidx.models.model import PRESETS, num_params
from aidx.ops.rope import Rope
from tests.models.golden import golden_cases

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 96,
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
}


@pytest.mark.smoke
def test_both_spellings_of_the_rope_are_one():
    want = Rope(theta=5e5, type="llama3", **LLAMA3)
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}}
    middle = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **LLAMA3}}
    nested = {"rope_parameters": {"full_attention": new["rope_parameters"]}}
    for said in (old, middle, new, nested, new | middle):
        assert config_from_hf(LLAMA | said).rope == want


def test_defaults_are_those_of_transformers():
    config = config_from_hf(LLAMA)
    assert config.rope == Rope() and config.head_dim == 8 and config.norm_eps == 1e-6
    assert not config.tied and not config.qkv_bias and config.windows == (None,) * 3
    assert config_from_hf(LLAMA | {"rope_scaling": None, "head_dim": None}) == config
    short = {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}
    assert config_from_hf(short).num_kv_heads == 6
    mistral = {**LLAMA, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert config_from_hf(mistral).windows == (4096,) * 3
    assert config_from_hf(mistral | {"sliding_window": None}).windows == (None,) * 3
    qwen = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    assert config_from_hf(qwen | {"sliding_window": 9}).windows == (None,) * 3
    assert config_from_hf(qwen).qkv_bias and not config_from_hf(qwen).o_bias
    qwen3 = {**LLAMA, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    assert config_from_hf(qwen3).head_dim == 128 and config_from_hf(qwen3).qk_norm
    assert config_from_hf(GPT2).tied and config_from_hf(GPT2).ffn_dim == 192


def test_dynamic_rope_compares_with_max_position_embeddings():
    said = {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16}
    rope = config_from_hf(LLAMA | {"rope_scaling": said}).rope
    assert rope.original_max_position_embeddings == 64  # as transformers and vLLM do


def test_windows_per_layer():
    qwen = {**LLAMA, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}
    on = qwen | {"use_sliding_window": True, "sliding_window": 9}
    assert config_from_hf(on | {"max_window_layers": 1}).windows == (None, 9, 9)
    assert config_from_hf(on).windows == (None,) * 3  # max_window_layers is 28 by default
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    assert config_from_hf(on | {"layer_types": kinds}).windows == (9, None, 9)


@pytest.mark.parametrize(
    ("rope", "max_model_len"),
    [
        (None, 64),
        ({"type": "linear", "factor": 4}, 256),
        ({"type": "dynamic", "factor": 4}, 64),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}, 128),
        ({"type": "yarn", "original_max_position_embeddings": 16}, 64),
        ({"type": "llama3", **LLAMA3}, 64),
    ],
)
def test_max_model_len_is_the_stretched_context(rope, max_model_len):
    assert config_from_hf(LLAMA | {"rope_scaling": rope}).max_model_len == max_model_len


@pytest.mark.parametrize(
    ("rope", "longest"),
    [
        (None, 64),
        ({"type": "linear", "factor": 4}, 256),
        ({"type": "dynamic", "factor": 4}, 256),
        ({"type": "yarn", "factor": 4, "original_max_position_embeddings": 32}, 128),
        ({"type": "yarn", "original_max_position_embeddings": 16}, 64),
        ({"type": "llama3", **LLAMA3}, 64),
    ],
)
def test_a_context_beyond_what_the_model_is_made_for_is_asked_for_twice(rope, longest):
    config = config_from_hf(LLAMA | {"rope_scaling": rope})
    assert config.with_max_model_len(longest).max_model_len == longest
    message = f"max_model_len={longest + 1} is longer than the {longest} positions"
    with pytest.raises(ValueError, match=f"{message}.*max_position_embeddings=64"):
        config.with_max_model_len(longest + 1)
    longer = config.with_max_model_len(longest + 1, allow_long_max_model_len=True)
    assert longer.max_model_len == longest + 1


@pytest.mark.parametrize("name", list(golden_cases()))
def test_configs_survive_the_way_back(name):
    config = config_from_hf(golden_cases()[name].config)
    assert config_from_hf(config_to_hf(config)) == config


QWEN = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
LINEAR = {"type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "mamba"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ({"vocab_size": ...}, "lacks 'vocab_size'"),
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"rope_scaling": {"type": "longrope"}}, "rope type 'longrope'"),
        ({"rope_scaling": {"type": "linear"}}, "needs factor"),
        ({"rope_scaling": {"factor": 8.0}}, "has factor but no rope_type"),
        ({"rope_scaling": {"type": None, "factor": 8.0}}, "has factor but no rope_type"),
        ({"rope_scaling": LLAMA3}, "factor, high_freq_factor, low_freq_factor but no rope_type"),
        ({"rope_parameters": {"rope_theta": 1e4, "factor": 8.0}}, "has factor but no rope_type"),
        ({"rope_scaling": {"type": "default", "factor": 8.0}}, "factor=8.0"),
        ({"rope_scaling": {"type": "linear", "factor": "two"}}, "factor='two'"),
        ({"rope_scaling": {"type": "llama3", "factor": 8.0}}, "low_freq_factor, high_freq_factor"),
        ({"rope_scaling": {**LINEAR, "mrope_section": [1]}}, "mrope_section"),
        ({"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}, "disagree"),
        (
            {"rope_scaling": LINEAR, "rope_parameters": {"type": "linear", "factor": 3.0}},
            "disagree",
        ),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1.0}, "other": LINEAR}},
            "differ by layer type",
        ),
        ({"layer_types": ["sliding_attention"] * 3}, "no windows"),
        (QWEN | {"layer_types": ["full_attention"]}, "expected 3"),
        (QWEN | {"layer_types": ["chunked_attention"] * 3}, "chunked_attention"),
        (QWEN | {"layer_types": ["sliding_attention"] * 3}, "use_sliding_window=False"),
        ({"num_attention_heads": 5}, "not a multiple"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"num_attention_heads": 0}, "num_attention_heads=0, which is no positive integer"),
        ({"hidden_size": "48"}, "hidden_size='48'"),
        ({"max_position_embeddings": 0}, "max_position_embeddings=0"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps='small', which is no number"),
        ({"rope_scaling": [2.0]}, "rope_scaling=[2.0], which is no object"),
    ],
)
def test_what_cannot_be_run_is_refused_by_name(change, message):
    config = {k: v for k, v in (LLAMA | change).items() if v is not ...}
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        config_from_hf(config)


def test_gpt2_refusals_and_aliases():
    with pytest.raises(ValueError, match="add_cross_attention"):
        config_from_hf(GPT2 | {"add_cross_attention": True})
    with pytest.raises(ValueError, match="not a multiple"):
        config_from_hf(GPT2 | {"n_head": 5})
    renamed = {"n_embd": "hidden_size", "n_layer": "num_hidden_layers"}
    assert config_from_hf({renamed.get(k, k): v for k, v in GPT2.items()}) == config_from_hf(GPT2)
    for allow in (False, True):  # there are no positions to go on with
        with pytest.raises(ValueError, match=r"max_model_len=33 .*max_position_embeddings=32"):
            config_from_hf(GPT2).with_max_model_len(33, allow_long_max_model_len=allow)
    with pytest.raises(ValueError, match="max_model_len=0"):
        config_from_hf(GPT2).with_max_model_len(0)


def test_what_hugging_face_cannot_say_is_not_written():
    config = LlamaConfig(97, 32, 64, 2, 4, 2, 8)
    with pytest.raises(ValueError, match="qk_norm=True"):
        config_to_hf(dataclasses.replace(config, qk_norm=True))
    with pytest.raises(ValueError, match=r"windows=\(8, None\)"):
        config_to_hf(dataclasses.replace(config, model_type="mistral", windows=(8, None)))
    assert isinstance(config_from_hf(config_to_hf(GPT2Config(97, 32, 64, 2, 4))), GPT2Config)


def test_an_older_spelling_beside_the_newer_one_is_no_contradiction():
    both = {"rope_parameters": {"rope_type": "linear", **LINEAR}, "rope_scaling": LINEAR}
    assert rope_from_hf(both, 64) == Rope(type="linear", factor=2.0)


def test_presets_have_the_released_sizes():
    assert num_params(PRESETS["llama-3.2-1b"]) == 1_235_814_400
    assert num_params(PRESETS["llama-3.1-8b"]) == 8_030_261_248
