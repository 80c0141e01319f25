"""Gradients of an embedding table as the rows that were looked up, and optimizers over them.

A batch touches a few thousand of a hundred thousand rows; a dense gradient and a dense optimizer
step write all of them.  `embedding_value_and_grad` gives the touched rows only, `update_rows` moves
only their parameters and their optimizer state, whatever the optax optimizer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from .autodiff import value_and_grad
from .formats import Array


@struct.dataclass
class RowSparse:
    """A `[V, D]` array that is zero but for a few whole rows, each stored once.

    >>> import jax.numpy as jnp
    >>> RowSparse(jnp.ones((2, 1)), jnp.array([2, 3]), (3, 1)).to_dense().tolist()
    [[0.0], [0.0], [1.0]]
    """

    values: Array  # [capacity, D]
    rows: Array  # [capacity] i32, distinct and ascending; V in padding
    shape: tuple[int, int] = struct.field(pytree_node=False)

    @property
    def dtype(self) -> Any:
        """The dtype of the values."""
        return self.values.dtype

    def to_dense(self) -> Array:
        """`[V, D]`."""
        zeros = jnp.zeros(self.shape, self.dtype)
        return zeros.at[self.rows].add(self.values, mode="drop")


def distinct_rows(ids: Array, vocab_size: int, capacity: int | None = None) -> tuple[Array, Array]:
    """The distinct ids, and where each id stands among them.

    Args:
      ids: i32 of any shape; ids outside `[0, vocab_size)` are dropped.
      vocab_size: V.
      capacity: room for distinct ids; `min(ids.size, V)`, which always suffices, by default.

    Returns:
      (rows i32 `[capacity]` ascending, padded with V; places i32 in the shape of ids, `capacity`
      where an id is dropped or does not fit).

    >>> import jax.numpy as jnp
    >>> rows, places = distinct_rows(jnp.array([7, 2, 7]), 10)
    >>> rows.tolist(), places.tolist()
    ([2, 7, 10], [1, 0, 1])
    """
    capacity = min(ids.size, vocab_size) if capacity is None else capacity
    valid = (ids >= 0) & (ids < vocab_size)
    flat = jnp.where(valid, ids, vocab_size).astype(jnp.int32).reshape(-1)
    ordered = jnp.sort(flat)
    first = jnp.ones(flat.shape[0], bool).at[1:].set(ordered[1:] != ordered[:-1])
    place = jnp.where(first & (ordered < vocab_size), jnp.cumsum(first) - 1, capacity)
    rows = jnp.full(capacity, vocab_size, jnp.int32).at[place].set(ordered, mode="drop")
    found = jnp.searchsorted(rows, flat).astype(jnp.int32)
    there = rows.at[found].get(mode="fill", fill_value=-1) == flat
    place = jnp.where(there & (flat < vocab_size), found, capacity)
    return rows, place.reshape(ids.shape)


def embedding_value_and_grad(
    loss: Callable[..., Any],
    *,
    capacity: int | None = None,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """`loss` of looked-up embeddings, with the gradient of the table as a `RowSparse`.

    Args:
      loss: `(embedded [*ids.shape, D], params, *rest) -> scalar` (or `(scalar, aux)`).
      capacity: room for distinct rows; `min(ids.size, V)` by default.  Ids past it embed as zeros
        and get no gradient: choose a bound that holds.
      has_aux: see above.

    Returns:
      `(table [V, D], ids, params, *rest) -> (value, (RowSparse, gradient of params))`; the
      gradient of params is None when params is None.

    >>> import jax.numpy as jnp
    >>> f = embedding_value_and_grad(lambda e, params: (e ** 2).sum())
    >>> _, (g, _) = f(jnp.ones((5, 1)), jnp.array([3, 1, 3]), None)
    >>> g.rows.tolist(), g.values.ravel().tolist()
    ([1, 3, 5], [2.0, 4.0, 0.0])
    """

    def differentiated(table: Array, ids: Array, params: Any, *rest: Any) -> Any:
        if table.ndim != 2 or not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"table [V, D] and integer ids are needed: {table.shape=} {ids.dtype}")
        V, D = table.shape
        rows, places = distinct_rows(ids, V, capacity)

        def of_rows(values: Array, params: Any) -> Any:
            return loss(values.at[places].get(mode="fill", fill_value=0), params, *rest)

        with jax.named_scope("embedding_rows"):
            values = table.at[rows].get(mode="fill", fill_value=0)
        if params is None:
            value, g = value_and_grad(of_rows, has_aux=has_aux)(values, params)
            return value, (RowSparse(g, rows, (V, D)), None)
        value, grads = value_and_grad(of_rows, (0, 1), has_aux=has_aux)(values, params)
        return value, (RowSparse(grads[0], rows, (V, D)), grads[1])

    return differentiated


def update_rows(optimizer: Any, grads: RowSparse, state: Any, table: Array) -> tuple[Array, Any]:
    """One optimizer step on the rows of `grads`, others and their state untouched.

    Args:
      optimizer: an `optax.GradientTransformation`, or a pair of functions like it.
      grads: the gradient of table.
      state: `optimizer.init(table)`, or what came back last.
      table: `[V, D]`.

    Returns:
      (table, state).  Touched rows move as in a dense step from the same state; step counts and
      other scalars advance; untouched rows keep their moments undecayed ("lazy").

    Raises:
      ValueError: the state holds an array that is neither a scalar nor of table's shape, so it
        has no rows to pick (a factored second moment).

    >>> import jax.numpy as jnp
    >>> import optax
    >>> table, sgd = jnp.ones((3, 1)), optax.sgd(0.5, momentum=0.9)
    >>> g = RowSparse(jnp.ones((1, 1)), jnp.array([1]), (3, 1))
    >>> update_rows(sgd, g, sgd.init(table), table)[0].ravel().tolist()
    [1.0, 0.5, 1.0]
    """
    if grads.shape != table.shape:
        raise ValueError(f"{grads.shape=} is the gradient of another table than {table.shape=}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if jnp.shape(leaf) not in ((), table.shape):
            name = jax.tree_util.keystr(path)
            raise ValueError(f"state{name} of {jnp.shape(leaf)} has no rows of {table.shape}")
    rows = grads.rows
    pick = lambda x: x.at[rows].get(mode="fill", fill_value=0) if jnp.ndim(x) else x
    put = lambda old, new: old.at[rows].set(new, mode="drop") if jnp.ndim(old) else new
    with jax.named_scope("update_rows"):
        params, local = pick(table), jax.tree.map(pick, state)
        updates, moved = optimizer.update(grads.values, local, params)
        table = put(table, (params + updates).astype(table.dtype))
        return table, jax.tree.map(put, state, moved)
