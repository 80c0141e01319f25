"""One of several processes, run by test_autotune_processes.py: rank, count, coordinator's port."""

import sys

import jax
import jax.numpy as jnp

from aidx.ops import autotune
from tests.ops.toy_tunables import TOY


def main(rank, count, port):
    """Choose, with a clock by which process 0 takes 2 and every other one would take 4."""
    jax.distributed.initialize(f"localhost:{port}", count, rank)
    asked = []

    def timer(trial, config):
        asked.append(config)
        return {1: 9.0, 2: 1.0 + rank, 4: 2.0 - rank}[config]

    with autotune.mode("on", timer=timer, cache=None), autotune.recording() as seen:
        config = jax.jit(lambda x: autotune.choose(TOY, (x,)) + 0 * x)(jnp.zeros(8))[0]
    source, count = seen[0].source, jax.process_count()
    print(f"rank {rank} of {count} takes {int(config)} [{source}] {bool(asked)}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
