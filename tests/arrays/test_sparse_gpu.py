"""Which kernels products take on CUDA (lowered on any machine), and on a GPU what they give."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.arrays import BSC, BSR, COO, CSC, CSR, grad, sparse

M, N = 256, 384


def matrix(cls, dtype=jnp.float32, nse=2000):
    """Random entries, duplicates of none, padded; blocks of 64."""
    a = sparse.resize(sparse.random(jax.random.key(0), (M, N), nse=nse, dtype=dtype), nse + 50)
    if cls in (BSR, BSC):
        a = sparse.random(jax.random.key(0), (M, N), nse=10, dtype=dtype)
        a = a.to_bsr((64, 64)) if cls is BSR else a.T.to_bsr((64, 64)).T
        return sparse.resize(a, a.nse + 2)
    return {CSR: CSR.to_csr, CSC: CSR.to_csc, COO: CSR.to_coo}[cls](a)


def operands(cls, dtype, n=32):
    x, y = (jax.random.normal(jax.random.key(i), (s, n), dtype) for i, s in ((1, N), (2, M)))
    return matrix(cls, dtype), x, y


def kernels(f, *args):
    """How many Pallas kernels f takes on CUDA."""
    text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return text.count('call_target_name = "mosaic_gpu') or text.count("@mosaic_gpu_v2")


def loss(a, x, y, implementation=None):
    product = sparse.matmul(a, x, implementation=implementation)
    return jnp.sum(y.astype(jnp.float32) * product.astype(jnp.float32) ** 2)


CASES = [(c, jnp.float32) for c in (CSR, CSC, COO)] + [
    (CSR, jnp.bfloat16),
    (BSR, jnp.bfloat16),
    (BSC, jnp.bfloat16),
]
every_case = pytest.mark.parametrize(("cls", "dtype"), CASES, ids=lambda x: x.__name__)


@pytest.mark.smoke
@every_case
def test_a_product_and_both_gradients_are_one_kernel_each_on_cuda(cls, dtype):
    args = operands(cls, dtype)
    assert kernels(sparse.matmul, *args[:2]) == 1
    assert kernels(grad(loss, (0, 1)), *args) == 3
    assert kernels(lambda a, x, y: sparse.sampled_matmul(a, y, x.T).data, *args) == 1
    other = functools.partial(sparse.matmul, implementation="xla")
    assert kernels(other, *args[:2]) == 0


def test_what_the_kernels_lack_goes_elsewhere():
    a, x, _ = operands(CSR, jnp.float32)
    assert kernels(sparse.matmul, a.astype(jnp.complex64), x.astype(jnp.complex64)) == 0
    b = sparse.random(jax.random.key(0), (M, N), nse=10).to_bsr((16, 16))
    assert kernels(sparse.matmul, b.astype(jnp.bfloat16), x.astype(jnp.bfloat16)) == 0
    assert kernels(sparse.matmul, b.to_bsr((64, 64)), x) == 0  # f32 blocks are not rounded


def test_a_vector_has_kernels_of_its_own():
    a, x, _ = operands(CSR, jnp.float32)
    for matrix, kernel in ((a, "vector_matmul"), (a.T, "vector_scatter")):
        f, v = jax.jit(sparse.matmul), x[:, 0] if matrix is a else jnp.ones(M)
        lowered = f.trace(matrix, v).lower(lowering_platforms=("cuda",))
        assert kernels(sparse.matmul, matrix, v) == 1
        assert kernel in lowered.as_text(debug_info=True)


def test_a_choice_for_a_product_leaves_its_gradient_others():
    """Eigen has no transposed product and no sampled one: the gradient takes XLA's."""
    a, x, y = operands(CSR, jnp.float32)
    mine = grad(functools.partial(loss, implementation="eigen"), (0, 1))(a, x, y)
    theirs = grad(functools.partial(loss, implementation="xla"), (0, 1))(a, x, y)
    np.testing.assert_allclose(mine[0].data, theirs[0].data, 1e-4, 1e-3)
    np.testing.assert_allclose(mine[1], theirs[1], 1e-4, 1e-3)


# --- on a GPU (Hopper) ----------------------------------------------------------------------------


def close(got, want, tolerance):
    got, want = (np.asarray(v, np.float32) for v in (got, want))
    np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


@pytest.mark.gpu
@pytest.mark.parametrize("n", [1, 32, 100])
@every_case
def test_values_and_derivatives_on_a_gpu(cls, dtype, n):
    a, x, y = operands(cls, dtype, n)
    dense, wide = a.to_dense().astype(jnp.float32), x.astype(jnp.float32)
    tolerance = 1e-4 if dtype == jnp.float32 else 2e-2
    with jax.default_matmul_precision("highest"):
        want = loss_of_dense(dense, wide, y), *jax.grad(loss_of_dense, (0, 1))(dense, wide, y)
        close(jax.jit(sparse.matmul)(a, x), dense @ wide, tolerance)
        close(jax.jit(loss)(a, x, y), want[0], tolerance)
        ga, gx = jax.jit(grad(loss, (0, 1)))(a, x, y)
        close(ga.data, sparse.sample(want[1], a).data, tolerance)
        close(gx, want[2], tolerance)
        sampled = sparse.sampled_matmul(a, y, x.T).data
        close(sampled, sparse.sample(y.astype(jnp.float32) @ wide.T, a).data, tolerance)


def loss_of_dense(a, x, y):
    return jnp.sum(y.astype(jnp.float32) * (a @ x) ** 2)


@pytest.mark.gpu
@pytest.mark.parametrize("cls", [CSR, CSC])
@pytest.mark.parametrize("n", [1, 32])
def test_cusparse_passes_over_padding(cls, n):
    a, x, _ = operands(cls, jnp.float32, n)
    padding = jnp.arange(a.nse) >= a.nnz  # what a cotangent of a sampled product may hold
    a = a.with_data(jnp.where(padding, 7.0, a.data))
    got = jax.jit(functools.partial(sparse.matmul, implementation="cusparse"))(a, x)
    close(got, sparse.matmul(a, x, implementation="xla"), 1e-5)
