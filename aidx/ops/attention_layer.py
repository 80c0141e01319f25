"""`FlashAttentionLayer`: self-attention as a flax.nnx module over `flash_attention`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from .attention_drop_ins import PRECISIONS
from .flash_attention import FlashAttentionConfig, flash_attention
from .registry import ImplementationChoice
from .rope import Rope, apply_rope, rope_angles, rope_frequencies

Array = jax.Array
POSITIONS = ("none", "rotary", "alibi")


def alibi_slopes(num_heads: int) -> Array:
    """The slopes of Press et al. (2022): a geometric series for powers of two, else interleaved.

    >>> print(alibi_slopes(4))
    [0.25       0.0625     0.015625   0.00390625]
    """
    whole = 1 << (num_heads.bit_length() - 1)
    series = lambda n, count, step: [2.0 ** (-8.0 * i / n) for i in range(1, step * count, step)]
    first = series(whole, whole + 1, 1)[:whole]
    rest = series(2 * whole, num_heads - whole + 1, 2)[: num_heads - whole]
    return jnp.array([*first, *rest], jnp.float32)


class AttentionDiagnostics(NamedTuple):
    """What a layer saw in one call, f32; weights are those before dropout."""

    lse: Array  # [B, T, N] log-sum-exp of the logits
    entropy: Array  # [N] mean entropy of a query's weights, nats
    largest: Array  # [N] mean of a query's largest weight
    distance: Array  # [N] mean distance that a query looks back (tokens)
    out_norm: Array  # [N] root mean square of the heads' outputs


class FlashAttentionLayer(nnx.Module):
    """Multi-head self-attention with grouped heads, positions and diagnostics.

    Args:
      features: D of the input and output `[B, T, D]`.
      num_heads: N query heads.
      num_kv_heads: K, N by default.
      head_dim: D // N by default.
      positions: "none", "rotary" (Su et al. 2021) or "alibi" (Press et al. 2022).
      rope: of "rotary"; theta 10000 by default.
      causal: a query sees no later token.
      window: as `flash_attention`'s.
      dropout_rate: of the attention weights, where a call has `deterministic=False`.
      use_bias: of the projections.
      dtype: of the computation; that of the input by default.
      param_dtype: of the parameters.
      precision: of f32 products, "highest" or "default".
      implementation: of `flash_attention`.
      rngs: for the parameters; the stream "dropout" serves calls that bring no key.

    Raises:
      ValueError: sizes that do not divide, an unknown kind of positions, an odd rotary width.

    >>> layer = FlashAttentionLayer(16, 4, num_kv_heads=2, positions="rotary", rngs=nnx.Rngs(0))
    >>> x = jnp.ones((1, 5, 16))
    >>> layer(x).shape, layer(x, diagnostics=True)[1].entropy.shape
    ((1, 5, 16), (4,))
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        positions: str = "none",
        rope: Rope | None = None,
        causal: bool = True,
        window: int | tuple[int, int] | None = None,
        dropout_rate: float = 0.0,
        use_bias: bool = False,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        precision: str = "highest",
        implementation: ImplementationChoice = None,
        rngs: nnx.Rngs,
    ):
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"{num_heads=} is no multiple of {kv_heads} key heads")
        if head_dim is None and features % num_heads:
            raise ValueError(f"{features=} do not split into {num_heads=}; give head_dim")
        head_dim = features // num_heads if head_dim is None else head_dim
        if positions not in POSITIONS:
            raise ValueError(f"positions must be one of {POSITIONS}, not {positions!r}")
        if rope is not None and positions != "rotary":
            raise ValueError(f"rope needs positions='rotary', not {positions!r}")
        if positions == "rotary" and head_dim % 2:
            raise ValueError(f"rotary positions need an even head_dim, not {head_dim}")
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {list(PRECISIONS)}, not {precision!r}")
        self.positions, self.causal, self.window = positions, causal, window
        self.rope = rope or Rope()
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, head_dim
        self.dropout_rate, self.implementation = dropout_rate, implementation
        self.config = FlashAttentionConfig(precision=PRECISIONS[precision])

        def project(inputs: Any, outputs: Any, axis: Any = -1) -> nnx.LinearGeneral:
            return nnx.LinearGeneral(
                inputs, outputs, axis=axis, use_bias=use_bias, dtype=dtype,
                param_dtype=param_dtype, rngs=rngs,
            )  # fmt: skip

        self.query = project(features, (num_heads, head_dim))
        self.key = project(features, (kv_heads, head_dim))
        self.value = project(features, (kv_heads, head_dim))
        self.out = project((num_heads, head_dim), features, (-2, -1))
        # a copy of the stream, so that the caller's is not shared between layers
        self.rngs = rngs.dropout.fork() if dropout_rate > 0 else None

    def __call__(
        self,
        x: Array,
        *,
        token_positions: Array | None = None,
        kv_lens: Array | None = None,
        segment_ids: Array | None = None,
        mask: Array | None = None,
        deterministic: bool = True,
        dropout_key: Array | None = None,
        diagnostics: bool = False,
    ) -> Any:
        """`[B, T, D]` to `[B, T, D]`; with `diagnostics` also `AttentionDiagnostics`.

        `token_positions` `[B, T]` are for rotary embedding, 0.. by default.  Diagnostics compute
        the whole matrix of weights: for debugging, not for training at length.
        """
        B, T, _ = x.shape
        q, k, v = self.query(x), self.key(x), self.value(x)
        if self.positions == "rotary":
            at = jnp.arange(T)[None] if token_positions is None else token_positions
            angles = rope_angles(at, *rope_frequencies(self.head_dim, self.rope, max_len=T))
            angles = tuple(jnp.broadcast_to(a, (B, *a.shape[1:])) for a in angles)
            q, k = apply_rope(q, *angles), apply_rope(k, *angles)
        elif token_positions is not None:
            raise ValueError(f"token_positions need positions='rotary', not {self.positions!r}")
        active = self.dropout_rate > 0 and not deterministic
        if active and dropout_key is None and self.rngs is not None:
            dropout_key = self.rngs()
        given: dict[str, Any] = dict(
            causal=self.causal,
            window=self.window,
            kv_lens=kv_lens,
            segment_ids=segment_ids,
            mask=mask,
            alibi_slopes=alibi_slopes(self.num_heads) if self.positions == "alibi" else None,
            config=self.config,
        )
        heads = flash_attention(
            q,
            k,
            v,
            dropout_rate=self.dropout_rate if active else 0.0,
            dropout_key=dropout_key if active else None,
            implementation=self.implementation,
            **given,
        )
        out = self.out(heads)
        return (out, diagnose(q, k, v, heads, **given)) if diagnostics else out


def diagnose(q: Array, k: Array, v: Array, heads: Array, **options: Any) -> AttentionDiagnostics:
    """Statistics of the weights of `flash_attention(q, k, v, **options)`; heads is its output."""
    _, lse, p = flash_attention(q, k, v, return_lse=True, return_weights=True, **options)
    log = jnp.where(p > 0, jnp.log(jnp.where(p > 0, p, 1.0)), 0.0)
    T, S = p.shape[-2:]
    away = jnp.abs(jnp.arange(T)[:, None] + (S - T) - jnp.arange(S)[None]).astype(jnp.float32)
    mean = lambda x: x.mean((0, 2))
    return AttentionDiagnostics(
        lse=lse,
        entropy=mean(-(p * log).sum(-1)),
        largest=mean(p.max(-1)),
        distance=mean(jnp.einsum("bnts,ts->bnt", p, away)),
        out_norm=jnp.sqrt((heads.astype(jnp.float32) ** 2).mean((0, 1, 3))),
    )
