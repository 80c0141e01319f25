"""Every family of attention kernels once, small, for the memory checker.

    XLA_PYTHON_CLIENT_ALLOCATOR=platform XLA_FLAGS=--xla_gpu_enable_command_buffer= \\
        compute-sanitizer --tool memcheck --error-exitcode 9 python bench/memcheck.py

Every array is an allocation of its own (inside JAX's pool the tool sees nothing), so that an access
past the end of one is found.  Prints the mean of each output; the tool prints what it found.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from aidx.ops.flash_attention import flash_attention
from pallas_kernels.paged_attention import paged_attention, write_kv

HEADS, KV_HEADS, DIM, BLOCK, BLOCKS, WIDTH = 8, 2, 64, 16, 64, 40


def show(name, out):
    first = np.asarray(jax.tree.leaves(out)[0], np.float32)
    print(f"{name:30s} mean {first.mean():.6f}", flush=True)


def paged(rng, name, lens, new, *, max_q, width=WIDTH, dtype=jnp.bfloat16, cascade=None):
    """One call over rows of `lens` keys whose last `new` are the queries."""
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
    q, pool = normal(int(sum(new)), HEADS, DIM), normal(BLOCKS, KV_HEADS, BLOCK, DIM).astype(dtype)
    scale = None if dtype == jnp.bfloat16 else jnp.full(pool.shape[:3], 0.5)
    table = jnp.asarray(rng.integers(0, BLOCKS, (len(lens), width)), jnp.int32)
    indptr = jnp.asarray(np.r_[0, np.cumsum(new)], jnp.int32)
    call = functools.partial(
        paged_attention, max_q=max_q, cascade=cascade, k_scale=scale, v_scale=scale
    )
    show(name, jax.jit(call)(q, pool, pool, table, jnp.asarray(lens, jnp.int32), indptr))


def write(name, dtype):
    """Four tokens into a pool, the third into none."""
    k = jnp.ones((4, KV_HEADS, DIM), jnp.bfloat16)
    pool = jnp.zeros((BLOCKS, KV_HEADS, BLOCK, DIM), dtype)
    scale = None if dtype == jnp.bfloat16 else jnp.ones(pool.shape[:3])
    slots = jnp.array([0, 1, -1, BLOCKS * BLOCK - 1], jnp.int32)
    call = functools.partial(write_kv, k_scale=scale, v_scale=scale)
    show(name, jax.jit(call)(pool, pool, k, k, slots))


def flash(name, tokens, heads, kv_heads, dim, **mask):
    """Forward and backward, for a length that is no multiple of a tile."""
    q = jnp.ones((1, tokens, heads, dim), jnp.bfloat16)
    k = jnp.ones((1, tokens, kv_heads, dim), jnp.bfloat16)

    @jax.jit
    def both(*qkv):
        attend = functools.partial(flash_attention, implementation="mosaic_gpu", **mask)
        out, transpose = jax.vjp(attend, *qkv)
        return out, transpose(out)

    out, gradients = both(q, k, k)
    show(name, out)
    show(f"{name}, gradients", gradients)


def main():
    rng = np.random.default_rng(0)
    write("write", jnp.bfloat16)
    write("write, int8", jnp.int8)
    paged(rng, "decode of few rows", [50, 600, 0, 3], [1] * 4, max_q=1)
    paged(rng, "decode of one row", [600], [1], max_q=1)
    paged(rng, "decode over one tile of keys", [50, 0, 64], [1] * 3, max_q=1, width=4)
    paged(rng, "decode of many rows", rng.integers(1, 640, 40), [1] * 40, max_q=1)
    paged(rng, "chunks and decodes", [600, 300, 5], [200, 1, 5], max_q=256)
    for dtype in (jnp.int8, jnp.float8_e4m3fn):
        name = jnp.dtype(dtype).name
        paged(rng, f"decode, {name}", [50, 600, 0], [1] * 3, max_q=1, dtype=dtype)
        paged(rng, f"chunks, {name}", [600, 300, 5], [200, 1, 5], max_q=256, dtype=dtype)
    table = jnp.asarray(rng.integers(0, BLOCKS, (1, WIDTH)), jnp.int32)
    cascade = table, jnp.asarray([160], jnp.int32), jnp.asarray([0, 0, -1], jnp.int32)
    paged(rng, "a shared prefix", [600, 300, 500], [1] * 3, max_q=1, cascade=cascade)
    flash("flash", 300, 4, 4, 64, causal=True)
    flash("flash, groups", 300, 8, 2, 128, causal=True)
    flash("flash, window", 300, 4, 4, 128, causal=True, window=100)
    flash("flash, wide", 300, 2, 2, 256)
    ends = jnp.array([0, 7, 140, 290], jnp.int32)
    flash("flash, packed", 300, 8, 2, 128, causal=True, cu_seqlens=ends)


if __name__ == "__main__":
    main()
