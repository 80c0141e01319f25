"""Linear systems: triangular by levels, others by Krylov methods; all differentiable.

Gradients are implicit: from `A x = b` follow `dx = A^-1 (db - dA x)` and its transpose, so a solve
costs one more solve to differentiate, and the gradient of A keeps A's pattern.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.scipy.sparse import linalg

from .construct import diagonal
from .elementwise import tril, triu
from .formats import Array, SparseMatrix
from .matmul import matmul

Operator = SparseMatrix | Array | Callable[[Array], Array]


def triangular_solve(
    a: SparseMatrix,
    b: Array,
    *,
    lower: bool = True,
    unit_diagonal: bool = False,
    transpose: bool = False,
) -> Array:
    r"""x of `A x = b` (or `A^T x = b`) for a triangular A.

    Repeats $x \leftarrow D^{-1} (b - (A - D) x)$ until nothing changes.  A - D is nilpotent, so an
    unknown is final once those it needs are: the number of rounds is the number of levels of the
    dependency graph (Anderson & Saad, 1989), and every round is one sparse product.

    Args:
      a: square, any format or a stack; the other triangle is not read.
      b: `[*batch, n]` or `[*batch, n, k]`, of a's dtype.
      lower: which triangle.
      unit_diagonal: the diagonal counts as ones and is not read.
      transpose: solve with the transpose of that triangle.

    Returns:
      x in the shape of b; inf or NaN where the diagonal holds a zero.

    Raises:
      ValueError: sizes that do not fit.
      TypeError: dtypes other than one floating or complex dtype.

    >>> import jax.numpy as jnp
    >>> from aidx.arrays import CSR
    >>> a = CSR.from_dense(jnp.array([[2.0, 0.0], [1.0, 4.0]]))
    >>> triangular_solve(a, jnp.array([2.0, 9.0])).tolist()
    [1.0, 2.0]
    """
    n, lead = a.shape[0], a.batch_shape
    core = b.shape[len(lead) :]
    if a.shape != (n, n) or b.shape[: len(lead)] != lead or len(core) not in (1, 2):
        raise ValueError(f"{a.shape=} of stack {lead} cannot be solved for {b.shape=}")
    if core[0] != n:
        raise ValueError(f"sizes differ: {a.shape=} and {b.shape=}")
    if not jnp.issubdtype(a.dtype, jnp.inexact) or a.dtype != b.dtype:
        raise TypeError(f"one floating or complex dtype is needed: {a.dtype=} and {b.dtype=}")
    if transpose:
        a, lower = a.T, not lower
    f = functools.partial(_triangular_solve, lower=lower, unit_diagonal=unit_diagonal)
    for _ in lead:
        f = jax.vmap(f)
    return f(a, b)


@functools.partial(jax.jit, static_argnames=("lower", "unit_diagonal"))
def _triangular_solve(a: SparseMatrix, b: Array, *, lower: bool, unit_diagonal: bool) -> Array:
    strict = tril(a, -1) if lower else triu(a, 1)
    inner = jnp.ones(a.shape[0], a.dtype) if unit_diagonal else diagonal(a)
    inner = inner if b.ndim == 1 else inner[:, None]

    def apply(m: SparseMatrix, x: Array) -> Array:
        return inner * x + matmul(m, x)

    def sweep(m: SparseMatrix, b: Array) -> Array:
        with jax.named_scope("triangular_solve"):
            step = lambda x: (b - matmul(m, x)) / inner
            same = lambda x, y: jnp.all((x == y) | (jnp.isnan(x) & jnp.isnan(y)))
            # A level settles in every round: n rounds always suffice.
            more = lambda c: (c[0] < a.shape[0]) & ~same(c[1], c[2])
            again = lambda c: (c[0] + 1, c[2], step(c[2]))
            first = b / inner
            return jax.lax.while_loop(more, again, (jnp.int32(0), first, step(first)))[2]

    return jax.lax.custom_linear_solve(
        functools.partial(apply, strict),
        b,
        solve=lambda _, b: sweep(jax.lax.stop_gradient(strict), b),
        transpose_solve=lambda _, b: sweep(jax.lax.stop_gradient(strict).T, b),
    )


def cg(
    a: Operator,
    b: Any,
    x0: Any = None,
    *,
    tolerance: float = 1e-5,
    absolute_tolerance: float = 0.0,
    max_steps: int | None = None,
    preconditioner: Operator | None = None,
) -> Array:
    """x of `A x = b` for a Hermitian positive definite A, by conjugate gradients.

    Args:
      a: a sparse matrix, a dense one, or a linear function of x.
      b: `[n]` or any pytree that the function takes.
      x0: where to start; zeros when not given.
      tolerance: stops at a residual of `max(tolerance * |b|, absolute_tolerance)`.
      absolute_tolerance: see above.
      max_steps: 10 times the number of unknowns when not given.
      preconditioner: an approximate inverse, in the same forms as a.

    Returns:
      x; check the residual where convergence is not certain.

    Hestenes & Stiefel, Methods of Conjugate Gradients for Solving Linear Systems, 1952.

    >>> import jax.numpy as jnp
    >>> from aidx.arrays import CSR
    >>> a = CSR.from_dense(jnp.array([[4.0, 1.0], [1.0, 3.0]]))
    >>> [f"{v:.4f}" for v in cg(a, jnp.array([1.0, 2.0]))]
    ['0.0909', '0.6364']
    """
    options = _options(tolerance, absolute_tolerance, max_steps, preconditioner)
    return linalg.cg(operator(a), b, x0, **options)[0]


def bicgstab(
    a: Operator,
    b: Any,
    x0: Any = None,
    *,
    tolerance: float = 1e-5,
    absolute_tolerance: float = 0.0,
    max_steps: int | None = None,
    preconditioner: Operator | None = None,
) -> Array:
    """x of `A x = b` for any square A, by stabilised bi-conjugate gradients.

    Takes and returns what `cg` does.

    van der Vorst, Bi-CGSTAB, 1992.

    >>> import jax.numpy as jnp
    >>> from aidx.arrays import CSR
    >>> a = CSR.from_dense(jnp.array([[4.0, 1.0], [0.0, 2.0]]))
    >>> [f"{v:.4f}" for v in bicgstab(a, jnp.array([6.0, 4.0]))]
    ['1.0000', '2.0000']
    """
    options = _options(tolerance, absolute_tolerance, max_steps, preconditioner)
    return linalg.bicgstab(operator(a), b, x0, **options)[0]


def gmres(
    a: Operator,
    b: Any,
    x0: Any = None,
    *,
    tolerance: float = 1e-5,
    absolute_tolerance: float = 0.0,
    restart: int = 20,
    max_steps: int | None = None,
    preconditioner: Operator | None = None,
) -> Array:
    """x of `A x = b` for any square A, by generalised minimal residuals.

    Takes and returns what `cg` does; `restart` bounds the Krylov space that is kept, `max_steps`
    the number of restarts.

    Saad & Schultz, GMRES, 1986.

    >>> import jax.numpy as jnp
    >>> from aidx.arrays import CSR
    >>> a = CSR.from_dense(jnp.array([[4.0, 1.0], [0.0, 2.0]]))
    >>> [f"{v:.4f}" for v in gmres(a, jnp.array([6.0, 4.0]))]
    ['1.0000', '2.0000']
    """
    options = _options(tolerance, absolute_tolerance, max_steps, preconditioner)
    options |= dict(restart=restart, solve_method="incremental")
    return linalg.gmres(operator(a), b, x0, **options)[0]


def _options(
    tolerance: float, absolute: float, steps: int | None, preconditioner: Operator | None
) -> dict[str, Any]:
    """What the three methods call their options in JAX."""
    M = None if preconditioner is None else operator(preconditioner)
    return dict(tol=tolerance, atol=absolute, maxiter=steps, M=M)


def operator(a: Operator) -> Callable[[Array], Array]:
    """`a` as a linear function of a vector.

    >>> import jax.numpy as jnp
    >>> from aidx.arrays import CSR
    >>> operator(CSR.from_dense(jnp.eye(2)))(jnp.ones(2)).tolist()
    [1.0, 1.0]
    """
    if isinstance(a, SparseMatrix) or not callable(a):
        return lambda x: a @ x
    return a
