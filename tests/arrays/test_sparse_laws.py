"""Operations against numpy over shapes, densities, duplicates, padding and dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidx.arrays import COO, CSC, CSR, SparseMatrix, sparse
from tests.arrays.patterns import build, close, dense_of, entries, few

CAPACITY = 12
KINDS = {  # a dtype to each shape: a program for every pair would take minutes to compile
    "row bf16": ((1, 7), jnp.bfloat16),
    "column complex64": ((5, 1), jnp.complex64),
    "wide int32": ((3, 4), jnp.int32),
    "tall float16": ((6, 2), jnp.float16),
}
every_kind = pytest.mark.parametrize(
    ("kind", "cls"),
    [
        ("row bf16", CSR),
        ("column complex64", COO),
        ("wide int32", CSR),
        ("tall float16", COO),
        *[pytest.param(k, COO, marks=pytest.mark.slow) for k in ("row bf16", "wide int32")],
        *[
            pytest.param(k, CSR, marks=pytest.mark.slow)
            for k in ("column complex64", "tall float16")
        ],
    ],
)

# name -> (of a sparse matrix, of the dense one); y is [M, N]; None: see the test
OPERATIONS = {
    "a @ y.T": (lambda a, y: a @ y.T, lambda x, y: x @ y.T),
    "a @ v": (lambda a, y: a @ y[0], lambda x, y: x @ y[0]),
    "y.T @ a": (lambda a, y: y.T @ a, lambda x, y: y.T @ x),
    "v @ a": (lambda a, y: y[:, 0] @ a, lambda x, y: y[:, 0] @ x),
    "a.T @ y": (lambda a, y: a.T @ y, lambda x, y: x.T @ y),
    "a @ a.T": (
        lambda a, y: sparse.matmul(a, a.T, nse=40, products=CAPACITY**2),
        lambda x, y: x @ x.T,
    ),
    "sampled": (
        lambda a, y: sparse.mask(sparse.sampled_matmul(a.coalesce(nse=a.nse), y, y.T @ y), y != 0),
        None,
    ),
    "a + a.tril * 2": (lambda a, y: a + sparse.tril(a) * 2, lambda x, y: x + 2 * np.tril(x)),
    "a - y": (lambda a, y: a - y, lambda x, y: x - y),
    "a * y": (lambda a, y: a * y, lambda x, y: x * y),
    "a * row": (lambda a, y: a * y[:1], lambda x, y: x * y[:1]),
    "a * column": (lambda a, y: a * y[:, :1], lambda x, y: x * y[:, :1]),
    "-a": (lambda a, y: -a, lambda x, y: -x),
    "mask": (lambda a, y: sparse.mask(a, y.real > 0), lambda x, y: np.where(y.real > 0, x, 0)),
    "sum": (lambda a, y: a.sum(), lambda x, y: x.sum()),
    "sum(0)": (lambda a, y: a.sum(0), lambda x, y: x.sum(0)),
    "sum(1)": (lambda a, y: a.sum(1), lambda x, y: x.sum(1)),
    "mean(1)": (lambda a, y: a.mean(1), lambda x, y: x.mean(1)),
    "diagonal": (lambda a, y: sparse.diagonal(a), lambda x, y: np.diagonal(x)),
    "triu": (lambda a, y: sparse.triu(a, 1), lambda x, y: np.triu(x, 1)),
    "coalesce": (lambda a, y: a.coalesce(nse=a.nse), lambda x, y: x),
    "sort": (lambda a, y: sparse.sort(a.to_csc().to_coo()), lambda x, y: x),
    "vstack": (lambda a, y: sparse.vstack([a, -a]), lambda x, y: np.vstack([x, -x])),
    "hstack": (lambda a, y: sparse.hstack([a, -a]), lambda x, y: np.hstack([x, -x])),
    "block_diag": (
        lambda a, y: sparse.block_diag([a, a]),
        lambda x, y: np.kron(np.eye(2), x),
    ),
    "rows": (
        lambda a, y: sparse.take_rows(a, jnp.array([0, a.shape[0] - 1, 0]), nse=3 * CAPACITY),
        lambda x, y: x[[0, -1, 0]],
    ),
}


def dense(x):
    return x.to_dense() if isinstance(x, SparseMatrix) else x


@jax.jit
def all_of(a, y):
    return {name: dense(op(a, y)) for name, (op, _) in OPERATIONS.items()}


@every_kind
@few
@given(data=st.data(), seed=st.integers(0, 9))
def test_every_operation_in_every_dtype(kind, cls, data, seed):
    """Duplicates are summed, padding counts for nothing, results have the matrix's dtype."""
    shape, dtype = KINDS[kind]
    wide = np.complex64 if dtype == jnp.complex64 else np.float32
    parts = data.draw(entries(wide, shape=shape, nse=10))
    y = np.random.default_rng(seed).integers(-3, 4, shape).astype(wide)
    if wide == np.complex64:
        y = y * (1 + 2j)
    a, x = build(cls, parts, shape, CAPACITY).astype(dtype), dense_of(parts, shape)
    out, y = all_of(a, jnp.asarray(y, dtype)), y.astype(x.dtype)
    kept = np.zeros(shape, bool)
    kept[parts[0], parts[1]] = True
    sampled = np.where(kept & (y != 0), y @ y.T @ y, 0)
    for name, (_, op) in OPERATIONS.items():
        got, want = out[name], sampled if op is None else op(x, y)
        if name == "mean(1)" and dtype == jnp.int32:
            assert jnp.issubdtype(got.dtype, jnp.floating)
        else:
            assert got.dtype == a.dtype, name
        close(got, want, jnp.promote_types(dtype, jnp.bfloat16), err_msg=name)


# --- derivatives of complex and narrow numbers ----------------------------------------------------

DIFFERENTIATED = {
    "a @ y.T": (lambda a, y: a @ y.T, lambda x, y: x @ y.T),
    "y.T @ a": (lambda a, y: y.T @ a, lambda x, y: y.T @ x),
    "a @ a.T": OPERATIONS["a @ a.T"],
    "a * y + a": (lambda a, y: a * y + a, lambda x, y: x * y + x),
    "sum, mean": (lambda a, y: a.sum(0) * a.mean(0), lambda x, y: x.sum(0) * x.mean(0)),
    "diagonal": (lambda a, y: sparse.diagonal(a) ** 2, lambda x, y: jnp.diagonal(x) ** 2),
    "hstack": (lambda a, y: sparse.hstack([a, a]), lambda x, y: jnp.hstack([x, x])),
}


def square(x):
    """|x|^2, summed in f32."""
    x = dense(x)
    x = x if jnp.iscomplexobj(x) else x.astype(jnp.float32)
    return jnp.sum(jnp.real(x * jnp.conj(x)))


@functools.partial(jax.jit, static_argnums=2)
def gradients(a, y, dtype):
    """(ours at the stored places, the dense ones there) by operation, and both for y."""
    wide = jnp.promote_types(dtype, jnp.float32)
    out = {}
    for name, (ours, theirs) in DIFFERENTIATED.items():
        f = lambda d, y, op=ours: square(op(a.with_data(d), y))
        g = lambda x, y, op=theirs: square(op(x, y))
        gd, gy = jax.grad(f, (0, 1))(a.data, y)
        gx, hy = jax.grad(g, (0, 1))(a.to_dense().astype(wide), y.astype(wide))
        out[name] = (gd, sparse.sample(gx, a).data), (gy, hy)
    return out


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64], ids=["bf16", "complex64"])
@few
@given(parts=entries(), seed=st.integers(0, 9))
def test_gradients_of_complex_and_narrow_numbers(dtype, parts, seed):
    a = build(CSR, parts).astype(dtype) * jnp.asarray(
        1 + 0.5j if dtype == jnp.complex64 else 1, dtype
    )
    y = jax.random.normal(jax.random.key(seed), a.shape).astype(dtype)
    eps = float(jnp.finfo(dtype).eps)
    with jax.default_matmul_precision("highest"):
        results = gradients(a, y, dtype)
    for name, pairs in results.items():
        for got, want in pairs:
            assert got.dtype == dtype
            scale = 1 + np.abs(np.asarray(want)).max()
            close(got, np.asarray(want), dtype, atol=32 * eps * scale, err_msg=name)


# --- solves ---------------------------------------------------------------------------------------


def system(seed, n=8, dtype=np.float32):
    """A diagonally dominant matrix, half of it empty, and a right-hand side."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, n)) * (rng.random((n, n)) < 0.5)
    x = x + 1j * rng.standard_normal((n, n)) * (x != 0) if dtype == np.complex64 else x
    return (x + 2 * n * np.eye(n)).astype(dtype), rng.standard_normal(n).astype(dtype)


METHODS = {
    "triangular": (sparse.triangular_solve, np.tril),
    "cg": (functools.partial(sparse.cg, tolerance=1e-7), lambda x: x @ x.conj().T),
    "bicgstab": (functools.partial(sparse.bicgstab, tolerance=1e-7), lambda x: x),
    "gmres": (functools.partial(sparse.gmres, tolerance=1e-7), lambda x: x),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [np.float32, np.complex64], ids=["f32", "c64"])
def test_solves_in_batches_and_of_complex_numbers(method, dtype):
    solve, of = METHODS[method]
    systems = [system(i, dtype=dtype) for i in range(3)]
    matrices = [CSR.from_dense(jnp.asarray(of(x)), nse=64) for x, _ in systems]
    b = jnp.stack([b for _, b in systems])
    want = np.stack([np.linalg.solve(of(x), b) for x, b in systems])
    got = jax.vmap(solve)(sparse.stack(matrices), b)
    np.testing.assert_allclose(got, want, 1e-3, 1e-4)
    np.testing.assert_allclose(solve(matrices[0], b[0]), want[0], 1e-3, 1e-4)
    shared = jax.vmap(lambda v: solve(matrices[0], v))(b)
    np.testing.assert_allclose(shared, np.linalg.solve(of(systems[0][0]), b.T).T, 1e-3, 1e-4)


# --- constants under jit --------------------------------------------------------------------------

CONSTANTS = {
    "a @ x": lambda a, x: a @ x,
    "(a @ a) @ x": lambda a, x: sparse.matmul(a, a, nse=9, products=27) @ x,
    "a.T": lambda a, x: a.T @ x,
    "to_csc": lambda a, x: a.to_csc() @ x,
    "coalesce": lambda a, x: a.coalesce(nse=a.nse) @ x,
    "to_bsr": lambda a, x: a.to_bsr((1, 1), nse=9) @ x,
    "a + a": lambda a, x: (a + a) @ x,
    "a * a": lambda a, x: (a * a) @ x,
    "rows": lambda a, x: sparse.take_rows(a, jnp.array([0, 1, 2]), nse=9) @ x,
    "softmax": lambda a, x: sparse.softmax(a) @ x,
    "vstack": lambda a, x: sparse.vstack([a, a]) @ x,
    "triangular": lambda a, x: sparse.triangular_solve(a, x),
    "prune": lambda a, x: sparse.prune(a, nse=9) @ x,
    "slice": lambda a, x: a[:2] @ x,
    "from_dense": lambda a, x: CSR.from_dense(a.to_dense(), nse=9) @ x,
    "A[i, j]": lambda a, x: a[1, 1] * x,
}


@pytest.mark.parametrize("name", CONSTANTS)
@pytest.mark.parametrize("cls", [CSR, CSC, pytest.param(COO, marks=pytest.mark.slow)])
def test_a_matrix_that_a_jitted_function_closes_over(cls, name):
    """Its leaves are no tracers, but what is made of them under jit is."""
    f = functools.partial(CONSTANTS[name], cls.from_dense(jnp.tril(jnp.ones((3, 3)))))
    x = jnp.arange(1.0, 4)
    np.testing.assert_allclose(jax.jit(f)(x), f(x), 1e-5)
