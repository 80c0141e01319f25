"""`EngineConfig`: everything that an engine is told at its start."""

import dataclasses
from typing import Any

import jax

from aidx.cache import KVCacheConfig
from aidx.engine import scheduler as scheduling
from aidx.engine import step as stepping
from aidx.ops import registry

# Rows x shared tokens from which reading the prefix once gains on an H200 (docs/kernels_paged.md).
CASCADE_TOKENS = 128 * 1024


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Everything the engine is told at its start; static.

    Attributes:
        num_layers, num_kv_heads, head_dim: geometry of the cache.
        vocab_size: width of the logits.
        dtype: of the cache.
        num_blocks: blocks of the pool, the null block included.
        block_size: tokens per block.
        max_num_seqs, max_num_batched_tokens, max_model_len, scheduling_policy, max_overtaken,
            enable_prefix_caching, watermark: see `SchedulerConfig`.
        max_logprobs: the most likely tokens that a request may ask for; beams need
            2 * beam_width of them.
        eos_token_ids: tokens that end a sequence unless its request ignores them.
        implementation: of paged attention.
        preemption_mode: what becomes of a sequence whose blocks others need: `recompute` it later,
            `swap` its blocks to host memory, or `auto`: what the warm-up measures to be cheaper
            (without a warm-up: recompute).
        swap_space_bytes: host memory for swapped blocks.
        asynchronous: issue step t before reading step t - 1.
        cascade_tokens: a decode step reads a prefix that rows share once where rows x tokens of the
            prefix reach this; 0: never.  None: `CASCADE_TOKENS` on a GPU, never on a CPU, whose
            caches serve the later reads.
        window: see `SchedulerConfig`; there is no cascade with one, for a prefix is let go of.
        cpu: whether the traces come in sizes for a CPU or for a GPU (`row_buckets`).

    Raises:
        ValueError: from `SchedulerConfig`, sizes below 1 (2 blocks: block 0 holds nothing), or an
            implementation that there is not.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    num_blocks: int
    dtype: Any = "float32"
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int = 4096
    scheduling_policy: str = "fcfs"
    max_overtaken: int = 256
    enable_prefix_caching: bool = True
    watermark: float = 0.01
    max_logprobs: int = 20
    eos_token_ids: tuple[int, ...] = ()
    implementation: Any = None
    preemption_mode: str = "auto"
    swap_space_bytes: int = 4 << 30
    asynchronous: bool = True
    cascade_tokens: int | None = None
    window: int | None = None
    cpu: bool = True

    def __post_init__(self):
        least = dict(num_layers=1, num_kv_heads=1, head_dim=1, block_size=1, num_blocks=2)
        for name, value in least.items():
            if getattr(self, name) < value:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {value}")
        registry.resolve("paged_attention", self.implementation)
        if self.vocab_size < 1 or self.max_logprobs < 0:
            raise ValueError(
                f"{self.vocab_size=} must be positive, {self.max_logprobs=} not negative"
            )
        modes = ("auto", *scheduling.PREEMPTION_MODES)
        if self.preemption_mode not in modes:
            raise ValueError(f"preemption_mode={self.preemption_mode!r} is not one of {modes}")
        object.__setattr__(self, "max_logprobs", min(self.max_logprobs, self.vocab_size))
        object.__setattr__(self, "eos_token_ids", tuple(self.eos_token_ids))
        if self.cascade_tokens is None:
            never = self.cpu or self.window is not None
            object.__setattr__(self, "cascade_tokens", 0 if never else CASCADE_TOKENS)
        if self.cascade_tokens and self.window is not None:
            raise ValueError(f"{self.cascade_tokens=}, but with {self.window=} no prefix stays")
        self.scheduler()

    def scheduler(self) -> scheduling.SchedulerConfig:
        """The scheduler's part."""
        # A CPU's sizes lie so close that a cut saves less padding than the steps it adds cost.
        tokens = self.max_num_batched_tokens
        sizes = () if self.cpu else stepping.token_buckets(tokens, cpu=False)
        return scheduling.SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            policy=self.scheduling_policy,
            max_overtaken=self.max_overtaken,
            enable_prefix_caching=self.enable_prefix_caching,
            watermark=self.watermark,
            preemption_mode="recompute" if self.preemption_mode == "auto" else self.preemption_mode,
            max_swapped_blocks=self.swap_space_bytes // self.block_bytes,
            window=self.window,
            step_sizes=sizes,
        )

    @classmethod
    def for_model(
        cls, name: str, memory_bytes: int, *, vocab_size: int, **changes: Any
    ) -> "EngineConfig":
        """The geometry of a known model, and the blocks that fill `memory_bytes` of cache.

        Args:
            name: see `KVCacheConfig.for_model`; its context and window are taken too.
            memory_bytes: for the pool alone.
            vocab_size: width of the logits.
            **changes: fields that replace the preset's; the dtype is bfloat16 else.

        Raises:
            ValueError: the name is unknown, or not even two blocks fit.

        Example:
            >>> config = EngineConfig.for_model("llama-3-8b", 1 << 30, vocab_size=128_256)
            >>> config.num_blocks, config.max_model_len
            (512, 8192)
        """
        cache = KVCacheConfig.for_model(name)
        fields: dict[str, Any] = dict(
            num_layers=cache.num_layers,
            num_kv_heads=cache.num_kv_heads,
            head_dim=cache.head_dim,
            max_model_len=cache.max_seq_len,
            window=cache.window,
            dtype=cache.dtype,
        )
        if (blocks := changes.get("num_blocks")) is not None:
            raise ValueError(f"num_blocks={blocks} and {memory_bytes=} both size the pool")
        config = cls(vocab_size=vocab_size, num_blocks=2, **{**fields, **changes})
        return dataclasses.replace(config, num_blocks=memory_bytes // config.block_bytes)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that the pool has blocks for, up to max_model_len."""
        limits, blocks = self.scheduler(), self.num_blocks - 1
        if scheduling.blocks_needed(limits, self.max_model_len, self.block_size) <= blocks:
            return self.max_model_len
        return blocks * self.block_size

    @property
    def block_bytes(self) -> int:
        """Bytes of a block in all layers."""
        values = 2 * self.num_layers * self.num_kv_heads * self.block_size
        size = jax.numpy.dtype(self.dtype).itemsize
        return values * (self.head_dim * size + (4 if size == 1 else 0))  # scales are f32

    @property
    def max_blocks(self) -> int:
        """M, blocks of the longest sequence."""
        return -(-self.max_model_len // self.block_size)

    def shapes(self) -> tuple[stepping.Shape, ...]:
        """Every trace of the step that these limits can ask for."""
        return stepping.all_shapes(
            self.max_num_seqs,
            self.max_num_batched_tokens,
            self.max_logprobs,
            cpu=self.cpu,
            cascade=bool(self.cascade_tokens),
        )
