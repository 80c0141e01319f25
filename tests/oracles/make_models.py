"""What transformers computes with tiny random checkpoints: the golden values of tests/models.

    python tests/oracles/make_models.py --out tests/oracles                  # the committed npz
    python tests/oracles/make_models.py --out DIR --grid pairwise --seed 7   # a wider grid

Needs torch, transformers and numpy, not aidx.  Each case stores its config.json, the names and
shapes of its tensors, the seed of their values (weights.py), a prompt, the float32 logits of every
prompt position and 64 greedy tokens; values are not stored, so the files stay small.
"""

import argparse
import itertools
import json
import pathlib
import random

import numpy as np
import torch
import transformers
from weights import draw, draw_tokens

PROMPT, GREEDY = 40, 64
SMALL_GAP = 3e-4  # of the largest logit: below it the greedy token is a matter of rounding
torch.set_num_threads(1)  # the models are tiny

ROPES = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 3.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
}
ORIGINAL_LEN = {"linear": 32, "dynamic": 32, "llama3": 128, "yarn": 128, "default": 128}


def llama_like(model_type, kv_heads=2, rope="default", **options):
    """A config of the Llama family; the prompt passes the original length of a scaled rope."""
    config = {
        "model_type": model_type,
        "vocab_size": 96,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4 if kv_heads == 4 else 8,  # G = 1, 4, 8
        "num_key_value_heads": kv_heads,
        "head_dim": 16,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": ORIGINAL_LEN[rope],
        "rope_theta": 1000.0,
        "rope_scaling": ROPES[rope],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    return config | options


def gpt2_like(**options):
    return {
        "model_type": "gpt2",
        "vocab_size": 96,
        "n_embd": 48,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 112,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    } | options


def golden_cases():
    """One case per feature, so that a failure names the feature."""
    llama, mistral = "llama", "mistral"
    yarn = ROPES["yarn"]
    windows = {"use_sliding_window": True, "sliding_window": 12}
    return {
        "llama": llama_like(llama),
        "llama_mha": llama_like(llama, kv_heads=4),
        "llama_mqa": llama_like(llama, kv_heads=1),
        "llama_tied": llama_like(llama, tie_word_embeddings=True),
        "llama_attention_bias": llama_like(llama, attention_bias=True),
        "llama_mlp_bias": llama_like(llama, mlp_bias=True, hidden_act="gelu"),
        "llama_rope_linear": llama_like(llama, rope="linear"),
        "llama_rope_dynamic": llama_like(llama, rope="dynamic"),
        "llama_rope_llama3": llama_like(llama, rope="llama3"),
        "llama_rope_yarn": llama_like(llama, rope="yarn"),
        "llama_rope_yarn_options": llama_like(
            llama,
            rope="yarn",
            rope_scaling=yarn
            | {"beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}
            | {"mscale": 1.3, "mscale_all_dim": 0.4},
        ),
        "llama_rope_yarn_factor": llama_like(
            llama, rope="yarn", rope_scaling=yarn | {"attention_factor": 1.5}
        ),
        "mistral_window": llama_like(mistral, sliding_window=12),
        "mistral_full_mqa": llama_like(mistral, kv_heads=1, sliding_window=None),
        "qwen2": llama_like("qwen2", kv_heads=1, tie_word_embeddings=True),
        "qwen2_max_window_layers": llama_like("qwen2", max_window_layers=1, **windows),
        "qwen2_yarn": llama_like("qwen2", rope="yarn", kv_heads=4),
        "qwen3": llama_like("qwen3", head_dim=32),
        "qwen3_tied_bias": llama_like("qwen3", attention_bias=True, tie_word_embeddings=True),
        "qwen3_layer_types": llama_like(
            "qwen3", layer_types=["sliding_attention", "full_attention"], **windows
        ),
        "gpt2": gpt2_like(),
        "gpt2_untied": gpt2_like(tie_word_embeddings=False, n_inner=64),
        "gpt2_scaling": gpt2_like(
            scale_attn_weights=False,
            scale_attn_by_inverse_layer_idx=True,
            activation_function="relu",
        ),
    }


def pairwise_cases(seed):
    """Every pair of option values of a family occurs in some case (greedy covering array)."""
    rope, bias, window = (
        ("rope", list(ROPES)),
        ("attention_bias", [False, True]),
        ("window", [0, 9]),
    )
    common = [("kv_heads", [4, 2, 1]), ("tie_word_embeddings", [False, True])]
    options = {
        "llama": [*common, rope, bias, ("mlp_bias", [False, True]), ("head_dim", [16, 32])],
        "mistral": [*common, rope, window],
        "qwen2": [*common, rope, ("windowed_from", [None, 0, 1])],
        "qwen3": [*common, rope, bias, ("windowed_from", [None, 0, 1])],
    }
    cases = {}
    for family, axes in options.items():
        for j, chosen in enumerate(covering_array(axes, random.Random(seed))):
            cases[f"{family}_{j}"] = expand(family, dict(chosen))
    axes = [
        ("tie_word_embeddings", [False, True]),
        ("scale_attn_weights", [False, True]),
        ("scale_attn_by_inverse_layer_idx", [False, True]),
        ("activation_function", ["gelu_new", "gelu", "relu"]),
    ]
    for j, chosen in enumerate(covering_array(axes, random.Random(seed))):
        cases[f"gpt2_{j}"] = gpt2_like(**chosen)
    return cases


def expand(family, chosen):
    if window := chosen.pop("window", None):
        chosen["sliding_window"] = window
    elif family == "mistral":
        chosen["sliding_window"] = None
    first = chosen.pop("windowed_from", None)
    if first is not None:
        chosen |= {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": first}
    return llama_like(family, **chosen)


def covering_array(axes, rng):
    names = [name for name, _ in axes]
    open_pairs = {
        ((a, va), (b, vb))
        for (a, xs), (b, ys) in itertools.combinations(axes, 2)
        for va, vb in itertools.product(xs, ys)
    }
    while open_pairs:
        best, covered = None, -1
        for _ in range(50):
            row = {name: rng.choice(values) for name, values in axes}
            a, b = rng.choice(sorted(open_pairs, key=repr))
            row |= dict([a, b])
            count = len(pairs_of(row, names) & open_pairs)
            if count > covered:
                best, covered = row, count
        open_pairs -= pairs_of(best, names)
        yield best


def pairs_of(row, names):
    return set(itertools.combinations([(name, row[name]) for name in names], 2))


def reference(config, seed, max_len):
    """transformers' model with drawn weights; `dynamic` frequencies are fixed at max_len."""
    torch.manual_seed(0)
    said = {k: v for k, v in config.items() if k != "model_type"}
    hf = transformers.AutoConfig.for_model(config["model_type"], **json.loads(json.dumps(said)))
    model = transformers.AutoModelForCausalLM.from_config(hf, attn_implementation="eager")
    model = model.float().eval()
    std = 0.1 + 0.05 * (seed % 4)
    tensors = {}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            value = draw(seed, name, tuple(parameter.shape), std)
            parameter.copy_(torch.from_numpy(value))
            tensors[name] = list(parameter.shape)
    rotary = getattr(model.model if hasattr(model, "model") else model, "rotary_emb", None)
    if rotary is not None and rotary.rope_type == "dynamic":
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        inv_freq, factor = ROPE_INIT_FUNCTIONS["dynamic"](hf, "cpu", seq_len=max_len)
        rotary.inv_freq, rotary.attention_scaling, rotary.rope_type = inv_freq, factor, "default"
    return model, tensors, std


@torch.no_grad()
def run(config, seed):
    """Arrays of one case; None where two tokens are too close for greedy decoding to be defined."""
    max_len = PROMPT + GREEDY
    model, tensors, std = reference(config, seed, max_len)
    tokens = draw_tokens(seed, PROMPT, config["vocab_size"])
    ids = torch.from_numpy(tokens).long()[None]
    logits = model(ids, use_cache=False).logits[0].numpy()
    for _ in range(GREEDY):
        last = model(ids, use_cache=False).logits[0, -1]
        top = last.topk(2).values
        if top[0] - top[1] < SMALL_GAP * np.abs(logits).max():
            return None
        ids = torch.cat([ids, last.argmax().reshape(1, 1)], dim=1)
    meta = {"config": config, "tensors": tensors, "seed": seed, "std": std, "max_len": max_len}
    return {
        "meta": np.array(json.dumps(meta)),
        "tokens": tokens,
        "logits": logits.astype(np.float32),
        "greedy": ids[0, PROMPT:].numpy().astype(np.int32),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--grid", choices=["golden", "pairwise"], default="golden")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cases = golden_cases() if args.grid == "golden" else pairwise_cases(args.seed)
    files = {}
    for j, (name, config) in enumerate(cases.items()):
        seeds = itertools.count(args.seed * 10_000 + j * 100)
        arrays = next(a for a in (run(config, seed) for seed in seeds) if a is not None)
        family = config["model_type"]
        files.setdefault(family, {}).update({f"{name}/{k}": v for k, v in arrays.items()})
    for family, arrays in files.items():
        np.savez_compressed(args.out / f"models_{family}.npz", **arrays)
        print(family, len(arrays) // 4, "cases")


if __name__ == "__main__":
    main()
