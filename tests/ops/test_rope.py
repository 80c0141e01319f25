"""Rotary embedding: complex numbers as the reference, its laws, the scalings' limits, refusals."""

import jax.numpy as jnp
import numpy as np
import pytest

from aidx.ops.rope import Rope, apply_rope, rope_angles, rope_frequencies

H = 16
X = np.random.default_rng(0).normal(size=(5, 3, H))


def rotate(x, positions, rope=None, dtype=jnp.float32, **options):
    cos, sin = rope_angles(jnp.asarray(positions), *rope_frequencies(H, rope or Rope(), **options))
    return apply_rope(jnp.asarray(x, dtype), cos, sin)


@pytest.mark.smoke
def test_rotation_equals_complex_multiplication():
    positions = np.array([0, 1, 7, 100, 4000])
    inv_freq = 10000.0 ** -(np.arange(0, H, 2) / H)
    z = (X[..., : H // 2] + 1j * X[..., H // 2 :]) * np.exp(
        1j * positions[:, None] * inv_freq.astype(np.float32)
    )[:, None, :]
    want = np.concatenate([z.real, z.imag], axis=-1)
    np.testing.assert_allclose(rotate(X, positions), want, atol=2e-3)
    np.testing.assert_allclose(rotate(X[:4], positions[:4]), want[:4], atol=5e-5)


def test_scores_depend_on_distances_only():
    q, k = X[:1], X[1:2]
    near = (rotate(q, [3]) * rotate(k, [10])).sum()
    far = (rotate(q, [503]) * rotate(k, [510])).sum()
    np.testing.assert_allclose(near, far, rtol=1e-4)
    assert abs(near - (rotate(q, [3]) * rotate(k, [11])).sum()) > 1e-3


def test_position_zero_is_the_identity_and_norms_are_kept():
    np.testing.assert_allclose(rotate(X, np.zeros(5, int)), X, rtol=1e-6)
    np.testing.assert_allclose(
        np.linalg.norm(rotate(X, np.arange(5) * 1000), axis=-1),
        np.linalg.norm(X, axis=-1),
        rtol=1e-5,
    )


def test_batched_and_flat_agree():
    cos, sin = rope_angles(jnp.arange(10).reshape(2, 5), *rope_frequencies(H, Rope()))
    batched = apply_rope(jnp.asarray(np.stack([X, X]), jnp.float32), cos, sin)
    np.testing.assert_array_equal(batched[1], rotate(X, np.arange(5, 10)))


def test_bfloat16_is_the_rounding_of_float32():
    x = jnp.asarray(X, jnp.bfloat16)
    got = rotate(x, np.arange(5) + 9000, dtype=jnp.bfloat16)
    assert got.dtype == jnp.bfloat16
    want = rotate(x.astype(jnp.float32), np.arange(5) + 9000).astype(jnp.bfloat16)
    np.testing.assert_array_equal(got.astype(np.float32), want.astype(np.float32))


def test_linear_divides_positions():
    np.testing.assert_allclose(
        rotate(X, np.arange(5) * 4, Rope(type="linear", factor=4.0)),
        rotate(X, np.arange(5)),
        atol=1e-6,
    )


def test_dynamic_is_unscaled_up_to_its_original_length_and_stretches_beyond():
    rope = Rope(type="dynamic", factor=2.0, original_max_position_embeddings=64)
    plain = rope_frequencies(H, Rope())[0]
    for max_len in (None, 1, 64):
        np.testing.assert_array_equal(rope_frequencies(H, rope, max_len=max_len)[0], plain)
    stretched = rope_frequencies(H, rope, max_len=128)[0]
    # theta' = theta * (2 * 128/64 - 1)^(H/(H-2)): the longest wave grows threefold.
    np.testing.assert_allclose(plain[-1] / stretched[-1], 3.0, rtol=1e-5)
    assert stretched[0] == plain[0]


def test_llama3_keeps_short_waves_and_divides_long_ones():
    rope = Rope(type="llama3", factor=8.0, original_max_position_embeddings=64, theta=500.0)
    plain, scaled = rope_frequencies(H, Rope(theta=500.0))[0], rope_frequencies(H, rope)[0]
    wavelength = 2 * np.pi / plain
    short, long = wavelength < 64 / 4, wavelength > 64 / 1
    assert short.any() and long.any() and (~short & ~long).any()
    np.testing.assert_allclose(scaled[short], plain[short], rtol=1e-6)
    np.testing.assert_allclose(scaled[long], plain[long] / 8, rtol=1e-6)
    between = (plain / scaled)[~short & ~long]
    assert ((between > 1) & (between < 8)).all()


def test_yarn_interpolates_between_kept_and_divided_and_warms():
    rope = Rope(type="yarn", factor=4.0, original_max_position_embeddings=256)
    plain, (scaled, factor) = rope_frequencies(H, Rope())[0], rope_frequencies(H, rope)
    ratio = plain / scaled
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(4, rel=1e-5)
    assert (np.diff(ratio) >= -1e-5).all()
    assert factor == pytest.approx(0.1 * np.log(4) + 1)
    assert rope_frequencies(H, Rope(type="yarn", original_max_position_embeddings=9))[1] == 1.0


def test_factor_multiplies_cos_and_sin():
    inv_freq, _ = rope_frequencies(H, Rope())
    one = rope_angles(jnp.arange(3), inv_freq)
    two = rope_angles(jnp.arange(3), inv_freq, 2.0)
    np.testing.assert_array_equal(2 * one[0], two[0])
    np.testing.assert_array_equal(2 * one[1], two[1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"type": "su"}, "rope type 'su' is not one of"),
        ({"factor": 0.5}, "factor=0.5"),
        ({"theta": 0.0}, "theta=0.0"),
        ({"type": "yarn"}, "needs original_max_position_embeddings"),
        (
            {"type": "llama3", "original_max_position_embeddings": 8, "low_freq_factor": 4.0},
            "low_freq_factor=4.0",
        ),
    ],
)
def test_impossible_ropes_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Rope(**fields)


def test_impossible_shapes_are_refused():
    with pytest.raises(ValueError, match="head_dim=7"):
        rope_frequencies(7, Rope())
    cos, sin = rope_angles(jnp.arange(3), *rope_frequencies(H, Rope()))
    with pytest.raises(ValueError, match=r"x.shape=\(5, 3, 16\)"):
        apply_rope(jnp.asarray(X), cos, sin)
    with pytest.raises(ValueError, match=r"x.shape=\(3, 16\)"):
        apply_rope(jnp.ones((3, 16)), cos, sin)
