"""Operations against dense: values, gradients, second derivatives, memory, dtypes, batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import aidx.arrays
from aidx.arrays import BSC, BSR, COO, CSC, CSR, SparseMatrix, sparse
from aidx.ops import registry
from tests.arrays.patterns import FORMATS, NSE, M, N, build, close, dense_of, entries, few, ids

every_format = pytest.mark.parametrize("cls", FORMATS, ids=ids)
MASK = jnp.arange(M * N).reshape(M, N) % 3 > 0
masked_softmax = lambda x, keep, axis: jnp.where(
    keep, jnp.nan_to_num(jax.nn.softmax(jnp.where(keep, x, -jnp.inf), axis=axis)), 0
)

# name -> (of a sparse matrix and dense y [M, N], of the dense matrix, y and which places are kept)
OPERATIONS = {
    "spmm": (lambda a, y: a @ y.T, lambda x, y, k: x @ y.T),
    "spmv": (lambda a, y: a @ y[0], lambda x, y, k: x @ y[0]),
    "dense @ sparse": (lambda a, y: y.T @ a, lambda x, y, k: y.T @ x),
    "sampled": (
        lambda a, y: a * sparse.sampled_matmul(a, y, y.T @ y).to_dense(),
        lambda x, y, k: x * jnp.where(k, y @ y.T @ y, 0),
    ),
    "sampled_addmm": (
        lambda a, y: sparse.sampled_addmm(a, y, y.T @ y, alpha=2, beta=3),
        lambda x, y, k: 3 * x + 2 * jnp.where(k, y @ y.T @ y, 0),
    ),
    "spgemm": (
        lambda a, y: sparse.matmul(a, a.T, nse=M * M, products=NSE * M),
        lambda x, y, k: x @ x.T,
    ),
    "add": (lambda a, y: a + sparse.tril(a) * 2.0, lambda x, y, k: x + 2 * jnp.tril(x)),
    "add dense": (lambda a, y: y - a, lambda x, y, k: y - x),
    "multiply dense": (lambda a, y: a * y * y[:1], lambda x, y, k: x * y * y[:1]),
    "multiply sparse": (lambda a, y: a * (sparse.triu(a) * y), lambda x, y, k: x * jnp.triu(x) * y),
    "divide": (lambda a, y: a / (3 + y * y), lambda x, y, k: x / (3 + y * y)),
    "mask": (lambda a, y: sparse.mask(a, MASK), lambda x, y, k: jnp.where(MASK, x, 0)),
    "sum": (lambda a, y: sparse.sum(a, 0) * y[0], lambda x, y, k: x.sum(0) * y[0]),
    "mean": (lambda a, y: sparse.mean(a), lambda x, y, k: x.mean()),
    "max": (lambda a, y: sparse.max(a, 1), lambda x, y, k: x.max(1)),
    "min": (lambda a, y: sparse.min(a, 0), lambda x, y, k: x.min(0)),
    "softmax": (
        lambda a, y: sparse.softmax(a * y) * y,
        lambda x, y, k: masked_softmax(x * y, k, 1) * y,
    ),
    "log_softmax": (
        lambda a, y: sparse.map_values(jnp.exp, sparse.log_softmax(a * y, axis=0)),
        lambda x, y, k: masked_softmax(x * y, k, 0),
    ),
    "diagonal": (lambda a, y: sparse.diagonal(a, 1), lambda x, y, k: jnp.diagonal(x, 1)),
    "coalesce": (lambda a, y: a.coalesce(nse=a.nse), lambda x, y, k: x),
    "vstack": (lambda a, y: sparse.vstack([a, 2 * a]), lambda x, y, k: jnp.vstack([x, 2 * x])),
}
WEIGHTS = jnp.cos(jnp.arange(64.0)).reshape(8, 8)


def dense(x):
    return x.to_dense() if isinstance(x, SparseMatrix) else x


def scalar(x):
    """A nonlinear function of every element, so that second derivatives are not zero."""
    x = jnp.atleast_2d(dense(x))
    return jnp.sum(WEIGHTS[: x.shape[0], : x.shape[1]] * (x + 0.1 * x**3))


def derivatives(f, x, y, dx):
    """Value, gradients and the forward-over-reverse second derivative along dx."""
    value, (gx, gy) = jax.value_and_grad(f, (0, 1))(x, y)
    second = jax.jvp(lambda x: jax.grad(f)(x, y), (x,), (dx,))[1]
    return value, gx, gy, second


@jax.jit
def all_sparse(a, y, d):
    out = {}
    for name, (op, _) in OPERATIONS.items():
        f = lambda data, y, op=op: scalar(op(a.with_data(data), y))
        out[name] = derivatives(f, a.data, y, d)
    return out


@jax.jit
def all_dense(x, y, d, keep):
    out = {}
    for name, (_, op) in OPERATIONS.items():
        f = lambda x, y, op=op: scalar(op(x, y, keep))
        out[name] = derivatives(f, x, y, d)
    return out


@few
@given(parts=entries(distinct=True), seed=st.integers(0, 9))
def test_values_and_derivatives_of_every_operation(parts, seed):
    y = jax.random.normal(jax.random.key(seed), (M, N))
    a = build(CSR, parts)
    keep = np.zeros((M, N), bool)
    keep[parts[0], parts[1]] = True
    # Values are spread so that equals, whose shares of a maximum's gradient are many, are few.
    x = jnp.asarray(dense_of(parts), jnp.float32) * 0.5 + jnp.where(keep, 0.01 * y, 0)
    a = sparse.sample(x, a)
    d = sparse.sample(jnp.cos(y), a)
    with jax.default_matmul_precision("highest"):
        ours, truth = all_sparse(a, y, d.data), all_dense(x, y, d.to_dense(), keep)
    for name in OPERATIONS:
        value, gx, gy, second = truth[name]
        at = lambda g: sparse.sample(jnp.where(keep, g, 0), a).data  # the pattern; 0 in padding
        expected = (value, at(gx), gy, at(second))
        for kind, got, want in zip(("value", "da", "dy", "2nd"), ours[name], expected, strict=True):
            np.testing.assert_allclose(got, want, 2e-4, 2e-4, err_msg=f"{name}: {kind}")


@every_format
@few
@given(parts=entries(), seed=st.integers(0, 9))
def test_products_in_every_format_sum_duplicates(cls, parts, seed):
    a, x = build(cls, parts), dense_of(parts)
    y = jax.random.normal(jax.random.key(seed), (N, 3))

    out, (g, gy) = product_and_grad(a, y)
    close(out, x @ np.float64(y), rtol=1e-4, atol=1e-4)
    assert type(g) is cls and jax.tree.structure(g) == jax.tree.structure(a)
    for mine, theirs in zip(jax.tree.leaves(g)[1:], jax.tree.leaves(a)[1:], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    cotangent = 2 * np.float64(out)
    close(g.data, sparse.sample(jnp.asarray(cotangent @ np.float64(y).T), a).data, atol=1e-3)
    close(gy, x.T @ cotangent, rtol=1e-4, atol=1e-3)


@jax.jit
def product_and_grad(a, y):
    return a @ y, aidx.arrays.grad(lambda a, y: jnp.sum((a @ y) ** 2), (0, 1))(a, y)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.complex64, jnp.int32], ids=str)
@pytest.mark.parametrize("cls", [CSR, BSR], ids=ids)
def test_products_of_other_dtypes(cls, dtype):
    parts = (np.array([0, 0, 3, 0]), np.array([1, 5, 2, 1]), np.array([1, 2, 3, 1]))
    x = dense_of(parts).astype(np.complex128 if dtype == jnp.complex64 else np.float64)
    a = build(cls, parts).astype(dtype)
    y = jnp.arange(N * 2).reshape(N, 2).astype(dtype)
    out = a @ y
    assert out.dtype == dtype
    close(out, x @ np.asarray(y).astype(x.dtype), dtype)
    assert (a @ y.real.astype(jnp.float32)).dtype == jnp.promote_types(dtype, jnp.float32)


def test_bf16_sums_are_kept_in_float32():
    ones = jnp.ones((1, 512), jnp.bfloat16)
    a = CSR.from_dense(ones * 1.0078125)  # rounds away below 2 if summed in bf16
    assert abs(float((a @ ones.T)[0, 0]) - 516) <= 2
    assert abs(float(a.sum()) - 516) <= 2
    with pytest.raises(TypeError, match="bool"):
        a.astype(jnp.bool_) @ jnp.ones(512, bool)


@pytest.mark.smoke
def test_stacks_and_vmap_agree_with_a_loop():
    a = [sparse.random(jax.random.key(i), (M, N), nse=7) for i in range(3)]
    stack, y = sparse.stack(a), jax.random.normal(jax.random.key(9), (3, N, 2))
    loop = jnp.stack([m.to_dense() @ v for m, v in zip(a, y, strict=True)])
    np.testing.assert_allclose(stack @ y, loop, 1e-5)
    np.testing.assert_allclose(jax.vmap(jnp.matmul)(stack.to_dense(), y), loop, 1e-5)
    np.testing.assert_allclose(jax.vmap(lambda m, v: m @ v)(stack, y), loop, 1e-5)
    shared = jnp.stack([a[0].to_dense() @ v for v in y])
    np.testing.assert_allclose(a[0] @ y, shared, 1e-5)  # dense batch axes
    g = jax.vmap(jax.grad(lambda d, m, v: jnp.sum((m.with_data(d) @ v) ** 2)))(stack.data, stack, y)
    one = jax.grad(lambda d: jnp.sum((a[1].with_data(d) @ y[1]) ** 2))(a[1].data)
    np.testing.assert_allclose(g[1], one, 1e-5)
    assert sparse.sum(stack, 1).shape == (3, M)
    np.testing.assert_allclose((stack + stack).to_dense(), 2 * stack.to_dense())
    with pytest.raises(ValueError, match="stack"):
        stack @ y[0]


def test_products_refuse_what_does_not_fit():
    a = CSR.from_dense(jnp.eye(3))
    with pytest.raises(ValueError, match="sizes differ"):
        a @ jnp.ones(4)
    with pytest.raises(ValueError, match="sizes differ"):
        a @ CSR.from_dense(jnp.eye(4))
    with pytest.raises(TypeError, match="two sparse"):
        sparse.matmul(a, jnp.ones(3), nse=3)
    with pytest.raises(TypeError, match="neither"):
        sparse.matmul(jnp.ones(3), jnp.ones(3))
    with pytest.raises(ValueError, match="under jit"):
        jax.jit(lambda a: a @ a)(a)
    with pytest.raises(ValueError, match="nse=2 is too small"):
        sparse.matmul(a, a, nse=2)
    with pytest.raises(ValueError, match="fill"):
        sparse.sampled_matmul(a, jnp.ones((3, 2)), jnp.ones((3, 3)))
    with pytest.raises(TypeError, match="not sparse"):
        a + 1.0
    with pytest.raises(ValueError, match="shapes differ"):
        a + CSR.from_dense(jnp.eye(4))
    with pytest.raises(ValueError, match="broadcast"):
        a * jnp.ones((2, 3))
    with pytest.raises(ValueError, match="axis"):
        a.sum(2)
    with pytest.raises(TypeError, match="order"):
        a.astype(jnp.complex64).max()


@pytest.mark.parametrize("cls", [COO, CSC, BSR, BSC], ids=ids)
def test_sparse_results_keep_the_format(cls):
    blocks = cls in (BSR, BSC)
    options = {"block_size": (1, 2)} if blocks else {}
    x = jnp.array([[0.0, 2, 0, 1], [3, 0, 0, 0], [0, 0, 0, 0], [0, 1, 0, 5]])
    a = cls.from_dense(x, **options)
    b = a @ a
    assert type(b) is (CSR if blocks else cls)
    np.testing.assert_array_equal(b.to_dense(), x @ x)
    assert blocks or int(b.nnz) == np.count_nonzero(x @ x)  # blocks hold zeros
    assert type(a + a) is cls and type(a * x) is cls and type(-a) is cls
    np.testing.assert_array_equal((a + a).to_dense(), 2 * x)
    np.testing.assert_array_equal((a * a).to_dense(), x * x)
    assert (a + a).nse == a.nse  # counted, not the sum of both
    assert sum([a, a]).nse == a.nse


def test_extremes_of_integers_at_their_ends():
    a = COO.from_dense(jnp.array([[jnp.iinfo(jnp.int32).min, 1], [0, 2]], jnp.int32))
    assert sparse.min(a, 1).tolist() == [jnp.iinfo(jnp.int32).min, 0]
    assert sparse.max(a, 0).tolist() == [0, 2]


# --- the choice of an implementation -------------------------------------------------------------


def test_implementations_agree_and_refuse():
    a = sparse.random(jax.random.key(0), (40, 30), nse=200)
    y = jax.random.normal(jax.random.key(1), (30, 5))
    f = functools.partial(sparse.matmul, a, y)
    np.testing.assert_allclose(f(implementation="xla"), f(implementation="eigen"), 1e-5, 1e-6)
    for bad in (a.to_coo(), a.astype(jnp.bfloat16)):
        with pytest.raises(ExceptionGroup, match="spmm"):
            sparse.matmul(bad, y.astype(bad.dtype), implementation="eigen")
        assert jnp.isfinite(sparse.matmul(bad, y)).all()
    with pytest.raises(ValueError, match="no implementation"):
        f(implementation="magic")
    assert [i.name for i in registry.implementations("spmm")] == [
        "mosaic_gpu",
        "cusparse",
        "eigen",
        "halves",
        "xla",
    ]


def test_a_vector_on_a_cpu_takes_two_halves(monkeypatch):
    monkeypatch.setattr("aidx.arrays.product.HALVED", 100)
    a, x = sparse.random(jax.random.key(0), (40, 30), nse=201), jnp.arange(30.0)
    text = jax.jit(sparse.matmul).lower(a, x).as_text()
    assert text.count('"stablehlo.scatter"(') == 2
    for m, v in ((a, x), (a.to_coo(), x), (a.T, jnp.arange(40.0)), (a, x.astype(jnp.int32))):
        m = m.astype(v.dtype)
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-4)
        close(m @ v, sparse.matmul(m, v, implementation="xla"))
    with pytest.raises(ExceptionGroup, match="spmm"):
        half = a.astype(jnp.bfloat16), x.astype(jnp.bfloat16)
        sparse.matmul(*half, implementation="halves")


@pytest.mark.smoke
def test_the_cpu_product_is_the_threaded_one():
    a = sparse.random(jax.random.key(0), (40, 30), nse=200)
    lower = lambda y: jax.jit(sparse.matmul).lower(a, y).as_text()
    assert "cpu_csr_sparse_dense" in lower(jnp.ones((30, 8)))
    assert "cpu_csr_sparse_dense" not in lower(jnp.ones(30))


# --- memory --------------------------------------------------------------------------------------

SIZE = 4096  # a dense matrix takes 64 MiB
DENSE = SIZE * SIZE * 4


def temporary(f, *args):
    """Bytes beside arguments and results that the compiled f takes."""
    return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def large():
    a = sparse.random(jax.random.key(0), (SIZE, SIZE), nse=8192)
    return a, jnp.ones((SIZE, 16))


@pytest.mark.parametrize(
    "name",
    [
        "products",
        pytest.param("sampled", marks=pytest.mark.slow),
        "rows",
        "spgemm",
        "solve",
        "formats",
        pytest.param("elementwise", marks=pytest.mark.slow),
    ],
)
def test_no_operation_and_no_gradient_forms_the_dense_matrix(large, name):
    a, x = large

    def f(data, x):
        m = a.with_data(data)
        if name == "products":
            out = [m @ x, x.T @ m]
        elif name == "sampled":
            out = [sparse.sampled_matmul(m, x, x.T).data * m.data]
        elif name == "rows":
            out = [sparse.softmax(m).data, sparse.max(m, 1), sparse.mean(m, 0)]
        elif name == "spgemm":
            out = [sparse.matmul(m, m, nse=2**15, products=2**15).data]
        elif name == "solve":
            out = [sparse.triangular_solve(m + sparse.eye(SIZE), x)]
        elif name == "formats":
            parts = m.to_csc().coalesce(nse=m.nse), sparse.vstack([m, m]), sparse.tril(m)
            out = [p.data for p in parts] + [sparse.diagonal(m)]
        else:
            out = [(m + m.T).data, (m * m).data, (m * x[:, :1]).data]
        return sum(jnp.sum(o**2) for o in out)

    hvp = lambda d, x: jax.jvp(lambda d: jax.grad(f)(d, x), (d,), (d,))[1]
    for g in (jax.grad(f, (0, 1)), hvp):
        assert temporary(g, a.data, x) < DENSE / 8


def test_products_work_on_parts_of_the_entries(monkeypatch):
    a = sparse.random(jax.random.key(0), (64, 64), nse=1000)
    x = jax.random.normal(jax.random.key(1), (64, 32))
    f = lambda d, x: jnp.sum((a.T.with_data(d) @ x) ** 2)
    whole, many = jax.grad(f, (0, 1))(a.data, x), temporary(jax.grad(f, (0, 1)), a.data, x)
    monkeypatch.setattr("aidx.arrays.product.PART", 4096)
    jax.clear_caches()
    parts, few_ = jax.grad(f, (0, 1))(a.data, x), temporary(jax.grad(f, (0, 1)), a.data, x)
    jax.clear_caches()
    for p, w in zip(parts, whole, strict=True):
        np.testing.assert_allclose(p, w, 1e-4, 1e-4)
    assert few_ < many / 2
