"""`Outputs`: what a model said about a batch, and how to make a decoder say more than logits."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from aidx.typing import Array, Attend, Forward, Params


@struct.dataclass
class Gaussian:
    """A diagonal normal distribution per example.

    Example:
        >>> Gaussian(jnp.zeros((2, 3)), jnp.zeros((2, 3))).mean.shape
        (2, 3)
    """

    mean: Array  # [*B, D]
    log_var: Array  # [*B, D]; the logarithm of the variance


@struct.dataclass
class Outputs:
    """What a model said about a batch; what it did not say is None or empty.

    A strategy names the field that it misses: logits alone are enough for `response_based`.

    Example:
        >>> Outputs(logits=jnp.zeros((2, 5))).features
        ()
    """

    logits: Array | None = None  # [*B, V]
    features: tuple[Array, ...] = ()  # per layer [*B, D]
    attention: tuple[Array, ...] = ()  # per layer [*B, N, T, S], rows sum to one
    exits: tuple[Array, ...] = ()  # logits of shallower classifiers, [*B, V]
    exit_features: tuple[Array, ...] = ()  # of those classifiers, as wide as the last features
    embedding: Array | None = None  # [B, D]; None: the last features, averaged over middle axes
    latent: Gaussian | None = None  # q(z | x)
    reconstruction: Gaussian | None = None  # q(teacher's last features | z)
    temperature: Array | None = None  # [*B]; in place of the loss's, from adaptive teachers
    weights: Array | None = None  # [*B]; multiplies the loss's, from curriculum teachers


def mean_pool(x: Array, weights: Array | None = None) -> Array:
    """The mean over all axes between the first and the last: `[B, ..., D]` to `[B, D]`.

    Args:
        x: `[B, ..., D]`.
        weights: `[B, ...]`, for example 0 for padding; None weighs all alike.

    Raises:
        ValueError: weights of another shape.

    Example:
        >>> mean_pool(jnp.arange(6.0).reshape(1, 3, 2), jnp.array([[1.0, 1.0, 0.0]])).tolist()
        [[1.0, 2.0]]
    """
    B, D = x.shape[0], x.shape[-1]
    flat = x.reshape(B, -1, D).astype(jnp.float32)
    if weights is None:
        return flat.mean(1)
    if weights.shape != x.shape[:-1]:
        raise ValueError(f"{weights.shape=} does not fit {x.shape=}")
    w = weights.reshape(B, -1, 1).astype(jnp.float32)
    total = w.sum(1)
    return jnp.where(w != 0, w * flat, 0.0).sum(1) / jnp.where(total != 0, total, 1.0)


def embedding_of(outputs: Outputs, weights: Array | None = None) -> Array:
    """The embedding `[B, D]` of each example: the field, or the last features pooled.

    Raises:
        ValueError: neither is there, or the embedding has another rank.

    Example:
        >>> embedding_of(Outputs(features=(jnp.ones((2, 3, 4)),))).shape
        (2, 4)
    """
    if outputs.embedding is not None:
        if outputs.embedding.ndim != 2:
            raise ValueError(f"{outputs.embedding.shape=} is not [B, D]: pool it (mean_pool)")
        return outputs.embedding.astype(jnp.float32)
    if not outputs.features:
        raise ValueError("this strategy compares embeddings: give embedding, or features")
    last = outputs.features[-1]
    return mean_pool(last, weights if weights is not None and last.ndim > 2 else None)


def decoder_outputs(
    forward: Forward,
    params: Params,
    tokens: Array,
    positions: Array,
    attend: Attend,
    *,
    features: Sequence[int] = (),
    attention: Sequence[int] = (),
) -> Outputs:
    """Logits, hidden states and attention maps of a decoder, in one pass.

    Nothing in the model has to know: hidden states are seen by a wrapper around each layer, maps
    by one around `attend`, and both travel in what `attend` threads through.  The layers must be a
    tuple (`unstack_layers`).  A map costs `[B, N, T, T]`; features cost nothing but their memory.

    Args:
        forward: a model's.
        params: its parameters, unstacked.
        tokens: i32 `[B, T]`.
        positions: i32 `[B, T]`.
        attend: without a cache (`aidx.no_cache_attend()`).
        features: layers whose output `[B, T, D]` is wanted; negative from the end.
        attention: layers whose causal map `[B, N, T, T]` is wanted.

    Raises:
        ValueError: a layer that is not there, or stacked layers.

    Example:
        >>> from aidx.cache import no_cache_attend
        >>> from aidx.models import LlamaConfig, Model, init_params
        >>> config = LlamaConfig(97, 32, 64, 2, 4, 2, 8)
        >>> model = Model(config, init_params(config, jax.random.key(0)))
        >>> tokens, places = jnp.ones((1, 3), jnp.int32), jnp.arange(3, dtype=jnp.int32)[None]
        >>> out = decoder_outputs(model.forward, model.params, tokens, places, no_cache_attend(),
        ...                       features=[-1], attention=[0])
        >>> out.logits.shape, out.features[0].shape, out.attention[0].shape
        ((1, 3, 97), (1, 3, 32), (1, 4, 3, 3))
    """
    if not isinstance(params["layers"], tuple | list):
        raise ValueError("the layers are stacked: unstack_layers(params) first")
    L = len(params["layers"])
    layers_of = [tuple(i % L for i in which) for which in (features, attention)]
    if bad := [i for which in (features, attention) for i in which if not -L <= i < L]:
        raise ValueError(f"layers {bad} of a model that has {L}")
    hidden_at, maps_at = layers_of

    def watching(cache, layer, q, k, v, **options):
        inner, seen = cache
        out, inner = attend(inner, layer, q, k, v, **options)
        if layer in maps_at:
            seen = {**seen, ("map", layer): attention_map(q, k, **options)}
        return out, (inner, seen)

    count = iter(range(L))

    def wrap(layer):
        i = next(count)

        def seeing(x, cache, p):
            x, (inner, seen) = layer(x, cache, p)
            if i in hidden_at:
                seen = {**seen, ("hidden", i): x}
            return x, (inner, seen)

        return seeing

    logits, (_, seen) = forward(params, tokens, positions, watching, (None, {}), remat=wrap)  # pyright: ignore
    return Outputs(
        logits=logits,
        features=tuple(seen["hidden", i] for i in hidden_at),
        attention=tuple(seen["map", i] for i in maps_at),
    )


def attention_map(
    q: Array,
    k: Array,
    *,
    window: int | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Any = None,
) -> Array:
    """The causal attention probabilities `softmax(q k^T)`, `[B, N, T, S]` in f32.

    Args:
        q: `[B, T, N, H]`.
        k: `[B, S, K, H]`, the last T of S being those of the queries.
        window: how many keys a query sees with its own.
        scale: of the products; None is `1 / sqrt(H)`.
        soft_cap: c of `c tanh(x / c)`.
        sinks: `[N]` logits that take part in the sum and in nothing else.

    Example:
        >>> attention_map(jnp.ones((1, 2, 2, 4)), jnp.ones((1, 2, 1, 4)))[0, 0].tolist()
        [[1.0, 0.0], [0.5, 0.5]]
    """
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    grouped = q.reshape(B, T, K, N // K, H).astype(jnp.float32)
    logits = jnp.einsum("btkgh,bskh->bkgts", grouped, k.astype(jnp.float32))
    logits = logits.reshape(B, N, T, S) * (H**-0.5 if scale is None else scale)
    if soft_cap is not None:
        logits = soft_cap * jnp.tanh(logits / soft_cap)
    distance = jnp.arange(S - T, S)[:, None] - jnp.arange(S)[None, :]
    seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
    logits = jnp.where(seen, logits, -jnp.inf)
    if sinks is None:
        return jax.nn.softmax(logits, axis=-1)
    sink = jnp.broadcast_to(sinks.astype(jnp.float32)[None, :, None, None], (B, N, T, 1))
    return jax.nn.softmax(jnp.concatenate([logits, sink], axis=-1), axis=-1)[..., :-1]
