"""Blocks that move on the device between steps, and what that costs."""

import time
from collections.abc import Sequence

import jax

from aidx.cache import PagedKVCache, swap_in, swap_out

COPY_SIZES = (16, 4, 1)  # pairs of blocks that one copy program takes


def copy_blocks(cache: PagedKVCache, copies: Sequence[tuple[int, int]]) -> PagedKVCache:
    """Copies on write, (from, to), in programs of a few fixed sizes; donates `cache`."""
    # A destination that was given back and taken again is named twice: the last one counts.
    copies = [(src, dst) for dst, src in {dst: src for src, dst in copies}.items()]
    at = 0
    while at < len(copies):
        size = next(size for size in COPY_SIZES if size <= len(copies) - at)
        src, dst = zip(*copies[at : at + size], strict=True)
        cache = cache.copy_blocks(src, dst)
        at += size
    return cache


def time_swapping(
    cache: PagedKVCache, size: int, *, repeats: int = 3
) -> tuple[PagedKVCache, float]:
    """Seconds for a block to go to the host and to come back, among `size` of them."""
    seconds = []
    for _ in range(repeats):
        jax.block_until_ready(cache)
        began = time.monotonic()
        cache = swap_in(cache, swap_out(cache, range(size)), range(size))
        jax.block_until_ready(cache)
        seconds.append((time.monotonic() - began) / size)
    return cache, min(seconds)
