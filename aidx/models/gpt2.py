"""GPT-2: learned positions, LayerNorm with biases, multi-head attention, an ungated feed-forward.

Parameters, all `[in, out]` except the tables:

    embed      [V, D]
    pos_embed  [max_position_embeddings, D]
    layers[i]  attn_norm {scale, bias [D]}   qkv [D, N, 3, H]  qkv_bias [N, 3, H]
               o [N*H, D]  o_bias [D]
               mlp_norm {scale, bias [D]}    up [D, F]  up_bias [F]  down [F, D]  down_bias [D]
    norm       {scale, bias [D]}
    lm_head    [V, D]   (absent when tied, which GPT-2 is by default)
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..kernels.layers import layer_norm, residual_layer_norm
from ..typing import Array, Attend, Cache, Params
from .llama import ACTIVATIONS, linear, run_layers, select, unembed


@dataclasses.dataclass(frozen=True)
class GPT2Config:
    """Static shape and options of a GPT-2 decoder.

    Attributes:
      vocab_size: V.
      dim: D.
      ffn_dim: F.
      num_layers: L.
      num_heads: N; divides D.
      norm_eps: added to the variance in LayerNorm.
      max_position_embeddings: rows of the position table.
      max_model_len: the longest context that will be served, at most the table's; 0 takes that.
      tied: whether the embedding also unembeds.
      scale_attn_weights: whether scores are divided by sqrt(H).
      scale_attn_by_inverse_layer_idx: whether layer i's scores are also divided by i + 1.
      activation: of the feed-forward.

    Raises:
      ValueError: shapes that do not go together or an unknown activation.

    >>> GPT2Config(vocab_size=97, dim=32, ffn_dim=128, num_layers=2, num_heads=4).head_dim
    8
    """

    vocab_size: int
    dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    norm_eps: float = 1e-5
    max_position_embeddings: int = 1024
    max_model_len: int = 0
    tied: bool = True
    scale_attn_weights: bool = True
    scale_attn_by_inverse_layer_idx: bool = False
    activation: str = "gelu_new"
    model_type: str = "gpt2"

    def __post_init__(self):
        if self.max_model_len == 0:
            object.__setattr__(self, "max_model_len", self.max_position_embeddings)
        for field in ("vocab_size", "dim", "ffn_dim", "num_layers", "num_heads", "max_model_len"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be positive")
        if self.dim % self.num_heads:
            raise ValueError(f"{self.dim=} is not a multiple of {self.num_heads=}")
        if self.max_model_len > self.max_position_embeddings:
            raise ValueError(
                f"{self.max_model_len=} passes the table of learned positions: "
                f"{self.max_position_embeddings=}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")

    @property
    def num_kv_heads(self) -> int:
        """K = N: GPT-2 has no grouped queries."""
        return self.num_heads

    @property
    def head_dim(self) -> int:
        """H = D / N."""
        return self.dim // self.num_heads

    @property
    def windows(self) -> tuple[int | None, ...]:
        """No layer has a window."""
        return (None,) * self.num_layers

    def with_max_model_len(
        self, max_model_len: int, *, allow_long_max_model_len: bool = False
    ) -> "GPT2Config":
        """The same model for another longest context.

        Raises:
          ValueError: it is not positive, or longer than the table of learned positions, which
            `allow_long_max_model_len` cannot make longer.
        """
        del allow_long_max_model_len  # there is nothing beyond the table: the config refuses it
        if max_model_len < 1:
            raise ValueError(f"{max_model_len=} must be positive")
        return dataclasses.replace(self, max_model_len=max_model_len)


def param_shapes(config: GPT2Config) -> Params:
    """The parameter tree with a shape tuple at every leaf.

    >>> param_shapes(GPT2Config(97, 32, 128, 1, 4))["pos_embed"]
    (1024, 32)
    """
    c = config
    norm = {"scale": (c.dim,), "bias": (c.dim,)}
    layer = {
        "attn_norm": norm,
        "qkv": (c.dim, c.num_heads, 3, c.head_dim),
        "qkv_bias": (c.num_heads, 3, c.head_dim),
        "o": (c.dim, c.dim),
        "o_bias": (c.dim,),
        "mlp_norm": norm,
        "up": (c.dim, c.ffn_dim),
        "up_bias": (c.ffn_dim,),
        "down": (c.ffn_dim, c.dim),
        "down_bias": (c.dim,),
    }
    shapes: dict[str, Any] = {
        "embed": (c.vocab_size, c.dim),
        "pos_embed": (c.max_position_embeddings, c.dim),
        "layers": tuple(jax.tree.map(lambda s: s, layer) for _ in range(c.num_layers)),
        "norm": dict(norm),
    }
    return shapes if c.tied else shapes | {"lm_head": (c.vocab_size, c.dim)}


def forward(
    config: GPT2Config,
    params: Params,
    tokens: Array,
    positions: Array,
    attend: Attend,
    cache: Cache,
    *,
    logits_at: Array | None = None,
    hidden: bool = False,
    remat: Callable[[Callable], Callable] | None = None,
) -> tuple[Array, Cache]:
    """Logits of every token, or of those asked for; the arguments are `llama.forward`'s."""
    if tokens.shape != positions.shape:
        raise ValueError(f"{tokens.shape=} and {positions.shape=} differ")
    with jax.named_scope("embed"):
        x = jnp.take(params["embed"], tokens, axis=0, mode="clip")
        x = x + jnp.take(params["pos_embed"], positions, axis=0, mode="clip")

    def block(window, x, cache, i, p):
        return decoder_layer(config, p, x, attend, cache, i)

    x, cache = run_layers(block, params["layers"], config.windows, x, cache, remat)
    x = norm(select(x, logits_at), params["norm"], config)
    return (x if hidden else unembed(params, x)), cache


def decoder_layer(config, p, x, attend, cache, i):
    """One layer: `x += o(attention(norm(x)))`, then `x += down(act(up(norm(x))))`."""
    with jax.named_scope("attention"):
        qkv = linear(norm(x, p["attn_norm"], config), p["qkv"], p["qkv_bias"])  # [*B, T, N, 3, H]
        q, k, v = qkv[..., 0, :], qkv[..., 1, :], qkv[..., 2, :]
        if config.scale_attn_by_inverse_layer_idx:
            q = q / jnp.asarray(i + 1, q.dtype)  # as scale / (i + 1), also where i is traced
        scale = None if config.scale_attn_weights else 1.0
        out, cache = attend(cache, i, q, k, v, scale=scale)
        y = linear(out.reshape(*x.shape[:-1], -1), p["o"], p["o_bias"])
    with jax.named_scope("mlp"):
        scale, bias = p["mlp_norm"]["scale"], p["mlp_norm"]["bias"]
        y, x = residual_layer_norm(y, x, scale, bias, eps=config.norm_eps)
        y = linear(y, p["up"], p["up_bias"])
        x = x + linear(ACTIVATIONS[config.activation](y), p["down"], p["down_bias"])
    return x, cache


def norm(x, p, config):
    """LayerNorm with this layer's scale and bias."""
    return layer_norm(x, p["scale"], p["bias"], eps=config.norm_eps)
