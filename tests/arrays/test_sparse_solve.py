"""Linear solves against dense ones, with their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aidx.arrays import BSC, BSR, COO, CSC, CSR, sparse
from tests.arrays.patterns import build, entries, few, ids

SIZE = 4
SHAPE, CAPACITY = (SIZE, SIZE), 12


@jax.jit
def ours(a, diagonal, b):
    def f(data, diagonal, b):
        m = a.with_data(data) + sparse.diags([diagonal])
        return sparse.triangular_solve(m, b), sparse.triangular_solve(m, b, lower=False)

    return with_derivatives(f, a.data, diagonal, b)


@jax.jit
def truth(a, diagonal, b):
    def f(data, diagonal, b):
        m = a.with_data(data).to_dense() + jnp.diag(diagonal)
        return jnp.linalg.solve(jnp.tril(m), b), jnp.linalg.solve(jnp.triu(m), b)

    return with_derivatives(f, a.data, diagonal, b)


def with_derivatives(f, *args):
    loss = lambda *args: sum(jnp.sum(jnp.sin(x)) for x in f(*args))
    second = jax.jvp(lambda d: jax.grad(loss)(d, *args[1:]), args[:1], args[:1])[1]
    return f(*args), jax.grad(loss, (0, 1, 2))(*args), second


@few
@given(parts=entries(shape=SHAPE, nse=8), seed=st.integers(0, 9))
def test_triangular_solves_and_their_derivatives(parts, seed):
    a = build(CSR, parts, SHAPE, CAPACITY) * 0.25
    diagonal = 1.0 + jnp.abs(jax.random.normal(jax.random.key(seed), (SIZE,)))
    b = jax.random.normal(jax.random.key(seed + 10), (SIZE, 2))
    for got, want in zip(
        jax.tree.leaves(ours(a, diagonal, b)), jax.tree.leaves(truth(a, diagonal, b)), strict=True
    ):
        np.testing.assert_allclose(got, want, 2e-3, 2e-3)


@pytest.mark.parametrize("cls", [COO, CSC, BSR], ids=ids)
def test_every_format_and_option(cls):
    x = np.tril(np.arange(1.0, 17).reshape(4, 4)) / 4 + np.triu(np.ones((4, 4)), 1)
    a = cls.from_dense(
        jnp.asarray(x, jnp.float32), **({"block_size": (2, 2)} if cls in (BSR, BSC) else {})
    )
    b = jnp.arange(1.0, 5)
    solve = lambda **options: sparse.triangular_solve(a, b, **options)
    np.testing.assert_allclose(solve(), np.linalg.solve(np.tril(x), b), 1e-4)
    np.testing.assert_allclose(solve(transpose=True), np.linalg.solve(np.tril(x).T, b), 1e-4)
    unit = np.tril(x, -1) + np.eye(4)
    np.testing.assert_allclose(solve(unit_diagonal=True), np.linalg.solve(unit, b), 1e-4)
    with pytest.raises(ValueError, match="sizes differ"):
        sparse.triangular_solve(a, jnp.ones(3))
    with pytest.raises(TypeError, match="dtype"):
        sparse.triangular_solve(a, jnp.ones(4, jnp.int32))


def test_a_long_chain_takes_as_many_rounds_as_it_needs():
    n = 300
    a = sparse.diags([jnp.full(n, 2.0), jnp.full(n - 1, -1.0)], [0, -1])
    x = sparse.triangular_solve(a, jnp.ones(n))
    np.testing.assert_allclose(a @ x, 1.0, 1e-5)


def test_a_zero_on_the_diagonal_is_not_hidden():
    x = sparse.triangular_solve(CSR.from_dense(jnp.array([[1.0, 0], [1, 0]])), jnp.ones(2))
    assert x[0] == 1 and not jnp.isfinite(x[1])


@pytest.mark.parametrize("method", [sparse.cg, sparse.bicgstab, sparse.gmres])
def test_krylov_methods_and_their_gradients(method):
    n = 24
    a = sparse.diags([jnp.full(n, 4.0), jnp.full(n - 1, -1.0), jnp.full(n - 1, -1.0)], [0, 1, -1])
    b = jnp.sin(jnp.arange(n))

    def loss(data):
        return jnp.sum(method(a.with_data(data), b, tolerance=1e-7, max_steps=100) ** 2)

    def dense(data):
        return jnp.sum(jnp.linalg.solve(a.with_data(data).to_dense(), b) ** 2)

    for got, want in zip(
        jax.jit(jax.value_and_grad(loss))(a.data), jax.value_and_grad(dense)(a.data), strict=True
    ):
        np.testing.assert_allclose(got, want, 1e-3, 1e-5)


def test_operators_start_and_preconditioner():
    a = sparse.diags([jnp.array([1.0, 100.0, 10000.0])])
    b, inverse = jnp.ones(3), sparse.diags([1 / jnp.array([1.0, 100.0, 10000.0])])
    for operator in (a, a.to_dense(), lambda x: a @ x):
        x = sparse.cg(operator, b, preconditioner=inverse, max_steps=1)  # exact in one step
        np.testing.assert_allclose(a @ x, b, 1e-4)
    np.testing.assert_array_equal(sparse.cg(a, b, b, max_steps=0), b)
