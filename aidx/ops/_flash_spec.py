"""What a flash attention call is, once validated: a hashable `FlashSpec` and its `FlashOperands`.

Every implementation takes this pair: `forward(spec, operands) -> (out, lse)` with out
`[B, T, N, Hv]` in q's dtype and lse `[B, T, N]` f32, and
`backward(spec, operands, (out, lse), (d_out, d_lse)) -> FlashOperands` of cotangents, None where
the operand has none.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

from .attention_mask import ScalarFn


@dataclasses.dataclass(frozen=True)
class FlashAttentionConfig:
    """Tile sizes and defaults of `flash_attention`; None leaves the choice to the implementation.

    `block_size_q` and `block_size_kv` are query and key tokens per tile.  `precision` ("default" or
    "highest") is that of f32 matrix products: "default" lets the hardware round inputs (TF32).
    `causal`, `dropout_rate`, `scale` and `return_attention_weights` stand in for arguments
    that a call leaves at their defaults.

    >>> FlashAttentionConfig.memory_efficient().block_size_q
    32
    """

    block_size_q: int | None = None
    block_size_kv: int | None = None
    causal: bool = False
    dropout_rate: float = 0.0
    scale: float | None = None
    precision: str = "highest"
    return_attention_weights: bool = False

    def __post_init__(self):
        for name in ("block_size_q", "block_size_kv"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be positive, not {size}")
        if not 0.0 <= self.dropout_rate < 1.0:
            raise ValueError(f"dropout_rate must be in [0, 1), not {self.dropout_rate}")
        if self.precision not in ("default", "highest"):
            raise ValueError(f"precision must be 'default' or 'highest', not {self.precision!r}")

    @classmethod
    def default(cls) -> FlashAttentionConfig:
        """Tiles chosen by the implementation for the shape."""
        return cls()

    @classmethod
    def for_causal(cls) -> FlashAttentionConfig:
        """The preset "causal": a decoder's self-attention."""
        return cls(causal=True)

    @classmethod
    def memory_efficient(cls) -> FlashAttentionConfig:
        """Tiles of 32 x 32: the smallest temporaries."""
        return cls(block_size_q=32, block_size_kv=32)

    @classmethod
    def high_performance(cls) -> FlashAttentionConfig:
        """Tiles of 128 x 128."""
        return cls(block_size_q=128, block_size_kv=128)

    @classmethod
    def preset(cls, name: str) -> FlashAttentionConfig:
        """One of "default", "causal", "memory_efficient", "high_performance".

        >>> FlashAttentionConfig.preset("causal").causal
        True
        """
        presets = {
            "default": cls.default,
            "causal": cls.for_causal,
            "memory_efficient": cls.memory_efficient,
            "high_performance": cls.high_performance,
        }
        if name not in presets:
            raise ValueError(f"no preset {name!r}; there are {list(presets)}")
        return presets[name]()


@dataclasses.dataclass(frozen=True)
class FlashSpec:
    """The static half of a call.  A query at position p sees keys p - left .. p + right.

    The logit of a score is, in this order: scale * (q . k), soft cap, + bias, - slope * distance,
    score_mod; then the masks.
    """

    left: int | None
    right: int | None
    query_offset: int | None  # position of query 0 on the keys' axis; None: operands.q_positions
    scale: float
    soft_cap: float | None = None
    dropout_rate: float = 0.0
    dropout_broadcast: bool = False  # one dropout mask for all batches and heads
    score_mod: ScalarFn | None = None
    mask_mod: ScalarFn | None = None
    block_mask: tuple[int, int] | None = None  # tile sizes of operands.block_kinds
    block_mask_mod: ScalarFn | None = None
    deterministic: bool = False
    config: FlashAttentionConfig = FlashAttentionConfig()
    batch_period: int = 0  # > 0: the batch repeats with this period (a folded vmap axis)
    causal: bool = False
    return_lse: bool = False  # False: the caller drops lse
    packed: bool = False  # segment ids ascend (cu_seqlens)


class FlashOperands(NamedTuple):
    """The arrays of a call; `b` is 1 or B, a small `n`, `t` or `s` is 1 or the full size."""

    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, Hv]
    bias: Any = None  # [b, n, t, s] float
    alibi_slopes: Any = None  # [b, N] f32
    sinks: Any = None  # [b, N] f32
    mask: Any = None  # [b, n, t, s] bool
    q_lens: Any = None  # [b] i32
    kv_lens: Any = None  # [b] i32
    q_segments: Any = None  # [b, T] i32
    kv_segments: Any = None  # [b, S] i32
    q_positions: Any = None  # [b, T] i32
    q_borders: Any = None  # [b, sequences + 1] i32: cu_seqlens, from which the segments are made
    kv_borders: Any = None  # [b, sequences + 1] i32
    dropout_key: Any = None  # [b, 2] u32
    block_kinds: Any = None  # [b, n, T tiles, S tiles] i8
    key_ranges: Any = None  # [b, 2, T] i32: the block mask by query, see `BlockMask`
    query_ranges: Any = None  # [b, 2, S] i32: and by key
    score_captured: tuple[Any, ...] = ()
    mask_captured: tuple[Any, ...] = ()
    block_captured: tuple[Any, ...] = ()


NO_COTANGENTS = FlashOperands(None, None, None, score_captured=(), mask_captured=())
CAPTURED_FIELDS = FlashOperands._fields[-3:]
BATCHED_FIELDS = FlashOperands._fields[:-3]
