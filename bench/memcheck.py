"""Every family of attention kernels once, small, for the memory checker.

    XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS=--xla_gpu_enable_command_buffer= \\
        compute-sanitizer --tool memcheck --error-exitcode 9 python bench/memcheck.py

Every array is an allocation of its own (inside JAX's pool the tool sees nothing), so that an access
past the end of one is found.  Prints the mean of each output; the tool prints what it found.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import flash_attention as fa
from pallas_kernels.paged_attention import paged_attention, write_kv

HEADS, KV_HEADS, DIM, BLOCK, BLOCKS, WIDTH = 8, 2, 64, 16, 64, 40


def show(name, out):
    first = np.asarray(jax.tree.leaves(out)[0], np.float32)
    print(f"{name:30s} mean {first.mean():.6f}", flush=True)


def paged(rng, name, lens, new, *, max_q, cascade=None):
    """One call over rows of `lens` keys whose last `new` are the queries."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    q, pool = normal(int(sum(new)), HEADS, DIM), normal(BLOCKS, KV_HEADS, BLOCK, DIM)
    table = jnp.asarray(rng.integers(0, BLOCKS, (len(lens), WIDTH)), jnp.int32)
    indptr = jnp.asarray(np.r_[0, np.cumsum(new)], jnp.int32)
    call = jax.jit(lambda *args: paged_attention(*args, max_q=max_q, cascade=cascade))
    show(name, call(q, pool, pool, table, jnp.asarray(lens, jnp.int32), indptr))


def main():
    rng = np.random.default_rng(0)
    k = jnp.ones((4, KV_HEADS, DIM), jnp.bfloat16)
    pool = jnp.zeros((BLOCKS, KV_HEADS, BLOCK, DIM), jnp.bfloat16)
    show("write", jax.jit(write_kv)(pool, pool, k, k, jnp.arange(4, dtype=jnp.int32)))
    paged(rng, "decode of few rows", [50, 600, 0, 3], [1] * 4, max_q=1)
    paged(rng, "decode of one row", [600], [1], max_q=1)
    paged(rng, "decode of many rows", rng.integers(1, 640, 40), [1] * 40, max_q=1)
    paged(rng, "chunks and decodes", [600, 300, 5], [200, 1, 5], max_q=256)
    table = jnp.asarray(rng.integers(0, BLOCKS, (1, WIDTH)), jnp.int32)
    cascade = table, jnp.asarray([160], jnp.int32), jnp.asarray([0, 0, -1], jnp.int32)
    paged(rng, "a shared prefix", [600, 300, 500], [1] * 3, max_q=1, cascade=cascade)
    q = jnp.ones((1, 300, 4, DIM), jnp.bfloat16)
    flash = lambda q: fa.flash_attention_fwd(q, q, q, band=fa.Band(right=0), scale=0.1)
    show("flash attention", jax.jit(flash)(q))


if __name__ == "__main__":
    main()
