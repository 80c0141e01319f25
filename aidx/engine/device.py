"""What an engine keeps on its devices: parameters, cache and batch state, and the programs on them.

Nothing here knows requests, and nothing waits for the device but the warm-up.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from aidx.cache import PagedKVCache, SwappedBlocks, swap_in, swap_out, swap_piece
from aidx.engine import step as stepping
from aidx.engine import warmup as warming
from aidx.engine.blocks import COPY_SIZES, copy_blocks, time_swapping
from aidx.engine.config import EngineConfig
from aidx.ops.sampling import VARIANTS, Variant, state_row
from aidx.typing import Forward, Params

TABLE_UPDATES = 1024  # entries that one `write_tables` takes


def described(params: Params) -> dict[str, str]:
    """Shape and dtype of every leaf by its path.

    Example:
        >>> described({"norm": np.ones(3, np.float32)})
        {"['norm']": 'float32[3]'}
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


class Device:
    """Arrays that the step donates to itself; the masks are made when the first request has any.

    Attributes:
        params: the model's, committed to their devices.
        cache: keys and values of all blocks.
        state: block tables, last tokens and counts of every seat.
    """

    def __init__(self, forward: Forward, params: Params, config: EngineConfig):
        self._forward = forward
        self._config = config
        # Committed: arrays that JAX may move would compile every program once more.
        self.params = jax.tree.map(lambda x: jax.device_put(x, x.sharding), params)
        self.allocate()

    def allocate(self) -> None:
        """The cache and the batch state, zeroed."""
        config = self._config
        self.cache = PagedKVCache.create(
            num_layers=config.num_layers,
            num_blocks=config.num_blocks,
            block_size=config.block_size,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            dtype=config.dtype,
            sharding=stepping.cache_sharding(self.params, config.num_kv_heads),
        )
        self.state = self.put(stepping.new_state(config.max_num_seqs, config.max_blocks))
        self._masks = None
        self._neutral = state_row(config.vocab_size)

    @property
    def lost(self) -> bool:
        """Whether a program that failed took the cache or the state along."""
        return any(leaf.is_deleted() for leaf in jax.tree.leaves((self.cache, self.state)))

    def put(self, tree: Any) -> Any:
        """On every device that the parameters are on."""
        return jax.device_put(tree, stepping.state_sharding(self.params))

    def set_params(self, params: Params) -> None:
        """Take parameters whose `described` is the same, wherever they are."""
        self.params = jax.tree.map(
            lambda new, old: jax.device_put(new, old.sharding), params, self.params
        )

    def run(self, shape: stepping.Shape, packed: np.ndarray) -> jax.Array:
        """Start a step; what it tells the host is on its way."""
        masked = shape.sampler.masked
        self.cache, self.state, masks, out = stepping.run_step(
            self.params,
            self.cache,
            self.state,
            packed,
            self._made_masks() if masked else None,
            forward=self._forward,
            shape=shape,
            implementation=self._config.implementation,
        )
        if masked:
            self._masks = masks
        if not self._config.cpu:  # whose memory is read as it is
            out.copy_to_host_async()
        return out

    def write_tables(self, updates: np.ndarray) -> None:
        """At most `TABLE_UPDATES` entries (seat, index, block) of the block tables."""
        padded = np.full((TABLE_UPDATES, 3), self._config.max_num_seqs + 1, np.int32)
        padded[: len(updates)] = updates
        self.state = stepping.write_tables(self.state, padded)

    def write_masks(self, seat: int, row: Any = None) -> None:
        """What a seat may draw; None: anything."""
        row = self._neutral if row is None else row
        self._masks = stepping.write_masks(self._made_masks(), np.int32(seat), row)

    def _made_masks(self) -> Any:
        if self._masks is None:
            config = self._config
            self._masks = self.put(stepping.new_masks(config.max_num_seqs, config.vocab_size))
        return self._masks

    def copy_blocks(self, copies: tuple[tuple[int, int], ...]) -> None:
        """Copy blocks (from, to)."""
        self.cache = copy_blocks(self.cache, copies)

    def swap_out(self, blocks: np.ndarray) -> SwappedBlocks:
        """Blocks to the host's memory."""
        return swap_out(self.cache, blocks)

    def swap_in(self, swapped: SwappedBlocks, places: np.ndarray) -> None:
        """And back, into other blocks."""
        self.cache = swap_in(self.cache, swapped, places)

    # Warm-up.

    def warmup(
        self, on_progress: Callable[[int, int], None] | None, variant: Variant | None
    ) -> tuple[int, bool]:
        """Compile every program and run each once with no rows: how many, and whether to swap.

        The second says what a preempted sequence should do with its blocks: go to the host and come
        back, if that was asked for or is the faster way, or compute them again.
        """
        config = self._config
        shapes = warming.shapes_of(config, variant)
        done = warming.compile_steps(
            config,
            shapes,
            (self.params, self.cache, self.state),
            forward=self._forward,
            neutral=self._neutral,
            on_progress=on_progress,
        )
        for shape in shapes:
            if not shape.sampler.masked:  # those need memory that may never be needed
                self.run(shape, warming.empty_plan(config, shape))
        self.write_tables(np.zeros((0, 3), np.int32))
        for size in COPY_SIZES:
            blocks = range(min(size, config.num_blocks))
            self.cache = self.cache.copy_blocks(blocks, blocks)
        size, swaps = min(swap_piece(self.cache), config.num_blocks), False
        if config.preemption_mode == "auto":
            self.cache, swapping = time_swapping(self.cache, size)
            swaps = swapping < self.time_recomputing()
        if config.preemption_mode == "swap" or swaps:
            swaps = True
            for n in (*(1 << i for i in range(size.bit_length())), size):  # all sizes of a piece
                self.cache, _ = time_swapping(self.cache, n, repeats=1)
        jax.block_until_ready((self.cache, self.state))
        return done, swaps

    def time_recomputing(self) -> float:
        """Seconds that the largest prefill takes for a block's tokens, attention left out."""
        config, seconds = self._config, float("inf")
        largest = [s for s in config.shapes() if s.num_tokens == config.max_num_batched_tokens]
        shape = min(largest, key=lambda s: VARIANTS.index(s.sampler.variant))
        for _ in range(3):
            jax.block_until_ready(self.cache)
            began = time.monotonic()
            jax.block_until_ready(self.run(shape, warming.empty_plan(config, shape)))
            seconds = min(seconds, time.monotonic() - began)
        return seconds / shape.num_tokens * config.block_size


def same_params(old: Params, new: Params) -> None:
    """Refuses parameters that other programs would be needed for.

    Raises:
        ValueError: the tree, a shape or a dtype differs.
    """
    wanted, found = described(old), described(new)
    if differ := sorted(wanted.items() ^ found.items()):
        path = differ[0][0]
        raise ValueError(
            f"the new parameters differ: {path} is {found.get(path, 'absent')}, "
            f"not {wanted.get(path, 'absent')}"
        )
