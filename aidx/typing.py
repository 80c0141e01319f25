"""Array aliases and the two protocols that keep models and caches apart.

A model is a `Forward`: it mixes features and leaves the mixing of tokens to an `Attend` that it is
given.  A cache is whatever its `Attend` threads through.  Neither knows the other.
"""

from typing import Any, Protocol

import jax

type Array = jax.Array
type PyTree = Any
type Params = Any
type Cache = Any


class Attend(Protocol):
    """`attend(cache, layer, q, k, v, ...) -> (out, cache)`: write k and v, attend with q.

    q is `[*B, T, N, H]`, k `[*B, T, K, H]`, v `[*B, T, K, Hv]` (rotary embedding already applied),
    out `[*B, T, N, Hv]`.  The options are what the layer's definition says; `layer` is a Python int
    (a traced i32 under `lax.scan`).
    """

    def __call__(
        self,
        cache: Cache,
        layer: int | Array,
        q: Array,
        k: Array,
        v: Array,
        *,
        window: int | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
        sinks: Array | None = None,
    ) -> tuple[Array, Cache]:
        """See the class."""
        ...


class Forward(Protocol):
    """`forward(params, tokens, positions, attend, cache) -> (logits, cache)`.

    tokens and positions are i32 `[*B, T]`; logits are f32 `[*B, T, V]`.  With `logits_at` (i32
    `[R]`, indices into T of a `[T]` call) only those rows are unembedded: `[R, V]`.  With
    `hidden=True` the final-normed hidden states `[*B, T, D]` come back in place of logits (a fused
    loss unembeds them itself).
    """

    def __call__(
        self,
        params: Params,
        tokens: Array,
        positions: Array,
        attend: Attend,
        cache: Cache,
        *,
        logits_at: Array | None = None,
        hidden: bool = False,
    ) -> tuple[Array, Cache]:
        """See the class."""
        ...
