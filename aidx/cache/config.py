"""The geometry of a KV cache, and the geometries of known models."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from aidx.ops.write_kv import QUANTISED_MAX

STORAGE = ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn")

# name: (layers, heads, KV heads, head dim, context, window).  The window is what the model was
# trained with: it applies to every layer of the models listed here.
PRESETS: dict[str, tuple[int, int, int, int, int, int | None]] = {
    "gpt2": (12, 12, 12, 64, 1024, None),
    "gpt2-medium": (24, 16, 16, 64, 1024, None),
    "gpt2-large": (36, 20, 20, 64, 1024, None),
    "gpt2-xl": (48, 25, 25, 64, 1024, None),
    "llama-7b": (32, 32, 32, 128, 4096, None),
    "llama-13b": (40, 40, 40, 128, 4096, None),
    "llama-70b": (80, 64, 8, 128, 4096, None),
    "llama-3-8b": (32, 32, 8, 128, 8192, None),
    "llama-3-70b": (80, 64, 8, 128, 8192, None),
    "llama-3.1-8b": (32, 32, 8, 128, 131072, None),
    "llama-3.1-70b": (80, 64, 8, 128, 131072, None),
    "llama-3.2-1b": (16, 32, 8, 64, 131072, None),
    "llama-3.2-3b": (28, 24, 8, 128, 131072, None),
    "mistral-7b": (32, 32, 8, 128, 32768, 4096),
    "qwen2-0.5b": (24, 14, 2, 64, 32768, None),
    "qwen2-1.5b": (28, 12, 2, 128, 32768, None),
    "qwen2-7b": (28, 28, 4, 128, 32768, None),
    "qwen2-72b": (80, 64, 8, 128, 32768, None),
    "qwen2.5-0.5b": (24, 14, 2, 64, 32768, None),
    "qwen2.5-1.5b": (28, 12, 2, 128, 32768, None),
    "qwen2.5-3b": (36, 16, 2, 128, 32768, None),
    "qwen2.5-7b": (28, 28, 4, 128, 32768, None),
    "qwen2.5-14b": (48, 40, 8, 128, 32768, None),
    "qwen2.5-32b": (64, 40, 8, 128, 32768, None),
    "qwen2.5-72b": (80, 64, 8, 128, 32768, None),
    "qwen3-0.6b": (28, 16, 8, 128, 40960, None),
    "qwen3-1.7b": (28, 16, 8, 128, 40960, None),
    "qwen3-4b": (36, 32, 8, 128, 40960, None),
    "qwen3-8b": (36, 32, 8, 128, 40960, None),
    "qwen3-14b": (40, 40, 8, 128, 40960, None),
    "qwen3-32b": (64, 64, 8, 128, 40960, None),
}


@dataclasses.dataclass(frozen=True)
class KVCacheConfig:
    """What a cache must hold: how many layers, rows and tokens, and how a token is stored.

    Attributes:
        num_layers, num_heads, num_kv_heads, head_dim: the model's; num_heads is a multiple of
            num_kv_heads.
        max_seq_len: tokens that a row can hold when there is no window.
        max_batch: rows.
        window: a row keeps the last `window` tokens and forgets older ones (a ring buffer); one
            number for all layers or one entry per layer; None keeps everything.  A window wider
            than max_seq_len is none.
        rollback: tokens kept beyond the window, so that `truncate` can take back as many and the
            window before them is still whole.
        dtype: storage of K and V: bfloat16, float16, float32, or int8 or float8_e4m3fn with one f32
            scale per token and head.

    Raises:
        ValueError: a size below 1, heads that do not divide, a wrong number of windows, an unknown
            storage type.

    Example:
        >>> KVCacheConfig.for_model("llama-70b", max_batch=2).num_kv_heads
        8
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_seq_len: int = 2048
    max_batch: int = 1
    window: int | tuple[int | None, ...] | None = None
    rollback: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self):
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        sizes = ("num_layers", "num_heads", "num_kv_heads", "head_dim", "max_seq_len", "max_batch")
        for name in sizes:
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads=} is not a multiple of {self.num_kv_heads=}")
        if isinstance(self.window, tuple) and len(self.window) != self.num_layers:
            raise ValueError(f"{len(self.window)} windows for {self.num_layers=}")
        if any(window is not None and window < 1 for window in self.windows):
            raise ValueError(f"{self.window=}: a window holds at least 1 token")
        if self.rollback < 0:
            raise ValueError(f"{self.rollback=} must not be negative")
        if self.dtype not in STORAGE:
            raise ValueError(f"dtype={self.dtype!r} is none of {', '.join(STORAGE)}")

    @property
    def quantised(self) -> bool:
        """Whether values are stored with scales."""
        return jnp.dtype(self.dtype) in QUANTISED_MAX

    @property
    def windows(self) -> tuple[int | None, ...]:
        """The window of each layer, None where it would never fill."""
        windows = (
            self.window if isinstance(self.window, tuple) else (self.window,) * self.num_layers
        )
        return tuple(None if w is None or w > self.max_seq_len else w for w in windows)

    @property
    def capacities(self) -> tuple[int, ...]:
        """Slots per row in each layer's buffer: max_seq_len, or window + rollback."""
        return tuple(self.max_seq_len if w is None else w + self.rollback for w in self.windows)

    @classmethod
    def for_model(cls, name: str, **changes: Any) -> "KVCacheConfig":
        """The geometry of a known model; keywords replace single fields.

        Raises:
            ValueError: the name is unknown; the message lists the known ones.

        Example:
            >>> config = KVCacheConfig.for_model("mistral-7b", max_batch=4, dtype="int8")
            >>> config.window, config.head_dim, config.dtype
            (4096, 128, 'int8')
        """
        if name.lower() not in PRESETS:
            raise ValueError(f"unknown model {name!r}; known: {', '.join(PRESETS)}")
        layers, heads, kv_heads, head_dim, context, window = PRESETS[name.lower()]
        fields: dict[str, Any] = dict(
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_seq_len=context,
            window=window,
        )
        return cls(**{**fields, **changes})

    def bytes_per_token(self) -> int:
        """Bytes of K, V and scales that one token takes in all layers together."""
        item = jnp.dtype(self.dtype).itemsize
        scale = 4 if self.quantised else 0
        return 2 * self.num_layers * self.num_kv_heads * (self.head_dim * item + scale)

    def estimate_memory_bytes(self) -> int:
        """Bytes of the K and V buffers of a contiguous cache, scales included.

        Example:
            >>> KVCacheConfig.for_model("gpt2", max_batch=8).estimate_memory_bytes() >> 20
            288
        """
        per_slot = self.bytes_per_token() // self.num_layers
        return self.max_batch * sum(self.capacities) * per_slot
