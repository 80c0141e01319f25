"""`grad` and `value_and_grad` of pytrees that also hold integers: sparse and ragged arguments.

`jax.grad` refuses integer leaves, so a sparse matrix could only be differentiated through `.data`.
Here the floating leaves are differentiated and the others are passed along, and the gradient has
the class and the pattern of the argument.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp


def value_and_grad(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    holomorphic: bool = False,
) -> Callable[..., Any]:
    """`f` and its gradient with respect to the floating (and complex) leaves of its arguments.

    Args:
      f: a function to a scalar; with `has_aux` to `(scalar, aux)`.
      argnums: which positional arguments; any pytrees.
      has_aux: see above.
      holomorphic: as `jax.grad`'s.

    Returns:
      A function of the same arguments to `(value, gradient)`: the gradient of an argument is the
      argument with every floating leaf replaced by its gradient, all others as they were.

    Raises:
      TypeError: an argument without a floating leaf.

    >>> import jax.numpy as jnp
    >>> from aidx.arrays import CSR
    >>> a = CSR.from_dense(jnp.array([[0.0, 2.0], [3.0, 0.0]]))
    >>> value, g = value_and_grad(lambda a, x: (a @ x).sum())(a, jnp.array([1.0, 10.0]))
    >>> float(value), type(g).__name__, g.data.tolist(), g.indices.tolist()
    (23.0, 'CSR', [10.0, 1.0], [1, 0])
    """
    one = isinstance(argnums, int)
    wanted = (argnums,) if one else tuple(argnums)

    @functools.wraps(f)
    def differentiated(*args: Any, **kwargs: Any) -> Any:
        places = _places(wanted, len(args))
        split = [partition(args[i]) for i in places]
        for i, (floats, _) in zip(places, split, strict=True):
            if not jax.tree.leaves(floats):
                raise TypeError(f"argument {i} has no floating leaf to differentiate: {args[i]!r}")

        def of_floats(floats: Any) -> Any:
            full = list(args)
            for i, part, (_, rest) in zip(places, floats, split, strict=True):
                full[i] = combine(part, rest)
            return f(*full, **kwargs)

        g = jax.value_and_grad(of_floats, has_aux=has_aux, holomorphic=holomorphic)
        value, grads = g([floats for floats, _ in split])
        out = tuple(combine(g, rest) for g, (_, rest) in zip(grads, split, strict=True))
        return value, out[0] if one else out

    return differentiated


def grad(
    f: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    has_aux: bool = False,
    holomorphic: bool = False,
) -> Callable[..., Any]:
    """The gradient half of `value_and_grad` (with `has_aux`, `(gradient, aux)`).

    >>> import jax.numpy as jnp
    >>> from aidx.arrays import COO
    >>> a = COO.from_dense(jnp.eye(2))
    >>> grad(lambda a: (a.data ** 2).sum())(a).data.tolist()
    [2.0, 2.0]
    """
    both = value_and_grad(f, argnums, has_aux=has_aux, holomorphic=holomorphic)

    @functools.wraps(f)
    def gradient(*args: Any, **kwargs: Any) -> Any:
        value, grads = both(*args, **kwargs)
        return (grads, value[1]) if has_aux else grads

    return gradient


def partition(tree: Any) -> tuple[Any, Any]:
    """(the tree with its floating leaves, None elsewhere; the tree with the others).

    What an optimizer may touch is the first part: `optax` updates it, `combine` puts it back.

    >>> partition({"w": 1.0, "steps": 3})
    ({'steps': None, 'w': 1.0}, {'steps': 3, 'w': None})
    """
    floats = jax.tree.map(lambda x: x if _differentiable(x) else None, tree)
    others = jax.tree.map(lambda x: None if _differentiable(x) else x, tree)
    return floats, others


def combine(floats: Any, others: Any) -> Any:
    """The tree that `partition` split.

    >>> combine(*partition({"w": 1.0, "steps": 3}))
    {'steps': 3, 'w': 1.0}
    """
    pick = lambda x, y: y if x is None else x
    return jax.tree.map(pick, floats, others, is_leaf=lambda x: x is None)


def _differentiable(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        return isinstance(x, float | complex)
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def _places(argnums: tuple[int, ...], count: int) -> list[int]:
    for i in argnums:
        if not -count <= i < count:
            raise ValueError(f"argnums={argnums} with {count} positional arguments")
    return [i % count for i in argnums]
