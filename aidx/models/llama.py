"""The Llama family: Llama 2 and 3.x, Mistral, Qwen2, Qwen3.

One decoder: RMSNorm, rotary grouped-query attention, gated feed-forward, no token mixing but
`attend`.  What differs between the members is a field of `LlamaConfig`.

Parameters, all `[in, out]` except the two tables over the vocabulary:

    embed      [V, D]
    layers[i]  attn_norm [D]  qkv [D, K, G+2, H]  o [N*H, D]  (qkv_bias [K, G+2, H]  o_bias [D])
               (q_norm [H]  k_norm [H])
               mlp_norm [D]  gate_up [D, 2, F]  down [F, D]   (gate_up_bias [2, F]  down_bias [D])
    norm       [D]
    lm_head    [V, D]  (absent when tied: embed serves)

Query, key and value projections are one matmul, gate and up another: a decode step reads weights,
so fewer and larger matmuls are faster.  KV head k owns its G query heads, its key and its value
next to each other, and F is the last axis of gate_up: both split over devices without a shuffle.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..kernels.layers import gated, residual_rms_norm, rms_norm
from ..ops.rope import Rope, apply_rope, rope_angles, rope_frequencies
from ..typing import Array, Attend, Cache, Params

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
    "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
    "relu": jax.nn.relu,
}
GATES = {  # those that `gated` knows, by its names
    **{"silu": "silu", "swish": "silu", "gelu": "gelu"},
    **{"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"},
}


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Static shape and options of a Llama-family decoder.

    Attributes:
      model_type: Hugging Face's name of the member: llama, mistral, qwen2, qwen3.
      vocab_size: V.
      dim: D.
      ffn_dim: F.
      num_layers: L.
      num_heads: N.
      num_kv_heads: K; divides N.
      head_dim: H; independent of D / N.
      rope: the rotary embedding.
      norm_eps: added to the mean square in RMSNorm.
      max_position_embeddings: the context of config.json.
      max_model_len: the longest context that will be served; 0 takes max_position_embeddings.
      windows: per layer, how many keys a query sees with its own; None for all.
      tied: whether the embedding also unembeds.
      qkv_bias, o_bias, mlp_bias: whether these projections have biases.
      qk_norm: whether queries and keys of each head are RMS-normalised before the rotation.
      activation: of the gate.

    Raises:
      ValueError: shapes that do not go together or an unknown activation.

    >>> tiny = LlamaConfig(vocab_size=97, dim=32, ffn_dim=64, num_layers=2, num_heads=4,
    ...                    num_kv_heads=2, head_dim=8)
    >>> tiny.windows
    (None, None)
    """

    vocab_size: int
    dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    model_type: str = "llama"
    rope: Rope = dataclasses.field(default_factory=Rope)
    norm_eps: float = 1e-5
    max_position_embeddings: int = 2048
    max_model_len: int = 0
    windows: tuple[int | None, ...] = ()
    tied: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    activation: str = "silu"

    def __post_init__(self):
        if self.max_model_len == 0:
            object.__setattr__(self, "max_model_len", self.max_position_embeddings)
        if not self.windows:
            object.__setattr__(self, "windows", (None,) * self.num_layers)
        for field in ("vocab_size", "dim", "ffn_dim", "num_layers", "num_heads", "num_kv_heads"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field}={getattr(self, field)} must be positive")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads=} is not a multiple of {self.num_kv_heads=}")
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"{self.head_dim=} must be even and positive (rotary pairs)")
        if len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)=} differs from {self.num_layers=}")
        if any(w is not None and w < 1 for w in self.windows):
            raise ValueError(f"{self.windows=} must be positive or None")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is not one of {sorted(ACTIVATIONS)}")
        if self.max_model_len < 1:
            raise ValueError(f"{self.max_model_len=} must be positive")

    def with_max_model_len(
        self, max_model_len: int, *, allow_long_max_model_len: bool = False
    ) -> "LlamaConfig":
        """The same model for another longest context: `dynamic` frequencies change with it.

        Raises:
          ValueError: it is not positive, or longer than the rotation is made for and
            `allow_long_max_model_len` does not ask for that.
        """
        if max_model_len < 1:
            raise ValueError(f"{max_model_len=} must be positive")
        longest = self.rope.longest_context(self.max_position_embeddings)
        if max_model_len > longest and not allow_long_max_model_len:
            raise ValueError(
                f"{max_model_len=} is longer than the {longest} positions that the model is made "
                f"for (max_position_embeddings={self.max_position_embeddings}, rope type "
                f"{self.rope.type!r}): lower it, or say allow_long_max_model_len=True to go on "
                "where the text may lose its sense"
            )
        return dataclasses.replace(self, max_model_len=max_model_len)


def param_shapes(config: LlamaConfig) -> Params:
    """The parameter tree with a shape tuple at every leaf.

    >>> config = LlamaConfig(97, 32, 64, 1, 4, 2, 8, tied=True)
    >>> param_shapes(config)["layers"][0]["qkv"]
    (32, 2, 4, 8)
    """
    c, G = config, config.num_heads // config.num_kv_heads
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (c.dim,),
        "qkv": (c.dim, c.num_kv_heads, G + 2, c.head_dim),
        "o": (c.num_heads * c.head_dim, c.dim),
        "mlp_norm": (c.dim,),
        "gate_up": (c.dim, 2, c.ffn_dim),
        "down": (c.ffn_dim, c.dim),
    }
    if c.qkv_bias:
        layer["qkv_bias"] = (c.num_kv_heads, G + 2, c.head_dim)
    if c.o_bias:
        layer["o_bias"] = (c.dim,)
    if c.mlp_bias:
        layer |= {"gate_up_bias": (2, c.ffn_dim), "down_bias": (c.dim,)}
    if c.qk_norm:
        layer |= {"q_norm": (c.head_dim,), "k_norm": (c.head_dim,)}
    shapes: dict[str, Any] = {
        "embed": (c.vocab_size, c.dim),
        "layers": tuple(dict(layer) for _ in range(c.num_layers)),
        "norm": (c.dim,),
    }
    return shapes if c.tied else shapes | {"lm_head": (c.vocab_size, c.dim)}


def forward(
    config: LlamaConfig,
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
    """Logits of every token, or of those asked for; see `aidx.typing.Forward`.

    Args:
      config: static.
      params: the tree of this module's docstring; with `stack_layers` its layers are scanned.
      tokens: i32 `[*B, T]`.
      positions: i32 `[*B, T]`, each token's place in its own sequence.
      attend: mixes tokens and owns the cache.
      cache: what attend threads through.
      logits_at: i32 `[R]`, only for `[T]` calls: which tokens to unembed.
      hidden: return the final-normed hidden states instead of logits.
      remat: wraps each layer's function, as `jax.checkpoint`.

    Returns:
      `(logits f32 [*B, T, V] or [R, V], cache)`; hidden states `[*B, T, D]` in the parameters'
      dtype when hidden.

    Raises:
      ValueError: tokens and positions differ in shape, or logits_at with batched tokens.
    """
    if tokens.shape != positions.shape:
        raise ValueError(f"{tokens.shape=} and {positions.shape=} differ")
    with jax.named_scope("embed"):
        x = jnp.take(params["embed"], tokens, axis=0, mode="clip")
        frequencies = rope_frequencies(config.head_dim, config.rope, max_len=config.max_model_len)
        cos, sin = rope_angles(positions, *frequencies)

    def block(window, x, cache, i, p):
        return decoder_layer(config, p, x, cos, sin, attend, cache, i, window)

    x, cache = run_layers(block, params["layers"], config.windows, x, cache, remat)
    x = rms_norm(select(x, logits_at), params["norm"], eps=config.norm_eps)
    return (x if hidden else unembed(params, x)), cache


def decoder_layer(config, p, x, cos, sin, attend, cache, i, window):
    """One layer: `x += o(attention(norm(x)))`, then `x += down(act(gate(x)) * up(x))`."""
    with jax.named_scope("attention"):
        y = rms_norm(x, p["attn_norm"], eps=config.norm_eps)
        q, k, v = project_qkv(config, p, y)
        q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        out, cache = attend(cache, i, q, k, v, window=window)
        y = linear(out.reshape(*x.shape[:-1], -1), p["o"], p.get("o_bias"))
    with jax.named_scope("mlp"):
        y, x = residual_rms_norm(y, x, p["mlp_norm"], eps=config.norm_eps)
        y = gate(config.activation, linear(y, p["gate_up"], p.get("gate_up_bias")))
        x = x + linear(y, p["down"], p.get("down_bias"))
    return x, cache


def gate(activation: str, gate_up: Array) -> Array:
    """`act(gate) * up` of `[..., 2, F]`, by the name that config.json has.

    >>> gate("relu", jnp.array([[1.0, -1.0], [2.0, 3.0]])).tolist()
    [2.0, 0.0]
    """
    if activation in GATES:
        return gated(gate_up, activation=GATES[activation])
    gate, up = (half[..., 0, :] for half in jnp.split(gate_up, 2, axis=-2))
    return ACTIVATIONS[activation](gate) * up


def project_qkv(config, p, x):
    """`[*B, T, D] -> q [*B, T, N, H], k and v [*B, T, K, H]`, head-normalised where configured."""
    G = config.num_heads // config.num_kv_heads
    y = linear(x, p["qkv"], p.get("qkv_bias"))  # [*B, T, K, G+2, H]
    q, k, v = jnp.split(y, (G, G + 1), axis=-2)
    q = q.reshape(*x.shape[:-1], config.num_heads, config.head_dim)
    k, v = k[..., 0, :], v[..., 0, :]
    if config.qk_norm:
        q = rms_norm(q, p["q_norm"], eps=config.norm_eps)
        k = rms_norm(k, p["k_norm"], eps=config.norm_eps)
    return q, k, v


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """`x @ weight + bias`: x `[..., D]`, weight `[D, *out]`, bias `[*out]`; `[..., *out]`."""
    y = jnp.tensordot(x, weight, axes=1)
    if bias is None:
        return y
    return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def run_layers(block, layers, windows, x, cache, remat=None):
    """Thread (x, cache) through `block(window, x, cache, i, layer_params)` for all layers.

    A tuple of layers is unrolled: XLA then overlaps and fuses across layers, which inference wants
    (scanning costs 2-9 times as much per decode step on an H200).  A stacked tree is scanned, one
    scan per run of equal windows: one layer to compile and to rematerialise, which training wants.
    """
    wrap = remat or (lambda f: f)
    if isinstance(layers, tuple | list):
        for i, (window, p) in enumerate(zip(windows, layers, strict=True)):
            with jax.named_scope(f"layer_{i}"):
                x, cache = wrap(lambda x, cache, p, i=i, w=window: block(w, x, cache, i, p))(
                    x, cache, p
                )
        return x, cache
    for start, stop in runs(windows):
        body = wrap(lambda carry, ip, w=windows[start]: block(w, *carry, *ip))
        part = layers
        if (start, stop) != (0, len(windows)):
            part = jax.tree.map(lambda a, s=slice(start, stop): a[s], layers)
        indices = jnp.arange(start, stop, dtype=jnp.int32)
        with jax.named_scope(f"layers_{start}_{stop}"):
            (x, cache), _ = jax.lax.scan(
                lambda carry, ip, body=body: (body(carry, ip), None), (x, cache), (indices, part)
            )
    return x, cache


def runs(windows: tuple[int | None, ...]) -> list[tuple[int, int]]:
    """The half-open ranges of consecutive equal values.

    >>> runs((None, None, 8))
    [(0, 2), (2, 3)]
    """
    starts = [i for i, w in enumerate(windows) if i == 0 or w != windows[i - 1]]
    return list(zip(starts, [*starts[1:], len(windows)], strict=True))


def select(x: Array, logits_at: Array | None) -> Array:
    """Rows logits_at of x `[T, D]`; all of x for None."""
    if logits_at is None:
        return x
    if x.ndim != 2:
        raise ValueError(f"logits_at indexes the tokens of a [T] call, not of {x.shape[:-1]}")
    return jnp.take(x, logits_at, axis=0, mode="clip")


def unembed(params: Params, x: Array) -> Array:
    """`logits = x @ table.T`: x `[..., D]`, float32 `[..., V]`."""
    with jax.named_scope("unembed"):
        table = params.get("lm_head", params["embed"])
        return jnp.einsum("...d,vd->...v", x, table, preferred_element_type=jnp.float32)
