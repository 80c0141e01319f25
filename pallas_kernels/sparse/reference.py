"""What the kernels compute, in jax.numpy."""

import jax
import jax.numpy as jnp


def block_matmul(data, x, minor, indptr, *, order=None, turned=False) -> jax.Array:
    """`block_matmul` with a block row at a time, in f32.

    >>> a = jnp.ones((1, 2, 2))
    >>> block_matmul(a, jnp.ones((4, 1)), jnp.array([1]), jnp.array([0, 0, 1])).ravel().tolist()
    [0.0, 0.0, 2.0, 2.0]
    """
    data = data if order is None else data[order]
    data = (data.swapaxes(1, 2) if turned else data).astype(jnp.float32)
    nse, height, width = data.shape
    rows = indptr.shape[0] - 1
    row = jnp.searchsorted(indptr[1:], jnp.arange(nse), side="right")
    taken = x.astype(jnp.float32).reshape(-1, width, x.shape[1])[minor]
    used = (jnp.arange(nse) < indptr[-1])[:, None, None]
    terms = jnp.where(used, jnp.matmul(data, taken, precision="highest"), 0)
    out = jnp.zeros((rows, height, x.shape[1]), jnp.float32).at[row].add(terms, mode="drop")
    return out.reshape(rows * height, -1).astype(x.dtype)


def block_sample(g, x, row, column, *, block) -> jax.Array:
    """`block_sample` by the whole product, in f32.

    >>> one = jnp.array([0])
    >>> block_sample(jnp.ones((2, 3)), jnp.ones((4, 3)), one, one, block=(2, 2)).tolist()
    [[[3.0, 3.0], [3.0, 3.0]]]
    """
    (bh, bw), wide = block, jnp.float32
    whole = jnp.matmul(g.astype(wide), x.astype(wide).T, precision="highest").astype(g.dtype)
    tiles = whole.reshape(g.shape[0] // bh, bh, -1, bw).swapaxes(1, 2)
    rows, columns = tiles.shape[:2]
    out = tiles[jnp.minimum(row, rows - 1), jnp.minimum(column, columns - 1)]
    return jnp.where((row < rows)[:, None, None], out, 0)
