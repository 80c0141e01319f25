"""Time of a JAX call: on the device, from programs that chain calls, or as the host sees it."""

import contextlib
import fcntl
import os
import random
import time

import jax
import jax.numpy as jnp


def chained(f, calls):
    """One program of `calls` calls, each waiting for the one before; inputs stay what they are.

    A round of its loop has several calls: its counter and its sum are kernels of their own, a few
    microseconds together, which every call would pay else.
    """
    together = next(n for n in (5, 4, 3, 2, 1) if calls % n == 0)
    f = jax.jit(f)  # lowered once

    def body(_, state):
        total, *args = state
        outs = []
        for _ in range(together):
            # without the barrier XLA computes only the element read below, where it can: not all
            # of dQ; and one call for all
            out, *args = jax.lax.optimization_barrier((f(*args), *args))
            outs += jax.tree.leaves(out)
        total = total + sum(x.ravel()[0].astype(jnp.float32) for x in outs)
        return jax.lax.optimization_barrier((total, *args))

    rounds = calls // together
    return lambda *args: jax.lax.fori_loop(0, rounds, body, (jnp.float32(0), *args))[0]


@contextlib.contextmanager
def alone():
    """No other process that shares the file `AIDX_BENCH_LOCK` times anything meanwhile.

    So several benchmarks of one GPU can compile at the same time and take turns at timing.
    """
    path = os.environ.get("AIDX_BENCH_LOCK")
    if path is None:
        yield
        return
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def shuffled(names, turn):
    """The names in the order of a round: the same in every run, but other neighbours each time."""
    names = sorted(names)
    random.Random(turn).shuffle(names)
    return names


def side_by_side(f, args, calls):
    """(one program of `calls` calls that returns all they give, its arguments).

    Each call has a copy of the first argument, so that none is another's result; there is no loop,
    whose state XLA may copy.
    """
    first, *rest = args
    copies = [jax.tree.map(lambda x: x.copy(), first) for _ in range(calls)]
    return lambda copies, *rest: [f(c, *rest) for c in copies], (copies, *rest)


def milliseconds(f, wait=jax.block_until_ready, budget=1.0, most=200):
    """Best time of a call as the host sees it; `wait` makes its result arrive."""
    wait(f())
    best, end = float("inf"), time.perf_counter() + budget
    for _ in range(most):
        start = time.perf_counter()
        wait(f())
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() > end:
            break
    return best * 1e3


def seconds(compiled, args, calls, queue=4, repeats=3):
    """Device seconds of one call: `queue` programs in flight, less one, over the calls between."""

    def took(count):
        start = time.perf_counter()
        jax.block_until_ready([compiled(*args) for _ in range(count)])
        return time.perf_counter() - start

    took(1)
    middle = lambda count: sorted(took(count) for _ in range(repeats))[repeats // 2]
    return (middle(queue) - middle(1)) / ((queue - 1) * calls)
