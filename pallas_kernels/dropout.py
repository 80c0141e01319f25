"""The dropout bits of attention: one hash for every implementation.

The bits of a score are a function of (key, batch, head, query, key token), never of tiles.  The
first half of the hash serves two scores, key tokens s and s ^ 8, which one thread holds in the
layout of wgmma; a multiplication of its own makes each score's bits.  In all 2.5 integer operations
a score, and a comparison.  Where the query's word is random (`dropout_rows`), no more is needed:
rate, rows, columns and blocks of the mask cannot be told from coin flips.

>>> import jax
>>> key = jax.random.key_data(jax.random.key(0))[-2:]
>>> t, s = jnp.arange(64)[:, None], jnp.arange(64)[None]
>>> rows = dropout_rows(key, jnp.int32(0), jnp.int32(0), t)
>>> print(f"{float(dropout_keeps(rows, s, 0.25).mean()):.2f}")
0.75
"""

import jax
import jax.numpy as jnp

PAIR = 8  # key tokens s and s ^ PAIR share the first half of the hash
LAST = (0x846CA68B, 0xD168AAAD)  # multipliers of s with bit 3 clear and set
WEYL = 0x9E3779B1  # odd: s -> s * WEYL is a bijection of u32


def mix(x: jax.Array) -> jax.Array:
    """A bijection of u32 that spreads every bit over the word (Wellons' lowbias32, 2018).

    >>> print(mix(jnp.uint32(1)))
    1753845952
    """
    x = x ^ (x >> 16)
    x = x * jnp.uint32(0x7FEB352D)
    x = x ^ (x >> 15)
    x = x * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def dropout_rows(key: jax.Array, b: jax.Array, n: jax.Array, t: jax.Array) -> jax.Array:
    """The word of query (b, n, t) under key `[..., 2]` u32; once a row, so it may be thorough."""
    word = mix(key[..., 0] ^ mix(b.astype(jnp.uint32) + jnp.uint32(0x9E3779B9)))
    word = mix(word ^ key[..., 1] ^ mix(n.astype(jnp.uint32) + jnp.uint32(0x85EBCA6B)))
    return mix(word ^ mix(t.astype(jnp.uint32) + jnp.uint32(0xC2B2AE35)))


def shared_half(rows: jax.Array, column: jax.Array) -> jax.Array:
    """What both key tokens of a pair take; column is `(s & ~PAIR) * WEYL`."""
    x = (rows ^ column) * jnp.uint32(0x7FEB352D)
    return x ^ (x >> 15)


def threshold(rate: float) -> int:
    """Words below this are dropped; the rate is rounded to a multiple of 2^-16.

    >>> hex(threshold(0.5))
    '0x80000000'
    """
    return min(round(rate * 2**16), 2**16 - 1) << 16


def dropout_keeps(rows: jax.Array, s: jax.Array, rate: float) -> jax.Array:
    """Whether each score survives: rows are `dropout_rows`, s i32 key tokens that broadcast to it.

    The rate is rounded to a multiple of 2^-16.
    """
    column = (s & ~PAIR).astype(jnp.uint32) * jnp.uint32(WEYL)
    last = jnp.where(s & PAIR, jnp.uint32(LAST[1]), jnp.uint32(LAST[0]))
    return shared_half(rows, column) * last >= jnp.uint32(threshold(rate))
