"""TensorBoard's histograms, counted on the device: a kilobyte crosses instead of the array."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AxisType, NamedSharding

COPIES = 256  # of each counter


@functools.cache
def tensorflow_edges() -> np.ndarray:
    """The edges of TensorFlow's histograms: 0 and +-1e-12 * 1.1^k below 1e20; f64 `[1551]` or so.

    >>> edges = tensorflow_edges()
    >>> bool((np.diff(edges) > 0).all()), edges[edges.size // 2].item()
    (True, 0.0)
    """
    positive, edge = [], 1e-12
    while edge < 1e20:
        positive.append(edge)
        edge *= 1.1
    return np.array([-e for e in positive[::-1]] + [0.0] + positive)


@functools.cache
def _float32_edges() -> np.ndarray:
    """The least f32 at or above each edge: for an f32 x, `x >= edge` and `x >= this` are one."""
    edges = tensorflow_edges()
    near = edges.astype(np.float32)
    return np.where(near < edges, np.nextafter(near, np.float32(np.inf)), near)


def bin_of(x: jax.Array) -> jax.Array:
    """The bin of `tensorflow_edges` that each x lies in, i32; for what lies in none, any.

    Edges are powers: a logarithm is the bin, or one beside it, which two comparisons tell.

    >>> [f"{tensorflow_edges()[i]:.2g}" for i in bin_of(jnp.array([0.0, 1.05e-12, -1.05e-12]))]
    ['0', '1e-12', '-1.1e-12']
    """
    edges = jnp.asarray(_float32_edges())
    zero, last = edges.size // 2, edges.size - 2
    power = jnp.log(jnp.abs(x)) * np.float32(1 / np.log(1.1))
    k = jnp.floor(power - np.float32(np.log(1e-12) / np.log(1.1)))
    k = jnp.clip(k, -1, zero - 1).astype(jnp.int32)
    guess = jnp.clip(jnp.where(x < 0, zero - 2 - k, zero + 1 + k), 0, last)
    edge = lambda i: edges.at[i].get(mode="promise_in_bounds")
    guess = jnp.maximum(guess - (x < edge(guess)), 0)
    return jnp.minimum(guess + (x >= edge(guess + 1)), last)


@jax.jit
def device_histogram(x: jax.Array) -> jax.Array:
    """Counts between `tensorflow_edges` and the moments of the finite values of x.

    Args:
      x: any shape, a float of at most 32 bits.

    Returns:
      All in one array, i32 `[edges + 4]`: one launch and one copy for an array.  `unpacked` tells
      it apart.

    >>> found = unpacked(np.asarray(device_histogram(jnp.array([1.0, 2.0, jnp.nan]))))
    >>> int(found["counts"].sum()), found["num"], found["sum"], found["max"]
    (2, 2, 3.0, 2.0)
    """
    with jax.named_scope("histogram"):
        x = x.reshape(-1).astype(jnp.float32)
        edges = _float32_edges()
        bins = edges.size - 1
        # Most values share a few bins: every counter has copies, so that additions seldom meet.
        copy = (jax.lax.iota(jnp.uint32, x.size) % COPIES).astype(jnp.int32)
        within = (x >= edges[0]) & (x < edges[-1])
        place = jnp.where(within, bin_of(x), bins) * COPIES + copy
        counters = jnp.zeros(bins * COPIES, jnp.int32).at[place].add(1, mode="drop")
        counts = counters.reshape(bins, COPIES).sum(1)
        finite = jnp.isfinite(x)
        kept = jnp.where(finite, x, 0)
        least, most = jnp.where(finite, x, jnp.inf).min(), jnp.where(finite, x, -jnp.inf).max()
        moments = jnp.stack([least, most, kept.sum(), (kept * kept).sum()])
        bits = jax.lax.bitcast_convert_type(moments, jnp.int32)
        return jnp.concatenate([counts, finite.sum(dtype=jnp.int32)[None], bits])


def unpacked(packed: np.ndarray) -> dict[str, Any]:
    """What `device_histogram` packed: `counts` i32 `[edges - 1]`, and the finite values' `num`,
    `min`, `max`, `sum` and `sum_squares`.

    >>> unpacked(np.zeros(8, np.int32))["counts"].shape
    (3,)
    """
    moments = packed[-4:].view(np.float32).tolist()
    names = ("min", "max", "sum", "sum_squares")
    found = dict(zip(names, moments, strict=True))
    return {"counts": packed[:-5], "num": int(packed[-5]), **found}


def automatic(x: jax.Array) -> jax.Array:
    """x with the axes of its mesh left to XLA: counting has no rule for explicit ones.

    >>> automatic(jnp.ones(2)).shape
    (2,)
    """
    sharding = None if isinstance(x, Tracer) else x.sharding
    if not isinstance(sharding, NamedSharding):
        return x
    mesh = sharding.mesh.update(axis_types=(AxisType.Auto,) * len(sharding.mesh.axis_names))
    return jax.device_put(x, NamedSharding(mesh, sharding.spec))


def trimmed(counts: np.ndarray, edges: np.ndarray, max_bins: int | None) -> tuple[list, list]:
    """(right edges, counts) of the bins between the first and the last that is not empty.

    TensorBoard keeps right edges only, so an empty bin stays on the left.  With more than max_bins
    bins in all, neighbours are joined first.

    >>> trimmed(np.array([0, 2, 0, 1, 0]), np.arange(6.0), None)
    ([1.0, 2.0, 3.0, 4.0], [0, 2, 0, 1])
    """
    if max_bins is not None and counts.size > max_bins:
        width = -(-counts.size // max_bins)
        counts = np.pad(counts, (0, -counts.size % width)).reshape(-1, width).sum(1)
        edges = np.append(edges[:-1:width], edges[-1])
    used = np.flatnonzero(counts)
    first, last = int(used[0]), int(used[-1])
    return edges[first : last + 2].tolist(), [0, *counts[first : last + 1].tolist()]


def counted_on_device(x: Any) -> bool:
    """Whether counting x on its device pays: a float of at most 32 bits, elsewhere than on a CPU.

    A GPU adds to counters at the speed of its cache, XLA on a CPU one after another.

    >>> counted_on_device(np.ones(2))
    False
    """
    if not isinstance(x, jax.Array):
        return False
    tracing = isinstance(x, Tracer)
    platform = jax.default_backend() if tracing else next(iter(x.devices())).platform
    small = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize <= 4
    return platform != "cpu" and small and x.size > 0
