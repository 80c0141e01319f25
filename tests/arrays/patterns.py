"""Random patterns of one static shape and capacity, so that hypothesis compiles nothing anew."""

import jax.numpy as jnp
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from aidx.arrays import BSC, BSR, COO, CSC, CSR

M, N, NSE = 4, 6, 10  # of every random matrix here
BLOCK = (2, 3)
FORMATS = [COO, CSR, CSC, BSR, BSC]
few = settings(max_examples=20, deadline=None, database=None, derandomize=True)


@st.composite
def entries(draw, dtype=np.float32, *, distinct=False, shape=(M, N), nse=NSE):
    """(rows, columns, values) of up to `nse` entries: empty rows, duplicates, any order."""
    places = st.tuples(st.integers(0, shape[0] - 1), st.integers(0, shape[1] - 1))
    at = draw(st.lists(places, max_size=nse, unique=distinct))
    values = draw(st.lists(st.integers(-4, 4), min_size=len(at), max_size=len(at)))
    rows = np.array([r for r, _ in at], np.int32)
    cols = np.array([c for _, c in at], np.int32)
    values = np.array(values, np.float64)
    if np.issubdtype(dtype, np.complexfloating):
        values = values * (1 - 0.5j)
    return rows, cols, values.astype(dtype)


def dense_of(parts, shape=(M, N)):
    rows, cols, values = parts
    out = np.zeros(shape, np.complex128 if np.iscomplexobj(values) else np.float64)
    np.add.at(out, (rows, cols), values)
    return out


def build(cls, parts, shape=(M, N), nse=NSE):
    """`cls` of these entries, padded to `nse` (BSR, BSC: to all blocks)."""
    rows, cols, values = parts
    pad = nse - len(rows)
    coo = COO.from_parts(
        jnp.asarray(np.pad(values, (0, pad))),
        np.pad(rows, (0, pad), constant_values=shape[0]),
        np.pad(cols, (0, pad), constant_values=shape[1]),
        shape,
    )
    blocks = (shape[0] // BLOCK[0]) * (shape[1] // BLOCK[1])
    if cls is BSR:
        return coo.to_bsr(BLOCK, nse=blocks)
    if cls is BSC:
        return coo.T.to_bsr(BLOCK[::-1], nse=blocks).T
    return {COO: COO.to_coo, CSR: COO.to_csr, CSC: COO.to_csc}[cls](coo)


def close(actual, expected, dtype=np.float32, **kwargs):
    """Within a few roundings of the dtype."""
    eps = float(jnp.finfo(dtype).eps) if jnp.issubdtype(dtype, jnp.inexact) else 0.0
    wide = np.complex128 if np.iscomplexobj(expected) else np.float64
    kwargs = {"rtol": 16 * eps, "atol": 64 * eps} | kwargs
    np.testing.assert_allclose(np.asarray(actual).astype(wide), expected, **kwargs)


def ids(x):
    return x.__name__ if isinstance(x, type) else str(x)
