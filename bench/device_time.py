"""Device time of a JAX function: programs that chain their calls, one of them taken off several."""

import time

import jax
import jax.numpy as jnp


def chained(f, calls):
    """One program of `calls` calls, each waiting for the one before; inputs stay what they are."""

    def body(_, state):
        total, *args = state
        # without the barrier XLA computes only the element read below, where it can: not all of dQ
        out = jax.lax.optimization_barrier(f(*args))
        total = total + sum(x.ravel()[0].astype(jnp.float32) for x in jax.tree.leaves(out))
        return jax.lax.optimization_barrier((total, *args))

    return lambda *args: jax.lax.fori_loop(0, calls, body, (jnp.float32(0), *args))[0]


def seconds(compiled, args, calls, queue=4, repeats=3):
    """Device seconds of one call: `queue` programs in flight, less one, over the calls between."""

    def took(count):
        start = time.perf_counter()
        jax.block_until_ready([compiled(*args) for _ in range(count)])
        return time.perf_counter() - start

    took(1)
    middle = lambda count: sorted(took(count) for _ in range(repeats))[repeats // 2]
    return (middle(queue) - middle(1)) / ((queue - 1) * calls)
