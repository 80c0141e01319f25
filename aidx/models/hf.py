"""What Hugging Face calls things: config.json and tensor names, in both directions.

`config_from_hf` and `config_to_hf` translate config.json; `tensor_table` lists every parameter
with the tensors it is made of.  Loading and saving read the same table, so they cannot disagree.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

from ..ops.rope import ROPE_TYPES, Rope
from .gpt2 import GPT2Config
from .llama import ACTIVATIONS, LlamaConfig

LLAMA_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ARCHITECTURES = {**LLAMA_TYPES, "gpt2": "GPT2LMHeadModel"}

# Numbers of config.json that count something.
_COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
    *("num_attention_heads", "num_key_value_heads", "max_position_embeddings"),
    *("n_embd", "n_inner", "n_layer", "n_head", "n_positions"),
)

# Keys of the rope dictionary that are understood; any other could change the maths unnoticed.
_ROPE_FIELDS = {f.name for f in dataclasses.fields(Rope)} - {"theta", "type"}
_ROPE_SCALING = _ROPE_FIELDS - {"original_max_position_embeddings"}
_ROPE_KEYS = _ROPE_FIELDS | {"rope_theta", "rope_type", "finetuned"}


def config_from_hf(hf: Mapping[str, Any]) -> LlamaConfig | GPT2Config:
    """The static config that a config.json describes, in either spelling of its rope and dtype.

    Raises:
      ValueError: an unknown architecture, rope type, activation or option, or a missing field; the
        message names it.

    >>> config_from_hf({"model_type": "llama", "vocab_size": 97, "hidden_size": 32,
    ...                 "intermediate_size": 64, "num_hidden_layers": 2,
    ...                 "num_attention_heads": 4}).num_kv_heads
    4
    """
    model_type = _model_type(hf)
    if hf.get("quantization_config"):
        raise ValueError(
            f"quantised checkpoints are not supported: {hf['quantization_config']=}; "
            "save a dequantised copy with transformers"
        )
    _check_numbers(hf)
    try:
        return _gpt2_from_hf(hf) if model_type == "gpt2" else _llama_from_hf(hf, model_type)
    except KeyError as error:
        raise ValueError(f"config.json of a {model_type} model lacks {error}") from error


def _check_numbers(hf: Mapping[str, Any]) -> None:
    for name in _COUNTS:
        said = hf.get(name)
        if said is not None and (isinstance(said, bool) or not isinstance(said, int) or said < 1):
            raise ValueError(f"config.json says {name}={said!r}, which is no positive integer")
    for name in ("rms_norm_eps", "layer_norm_epsilon"):
        if not isinstance(hf.get(name, 0.0), int | float):
            raise ValueError(f"config.json says {name}={hf[name]!r}, which is no number")
    for name in ("rope_parameters", "rope_scaling"):
        if not isinstance(hf.get(name) or {}, Mapping):
            raise ValueError(f"config.json says {name}={hf[name]!r}, which is no object")


def _model_type(hf: Mapping[str, Any]) -> str:
    architectures = hf.get("architectures") or []
    by_architecture = {name: model_type for model_type, name in ARCHITECTURES.items()}
    model_type = hf.get("model_type") or next(
        (by_architecture[a] for a in architectures if a in by_architecture), None
    )
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"unknown architecture: {hf.get('model_type')=}, {architectures=}; "
            f"known: {', '.join(sorted(ARCHITECTURES))}"
        )
    base = ARCHITECTURES[model_type].removesuffix("ForCausalLM").removesuffix("LMHeadModel")
    allowed = {ARCHITECTURES[model_type], f"{base}Model"}
    if architectures and not allowed & set(architectures):
        raise ValueError(f"{architectures=} is not a causal language model ({sorted(allowed)})")
    return model_type


# --- config: the Llama family ---------------------------------------------------------------


def _llama_from_hf(hf: Mapping[str, Any], model_type: str) -> LlamaConfig:
    num_heads, L = hf["num_attention_heads"], hf["num_hidden_layers"]
    default_len = {"llama": 2048, "mistral": 131072}.get(model_type, 32768)
    max_positions = hf.get("max_position_embeddings") or default_len
    rope = rope_from_hf(hf, max_positions)
    bias = bool(hf.get("attention_bias", False)) if model_type in ("llama", "qwen3") else False
    default_kv_heads = 8 if model_type == "mistral" else None
    default_head_dim = 128 if model_type == "qwen3" else hf["hidden_size"] // num_heads
    return LlamaConfig(
        model_type=model_type,
        vocab_size=hf["vocab_size"],
        dim=hf["hidden_size"],
        ffn_dim=hf["intermediate_size"],
        num_layers=L,
        num_heads=num_heads,
        num_kv_heads=hf.get("num_key_value_heads", default_kv_heads) or num_heads,
        head_dim=hf.get("head_dim") or default_head_dim,
        rope=rope,
        norm_eps=hf.get("rms_norm_eps", 1e-6),
        max_position_embeddings=max_positions,
        max_model_len=_stretched_len(rope, max_positions),
        windows=_windows(hf, model_type, L),
        tied=bool(hf.get("tie_word_embeddings", False)),
        qkv_bias=bias or model_type == "qwen2",
        o_bias=bias,
        mlp_bias=bool(hf.get("mlp_bias", False)) if model_type == "llama" else False,
        qk_norm=model_type == "qwen3",
        activation=_activation(hf, "hidden_act", "silu"),
    )


def _activation(hf: Mapping[str, Any], field: str, default: str) -> str:
    name = hf.get(field) or default
    if name not in ACTIVATIONS:
        raise ValueError(f"unknown {field} {name!r}; known: {', '.join(sorted(ACTIVATIONS))}")
    return name


def _stretched_len(rope: Rope, max_positions: int) -> int:
    """The context that the scaling makes of the original one.

    `dynamic` stays at the original: longer contexts cost quality at short ones, so they are asked
    for (`max_model_len`).
    """
    return max_positions if rope.type == "dynamic" else rope.longest_context(max_positions)


def _windows(hf: Mapping[str, Any], model_type: str, L: int) -> tuple[int | None, ...]:
    """Each layer's window: Mistral's is global, Qwen's per layer, Llama has none."""
    window = hf.get("sliding_window", 4096)
    layer_types = hf.get("layer_types")
    if model_type == "llama":
        if layer_types and set(layer_types) != {"full_attention"}:
            raise ValueError(f"a llama model has no windows, but config.json says {layer_types=}")
        return (None,) * L
    if model_type == "mistral":
        kinds = {"sliding_attention" if window else "full_attention"}
        if layer_types and set(layer_types) != kinds:
            raise ValueError(
                f"mistral has one window for all layers: sliding_window={window}, {layer_types=}"
            )
        return (window or None,) * L
    if not hf.get("use_sliding_window", False):
        window = None
    if layer_types is None:
        first = hf.get("max_window_layers", 28)
        return tuple(window if i >= first else None for i in range(L))
    unknown = set(layer_types) - {"full_attention", "sliding_attention"}
    if unknown or len(layer_types) != L:
        raise ValueError(f"{layer_types=}: expected {L} of full_attention, sliding_attention")
    if window is None and "sliding_attention" in layer_types:
        raise ValueError(
            f"{layer_types=} asks for windows, but use_sliding_window="
            f"{hf.get('use_sliding_window', False)} and sliding_window={hf.get('sliding_window')}"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in layer_types)


def rope_from_hf(hf: Mapping[str, Any], max_positions: int) -> Rope:
    """The rotary embedding of a config.json: `rope_parameters`, or `rope_theta` + `rope_scaling`.

    Raises:
      ValueError: an unknown type or key, a missing number, or two spellings that disagree.

    >>> rope_from_hf({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, 64)
    Rope(theta=500000.0, type='linear', factor=2.0, ...)
    """
    new, old = _one_rope(hf.get("rope_parameters")), _one_rope(hf.get("rope_scaling"))
    if new and old and any(new.get(k, v) != v for k, v in old.items()):
        raise ValueError(f"rope_parameters={new} and rope_scaling={old} disagree")
    said = {**new, **old}
    kind = said.get("rope_type") or "default"
    if not said.get("rope_type") and (scaling := sorted(said.keys() & _ROPE_SCALING)):
        raise ValueError(f"the rotary embedding has {', '.join(scaling)} but no rope_type: {said}")
    if kind == "default" and said.get("factor") not in (None, 1):
        raise ValueError(f"rope type 'default' does not scale, but factor={said['factor']}: {said}")
    if kind not in ROPE_TYPES:
        raise ValueError(f"unknown rope type {kind!r}; known: {', '.join(ROPE_TYPES)}")
    partial = said.pop("partial_rotary_factor", hf.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor={partial}: only whole heads are rotated")
    if unknown := set(said) - _ROPE_KEYS:
        raise ValueError(f"unknown keys {sorted(unknown)} of rope type {kind!r}: {said}")
    fields = {k: said[k] for k in _ROPE_FIELDS if said.get(k) is not None}
    original = hf.get("original_max_position_embeddings") or said.get(
        "original_max_position_embeddings"
    )
    fields["original_max_position_embeddings"] = {
        "dynamic": max_positions,  # what transformers and vLLM compare the context with
        "llama3": original or max_positions,
        "yarn": original or max_positions,
    }.get(kind)
    if kind == "yarn" and "factor" not in fields:
        fields["factor"] = max_positions / (original or max_positions)
    required = {"linear": ["factor"], "dynamic": ["factor"]}.get(kind, [])
    if kind == "llama3":
        required = ["factor", "low_freq_factor", "high_freq_factor"]
    if missing := [k for k in required if k not in fields]:
        raise ValueError(f"rope type {kind!r} needs {', '.join(missing)}: {said}")
    fields["theta"] = said.get("rope_theta") or hf.get("rope_theta") or 10000.0
    for key, value in fields.items():
        if key in ("original_max_position_embeddings", "truncate"):
            continue
        if not isinstance(value, int | float):
            raise ValueError(f"rope {key}={value!r} is not a number")
        fields[key] = float(value)
    return Rope(type=kind, **fields)


def _one_rope(said: Mapping[str, Any] | None) -> dict[str, Any]:
    """A flat rope dictionary; one nested by layer type is flat if all its entries are equal."""
    said = dict(said or {})
    nested = [v for v in said.values() if isinstance(v, Mapping)]
    if nested:
        if len(nested) != len(said) or any(dict(v) != dict(nested[0]) for v in nested):
            raise ValueError(f"rotary embeddings that differ by layer type: {said}")
        said = dict(nested[0])
    if old_spelling := said.pop("type", None):
        said.setdefault("rope_type", old_spelling)
    return said


# --- config: GPT-2 --------------------------------------------------------------------------


def _gpt2_from_hf(hf: Mapping[str, Any]) -> GPT2Config:
    if hf.get("add_cross_attention"):
        raise ValueError("add_cross_attention=True: only decoders without an encoder are supported")

    def said(name: str, alias: str) -> Any:
        return hf[alias] if alias in hf and name not in hf else hf[name]

    dim = said("n_embd", "hidden_size")
    return GPT2Config(
        vocab_size=hf["vocab_size"],
        dim=dim,
        ffn_dim=hf.get("n_inner") or 4 * dim,
        num_layers=said("n_layer", "num_hidden_layers"),
        num_heads=said("n_head", "num_attention_heads"),
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        max_position_embeddings=said("n_positions", "max_position_embeddings"),
        tied=bool(hf.get("tie_word_embeddings", True)),
        scale_attn_weights=bool(hf.get("scale_attn_weights", True)),
        scale_attn_by_inverse_layer_idx=bool(hf.get("scale_attn_by_inverse_layer_idx", False)),
        activation=_activation(hf, "activation_function", "gelu_new"),
    )


# --- config: back to Hugging Face -----------------------------------------------------------


def config_to_hf(config: LlamaConfig | GPT2Config) -> dict[str, Any]:
    """The config.json of a config, in the spelling that every version of transformers reads.

    Raises:
      ValueError: no Hugging Face architecture has this combination of options.

    >>> config_to_hf(GPT2Config(97, 32, 128, 2, 4))["n_embd"]
    32
    """
    hf = {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied,
    }
    if isinstance(config, GPT2Config):
        hf |= {
            "n_embd": config.dim,
            "n_inner": config.ffn_dim,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_positions": config.max_position_embeddings,
            "layer_norm_epsilon": config.norm_eps,
            "scale_attn_weights": config.scale_attn_weights,
            "scale_attn_by_inverse_layer_idx": config.scale_attn_by_inverse_layer_idx,
            "activation_function": config.activation,
        }
    else:
        hf |= _llama_to_hf(config)
    again = config_from_hf(hf).with_max_model_len(
        config.max_model_len, allow_long_max_model_len=True
    )
    if again != config:
        differ = [
            f.name
            for f in dataclasses.fields(config)
            if getattr(again, f.name) != getattr(config, f.name)
        ]
        raise ValueError(
            f"no {config.model_type} checkpoint of Hugging Face can say "
            + ", ".join(f"{name}={getattr(config, name)}" for name in differ)
        )
    return hf


def _llama_to_hf(config: LlamaConfig) -> dict[str, Any]:
    hf: dict[str, Any] = {
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": config.activation,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_theta": config.rope.theta,
        "rope_scaling": _rope_to_hf(config.rope),
    }
    if config.model_type in ("llama", "qwen3"):
        hf["attention_bias"] = config.o_bias
    if config.model_type == "llama":
        hf["mlp_bias"] = config.mlp_bias
        return hf
    window = next((w for w in config.windows if w), None)
    hf["sliding_window"] = window
    if config.model_type.startswith("qwen"):
        hf["use_sliding_window"] = window is not None
        hf["layer_types"] = ["sliding_attention" if w else "full_attention" for w in config.windows]
    return hf


def _rope_to_hf(rope: Rope) -> dict[str, Any] | None:
    used = {
        "default": (),
        "linear": ("factor",),
        "dynamic": ("factor",),
        "llama3": (
            "factor",
            "original_max_position_embeddings",
            "low_freq_factor",
            "high_freq_factor",
        ),
        "yarn": (
            "factor",
            "original_max_position_embeddings",
            "beta_fast",
            "beta_slow",
            "attention_factor",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    }[rope.type]
    said = {k: getattr(rope, k) for k in used if getattr(rope, k) is not None}
    return {"rope_type": rope.type, **said} if said else None


# --- tensors --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layout:
    """How Hugging Face's tensors become one parameter, and back.

    Both functions take the array module first (numpy on the host, jax.numpy on a device).
    """

    join: Callable[..., Any]
    split: Callable[..., tuple]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: its path in the tree, its tensors' names and shapes, and the layout."""

    path: tuple[str | int, ...]
    tensors: tuple[tuple[str, tuple[int, ...]], ...]
    layout: Layout


SAME = Layout(join=lambda xp, x: x, split=lambda xp, x: (x,))
TRANSPOSED = Layout(join=lambda xp, x: x.T, split=lambda xp, x: (x.T,))


def _fused_qkv(N: int, K: int, H: int) -> tuple[Layout, Layout]:
    """`q [N*H, D], k and v [K*H, D] -> [D, K, G+2, H]`, and the same for biases."""
    G = N // K

    def join_bias(xp, q, k, v):
        heads = [q.reshape(K, G, H), k.reshape(K, 1, H), v.reshape(K, 1, H)]
        return xp.concatenate(heads, axis=1)

    def split_bias(xp, x):
        return x[:, :G].reshape(N * H), x[:, G].reshape(K * H), x[:, G + 1].reshape(K * H)

    def join(xp, q, k, v):
        D = q.shape[1]
        heads = [q.reshape(K, G, H, D), k.reshape(K, 1, H, D), v.reshape(K, 1, H, D)]
        return xp.moveaxis(xp.concatenate(heads, axis=1), -1, 0)

    def split(xp, x):
        D, x = x.shape[0], xp.moveaxis(x, 0, -1)
        q, k, v = x[:, :G], x[:, G], x[:, G + 1]
        return q.reshape(N * H, D), k.reshape(K * H, D), v.reshape(K * H, D)

    return Layout(join, split), Layout(join_bias, split_bias)


GATE_UP = Layout(  # [F, D] twice -> [D, 2, F]
    join=lambda xp, gate, up: xp.stack([gate.T, up.T], axis=1),
    split=lambda xp, x: (x[:, 0].T, x[:, 1].T),
)
GATE_UP_BIAS = Layout(
    join=lambda xp, gate, up: xp.stack([gate, up]), split=lambda xp, x: (x[0], x[1])
)


def _fused_c_attn(N: int, H: int) -> tuple[Layout, Layout]:
    """GPT-2's `c_attn [D, 3*N*H] -> [D, N, 3, H]`, and its bias."""

    def join(xp, x):
        return xp.swapaxes(x.reshape(*x.shape[:-1], 3, N, H), -3, -2)

    def split(xp, x):
        return (xp.swapaxes(x, -3, -2).reshape(*x.shape[:-3], 3 * N * H),)

    return Layout(join, split), Layout(join, split)


def tensor_table(config: LlamaConfig | GPT2Config) -> list[Entry]:
    """Every parameter of the model with the Hugging Face tensors it is made of.

    >>> config = LlamaConfig(97, 32, 64, 1, 4, 2, 8, tied=True)
    >>> [name for name, shape in tensor_table(config)[2].tensors]
    ['model.layers.0.self_attn.q_proj.weight', 'model.layers.0.self_attn.k_proj.weight', ...]
    """
    return _gpt2_table(config) if isinstance(config, GPT2Config) else _llama_table(config)


def _llama_table(c: LlamaConfig) -> list[Entry]:
    D, F, N, K, H = c.dim, c.ffn_dim, c.num_heads, c.num_kv_heads, c.head_dim
    qkv, qkv_bias = _fused_qkv(N, K, H)
    table = [Entry(("embed",), (("model.embed_tokens.weight", (c.vocab_size, D)),), SAME)]
    for i in range(c.num_layers):
        attn, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"

        def add(key, layout, *tensors, i=i):
            table.append(Entry(("layers", i, key), tensors, layout))

        add("attn_norm", SAME, (f"model.layers.{i}.input_layernorm.weight", (D,)))
        heads = (("q", N), ("k", K), ("v", K))
        add("qkv", qkv, *((f"{attn}.{p}_proj.weight", (n * H, D)) for p, n in heads))
        if c.qkv_bias:
            add("qkv_bias", qkv_bias, *((f"{attn}.{p}_proj.bias", (n * H,)) for p, n in heads))
        if c.qk_norm:
            add("q_norm", SAME, (f"{attn}.q_norm.weight", (H,)))
            add("k_norm", SAME, (f"{attn}.k_norm.weight", (H,)))
        add("o", TRANSPOSED, (f"{attn}.o_proj.weight", (D, N * H)))
        if c.o_bias:
            add("o_bias", SAME, (f"{attn}.o_proj.bias", (D,)))
        add("mlp_norm", SAME, (f"model.layers.{i}.post_attention_layernorm.weight", (D,)))
        pair = ("gate", "up")
        add("gate_up", GATE_UP, *((f"{mlp}.{p}_proj.weight", (F, D)) for p in pair))
        add("down", TRANSPOSED, (f"{mlp}.down_proj.weight", (D, F)))
        if c.mlp_bias:
            add("gate_up_bias", GATE_UP_BIAS, *((f"{mlp}.{p}_proj.bias", (F,)) for p in pair))
            add("down_bias", SAME, (f"{mlp}.down_proj.bias", (D,)))
    table.append(Entry(("norm",), (("model.norm.weight", (D,)),), SAME))
    if not c.tied:
        table.append(Entry(("lm_head",), (("lm_head.weight", (c.vocab_size, D)),), SAME))
    return table


def _gpt2_table(c: GPT2Config) -> list[Entry]:
    D, F = c.dim, c.ffn_dim
    qkv, qkv_bias = _fused_c_attn(c.num_heads, c.head_dim)

    def norm(path, name):
        for key, suffix in (("scale", "weight"), ("bias", "bias")):
            table.append(Entry((*path, key), ((f"{name}.{suffix}", (D,)),), SAME))

    table = [
        Entry(("embed",), (("transformer.wte.weight", (c.vocab_size, D)),), SAME),
        Entry(("pos_embed",), (("transformer.wpe.weight", (c.max_position_embeddings, D)),), SAME),
    ]
    for i in range(c.num_layers):
        h = f"transformer.h.{i}"
        norm(("layers", i, "attn_norm"), f"{h}.ln_1")
        norm(("layers", i, "mlp_norm"), f"{h}.ln_2")
        # Conv1D keeps [in, out], as aidx does: nothing to transpose.
        for key, name, shape, layout in (
            ("qkv", "attn.c_attn.weight", (D, 3 * D), qkv),
            ("qkv_bias", "attn.c_attn.bias", (3 * D,), qkv_bias),
            ("o", "attn.c_proj.weight", (D, D), SAME),
            ("o_bias", "attn.c_proj.bias", (D,), SAME),
            ("up", "mlp.c_fc.weight", (D, F), SAME),
            ("up_bias", "mlp.c_fc.bias", (F,), SAME),
            ("down", "mlp.c_proj.weight", (F, D), SAME),
            ("down_bias", "mlp.c_proj.bias", (D,), SAME),
        ):
            table.append(Entry(("layers", i, key), ((f"{h}.{name}", shape),), layout))
    norm(("norm",), "transformer.ln_f")
    if not c.tied:
        table.append(Entry(("lm_head",), (("lm_head.weight", (c.vocab_size, D)),), SAME))
    return table


def canonical_name(config: LlamaConfig | GPT2Config, name: str) -> str:
    """The table's spelling of a tensor's name: base models save without their prefix.

    >>> canonical_name(GPT2Config(97, 32, 128, 2, 4), "h.0.ln_1.weight")
    'transformer.h.0.ln_1.weight'
    """
    prefix = "transformer." if isinstance(config, GPT2Config) else "model."
    if name.startswith((prefix, "lm_head.")):
        return name
    return prefix + name


def is_known_extra(config: LlamaConfig | GPT2Config, name: str) -> bool:
    """Whether a tensor (canonical name) is one that checkpoints carry and nobody needs.

    >>> is_known_extra(GPT2Config(97, 32, 128, 2, 4), "transformer.h.0.attn.bias")
    True
    """
    if name == "lm_head.weight":
        return config.tied
    if isinstance(config, GPT2Config):
        return bool(re.fullmatch(r"transformer\.h\.\d+\.attn\.(masked_)?bias", name))
    return bool(re.fullmatch(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq", name))
