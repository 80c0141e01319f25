"""The next token of every row: masks, penalties, temperature, truncation, a Gumbel-max draw.

Per-row parameters are vectors (`SamplingRows`), so changing one never recompiles.  What needs an
entry per vocabulary item (`SamplingState`) enters only where some row uses it: a field that is
`None` costs nothing.  The order is vLLM's:

    raw logits -> logprobs
               -> allowed ids, banned ids, stop ids before min_tokens, logit bias
               -> penalties: repetition (prompt and output), frequency and presence (output)
               -> temperature -> min_p -> top_k -> top_p -> draw

Truncation sorts nothing.  min_p, top_k and top_p each keep the tokens at or above some threshold,
and that one is found digit by digit of its binary form (`_largest_key`), which is exact.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from aidx.typing import Array

Variant = Literal["greedy", "plain", "full"]
VARIANTS: tuple[Variant, ...] = ("greedy", "plain", "full")
_CHUNK = 256  # tokens summed at a time
_FEW_ROWS = 8  # up to so many, kernels are shorter than their launches
_TOP_K_KERNEL = 16  # the most that XLA's GPU kernel for top_k finds


@struct.dataclass
class SamplingRows:
    """One value a row: what a request asked of the sampler.

    `seed` is the request's 64-bit seed as (high, low) words and `sample` the index of this row
    among the request's `n` samples; with the token's position they make the key of the draw.
    `top_k` 0 and `top_p` 1 and `min_p` 0 keep everything.  `stop_from` is the first position at
    which a stop token may be drawn: prompt tokens + min_tokens.
    """

    seed: Any  # [R, 2] u32
    sample: Any  # [R] i32
    temperature: Any  # [R] f32, 0 takes the most likely token
    top_k: Any  # [R] i32
    top_p: Any  # [R] f32
    min_p: Any  # [R] f32
    repetition_penalty: Any  # [R] f32
    presence_penalty: Any  # [R] f32
    frequency_penalty: Any  # [R] f32
    stop_from: Any  # [R] i32


@struct.dataclass
class SamplingState:
    """What a row keeps for every vocabulary item; `None` where no row of the batch needs it.

    Sets of tokens are bits, 32 to a word (`pack_bits`), W = ceil(V / 32): 16 KiB a row at V = 128k.
    """

    counts: Any = None  # [R, V] i32, how often the output has each token
    prompt: Any = None  # [R, W] u32, the tokens of the prompt
    allowed: Any = None  # [R, W] u32, the tokens that may be drawn
    stop: Any = None  # [R, W] u32, the tokens masked while position < stop_from
    bias: Any = None  # [R, V] f32, added to the logits


@struct.dataclass
class TokenLogprobs:
    """Log-probabilities under the raw logits: of one token a row, and of the n most likely."""

    logprob: Array  # [R] f32
    rank: Array  # [R] i32, 1 + how many tokens are more likely
    top_tokens: Array  # [R, n] i32, most likely first
    top_logprobs: Array  # [R, n] f32


@struct.dataclass
class Sampled:
    """The drawn tokens `[R]` i32 (-1: a row without any finite logit left) and their logprobs."""

    tokens: Array
    logprobs: TokenLogprobs | None


def sampling_rows(
    num_rows: int,
    *,
    seed: int | Iterable[int] = 0,
    sample: Any = 0,
    temperature: Any = 1.0,
    top_k: Any = 0,
    top_p: Any = 1.0,
    min_p: Any = 0.0,
    repetition_penalty: Any = 1.0,
    presence_penalty: Any = 0.0,
    frequency_penalty: Any = 0.0,
    stop_from: Any = 0,
) -> SamplingRows:
    """`SamplingRows` of NumPy arrays from a value, or a sequence of `num_rows` values, a field.

    >>> sampling_rows(2, temperature=[0.0, 0.7], top_k=50).top_k.tolist()
    [50, 50]
    """
    seeds = [seed] * num_rows if isinstance(seed, int) else list(seed)
    if len(seeds) != num_rows:
        raise ValueError(f"{len(seeds)} seeds for {num_rows=}")

    def vector(value, dtype):
        return np.array(np.broadcast_to(np.asarray(value, dtype), (num_rows,)))

    return SamplingRows(
        seed=np.array([seed_words(s) for s in seeds], np.uint32).reshape(num_rows, 2),
        sample=vector(sample, np.int32),
        temperature=vector(temperature, np.float32),
        top_k=vector(top_k, np.int32),
        top_p=vector(top_p, np.float32),
        min_p=vector(min_p, np.float32),
        repetition_penalty=vector(repetition_penalty, np.float32),
        presence_penalty=vector(presence_penalty, np.float32),
        frequency_penalty=vector(frequency_penalty, np.float32),
        stop_from=vector(stop_from, np.int32),
    )


def seed_words(seed: int) -> tuple[int, int]:
    """The seed modulo 2^64 as (high, low) 32-bit words.

    >>> seed_words(-1) == (2**32 - 1, 2**32 - 1)
    True
    """
    return (seed >> 32) & 0xFFFFFFFF, seed & 0xFFFFFFFF


def pack_rows(rows: SamplingRows) -> np.ndarray:
    """All fields of `rows` as one i32 `[R, 11]` on the host: one transfer instead of ten.

    >>> packed = pack_rows(sampling_rows(3, top_p=0.9))
    >>> packed.shape, float(unpack_rows(packed).top_p[0])
    ((3, 11), 0.8999999761581421)
    """
    fields = [np.asarray(getattr(rows, name)) for name in SamplingRows.__dataclass_fields__]
    columns = [f.reshape(f.shape[0], -1).view(np.int32) for f in fields]
    return np.concatenate(columns, axis=1)


def unpack_rows(packed: Array | np.ndarray) -> SamplingRows:
    """The inverse of `pack_rows`, on the device: `[R, 11]` i32 to `SamplingRows`.

    >>> rows = sampling_rows(2, seed=7, temperature=0.5)
    >>> unpack_rows(pack_rows(rows)).temperature.tolist()
    [0.5, 0.5]
    """
    packed = jnp.asarray(packed)

    def cast(column, dtype):
        return jax.lax.bitcast_convert_type(packed[:, column], dtype)

    f32, u32 = jnp.float32, jnp.uint32
    return SamplingRows(
        seed=cast(slice(0, 2), u32),
        sample=packed[:, 2],
        temperature=cast(3, f32),
        top_k=packed[:, 4],
        top_p=cast(5, f32),
        min_p=cast(6, f32),
        repetition_penalty=cast(7, f32),
        presence_penalty=cast(8, f32),
        frequency_penalty=cast(9, f32),
        stop_from=packed[:, 10],
    )


def sampling_state(num_rows: int, vocab_size: int) -> SamplingState:
    """The state of `num_rows` rows that ask for nothing: no counts, no bias, everything allowed.

    >>> sampling_state(2, 40).allowed.shape
    (2, 2)
    """
    row = state_row(vocab_size)
    return jax.tree.map(lambda a: jnp.tile(a, (num_rows, 1)), row)


def state_row(
    vocab_size: int,
    *,
    prompt: Iterable[int] = (),
    output: Iterable[int] = (),
    allowed: Iterable[int] | None = None,
    banned: Iterable[int] = (),
    stop: Iterable[int] = (),
    bias: Mapping[int, float] | None = None,
) -> SamplingState:
    """One row of `SamplingState`, built on the host in NumPy; `set_state_row` uploads it.

    `output` are the tokens generated before (a preempted request), `allowed=None` allows all,
    `banned` takes away from that.  Raises ValueError for ids outside the vocabulary.

    >>> row = state_row(40, prompt=[3], output=[5, 5], allowed=[5, 6], bias={5: -1.0})
    >>> int(row.counts[5]), row.allowed.tolist(), float(row.bias[5])
    (2, [96, 0], -1.0)
    """

    def ids(name, tokens):
        array = np.fromiter(tokens, np.int64)
        if array.size and (array.min() < 0 or array.max() >= vocab_size):
            bad = sorted({int(t) for t in array if not 0 <= t < vocab_size})
            raise ValueError(f"{name} has token ids {bad} outside a vocabulary of {vocab_size}")
        return array

    def bits(name, tokens):
        mask = np.zeros(vocab_size, bool)
        mask[ids(name, tokens)] = True
        return mask

    may = np.ones(vocab_size, bool) if allowed is None else bits("allowed", allowed)
    may &= ~bits("banned", banned)
    added = np.zeros(vocab_size, np.float32)
    if bias:
        added[ids("bias", bias)] = list(bias.values())
    return SamplingState(
        counts=np.bincount(ids("output", output), minlength=vocab_size).astype(np.int32),
        prompt=pack_bits(bits("prompt", prompt)),
        allowed=pack_bits(may),
        stop=pack_bits(bits("stop", stop)),
        bias=added,
    )


def set_state_row(state: SamplingState, row: Array | int, new: SamplingState) -> SamplingState:
    """`state` with its row `row` replaced by `new` (fields without the leading axis).

    In place under donation.  Both must have the same fields; fields that are None stay None.

    >>> state = set_state_row(sampling_state(2, 40), 1, state_row(40, output=[7]))
    >>> int(state.counts[1, 7]), int(state.counts[0, 7])
    (1, 0)
    """
    return jax.tree.map(lambda old, value: old.at[row].set(value), state, new)


def count_tokens(state: SamplingState, rows: Array, tokens: Array) -> SamplingState:
    """`state` after row `rows[i]` was given `tokens[i]`; a token of -1 counts nothing.

    rows and tokens are i32 `[N]`.  In place under donation.

    >>> state = count_tokens(sampling_state(2, 40), jnp.array([1, 0]), jnp.array([7, -1]))
    >>> int(state.counts[1, 7]), int(state.counts.sum())
    (1, 1)
    """
    if state.counts is None:
        return state
    with jax.named_scope("count_tokens"):
        vocab_size = state.counts.shape[-1]
        # A negative index would wrap around; one past the end is dropped.
        column = jnp.where(tokens < 0, vocab_size, tokens)
        counts = state.counts.at[rows, column].add(1, mode="drop")
        return dataclasses.replace(state, counts=counts)


def pack_bits(mask: np.ndarray) -> np.ndarray:
    """A bool mask `[..., V]` as u32 words `[..., ceil(V / 32)]`; bit b of word w is item 32 w + b.

    >>> pack_bits(np.arange(40) % 2 == 1).tolist()
    [2863311530, 170]
    """
    padding = -mask.shape[-1] % 32
    padded = np.pad(mask, [(0, 0)] * (mask.ndim - 1) + [(0, padding)])
    packed = np.packbits(padded, axis=-1, bitorder="little")
    return packed.view(np.dtype("<u4")).astype(np.uint32)


def unpack_bits(words: Array, size: int) -> Array:
    """The inverse of `pack_bits` on the device: u32 `[..., W]` to bool `[..., size]`.

    >>> unpack_bits(jnp.array([5], jnp.uint32), 4).tolist()
    [True, False, True, False]
    """
    shifts = jax.lax.broadcasted_iota(jnp.uint32, (*words.shape, 32), words.ndim)
    bits = (words[..., None] >> shifts) & jnp.uint32(1)
    return bits.reshape(*words.shape[:-1], -1)[..., :size] != 0


def sample(
    logits: Array,
    rows: SamplingRows,
    positions: Array,
    state: SamplingState | None = None,
    *,
    banned: Array | None = None,
    variant: Variant = "full",
    num_logprobs: int | None = None,
) -> Sampled:
    r"""Draws one token a row.

        x = (penalised, biased, masked logits) / temperature
        token = argmax_v x_v + g_v   over   min_p, top_k, top_p,   g_v = -log(-log u_v)

    Args:
      logits: `[R, V]`, any float dtype; the maths is float32.
      rows: the parameters, `[R]` each.
      positions: i32 `[R]`, the place in its sequence that the drawn token will take.  The noise is
        a function of (seed, sample, position) alone: batch, order and padding cannot change it.
      state: the per-vocabulary state, `[R, V]` or `[R, W]` each; only for `variant="full"`.
      banned: i32 `[R, K]` padded with -1, tokens forbidden at this step only (the last token of a
        bad word whose other tokens were just generated); only for `variant="full"`.
      variant: static. "greedy": the most likely token, every other parameter is without effect;
        "plain": temperature and seed alone; "full": everything.
      num_logprobs: static. None computes no logprobs; n gives the chosen token's and the n best.

    A row at temperature 0 takes the largest logit after masks, bias and penalties; of equal ones
    the lowest id.  Truncation keeps ties: token i stays if fewer than top_k tokens are more likely
    and if those that are more likely hold less than top_p of the mass that min_p and top_k left.
    Probabilities and their sums are float32: tokens whose probabilities round to the same are ties
    for top_p, and a set can differ where a cumulative mass meets top_p to 1e-6.

    Raises:
      ValueError: an unknown variant, shapes that differ, state given to a variant without state.

    Gumbel-max: Maddison et al. 2014 (https://arxiv.org/abs/1411.0030); top_p: Holtzman et al. 2020
    (https://arxiv.org/abs/1904.09751); min_p: Nguyen et al. 2024 (https://arxiv.org/abs/2407.01082);
    repetition penalty: Keskar et al. 2019 (https://arxiv.org/abs/1909.05858).

    >>> logits = jnp.array([[0.0, 2.0, 1.0], [3.0, 2.0, 1.0]])
    >>> rows = sampling_rows(2, temperature=[0.0, 0.8], top_k=[0, 1], seed=[1, 2])
    >>> sample(logits, rows, jnp.array([5, 9])).tokens.tolist()
    [1, 0]
    """
    _check(logits, rows, positions, state, banned, variant, num_logprobs)
    return _sample(logits, rows, positions, state, banned, variant, num_logprobs)


# Compiled here, since called eagerly the loops of the truncation would be compiled at every call.
@functools.partial(jax.jit, static_argnames=("variant", "num_logprobs"), inline=True)
def _sample(logits, rows, positions, state, banned, variant, num_logprobs) -> Sampled:
    raw = logits.astype(jnp.float32)
    if variant == "greedy":
        scores = raw
    else:
        x = raw if variant == "plain" else adjust_logits(raw, rows, positions, state, banned)
        greedy = (jnp.asarray(rows.temperature) == 0)[:, None]
        with jax.named_scope("temperature"):
            tempered = x / jnp.where(greedy, 1.0, jnp.asarray(rows.temperature)[:, None])
        if variant == "full":
            tempered = truncate_logits(tempered, rows.top_k, rows.top_p, rows.min_p)
        with jax.named_scope("gumbel"):
            noise = gumbel(draw_keys(rows, positions), logits.shape[-1])
        scores = jnp.where(greedy, x, tempered + noise)
    with jax.named_scope("draw"):
        best = jnp.max(scores, axis=-1)
        tokens = jax.lax.platform_dependent(scores, best, cpu=_first_of, default=_argmax)
        tokens = jnp.where(jnp.isfinite(best), tokens, -1)
    if num_logprobs is None:
        return Sampled(tokens, None)
    return Sampled(tokens, token_logprobs(raw, tokens, num_logprobs))


def _argmax(scores: Array, best: Array) -> Array:
    del best
    return jnp.argmax(scores, axis=-1).astype(jnp.int32)


def _first_of(scores: Array, best: Array) -> Array:
    """`argmax` of finite rows: a CPU goes over integers five times faster than over pairs."""
    index = jnp.arange(scores.shape[-1], dtype=jnp.int32)[None]
    return jnp.min(jnp.where(scores == best[:, None], index, scores.shape[-1]), axis=-1)


def _check(logits, rows, positions, state, banned, variant, num_logprobs):
    """Raises ValueError unless the arguments of `sample` fit together."""
    if variant not in VARIANTS:
        raise ValueError(f"{variant=} is none of {VARIANTS}")
    if logits.ndim != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(f"logits must be a float [R, V], not {logits.dtype}{list(logits.shape)}")
    num_rows, vocab_size = logits.shape
    if positions.shape != (num_rows,):
        raise ValueError(f"{positions.shape=} does not fit {logits.shape=}")
    if rows.temperature.shape != (num_rows,):
        raise ValueError(f"{rows.temperature.shape=} does not fit {logits.shape=}")
    if variant != "full" and (state is not None or banned is not None):
        raise ValueError(f"{variant=} takes neither state nor banned tokens; full does")
    if num_logprobs is not None and not 0 <= num_logprobs <= vocab_size:
        raise ValueError(f"{num_logprobs=} is not between 0 and the vocabulary's {vocab_size}")
    if state is not None:
        words = -(-vocab_size // 32)
        shapes = {"counts": vocab_size, "bias": vocab_size}
        for name in SamplingState.__dataclass_fields__:
            field, columns = getattr(state, name), shapes.get(name, words)
            if field is not None and field.shape != (num_rows, columns):
                raise ValueError(f"state.{name} is {field.shape}, not {(num_rows, columns)}")


def adjust_logits(
    logits: Array,
    rows: SamplingRows,
    positions: Array,
    state: SamplingState | None,
    banned: Array | None = None,
) -> Array:
    """Masks, bias and penalties, f32 `[R, V]` to f32 `[R, V]`; a forbidden token becomes -inf.

        l = -inf where forbidden, else l + bias
        l = l / rep if l > 0 else l * rep     where the prompt or the output has the token
        l = l - frequency * count - presence * (count > 0)

    >>> rows = sampling_rows(1, frequency_penalty=0.5, presence_penalty=0.25)
    >>> state = SamplingState(counts=jnp.array([[0, 2]]))
    >>> adjust_logits(jnp.ones((1, 2)), rows, jnp.array([9]), state).tolist()
    [[1.0, -0.25]]
    """
    num_rows, vocab_size = logits.shape
    x = logits
    state = SamplingState() if state is None else state
    with jax.named_scope("masks"):
        if state.allowed is not None:
            x = jnp.where(unpack_bits(state.allowed, vocab_size), x, -jnp.inf)
        if banned is not None:
            column = jnp.where(banned < 0, vocab_size, banned)
            x = x.at[jnp.arange(num_rows)[:, None], column].set(-jnp.inf, mode="drop")
        if state.stop is not None:
            early = (positions < jnp.asarray(rows.stop_from))[:, None]
            x = jnp.where(early & unpack_bits(state.stop, vocab_size), -jnp.inf, x)
        if state.bias is not None:
            x = x + state.bias
    with jax.named_scope("penalties"):
        seen = None if state.prompt is None else unpack_bits(state.prompt, vocab_size)
        if state.counts is not None:
            seen = state.counts > 0 if seen is None else seen | (state.counts > 0)
        if seen is not None:
            penalty = jnp.asarray(rows.repetition_penalty)[:, None]
            x = jnp.where(seen, jnp.where(x > 0, x / penalty, x * penalty), x)
        if state.counts is not None:
            x = x - jnp.asarray(rows.frequency_penalty)[:, None] * state.counts
            x = x - jnp.where(state.counts > 0, jnp.asarray(rows.presence_penalty)[:, None], 0.0)
    return x


def truncate_logits(x: Array, top_k: Array, top_p: Array, min_p: Array) -> Array:
    """-inf for the tokens that min_p, then top_k, then top_p leave out; f32 `[R, V]`.

        min_p: x_i >= max(x) + log(min_p)
        top_k: fewer than top_k tokens have x_j > x_i
        top_p: sum of softmax(x)_j over x_j > x_i is less than top_p, after the two above

    Each keeps an upper set {x >= t}, ties included, so three thresholds are all there is to find.

    >>> x = jnp.log(jnp.array([[0.5, 0.3, 0.2]]))
    >>> kept = truncate_logits(x, jnp.array([0]), jnp.array([0.6]), jnp.array([0.0]))
    >>> jnp.isfinite(kept).tolist()
    [[True, True, False]]
    """
    num_rows, vocab_size = x.shape
    top_k, top_p, min_p = (jnp.asarray(a) for a in (top_k, top_p, min_p))
    top = jnp.max(x, axis=-1)
    # Sums go over chunks first: in f32 a running sum over 10^5 terms would lose the tail.
    chunks = jnp.pad(x, ((0, 0), (0, -vocab_size % _CHUNK)), constant_values=-jnp.inf)
    chunks = chunks.reshape(num_rows, -1, _CHUNK)
    with jax.named_scope("min_p"):
        floor = top + jnp.log(min_p)  # log(0) = -inf keeps everything
    with jax.named_scope("top_k"):
        k = jnp.where(top_k <= 0, vocab_size, top_k)
        floor = jnp.maximum(floor, _kth_largest(chunks, k))
    with jax.named_scope("top_p"):
        shift = jnp.where(jnp.isfinite(top), top, 0.0)[:, None, None]
        mass = jnp.where(chunks >= floor[:, None, None], jnp.exp(chunks - shift), 0.0)
        least = _least_mass(mass, top_p * jnp.sum(jnp.sum(mass, axis=-1), axis=-1))
        # top_p = 1 must not lose a tail that rounding hid.
        least = jnp.where(top_p >= 1, 0.0, least)[:, None, None]
        kept = (chunks >= floor[:, None, None]) & (mass >= least)
    kept = kept.reshape(num_rows, -1)[:, :vocab_size]
    return jnp.where(kept, x, -jnp.inf)


def _kth_largest(x: Array, k: Array) -> Array:
    """The k-th largest of each row of f32 `[R, C, c]`, k i32 `[R]`: exact, without a sort.

    It is the largest t with #(x >= t) >= k.
    """

    def count(thresholds):
        return _sums(tuple((x >= t[:, None, None]).astype(jnp.int32) for t in thresholds))

    return _float_of_key(_largest_key(count, _float_of_key, k, num_bits=32))


def _least_mass(mass: Array, target: Array) -> Array:
    """The largest t in [0, 1] with sum(mass[mass >= t]) >= target; mass f32 `[R, C, c]` in [0, 1].

    The sum falls as t grows, also in floating point: each t adds the same terms, some of them zero,
    in the same order.  Floats from 0 to 1 have 30 bits that order them.
    """

    def total(thresholds):
        return _sums(tuple(jnp.where(mass >= t[:, None, None], mass, 0.0) for t in thresholds))

    to_float = lambda key: jax.lax.bitcast_convert_type(key, jnp.float32)
    found = to_float(_largest_key(total, to_float, target, num_bits=30))
    return jnp.minimum(found, jnp.max(mass, axis=(1, 2)))  # the most likely token always stays


def _largest_key(totals, to_float, target: Array, num_bits: int) -> Array:
    """The largest u32 key `[R]` below 2^num_bits with totals(to_float(key)) >= target.

    `totals` (of several thresholds at once) must fall as the threshold grows.  Digit by digit from
    the top: a digit of b bits costs one pass over the row with 2^b - 1 thresholds.  A CPU is bound
    by comparing, so b = 1; a GPU by reading the rows and, for few of them, by launching kernels,
    so b = 3 and few rows take the loop unrolled (H200, V = 128k, one row: 53 us, not 122).
    """

    def search(digit_bits, target):
        steps = -(-num_bits // digit_bits)

        def descend(step, prefix):
            shift = (digit_bits * (steps - 1 - step)).astype(jnp.uint32)
            thresholds = []
            for digit in range(1, 2**digit_bits):
                part = jnp.uint32(digit) << shift
                fits = part >> shift == digit  # the top digit may reach past 32 bits
                thresholds.append(jnp.where(fits, to_float(prefix | part), jnp.nan))
            reached = [total >= target for total in totals(thresholds)]
            return prefix | (sum(r.astype(jnp.uint32) for r in reached) << shift)

        unroll = digit_bits > 1 and target.size <= _FEW_ROWS
        start = jnp.zeros(target.shape, jnp.uint32)
        return jax.lax.fori_loop(0, steps, descend, start, unroll=unroll)

    return jax.lax.platform_dependent(
        target, cpu=functools.partial(search, 1), default=functools.partial(search, 3)
    )


def _sums(terms: tuple[Array, ...]) -> tuple[Array, ...]:
    """The sums of several `[R, C, c]` to `[R]` each, in one pass over what they are made from."""
    zeros = (jnp.zeros((), terms[0].dtype),) * len(terms)
    add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))
    return jax.lax.reduce(jax.lax.reduce(terms, zeros, add, (2,)), zeros, add, (1,))


def _float_of_key(key: Array) -> Array:
    """u32 keys to the f32 that they order: the sign bit flipped, negative floats' bits too.

    Keys below -inf's give -inf, those above inf's NaN (which no number reaches).
    """
    key = jnp.maximum(key, jnp.uint32(0x007FFFFF))
    bits = jnp.where(key >> 31 == 1, key ^ jnp.uint32(0x80000000), ~key)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def draw_keys(rows: SamplingRows, positions: Array) -> Array:
    """The key `[R]` of each row's draw: its seed, folded with sample index and position.

    >>> a = draw_keys(sampling_rows(2, seed=[3, 4]), jnp.array([7, 7]))
    >>> b = draw_keys(sampling_rows(1, seed=4), jnp.array([7]))
    >>> bool((jax.random.key_data(a)[1] == jax.random.key_data(b)[0]).all())
    True
    """

    def one(seed, sample, position):
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.fold_in(jax.random.fold_in(key, sample), position)

    return jax.vmap(one)(jnp.asarray(rows.seed), jnp.asarray(rows.sample), positions)


def gumbel(keys: Array, size: int) -> Array:
    """Standard Gumbel noise f32 `[R, size]`, one independent row a key.

        g = -log(e),   e = -log(1 - u) ~ Exp(1)

    u has 32 bits and is finest near 0, where the large g come from: the largest is 22.9
    (a 23-bit uniform through -log(-log(u)) ends at 16.6, too coarse for a vocabulary of 10^5).

    >>> gumbel(jax.random.split(jax.random.key(0), 2), 5).shape
    (2, 5)
    """
    bits = jax.vmap(lambda key: jax.random.bits(key, (size,), jnp.uint32))(keys)
    u = (bits.astype(jnp.float32) + 0.5) * jnp.float32(2**-32)
    u = jnp.minimum(u, jnp.float32(1 - 2**-24))  # u = 1 would be noise of -inf
    return -jnp.log(-jnp.log1p(-u))


def token_logprobs(logits: Array, tokens: Array, num_logprobs: int) -> TokenLogprobs:
    """Log-softmax of `logits` `[R, V]` at `tokens` `[R]`, its rank, and the `num_logprobs` best.

    A token of -1 (nothing drawn) reads as token 0.

    >>> out = token_logprobs(jnp.log(jnp.array([[0.1, 0.7, 0.2]])), jnp.array([2]), 2)
    >>> int(out.rank[0]), out.top_tokens.tolist(), round(float(out.logprob[0]), 3)
    (2, [[1, 2]], -1.609)
    """
    with jax.named_scope("logprobs"):
        x = logits.astype(jnp.float32)
        norm = jax.nn.logsumexp(x, axis=-1)
        chosen = jnp.take_along_axis(x, jnp.maximum(tokens, 0)[:, None], axis=-1)
        rank = 1 + jnp.sum(x > chosen, axis=-1, dtype=jnp.int32)
        top, top_tokens = _most_likely(x, num_logprobs)
        return TokenLogprobs(
            logprob=chosen[:, 0] - norm,
            rank=rank,
            top_tokens=top_tokens.astype(jnp.int32),
            top_logprobs=top - norm[:, None],
        )


def _most_likely(x: Array, n: int) -> tuple[Array, Array]:
    """The n largest of each row of f32 `[R, V]` and where they are, largest first.

    XLA has a kernel for up to 16 on a GPU and sorts the row for more, so there 16 at a time.
    """

    def by_sixteen(x):
        values, indices = [], []
        rows = jnp.arange(x.shape[0])[:, None]
        for start in range(0, max(n, 1), _TOP_K_KERNEL):
            value, index = jax.lax.top_k(x, min(_TOP_K_KERNEL, n - start))
            values.append(value)
            indices.append(index)
            x = x.at[rows, index].set(-jnp.inf)
        return jnp.concatenate(values, axis=-1), jnp.concatenate(indices, axis=-1)

    def at_once(x):
        values, indices = jax.lax.top_k(x, n)
        return values, indices

    if n > 8 * _TOP_K_KERNEL:
        return at_once(x)
    return jax.lax.platform_dependent(x, cpu=at_once, default=by_sixteen)
