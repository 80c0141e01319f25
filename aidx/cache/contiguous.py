"""The contiguous KV cache: one pre-allocated buffer per layer, a ring where a window is set.

Every layer knows how many tokens each of its rows has taken (`lengths`) and which is the oldest it
still holds (`starts`).  Positions are absolute: a token keeps its position, hence its rotation,
when older ones leave the window.  In a ring of S slots position p lies in slot `p % S`.
"""

import dataclasses
import operator

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer
from jax.experimental import checkify

from aidx.cache.config import KVCacheConfig
from aidx.ops.write_kv import quantise


class CacheOverflow(ValueError):
    """A row without a window was given more tokens than its buffer has room for."""


@dataclasses.dataclass(frozen=True)
class KVCacheStats:
    """What a cache has spared, since it was made, and what it takes.

    Tokens are counted once per layer.  A *hit* is a token of a row's past that an append found in
    the cache (without one it would have been computed again); a *miss* is a token that was appended
    (it had to be computed); an *eviction* is a token that left a window, also one of a prefill
    longer than the window that was never stored.  Generating n tokens one by one after a prompt of
    p makes `n p + n (n - 1) / 2` hits and `p + n` misses.
    """

    hits: int
    misses: int
    evictions: int
    memory_bytes: int  # of the buffers, full or not
    held_tokens: int  # live now
    capacity_tokens: int

    @property
    def hit_rate(self) -> float:
        """Hits / (hits + misses): the share of attended tokens that were not computed again."""
        return self.hits / max(self.hits + self.misses, 1)

    @property
    def utilization(self) -> float:
        """Held / capacity."""
        return self.held_tokens / self.capacity_tokens


@struct.dataclass
class KVCache:
    """K and V of a batch of rows; made by `KVCache.create`, changed by what its methods return.

    Under `jax.jit` with the cache donated, `append` and `update_at` write in place; called eagerly
    they copy.  What cannot be an error there (lengths are not known while tracing) is a flag:
    writes past a buffer's end are dropped and `overflowed` tells.

    Example:
        >>> config = KVCacheConfig(
        ...     num_layers=1, num_heads=2, num_kv_heads=1, head_dim=4, max_seq_len=8
        ... )
        >>> cache = KVCache.create(config)
        >>> cache = cache.append(0, jnp.ones((1, 3, 1, 4)), jnp.ones((1, 3, 1, 4)))
        >>> cache.lengths.tolist(), cache.next_positions(2).tolist()
        ([[3]], [[3, 4]])
    """

    k: tuple[jax.Array, ...]  # per layer [B, S, K, H]
    v: tuple[jax.Array, ...]  # per layer [B, S, K, H]
    lengths: jax.Array  # [L, B] i32, tokens taken so far: the position of the next one
    starts: jax.Array  # [L, B] i32, position of the oldest token still held
    k_scale: tuple[jax.Array, ...] | None = None  # quantised: per layer [B, S, K] f32
    v_scale: tuple[jax.Array, ...] | None = None
    # [L, 3, 2] u32: hits, misses, evictions as low and high word (f32 would stop counting at 2^24).
    counters: jax.Array | None = None
    windows: tuple[int | None, ...] = struct.field(pytree_node=False, default=())

    @classmethod
    def create(cls, config: KVCacheConfig, *, statistics: bool = True) -> "KVCache":
        """An empty cache; `statistics=False` leaves the counting out of every append."""
        layers, rows = config.num_layers, config.max_batch
        shapes = [(rows, size, config.num_kv_heads, config.head_dim) for size in config.capacities]

        def buffers(dtype, drop=0):
            return tuple(jnp.zeros(shape[: 4 - drop], dtype) for shape in shapes)

        return cls(
            k=buffers(config.dtype),
            v=buffers(config.dtype),
            lengths=jnp.zeros((layers, rows), jnp.int32),
            starts=jnp.zeros((layers, rows), jnp.int32),
            k_scale=buffers(jnp.float32, 1) if config.quantised else None,
            v_scale=buffers(jnp.float32, 1) if config.quantised else None,
            counters=jnp.zeros((layers, 3, 2), jnp.uint32) if statistics else None,
            windows=config.windows,
        )

    @property
    def batch_size(self) -> int:
        """B."""
        return self.lengths.shape[1]

    @property
    def memory_bytes(self) -> int:
        """Bytes of the K and V buffers and scales: `KVCacheConfig.estimate_memory_bytes`."""
        return sum(x.nbytes for x in jax.tree.leaves((self.k, self.v, self.k_scale, self.v_scale)))

    def capacity(self, layer: int) -> int:
        """Slots per row of a layer's buffer."""
        return self.k[layer].shape[1]

    def next_positions(self, n: int, layer: int = 0) -> jax.Array:
        """Absolute positions `[B, n]` of the next n tokens: what rotary embedding must use."""
        return self.lengths[layer][:, None] + jnp.arange(n, dtype=jnp.int32)[None]

    def append(
        self, layer: int, k: jax.Array, v: jax.Array, counts: jax.Array | None = None
    ) -> "KVCache":
        """Add tokens to the rows of one layer.

        Args:
            layer: a Python int; each layer has its own lengths.
            k, v: `[B, T, K, H]`; row b's first `counts[b]` tokens are added, the rest is padding.
            counts: `[B]` i32 in 0..T; None means T for every row.

        Raises:
            CacheOverflow: no window is set and a row has not enough room (only when the lengths
                are known; under `jit` what does not fit is dropped and `overflowed` becomes true).
            ValueError: shapes do not fit the cache.
        """
        layer = static_layer(layer, len(self.k))
        counts = self._check(layer, k, v, counts)
        slots, lengths, starts = self._plan(layer, k.shape[1], counts)
        return dataclasses.replace(
            self._store(layer, k, v, slots),
            lengths=self.lengths.at[layer].set(lengths),
            starts=self.starts.at[layer].set(starts),
            counters=self._count(layer, counts, starts),
        )

    def get(self, layer: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """A layer's whole buffer: K, V `[B, S, K, H]` and positions `[B, S]` i32.

        `positions[b, s]` is the absolute position of what lies in slot s of row b, -1 where nothing
        does.  Quantised values come back in f32.
        """
        layer = static_layer(layer, len(self.k))
        size = self.capacity(layer)
        slots = jnp.arange(size, dtype=jnp.int32)[None]
        lengths, starts = self.lengths[layer][:, None], self.starts[layer][:, None]
        # The youngest position of a ring that can lie in this slot; after a truncation it may be
        # older than what is held, and then the slot holds a token that was taken back.
        ring = self.windows[layer] is not None
        youngest = slots + (lengths - 1 - slots) // size * size if ring else slots
        held = (youngest >= starts) & (youngest < lengths)
        return (
            dequantize(self.k[layer], None if self.k_scale is None else self.k_scale[layer]),
            dequantize(self.v[layer], None if self.v_scale is None else self.v_scale[layer]),
            jnp.where(held, youngest, -1),
        )

    def update_at(
        self, layer: int, positions: jax.typing.ArrayLike, k: jax.Array, v: jax.Array
    ) -> "KVCache":
        """Replace tokens that are held.

        Args:
            layer: a Python int.
            positions: `[B, T]` absolute positions, distinct within a row; -1 writes nothing.
            k, v: `[B, T, K, H]`.

        Raises:
            IndexError: a position is not held (under `jit` it is not written).
            ValueError: shapes do not fit the cache.
        """
        layer = static_layer(layer, len(self.k))
        self._check(layer, k, v, None, room=False)
        positions = jnp.asarray(positions, jnp.int32)
        if positions.shape != k.shape[:2]:
            raise ValueError(f"{positions.shape=} for {k.shape=}")
        size = self.capacity(layer)
        starts, lengths = self.starts[layer][:, None], self.lengths[layer][:, None]
        held = (positions >= starts) & (positions < jnp.minimum(lengths, starts + size))
        if not _traced(held) and bool((~held & (positions != -1)).any()):
            row, column = np.argwhere(np.asarray(~held & (positions != -1)))[0]
            raise IndexError(
                f"row {row} of layer {layer} holds positions {starts[row, 0]} to "
                f"{lengths[row, 0] - 1}, not {positions[row, column]}"
            )
        return self._store(layer, k, v, jnp.where(held, positions % size, size))

    def truncate(self, lengths: jax.typing.ArrayLike) -> "KVCache":
        """Forget the newest tokens of every layer: row b keeps at most `lengths[b]` positions.

        A window that has moved past `lengths - window` (`rollback` says how far it may) cannot be
        made whole again.

        Args:
            lengths: a number or `[B]` i32.

        Raises:
            ValueError: a length is negative, or a window would have a hole at its old end (under
                `jit` it has, and `incomplete` tells).
        """
        wanted = jnp.broadcast_to(jnp.asarray(lengths, jnp.int32), (self.batch_size,))
        new = jnp.clip(wanted[None], 0, self.lengths)
        cache = dataclasses.replace(self, lengths=new, starts=jnp.minimum(self.starts, new))
        if not _traced(new):
            if bool((wanted < 0).any()):
                raise ValueError(f"cannot truncate to lengths {wanted.tolist()}")
            bad = cache._holes() & ~self._holes()
            if bool(bad.any()):
                layer, row = np.argwhere(np.asarray(bad))[0]
                raise ValueError(
                    f"cannot truncate row {row} of layer {layer} from "
                    f"{self.lengths[layer, row]} to {new[layer, row]} tokens: its window of "
                    f"{self.windows[layer]} would begin before position "
                    f"{self.starts[layer, row]}, the oldest held; set KVCacheConfig.rollback to "
                    "the most that is taken back"
                )
        return cache

    def clear(self, rows: jax.typing.ArrayLike | None = None) -> "KVCache":
        """Empty the given rows (an index or several), or all; statistics go on.

        The values are zeroed too: a NaN left in an unseen slot would still meet a weight of zero,
        and `0 * NaN` is NaN.
        """
        at = slice(None) if rows is None else self._rows(rows)
        zero = lambda x: x.at[at].set(0)
        return dataclasses.replace(
            self,
            v=jax.tree.map(zero, self.v),
            v_scale=jax.tree.map(zero, self.v_scale),
            lengths=self.lengths.at[:, at].set(0),
            starts=self.starts.at[:, at].set(0),
        )

    def copy_batch_state(self, source: jax.typing.ArrayLike) -> "KVCache":
        """Row b becomes what row `source[b]` was: the reordering of a beam search.

        Args:
            source: `[B]` i32.

        Raises:
            ValueError: not one source per row, or a row that does not exist.
        """
        source = self._rows(source)
        if source.shape != (self.batch_size,):
            raise ValueError(f"{source.shape=} for {self.batch_size} rows")
        take = lambda x: jnp.take(x, source, axis=0, mode="clip")
        return dataclasses.replace(
            self,
            **{
                name: jax.tree.map(take, getattr(self, name))
                for name in ("k", "v", "k_scale", "v_scale")
            },
            lengths=jnp.take(self.lengths, source, axis=1, mode="clip"),
            starts=jnp.take(self.starts, source, axis=1, mode="clip"),
        )

    # What went wrong where nothing could be raised.

    @property
    def overflowed(self) -> jax.Array:
        """`[B]` bool: rows given more tokens than a buffer without a window has room for."""
        size = np.array([x.shape[1] for x in self.k])[:, None]
        full = np.array([window is None for window in self.windows])[:, None]
        return jnp.any(full & (self.lengths > size), axis=0)

    @property
    def incomplete(self) -> jax.Array:
        """`[B]` bool: rows that lack a token which full attention, or the window, would see."""
        return self.overflowed | jnp.any(self._holes(), axis=0)

    def check(self) -> None:
        """Under `checkify`: fail when a row is `incomplete`.

        Example:
            >>> config = KVCacheConfig(
            ...     num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, max_seq_len=2
            ... )
            >>> def step(cache, k):
            ...     cache = cache.append(0, k, k)
            ...     cache.check()
            ...     return cache
            >>> checked = jax.jit(checkify.checkify(step))
            >>> error, cache = checked(KVCache.create(config), jnp.ones((1, 3, 1, 2)))
            >>> error.get().split(" (")[0]
            'rows lack tokens: lengths [3], starts [0]'
        """
        checkify.check(
            ~jnp.any(self.incomplete),
            "rows lack tokens: lengths {lengths}, starts {starts}",
            lengths=self.lengths.max(axis=0),
            starts=self.starts.max(axis=0),
        )

    def stats(self) -> KVCacheStats:
        """Read the counters (waits for the device).

        Raises:
            ValueError: the cache was made with `statistics=False`.
        """
        if self.counters is None:
            raise ValueError("this cache does not count: it was made with statistics=False")
        words = np.asarray(self.counters).astype(object).sum(axis=0)
        hits, misses, evictions = (int(low) + (int(high) << 32) for low, high in words)
        sizes = np.array([x.shape[1] for x in self.k])[:, None]
        held = np.minimum(np.asarray(self.lengths), sizes + np.asarray(self.starts))
        return KVCacheStats(
            hits=hits,
            misses=misses,
            evictions=evictions,
            memory_bytes=self.memory_bytes,
            held_tokens=int((held - np.asarray(self.starts)).sum()),
            capacity_tokens=int(sizes.sum()) * self.batch_size,
        )

    # Below: the parts of an append.

    def _check(self, layer: int, k, v, counts, *, room: bool = True) -> jax.Array:
        buffer = self.k[layer]
        expected = (buffer.shape[0], k.shape[1] if k.ndim == 4 else "T", *buffer.shape[2:])
        if k.shape != expected or v.shape != k.shape:
            raise ValueError(f"{k.shape=} and {v.shape=} must both be {expected} in layer {layer}")
        tokens = k.shape[1]
        rows = self.batch_size
        if counts is None:
            counts = jnp.full((rows,), tokens, jnp.int32)
        counts = jnp.asarray(counts, jnp.int32)
        if counts.shape != (rows,):
            raise ValueError(f"{counts.shape=} for {rows} rows")
        if not _traced(counts) and bool(((counts < 0) | (counts > tokens)).any()):
            raise ValueError(f"counts {counts.tolist()} outside 0..{tokens}, the tokens given")
        if room and self.windows[layer] is None and not _traced(counts, self.lengths):
            over = np.asarray(self.lengths[layer] + counts) > self.capacity(layer)
            if over.any():
                row = int(np.argmax(over))
                raise CacheOverflow(
                    f"row {row} of layer {layer} holds {int(self.lengths[layer, row])} of "
                    f"{self.capacity(layer)} tokens and has no room for {int(counts[row])} more: "
                    "make the cache with a larger max_seq_len, set a window, or truncate or clear "
                    "the row"
                )
        return counts

    def _plan(self, layer: int, tokens: int, counts: jax.Array):
        """Where each new token goes (`size` = nowhere), and the lengths and starts after it."""
        size = self.capacity(layer)
        index = jnp.arange(tokens, dtype=jnp.int32)[None]
        slots = self.lengths[layer][:, None] + index
        written = index < counts[:, None]
        lengths, starts = self.lengths[layer] + counts, self.starts[layer]
        if self.windows[layer] is not None:
            # Two tokens of one chunk must not meet in a slot: those that the chunk itself pushes
            # out are not written.
            written &= index >= counts[:, None] - size
            slots = slots % size
            starts = jnp.maximum(starts, lengths - size)
        return jnp.where(written, jnp.minimum(slots, size), size), lengths, starts

    def _store(self, layer: int, k, v, slots) -> "KVCache":
        rows = jnp.arange(self.batch_size, dtype=jnp.int32)[:, None]

        def put(buffers, values):
            new = (
                buffers[layer].at[rows, slots].set(values.astype(buffers[layer].dtype), mode="drop")
            )
            return (*buffers[:layer], new, *buffers[layer + 1 :])

        with jax.named_scope("kv_write"):
            if self.k_scale is None or self.v_scale is None:
                return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))
            (k, k_scale), (v, v_scale) = (quantise(x, self.k[layer].dtype) for x in (k, v))
            return dataclasses.replace(
                self,
                k=put(self.k, k),
                v=put(self.v, v),
                k_scale=put(self.k_scale, k_scale),
                v_scale=put(self.v_scale, v_scale),
            )

    def _count(self, layer: int, counts, starts) -> jax.Array | None:
        if self.counters is None:
            return None
        past = jnp.minimum(self.lengths[layer] - self.starts[layer], self.capacity(layer))
        events = jnp.stack(
            [
                jnp.sum(jnp.where(counts > 0, past, 0)),
                jnp.sum(counts),
                jnp.sum(starts - self.starts[layer]),
            ]
        ).astype(jnp.uint32)
        low, high = self.counters[layer, :, 0], self.counters[layer, :, 1]
        total = low + events
        carried = high + (total < low).astype(jnp.uint32)
        return self.counters.at[layer].set(jnp.stack([total, carried], axis=-1))

    def _holes(self) -> jax.Array:
        """`[L, B]` bool: a window whose old end has been overwritten and then taken back to."""
        windows = np.array([w or np.iinfo(np.int32).max for w in self.windows])[:, None]
        return self.starts > jnp.maximum(self.lengths - windows, 0)

    def _rows(self, rows) -> jax.Array:
        rows = jnp.asarray(rows, jnp.int32)
        if not _traced(rows) and bool(((rows < 0) | (rows >= self.batch_size)).any()):
            raise ValueError(f"rows {rows.tolist()} of a cache of {self.batch_size} rows")
        return rows


def dequantize(q: jax.Array, scale: jax.Array | None) -> jax.Array:
    """`q * scale` in f32, or q itself where nothing was scaled.

    Example:
        >>> dequantize(jnp.array([[-127, 64]], jnp.int8), jnp.array([0.5])).tolist()
        [[-63.5, 32.0]]
    """
    return q if scale is None else q.astype(jnp.float32) * scale[..., None]


def _traced(*values) -> bool:
    return any(isinstance(value, Tracer) for value in values)


def static_layer(layer, num_layers: int) -> int:
    """`layer` as an int.

    Raises:
        TypeError: it is traced.
        IndexError: there is no such layer.

    Example:
        >>> static_layer(np.int32(3), 4)
        3
    """
    try:
        index = operator.index(layer)
    except TypeError as error:
        raise TypeError(
            f"{layer=} must be a Python int: a cache keeps one buffer per layer, so layers are "
            "unrolled, not scanned over"
        ) from error
    if not 0 <= index < num_layers:
        raise IndexError(f"layer {index} of a cache of {num_layers} layers")
    return index
