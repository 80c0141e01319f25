"""Attention over pools of one byte a value in float64, and what a kernel's answer may err by.

The bounds follow from the arithmetic, for the very numbers of a call: a tolerance for all of them
would have to allow the worst, and let mistakes of the others pass.

Scores.  A query goes as `f (q_0 + q_1 / b + ...)`, f by its largest dim, and misses by at most
`step f` in each dim.  So the score of key j misses by at most

    b_j = step f scale k_scale_j |k_j|_1

however small the score itself is, which is why no relative tolerance fits.  int8: f = top / 127,
the terms are integers and the last counts 1 / 128, so step = 1 / 256.  e4m3: two terms of 4 bits
hold a bf16, three an f16, but for numbers so small that e4m3 has fewer bits for them: 2^-10 of the
last term, which counts 1 / 16 or 1 / 256.  The prefill kernel rounds keys times their scales to 16
bits instead, each by 2^-8 (bf16) or 2^-11 (f16) of itself.

Log-sum-exp.  With p_j the weights, `lse(s + d) - lse(s) = log sum_j p_j e^(d_j)`, so it misses by
at most `L = log sum_j p_j e^(b_j)`, to the first order the mean of b_j: what a key without weight
misses does not count.

Output.  A weight is wrong by a factor of at most `e^(b_j + L)`, and by no more than all others
together.  Weights sum to 1, so the output misses by at most
`sum_j p_j (e^(b_j + L) - 1) |v_j - out|`.  P v_scale goes as terms too, relative to A, the largest
of its tile of keys: two of int8 are right to A / 127 / 256; of e4m3 each to 2^-4 of what is left,
and to A / 256 times 2^-10 of the last where that is small.

All the rest is rounding of float32, a handful of operations in each place, and of the output.
That is the interpreter: an H200 keeps sums of e4m3 products with some 14 bits.
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy.special import expit, logsumexp

from pallas_kernels.paged_attention import quantised

U = 2.0**-24  # what rounding to f32 misses, of the result
OPERATIONS = 16  # in f32 between a product of integers and a logit


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """Of one kernel."""

    pool: Any  # dtype
    q: Any  # dtype of queries and outputs
    key_tile: int
    converted: bool = False  # by the prefill kernel, to q's dtype

    @property
    def rounding(self) -> float:
        """What rounding to q's dtype misses, of the result."""
        return float(jnp.finfo(self.q).eps) / 2

    @property
    def terms(self) -> int:
        """Of a query, and of P."""
        return quantised.num_terms(self.q, self.pool)

    @property
    def integer(self) -> bool:
        """int8, not e4m3."""
        return self.pool == quantised.INT8

    def scores(self, q, k, each):
        """q `[G, H]`, k `[j, H]`, `each` = scale * k_scale `[j]` -> scores `[G, j]`, their b."""
        s, size = q @ k.T * each, np.abs(q) @ np.abs(k).T * each
        products = OPERATIONS if self.integer and not self.converted else OPERATIONS + k.shape[1]
        b = products * U * size
        if self.converted:
            return s, b + self.rounding * size
        top = np.maximum(np.abs(q).max(-1, keepdims=True), 2.0**-110)
        if self.integer:
            f, step = top / 127, 1 / 256
        else:
            f = np.exp2(np.floor(np.log2(top)) + 1) / 64
            step = 2.0**-10 / 16 ** (self.terms - 1)
        return s, b + step * f * np.abs(k).sum(-1) * each

    def values(self, p, v, v_scale, keys):
        """What `p (v_scale v)` misses by itself: p `[G, j]`, v `[j, Hv]` as stored."""
        size = p @ np.abs(v * v_scale[:, None])
        missing = (len(v) + 4 * OPERATIONS) * U * size
        if self.converted:  # P and v_scale v are rounded
            return missing + 2 * self.rounding * size
        if self.integer:
            least = 1 / 127 / 256
        else:
            missing = missing + 2.0 ** (-4 * self.terms) * size
            least = 2.0**-10 / 16 ** (self.terms - 1) / 256
        for tile in np.unique(keys // self.key_tile):
            own = keys // self.key_tile == tile
            largest = (p * v_scale)[:, own].max(-1, keepdims=True)
            missing = missing + least * largest * np.abs(v[own]).sum(0)
        return missing

    def softmax(self, s, b, v, v_scale, keys, sink):
        """`(out [G, Hv], lse [G, 1])` of scores s, which miss by b, and what these miss."""
        lse = logsumexp(s, axis=1, keepdims=True)
        p = np.exp(s - lse)
        far = logsumexp(s - lse + b, axis=1, keepdims=True)
        far = far + 4 * U * np.abs(lse) + (len(keys) + OPERATIONS) * U
        v_ = v * v_scale[:, None]
        out = p @ v_
        apart = np.abs(v_[None] - out[:, None])
        most = np.exp(np.minimum(s - lse + b + far, 99.0))
        weight = np.minimum(most, 1.0)
        others = weight.sum(1, keepdims=True) - weight
        miss = np.einsum("gj,gjh->gh", np.minimum(most - p, others), apart)
        miss = miss + self.values(weight, v, v_scale, keys)
        share = expit(lse - sink)
        moves = expit(sink - lse) * np.expm1(np.minimum(far, 99.0))  # of itself, as e^lse does
        out, miss = out * share, share * (miss * (1 + moves) + np.abs(out) * moves)
        return (out, lse), (miss + self.rounding * (np.abs(out) + miss), far)


def attention(
    args,
    arithmetic: Arithmetic,
    *,
    k_scale,
    v_scale,
    scale=None,
    window=None,
    logits_soft_cap=None,
    alibi_slopes=None,
    sinks=None,
):
    """`(out [T, N, Hv], lse [T, N])` in f64, and what each of their values may miss by."""
    wide = lambda x: np.asarray(x.astype(jnp.float32), np.float64)
    q, k_pool, v_pool, k_scale, v_scale = map(wide, (*args[:3], k_scale, v_scale))
    table, lens, indptr = map(np.asarray, args[3:])
    t, n, h = q.shape
    heads, size = k_pool.shape[1:3]
    group, hv, cut = n // heads, v_pool.shape[-1], logits_soft_cap
    by_head = lambda x: np.asarray(x, np.float64).reshape(heads, group, 1)
    slopes = by_head(np.zeros(n) if alibi_slopes is None else alibi_slopes)
    sink = by_head(np.full(n, -np.inf) if sinks is None else sinks)
    answer = np.zeros((t, heads, group, hv)), np.full((t, heads, group, 1), -np.inf)
    misses = tuple(np.zeros_like(x) for x in answer)
    q = q.reshape(t, heads, group, h)

    def one(token, head, row, position):
        first = 0 if window is None else max(position - window + 1, 0)
        keys = np.arange(first, position + 1)
        at = table[row, keys // size], head, keys % size
        ks, vs = (x[at] if x.ndim > 1 else np.full(len(keys), x[head]) for x in (k_scale, v_scale))
        each = ks * (h**-0.5 if scale is None else scale)
        s, b = arithmetic.scores(q[token, head], k_pool[at], each)
        if cut is not None:  # nowhere steeper than 1
            s, b = cut * np.tanh(s / cut), b + OPERATIONS * U * cut
        distance = slopes[head] * (position - keys)
        s, b = s - distance, b + OPERATIONS * U * (distance + np.abs(np.log2(vs)))
        found = arithmetic.softmax(s, b, v_pool[at], vs, keys, sink[head])
        for target, x in zip((*answer, *misses), (*found[0], *found[1]), strict=True):
            target[token, head] = x

    for row, (begin, end) in enumerate(itertools.pairwise(indptr)):
        for token in range(begin, end if lens[row] else begin):
            for head in range(heads):
                one(token, head, row, lens[row] - end + token)
    flat = lambda x: x.reshape(t, n, *x.shape[3:])
    return tuple((flat(out), flat(lse)[..., 0]) for out, lse in (answer, misses))
