"""Options of the Hopper kernels through the door, in the interpreter, against the tiles."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.ops import _flash_peers, _flash_xla, attention_mask
from aidx.ops import flash_attention as door
from aidx.ops.attention_mask import block_mask
from pallas_kernels import flash_attention as fa

B, T, S, N, K, H = 2, 40, 72, 2, 1, 64
CONFIG = door.FlashAttentionConfig(block_size_q=64, block_size_kv=64)


@pytest.fixture
def interpreted(monkeypatch):
    """The kernels run in the GPU interpreter, whoever calls them."""
    run = functools.partial
    kernels = types.SimpleNamespace(
        **{name: getattr(fa, name) for name in dir(fa) if not name.startswith("_")}
        | {
            "flash_attention_fwd": run(fa.flash_attention_fwd, interpret=True),
            "flash_attention_bwd": run(
                fa.flash_attention_bwd, interpret=True, config=fa.BackwardConfig(consumers=1)
            ),
        }
    )
    monkeypatch.setattr(_flash_peers, "_kernels", lambda: kernels)


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


slopes, table, ids = jnp.array([0.2, 0.1]), normal(9, N, S, dtype=jnp.float32), jnp.arange(S) // 25
documents = lambda b, n, t, s: ids[t + S - T] == ids[s]
near = lambda b, n, t, s: jnp.abs(t + S - T - s) < 20 + 9 * n
prefix = lambda b, n, t, s: (s < 10 + 20 * b) | ((s <= t + S - T) & (s < 60))
kernel_mask = jax.random.bernoulli(jax.random.key(4), 0.7, (1, N, T, S))
CASES = {
    "dropout": dict(causal=True, dropout_rate=0.3, dropout_key=jax.random.key(1)),
    "bias": dict(bias=normal(5, 1, N, T, S), causal=True),
    "key bias, alibi, cap": dict(
        bias=normal(5, B, 1, 1, S), alibi_slopes=slopes, logits_soft_cap=4.0,
        kv_lens=jnp.array([72, 51]),
    ),
    "score_mod over alibi": dict(
        score_mod=lambda x, b, n, t, s: x * 0.7 + table[n, s], alibi_slopes=slopes,
        query_offset=jnp.array([3, 30]), causal=True,
    ),
    "masks": dict(mask=kernel_mask, mask_mod=documents),
    "block mask of ranges": dict(
        block_mask=block_mask(documents, T, S, block_q=16, block_kv=24), causal=True,
        kv_lens=jnp.array([72, 60]),
    ),
    "ranges by batch": dict(block_mask=block_mask(prefix, T, S, batch=B), mask=kernel_mask),
    "block mask": dict(
        block_mask=block_mask(near, T, S, num_heads=N, block_q=16, block_kv=24), causal=True
    ),
}  # fmt: skip


def both(name):
    """((out, lse), cotangents) of the kernels and of the tiles on one call."""
    q, d_out = normal(0, B, T, N, H), normal(3, B, T, N, H)
    k, v = normal(1, B, S, K, H), normal(2, B, S, K, H)
    spec, ops = door._explained(q, k, v, config=CONFIG, return_lse=True, **CASES[name])
    want = jax.jit(functools.partial(_flash_xla.forward, spec))(ops)
    d_lse = jnp.where(jnp.isneginf(want[1]), 0.0, normal(6, B, T, N, dtype=jnp.float32))
    got = _flash_peers.mosaic_forward(spec, ops)
    pull = functools.partial(_flash_xla.backward, spec)
    grads = jax.jit(pull)(ops, want, (d_out, d_lse))
    return (got, _flash_peers.mosaic_backward(spec, ops, want, (d_out, d_lse))), (want, grads)


QUICK = ("masks", "block mask of ranges")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]
)
def test_the_kernels_equal_the_tiles(name, interpreted):
    (got, grads), (want, want_grads) = both(name)
    np.testing.assert_allclose(got[1], want[1], atol=3e-3)
    assert jax.tree.structure(grads) == jax.tree.structure(want_grads)
    for a, b in zip(jax.tree.leaves((got[0], grads)), jax.tree.leaves((want[0], want_grads)),
                    strict=True):  # fmt: skip
        assert a.shape == b.shape and a.dtype == b.dtype
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        assert np.linalg.norm(a - b) <= 0.015 * np.linalg.norm(b)


def test_a_block_mask_of_ranges_is_bounds(interpreted):
    arrays = normal(0, B, T, N, H), normal(1, B, S, K, H), normal(2, B, S, K, H)
    for name, ranges in (("block mask of ranges", True), ("ranges by batch", True),
                         ("block mask", False)):  # fmt: skip
        spec, ops = door._explained(*arrays, **CASES[name])[:2]
        given, _ = _flash_peers._mosaic_options(fa, spec, ops, backward=False)
        assert (given["blocks"] is None) == ranges
        assert (given["mask"] is None) == (name == "block mask of ranges")
        assert (given["bounds"] is not None) == ranges


def test_captured_arrays_change_without_a_new_program():
    texts = []
    for scale in (1.0, 2.0):
        own = table * scale
        spec, ops = door._explained(
            *(normal(0, 1, T, N, H), normal(1, 1, S, K, H), normal(2, 1, S, K, H)),
            score_mod=lambda x, b, n, t, s, own=own: x + own[n, s],
        )
        lowered = jax.jit(functools.partial(_flash_peers.mosaic_forward, spec)).trace(ops)
        texts.append(lowered.lower(lowering_platforms=("cuda",)).as_text())
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("mod", "message"),
    [
        (lambda x, b, n, t, s: x + table[n, (t + s) % S], "pass it as bias"),
        (lambda x, b, n, t, s: x + jax.lax.erf_inv(x), "erf_inv"),
    ],
)
def test_what_a_tile_cannot_compute_is_refused(mod, message, interpreted):
    x = normal(0, 1, T, N, H)
    spec, ops = door._explained(x, x, x, score_mod=mod)
    with pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(functools.partial(_flash_peers.mosaic_forward, spec), ops)


def seen_by(mod, T, S, b=0):
    return np.array([[bool(mod(b, 0, t, s)) for s in range(S)] for t in range(T)])


RANGES = {
    "documents": (lambda b, n, t, s: (t // 7 == s // 7) & (s <= t), True),
    "window": (lambda b, n, t, s: (s <= t + 3) & (s > t - 4), True),
    "prefix": (lambda b, n, t, s: (s < 6 + b) | (s <= t), True),
    "empty rows": (lambda b, n, t, s: (t > 3) & (t < 18) & (s <= t - 4), True),
    "empty rows between": (lambda b, n, t, s: (t % 5 > 0) & (s <= t // 5), False),
    "nothing": (lambda b, n, t, s: s < 0, True),
    "a hole": (lambda b, n, t, s: (s <= t) & (s != 4), False),
    "a hole in what sees a key": (lambda b, n, t, s: (s < 9) & (t != 4) | (s < 3), False),
    "backwards": (lambda b, n, t, s: (s <= 20 - t) & (s > 10 - t), False),
}


@pytest.mark.parametrize("name", RANGES)
def test_runs_of_a_block_mask(name, monkeypatch):
    """Kept where every row and column sees one run, in order; other masks have none."""
    mod, kept = RANGES[name]
    build = functools.partial(block_mask, mod, 22, 19, batch=2, block_q=8, block_kv=4)
    mask = build()
    monkeypatch.setattr(attention_mask, "AT_ONCE", 2 * 2 * 8 * 4)  # two tiles, of five, a step
    jax.tree.map(np.testing.assert_array_equal, mask, build())
    assert (mask.key_ranges is not None) == kept == (mask.query_ranges is not None)
    for b in range(2) if kept else ():
        seen = seen_by(mod, 22, 19, b)
        for ranges, rows in ((mask.key_ranges, seen), (mask.query_ranges, seen.T)):
            place = np.arange(rows.shape[1])
            lo, hi = np.asarray(ranges)[b]
            np.testing.assert_array_equal((place >= lo[:, None]) & (place < hi[:, None]), rows)
    tiles = np.asarray(mask.kinds[1, 0])
    for i, j in np.ndindex(tiles.shape):
        part = seen_by(mod, 22, 19, 1)[8 * i : 8 * i + 8, 4 * j : 4 * j + 4]
        assert tiles[i, j] == int(part.any()) + int(part.all())
    assert block_mask(mod, 22, 19, num_heads=2).key_ranges is None
    assert jax.eval_shape(lambda: block_mask(mod, 22, 19)).key_ranges is None
