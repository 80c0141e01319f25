"""What scipy.sparse does, as a table: the same here, or the difference named.

A row is (scipy's expression, ours); both see the same matrices and must give the same dense array.
Where aidx differs on purpose, the last test says what happens instead.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.sparse as sp
import scipy.sparse.linalg as spla

from aidx.arrays import COO, CSR, sparse

X = np.array([[0.0, 2, 0, -1], [3, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 5]], np.float32)
Y = np.array([[1.0, 0, 0, 4], [2, 0, 1, 0], [0, 0, 0, 3], [0, 6, 0, 0]], np.float32)
V = np.array([1.0, -2, 3, 4], np.float32)
S, T = sp.csr_array(X), sp.csr_array(Y)
A, B = CSR.from_scipy(S, nse=8), CSR.from_scipy(T, nse=9)
DUPLICATES = (np.array([1.0, 2, 4], np.float32), (np.array([1, 0, 1]), np.array([0, 1, 0])))

TABLE = {
    "toarray": (lambda: S.toarray(), lambda: A.to_dense()),
    "transpose": (lambda: S.T, lambda: A.T),
    "tocoo/tocsc/tocsr": (lambda: S.tocoo().tocsc().tocsr(), lambda: A.to_coo().to_csc().to_csr()),
    "tobsr": (lambda: S.tobsr((2, 2)), lambda: A.to_bsr((2, 2))),
    "duplicates are summed": (
        lambda: sp.coo_array(DUPLICATES, (2, 2)).toarray(),
        lambda: COO.from_parts(DUPLICATES[0], *DUPLICATES[1], (2, 2)),
    ),
    "sum_duplicates": (
        lambda: sp.coo_array(DUPLICATES, (2, 2)).tocsr().data,
        lambda: COO.from_parts(DUPLICATES[0], *DUPLICATES[1], (2, 2)).coalesce().data,
    ),
    "A @ v": (lambda: S @ V, lambda: A @ V),
    "v @ A": (lambda: V @ S, lambda: V @ A),
    "A @ dense": (lambda: S @ Y, lambda: A @ Y),
    "dense @ A": (lambda: Y @ S, lambda: Y @ A),
    "A @ B": (lambda: S @ T, lambda: A @ B),
    "A + B": (lambda: S + T, lambda: A + B),
    "A - B": (lambda: S - T, lambda: A - B),
    "A + dense": (lambda: S + Y, lambda: A + Y),
    "dense - A": (lambda: Y - S, lambda: Y - A),
    "2 * A / 4": (lambda: 2 * S / 4, lambda: 2 * A / 4),
    "-A": (lambda: -S, lambda: -A),
    "abs(A)": (lambda: abs(S), lambda: abs(A)),
    "multiply(B)": (lambda: S.multiply(T), lambda: A * B),
    "multiply(dense)": (lambda: S.multiply(Y), lambda: A * Y),
    "multiply(row)": (lambda: S.multiply(V), lambda: A * V),
    "multiply(column)": (lambda: S.multiply(V[:, None]), lambda: A * V[:, None]),
    "sum()": (lambda: S.sum(), lambda: A.sum()),
    "sum(0)": (lambda: S.sum(axis=0), lambda: A.sum(0)),
    "sum(-1)": (lambda: S.sum(axis=-1), lambda: A.sum(-1)),
    "mean(1)": (lambda: S.mean(axis=1), lambda: A.mean(1)),
    "max(0)": (lambda: S.max(axis=0).toarray(), lambda: A.max(0)),
    "min(1)": (lambda: S.min(axis=1).toarray(), lambda: sparse.min(A, 1)),
    "max()": (lambda: S.max(), lambda: A.max()),
    "diagonal": (lambda: S.diagonal(1), lambda: A.diagonal(1)),
    "trace": (lambda: S.trace(), lambda: A.diagonal().sum()),
    "tril": (lambda: sp.tril(S), lambda: sparse.tril(A)),
    "triu(k=1)": (lambda: sp.triu(S, 1), lambda: sparse.triu(A, 1)),
    "eliminate_zeros": (
        lambda: sp.csr_array(sp.triu(S, 1)).count_nonzero(),
        lambda: sparse.prune(sparse.triu(A, 1)).nnz,
    ),
    "A[1:3]": (lambda: S[1:3], lambda: A[1:3]),
    "A[:, 1:]": (lambda: S[:, 1:], lambda: A[:, 1:]),
    "A[[3, 0, 3]]": (lambda: S[[3, 0, 3]], lambda: A[jnp.array([3, 0, 3])]),
    "A[1]": (lambda: S[1].toarray(), lambda: A[1]),
    "A[3, 1]": (lambda: S[3, 1], lambda: A[3, 1]),
    "hstack": (lambda: sp.hstack([S, T]), lambda: sparse.hstack([A, B])),
    "vstack": (lambda: sp.vstack([S, T]), lambda: sparse.vstack([A, B])),
    "block_diag": (lambda: sp.block_diag([S, T]), lambda: sparse.block_diag([A, B])),
    "eye_array(k=-1)": (lambda: sp.eye_array(3, 4, k=-1), lambda: sparse.eye(3, 4, k=-1)),
    "diags_array": (
        lambda: sp.diags_array([V, V[:3]], offsets=[0, -1]),
        lambda: sparse.diags([V, V[:3]], [0, -1]),
    ),
    "astype": (lambda: S.astype(np.int32), lambda: A.astype(jnp.int32)),
    "nnz": (lambda: S.nnz, lambda: A.nnz),
    "spsolve_triangular": (
        lambda: spla.spsolve_triangular(sp.csr_array(sp.tril(T) + 2 * sp.eye_array(4)), V),
        lambda: sparse.triangular_solve(B + 2 * sparse.eye(4), jnp.asarray(V)),
    ),
    "cg": (
        lambda: spla.cg(S @ S.T + sp.eye_array(4), V, rtol=1e-6)[0],
        lambda: sparse.cg(A @ A.T + sparse.eye(4), jnp.asarray(V), tolerance=1e-6),
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_same_as_scipy(name):
    theirs, ours = (f() for f in TABLE[name])
    theirs = theirs.toarray() if sp.issparse(theirs) else theirs
    ours = ours.to_dense() if isinstance(ours, sparse.SparseMatrix) else ours
    np.testing.assert_allclose(ours, theirs, 1e-4, 1e-5)


def test_where_aidx_differs_on_purpose():
    # tocsr() of a COO sums duplicates in scipy; here the capacity stays and duplicates with it.
    coo = COO.from_parts(DUPLICATES[0], *DUPLICATES[1], (2, 2))
    assert coo.to_csr().nnz == 3 and sp.coo_array(DUPLICATES, (2, 2)).tocsr().nnz == 2
    # multiply drops zeros of the result in scipy; here the pattern of the left side stays.
    assert (A * B).nnz == A.nnz and S.multiply(T).nnz < S.nnz
    # A row is sparse in scipy, dense here.
    assert A[1].shape == (4,)
    # A * B is the matrix product of scipy's old matrices, elementwise of its arrays and here.
    np.testing.assert_allclose((A * B).to_dense(), (S * T).toarray())
    # Adding a scalar other than 0 is refused by both.
    with pytest.raises(NotImplementedError):
        S + 1.0
    with pytest.raises(TypeError):
        A + 1.0
    # scipy iterates over rows; here that would be one program per row.
    with pytest.raises(TypeError):
        iter(A)
