"""Multi-head attention with a KV cache, as a Flax module."""

import jax
import jax.numpy as jnp
from flax import nnx

from aidx.cache.attend import contiguous_attend, no_cache_attend
from aidx.cache.config import KVCacheConfig
from aidx.cache.contiguous import KVCache
from aidx.ops.registry import ImplementationChoice
from aidx.ops.rope import Rope, apply_rope, rope_angles, rope_frequencies


class CachedMultiHeadAttention(nnx.Module):
    """Causal grouped-query attention that remembers its keys and values in a `KVCache`.

    $$ out = W_o attention(rope(W_q x), rope(W_k x), W_v x) $$

    The cache is an argument and a result, not a variable of the module: one module serves any
    number of caches, and a jitted step donates them.  Prefill, decode and everything between equal
    the call without a cache on the whole sequence.

    Args:
        features: D.
        num_heads: N.
        num_kv_heads: K, a divisor of N; N when None.
        head_dim: H; D / N when None.
        rope: a rotary embedding of q and k at their absolute positions, or None.
        max_len: the longest sequence; only rope's type `dynamic` asks for it.
        window: how many keys a query sees, its own included; None for all.
        use_bias: whether the four projections have biases.
        dtype: of the computation; x's when None.
        param_dtype: of the parameters.
        implementation: of `flash_attention`.
        rngs: where the parameters come from.

    Raises:
        ValueError: heads that do not divide.

    Example:
        >>> from aidx.cache import KVCacheConfig
        >>> module = CachedMultiHeadAttention(8, 2, num_kv_heads=1, rope=Rope(), rngs=nnx.Rngs(0))
        >>> x = jnp.ones((1, 3, 8))
        >>> cache = KVCache.create(module.cache_config(max_seq_len=4))
        >>> y, cache = module(x, cache)
        >>> y.shape, cache.lengths.tolist() == [[3]]
        ((1, 3, 8), True)
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        rope: Rope | None = None,
        max_len: int | None = None,
        window: int | None = None,
        use_bias: bool = False,
        dtype: jax.typing.DTypeLike | None = None,
        param_dtype: jax.typing.DTypeLike = jnp.float32,
        implementation: ImplementationChoice = None,
        rngs: nnx.Rngs,
    ):
        num_kv_heads = num_kv_heads or num_heads
        if num_heads % num_kv_heads:
            raise ValueError(f"{num_heads=} is not a multiple of {num_kv_heads=}")
        if head_dim is None and features % num_heads:
            raise ValueError(f"{features=} is not a multiple of {num_heads=}; give head_dim")
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = head_dim or features // num_heads
        self.rope, self.max_len, self.window = rope, max_len, window
        self.implementation = implementation

        def linear(inputs, outputs):
            return nnx.Linear(
                inputs,
                outputs,
                use_bias=use_bias,
                dtype=dtype,
                param_dtype=param_dtype,
                rngs=rngs,
            )

        self.query = linear(features, num_heads * self.head_dim)
        self.key = linear(features, num_kv_heads * self.head_dim)
        self.value = linear(features, num_kv_heads * self.head_dim)
        self.out = linear(num_heads * self.head_dim, features)

    def cache_config(self, *, num_layers: int = 1, **fields) -> KVCacheConfig:
        """The `KVCacheConfig` of `num_layers` such modules; `fields` as there."""
        return KVCacheConfig(
            num_layers=num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            **{"window": self.window, **fields},
        )

    def __call__(
        self,
        x: jax.Array,
        cache: KVCache | None = None,
        *,
        layer: int = 0,
        counts: jax.Array | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Attend from `x` `[B, T, D]` to itself and to what the cache holds.

        Args:
            x: new tokens; they are appended to the cache.
            cache: None is plain causal attention within x.
            layer: which of the cache's layers this module is.
            counts: `[B]`: row b's first `counts[b]` tokens count, the rest is padding (needs a
                cache).

        Returns:
            `[B, T, D]` and the new cache.
        """
        if cache is None and counts is not None:
            raise ValueError("counts needs a cache; without one every token of x counts")
        split = lambda y, heads: y.reshape(*x.shape[:-1], heads, self.head_dim)
        q = split(self.query(x), self.num_heads)
        k = split(self.key(x), self.num_kv_heads)
        v = split(self.value(x), self.num_kv_heads)
        if self.rope is not None:
            if cache is None:
                positions = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
            else:
                positions = cache.next_positions(x.shape[1], layer)
            frequencies = rope_frequencies(self.head_dim, self.rope, max_len=self.max_len)
            cos, sin = rope_angles(positions, *frequencies)
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        if cache is None:
            attend = no_cache_attend(implementation=self.implementation)
        else:
            attend = contiguous_attend(counts, implementation=self.implementation)
        y, cache = attend(cache, layer, q, k, v, window=self.window)
        return self.out(y.reshape(*x.shape[:-1], -1)), cache
