"""Blocks that go to host memory and come back elsewhere in the pool hold the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.cache import PagedKVCache, swap_in, swap_out, swap_piece
from aidx.cache import swap as swapping


def filled(dtype, blocks=12, seed=0):
    cache = PagedKVCache.create(
        num_layers=2, num_blocks=blocks, block_size=4, num_kv_heads=2, head_dim=8, dtype=dtype
    )
    rng = np.random.default_rng(seed)
    noise = lambda x: jnp.asarray(rng.integers(0, 256, (*x.shape, x.dtype.itemsize)), jnp.uint8)
    return jax.tree.map(lambda x: bits_as(noise(x), x.dtype), cache)


def bits_as(raw, dtype):
    """Any bits, NaN among them; the axis of bytes goes where a value has several."""
    raw = raw[..., 0] if jnp.dtype(dtype).itemsize == 1 else raw
    return jax.lax.bitcast_convert_type(raw, dtype)


def raw(x):
    return np.asarray(x).view(np.uint8)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "float8_e4m3fn"])
def test_blocks_come_back_bit_for_bit_and_others_stay(dtype):
    cache = filled(dtype)
    before = [raw(x) for x in jax.tree.leaves(cache)]
    swapped = swap_out(cache, [7, 2, 9])
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves(swapped.pieces)}
    assert kinds == {"pinned_host"}
    after = jax.tree.leaves(swap_in(cache, swapped, [2, 11, 5]))
    for old, new in zip(before, map(raw, after), strict=True):
        expected = old.copy()
        expected[[2, 11, 5]] = old[[7, 2, 9]]
        np.testing.assert_array_equal(new, expected)
    assert {x.sharding.memory_kind for x in after} == {"device"}


def test_what_was_taken_survives_the_pool():
    """The pool's blocks are overwritten, another pool of another size takes them."""
    cache = filled("bfloat16")
    wanted = raw(cache.k[1][4])
    swapped = swap_out(cache, [4])
    del cache
    other = swap_in(filled("bfloat16", blocks=5, seed=1), swapped, [3])
    np.testing.assert_array_equal(raw(other.k[1][3]), wanted)


def test_the_pool_is_updated_in_place():
    cache = filled("bfloat16")
    swapped = swap_out(cache, [1, 2])
    pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)]
    cache = swap_in(cache, swapped, [3, 4])
    assert [x.unsafe_buffer_pointer() for x in jax.tree.leaves(cache)] == pointers


def test_long_sequences_go_in_pieces(monkeypatch):
    """Three pieces, the last padded; some blocks are left out, and so one whole piece."""
    cache = filled("int8")
    block_bytes = cache.memory_bytes // cache.num_blocks
    monkeypatch.setattr(swapping, "PIECE_BYTES", 5 * block_bytes)
    assert swap_piece(cache) == 4
    taken, there = [1, 3, 5, 7, 9, 11, 2, 4, 6, 8, 10], [-1, 2, 1, -1, -1, -1, -1, -1, 11, 6, 7]
    before = [raw(x) for x in jax.tree.leaves(cache)]
    swapped = swap_out(cache, taken)
    assert [piece[0].shape[1] for piece in swapped.pieces] == [4, 4, 4]
    assert swapped.memory_bytes == 12 * block_bytes
    after = jax.tree.leaves(swap_in(cache, swapped, there))
    for old, new in zip(before, map(raw, after), strict=True):
        expected = old.copy()
        for a, b in zip(taken, there, strict=True):
            if b >= 0:
                expected[b] = old[a]
        np.testing.assert_array_equal(new, expected)


@pytest.mark.parametrize("blocks", [[], [12], [-1], [3, 3]])
def test_impossible_blocks_are_refused(blocks):
    with pytest.raises(ValueError, match="block"):
        swap_out(filled("int8"), blocks)


@pytest.mark.parametrize("blocks", [[1, 12], [-2, 1], [3, 3], [1]])
def test_impossible_places_are_refused(blocks):
    cache = filled("int8")
    with pytest.raises(ValueError, match="block"):
        swap_in(cache, swap_out(cache, [1, 2]), blocks)


def test_another_number_of_blocks_is_refused():
    cache = filled("int8")
    with pytest.raises(ValueError, match="2 blocks were taken"):
        swap_in(cache, swap_out(cache, [1, 2]), [3])


@pytest.mark.gpu
def test_a_thousand_blocks_through_real_pinned_memory():
    """Needs a GPU and 2 GB."""
    cache = PagedKVCache.create(
        num_layers=2, num_blocks=2048, block_size=64, num_kv_heads=8, head_dim=128
    )
    cache = jax.tree.map(lambda x: jax.random.normal(jax.random.key(0), x.shape, x.dtype), cache)
    blocks = np.random.default_rng(0).permutation(2048)[:1000]
    before = np.asarray(cache.k[1][blocks[:5]]).view(np.uint8)
    swapped = swap_out(cache, blocks)
    cache = swap_in(cache, swapped, blocks[::-1])
    after = np.asarray(cache.k[1][blocks[::-1][:5]]).view(np.uint8)
    np.testing.assert_array_equal(after, before)
