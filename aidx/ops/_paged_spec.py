"""What a paged attention call is, once validated: a hashable `PagedSpec` and its `PagedOperands`.

Every implementation takes this pair, `forward(spec, operands) -> (out [T, N, Hv], lse [T, N] f32)`;
lse is the natural log-sum-exp without the sink, -inf where a query sees no key.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple


@dataclasses.dataclass(frozen=True)
class PagedAttentionConfig:
    """Tile sizes; None leaves the choice to the implementation.

    `block_size_q` is query tokens of a tile, `chunk_size_kv` keys read at a time (rounded up to
    whole blocks).

    >>> PagedAttentionConfig(chunk_size_kv=256).chunk_size_kv
    256
    """

    block_size_q: int | None = None
    chunk_size_kv: int | None = None

    def __post_init__(self):
        for name in ("block_size_q", "chunk_size_kv"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} must be positive, not {size}")


@dataclasses.dataclass(frozen=True)
class PagedSpec:
    """The static half of a call."""

    scale: float
    max_q: int
    window: int | None = None
    soft_cap: float | None = None
    deterministic: bool = False
    return_lse: bool = False  # False: the caller drops lse
    tokens_first: bool = False  # pools are [P, block_size, K, H]
    config: PagedAttentionConfig = PagedAttentionConfig()


class PagedOperands(NamedTuple):
    """The arrays of a call."""

    q: Any  # [T, N, H]
    k_pool: Any  # [P, K, block_size, H]
    v_pool: Any  # [P, K, block_size, Hv]
    block_tables: Any  # [R, M] i32
    context_lens: Any  # [R] i32
    q_indptr: Any  # [R + 1] i32
    positions: Any = None  # [T] i32
    alibi_slopes: Any = None  # [N] f32
    sinks: Any = None  # [N] f32
    tree_mask: Any = None  # [T, words] u32
    k_scale: Any = None  # [P, K, block_size] or [K] f32
    v_scale: Any = None
    shared_tables: Any = None  # [C, M'] i32
    shared_lens: Any = None  # [C] i32
    shared_group: Any = None  # [R] i32
