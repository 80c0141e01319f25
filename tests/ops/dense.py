"""Attention with the whole matrix in float32 at highest precision: the oracle of the op tests."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


def attend(
    q,
    k,
    v,
    *,
    causal=False,
    left=None,
    right=None,
    positions=None,
    allowed=None,
    scale=None,
    soft_cap=None,
    bias=None,
    alibi_slopes=None,
    sinks=None,
    score_mod=None,
    keep=None,
    rate=0.0,
):
    """(out, lse, weights): q [B, T, N, H], k [B, S, K, H]; allowed and keep are [B, N, T, S]."""
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    k, v = (jnp.repeat(x.astype(jnp.float32), N // K, axis=2) for x in (k, v))
    x = jnp.einsum("btnh,bsnh->bnts", q.astype(jnp.float32), k, precision="highest")
    x = x * (H**-0.5 if scale is None else scale)
    if soft_cap is not None:
        x = soft_cap * jnp.tanh(x / soft_cap)
    if bias is not None:
        x = x + jnp.broadcast_to(bias.astype(jnp.float32), x.shape)
    if positions is None:
        positions = jnp.arange(T)[None] + S - T
    away = jnp.broadcast_to(
        positions[:, None, :, None] - jnp.arange(S)[None, None, None, :], (B, 1, T, S)
    )
    if alibi_slopes is not None:
        x = x - alibi_slopes[None, :, None, None] * jnp.abs(away)
    if score_mod is not None:
        axes = [jnp.arange(n) for n in x.shape]
        mod = score_mod
        for axis in (3, 2, 1, 0):
            mod = jax.vmap(mod, (0, *(0 if a == axis else None for a in range(4))))
        x = mod(x, *axes)
    seen = jnp.ones(x.shape, bool)
    if causal:
        seen &= away >= 0
    if left is not None:
        seen &= away <= left
    if right is not None:
        seen &= -away <= right
    if allowed is not None:
        seen &= jnp.broadcast_to(allowed, x.shape)
    x = jnp.where(seen, x, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.where(seen.any(-1), x.max(-1, initial=-jnp.inf), 0.0))
    e = jnp.where(seen, jnp.exp(jnp.where(seen, x, 0.0) - top[..., None]), 0.0)
    total = e.sum(-1)
    lse = jnp.where(total > 0, top + jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)
    if sinks is not None:
        total = total + jnp.exp(sinks[None, :, None] - top)
    p = e / jnp.where(total > 0, total, 1.0)[..., None]
    if keep is not None:
        p = jnp.where(keep, p / (1 - rate), 0.0)
    out = jnp.einsum("bnts,bsnh->btnh", p, v, precision="highest")
    return out, lse.transpose(0, 2, 1), p


def paged(q, k_pool, v_pool, tables, context, indptr, *, tree=None, positions=None, **options):
    """[T, N, Hv] and lse [T, N] row by row with numpy gathers; `tree[t]` is a list of bools.

    Pools are float32 here.  Tokens of no row give zeros and -inf.
    """
    T, N, _ = q.shape
    _, _, block_size, Hv = v_pool.shape
    out, lse = np.zeros((T, N, Hv), np.float32), np.full((T, N), -np.inf, np.float32)
    window, slopes = options.pop("window", None), options.pop("alibi_slopes", None)
    for r, length in enumerate(context):
        first, last = indptr[r], indptr[r + 1]
        n, s = last - first, np.arange(length)
        if n == 0 or length == 0:
            continue
        blocks = tables[r][s // block_size]
        keys, values = k_pool[blocks, :, s % block_size], v_pool[blocks, :, s % block_size]
        old = length - n
        where = s.copy()
        stand = old + np.arange(n)
        if positions is not None:
            stand = where[old:] = positions[first:last]
        index = np.arange(n)
        seen = (s - old)[None] <= index[:, None]
        if tree is not None:
            for i in range(n):
                for j in range(n):
                    seen[i, old + j] = tree[first + i][j]
        if window is not None:
            seen &= stand[:, None] - where[None] < window
        x = np.zeros((1, N, n, length), np.float32)
        if slopes is not None:
            x -= np.asarray(slopes)[None, :, None, None] * np.abs(stand[:, None] - where[None])
        o, m, _ = _row(
            q[first:last][None], keys[None], values[None], jnp.asarray(seen)[None, None],
            jnp.asarray(x), **options,
        )  # fmt: skip
        out[first:last], lse[first:last] = o[0], m[0]
    return out, lse


def _row(q, k, v, seen, bias, **options):
    """numpy float64 softmax of one row: no compilation per length."""
    q, k, v, bias = (np.asarray(a, np.float64) for a in (q, k, v, bias))
    seen = np.asarray(seen)
    _, _, N, H = q.shape
    k, v = (np.repeat(a, N // a.shape[2], axis=2) for a in (k, v))
    x = np.einsum("btnh,bsnh->bnts", q, k) * options.get("scale", H**-0.5)
    cap = options.get("soft_cap")
    x = cap * np.tanh(x / cap) if cap else x
    x = np.where(seen, x + bias, -np.inf)
    top = np.where(seen.any(-1), x.max(-1), 0.0)
    e = np.exp(x - top[..., None])
    total = e.sum(-1)
    with np.errstate(divide="ignore"):
        lse = top + np.log(total)
    if options.get("sinks") is not None:
        total = total + np.exp(np.asarray(options["sinks"])[None, :, None] - top)
    p = e / np.where(total > 0, total, 1.0)[..., None]
    return np.einsum("bnts,bsnh->btnh", p, v), lse.transpose(0, 2, 1), p


jit_attend = functools.partial(
    jax.jit, static_argnames=("causal", "left", "right", "scale", "soft_cap", "score_mod", "rate")
)(attend)
