"""Named real shapes: the one table that tests, benchmarks and autotuning share.

`FLASH` are training and prefill shapes, `PAGED` serving batches, `PACKED` lengths of sequences
packed along one axis.  `small()` shrinks a case to what a CPU test can afford without changing what
makes it special (head ratios, raggedness, borders).
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class FlashCase:
    """A shape of `flash_attention`: q [B, T, N, H], k and v [B, S, K, H]."""

    B: int
    T: int
    S: int
    N: int
    K: int
    H: int
    causal: bool = True
    window: int | None = None

    def small(self) -> "FlashCase":
        """The same heads ratio, lengths mod 64 kept, at most 100 tokens."""
        ratio = self.N // self.K
        kv_heads = min(self.K, 2)
        cut = lambda n: n if n <= 100 else 64 + n % 64
        window = None if self.window is None else 13
        return FlashCase(
            min(self.B, 2), cut(self.T), cut(self.S), ratio * kv_heads, kv_heads, min(self.H, 16),
            self.causal, window,
        )  # fmt: skip


# 16k tokens and N * H = 2048, as the attention benchmarks of the literature have it.
FLASH = {
    "h128_s4096": FlashCase(4, 4096, 4096, 16, 16, 128),
    "h128_s16384": FlashCase(1, 16384, 16384, 16, 16, 128),
    "h64_s4096": FlashCase(4, 4096, 4096, 32, 32, 64),
    "h64_s16384": FlashCase(1, 16384, 16384, 32, 32, 64),
    "h256_s4096": FlashCase(4, 4096, 4096, 8, 8, 256),
    "h256_s16384": FlashCase(1, 16384, 16384, 8, 8, 256),
    "gqa_s4096": FlashCase(4, 4096, 4096, 32, 8, 128),
    "gqa_s16384": FlashCase(1, 16384, 16384, 32, 8, 128),
    "llama3_8b_chunk": FlashCase(1, 512, 8704, 32, 8, 128),
    "llama3_1b_prefill": FlashCase(1, 2048, 2048, 32, 8, 64),
    "mistral_window": FlashCase(1, 16384, 16384, 32, 8, 128, window=4096),
    "mqa": FlashCase(2, 1024, 1024, 8, 1, 64),
    "gpt2_odd": FlashCase(2, 1023, 1023, 12, 12, 64),
    "decode": FlashCase(8, 1, 4097, 32, 8, 128),
    "bert_full": FlashCase(16, 512, 512, 12, 12, 64, causal=False),
}

# (rows of (new tokens, context), N, K, H, block size)
PAGED = {
    "decode_1x4k": ([(1, 4096)], 32, 8, 128, 16),
    "decode_64x1k": ([(1, 1024)] * 64, 32, 8, 128, 16),
    "decode_64x4k": ([(1, 4096)] * 64, 32, 8, 128, 64),
    "decode_skewed": ([(1, 32768)] + [(1, 512)] * 255, 32, 8, 128, 16),
    "verify_8x4k": ([(6, 4096)] * 8, 32, 8, 128, 16),
    "chunk_512_over_8k": ([(512, 8704)], 32, 8, 128, 16),
    "mixed": ([(1, 4096)] * 64 + [(512, 8704)], 32, 8, 128, 16),
}

# Rows of (new tokens, context) small enough for a CPU: each kind alone, and all of them at once.
PAGED_SMALL = {
    "decode": [(1, 5), (1, 33), (1, 1), (0, 7), (1, 64)],
    "verify": [(3, 5), (1, 33), (0, 0), (2, 2), (3, 40)],
    "prefill": [(21, 21), (13, 60)],
    "mixed": [(20, 25), (1, 33), (1, 60), (12, 12), (0, 0), (2, 17)],
}


def packed_lengths(tokens: int = 16384, mean: int = 512, longest: int = 4096) -> np.ndarray:
    """Lognormal lengths (sigma 1) of sequences packed into at most `tokens`: fixed for all runs."""
    rng = np.random.default_rng(20240711)
    lengths: list[int] = []
    while True:
        length = int(np.clip(rng.lognormal(np.log(mean) - 0.5, 1.0), 1, longest))
        if sum(lengths) + length > tokens:
            return np.array(lengths, np.int32)
        lengths.append(length)
