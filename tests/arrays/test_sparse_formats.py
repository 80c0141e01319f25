"""Formats: what is stored, conversions, checks, construction, selection."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import sparse as jax_sparse

from aidx.arrays import BSC, BSR, COO, CSC, CSR, deserialize, serialize, sparse
from tests.arrays.patterns import FORMATS, NSE, M, N, build, close, dense_of, entries, few, ids

every_format = pytest.mark.parametrize("cls", FORMATS, ids=ids)
X = jnp.array([[0.0, 1, 0, 2, 0, 0], [0] * 6, [3, 0, 0, 0, 0, 4], [0, 0, 5, 0, 0, 0]])


# --- laws of conversion --------------------------------------------------------------------------


@every_format
@few
@given(parts=entries())
def test_every_conversion_is_the_same_matrix(cls, parts):
    a, x = build(cls, parts), dense_of(parts)
    close(a.to_dense(), x)
    close(a.T.to_dense(), x.T)
    for other in (a.to_coo(), a.to_csr(), a.to_csc(), sparse.sort(a)):
        sparse.checked(other)
        close(other.to_dense(), x)


@every_format
@few
@given(parts=entries())
def test_coalesce_stores_every_coordinate_once(cls, parts):
    a = build(cls, parts).coalesce(nse=NSE)
    row, col = (np.broadcast_to(i, a.data.shape).ravel() for i in a.coordinates())
    used = row < M
    assert len({*zip(row[used], col[used], strict=True)}) == used.sum()
    close(a.to_dense(), dense_of(parts))
    sparse.checked(a)


@pytest.mark.parametrize("cls", [COO, CSR, CSC], ids=ids)
@few
@given(parts=entries(distinct=True))
def test_dense_and_back(cls, parts):
    x = jnp.asarray(dense_of(parts), jnp.float32)
    a = cls.from_dense(x, nse=NSE)
    close(a.to_dense(), x)
    assert int(a.nnz) == np.count_nonzero(x)
    sparse.checked(a)


@every_format
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64, jnp.int32, jnp.bool_], ids=str)
def test_any_dtype(cls, dtype):
    x = X.astype(dtype)
    options = {"block_size": (2, 2)} if cls in (BSR, BSC) else {}
    a = cls.from_dense(x, **options)
    assert a.dtype == dtype == a.to_dense().dtype
    assert (a.to_dense() == x).all()
    assert (a.T.to_dense() == x.T).all()


@pytest.mark.smoke
def test_transposing_shares_the_arrays():
    for cls, back in ((COO, COO), (CSR, CSC), (CSC, CSR), (BSR, BSC), (BSC, BSR)):
        options = {"block_size": (2, 1)} if cls in (BSR, BSC) else {}
        a = cls.from_dense(X, **options)
        assert type(a.T) is back and a.T.data is a.data
        assert all(x is y for x, y in zip(jax.tree.leaves(a.T.T), jax.tree.leaves(a), strict=True))


def test_conversions_with_jax_and_scipy():
    a = CSR.from_dense(X)
    bcsr = a.to_jax()
    assert isinstance(bcsr, jax_sparse.BCSR) and bcsr.data is a.data and bcsr.indptr is a.indptr
    assert sparse.from_jax(bcsr).indices is a.indices  # no copy
    assert (a.T.to_jax().todense() == X).all()  # CSC: BCSR of the transpose
    bcoo = jax_sparse.BCOO.fromdense(X, nse=9)
    for b in (bcoo, jax_sparse.BCSR.fromdense(X, nse=9)):
        assert (sparse.checked(sparse.from_jax(b)).to_dense() == X).all()
    assert (COO.from_dense(X, nse=9).to_jax().todense() == X).all()
    stack = jax_sparse.BCOO.fromdense(jnp.stack([X, 2 * X]), n_batch=1)
    assert (sparse.from_jax(stack).to_dense() == jnp.stack([X, 2 * X])).all()
    with pytest.raises(TypeError, match="Array"):
        sparse.from_jax(X)
    for fmt in ("dok", "bsr"):
        source = sp.csr_array(np.asarray(X)).asformat(fmt)
        for cls in (COO, CSR, CSC):
            b = cls.from_scipy(source, nse=8)
            sparse.checked(b)
            np.testing.assert_array_equal(b.to_dense(), X)
            np.testing.assert_array_equal(b.to_scipy().toarray(), X)
            assert b.to_scipy().nnz == 5 and b.to_scipy().format == cls.__name__.lower()
    b = BSR.from_scipy(sp.csr_array(np.asarray(X)), block_size=(2, 2), nse=7)
    np.testing.assert_array_equal(sparse.checked(b).to_scipy().toarray(), X)
    with pytest.raises(ValueError, match="nse=2"):
        COO.from_scipy(source, nse=2)
    with pytest.raises(ValueError, match="block_size"):
        BSR.from_scipy(source.tocsr())


@every_format
def test_saving_checks_what_it_reads(cls):
    a = build(cls, (np.array([3, 0]), np.array([1, 5]), np.ones(2, np.float32)))
    b = deserialize(serialize(a))
    assert type(b) is cls and b.shape == (M, N)
    chex.assert_trees_all_equal(a, b)
    name = "row" if cls is COO else "indices"
    bad = a.replace(**{name: getattr(a, name) - 7})
    with pytest.raises(ValueError):
        deserialize(serialize(bad))


# --- capacities ----------------------------------------------------------------------------------


def test_eager_counts_and_jit_asks():
    assert CSR.from_dense(X).nse == 5
    assert CSR.from_dense(X, tolerance=2.5).nse == 3
    with pytest.raises(ValueError, match="nse= must be given under jit"):
        jax.jit(CSR.from_dense)(X)
    with pytest.raises(ValueError, match="nse=3 is too small: 5"):
        CSR.from_dense(X, nse=3)
    assert jax.jit(lambda x: CSR.from_dense(x, nse=7))(X).nse == 7
    with pytest.raises(ValueError, match="too small"):
        CSR.from_dense(X).coalesce(nse=2)
    with pytest.raises(ValueError, match="divide"):
        BSR.from_dense(X, block_size=(3, 3))


@pytest.mark.parametrize(
    "overflow",
    [
        lambda x: CSR.from_dense(x, nse=3).data,
        lambda x: COO.from_dense(x, nse=5).coalesce(nse=2).data,
        lambda x: BSR.from_dense(x, block_size=(2, 2), nse=1).data,
        lambda x: sparse.prune(COO.from_dense(x, nse=5), nse=1).data,
        lambda x: sparse.take_rows(CSR.from_dense(x, nse=5), jnp.array([0, 2]), nse=3).data,
    ],
)
def test_an_overflow_under_jit_is_nan_not_a_wrong_number(overflow):
    assert jnp.isnan(jax.jit(overflow)(X)).all()


def test_one_trace_for_all_patterns_of_a_capacity():
    @jax.jit
    @chex.assert_max_traces(1)
    def f(a, v):
        return (a.coalesce(nse=5) @ v).sum()

    for seed in range(3):
        a = sparse.random(jax.random.key(seed), (M, N), nse=5)
        assert jnp.isfinite(f(a, jnp.ones(N)))


def test_resize_and_stack():
    a = CSR.from_dense(X, nse=8)
    assert sparse.resize(a, 5).nse == 5 and (sparse.resize(a, 9).to_dense() == X).all()
    with pytest.raises(ValueError, match="too small"):
        sparse.resize(a, 4)
    for cls in (COO, BSR, BSC):
        options = {"block_size": (2, 2)} if cls in (BSR, BSC) else {}
        parts = [cls.from_dense(k * X, **options) for k in (1, 2)]
        parts[1] = sparse.resize(parts[1], parts[1].nse + 2)
        s = sparse.stack(parts)
        assert s.batch_shape == (2,) and s.ndim == 3 and (s.to_dense()[1] == 2 * X).all()
        assert (sparse.unstack(s)[0].to_dense() == X).all()
        assert (s.T.to_dense()[1] == 2 * X.T).all()
    with pytest.raises(ValueError, match="one format"):
        sparse.stack([a, a.T])
    with pytest.raises(ValueError, match="no stack"):
        sparse.unstack(a)


# --- refusing what is inconsistent ---------------------------------------------------------------


@pytest.mark.parametrize(
    "make, match",
    [
        (lambda: COO.from_parts([1.0], [4], [0], (4, 6)), r"entry 0 is at \(4, 0\)"),
        (lambda: COO.from_parts([1.0], [0], [-1], (4, 6)), "entry 0"),
        (lambda: COO.from_parts([1.0], [0, 1], [0], (4, 6)), "must be equal"),
        (lambda: CSR.from_parts([1.0], [0], [0, 1], (4, 6)), r"indptr.shape=\(2,\)"),
        (lambda: CSR.from_parts([1.0], [0], [0, 1, 0, 1, 1], (4, 6)), "ascend"),
        (lambda: CSR.from_parts([1.0], [0], [1, 1, 1, 1, 1], (4, 6)), "ascend"),
        (lambda: CSR.from_parts([1.0], [0], [0, 1, 1, 1, 2], (4, 6)), "at most nse=1"),
        (lambda: CSR.from_parts([1.0], [6], [0, 1, 1, 1, 1], (4, 6)), "indices"),
        (lambda: CSC.from_parts([1.0], [4], [0, 1, 1, 1, 1, 1, 1], (4, 6)), "indices"),
        (lambda: BSR.from_parts(jnp.ones((1, 3, 2)), [0], [0, 1, 1], (4, 6)), "divide"),
        (lambda: COO.from_parts([1.0], [0], [0], (4, 2**31)), "2\\^31"),
        (lambda: COO.from_dense(jnp.ones(3)), "two axes"),
        (lambda: COO.from_dense(X).with_data(jnp.ones(3)), "values of shape"),
        (lambda: COO.from_dense(X, tolerance=-1.0), "negative"),
    ],
)
def test_an_inconsistent_pattern_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_indices_must_be_integers():
    with pytest.raises(TypeError, match="float32"):
        COO.from_parts([1.0], [0.0], [0], (4, 6))


def test_what_lies_past_the_last_offset_is_padding():
    a = CSR.from_parts([1.0, 7.0], [0, 99], [0, 1, 1, 1, 1], (4, 6))
    assert a.data.tolist() == [1.0, 0.0] and a.indices.tolist() == [0, 6]


# --- construction and selection ------------------------------------------------------------------


def test_construction_is_numpys():
    for k in (-2, 1):
        np.testing.assert_array_equal(sparse.eye(3, 5, k=k).to_dense(), np.eye(3, 5, k))
        a = CSR.from_dense(X)
        np.testing.assert_array_equal(a.diagonal(k), np.diagonal(X, k))
    np.testing.assert_array_equal(
        sparse.diags([[1.0, 2], [3.0]], [0, -1]).to_dense(), [[1, 0], [3, 2]]
    )
    a, b = CSR.from_dense(X, nse=7), COO.from_dense(2 * X[:, :3])
    np.testing.assert_array_equal(sparse.hstack([a, b]).to_dense(), np.hstack([X, 2 * X[:, :3]]))
    np.testing.assert_array_equal(sparse.vstack([b.T, a.T[:3]]).shape, (6, 4))
    np.testing.assert_array_equal(sparse.vstack([a, a], cls=COO).to_dense(), np.vstack([X, X]))
    both = sp.block_diag([a.to_scipy(), b.to_scipy()]).toarray()
    np.testing.assert_array_equal(sparse.block_diag([a, b], cls=CSC).to_dense(), both)
    with pytest.raises(ValueError, match="heights"):
        sparse.hstack([a, a.T])
    with pytest.raises(ValueError, match="no offset twice"):
        sparse.diags([[1.0], [1.0]], [0, 0])


@pytest.mark.parametrize("shape, nse", [((40, 50), 300), ((9000, 9000), 50), ((3, 4), 12)])
def test_random_places_are_distinct_and_cover_the_matrix(shape, nse):
    a = sparse.random(jax.random.key(1), shape, nse=nse, cls=COO)
    row, col = np.asarray(a.row), np.asarray(a.col)
    assert len({*zip(row, col, strict=True)}) == nse
    assert row.max() < shape[0] and col.max() < shape[1]
    if nse > 20:
        for ids_, size in ((row, shape[0]), (col, shape[1])):
            assert abs(ids_.mean() / size - 0.5) < 5 * 0.29 / nse**0.5
    with pytest.raises(ValueError, match="do not fit"):
        sparse.random(jax.random.key(1), (2, 2), nse=5)
    with pytest.raises(ValueError, match="one of"):
        sparse.random(jax.random.key(1), (2, 2))


@every_format
@few
@given(parts=entries(), rows=st.lists(st.integers(-1, M), min_size=3, max_size=3))
def test_rows_and_columns(cls, parts, rows):
    a, x = build(cls, parts), dense_of(parts)
    if cls not in (BSR, BSC):
        taken = np.stack([x[r] if 0 <= r < M else 0 * x[0] for r in rows])
        close(sparse.take_rows(a, jnp.array(rows), nse=3 * NSE).to_dense(), taken)
        close(sparse.slice_rows(a, 1, 3, nse=NSE).to_dense(), x[1:3])
    close(sparse.slice_rows(a, 2, 4, nse=a.nse).to_dense(), x[2:4])
    close(sparse.slice_columns(a, 3, 6, nse=a.nse).to_dense(), x[:, 3:])
    close(a[2], x[2])
    assert a[-1, 2] == x[-1, 2]


def test_indexing_refuses():
    a = CSR.from_dense(X)
    with pytest.raises(IndexError):
        a[4]
    with pytest.raises(TypeError, match="step"):
        a[::2]
    with pytest.raises(TypeError, match="iteration"):
        list(a)
    with pytest.raises(ValueError, match="cut through"):
        a.to_bsr((2, 2))[1:3]
