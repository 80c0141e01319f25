"""Sparse kernels against plain sums: blocks in the interpreter, everything on a GPU."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.sparse import (
    MatmulConfig,
    RowConfig,
    SampleConfig,
    VectorConfig,
    block_matmul,
    block_sample,
    entry_matmul,
    reference,
    row_matmul,
    row_sample,
    rows,
    two_four_matmul,
    vector,
    vector_matmul,
    vector_scatter,
)
from pallas_kernels.sparse.block_matmul import BlockMatmul, rows_by_size
from pallas_kernels.sparse.rows import Rows, continued
from pallas_kernels.sparse.vector import Vector

from .warp_emulator import run

ROWS, COLUMNS = 3, 4  # blocks of a matrix
PADDING = 2


def blocks(bh, bw, n, turned=False, dtype=jnp.bfloat16, seed=0):
    """(data, x, minor, indptr, order, row): shuffled blocks, an empty row, padding of garbage."""
    rng = np.random.default_rng(seed)
    mask = rng.random((ROWS, COLUMNS)) < 0.6
    mask[1] = False
    row, minor = np.nonzero(mask)
    nse = len(row) + PADDING
    order = np.concatenate([rng.permutation(len(row)), np.arange(len(row), nse)])
    block = (bw, bh) if turned else (bh, bw)
    data = rng.standard_normal((nse, *block))
    data[len(row) :] = np.nan
    i32 = lambda x: jnp.asarray(x, jnp.int32)
    return (
        jnp.asarray(data, dtype),
        jnp.asarray(rng.standard_normal((COLUMNS * bw, n)), dtype),
        i32(np.pad(minor, (0, PADDING), constant_values=COLUMNS)),
        i32(np.concatenate([[0], np.cumsum(mask.sum(1))])),
        i32(order),
        i32(np.pad(row, (0, PADDING), constant_values=ROWS)),
    )


def close(got, want, tolerance=1e-2):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    np.testing.assert_allclose(got, want, rtol=tolerance, atol=tolerance * np.abs(want).max())


def check_matmul(case, turned, capfd=None, **options):
    data, x, minor, indptr, order, _ = case
    got = block_matmul(data, x, minor, indptr, order=order, turned=turned, **options)
    close(got, reference.block_matmul(data, x, minor, indptr, order=order, turned=turned))
    if capfd is not None:
        assert "RACE" not in capfd.readouterr().out


def check_sample(case, block, capfd=None, **options):
    _, x, minor, _, _, row = case
    g = jax.random.normal(jax.random.key(1), (ROWS * block[0], x.shape[1]), x.dtype)
    got = block_sample(g, x, row, minor, block=block, **options)
    close(got, reference.block_sample(g, x, row, minor, block=block))
    assert not np.asarray(got[-PADDING:], np.float32).any()
    if capfd is not None:
        assert "RACE" not in capfd.readouterr().out


def two_ctas(height, n, **options):
    """So that a CTA walks several tiles, forwards and backwards."""
    return dataclasses.replace(MatmulConfig.of(height, n), num_sms=2, **options)


@pytest.mark.parametrize(
    ("block", "n", "turned"),
    [
        pytest.param((128, 128), 72, False, marks=pytest.mark.smoke),
        ((128, 64), 300, True),
        ((64, 64), 136, False),
        ((32, 32), 5, True),
    ],
)
def test_blocks_times_dense(block, n, turned, capfd):
    """Ragged ends of the columns, empty rows, shuffled and transposed blocks, padding of NaN."""
    case = blocks(*block, n, turned)
    check_matmul(case, turned, capfd, config=two_ctas(block[0], n), interpret=True)


@pytest.mark.smoke
@pytest.mark.parametrize(("block", "n"), [((128, 64), 136), ((32, 32), 5)])
def test_dense_products_at_blocks(block, n, capfd):
    config = SampleConfig(num_ctas=2)
    check_sample(blocks(*block, n), block, capfd, config=config, interpret=True)


@pytest.mark.parametrize(
    ("grid", "columns", "bound"),
    [(64, 8192, 1.1), (64, 4096, 1.1), (256, 4096, 1.1), (100, 8192, 1.25), (7, 1000, 99)],
)
def test_every_tile_is_dealt_once_and_evenly(grid, columns, bound):
    """Rows of a random matrix, a tenth of 64 blocks a row, on 132 SMs."""
    dims = ((128, 128), False, grid, 8192, columns, jnp.bfloat16, MatmulConfig(), False)
    call = BlockMatmul(*dims)
    width, each, ctas = call.deal
    groups = call.tiles_n // width
    assert groups * width == call.tiles_n and ctas <= 132
    group, turn, cta = jnp.meshgrid(*map(jnp.arange, (groups, each, ctas)), indexing="ij")
    rank, tile = (np.asarray(v) for v in jax.jit(call.place)(group, turn, cta))
    there = rank >= 0
    seen = np.stack([np.asarray(group)[there], rank[there], tile[there]], 1)
    assert len(seen) == len(np.unique(seen, axis=0)) == grid * call.tiles_n
    assert rank.max() == grid - 1 and tile.max() == width - 1
    sizes = np.sort(np.random.default_rng(0).binomial(64, 0.1, grid))[::-1]
    work = np.where(there, sizes[np.maximum(rank, 0)], 0).sum((0, 1))
    assert work.max() <= bound * work.sum() / 132


def test_rows_come_longest_first():
    assert rows_by_size(jnp.array([0, 2, 2, 7]))[:, 0].tolist() == [2, 0, 1]


@pytest.mark.parametrize("chunk", [2, 3, 5])
def test_what_chunks_leave_to_the_second_pass(chunk):
    """Sums of whole rows from those of chunks: the row a chunk goes on with, and only that."""
    rng = np.random.default_rng(chunk)
    row = np.sort(rng.integers(0, 6, 13))
    row = np.concatenate([row, [6, 6]])  # padding
    values = rng.standard_normal(15)
    out, partial = np.zeros(6), np.full(-(-15 // chunk), np.nan)  # a kernel writes what it must
    for c in range(len(partial)):
        part = slice(c * chunk, (c + 1) * chunk)
        for r in np.unique(row[part]):
            total = values[part][row[part] == r].sum()
            if c and row[c * chunk - 1] == r == row[c * chunk]:
                partial[c] = total
            elif r < 6:
                out[r] = total
    to = np.asarray(continued(jnp.asarray(row), 6, chunk))
    np.add.at(out, to[to < 6], partial[to < 6])
    want = np.bincount(row, values, 7)[:6]
    np.testing.assert_allclose(out, want, atol=1e-12)


def test_kernels_refuse():
    data, x, minor, indptr, *_ = blocks(64, 64, 8)
    with pytest.raises(NotImplementedError, match="float32"):
        block_matmul(data.astype(jnp.float32), x.astype(jnp.float32), minor, indptr)
    with pytest.raises(ValueError, match="dtypes differ"):
        block_matmul(data, x.astype(jnp.float32), minor, indptr)
    with pytest.raises(NotImplementedError, match="sides"):
        block_matmul(data[:, :16, :16], x, minor, indptr)
    with pytest.raises(ValueError, match="do not fit"):
        block_matmul(data, x[:-1], minor, indptr)
    with pytest.raises(NotImplementedError, match="empty"):
        block_matmul(data, x[:, :0], minor, indptr)
    with pytest.raises(NotImplementedError, match="shared memory"):
        block_matmul(data, x, minor, indptr, config=MatmulConfig(256, 9))
    with pytest.raises(ValueError, match="does not divide"):
        block_sample(x[:-1], x, minor, minor, block=(64, 64))
    with pytest.raises(NotImplementedError, match="shared memory"):
        block_sample(x, x, minor, minor, block=(64, 64), config=SampleConfig(20))
    i, f = jnp.zeros(3, jnp.int32), jnp.zeros(3)
    with pytest.raises(NotImplementedError, match="int32"):
        row_sample(jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 2), jnp.int32), i, i)
    with pytest.raises(ValueError, match="equal vectors"):
        entry_matmul(f, jnp.zeros((2, 2)), i, i[:2], rows=2)
    with pytest.raises(ValueError, match="differ in their columns"):
        row_sample(jnp.zeros((2, 2)), jnp.zeros((2, 3)), i, i)
    with pytest.raises(ValueError, match="chunk"):
        RowConfig(0)
    with pytest.raises(ValueError, match="no vector"):
        vector_matmul(f, jnp.zeros((2, 1)), i, i, i)
    with pytest.raises(ValueError, match="long"):
        VectorConfig(long=0)


# --- the warps' kernels in numpy ------------------------------------------------------------------

PATTERNS = {  # lengths of rows
    "even": lambda rng: np.full(60, 9),
    "uneven": lambda rng: np.where(rng.random(80) < 0.4, 0, rng.geometric(0.1, 80)),
    "long": lambda rng: np.array([1, 0, 700, 1, 2, 33, 32, 31, 0, 0, 400]),
    "one": lambda rng: np.array([901]),
    "empty ends": lambda rng: np.r_[np.zeros(40, int), rng.poisson(3, 99), np.zeros(70, int)],
    "mostly empty": lambda rng: np.bincount(rng.integers(0, 9000, 600), minlength=9000),
}


def entries_of(pattern, columns=50, padding=7, seed=0):
    """(row, column, indptr), padding at the end."""
    rng = np.random.default_rng(seed)
    lengths = PATTERNS[pattern](rng)
    M, count = len(lengths), lengths.sum()
    row = np.repeat(np.arange(M), lengths)
    i32 = lambda v: v.astype(np.int32)
    row, column = np.pad(row, (0, padding), constant_values=M), rng.integers(0, columns, count)
    column = np.pad(column, (0, padding), constant_values=columns)
    return i32(row), i32(column), i32(np.concatenate([[0], np.cumsum(lengths)]))


def numbers(row, column, M, N, n, seed=1):
    """(data, x, the product in f64); padding holds garbage."""
    rng = np.random.default_rng(seed)
    data = rng.standard_normal(row.shape).astype(np.float32)
    x = rng.standard_normal((N, n)).astype(np.float32)
    want, used = np.zeros((M, n)), row < M
    np.add.at(want, row[used], data[used, None].astype(np.float64) * x[column[used]])
    return np.where(used, data, np.nan).astype(np.float32), x, want


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("chunk", "long"), [(128, 32), (512, 3)])
def test_a_vector_by_warps(pattern, chunk, long, monkeypatch):
    """Each result once: cut rows by additions, long ones together, none but from its entries."""
    row, column, indptr = entries_of(pattern)
    M, N = len(indptr) - 1, 50
    data, x, want = numbers(row, column, M, N, 1)
    call = Vector((M, N), len(row), "float32", VectorConfig(chunk, long))
    out, shared = np.zeros(M, np.float32), np.full(rows.WARPS * chunk, np.nan, np.float32)
    refs = (data, x[:, 0].copy(), row, column, indptr, out, shared)
    run(call.multiply, (vector,), refs, call.ctas, rows.WARPS, monkeypatch)
    np.testing.assert_allclose(out, want[:, 0], atol=1e-4)
    order = np.random.default_rng(3).permutation(len(row))
    out = np.zeros(M, np.float32)
    refs = (data[order], x[:, 0].copy(), row[order], column[order], out)
    run(call.scatter, (vector,), refs, call.ctas, rows.WARPS, monkeypatch)
    np.testing.assert_allclose(out, want[:, 0], atol=1e-4)


def test_a_warp_that_does_not_meet_is_a_race(monkeypatch):
    """The emulator sees it, and a read past the end of an array."""
    row, column, indptr = entries_of("even")
    M, N = len(indptr) - 1, 50
    data, x, _ = numbers(row, column, M, N, 1)
    call = Vector((M, N), len(row), "float32", VectorConfig(128))
    refs = [data, x[:, 0].copy(), row, column, indptr, np.zeros(M, np.float32)]
    refs.append(np.zeros(rows.WARPS * 128, np.float32))
    with monkeypatch.context() as m, pytest.raises(AssertionError, match="race"):
        m.setattr("tests.pallas_kernels.warp_emulator.Warp.meet", lambda self: None)
        run(call.multiply, (vector,), refs, call.ctas, rows.WARPS, m)
    refs[1] = refs[1][:-1]
    with pytest.raises(AssertionError, match="of 49"):
        run(call.multiply, (vector,), refs, call.ctas, rows.WARPS, monkeypatch)


@pytest.mark.parametrize("pattern", ["uneven", "long", "empty ends"])
@pytest.mark.parametrize("n", [1, 40, 200])
@pytest.mark.parametrize("zeroed", [False, True])
def test_rows_by_warps(pattern, n, zeroed, monkeypatch):
    row, column, indptr = entries_of(pattern)
    M, N = len(indptr) - 1, 50
    data, x, want = numbers(row, column, M, N, n)
    config = dataclasses.replace(RowConfig.of(len(row), n), zeroed=zeroed)
    call = Rows((M, N), len(row), n, "float32", config)
    out = np.full((M, n), 0 if zeroed else np.nan, np.float32)
    partial = np.full((call.chunks, n), np.nan, np.float32)
    refs = (data, x, row, column, *((out,) if zeroed else (indptr, out, partial)))
    run(call.multiply, (rows,), refs, call.ctas * call.tiles, rows.WARPS, monkeypatch)
    if not zeroed:
        to = np.asarray(continued(jnp.asarray(row), M, config.chunk))
        np.add.at(out, to[to < M], partial[to < M])
    np.testing.assert_allclose(out, want, atol=1e-4)


@pytest.mark.parametrize("n", [1, 40, 200])
def test_scattered_and_sampled_entries_by_warps(n, monkeypatch):
    row, column, indptr = entries_of("uneven")
    M, N = len(indptr) - 1, 50
    data, x, want = numbers(row, column, M, N, n)
    order = np.argsort(column, kind="stable")
    call = Rows((M, N), len(row), n, "float32", RowConfig.of(len(row), n))
    out = np.zeros((M, n), np.float32)
    refs = (data[order], x, row[order], column[order], out)
    run(call.scatter, (rows,), refs, call.ctas * call.tiles, rows.WARPS, monkeypatch)
    np.testing.assert_allclose(out, want, atol=1e-4)
    g = np.random.default_rng(2).standard_normal((M, n)).astype(np.float32)
    sampled = np.full(len(row), np.nan, np.float32)
    run(call.sample, (rows,), (g, x, row, column, sampled), call.ctas, rows.WARPS, monkeypatch)
    wanted = np.pad(np.einsum("en,en->e", g[row[:-7]], x[column[:-7]]), (0, 7))
    np.testing.assert_allclose(sampled, wanted, atol=1e-4)


@pytest.mark.smoke
@pytest.mark.parametrize("n", [1, 7, 32, 100, 256])
def test_row_kernels_lower(n):
    """On any machine; that they are right, a GPU says."""
    s, i = jax.ShapeDtypeStruct, jax.ShapeDtypeStruct((500,), jnp.int32)
    for dtype in (jnp.float32, jnp.bfloat16):
        data, x, g = s((500,), dtype), s((40, n), dtype), s((30, n), dtype)
        for f, args in (
            (row_matmul, (data, x, i, i, s((31,), jnp.int32))),
            (functools.partial(entry_matmul, rows=30), (data, x, i, i)),
            (row_sample, (g, x, i, i)),
            (vector_matmul, (data, s((40,), dtype), i, i, s((31,), jnp.int32))),
            (functools.partial(vector_scatter, rows=30), (data, s((40,), dtype), i, i)),
        ):
            lowered = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",))
            assert "mosaic_gpu" in lowered.as_text()


def two_four(T, D, F, dtype=jnp.bfloat16):
    """x, values, places, and x @ w in f64."""
    rng = np.random.default_rng(0)
    at = np.sort(rng.permuted(np.tile(np.arange(4), (D // 4, F, 1)), axis=-1)[..., :2], axis=-1)
    at = np.moveaxis(at, -1, 1)  # [D / 4, 2, F]
    nibble = at[:, 0] | at[:, 1] << 2
    places = jnp.asarray(nibble[0::2] | nibble[1::2] << 4, jnp.uint8)
    x = jnp.asarray(rng.standard_normal((T, D)), dtype)
    values = jnp.asarray(rng.standard_normal((D // 4, 2, F)), dtype)
    dense = np.zeros((D // 4, 4, F))
    np.put_along_axis(dense, at, np.asarray(values, np.float64), 1)
    return x, values, places, np.asarray(x, np.float64) @ dense.reshape(D, F)


@pytest.mark.smoke
def test_two_of_four_is_spread_out_in_shared_memory(capfd):
    x, values, places, want = two_four(70, 1024, 64)
    close(two_four_matmul(x, values, places, interpret=True), want)
    assert "RACE" not in capfd.readouterr().out
    with pytest.raises(NotImplementedError, match="512"):
        two_four_matmul(x[:, :256], values[:64], places[:32])
    with pytest.raises(ValueError, match="do not fit"):
        two_four_matmul(x, values[1:], places)


# --- on a GPU (Hopper) ----------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("block", [(128, 128), (64, 64), (32, 32), (128, 32), (64, 128)])
def test_blocks_on_a_gpu(block, turned):
    for n in (5, 72, 520):
        check_matmul(blocks(*block, n, turned), turned)
        check_sample(blocks(*block, n), block)


@pytest.mark.gpu
def test_two_of_four_on_a_gpu():
    for shape in ((1, 512, 64), (300, 2048, 192)):
        x, values, places, want = two_four(*shape)
        close(two_four_matmul(x, values, places), want)


def long_rows(M, N, seed=0):
    """(row, column, indptr): rows of every length, one of thousands, many empty; padding."""
    rng = np.random.default_rng(seed)
    lengths = np.where(rng.random(M) < 0.5, 0, rng.geometric(0.1, M))
    lengths[7] = 5000
    row = np.repeat(np.arange(M), lengths)
    column = rng.integers(0, N, row.size)
    i32 = lambda x: jnp.asarray(x, jnp.int32)
    pad = lambda x, fill: i32(np.pad(x, (0, 99), constant_values=fill))
    return pad(row, M), pad(column, N), i32(np.concatenate([[0], np.cumsum(lengths)]))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1, 7, 32, 100, 256])
@pytest.mark.parametrize("chunk", [32, 128])
def test_rows_on_a_gpu(n, dtype, chunk):
    M, N = 600, 500
    row, column, indptr = long_rows(M, N)
    keys = jax.random.split(jax.random.key(0), 3)
    data = jnp.where(row < M, jax.random.normal(keys[0], row.shape), 0).astype(dtype)
    x, g = (
        jax.random.normal(k, (s, n)).astype(dtype) for k, s in zip(keys[1:], (N, M), strict=True)
    )
    wide = lambda v: np.asarray(v, np.float64)
    used = np.asarray(row) < M
    r, c = np.asarray(row)[used], np.asarray(column)[used]
    want = np.zeros((M, n))
    np.add.at(want, r, wide(data)[used, None] * wide(x)[c])
    config = dataclasses.replace(RowConfig.of(row.shape[0], n), chunk=chunk)
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for zeroed in (False, True):
        config = dataclasses.replace(config, zeroed=zeroed)
        close(row_matmul(data, x, row, column, indptr, config=config), want, tolerance)
    if n == 1:
        config_ = VectorConfig(4 * chunk, long=chunk)
        got = vector_matmul(data, x[:, 0], row, column, indptr, config=config_)
        close(got, want[:, 0], tolerance)
        got = vector_scatter(data[::-1], x[:, 0], row[::-1], column[::-1], rows=M, config=config_)
        close(got, want[:, 0], tolerance)
    order = jnp.argsort(column)
    got = entry_matmul(data[order], x, row[order], column[order], rows=M, config=config)
    close(got, want, tolerance)
    sampled = np.where(used, 0.0, 0.0)
    sampled[used] = (wide(g)[r] * wide(x)[c]).sum(1)
    close(row_sample(g, x, row, column, config=config), sampled, tolerance)
