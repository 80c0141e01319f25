"""Masks as intervals: both directions agree with each other and with the definition."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.flash_attention import mask
from pallas_kernels.flash_attention.mask import (
    FAR,
    Band,
    dynamic_bounds,
    packed_segments,
    pad_rows,
    tile_ranges,
    visible,
)

sides = st.none() | st.integers(0, 12)
bands = st.builds(Band, sides, sides, st.integers(-9, 9))
sizes = st.integers(1, 17)


def seen_by_keys(bounds, queries):
    t = np.arange(queries)[None, :, None]
    lo, hi = np.asarray(bounds.query_lo), np.asarray(bounds.query_hi)
    return (t >= lo[:, None]) & (t < hi[:, None])


def by_definition(band, queries, keys, position=None):
    t = np.arange(queries) + band.offset if position is None else position
    t, s = t[:, None], np.arange(keys)[None]
    seen = np.ones((queries, keys), bool)
    if band.left is not None:
        seen &= s >= t - band.left
    if band.right is not None:
        seen &= s <= t + band.right
    return seen


@pytest.mark.smoke
@settings(deadline=None, max_examples=30)
@given(bands, sizes, sizes)
def test_band_is_its_definition_from_both_sides(band, queries, keys):
    want = by_definition(band, queries, keys)
    np.testing.assert_array_equal(np.asarray(visible(band, None, queries, keys))[0], want)
    lo, hi = band.query_bounds(jnp.arange(keys), queries)
    t = np.arange(queries)[:, None]
    np.testing.assert_array_equal((t >= np.asarray(lo)) & (t < np.asarray(hi)), want)


@settings(deadline=None, max_examples=20)
@given(bands, sizes, sizes, st.data())
def test_lengths_from_both_sides(band, queries, keys, data):
    q_len = data.draw(st.integers(0, queries))
    kv_len = data.draw(st.integers(0, keys))
    bounds = dynamic_bounds(
        band, queries, keys, q_lens=jnp.array([q_len]), kv_lens=jnp.array([kv_len])
    )
    want = by_definition(band, queries, keys)
    want[q_len:] = False
    want[:, kv_len:] = False
    np.testing.assert_array_equal(np.asarray(visible(band, bounds, queries, keys))[0], want)
    np.testing.assert_array_equal(seen_by_keys(bounds, queries)[0], want)


@settings(deadline=None, max_examples=20)
@given(
    sides, sides, st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4)
)
def test_packed_sequences_align_bottom_right(left, right, lengths):
    cu_q = np.cumsum([0, *(q for q, _ in lengths)])
    cu_kv = np.cumsum([0, *(k for _, k in lengths)])
    queries, keys = 22, 23  # one program; tokens of no sequence at the end, two and three or more
    position = np.zeros(queries, np.int32)
    want = np.zeros((queries, keys), bool)
    band = Band(left, right)
    for i, (q_len, kv_len) in enumerate(lengths):
        q, kv = slice(cu_q[i], cu_q[i + 1]), slice(cu_kv[i], cu_kv[i + 1])
        position[q] = np.arange(q_len) + cu_kv[i] + kv_len - q_len
        want[q, kv] = by_definition(band, queries, keys, position)[q, kv]
    ids = (
        packed_segments(jnp.asarray(cu_q), queries),
        packed_segments(jnp.asarray(cu_kv), keys, outside=-2),
    )
    bounds = dynamic_bounds(
        band, queries, keys, segments=ids, positions=jnp.asarray(position)[None]
    )
    np.testing.assert_array_equal(np.asarray(visible(band, bounds, queries, keys))[0], want)
    np.testing.assert_array_equal(seen_by_keys(bounds, queries)[0], want)


def test_tile_ranges_bound_what_rows_see():
    lo, hi = jnp.array([[0, 3, 5, 9, 2]]), jnp.array([[4, 6, 7, 9, 8]])
    rows = pad_rows(lo, hi, 4)
    assert rows.shape == (1, 2, 8)
    ranges = tile_ranges(rows, 4)[0].tolist()
    assert ranges[0] == [0, 7, FAR, 0]  # row 3 is empty: no block is seen by every row
    assert ranges[1][:2] == [2, 8]  # rows past the end are empty and pull nothing down


def test_causal_and_window_combine():
    assert Band.make(causal=True, window=(5, None), offset=2) == Band(5, 0, 2)
    assert Band.make(causal=True, window=(None, 3), offset=0).right == 0
    assert Band.make(causal=False, window=(None, None), offset=0).unbounded


def test_borders_are_the_segments_that_they_make():
    cu_q, cu_kv = jnp.array([0, 3, 3, 9, 12]), jnp.array([0, 5, 7, 8, 20])
    ids = mask.packed_segments(cu_q, 15), mask.packed_segments(cu_kv, 22, -2)
    found = [
        mask.dynamic_bounds(mask.Band(right=0, offset=2), 15, 22, **given)
        for given in ({"segments": ids}, {"borders": (cu_q[None], cu_kv[None])})
    ]
    seen = [mask.visible(mask.Band(), bounds, 15, 22) for bounds in found]
    assert seen[0].any() and (seen[0] == seen[1]).all()
    by_key = [
        (t >= b.query_lo[:, :, None]) & (t < b.query_hi[:, :, None])
        for b in found
        for t in [jnp.arange(15)[None, None]]
    ]
    assert (by_key[0] == by_key[1]).all()
    assert (by_key[0].swapaxes(1, 2) == seen[0]).all()


def test_lists_visit_what_is_needed_and_mask_what_is_not_full():
    rng = np.random.default_rng(0)
    kinds = jnp.asarray(rng.integers(0, 3, (1, 2, 5, 4)), jnp.int8)
    blocks = mask.BlockKinds(kinds, 40, 48, 190, 170)
    whole = np.repeat(np.repeat(np.asarray(kinds), 40, 2), 48, 3)[:, :, :190, :170]
    band = mask.Band(left=60, right=20)
    t, s = np.arange(190)[:, None], np.arange(170)[None]
    near = (s - t <= 20) & (t - s <= 60)
    for by_query in (True, False):
        order, counts = mask.block_lists(blocks, band, None, 64, 128, by_query=by_query)
        rows, columns = (64, 128) if by_query else (128, 64)
        some = (whole > 0) & near
        every = (whole == 2) & near
        if not by_query:
            some, every = some.swapaxes(2, 3), every.swapaxes(2, 3)
        for n, i in np.ndindex(2, order.shape[2]):
            partial, total = np.asarray(counts[0, n, i])
            visited = np.asarray(order[0, n, i, :total])
            for j in range(order.shape[3]):
                part = some[0, n, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                assert j in visited or not part.any()
            for j in visited[partial:]:
                part = every[0, n, i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
                assert part.all()
                if by_query:
                    assert (j + 1) * columns <= 170
