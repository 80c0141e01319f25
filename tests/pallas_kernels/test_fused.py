"""The fused kernels in the GPU interpreter with race detection, against float64 by NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.fused import configs, cross_entropy, gated, norm
from pallas_kernels.fused.config import CrossEntropyConfig, GatedConfig, NormConfig
from pallas_kernels.fused.rope import rope

EPS = 1e-3
ERROR = {"float32": 3e-6, "float16": 2e-3, "bfloat16": 1.6e-2}


def draw(seed, *shape, dtype="bfloat16"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape) * 2 + 0.5, dtype)


def f64(x):
    return None if x is None else np.asarray(x, np.float64)


def close(got, want, dtype, times=1.0):
    """Within a rounding of the dtype; times: how many of them a sum may take."""
    got = f64(got)
    assert got.shape == want.shape
    far = np.abs(got - want) / (1 + np.abs(want))
    assert far.max() <= times * ERROR[jnp.dtype(dtype).name], far.max()


@pytest.fixture
def no_races(capfd):
    yield
    assert "RACE" not in capfd.readouterr().out


# --- norms ----------------------------------------------------------------------------------------


def moments(h, centred):
    mean = h.mean(-1, keepdims=True) if centred else 0.0
    r = 1 / np.sqrt(((h - mean) ** 2).mean(-1, keepdims=True) + EPS)
    return (h - mean) * r, r


def check_norm(rows, width, dtype, *, centred, biased, residual, config):
    x, dy, dh, other = (draw(i, rows, width, dtype=dtype) for i in range(4))
    scale, bias = draw(4, width, dtype=dtype), draw(5, width, dtype=dtype) if biased else None
    options = dict(eps=EPS, centred=centred, config=config, interpret=True)
    y, h = norm.norm(x, scale, bias, other if residual else None, **options)
    want = (f64(x) + f64(other)) if residual else f64(x)
    if residual:
        close(h, want, dtype)
        want = f64(h)
    n, r = moments(want, centred)
    assert y.dtype == jnp.dtype(dtype)
    close(y, n * f64(scale) + (f64(bias) if biased else 0), dtype)
    dh = dh if residual else None
    found = norm.norm_backward(jnp.asarray(want, dtype), scale, dy, dh, biased=biased, **options)
    g = f64(dy) * f64(scale)
    dx = g - n * (g * n).mean(-1, keepdims=True)
    dx = r * (dx - g.mean(-1, keepdims=True) if centred else dx)
    close(found[0], dx + f64(dh) if residual else dx, dtype, times=2)
    close(found[1], (f64(dy) * n).sum(0), "float32", times=4)
    if biased:
        close(found[2], f64(dy).sum(0), "float32", times=4)
    assert biased or found[2] is None


@pytest.mark.smoke
def test_layer_norm_with_everything(monkeypatch, no_races):
    """Workers take several rows, and the row ends inside a vector's piece."""
    monkeypatch.setattr(norm, "HOPPER_SMS", 1)
    config = NormConfig(ctas=2, backward_warpgroups=2)
    check_norm(5, 1048, "bfloat16", centred=True, biased=True, residual=True, config=config)


def test_rms_norm_of_one_short_row(no_races):
    config = NormConfig(backward_warpgroups=1)
    check_norm(1, 8, "float32", centred=False, biased=False, residual=False, config=config)


@pytest.mark.parametrize("stages", [1, 3])
def test_gradients_of_rms_norm_whatever_is_in_flight(stages, monkeypatch, no_races):
    """One row at a time; more in flight than a warpgroup has rows."""
    monkeypatch.setattr(norm, "HOPPER_SMS", 1)
    dtype = "float16" if stages == 1 else "float32"
    config = NormConfig(1, 3, backward_stages=stages)
    check_norm(7, 520, dtype, centred=False, biased=False, residual=True, config=config)


def test_a_mean_far_from_zero_costs_the_variance_nothing(monkeypatch, no_races):
    """Sums about the warps' means, and what is moved to the row's, against float64."""
    monkeypatch.setattr(norm, "HOPPER_SMS", 1)
    rows, width = 3, 1544
    x = (draw(0, rows, width, dtype="float32") + 3000).at[1, 5].set(9e4).at[2, :256].add(500)
    dy, scale = draw(1, rows, width, dtype="float32"), jnp.ones(width)
    n, r = moments(f64(x), True)
    options = dict(eps=EPS, centred=True, interpret=True)
    y, _ = norm.norm(x, scale, **options)
    np.testing.assert_allclose(y, n, atol=1e-3)  # the mean itself has a rounding: 1e-4 of 2
    config = NormConfig(backward_warpgroups=2)
    dx, *_ = norm.norm_backward(x, scale, dy, config=config, **options)
    g = f64(dy)
    want = r * (g - g.mean(-1, keepdims=True) - n * (g * n).mean(-1, keepdims=True))
    np.testing.assert_allclose(dx / r, want / r, atol=1e-3)


# --- rotary embedding, gated activations ----------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(("heads", "dim", "dtype"), [(3, 48, "bfloat16"), (20, 64, "float32")])
def test_rope(heads, dim, dtype, no_races):
    x, angles = draw(0, 2, heads, dim, dtype=dtype), draw(1, 2, dim // 2, dtype="float32")
    turn = np.exp(1j * f64(angles))[:, None]
    z = (f64(x)[..., : dim // 2] + 1j * f64(x)[..., dim // 2 :]) * turn
    y = rope(x, jnp.cos(angles), jnp.sin(angles), interpret=True)
    close(y, np.concatenate([z.real, z.imag], -1), dtype)


def reference_gated(x, activation):
    acts = dict(
        silu=jax.nn.silu,
        gelu=functools.partial(jax.nn.gelu, approximate=False),
        gelu_tanh=jax.nn.gelu,
    )
    return acts[activation](x[:, 0]) * x[:, 1]


@pytest.mark.parametrize("activation", gated.ACTIVATIONS)
def test_gated(activation, no_races):
    """Two tiles a row, the second of which is not whole; saturated gates on both sides."""
    dtype, width = ("float32", 1032) if activation == "gelu" else ("bfloat16", 2056)
    x, dy = draw(0, 2, 2, width, dtype=dtype), draw(1, 2, width, dtype=dtype)
    x = x.at[0, 0, :4].set(jnp.array([-60.0, 60.0, 0.0, -7.5], dtype))
    options = dict(activation=activation, config=GatedConfig(2), interpret=True)
    with jax.enable_x64():
        exact, pull = jax.vjp(lambda x: reference_gated(x, activation), jnp.float64(x))
        (slope,) = pull(jnp.float64(dy))
        exact, slope = np.asarray(exact), np.asarray(slope)
    close(gated.gated(x, **options), exact, dtype)
    close(gated.gated_backward(x, dy, **options), slope, dtype)


# --- cross-entropy --------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cross_entropy(dtype, monkeypatch, no_races):
    """Rows of whole steps and a rest, a CTA with several rows, masked and absent targets."""
    monkeypatch.setattr(cross_entropy, "HOPPER_SMS", 1)
    rows, V = 3, 3080
    logits = (draw(0, rows, V, dtype=dtype) * 4).at[1, 5:900].set(-jnp.inf).at[2, 77].set(30)
    targets, config = jnp.array([V - 1, -1, 1500]), CrossEntropyConfig(1, 1, 2, 1)
    options = dict(config=config, interpret=True)
    lse, picked, _ = cross_entropy.log_normaliser(logits, targets, **options)
    x = f64(logits)
    want = np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1)) + x.max(-1)
    close(lse, want, "float32")
    close(picked, np.array([x[0, V - 1], 0.0, x[2, 1500]]), "float32")
    power, hit, every = (jnp.array(a) for a in ([1.0, 0.5, 2.0], [3.0, 1.0, 0.5], [0.1, 0.0, 0.2]))
    d = cross_entropy.cross_entropy_backward(logits, targets, lse, power, hit, every, **options)
    column = lambda a: f64(a)[:, None]
    exact = column(power) * np.exp(x - want[:, None]) - column(every)
    exact[0, V - 1] -= 3.0
    exact[2, 1500] -= 0.5
    close(d, exact, dtype, times=4)  # lse has a rounding of its own


def test_sums_of_the_logits_and_rows_that_are_not_finite(no_races):
    logits = draw(0, 4, 1032, dtype="float32")
    logits = logits.at[1, 1030].set(jnp.inf).at[2].set(-jnp.inf).at[3, 7].set(jnp.nan)
    call = functools.partial(cross_entropy.log_normaliser, total=True, interpret=True)
    lse, _, total = call(logits, jnp.zeros(4, jnp.int32))
    np.testing.assert_allclose(total[0], f64(logits)[0].sum(), rtol=1e-5)
    np.testing.assert_allclose(lse, jax.nn.logsumexp(logits, axis=-1), rtol=1e-6)


# --- what is refused, what lowers -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda x: norm.norm(x[:, :7], x[0, :7], eps=EPS, centred=True), NotImplementedError),
        (lambda x: norm.norm(x[:0], x[0], eps=EPS, centred=True), NotImplementedError),
        (lambda x: norm.norm(jnp.tile(x, 999), x[0], eps=EPS, centred=True), NotImplementedError),
        (lambda x: norm.norm(x, x[0, :8], eps=EPS, centred=True), ValueError),
        (lambda x: norm.norm(x, x[0], None, x[:1], eps=EPS, centred=True), ValueError),
        (lambda x: gated.gated(x[:, None]), ValueError),
        (lambda x: gated.gated(x.reshape(2, 2, -1), activation="relu"), NotImplementedError),
        (lambda x: rope(x[:, None], x[:, :4], x[:, :4]), ValueError),
        (lambda x: rope(x[:, None, :8], x[:, :4], x[:, :4]), NotImplementedError),
        (lambda x: cross_entropy.log_normaliser(x, jnp.zeros(3, jnp.int32)), ValueError),
        (lambda x: NormConfig(backward_warpgroups=9), ValueError),
        (
            lambda x: norm.norm_backward(
                *(jnp.tile(x, 128), jnp.tile(x[0], 128), jnp.tile(x, 128)),
                eps=EPS,
                centred=True,
                config=NormConfig(0, 8, 2),
            ),
            NotImplementedError,
        ),
        (lambda x: GatedConfig(0), ValueError),
        (lambda x: CrossEntropyConfig(ctas=-1), ValueError),
    ],
)
def test_refusals(call, error):
    with pytest.raises(error):
        call(jnp.ones((2, 64)))


@pytest.mark.parametrize(
    "name", ["fused/layer_norm 4096 bfloat16 residual backward", "fused/rope 32 x 128"]
)
def test_lowers_for_cuda(name):
    f, args = {name: (f, args) for name, f, args in configs.compile_cases()}[name]
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mosaic_gpu_v2") == 1


def test_the_gradient_takes_the_logits_memory():
    """Under donation the logits become their gradient."""
    f, args = {n: (f, a) for n, f, a in configs.compile_cases()}[
        "fused/cross_entropy 128256 backward"
    ]
    text = jax.jit(f, donate_argnums=0).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    assert "tf.aliasing_output" in text and "output_operand_alias" in text
