"""The flash kernels in the GPU interpreter with race detection, against attention written out."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import _mgpu
from pallas_kernels import flash_attention as fa
from pallas_kernels.flash_attention import configs, forward, heuristics

BF16 = jnp.bfloat16
causal, full = fa.Band(right=0), fa.Band()
cu = jnp.array([0, 5, 70, 70, 100])
ids = fa.packed_segments(cu, 110)


def arrays(batch, queries, keys, heads, kv_heads, head_dim, head_dim_v, dtype=BF16):
    shapes = (
        (batch, queries, heads, head_dim),
        (batch, keys, kv_heads, head_dim),
        (batch, keys, kv_heads, head_dim_v),
        (batch, queries, heads, head_dim_v),
    )
    split = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(k, s, dtype) for k, s in zip(split, shapes, strict=True)]


def relative(got, want):
    return float(jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel()))


def check_forward(shape, dtype=BF16, config=None, **options):
    q, k, v, _ = arrays(*shape, dtype)
    out, lse = fa.flash_attention_fwd(q, k, v, scale=0.2, config=config, interpret=True, **options)
    want, want_lse = fa.reference(q, k, v, scale=0.2, **options)
    assert out.dtype == dtype and lse.dtype == jnp.float32
    assert relative(out.astype(jnp.float32), want) < 4e-3
    np.testing.assert_array_equal(np.isneginf(lse), np.isneginf(want_lse))
    seen = ~np.isneginf(want_lse)
    np.testing.assert_allclose(np.asarray(lse)[seen], np.asarray(want_lse)[seen], atol=2e-4)
    assert not np.asarray(out, np.float32)[~seen].any()


def check_backward(shape, through_lse=False, config=None, deterministic=False, **options):
    q, k, v, do = arrays(*shape)
    f32 = [x.astype(jnp.float32) for x in (q, k, v)]
    (out, lse), pull = jax.vjp(lambda *x: fa.reference(*x, scale=0.2, **options), *f32)
    d_lse = jnp.zeros_like(lse)
    if through_lse:
        wave = jnp.sin(jnp.arange(lse.size, dtype=jnp.float32)).reshape(lse.shape)
        d_lse = jnp.where(jnp.isneginf(lse), 0.0, wave)
    want = pull((do.astype(jnp.float32), d_lse))
    got = fa.flash_attention_bwd(
        q, k, v, out.astype(BF16), lse, do, d_lse if through_lse else None,
        scale=0.2, config=config, deterministic=deterministic, interpret=True, **options,
    )  # fmt: skip
    for name, a, b in zip("qkv", got[:3], want, strict=True):
        assert a.dtype == BF16
        assert relative(a.astype(jnp.float32), b) < 8e-3, f"d{name}"
    return got


ragged = fa.dynamic_bounds(causal, 110, 110, segments=(ids, ids))
short = fa.dynamic_bounds(fa.Band(left=60, right=0), 140, 150, kv_lens=jnp.array([0, 77]))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param((1, 72, 100, 2, 1, 64, 64), dict(band=causal), marks=pytest.mark.smoke),
        ((1, 70, 70, 1, 1, 40, 24), dict(band=fa.Band(left=30, right=3), soft_cap=5.0)),
        ((1, 110, 110, 1, 1, 64, 64), dict(band=causal, bounds=ragged)),
        (
            (1, 65, 40, 2, 2, 64, 64),
            dict(band=fa.Band(right=0, offset=-25), sinks=jnp.array([1.0, -2])),
        ),
        ((1, 65, 65, 2, 2, 64, 64), dict(band=full, alibi_slopes=jnp.array([0.5, 0.1]))),
    ],
    ids=["causal-gqa", "window-cap-H40", "packed", "empty-rows-sinks", "alibi"],
)
def test_forward(shape, options):
    config = fa.ForwardConfig(block_kv=64)
    check_forward(shape, config=config, **options)


@pytest.mark.slow
@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("late_sum", [False, True])
@pytest.mark.parametrize("consumers", [1, 2])
def test_configurations_agree(persistent, late_sum, consumers):
    config = fa.ForwardConfig(
        block_kv=64,
        persistent=persistent,
        late_sum=late_sum,
        consumers=consumers,
        num_sms=2,
    )
    check_forward((1, 200, 130, 2, 1, 64, 64), jnp.float16, config, band=causal)


def test_persistent_grid_reuses_its_buffers():
    config = fa.ForwardConfig(block_kv=64, consumers=1, persistent=True, num_sms=1)
    check_forward((1, 130, 72, 1, 1, 64, 64), config=config, band=causal)


@pytest.mark.parametrize("growth", [0.1, 3.0, 40.0])
def test_lazy_rescaling(growth):
    """Row maxima that creep, that jump by less than 2^8 and by more, from block to block."""
    config = fa.ForwardConfig(block_kv=64, consumers=1, lazy_rescale=True)
    q, k, v, _ = arrays(1, 64, 260, 1, 1, 64, 64)
    q = q.at[..., 0].set(1.0)
    k = k.at[..., 0].set(-growth * jnp.arange(260, dtype=k.dtype)[None, :, None] / 64)
    out, lse = fa.flash_attention_fwd(q, k, v, band=full, scale=1.0, config=config, interpret=True)
    want, want_lse = fa.reference(q, k, v, band=full, scale=1.0)
    assert relative(out.astype(jnp.float32), want) < 4e-3
    np.testing.assert_allclose(lse, want_lse, atol=2e-4, rtol=1e-5)


@pytest.mark.parametrize("deal", ["turns", "zigzag back"])
def test_a_window_row_by_row(deal):
    config = fa.ForwardConfig(
        block_kv=64, consumers=1, persistent=True, row_major=True, deal=deal, num_sms=2,
        tight_masks=True, late_sum=True,
    )  # fmt: skip
    check_forward((1, 130, 130, 2, 1, 64, 64), config=config, band=fa.Band(left=70, right=0))


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((1, 330, 330, 2, 1, 64, 64), dict(band=fa.Band(left=127, right=0))),
        ((1, 200, 200, 1, 1, 64, 64), dict(band=fa.Band(left=0, right=0))),
        ((1, 200, 200, 1, 1, 64, 64), dict(band=fa.Band(left=20, right=7))),
        ((1, 140, 430, 2, 2, 64, 64), dict(band=fa.Band(left=201, right=0, offset=290))),
        ((1, 200, 90, 1, 1, 64, 64), dict(band=fa.Band(left=70, right=0))),
        ((1, 300, 300, 1, 1, 64, 64), dict(band=fa.Band(left=150))),
        ((1, 300, 300, 1, 1, 64, 64), dict(band=fa.Band(left=-3, right=10, offset=1))),
        ((1, 200, 260, 2, 1, 64, 64), dict(band=causal)),
        ((1, 130, 300, 2, 1, 64, 64), dict(band=full)),
        ((1, 110, 110, 2, 1, 64, 64), dict(band=causal, bounds=ragged)),
        (
            (2, 140, 150, 1, 1, 64, 64),
            dict(band=fa.Band(left=60, right=0), bounds=short),
        ),
    ],
    ids=["gqa", "one", "narrow", "offset", "T>S", "left", "ahead", "causal", "full", "packed",
         "lens"],
)  # fmt: skip
def test_blocks_that_slide(shape, options):
    """Blocks from the first key of a tile, and O through the slot of its last K."""
    config = fa.ForwardConfig(
        block_kv=128, persistent=True, row_major=True, deal="zigzag back", num_sms=2,
        tight_masks=True, sliding_blocks=True, o_in_ring=True,
    )  # fmt: skip
    check_forward(shape, config=config, **options)


def test_192_keys_and_wide_heads_in_a_ring():
    config = fa.ForwardConfig(
        block_kv=192, persistent=True, late_sum=True, lazy_rescale=True, sliding_blocks=True,
        o_in_ring=True, num_sms=2,
    )  # fmt: skip
    band = fa.Band(left=255, right=0)
    check_forward((1, 400, 400, 2, 1, 128, 128), config=config, band=band)
    with pytest.raises(NotImplementedError, match="head_dim_v"):
        check_forward((1, 64, 64, 1, 1, 128, 64), config=config, band=band)


@pytest.mark.parametrize(
    ("shape", "change", "options"),
    [
        ((1, 200, 130, 2, 1, 64, 64), {}, dict(band=causal)),
        pytest.param(
            (1, 200, 200, 2, 2, 64, 64),
            dict(tight_masks=True, q_stages=2, late_sum=True, row_major=True),
            dict(band=fa.Band(left=150, right=0)),
            marks=pytest.mark.slow,
        ),
        (
            (1, 110, 110, 4, 2, 64, 64),
            dict(tight_masks=True, q_stages=2, longest_first=True),
            dict(band=causal, bounds=ragged),
        ),
    ],
    ids=["causal", "window", "packed"],
)
def test_chained_tiles(shape, change, options):
    config = fa.ForwardConfig(block_kv=64, persistent=True, chained=True, num_sms=2, **change)
    check_forward(shape, config=config, **options)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param((1, 72, 100, 2, 1, 64, 64), dict(band=causal), marks=pytest.mark.smoke),
        ((1, 110, 110, 1, 1, 64, 64), dict(band=causal, bounds=ragged)),
        (
            (1, 70, 70, 1, 1, 64, 64),
            dict(band=fa.Band(left=9, right=0), soft_cap=5.0, through_lse=True),
        ),
        ((1, 72, 72, 1, 1, 64, 64), dict(band=causal, deterministic=True)),
    ],
    ids=["causal-gqa", "packed", "window-cap-lse", "deterministic"],
)
def test_backward(shape, options):
    config = fa.BackwardConfig(block_q=128, by_sequence=4, tight_masks=True)
    check_backward(shape, config=config, **options)


def test_wide_heads_send_p_unrounded():
    config = fa.BackwardConfig(split="columns", do_stages=1, early_free=True)
    q, k, v, do = arrays(1, 64, 64, 1, 1, 128, 128)
    f32 = [x.astype(jnp.float32) for x in (q, k, v)]
    (out, lse), pull = jax.vjp(lambda *x: fa.reference(*x, scale=0.2, band=full), *f32)
    want = pull((do.astype(jnp.float32), jnp.zeros_like(lse)))
    delta = jnp.einsum("btnh,btnh->bnt", out, do.astype(jnp.float32))
    from pallas_kernels.flash_attention.backward import backward

    rows = lse.transpose(0, 2, 1)
    dq, dk, _ = backward(
        q, k, v, do, rows, delta, options=fa.Options(full, 0.2), config=config, interpret=True
    )
    # rounding dS alone leaves 1.8e-3; dS of a rounded P left 2.4e-3
    assert relative(dq * 0.2, want[0]) < 2.1e-3
    assert relative(dk.astype(jnp.float32), want[1]) < 2.7e-3


def poisoned(x, ends, value):
    at = jnp.arange(x.shape[1])[None, :, None, None]
    return jnp.where(at < ends[:, None, None, None], x, jnp.asarray(value, x.dtype))


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_nan_past_the_lengths_reaches_nothing(deterministic):
    kv_lens, q_lens = jnp.array([40, 100]), jnp.array([70, 31])
    bounds = fa.dynamic_bounds(causal, 72, 104, kv_lens=kv_lens, q_lens=q_lens)
    q, k, v, do = arrays(2, 72, 104, 2, 1, 64, 64)
    ends = (q_lens, kv_lens, kv_lens, q_lens)
    zeroed, nan = (
        [poisoned(x, end, value) for x, end in zip((q, k, v, do), ends, strict=True)]
        for value in (0, jnp.nan)
    )
    call = dict(scale=0.2, band=causal, bounds=bounds)
    run = functools.partial(fa.flash_attention_fwd, interpret=True, **call)
    run = functools.partial(run, config=fa.ForwardConfig(block_kv=64, consumers=1))
    for got, want in zip(run(*nan[:3]), run(*zeroed[:3]), strict=True):
        np.testing.assert_array_equal(got, want)
    out, lse = fa.reference(*(x.astype(jnp.float32) for x in zeroed[:3]), **call)
    back = functools.partial(
        fa.flash_attention_bwd, deterministic=deterministic, interpret=True, **call
    )
    back = functools.partial(back, config=fa.BackwardConfig(consumers=1))
    want = back(*zeroed[:3], out.astype(BF16), lse, zeroed[3])
    # what a caller's garbage leaves in out is garbage as well
    got = back(*nan[:3], poisoned(out.astype(BF16), q_lens, jnp.nan), lse, nan[3])
    for a, b in zip(got[:3], want[:3], strict=True):
        np.testing.assert_array_equal(a, b)


def test_sinks_get_their_gradient():
    sinks = jnp.array([0.5, 2.0])
    q, k, v, do = arrays(1, 64, 64, 2, 2, 64, 64)
    f32 = [x.astype(jnp.float32) for x in (q, k, v)]
    f = lambda s: fa.reference(*f32, scale=0.2, band=full, sinks=s)
    (out, lse), pull = jax.vjp(f, sinks)
    (want,) = pull((do.astype(jnp.float32), jnp.zeros_like(lse)))
    got = fa.flash_attention_bwd(
        q, k, v, out, lse, do.astype(jnp.float32), band=full, scale=0.2, sinks=sinks, interpret=True
    )
    np.testing.assert_allclose(got.sinks, want, rtol=1e-3)


def test_the_oracle_s_gradient_is_its_difference_quotient():
    q, k, v, _ = (x.astype(jnp.float32) for x in arrays(1, 6, 6, 2, 2, 8, 8))
    at = lambda q: sum(
        x.sum() for x in fa.reference(q, k, v, band=causal, scale=0.3, sinks=jnp.array([0.5, 2.0]))
    )
    way = jax.random.normal(jax.random.key(3), q.shape)
    slope = (at(q + 1e-2 * way) - at(q - 1e-2 * way)) / 2e-2
    np.testing.assert_allclose((jax.grad(at)(q) * way).sum(), slope, rtol=1e-3)


def test_masked_is_exact_under_any_scale():
    # a rounded MASKED * scale leaves a residual in s * scale - max, and exp2 of it is infinite
    assert math.frexp(_mgpu.MASKED)[0] == -0.5


def test_lse_is_stored_in_whole_tiles():
    """It leaves by a bulk copy, which checks no bounds: the interpreter would not notice."""
    shapes = []
    original = _mgpu.kernel
    with pytest.MonkeyPatch.context() as patch:
        record = lambda body, **kw: shapes.append(kw["out_type"]) or original(body, **kw)
        patch.setattr(forward._mgpu, "kernel", record)
        q = jax.ShapeDtypeStruct((1, 129, 2, 64), BF16)
        jax.eval_shape(lambda q: fa.flash_attention_fwd(q, q, q, band=causal, scale=0.1), q)
    block_q = heuristics.forward_config(64, 64, fa.Options(causal, 0.1)).block_q
    assert shapes[0][1].shape[-1] % block_q == 0


x = jnp.zeros((1, 8, 2, 64), BF16)
REFUSED = {
    "rank": (ValueError, "not .batch", dict(q=x[0])),
    "kv shapes": (ValueError, "differ in batch, keys", dict(v=jnp.zeros((1, 9, 2, 64), BF16))),
    "head_dim": (ValueError, "differ in batch or head_dim", dict(q=x[..., :32])),
    "groups": (ValueError, "no multiple", dict(q=jnp.zeros((1, 8, 3, 64), BF16))),
    "dtypes": (ValueError, "differ", dict(k=x.astype(jnp.float16))),
    "slopes": (ValueError, "alibi_slopes.shape", dict(alibi_slopes=jnp.zeros(3))),
    "sinks": (ValueError, "sinks.shape", dict(sinks=jnp.zeros(3))),
    "soft cap": (ValueError, "not positive", dict(soft_cap=-1.0)),
    "scale": (NotImplementedError, "not positive", dict(scale=0.0)),
    "f32": (NotImplementedError, "neither", {n: x.astype(jnp.float32) for n in "qkv"}),
    "wide": (NotImplementedError, "above 256", {n: jnp.zeros((1, 8, 2, 264), BF16) for n in "qkv"}),
    "empty": (NotImplementedError, "empty", {n: x[:, :0] for n in "kv"}),
    "alibi lengths": (
        NotImplementedError,
        "alibi_slopes with",
        dict(
            alibi_slopes=jnp.zeros(2),
            bounds=fa.dynamic_bounds(causal, 8, 8, kv_lens=jnp.array([3])),
        ),
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_carry_the_reason(case):
    error, message, change = REFUSED[case]
    given = dict(q=x, k=x, v=x, scale=0.1) | change
    with pytest.raises(error, match=message):
        fa.flash_attention_fwd(given.pop("q"), given.pop("k"), given.pop("v"), band=causal, **given)


@pytest.mark.parametrize(
    "change",
    [dict(block_kv=65), dict(stages=1), dict(consumers=4), dict(release="x"), dict(num_sms=0),
     dict(stages=5, release="named"), dict(q_stages=3), dict(chained=True),
     dict(deal="x"), dict(deal="zigzag back"), dict(o_in_ring=True),
     dict(o_in_ring=True, persistent=True, block_kv=64),
     dict(sliding_blocks=True, chained=True, persistent=True)],
    ids=str,
)  # fmt: skip
def test_forward_config_refuses(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        fa.ForwardConfig(**change)


@pytest.mark.parametrize(
    "change",
    [dict(block_q=96), dict(consumers=4), dict(stages=0), dict(split="x"), dict(dq_chunks=0),
     dict(split="columns", block_q=128)],
    ids=str,
)  # fmt: skip
def test_backward_config_refuses(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        fa.BackwardConfig(**change)


def test_backward_refuses_what_it_cannot_do():
    lse = jnp.zeros((1, 8, 2))
    call = functools.partial(fa.flash_attention_bwd, x, x, x, x, band=causal, scale=0.1)
    with pytest.raises(ValueError, match="do not fit together"):
        call(lse[:, :4], x)
    with pytest.raises(NotImplementedError, match="alibi_slopes"):
        call(lse, x, alibi_slopes=jnp.zeros(2))
    with pytest.raises(NotImplementedError, match="shared memory"):
        fa.ForwardConfig(block_kv=256).check(256, 256)
    with pytest.raises(NotImplementedError, match="do not split"):
        fa.BackwardConfig().check(64, 64)  # 32 columns of K for each consumer


CASES = {name: (f, args) for name, f, args in configs.compile_cases()}
QUICK = ("flash/H64 causal fwd", "flash/H128 full bwd", "flash/H256 causal bwd")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in CASES]
)
def test_shipped_configurations_lower_for_cuda(name):
    f, args = CASES[name]
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("tokens", [1, 129, 1001])
def test_on_the_device(head_dim, tokens):
    """Needs one H100 or H200: the compiled kernels at lengths that are no multiple of a tile."""
    q, k, v, do = arrays(2, tokens, tokens + 70, 4, 2, head_dim, head_dim)
    band = fa.Band(right=0, offset=70)
    f32 = [a.astype(jnp.float32) for a in (q, k, v)]
    (want, want_lse), pull = jax.vjp(lambda *a: fa.reference(*a, scale=0.1, band=band), *f32)
    out, lse = fa.flash_attention_fwd(q, k, v, scale=0.1, band=band)
    assert relative(out.astype(jnp.float32), want) < 4e-3
    np.testing.assert_allclose(lse, want_lse, atol=1e-3)
    got = fa.flash_attention_bwd(q, k, v, out, lse, do, scale=0.1, band=band)
    grads = pull((do.astype(jnp.float32), jnp.zeros_like(lse)))
    for a, b in zip(got[:3], grads, strict=True):
        assert relative(a.astype(jnp.float32), b) < 1e-2


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_nan_past_the_lengths_on_the_device(head_dim):
    """Needs one H100 or H200: clearing is PTX there, which the interpreter does not run."""
    kv_lens = jnp.array([333, 0, 128, 449])
    q, k, v, do = arrays(4, 300, 450, 4, 2, head_dim, head_dim)
    bounds = fa.dynamic_bounds(causal, 300, 450, kv_lens=kv_lens)
    call = dict(scale=0.1, band=causal, bounds=bounds)
    both = {}
    for value in (0, jnp.nan):
        k, v = (poisoned(x, kv_lens, value) for x in (k, v))
        out, lse = fa.flash_attention_fwd(q, k, v, **call)
        both[value] = (
            out,
            lse,
            *fa.flash_attention_bwd(q, k, v, out, lse, do, deterministic=True, **call)[:3],
        )
    got, want = both.values()
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.gpu
def test_freeing_early_on_the_device():
    """Needs one H100 or H200: dO's slot is handed back while dQ and dK are still computed."""
    q, k, v, do = arrays(2, 700, 900, 2, 2, 256, 256)
    call = dict(scale=0.05, band=fa.Band(right=0, offset=200))
    out, lse = fa.flash_attention_fwd(q, k, v, **call)
    base = dict(split="columns", do_stages=1, dq_chunks=2)
    grads = [
        fa.flash_attention_bwd(q, k, v, out, lse, do, config=fa.BackwardConfig(**base, **x), **call)
        for x in ({}, dict(early_free=True))
    ]
    for a, b in zip(grads[1][1:3], grads[0][1:3], strict=True):
        np.testing.assert_array_equal(a, b)
    assert relative(*(g.q.astype(jnp.float32) for g in grads)) < 4e-3
