"""flash_attention against dense float32, forward and gradients, options in pairs; then its laws."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.ops.attention_mask import block_mask
from aidx.ops.flash_attention import FlashAttentionConfig, flash_attention
from pallas_kernels.dropout import dropout_keeps, dropout_rows
from tests.ops import cases, dense

B, T, S, N, K, H, HV = 2, 21, 29, 4, 2, 8, 6
SMALL = FlashAttentionConfig(block_size_q=8, block_size_kv=8)  # partial tiles on every side


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def qkv(t=T, s=S, n=N, kv_heads=K, h=H, hv=HV, b=B, dtype=jnp.float32):
    shapes = ((b, t, n, h), (b, s, kv_heads, h), (b, s, kv_heads, hv))
    return tuple(normal(i, *shape, dtype=dtype) for i, shape in enumerate(shapes))


# Each option: (arguments of flash_attention, the same for the oracle, differentiable names).
@functools.cache
def options():
    positions = jnp.arange(T)[None] + S - T
    q_lens, kv_lens = jnp.array([21, 5]), jnp.array([17, 0])
    q_ids = jnp.sort(jax.random.randint(jax.random.key(5), (B, T), 0, 4))
    kv_ids = jnp.sort(jax.random.randint(jax.random.key(6), (B, S), 0, 4))
    mask = jax.random.bernoulli(jax.random.key(7), 0.6, (1, N, T, S))
    bias, slopes, sinks = normal(8, B, 1, T, S), jnp.array([0.5, 0.25, 0.1, 0.05]), normal(9, N)
    offset = jnp.array([3, 10])
    lens = (jnp.arange(T)[None, :, None] < q_lens[:, None, None]) & (
        jnp.arange(S)[None, None, :] < kv_lens[:, None, None]
    )
    near = lambda b, n, t, s: jnp.abs(t - s) < 4 + 3 * n
    seen_near = jnp.abs(jnp.arange(T)[:, None] - jnp.arange(S)[None])[None, None] < (
        4 + 3 * jnp.arange(N)[None, :, None, None]
    )
    return {
        "none": ({}, {}),
        "causal": ({"causal": True}, {"causal": True}),
        "window": ({"causal": True, "window": 6}, {"causal": True, "left": 5}),
        "window_pair": ({"window": (3, 4)}, {"left": 3, "right": 4}),
        "offset": (
            {"causal": True, "query_offset": offset},
            {"causal": True, "positions": offset[:, None] + jnp.arange(T)[None]},
        ),
        "lens": ({"q_lens": q_lens, "kv_lens": kv_lens}, {"allowed": lens[:, None]}),
        "segments": (
            {"segment_ids": (q_ids, kv_ids)},
            {"allowed": (q_ids[:, :, None] == kv_ids[:, None, :])[:, None]},
        ),
        "mask": ({"mask": mask}, {"allowed": mask}),
        "mask_mod": ({"mask_mod": near}, {"allowed": seen_near}),
        "block_mask": (
            {"block_mask": block_mask(near, T, S, num_heads=N, block_q=8, block_kv=8)},
            {"allowed": seen_near},
        ),
        "soft_cap": ({"logits_soft_cap": 1.5}, {"soft_cap": 1.5}),
        "scale": ({"scale": 0.7}, {"scale": 0.7}),
        "bias": ({"bias": bias}, {"bias": bias}),
        "alibi": ({"alibi_slopes": slopes}, {"alibi_slopes": slopes, "positions": positions}),
        "sinks": ({"sinks": sinks}, {"sinks": sinks}),
    }


GRADIENTS = ("bias", "alibi_slopes", "sinks")
# Every option at least once with every kind of neighbour that could interfere with it.
PAIRS = [
    ("none",),
    ("causal", "bias"),
    ("window", "sinks"),
    ("window_pair", "alibi"),
    ("offset", "soft_cap"),
    ("lens", "sinks"),
    ("segments", "causal"),
    ("mask", "soft_cap", "bias"),
    ("mask_mod", "alibi", "scale"),
    ("block_mask", "causal", "sinks"),
]
# Options that say the same thing twice, or contradict each other.
CLASHES = [
    {"offset", "alibi"},
    {"window", "window_pair"},
    {"causal", "window_pair"},
    *(set(p) for p in itertools.combinations(
        ("lens", "segments", "mask", "mask_mod", "block_mask"), 2)),
]  # fmt: skip
NAMES = (
    "none", "causal", "window", "window_pair", "offset", "lens", "segments", "mask", "mask_mod",
    "block_mask", "soft_cap", "scale", "bias", "alibi", "sinks",
)  # fmt: skip
SLOW_PAIRS = [pair for pair in itertools.combinations(NAMES, 2) if set(pair) not in CLASHES]


def test_every_option_is_in_the_grid():
    assert tuple(options()) == NAMES


def merged(names):
    table = options()
    ours, theirs = {}, {}
    for name in names:
        ours |= table[name][0]
        theirs |= table[name][1]
    return ours, theirs


def both(ours, theirs, arrays, config=SMALL):
    """(out, lse) and all gradients of ours and of the oracle; one compilation each."""
    extra = {name: ours[name] for name in GRADIENTS if name in ours}
    co_out, co_lse = normal(20, B, T, N, arrays[2].shape[-1]), normal(21, B, T, N)
    co_lse = jnp.where(jnp.arange(T)[None, :, None] % 3 == 0, 0.0, co_lse)

    def through(attend, fixed):
        def run(arrays, extra):
            out, lse = attend(*arrays, **fixed, **extra)
            # An empty row's lse is -inf: its gradient is zero by definition.
            total = jnp.sum(out * co_out) + jnp.sum(jnp.where(lse > -jnp.inf, lse * co_lse, 0.0))
            return total, (out, lse)

        return jax.jit(jax.grad(run, argnums=(0, 1), has_aux=True))(arrays, extra)

    flash = functools.partial(flash_attention, return_lse=True, config=config)
    oracle = lambda *a, **kw: dense.attend(*a, **kw)[:2]
    drop = lambda options: {k: v for k, v in options.items() if k not in extra}
    return through(flash, drop(ours)), through(oracle, drop(theirs))


def check_pair(names):
    ours, theirs = merged(names)
    (grads, outs), (grads_ref, outs_ref) = both(ours, theirs, qkv())
    chex.assert_trees_all_close(outs, outs_ref, atol=2e-5, rtol=2e-5)
    chex.assert_trees_all_close(grads, grads_ref, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("names", PAIRS, ids="-".join)
def test_options_and_gradients_match_dense_attention(names):
    check_pair(names)


@pytest.mark.slow
@pytest.mark.parametrize("names", SLOW_PAIRS, ids="-".join)
def test_all_pairs_match_dense_attention(names):
    check_pair(names)


@pytest.mark.smoke
def test_one_call_matches_dense_attention():
    q, k, v = qkv()
    out = flash_attention(q, k, v, causal=True, config=SMALL)
    chex.assert_trees_all_close(out, dense.attend(q, k, v, causal=True)[0], atol=2e-5)


@pytest.mark.parametrize("name", ["llama3_8b_chunk", "mistral_window", "mqa", "gpt2_odd", "decode"])
def test_named_shapes_with_the_tiles_chosen_here(name):
    case = cases.FLASH[name].small()
    q, k, v = qkv(case.T, case.S, case.N, case.K, case.H, case.H, case.B)
    left = None if case.window is None else case.window - 1
    out = flash_attention(q, k, v, causal=case.causal, window=case.window)
    ref = dense.jit_attend(q, k, v, causal=case.causal, left=left)[0]
    chex.assert_trees_all_close(out, ref, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_as_good_as_its_inputs(dtype):
    q, k, v = qkv(dtype=dtype)

    def run(attend):
        f = lambda *a: attend(*a).astype(jnp.float32)
        g = lambda *a: (lambda out, pull: (out, pull(jnp.ones_like(out))))(*jax.vjp(f, *a))
        return jax.jit(g)

    out, grads = run(lambda *a: flash_attention(*a, causal=True, config=SMALL))(q, k, v)
    wide = (x.astype(jnp.float32) for x in (q, k, v))
    ref, grads_ref = run(lambda *a: dense.attend(*a, causal=True)[0])(*wide)
    eps = float(jnp.finfo(dtype).eps)
    assert all(x.dtype == dtype for x in grads)
    chex.assert_trees_all_close(out, ref, atol=4 * eps)
    chex.assert_trees_all_close(
        jax.tree.map(lambda x: x.astype(jnp.float32), grads), grads_ref, atol=16 * eps
    )


# --- rows without keys, packed sequences ---------------------------------------------------------


@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_row_that_sees_nothing_gives_zeros_and_no_nan(with_sinks):
    q, k, v = qkv(t=S)

    def run(q, k, v, sinks):
        extra = {"sinks": sinks} if with_sinks else {}
        out, lse = flash_attention(
            q, k, v, causal=True, query_offset=-3, return_lse=True, config=SMALL, **extra
        )
        return jnp.sum(out**2) + jnp.sum(jnp.where(jnp.isfinite(lse), lse, 0.0)), (out, lse)

    grads, (out, lse) = jax.jit(jax.grad(run, (0, 1, 2, 3), has_aux=True))(q, k, v, jnp.ones(N))
    assert not out[:, :3].any() and (lse[:, :3] == -jnp.inf).all()
    assert jnp.isfinite(lse[:, 3:]).all()
    chex.assert_tree_all_finite(grads)
    assert not grads[0][:, :3].any()


def test_packed_sequences_equal_the_same_sequences_alone():
    q_lengths, kv_lengths = [5, 0, 9, 1], [7, 3, 9, 4]
    q, k, v = (x[0] for x in qkv(t=18, s=25))
    cu = tuple(jnp.cumsum(jnp.array([0, *n])) for n in (q_lengths, kv_lengths))

    def packed(q, k, v):
        out = flash_attention(
            q, k, v, cu_seqlens=cu, causal=True, window=6, alibi_slopes=SLOPES, config=SMALL
        )
        return jnp.sum(jnp.sin(out)), out

    grads, out = jax.jit(jax.grad(packed, (0, 1, 2), has_aux=True))(q, k, v)
    for i, (a, b) in enumerate(zip(q_lengths, kv_lengths, strict=True)):
        rows, keys = slice(cu[0][i], cu[0][i] + a), slice(cu[1][i], cu[1][i] + b)
        if a:
            ref = dense.jit_attend(
                q[None, rows], k[None, keys], v[None, keys], causal=True, left=5,
                alibi_slopes=SLOPES,
            )[0]  # fmt: skip
            chex.assert_trees_all_close(out[rows], ref[0], atol=2e-5)
    assert not out[15:].any() and not grads[0][15:].any() and not grads[1][23:].any()


SLOPES = jnp.array([0.5, 0.25, 0.1, 0.05])


def test_one_cu_seqlens_is_segment_ids():
    q, k, v = (x[0] for x in qkv(t=20, s=20))
    ids = np.repeat(np.arange(3), [4, 9, 7])
    run = functools.partial(flash_attention, causal=True, config=SMALL)
    a = run(q, k, v, cu_seqlens=np.array([0, 4, 13, 20]))
    chex.assert_trees_all_equal(a, run(q, k, v, segment_ids=ids))


# --- dropout -------------------------------------------------------------------------------------


def dropout_mask(key, rate, shape):
    b, n, t, s = (jnp.arange(size) for size in shape)
    rows = dropout_rows(
        jax.random.key_data(key)[-2:], b[:, None, None], n[None, :, None], t[None, None, :]
    )
    return dropout_keeps(rows[..., None], s[None, None, None], rate)


def test_dropout_is_one_mask_in_both_passes_whatever_the_tiles():
    key, rate, (q, k, v) = jax.random.key(3), 0.3, qkv()
    keep = dropout_mask(key, rate, (B, N, T, S))

    def run(attend, **options):
        return jax.jit(
            jax.value_and_grad(lambda *a: jnp.sum(attend(*a, **options) ** 2), (0, 1, 2))
        )

    flash = functools.partial(flash_attention, dropout_rate=rate, dropout_key=key, causal=True)
    oracle = lambda *a: dense.attend(*a, causal=True, keep=keep, rate=rate)[0]
    ref = run(oracle)(q, k, v)
    for config in (SMALL, FlashAttentionConfig(block_size_q=16, block_size_kv=12)):
        chex.assert_trees_all_close(run(flash, config=config)(q, k, v), ref, atol=2e-4, rtol=1e-4)


def test_dropout_bits_have_the_rate_and_are_uncorrelated():
    rate, shape = 0.1, (4, 4, 64, 256)
    keep = np.asarray(dropout_mask(jax.random.key(11), rate, shape)).astype(np.float64)
    other = np.asarray(dropout_mask(jax.random.key(12), rate, shape)).astype(np.float64)
    count = keep.size
    sigma = np.sqrt(rate * (1 - rate) / count)
    assert abs(keep.mean() - (1 - rate)) < 4 * sigma
    standard = lambda x: (x - x.mean()) / x.std()
    centred = standard(keep)
    pairs = [(centred, standard(other))]
    for axis in range(4):
        moved = np.moveaxis(centred, axis, 0)
        pairs += [(moved[lag:], moved[:-lag]) for lag in (1, 2, 8, 16) if lag < moved.shape[0]]
    above, below = np.triu_indices(64, 1)
    pairs.append((centred[:, :, above, below], centred[:, :, below, above]))
    for a, b in pairs:
        assert abs((a * b).mean()) < 5 / np.sqrt(a.size)
    # Every row has its own share: the variance of row sums is that of independent bits.
    assert 0.8 < keep.sum(-1).var() / (shape[-1] * rate * (1 - rate)) < 1.25


# --- score_mod -----------------------------------------------------------------------------------


def test_score_mod_gets_gradients_of_what_it_captures():
    q, k, v = qkv()
    table, cap, doc = normal(30, N, T), jnp.float32(1.3), jnp.arange(S) // 7

    def mod(table, cap):
        def f(score, b, n, t, s):
            near = jnp.where(doc[s] == doc[jnp.minimum(t, S - 1)], 0.5, 0.0)
            return cap * jnp.tanh(score / cap) + table[n, t] * (s - t) * 0.05 + near + 0.1 * b

        return f

    def run(attend, *args):
        q, k, v, table, cap = args
        return jnp.sum(jnp.sin(attend(q, k, v, score_mod=mod(table, cap))))

    flash = functools.partial(flash_attention, causal=True, config=SMALL)
    oracle = lambda *a, **kw: dense.attend(*a, causal=True, **kw)[0]
    args = (q, k, v, table, cap)
    grads = [
        jax.jit(jax.grad(functools.partial(run, attend), (0, 1, 2, 3, 4)))(*args)
        for attend in (flash, oracle)
    ]
    chex.assert_trees_all_close(*grads, atol=1e-4, rtol=1e-4)


def test_changing_a_captured_array_compiles_nothing():
    q, k, v = qkv()
    compiled = []
    listen = lambda name, *_, **__: compiled.append(name) if "compile" in name else None
    call = lambda slopes: flash_attention(
        q, k, v, score_mod=lambda x, b, n, t, s: x - slopes[n] * (t - s), config=SMALL
    )
    doubled = jax.block_until_ready(SLOPES * 2)
    first = call(SLOPES).block_until_ready()
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        second = call(doubled).block_until_ready()
    finally:
        jax.monitoring.clear_event_listeners()
    assert not [name for name in compiled if "backend_compile" in name]
    assert jnp.abs(first - second).max() > 1e-3


# --- laws ----------------------------------------------------------------------------------------


def test_tiles_rank_and_packed_heads_do_not_change_the_answer():
    q, k, v = qkv(h=8, hv=8)
    ref = flash_attention(q, k, v, causal=True, config=SMALL)
    one = flash_attention(q[0], k[0], v[0], causal=True, config=SMALL)
    more = flash_attention(q[:, None], k[:, None], v[:, None], causal=True, config=SMALL)
    flat = flash_attention(
        q.reshape(B, T, -1), k.reshape(B, S, -1), v.reshape(B, S, -1), num_heads=N, causal=True
    )
    chex.assert_trees_all_close(one, ref[0], atol=1e-6)
    chex.assert_trees_all_equal(more[:, 0], ref)
    chex.assert_trees_all_close(flat, ref.reshape(B, T, -1), atol=1e-6)


def test_weights_are_what_multiplied_v():
    q, k, v = qkv()
    key = jax.random.key(1)
    options = dict(causal=True, sinks=jnp.ones(N), dropout_rate=0.2, dropout_key=key)
    out, lse, weights = flash_attention(q, k, v, **options, return_lse=True, return_weights=True)
    tiled = flash_attention(q, k, v, **options, return_lse=True, config=SMALL)
    keep = dropout_mask(key, 0.2, (B, N, T, S))
    ref = dense.attend(q, k, v, causal=True, sinks=jnp.ones(N), keep=keep, rate=0.2)
    chex.assert_trees_all_close((out, lse, weights), ref, atol=2e-5)
    chex.assert_trees_all_close((out, lse), tiled, atol=2e-5)


def test_vmap_is_a_loop_in_either_order_with_grad():
    q, k, v = qkv(b=3)
    bias, lens, key = normal(40, 3, N, T, S), jnp.array([29, 11, 3]), jax.random.key(2)

    def one(q, k, v, bias, lens, slopes):
        out = flash_attention(
            q, k, v, causal=True, bias=bias, kv_lens=lens, alibi_slopes=slopes, config=SMALL,
            dropout_rate=0.25, dropout_key=key,
        )  # fmt: skip
        return jnp.sum(jnp.sin(out))

    argnums = (0, 1, 2, 3, 5)
    grad = jax.jit(jax.grad(one, argnums))
    loop = [grad(q[i], k[i], v[i], bias[i], lens[i], SLOPES) for i in range(3)]
    loop = jax.tree.map(lambda *x: jnp.stack(x), *loop)
    inside = jax.jit(jax.vmap(jax.grad(one, argnums), (0, 0, 0, 0, 0, None)))(
        q, k, v, bias, lens, SLOPES
    )
    chex.assert_trees_all_close(inside, loop, atol=1e-5, rtol=1e-5)
    batch = lambda *a: jnp.sum(jax.vmap(one, (0, 0, 0, 0, None, None))(*a[:4], lens[0], a[4]))
    outside = jax.jit(jax.grad(batch, (0, 1, 2, 3, 4)))(q, k, v, bias, SLOPES)
    loop = [grad(q[i], k[i], v[i], bias[i], lens[0], SLOPES) for i in range(3)]
    loop = jax.tree.map(lambda *x: jnp.stack(x), *loop)
    chex.assert_trees_all_close(outside[:4], loop[:4], atol=1e-5, rtol=1e-5)
    chex.assert_trees_all_close(outside[4], loop[4].sum(0), atol=1e-5, rtol=1e-5)


def test_vmap_over_shared_keys_and_over_captured_arrays():
    q, k, v = (x[0] for x in qkv())
    scales = jnp.array([0.5, 2.0, 1.0])

    def one(q, c):
        return flash_attention(q, k, v, score_mod=lambda x, b, n, t, s: x * c + 0.1 * b * t)

    batch = jnp.stack([q, 2 * q, -q])
    loop = jnp.stack([one(x, c) for x, c in zip(batch, scales, strict=True)])
    chex.assert_trees_all_close(jax.vmap(one)(batch, scales), loop, atol=1e-5)
    fixed = jax.vmap(lambda x: one(x, scales[0]))(batch)
    chex.assert_trees_all_close(fixed, jnp.stack([one(x, scales[0]) for x in batch]), atol=1e-5)


def test_remat_saves_by_name_and_runs_the_forward_once():
    q, k, v = qkv()
    policy = jax.checkpoint_policies.save_only_these_names(
        "flash_attention_out", "flash_attention_lse"
    )
    plain = lambda q: jnp.sum(jnp.sin(flash_attention(jnp.cos(q), k, v, config=SMALL)))
    kept = jax.checkpoint(plain, policy=policy)
    grad = lambda f: jax.jit(jax.grad(f))(q)
    chex.assert_trees_all_close(grad(kept), grad(plain), atol=1e-6)
    calls = lambda f: str(jax.make_jaxpr(jax.grad(f))(q)).count("name=_jit_call")
    assert (calls(plain), calls(kept), calls(jax.checkpoint(plain))) == (2, 2, 3)


@pytest.mark.parametrize("packed", [False, True], ids=["lens", "cu_seqlens"])
def test_nan_in_slots_that_do_not_exist_changes_nothing(packed):
    q, k, v = qkv(b=1)
    d_out = normal(22, 1, T, N, HV)
    ends = dict(cu_seqlens=(jnp.array([0, 6, 9]), jnp.array([0, 8, 11])))
    if not packed:
        ends = dict(q_lens=jnp.array([9]), kv_lens=jnp.array([11]))
    dead_q = (jnp.arange(T) >= 9)[None, :, None, None]
    dead_k = (jnp.arange(S) >= 11)[None, :, None, None]

    def run(q, k, v, d_out):
        f = lambda *a: flash_attention(*a, **ends, logits_soft_cap=3.0, return_lse=True,
                                       config=SMALL)  # fmt: skip
        (out, lse), pull = jax.vjp(f, q, k, v)
        return out, lse, pull((d_out, jnp.where(dead_q[..., 0], 0.0, jnp.cos(lse))))

    bad = [jnp.where(dead_q, jnp.nan, q), *(jnp.where(dead_k, jnp.nan, x) for x in (k, v))]
    run = jax.jit(run)
    clean = run(q, k, v, d_out)
    chex.assert_trees_all_equal(run(*bad, jnp.where(dead_q, jnp.nan, d_out)), clean)
    assert not clean[0][:, 9:].any() and jnp.isfinite(clean[0]).all()


def test_what_is_masked_for_every_row_is_not_computed():
    """NaN keys behind the window and after the causal border reach nothing only if never read."""
    q, k, v = qkv(t=64, s=64)
    poisoned = v.at[:, 8:40].set(jnp.nan)
    out = flash_attention(q[:, 56:], k, poisoned, causal=True, window=9, config=SMALL)
    assert jnp.isfinite(out).all()
    late = v.at[:, 16:].set(jnp.nan)
    out = flash_attention(q[:, :16], k, late, causal=True, query_offset=0, config=SMALL)
    assert jnp.isfinite(out).all()
    ids = jnp.arange(64)[None].repeat(B, 0) // 32
    out = flash_attention(
        q[:, :32], k, v.at[:, 32:].set(jnp.nan), segment_ids=(ids[:, :32], ids), config=SMALL
    )
    assert jnp.isfinite(out).all()


def test_memory_grows_with_the_length_not_its_square():
    def temporaries(s):
        x = jax.ShapeDtypeStruct((1, s, 1, 8), jnp.float32)
        loss = lambda q, k, v: jnp.sum(flash_attention(q, k, v, causal=True))
        return jax.jit(jax.grad(loss, (0, 1, 2))).lower(x, x, x).compile().memory_analysis()

    small, large = (temporaries(s).temp_size_in_bytes for s in (2048, 8192))
    assert large < 4.5 * small


def test_empty_lengths():
    q, k, v = qkv()
    assert flash_attention(q[:, :0], k, v).shape == (B, 0, N, HV)
    out, lse = flash_attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert not out.any() and (lse == -jnp.inf).all()


# --- what does not fit is refused, with its values -----------------------------------------------

Q, KEY, VALUE = (np.zeros(s, np.float32) for s in ((2, 4, 4, 8), (2, 6, 2, 8), (2, 6, 2, 8)))
IDS = np.zeros((2, 4), np.int32)
REFUSED = {
    "rank": (dict(q=Q[0]), ValueError, "one rank"),
    "lead": (dict(q=Q[:1]), ValueError, "leading axes"),
    "head_dim": (dict(q=Q[..., :4]), ValueError, "differ in head_dim"),
    "length": (dict(v=VALUE[:, :3]), ValueError, "differ in length"),
    "group": (dict(q=Q[:, :, :3]), ValueError, "no multiple"),
    "zero_dim": (dict(q=Q[..., :0], k=KEY[..., :0]), ValueError, "positive"),
    "integer": (dict(q=Q.astype(int)), TypeError, "float"),
    "dtypes": (dict(q=Q.astype(np.float16)), TypeError, "dtypes differ"),
    "num_heads_rank": (dict(num_heads=4), ValueError, "num_heads=4"),
    "window_zero": (dict(window=0, causal=True), ValueError, "at least 1"),
    "window_full": (dict(window=3), ValueError, "causal=True"),
    "window_pair": (dict(window=(-2, 0)), ValueError, "at least -1"),
    "cap": (dict(logits_soft_cap=0.0), ValueError, "positive"),
    "rate": (dict(dropout_rate=1.0), ValueError, "0, 1"),
    "no_key": (dict(dropout_rate=0.1), ValueError, "dropout_key"),
    "bad_key": (dict(dropout_rate=0.1, dropout_key=np.zeros(1, np.uint32)), TypeError, "one JAX"),
    "bias_shape": (dict(bias=np.zeros((4, 4, 5))), ValueError, "broadcast"),
    "bias_dtype": (dict(bias=np.zeros((4, 6), bool)), TypeError, "bias"),
    "mask_dtype": (dict(mask=np.zeros((4, 6))), TypeError, "mask"),
    "mask_rank": (dict(mask=np.zeros((1, 1, 1, 4, 6), bool)), ValueError, "broadcast"),
    "slopes": (dict(alibi_slopes=np.zeros(3)), ValueError, "alibi_slopes"),
    "sinks_dtype": (dict(sinks=np.zeros(4, int)), TypeError, "sinks"),
    "lens": (dict(kv_lens=np.zeros(3, int)), ValueError, "kv_lens"),
    "lens_dtype": (dict(q_lens=np.zeros(2)), TypeError, "q_lens"),
    "segments_shape": (dict(segment_ids=(IDS, IDS)), ValueError, "segment_ids of kv"),
    "two_packings": (
        dict(segment_ids=IDS, cu_seqlens=np.array([0, 4])), ValueError, "exclude each other",
    ),
    "cu_lead": (dict(cu_seqlens=(np.array([0, 4]), np.array([0, 6]))), ValueError, "leading"),
    "offset": (dict(query_offset=np.zeros(3, int)), ValueError, "query_offset"),
    "mod_float": (dict(mask_mod=lambda b, n, t, s: t - s), TypeError, "bool"),
    "mod_scalar": (dict(score_mod=lambda x, b, n, t, s: x + np.ones(3)), TypeError, "one scalar"),
    "score_bool": (dict(score_mod=lambda x, b, n, t, s: t > s), TypeError, "float"),
    "block_mask": (
        dict(block_mask=block_mask(lambda b, n, t, s: t >= s, 4, 4)), ValueError, "4 x 4 tokens",
    ),
    "implementation": (dict(implementation="triton"), ValueError, "triton"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_argument_is_refused_with_its_values(name):
    arguments, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        flash_attention(**(dict(q=Q, k=KEY, v=VALUE) | arguments))


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        (np.array([0, 3, 2, 4]), "ascend"),
        (np.array([1, 4]), "ascend"),
        (np.array([0, 9]), "T=4"),
        (np.array([0]), "sequences"),
        ((np.array([0, 4]), np.array([0, 2, 4])), "alike"),
    ],
)
def test_wrong_borders_are_refused(cu, message):
    with pytest.raises(ValueError, match=message):
        flash_attention(Q[:1], Q[:1], Q[:1], cu_seqlens=cu)


def test_cu_seqlens_and_query_offset_exclude_each_other():
    with pytest.raises(ValueError, match="drop query_offset"):
        flash_attention(Q[:1], Q[:1], Q[:1], cu_seqlens=np.array([0, 4]), query_offset=0)


@pytest.mark.parametrize(
    "bad", [dict(block_size_q=0), dict(dropout_rate=-0.1), dict(precision="low")]
)
def test_a_wrong_configuration_is_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        FlashAttentionConfig(**bad)


def test_presets_are_the_plans():
    preset = FlashAttentionConfig.preset
    assert preset("causal").causal and not preset("default").causal
    sizes = lambda c: (c.block_size_q, c.block_size_kv)
    assert sizes(preset("memory_efficient")) == (32, 32)
    assert sizes(preset("high_performance")) == (128, 128)
    with pytest.raises(ValueError, match="turbo"):
        preset("turbo")


def test_the_configuration_stands_in_for_arguments():
    q, k, v = qkv()
    config = FlashAttentionConfig(8, 8, causal=True, scale=0.3, return_attention_weights=True)
    out, weights = flash_attention(q, k, v, config=config)
    ref = dense.attend(q, k, v, causal=True, scale=0.3)
    chex.assert_trees_all_close((out, weights), (ref[0], ref[2]), atol=2e-5)
