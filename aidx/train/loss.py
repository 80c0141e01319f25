"""Cross-entropy without the logits: unembedding and loss fused, a chunk of tokens at a time.

For hidden state x, table W, target y and weight w of a token:

    l    = W x                                  [V], f32
    loss = w * ((1 - e) * (lse(l) - l_y) + e * (lse(l) - mean(l)) + z * lse(l)^2)
    d l  = w * (p * (1 + 2 z lse(l)) - (1 - e) * onehot(y) - e / V),    p = softmax(l)

The loss is a sum, so its gradient is known up to one factor while the logits are at hand: the
forward pass of a differentiated call makes `dx = W^T dl` and `dW += dl x^T` chunk by chunk, and
the backward pass multiplies by the cotangent.  Three matmuls over the vocabulary instead of the
four of recomputation, and `[B, T, V]` exists in neither direction.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ..cache import no_cache_attend
from ..typing import Array, Params, PyTree
from .remat import remat as remat_wrapper
from .step import LossFn

CHUNK_LOGITS = 1 << 29  # f32 logits of a chunk: 2 GiB


def fused_cross_entropy(
    hidden: Array,
    table: Array,
    targets: Array,
    weights: Array | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
) -> tuple[Array, Array, dict[str, Array]]:
    """Cross-entropy of `softmax(hidden @ table.T)` (see the module), `[*B, V]` never whole.

    Args:
      hidden: `[*B, D]`, any float dtype; matmuls take it as it is and accumulate in f32.
      table: `[V, D]`, the unembedding.
      targets: i32 `[*B]`; a negative one has weight zero.
      weights: `[*B]`, a mask or factors; None is ones.  Not differentiated.
      label_smoothing: e in [0, 1), the share of the target spread over all of V (Szegedy 2016).
      z_loss: z, keeps the normaliser near one (de Brebisson & Vincent 2016; PaLM 2022: 1e-4).
      chunk_tokens: rows at a time; None takes `default_chunk`.

    Returns:
      `(total, weight, sums)`, f32 scalars as a loss function returns them; sums are `nll` (without
      smoothing and z) and `accuracy` (the target is an argmax).

    Raises:
      ValueError: shapes that do not go together, or an option out of range.

    References:
      Hsu et al., Liger Kernel: Efficient Triton Kernels for LLM Training, 2024 (the gradient in
      the forward pass); Wijmans et al., Cut Your Losses in Large-Vocabulary Language Models, 2024.

    >>> hidden, table = jnp.eye(2, 4), jnp.eye(3, 4)
    >>> total, weight, sums = fused_cross_entropy(hidden, table, jnp.array([0, -1]))
    >>> f"{total:.3f}", weight.item(), sums["accuracy"].item()
    ('0.551', 1.0, 1.0)
    """
    lead, (V, D) = hidden.shape[:-1], table.shape
    if hidden.shape[-1] != D:
        raise ValueError(f"{hidden.shape=} and {table.shape=} differ in D")
    got = None if weights is None else weights.shape
    if targets.shape != lead or got not in (None, lead):
        raise ValueError(f"{targets.shape=} and weights {got} must be {lead}")
    check_options(label_smoothing, z_loss)
    N = targets.size
    if chunk_tokens is None:
        chunk_tokens = default_chunk(V, D)
    if chunk_tokens < 1:
        raise ValueError(f"{chunk_tokens=} must be positive")
    weights = masked_weights(targets, weights)
    chunks = max(1, -(-N // chunk_tokens))
    # Chunk i has the rows i::chunks: tokens that are spread over devices stay where they are.
    pad = -N % chunks
    cut = lambda x: jnp.swapaxes(
        jnp.pad(x.reshape(N, *x.shape[len(lead) :]), ((0, pad), *[(0, 0)] * (x.ndim - len(lead))))
        .reshape((N + pad) // chunks, chunks, *x.shape[len(lead) :]),
        0,
        1,
    )  # fmt: skip
    with jax.named_scope("cross_entropy"):
        total, sums = _chunked(
            (label_smoothing, z_loss), cut(hidden), table, cut(targets), cut(weights)
        )
        return total, weights.sum(), jax.lax.stop_gradient(sums)


def cross_entropy(
    logits: Array,
    targets: Array,
    weights: Array | None = None,
    *,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> tuple[Array, Array, dict[str, Array]]:
    """The same of whole logits `[*B, V]`: small vocabularies, classifiers, the oracle of the fused.

    Args:
      logits: `[*B, V]`; the arithmetic is f32.
      targets, weights, label_smoothing, z_loss: of `fused_cross_entropy`.

    Returns:
      `(total, weight, sums)`.

    Raises:
      ValueError: shapes that do not go together, or an option out of range.

    >>> total, weight, _ = cross_entropy(jnp.zeros((2, 4)), jnp.array([0, 3]))
    >>> f"{total / weight:.4f}"
    '1.3863'
    """
    if targets.shape != logits.shape[:-1] or (
        weights is not None and weights.shape != targets.shape
    ):
        raise ValueError(f"{logits.shape=} and {targets.shape=} (and weights) do not go together")
    check_options(label_smoothing, z_loss)
    weights = masked_weights(targets, weights)
    losses, lse, target, top = token_losses(logits, targets, label_smoothing, z_loss)
    sums = {
        "nll": (weights * (lse - target)).sum(),
        "accuracy": (weights * (target >= top)).sum(),
    }
    return (weights * losses).sum(), weights.sum(), jax.lax.stop_gradient(sums)


def default_chunk(V: int, D: int) -> int:
    """Rows of a chunk: what makes 2 GiB of f32 logits, and 2 D at least.

    A chunk adds `[V, D]` to the table's gradient, 8 bytes of traffic an entry; with 2 D rows that
    is a quarter of what its logits cost, and these weigh twice what the gradient does.

    >>> default_chunk(128256, 2048), default_chunk(128256, 4096)
    (4185, 8192)
    """
    return max(1, CHUNK_LOGITS // V, 2 * D)


def check_options(label_smoothing: float, z_loss: float) -> None:
    """Raise ValueError for options out of range.

    >>> check_options(0.1, 1e-4)
    """
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"{label_smoothing=} must lie in [0, 1)")
    if not z_loss >= 0:
        raise ValueError(f"{z_loss=} must not be negative")


def masked_weights(targets: Array, weights: Array | None) -> Array:
    """f32 weights, zero where the target is negative.

    >>> masked_weights(jnp.array([3, -1]), None).tolist()
    [1.0, 0.0]
    """
    weights = jnp.ones(targets.shape) if weights is None else weights
    return jax.lax.stop_gradient(jnp.where(targets >= 0, weights, 0).astype(jnp.float32))


def token_losses(
    logits: Array, targets: Array, label_smoothing: float, z_loss: float
) -> tuple[Array, Array, Array, Array]:
    """Per token: the loss, the log-normaliser, the target's logit, the largest; f32 `[*B]`.

    >>> loss, lse, target, top = token_losses(jnp.zeros((1, 2)), jnp.array([1]), 0.0, 0.0)
    >>> f"{loss.item():.4f}"
    '0.6931'
    """
    logits = logits.astype(jnp.float32)
    top = jax.lax.stop_gradient(logits.max(-1))
    lse = top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))
    # A masked sum, not a gather: it fuses with the other reductions, and V may be sharded.
    target = jnp.where(hits(logits, targets), logits, 0).sum(-1)
    return loss_of(logits, lse, target, label_smoothing, z_loss), lse, target, top


def loss_of(
    logits: Array, lse: Array, target: Array, label_smoothing: float, z_loss: float
) -> Array:
    """Per token: the loss, from its log-normaliser and its target's logit.

    >>> loss_of(jnp.zeros((1, 2)), jnp.ones(1), jnp.zeros(1), 0.0, 0.5).item()
    1.5
    """
    loss = lse - (1 - label_smoothing) * target + z_loss * lse**2
    return loss - label_smoothing * logits.mean(-1) if label_smoothing else loss


def one_pass_statistics(logits: Array, targets: Array) -> tuple[Array, Array, Array]:
    """(log-normaliser, target's logit, largest logit) of rows, f32 `[C]`, in one reading.

    Not differentiable: the fused loss writes its gradient down.  The running maximum and the sum
    below it are one reduction (Milakov & Gimelshein, Online normalizer calculation for softmax,
    2018).

    >>> lse, target, top = one_pass_statistics(jnp.array([[0.0, 0.0]]), jnp.array([1]))
    >>> f"{lse.item():.4f}", target.item(), top.item()
    ('0.6931', 0.0, 0.0)
    """
    logits = logits.astype(jnp.float32)

    def join(left, right):
        (m1, s1, t1), (m2, s2, t2) = left, right
        m = jnp.maximum(m1, m2)
        return m, s1 * jnp.exp(m1 - m) + s2 * jnp.exp(m2 - m), t1 + t2

    least = jnp.float32(jnp.finfo(jnp.float32).min)  # finite: the difference of two is a number
    zero = jnp.float32(0)
    parts = (logits, jnp.ones_like(logits), jnp.where(hits(logits, targets), logits, 0))
    top, below, target = jax.lax.reduce(parts, (least, zero, zero), join, (logits.ndim - 1,))
    return top + jnp.log(below), target, top


def hits(logits: Array, targets: Array) -> Array:
    """Where a logit is its token's target's, bool `[*B, V]`.

    >>> hits(jnp.zeros((1, 3)), jnp.array([1])).tolist()
    [[False, True, False]]
    """
    index = jax.lax.broadcasted_iota(targets.dtype, logits.shape, logits.ndim - 1)
    return index == targets[..., None]


def _logits(x: Array, table: Array) -> Array:
    with jax.named_scope("unembed"):
        return jnp.einsum("td,vd->tv", x, table, preferred_element_type=jnp.float32)


def _one_chunk(options: tuple[float, float], x: Array, table: Array, y: Array, w: Array) -> Any:
    """(total, sums) of one chunk, and what its gradient needs."""
    logits = _logits(x, table)
    lse, target, top = one_pass_statistics(logits, y)
    losses = loss_of(logits, lse, target, *options)
    sums = {"nll": (w * (lse - target)).sum(), "accuracy": (w * (target >= top)).sum()}
    return ((w * losses).sum(), sums), (logits, lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(options: tuple[float, float], x: Array, table: Array, y: Array, w: Array) -> Any:
    """(total, sums) over x `[chunks, C, D]`, y and w `[chunks, C]`."""
    one = lambda chunk: _one_chunk(options, chunk[0], table, *chunk[1:])[0]
    if x.shape[0] == 1:
        return one((x[0], y[0], w[0]))
    add = lambda carry, chunk: (jax.tree.map(jnp.add, carry, one(chunk)), None)
    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(add, (zero, {"nll": zero, "accuracy": zero}), (x, y, w))[0]


def _chunked_fwd(options: tuple[float, float], x: Array, table: Array, y: Array, w: Array) -> Any:
    label_smoothing, z_loss = options
    V = table.shape[0]
    # f16 cannot hold the small probabilities that a loss scale would rescue later.
    dtype = jnp.float32 if x.dtype == jnp.float16 else x.dtype

    def step(carry, chunk):
        outputs, d_table = carry
        x, y, w = chunk
        found, (logits, lse) = _one_chunk(options, x, table, y, w)
        with jax.named_scope("d_logits"):
            d = jnp.exp(logits - lse[:, None]) * (1 + 2 * z_loss * lse)[:, None]
            d = d - jnp.where(hits(logits, y), 1 - label_smoothing, 0.0) - label_smoothing / V
            d = (w[:, None] * d).astype(dtype)
        with jax.named_scope("d_hidden"):
            d_x = jnp.einsum("tv,vd->td", d, table, preferred_element_type=jnp.float32)
        with jax.named_scope("d_table"):
            d_table = d_table + jnp.einsum("tv,td->vd", d, x, preferred_element_type=jnp.float32)
        return (jax.tree.map(jnp.add, outputs, found), d_table), d_x.astype(dtype)

    zero = jnp.zeros((), jnp.float32)
    start = ((zero, {"nll": zero, "accuracy": zero}), jnp.zeros(table.shape, jnp.float32))
    if x.shape[0] == 1:
        (outputs, d_table), d_x = step(start, (x[0], y[0], w[0]))
        d_x = d_x[None]
    else:
        (outputs, d_table), d_x = jax.lax.scan(step, start, (x, y, w))
    like = jnp.zeros((0,), x.dtype), jnp.zeros((0,), table.dtype)  # dtypes are not residuals
    return outputs, (d_x, d_table, like)


def _chunked_bwd(options: tuple[float, float], saved: Any, cotangents: Any) -> Any:
    d_x, d_table, (x, table) = saved
    scale = cotangents[0]
    times = lambda a, like: (a.astype(jnp.float32) * scale).astype(like.dtype)
    return times(d_x, x), times(d_table, table), None, None


_chunked.defvjp(_chunked_fwd, _chunked_bwd)


@jax.custom_vjp
def lookup(table: Array, tokens: Array) -> Array:
    """`table[tokens]`, whose gradient is accumulated in f32: `[*B, D]` of a table `[V, D]`.

    >>> table, tokens = jnp.zeros((2, 1), jnp.bfloat16), jnp.zeros(1000, jnp.int32)
    >>> jax.grad(lambda t: lookup(t, tokens).sum())(table)[0, 0].item()  # 256 in bf16 sums
    1000.0
    """
    return jnp.take(table, tokens, axis=0, mode="clip")


def _lookup_fwd(table: Array, tokens: Array) -> Any:
    return lookup(table, tokens), (tokens, jnp.zeros((table.shape[0], 0), table.dtype))


def _lookup_bwd(saved: Any, d: Array) -> Any:
    tokens, like = saved
    with jax.named_scope("d_embed"):
        zeros = jnp.zeros((like.shape[0], d.shape[-1]), jnp.float32)
        return zeros.at[tokens].add(d.astype(jnp.float32), mode="clip").astype(like.dtype), None


lookup.defvjp(_lookup_fwd, _lookup_bwd)


def language_model_loss(
    forward: Callable[..., Any],
    *,
    remat: str = "none",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_tokens: int | None = None,
    implementation: Any = None,
    params_of: Callable[..., Params] | None = None,
) -> LossFn:
    """The next-token loss of a decoder, for `make_train_step`.

    Its batch is a dict: `tokens` and `targets` i32 `[B, T]`; and where they are there `positions`
    i32 `[B, T]` (else 0, 1, ...), `segment_ids` i32 `[B, T]` (packed documents that must not see
    each other; ascending is fast) and `weights` `[B, T]`.  `aidx.train.data` makes such batches.

    Args:
      forward: of a `Model`; parameters with a tuple of layers are unrolled, stacked ones scanned.
      remat: a policy of `aidx.train.remat`.
      label_smoothing, z_loss, chunk_tokens: of `fused_cross_entropy`.
      implementation: of `flash_attention`.
      params_of: makes the model's parameters of `(params, *rest)`, what the step trains and is
        given: the merge of a LoRA.  None takes params.

    Returns:
      A loss function; its sums are `nll` and `accuracy`.

    Raises:
      ValueError: an option out of range, an unknown policy.

    >>> import optax
    >>> from aidx.models import LlamaConfig, bind_forward, init_params
    >>> from aidx.train import init_state, make_train_step, next_token_batch
    >>> config = LlamaConfig(97, 32, 64, 1, 4, 2, 8, tied=True)
    >>> optimizer = optax.adamw(1e-3)
    >>> step = make_train_step(language_model_loss(bind_forward(config)), optimizer)
    >>> params = init_params(config, jax.random.key(0))
    >>> state = init_state(params, optimizer, jax.random.key(1))
    >>> state, metrics = step(state, next_token_batch(jnp.ones((1, 9), jnp.int32)))
    >>> metrics.weight.item()
    8.0
    """
    check_options(label_smoothing, z_loss)
    wrap = remat_wrapper(remat)

    def loss_fn(params: Params, batch: PyTree, key: Array, *rest: Any) -> tuple:
        model = params if params_of is None else params_of(params, *rest)
        tokens = batch["tokens"]
        positions = batch.get("positions")
        if positions is None:
            positions = jnp.broadcast_to(
                jnp.arange(tokens.shape[-1], dtype=jnp.int32), tokens.shape
            )
        attend = no_cache_attend(
            segment_ids=batch.get("segment_ids"), implementation=implementation
        )
        # The model looks its rows up in a table that has one for every token of the batch: the
        # gradient of a frequent token is a sum of thousands, which bf16 cannot accumulate.
        rows = lookup(model["embed"], tokens).reshape(tokens.size, -1)
        order = jnp.arange(tokens.size, dtype=jnp.int32).reshape(tokens.shape)
        looked_up = {**model, "embed": rows}
        hidden, _ = forward(looked_up, order, positions, attend, None, hidden=True, remat=wrap)
        return fused_cross_entropy(
            hidden,
            model.get("lm_head", model["embed"]),
            batch["targets"],
            batch.get("weights"),
            label_smoothing=label_smoothing,
            z_loss=z_loss,
            chunk_tokens=chunk_tokens,
        )

    return loss_fn


def next_token_batch(window: Array) -> dict[str, Array]:
    """A batch of windows `[B, T + 1]`: every token's target is the token after it.

    >>> next_token_batch(jnp.array([[5, 6, 7]]))["targets"].tolist()
    [[6, 7]]
    """
    return {"tokens": window[:, :-1], "targets": window[:, 1:]}
