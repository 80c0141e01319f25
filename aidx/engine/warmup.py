"""Warm-up: every step compiled before the first request.

Lowering is Python, compiling is XLA's, which lets other threads run: one step is compiled while the
next is lowered.
"""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import numpy as np

from aidx.cache import PagedKVCache
from aidx.engine import step as stepping
from aidx.engine.config import EngineConfig
from aidx.ops.sampling import VARIANTS, Variant
from aidx.typing import Forward, Params

LOG = logging.getLogger("aidx.engine")


def shapes_of(config: EngineConfig, variant: Variant | None) -> list[stepping.Shape]:
    """The traces for requests of at most `variant`, without masks or logprobs; None: all.

    Example:
        >>> config = EngineConfig(1, 1, 8, 97, 9, max_num_seqs=1, max_num_batched_tokens=16)
        >>> [s.num_tokens for s in shapes_of(config, "greedy")]
        [1, 16]
    """
    return [shape for shape in config.shapes() if _wanted(shape, variant)]


def _wanted(shape: stepping.Shape, variant: Variant | None) -> bool:
    if variant is None:
        return True
    greedy = shape.decode and not shape.cascade  # the others draw where greedy would do
    widest = max(VARIANTS.index(variant), 0 if greedy else 1)
    return not shape.sampler.masked and VARIANTS.index(shape.sampler.variant) <= widest


def compile_steps(
    config: EngineConfig,
    shapes: Sequence[stepping.Shape],
    operands: tuple[Params, PagedKVCache, stepping.BatchState],
    *,
    forward: Forward,
    neutral: Any,
    on_progress: Callable[[int, int], None] | None = None,
) -> int:
    """Compile the steps of `shapes`, and what writes a seat's masks; how many programs that is.

    Args:
        config: of the engine.
        shapes: which traces.
        operands: parameters, cache and state as the engine has them; only their shapes matter.
        forward: the model.
        neutral: a seat's masks, as `write_masks` takes them.
        on_progress: called with (done, all) after each program.
    """
    params, cache, state = operands
    masks = stepping.mask_shapes(
        config.max_num_seqs, config.vocab_size, stepping.state_sharding(params)
    )
    done = 0
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        jobs: list[Future[Any]] = [
            pool.submit(stepping.write_masks.lower(masks, np.int32(0), neutral).compile)
        ]
        for shape in shapes:
            began = time.monotonic()
            lowered = stepping.run_step.lower(
                params,
                cache,
                state,
                np.zeros(shape.plan_size, np.int32),
                masks if shape.sampler.masked else None,
                forward=forward,
                shape=shape,
                implementation=config.implementation,
            )
            jobs.append(pool.submit(_compile, shape, lowered, time.monotonic() - began))
        for job in as_completed(jobs):
            job.result()
            done += 1
            if on_progress is not None:
                on_progress(done, len(jobs))
    return done


def _compile(shape: stepping.Shape, lowered: Any, lowering: float) -> None:
    """Compile a trace, and log what it took: `logging.getLogger("aidx.engine")`, level INFO."""
    began = time.monotonic()
    lowered.compile()
    LOG.info(
        "%d tokens, %d rows, %s: lowered in %.1f s, compiled in %.1f s",
        shape.num_tokens,
        shape.num_rows,
        shape.sampler,
        lowering,
        time.monotonic() - began,
    )


def empty_plan(config: EngineConfig, shape: stepping.Shape) -> np.ndarray:
    """A plan without rows: running it compiles what lowering left, and changes nothing."""
    nothing = np.zeros(0, np.int64)
    return stepping.pack_plan(
        shape,
        max_num_seqs=config.max_num_seqs,
        seats=nothing,
        writes=nothing,
        starts=nothing,
        counts=nothing,
        targets=nothing,
        sampling=np.zeros((0, stepping.SAMPLING_COLUMNS), np.int32),
        tokens=nothing,
        updates=np.zeros((0, 3), np.int32),
    )
