"""The sampler against a float64 reference of the whole chain, and the laws it must keep."""

import math
import os
import pathlib
import subprocess

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from aidx.ops import sampling
from aidx.ops.sampling import (
    SamplingState,
    adjust_logits,
    count_tokens,
    draw_keys,
    gumbel,
    pack_bits,
    pack_rows,
    sample,
    sampling_rows,
    sampling_state,
    set_state_row,
    state_row,
    token_logprobs,
    truncate_logits,
    unpack_bits,
    unpack_rows,
)

R, V = 4, 37  # one shape for nearly everything: one compilation a variant


@jax.jit
def full(logits, rows, positions, state, banned):
    return sample(logits, rows, positions, state, banned=banned, num_logprobs=3)


@jax.jit
def plain(logits, rows, positions):
    return sample(logits, rows, positions, variant="plain")


@jax.jit
def truncate(x, top_k, top_p, min_p):
    return truncate_logits(x, top_k, top_p, min_p)


@jax.jit
def noise_of(rows, positions):
    return gumbel(draw_keys(rows, positions), V)


NO_BANS = np.full((R, 2), -1, np.int32)


def stack(rows):
    return jax.tree.map(lambda *a: np.stack(a), *rows)


def neutral_state(num_rows=R):
    return jax.tree.map(np.asarray, sampling_state(num_rows, V))


# --- the reference: float64, sorts, one row at a time ---------------------------------------------


def reference_adjust(x, p):
    """One row's logits after masks, bias and penalties; `p` is a dict of plain Python values."""
    x = np.asarray(x, np.float64).copy()
    if p["allowed"] is not None:
        x[[t for t in range(V) if t not in p["allowed"]]] = -np.inf
    for t in p["banned"]:
        x[t] = -np.inf
    if len(p["output"]) < p["min_tokens"]:
        x[list(p["stop"])] = -np.inf
    for t, bias in p["bias"].items():
        x[t] += bias
    for t in set(p["prompt"]) | set(p["output"]):
        x[t] = x[t] / p["repetition_penalty"] if x[t] > 0 else x[t] * p["repetition_penalty"]
    for t in set(p["output"]):
        x[t] -= p["frequency_penalty"] * p["output"].count(t) + p["presence_penalty"]
    return x


def reference_truncate(x, top_k, top_p, min_p, slack=0.0):
    """The kept tokens by sorting; `slack` moves top_p's border (for sums that meet it)."""
    keep = np.isfinite(x)
    if not keep.any():
        return keep
    prob = np.exp(x - x.max())
    keep &= (prob >= min_p * (1 + slack)) | (x == x.max())
    if 0 < top_k < V:
        kth = np.sort(np.where(keep, x, -np.inf))[-top_k]
        keep &= x >= kth
    if top_p < 1:
        prob = np.where(keep, prob, 0)
        prob /= prob.sum()
        above = np.array([prob[x > value].sum() for value in x])
        keep &= (above < top_p + slack) | (x == x.max())
    return keep


row_parameters = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.sampled_from([0, -1, 1, 2, 5, V, V + 9]),
        "top_p": st.sampled_from([1.0, 0.999, 0.7, 0.2, 1e-6]),
        "min_p": st.sampled_from([0.0, 0.02, 0.5, 1.0]),
        "repetition_penalty": st.sampled_from([1.0, 1.3, 0.6]),
        "presence_penalty": st.sampled_from([0.0, 0.7, -2.0]),
        "frequency_penalty": st.sampled_from([0.0, 0.3, -0.4]),
        "prompt": st.lists(st.integers(0, V - 1), min_size=1, max_size=6),
        "output": st.lists(st.integers(0, 9), max_size=6),
        "min_tokens": st.sampled_from([0, 3, 9]),
        "stop": st.sets(st.integers(0, V - 1), max_size=3),
        "allowed": st.one_of(st.none(), st.sets(st.integers(0, V - 1), min_size=6)),
        "banned": st.lists(st.integers(0, V - 1), max_size=2, unique=True),
        "bias": st.dictionaries(st.integers(0, V - 1), st.sampled_from([-9.0, 1.5]), max_size=3),
        "seed": st.integers(0, 2**64 - 1),
        "sample": st.integers(0, 3),
    }
)


def inputs_of(batch):
    """What `sample` takes, from a list of R parameter dicts."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty")
    rows = sampling_rows(
        len(batch),
        **{name: [p[name] for p in batch] for name in (*names, "frequency_penalty", "sample")},
        seed=[p["seed"] for p in batch],
        stop_from=[len(p["prompt"]) + p["min_tokens"] for p in batch],
    )
    positions = np.array([len(p["prompt"]) + len(p["output"]) for p in batch], np.int32)
    state = stack(
        state_row(
            V,
            prompt=p["prompt"],
            output=p["output"],
            allowed=p["allowed"],
            stop=p["stop"],
            bias=p["bias"],
        )
        for p in batch
    )
    banned = NO_BANS.copy()
    for i, p in enumerate(batch):
        banned[i, : len(p["banned"])] = p["banned"]
    return rows, positions, state, banned


@pytest.mark.smoke
@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(
    batch=st.lists(row_parameters, min_size=R, max_size=R),
    entropy=st.integers(0, 2**32 - 1),
    levels=st.sampled_from([None, 4]),
)
def test_the_whole_chain_equals_the_float64_reference(batch, entropy, levels):
    logits = 3 * np.random.default_rng(entropy).standard_normal((R, V)).astype(np.float32)
    if levels:  # many equal logits: ties in every comparison
        logits = np.round(logits * levels / 6).astype(np.float32)
    rows, positions, state, banned = inputs_of(batch)
    tokens = np.asarray(full(logits, rows, positions, state, banned).tokens)
    noise = np.asarray(noise_of(rows, positions), np.float64)
    for token, x, g, p in zip(tokens, logits, noise, batch, strict=True):
        x = reference_adjust(x, p)
        if not np.isfinite(x).any():
            assert token == -1
            continue
        if p["temperature"] == 0:
            assert x[token] >= x.max() - 1e-5
            continue
        x = x / np.float64(np.float32(p["temperature"]))
        scores = []
        for slack in (0.0, 1e-5, -1e-5):  # a border met to rounding may fall either way
            keep = reference_truncate(x, p["top_k"], p["top_p"], p["min_p"], slack)
            scores.append(np.where(keep, x + g, -np.inf))
        assert any(s[token] >= s.max() - 1e-4 for s in scores), (token, p)


@jax.jit
def adjust(logits, rows, positions, state, banned):
    return adjust_logits(logits, rows, positions, state, banned)


@hypothesis.settings(max_examples=80, deadline=None, derandomize=True)
@hypothesis.given(st.lists(row_parameters, min_size=R, max_size=R), st.integers(0, 2**32 - 1))
def test_every_logit_is_masked_biased_and_penalised_as_in_the_reference(batch, entropy):
    logits = 3 * np.random.default_rng(entropy).standard_normal((R, V)).astype(np.float32)
    rows, positions, state, banned = inputs_of(batch)
    x = adjust(logits, rows, positions, state, banned)
    want = [reference_adjust(row, p) for row, p in zip(logits, batch, strict=True)]
    np.testing.assert_allclose(x, np.array(want), rtol=1e-5, atol=1e-5)


def test_stop_tokens_may_come_from_their_first_position_on():
    rows = sampling_rows(R, stop_from=[3, 4, 5, 0])
    state = SamplingState(stop=stack([state_row(V, stop=[7])] * R).stop)
    x = adjust_logits(jnp.zeros((R, V)), rows, jnp.full(R, 4), state)
    assert np.isneginf(x[:, 7]).tolist() == [False, False, True, False]
    assert np.isfinite(x).sum() == R * V - 1


# --- transformers' logits processors --------------------------------------------------------------

ORACLES = pathlib.Path(__file__).resolve().parent.parent / "oracles"


def assert_equal_to_transformers(golden):
    num_rows, vocab_size = golden["logits"].shape
    length = golden["seen"].shape[1]
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    rows = sampling_rows(
        num_rows, **{name: golden[name] for name in names}, stop_from=golden["min_tokens"]
    )
    state = stack(
        state_row(
            vocab_size,
            prompt=golden["seen"][i, :4],
            output=golden["seen"][i, 4:],
            stop=[golden["stop"][i]],
            bias={golden["bias_token"][i]: golden["bias"][i]},
        )
        for i in range(num_rows)
    )
    positions = jnp.full(num_rows, length, jnp.int32)
    x = adjust_logits(jnp.asarray(golden["logits"]), rows, positions, state)
    x = truncate_logits(x / rows.temperature[:, None], rows.top_k, rows.top_p, rows.min_p)
    np.testing.assert_array_equal(np.isfinite(x), np.isfinite(golden["scores"]))
    np.testing.assert_allclose(x, golden["scores"], rtol=1e-6)


def test_scores_are_those_of_transformers():
    with np.load(ORACLES / "sampling.npz") as golden:
        assert_equal_to_transformers(golden)


@pytest.mark.oracle
def test_scores_are_those_of_the_installed_transformers(tmp_path):
    script = ORACLES / "make_sampling.py"
    options = ["--out", str(tmp_path), "--seed", "1", "--rows", "300"]
    subprocess.run([os.environ["AIDX_TORCH_PYTHON"], str(script), *options], check=True)
    with np.load(tmp_path / "sampling.npz") as golden:
        assert_equal_to_transformers(golden)


# --- truncation: exact thresholds -----------------------------------------------------------------

special = st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-30, 3e38, -3e38, -math.inf])


@hypothesis.settings(max_examples=100, deadline=None, derandomize=True)
@hypothesis.given(
    st.lists(
        st.lists(
            st.one_of(special, st.floats(-(2.0**99), 2.0**99, width=32, allow_subnormal=False)),
            min_size=V,
            max_size=V,
        ),
        min_size=R,
        max_size=R,
    ),
    st.lists(st.integers(0, V), min_size=R, max_size=R),
)
def test_top_k_keeps_exactly_the_tokens_that_fewer_than_k_exceed(x, k):
    x = np.array(x, np.float32)
    kept = truncate(x, np.array(k, np.int32), np.ones(R, np.float32), np.zeros(R, np.float32))
    for row, k_row, kept_row in zip(x, k, np.asarray(kept), strict=True):
        above = (row[None, :] > row[:, None]).sum(1)
        expected = np.isfinite(row) & (above < (k_row or V))
        np.testing.assert_array_equal(np.isfinite(kept_row), expected)
        np.testing.assert_array_equal(kept_row[expected], row[expected])


@pytest.mark.parametrize("top_p", [1e-46, 1e-9, 0.1, 0.5, 0.9, 0.99, 0.9999])
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(top_p):
    x = 4 * np.random.default_rng(0).standard_normal((R, V)).astype(np.float32)
    ones = np.ones(R, np.float32)
    kept = np.isfinite(truncate(x, np.zeros(R, np.int32), top_p * ones, 0 * ones))
    prob = np.exp(x.astype(np.float64))
    prob /= prob.sum(1, keepdims=True)
    for p, row in zip(prob, kept, strict=True):
        order = np.argsort(-p)
        size = row.sum()
        np.testing.assert_array_equal(np.sort(order[:size]), np.flatnonzero(row))
        assert p[order[:size]].sum() >= top_p - 1e-6
        assert p[order[: size - 1]].sum() < top_p + 1e-6
        assert size >= 1


def test_ties_are_kept_or_left_out_together():
    x = np.tile(np.float32([2, 1, 1, 1] + [0] * (V - 4)), (R, 1))
    kept = truncate(x, np.int32([2, 1, 4, 5]), np.ones(R, np.float32), np.zeros(R, np.float32))
    assert np.isfinite(kept).sum(1).tolist() == [4, 1, 4, V]


def test_top_k_comes_before_top_p_and_renormalises():
    x = np.full((R, V), -50, np.float32)
    x[:, :4] = np.log([0.4, 0.3, 0.2, 0.1])
    # Of all, 0.6 needs two tokens; of the best two alone (4/7, 3/7) too; 0.55 of those only one.
    kept = truncate(
        x, np.int32([0, 2, 2, 3]), np.float32([0.6, 0.6, 0.55, 0.8]), np.zeros(R, np.float32)
    )
    assert np.isfinite(kept).sum(1).tolist() == [2, 2, 1, 3]


def test_min_p_comes_before_top_p():
    x = np.full((R, V), -50, np.float32)
    x[:, :4] = np.log([0.5, 0.25, 0.15, 0.1])
    # min_p 0.4 leaves 0.5 and 0.25 (mass 2/3 and 1/3): 0.6 of that is the first alone.
    top_p, min_p = np.float32([0.6, 0.6, 1, 1]), np.float32([0, 0.4, 0.4, 0.25])
    kept = truncate(x, np.zeros(R, np.int32), top_p, min_p)
    assert np.isfinite(kept).sum(1).tolist() == [2, 1, 2, 3]


def test_wider_digits_find_the_same_threshold(monkeypatch):
    # What a GPU runs: more bits a pass than the CPU takes.
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, *, cpu, default: default(x))
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 5, 10)), jnp.float32)
    flat = np.asarray(x).reshape(3, 50)
    k = [1, 7, 50]
    want = [np.sort(row)[-i] for row, i in zip(flat, k, strict=True)]
    found = jax.jit(sampling._kth_largest)(x, jnp.array(k))
    np.testing.assert_array_equal(found, np.float32(want))
    mass = jnp.exp(x - 4)
    p = jnp.array([0.3, 0.9, 1.0]) * mass.sum((1, 2))
    least = np.asarray(jax.jit(sampling._least_mass)(mass, p))
    for row, t, target in zip(np.asarray(mass).reshape(3, 50), least, p, strict=True):
        assert t in row
        assert row[row >= t].sum() >= target - 1e-5 and row[row > t].sum() < target + 1e-5


# --- laws -----------------------------------------------------------------------------------------


def some_batch(num_rows, entropy=0):
    """Rows with different parameters, their logits and positions."""
    rng = np.random.default_rng(entropy)
    rows = sampling_rows(
        num_rows,
        seed=rng.integers(0, 2**63, num_rows).tolist(),
        sample=rng.integers(0, 3, num_rows),
        temperature=rng.choice([0.0, 0.5, 1.0, 2.0], num_rows),
        top_k=rng.choice([0, 3, 20], num_rows),
        top_p=rng.choice([1.0, 0.6, 0.9], num_rows),
        min_p=rng.choice([0.0, 0.1], num_rows),
        repetition_penalty=rng.choice([1.0, 1.2], num_rows),
    )
    logits = 2 * rng.standard_normal((num_rows, V)).astype(np.float32)
    return logits, rows, rng.integers(1, 99, num_rows).astype(np.int32)


@pytest.mark.smoke
def test_neither_batch_nor_order_nor_padding_changes_a_rows_token():
    logits, rows, positions = some_batch(8)
    run = jax.jit(lambda *a: sample(*a).tokens)
    together = np.asarray(run(logits, rows, positions))
    pick = lambda index: jax.tree.map(lambda a: a[np.asarray(index)], (logits, rows, positions))
    order = np.random.default_rng(3).permutation(8)
    np.testing.assert_array_equal(run(*pick(order)), together[order])
    for row in range(8):
        np.testing.assert_array_equal(run(*pick([row])), together[[row]])
    np.testing.assert_array_equal(run(*pick([2, 2, 5, 5, 5])), together[[2, 2, 5, 5, 5]])


@pytest.mark.smoke
def test_full_without_any_wish_is_plain_bit_by_bit():
    logits, rows, positions = some_batch(R, 5)
    rows = rows.replace(
        top_k=np.int32([0, V, V + 1, -1]),
        top_p=np.ones(R, np.float32),
        min_p=np.zeros(R, np.float32),
        repetition_penalty=np.ones(R, np.float32),
    )
    want = plain(logits, rows, positions).tokens
    np.testing.assert_array_equal(
        full(logits, rows, positions, neutral_state(), NO_BANS).tokens, want
    )
    x = truncate(logits, rows.top_k, rows.top_p, rows.min_p)
    np.testing.assert_array_equal(x, logits)


def test_one_token_left_is_the_greedy_token():
    logits, rows, positions = some_batch(R, 6)
    rows = rows.replace(temperature=np.full(R, 1.5, np.float32))
    want = np.argmax(logits, -1)
    zeros, ones = np.zeros(R, np.float32), np.ones(R, np.float32)
    alone = dict(top_k=np.zeros(R, np.int32), top_p=ones, min_p=zeros, repetition_penalty=ones)
    for change in ({"top_k": np.ones(R, np.int32)}, {"top_p": 1e-7 * ones}, {"min_p": ones}):
        one = rows.replace(**{**alone, **change})
        np.testing.assert_array_equal(
            full(logits, one, positions, neutral_state(), NO_BANS).tokens, want
        )
    frozen = rows.replace(temperature=zeros, top_p=0.1 * ones)
    np.testing.assert_array_equal(plain(logits, frozen, positions).tokens, want)
    np.testing.assert_array_equal(
        sample(jnp.asarray(logits), rows, jnp.asarray(positions), variant="greedy").tokens, want
    )


def test_seed_sample_and_position_each_change_the_noise():
    base = dict(seed=[7] * R, sample=[0] * R)
    positions = np.full(R, 5, np.int32)
    noise = noise_of(sampling_rows(R, **base), positions)
    assert (noise == noise[:1]).all()
    for rows, at in (
        (sampling_rows(R, **{**base, "seed": [7, 8, 7 + 2**32, 7 - 2**64]}), positions),
        (sampling_rows(R, **{**base, "sample": [0, 1, 2, 0]}), positions),
        (sampling_rows(R, **base), np.int32([5, 6, 7, 5])),
    ):
        got = np.asarray(noise_of(rows, at))
        np.testing.assert_array_equal(got[0], noise[0])
        np.testing.assert_array_equal(got[3], noise[0])  # equal modulo 2^64
        assert (got[1] != noise[0]).all() and (got[2] != noise[0]).all()
        assert (got[1] != got[2]).all()


def test_no_parameter_recompiles():
    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(logits, rows, positions, state, banned):
        return sample(logits, rows, positions, state, banned=banned).tokens

    for entropy in range(4):
        logits, rows, positions = some_batch(R, entropy)
        state = neutral_state().replace(bias=np.full((R, V), entropy, np.float32))
        step(logits, rows, positions, state, np.full((R, 2), entropy - 1, np.int32))


@pytest.mark.parametrize("fields", [(), ("allowed",), ("counts",), ("prompt",), ("bias", "stop")])
def test_a_state_that_is_none_is_the_neutral_one(fields):
    logits, rows, positions = some_batch(R, 8)
    neutral = neutral_state()
    part = SamplingState(**{name: getattr(neutral, name) for name in fields})
    x = adjust_logits(jnp.asarray(logits), rows, jnp.asarray(positions), part)
    np.testing.assert_array_equal(x, logits)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_logits_are_taken_to_float32_first(dtype):
    logits, rows, positions = some_batch(R, 9)
    low = jnp.asarray(logits, dtype)
    got = sample(low, rows, jnp.asarray(positions), num_logprobs=2)
    want = sample(low.astype(jnp.float32), rows, jnp.asarray(positions), num_logprobs=2)
    chex.assert_trees_all_equal(got, want)


# --- distributions --------------------------------------------------------------------------------


def frequencies(logits, n, **parameters):
    """How often each token is drawn at n positions of one request."""
    rows = sampling_rows(n, seed=11, **parameters)
    tokens = sample(
        jnp.broadcast_to(jnp.asarray(logits), (n, len(logits))), rows, jnp.arange(n)
    ).tokens
    return np.bincount(np.asarray(tokens), minlength=len(logits))


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 1.6, "top_k": 4},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 2.0, "min_p": 0.3, "top_k": 5, "top_p": 0.9},
    ],
    ids=str,
)
def test_draws_follow_the_distribution(parameters):
    logits = np.float32([1.0, 0.2, -0.5, 2.0, 0.9, -1.5, 0.0, -3.0])
    x = logits.astype(np.float64) / parameters["temperature"]
    prob = np.exp(x - x.max())
    keep = prob >= parameters.get("min_p", 0)
    keep &= np.argsort(np.argsort(-x)) < parameters.get("top_k", 8)
    prob = np.where(keep, prob, 0) / prob[keep].sum()
    before = np.array([prob[x > value].sum() for value in x])
    prob = np.where(before < parameters.get("top_p", 1), prob, 0)
    prob /= prob.sum()
    n = 20_000
    seen = frequencies(logits, n, **parameters)
    assert (seen[prob == 0] == 0).all()
    statistic = scipy.stats.chisquare(seen[prob > 0], n * prob[prob > 0])
    assert statistic.pvalue > 1e-3, (seen / n, prob)


def test_gumbel_noise_is_gumbel_distributed_and_reaches_far():
    noise = np.asarray(gumbel(jax.random.split(jax.random.key(0), 4), 250_000)).ravel()
    assert np.isfinite(noise).all()
    assert scipy.stats.kstest(noise, scipy.stats.gumbel_r.cdf).pvalue > 1e-3
    # The tail decides between 10^5 tokens: 10^6 draws exceed ln(10^6) about once.
    for threshold in (9.0, 11.0):
        expected = noise.size * -np.expm1(-np.exp(-threshold))
        assert abs((noise > threshold).sum() - expected) < 4 * expected**0.5


def test_the_rarest_words_of_the_generator_give_finite_noise(monkeypatch):
    words = jnp.array([0, 1, 2**31, 2**32 - 1], jnp.uint32)
    monkeypatch.setattr(jax.random, "bits", lambda key, shape, dtype: words)
    noise = np.asarray(gumbel(jax.random.split(jax.random.key(0), 1), 4))[0]
    assert np.isfinite(noise).all() and (np.diff(noise) < 0).all()
    assert noise[0] == pytest.approx(math.log(2**33), rel=1e-6)


# --- logprobs -------------------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_logits():
    logits, rows, positions = some_batch(R, 12)
    state = neutral_state().replace(bias=np.tile(np.float32([5.0, -5.0] + [0] * (V - 2)), (R, 1)))
    out = full(logits, rows, positions, state, NO_BANS)
    wide = logits.astype(np.float64)
    expected = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    order = np.argsort(-expected, axis=1, kind="stable")
    at = np.arange(R)
    tokens = np.asarray(out.tokens)
    np.testing.assert_allclose(out.logprobs.logprob, expected[at, tokens], atol=1e-5)
    np.testing.assert_array_equal(
        out.logprobs.rank, 1 + (expected > expected[at, tokens][:, None]).sum(1)
    )
    np.testing.assert_array_equal(out.logprobs.top_tokens, order[:, :3])
    np.testing.assert_allclose(
        out.logprobs.top_logprobs, np.take_along_axis(expected, order[:, :3], 1), atol=1e-5
    )


@pytest.mark.parametrize("platform", ["cpu", "default"])
@pytest.mark.parametrize("n", [0, 17, 40])
def test_top_logprobs_of_any_number_come_in_order(n, platform, monkeypatch):
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda x, **by: by[platform](x))
    logits = np.random.default_rng(n).standard_normal((2, 64)).astype(np.float32)
    out = token_logprobs(jnp.asarray(logits), jnp.array([3, 60]), n)
    np.testing.assert_array_equal(out.top_tokens, np.argsort(-logits, 1, kind="stable")[:, :n])
    assert out.top_logprobs.shape == (2, n)


# --- state ----------------------------------------------------------------------------------------


def test_a_row_without_any_token_left_gives_minus_one_and_the_others_go_on():
    logits, rows, positions = some_batch(R, 13)
    state = neutral_state()
    state = state.replace(allowed=state.allowed * np.uint32([[1], [0], [1], [1]]))
    logits[2, 4] = np.nan
    tokens = np.asarray(full(logits, rows, positions, state, NO_BANS).tokens)
    assert tokens[1] == -1 and tokens[2] == -1 and (tokens[[0, 3]] >= 0).all()
    assert plain(logits, rows, positions).tokens[2] == -1


def test_counting_tokens_one_by_one_is_the_state_of_all_of_them():
    outputs = [[3, 3, 9], [], [36], [0, 1, 0, 0]]
    state = sampling_state(R, V)
    counted = jax.jit(count_tokens, donate_argnums=0)
    for i in range(4):
        tokens = np.int32([row[i] if i < len(row) else -1 for row in outputs])
        # Rows in another order: row r of the batch need not be row r of the state.
        order = np.random.default_rng(i).permutation(R).astype(np.int32)
        state = counted(state, order, tokens[order])
    want = stack(state_row(V, output=row) for row in outputs)
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, state), want)


def test_updates_alias_their_buffers_under_donation():
    state = sampling_state(R, V)
    before = state.counts.unsafe_buffer_pointer()
    state = jax.jit(count_tokens, donate_argnums=0)(state, np.arange(R), np.arange(R))
    assert state.counts.unsafe_buffer_pointer() == before
    state = jax.jit(set_state_row, donate_argnums=0)(state, 2, state_row(V, output=[5]))
    assert state.counts.unsafe_buffer_pointer() == before
    assert np.asarray(state.counts[2]).nonzero()[0].tolist() == [5]


@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
@hypothesis.given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_bits_survive_packing(mask):
    mask = np.array(mask)
    words = pack_bits(mask)
    assert words.dtype == np.uint32 and words.shape == (-(-len(mask) // 32),)
    assert [bool(words[i // 32] >> (i % 32) & 1) for i in range(len(mask))] == mask.tolist()
    if len(mask) % 32 in (0, 5):  # a few sizes only: each compiles
        np.testing.assert_array_equal(unpack_bits(jnp.asarray(words), len(mask)), mask)


def test_rows_survive_packing():
    _, rows, _ = some_batch(R, 14)
    rows = rows.replace(stop_from=np.int32([0, 5, 2**31 - 1, 7]))
    packed = pack_rows(rows)
    assert packed.dtype == np.int32
    chex.assert_trees_all_equal(jax.tree.map(np.asarray, unpack_rows(packed)), rows)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variant": "fast"}, "variant='fast'"),
        ({"positions": jnp.zeros(3, jnp.int32)}, r"positions.shape=\(3,\)"),
        ({"rows": sampling_rows(3)}, r"rows.temperature.shape=\(3,\)"),
        ({"logits": jnp.zeros((2, 5), jnp.int32)}, "int32"),
        ({"logits": jnp.zeros(5)}, r"\[5\]"),
        ({"variant": "plain", "state": SamplingState()}, "neither state nor banned"),
        ({"variant": "greedy", "banned": jnp.zeros((2, 1), jnp.int32)}, "neither state"),
        ({"num_logprobs": 6}, "num_logprobs=6"),
        ({"num_logprobs": -1}, "num_logprobs=-1"),
        (
            {"state": SamplingState(counts=jnp.zeros((2, 4), jnp.int32))},
            r"state.counts is \(2, 4\)",
        ),
        ({"state": SamplingState(allowed=jnp.zeros((2, 5), jnp.uint32))}, "state.allowed"),
    ],
    ids=lambda x: x if isinstance(x, str) else ",".join(x),
)
def test_arguments_that_do_not_fit_are_refused(change, message):
    arguments = {
        "logits": jnp.zeros((2, 5)),
        "rows": sampling_rows(2),
        "positions": jnp.zeros(2, jnp.int32),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        sample(**arguments)


@pytest.mark.parametrize("name", ["prompt", "output", "allowed", "banned", "stop", "bias"])
@pytest.mark.parametrize("token", [-1, V])
def test_token_ids_outside_the_vocabulary_are_refused(name, token):
    value = {token: 1.0} if name == "bias" else [1, token]
    with pytest.raises(ValueError, match=f"{name} has token ids \\[{token}\\]"):
        state_row(V, **{name: value})


def test_a_wrong_number_of_seeds_is_refused():
    with pytest.raises(ValueError, match="2 seeds for num_rows=3"):
        sampling_rows(3, seed=[1, 2])


def test_of_equal_logits_the_first_is_taken_and_none_where_none_is_finite():
    x = np.zeros((5, 9), np.float32)
    x[0, [3, 7]], x[1], x[2, 4], x[3, 8], x[4, 2] = 2.0, -np.inf, np.nan, np.inf, -1.0
    rows = sampling_rows(5, temperature=0.0)
    drawn = sample(jnp.asarray(x), rows, jnp.zeros(5, jnp.int32), variant="greedy").tokens
    assert drawn.tolist() == [3, -1, -1, -1, 0]
