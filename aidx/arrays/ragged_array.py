"""`Ragged`: rows of unequal length, packed without padding between them, as a frozen pytree.

Row r is `values[offsets[r]:offsets[r + 1]]`.  The length of `values` is a static capacity: rows may
change their lengths within it and nothing is compiled again.  Past the last offset lie zeros.
`values` may itself be a `Ragged`: then a row is a list of rows.

In what follows a `Ragged` of rank k has the virtual shape `[R, (L1), ..., (Lk), *D]`, where
parentheses mark ragged axes; axis numbers count in this shape.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.core import Tracer

from .convert import capacity as _capacity
from .formats import CSR, Array, major_ids


@struct.dataclass
class Ragged:
    """Packed values and the offsets of their rows.

    >>> r = Ragged.from_list([[1.0, 2.0], [], [3.0]])
    >>> r.values.tolist(), r.offsets.tolist()
    ([1.0, 2.0, 3.0], [0, 2, 2, 3])
    >>> (r + jnp.array([[10.0], [20.0], [30.0]])).to_list()
    [[11.0, 12.0], [], [33.0]]
    """

    values: Any  # [capacity, *D], or a Ragged of `capacity` rows
    offsets: Array  # [R + 1] i32, ascending from 0
    __array_ufunc__ = None

    # --- constructors ---

    @classmethod
    def from_list(
        cls,
        rows: Sequence[Any],
        *,
        capacity: int | None = None,
        ragged_rank: int = 1,
        dtype: Any = None,
    ) -> Ragged:
        """Rows as sequences or arrays `[length, *D]`; lists of such with `ragged_rank=2`.

        Args:
          rows: see above.
          capacity: room for values (of the innermost level); what they need by default.
          ragged_rank: levels of raggedness.
          dtype: of the values.

        Raises:
          ValueError: rows that differ in `*D`, or more values than capacity.

        >>> Ragged.from_list([[[1, 2], []], [[3]]], ragged_rank=2).to_list()
        [[[1, 2], []], [[3]]]
        """
        if ragged_rank < 1:
            raise ValueError(f"{ragged_rank=} must be positive")
        lengths = np.array([len(row) for row in rows], np.int32)
        if ragged_rank > 1:
            flat = [item for row in rows for item in row]
            inner = cls.from_list(flat, capacity=capacity, ragged_rank=ragged_rank - 1, dtype=dtype)
            return cls(inner, _offsets_of_lengths(lengths))
        arrays = [np.asarray(row) for row in rows]
        filled = [a for a in arrays if a.size or a.ndim > 1]
        tails = {a.shape[1:] for a in filled}
        if len(tails) > 1:
            raise ValueError(f"rows differ beyond their length: {sorted(tails)}")
        tail = tails.pop() if tails else ()
        parts = filled or [np.zeros((0, *tail), np.float32)]
        packed = np.concatenate([a.reshape(-1, *tail) for a in parts])
        values = jnp.asarray(packed, dtype)
        return cls(_grown(values, capacity), _offsets_of_lengths(lengths))

    @classmethod
    def from_lengths(cls, values: Any, lengths: Any) -> Ragged:
        """Packed values `[capacity, *D]` (or a `Ragged`) and the rows' lengths i32 `[R]`.

        Raises:
          ValueError: lengths that are negative or pass the capacity.

        >>> Ragged.from_lengths(jnp.arange(3), jnp.array([1, 2])).to_list()
        [[0], [1, 2]]
        """
        lengths = _integers("lengths", lengths)
        return cls.from_offsets(values, _offsets_of_lengths(lengths))

    @classmethod
    def from_offsets(cls, values: Any, offsets: Any) -> Ragged:
        """Packed values `[capacity, *D]` (or a `Ragged`) and offsets i32 `[R + 1]`.

        What lies past the last offset becomes zero (rows of a nested `Ragged` become empty).

        Raises:
          ValueError: offsets that do not ascend from 0 to at most the capacity.

        >>> Ragged.from_offsets(jnp.arange(3), jnp.array([0, 1, 2])).values.tolist()
        [0, 1, 0]
        """
        offsets = _integers("offsets", offsets)
        values = values if isinstance(values, Ragged) else jnp.asarray(values)
        return checked(cls(values, offsets)).with_values(values)

    @classmethod
    def from_padded(cls, padded: Any, lengths: Any, *, capacity: int | None = None) -> Ragged:
        """Rows `[R, L, *D]`, of which the first `lengths[r]` are kept.

        Args:
          padded: see above.
          lengths: i32 `[R]`, at most L.
          capacity: room for values; what they need by default, needed under jit, where values
            that do not fit are dropped from the end.

        Raises:
          ValueError: lengths outside [0, L], or capacity is missing or too small.

        >>> Ragged.from_padded(jnp.array([[1, 9], [2, 3]]), jnp.array([1, 2])).to_list()
        [[1], [2, 3]]
        """
        padded, lengths = jnp.asarray(padded), _integers("lengths", lengths)
        if padded.ndim < 2 or lengths.shape != padded.shape[:1]:
            raise ValueError(f"[R, L, *D] and [R] are needed, not {padded.shape=} {lengths.shape=}")
        L = padded.shape[1]
        if not isinstance(lengths, Tracer) and _outside(lengths, L):
            raise ValueError(f"lengths must be in [0, {L}]: {np.asarray(lengths)}")
        capacity = _capacity(capacity, jnp.sum(lengths), "capacity")
        offsets = jnp.minimum(_offsets_of_lengths(lengths), capacity)
        row = major_ids(offsets, capacity)
        place = jnp.arange(capacity, dtype=jnp.int32) - offsets.at[row].get(mode="clip")
        return cls(padded.at[row, place].get(mode="fill", fill_value=0), offsets)

    @classmethod
    def from_segment_ids(cls, values: Any, ids: Any, num_rows: int) -> Ragged:
        """Packed values `[capacity, *D]` and the row of each, ascending; `num_rows` in padding.

        Raises:
          ValueError: ids that do not ascend in [0, num_rows].

        >>> Ragged.from_segment_ids(jnp.arange(3), jnp.array([0, 2, 2]), 3).to_list()
        [[0], [], [1, 2]]
        """
        ids = _integers("ids", ids)
        if not isinstance(ids, Tracer):
            seen = np.asarray(ids)
            if seen.size and ((np.diff(seen) < 0).any() or seen[0] < 0 or seen[-1] > num_rows):
                raise ValueError(f"ids must ascend in [0, {num_rows}]: {seen}")
        counts = jnp.zeros(num_rows, jnp.int32).at[ids].add(1, mode="drop")
        return cls.from_offsets(values, _offsets_of_lengths(counts))

    # --- what it is ---

    @property
    def num_rows(self) -> int:
        """R, static."""
        return self.offsets.shape[0] - 1

    @property
    def capacity(self) -> int:
        """Room for values (rows of the next level, when nested), static."""
        inner = self.values
        return inner.num_rows if isinstance(inner, Ragged) else inner.shape[0]

    @property
    def ragged_rank(self) -> int:
        """Levels of raggedness."""
        return 1 + (self.values.ragged_rank if isinstance(self.values, Ragged) else 0)

    @property
    def flat_values(self) -> Array:
        """The innermost values `[capacity, *D]`."""
        return self.values.flat_values if isinstance(self.values, Ragged) else self.values

    @property
    def ndim(self) -> int:
        """Axes of the virtual shape."""
        return self.ragged_rank + self.flat_values.ndim

    @property
    def dtype(self) -> Any:
        """The dtype of the values."""
        return self.flat_values.dtype

    @property
    def row_lengths(self) -> Array:
        """i32 `[R]`."""
        return jnp.diff(self.offsets)

    @property
    def row_starts(self) -> Array:
        """i32 `[R]`."""
        return self.offsets[:-1]

    @property
    def row_limits(self) -> Array:
        """i32 `[R]`: where rows end."""
        return self.offsets[1:]

    @property
    def value_rowids(self) -> Array:
        """i32 `[capacity]`: the row of every value; R in padding."""
        return major_ids(self.offsets, self.capacity)

    @property
    def total(self) -> Array:
        """i32: values in use."""
        return self.offsets[-1]

    @property
    def used(self) -> Array:
        """bool `[capacity]`: which values belong to a row."""
        return jnp.arange(self.capacity, dtype=jnp.int32) < self.total

    def with_values(self, values: Any) -> Ragged:
        """The same rows over other values of this capacity; padding becomes zero.

        Raises:
          ValueError: another capacity.
        """
        out = Ragged(values, self.offsets)
        if out.capacity != self.capacity:
            raise ValueError(f"{out.capacity} values for rows of capacity {self.capacity}")
        if isinstance(values, Ragged):
            ends = values.offsets.at[self.total].get(mode="clip")
            return Ragged(values._cut(jnp.minimum(values.offsets, ends)), self.offsets)
        return Ragged(_masked(self.used, values), self.offsets)

    def with_flat_values(self, values: Array) -> Ragged:
        """The same rows, on all levels, over other innermost values."""
        if isinstance(self.values, Ragged):
            return Ragged(self.values.with_flat_values(values), self.offsets)
        return self.with_values(values)

    def map_values(self, f: Callable[[Array], Array]) -> Ragged:
        """`f` of the innermost values `[capacity, *D]`, which it must keep apart."""
        return self.with_flat_values(f(self.flat_values))

    def _cut(self, offsets: Array) -> Ragged:
        return Ragged(self.values, offsets).with_values(self.values)

    # --- out ---

    def to_padded(self, max_length: int | Sequence[int] | None = None, *, fill: Any = 0) -> Array:
        """`[R, L, *D]` (`[R, L1, L2, *D]` when nested) with `fill` behind each row.

        Args:
          max_length: L, or one per level; the longest row by default, needed under jit.  Longer
            rows are cut.
          fill: a scalar.

        >>> Ragged.from_list([[1, 2], [3]]).to_padded(fill=-1).tolist()
        [[1, 2], [3, -1]]
        """
        if isinstance(max_length, Sequence):
            lengths: Any = tuple(max_length)
        else:
            lengths = (max_length,) * self.ragged_rank
        if len(lengths) != self.ragged_rank:
            raise ValueError(f"{max_length=} for {self.ragged_rank} ragged axes")
        L = lengths[0]
        if L is None:
            L = _capacity(None, self.row_lengths, "max_length")
        inner = self.values
        if isinstance(inner, Ragged):
            inner = inner.to_padded(lengths[1:], fill=fill)
        place = jnp.arange(L, dtype=jnp.int32)[None, :]
        inside = place < self.row_lengths[:, None]
        rows = inner.at[self.row_starts[:, None] + place].get(mode="clip")
        inside = inside.reshape(*inside.shape, *(1,) * (rows.ndim - 2))
        return jnp.where(inside, rows, jnp.asarray(fill, rows.dtype))

    def to_list(self) -> list[Any]:
        """Nested Python lists (an array that is traced has none)."""
        inner = self.values
        flat = inner.to_list() if isinstance(inner, Ragged) else np.asarray(inner).tolist()
        edges = np.asarray(self.offsets)
        return [flat[a:b] for a, b in itertools.pairwise(edges)]

    def to_csr(self, num_columns: int | None = None) -> CSR:
        """`[R, num_columns]`: the i-th value of a row stands in column i.

        Args:
          num_columns: the longest row by default, needed under jit; values past it are zeroed and
            kept at its last column.

        Raises:
          ValueError: values that are not scalars.

        >>> Ragged.from_list([[1.0, 2.0], [3.0]]).to_csr().to_dense().tolist()
        [[1.0, 2.0], [3.0, 0.0]]
        """
        if self.ragged_rank != 1 or self.values.ndim != 1:
            raise ValueError(f"CSR takes rows of scalars, not {self}")
        N = _capacity(num_columns, self.row_lengths, "num_columns")
        row = self.value_rowids
        place = jnp.arange(self.capacity, dtype=jnp.int32) - self.offsets.at[row].get(mode="clip")
        data = jnp.where(self.used & (place < N), self.values, jnp.zeros((), self.dtype))
        indices = jnp.where(self.used, jnp.minimum(place, N - 1), N)
        return CSR(data, indices, self.offsets, (self.num_rows, N), row)

    def __getitem__(self, r: int) -> Any:
        """Row r, eagerly: an array `[length, *D]`, or a `Ragged` when nested."""
        from .ragged_ops import row

        return row(self, r)

    # --- elementwise ---

    def __add__(self, other: Any) -> Ragged:
        return _binary(jnp.add, self, other)

    def __radd__(self, other: Any) -> Ragged:
        return _binary(jnp.add, other, self)

    def __sub__(self, other: Any) -> Ragged:
        return _binary(jnp.subtract, self, other)

    def __rsub__(self, other: Any) -> Ragged:
        return _binary(jnp.subtract, other, self)

    def __mul__(self, other: Any) -> Ragged:
        return _binary(jnp.multiply, self, other)

    def __rmul__(self, other: Any) -> Ragged:
        return _binary(jnp.multiply, other, self)

    def __truediv__(self, other: Any) -> Ragged:
        return _binary(jnp.divide, self, other)

    def __neg__(self) -> Ragged:
        return self.map_values(jnp.negative)

    def __matmul__(self, other: Any) -> Ragged:
        from .ragged_layers import matmul

        return matmul(self, other)

    def __len__(self) -> int:
        return self.num_rows

    def map(self, f: Callable[[Any], Any], **options: Any) -> Any:
        """`f` of every row, each a `Ragged` of one row; see `aidx.vmap`."""
        from .vmap import vmap

        return vmap(f, **options)(self)


NestedTensor = Ragged
RaggedTensor = Ragged


def checked(x: Ragged) -> Ragged:
    """x, once its offsets are seen to ascend from 0 to at most the capacity, on every level.

    Raises:
      ValueError: they do not (what is traced cannot be seen).

    >>> checked(Ragged(jnp.arange(3), jnp.array([0, 5])))
    Traceback (most recent call last):
        ...
    ValueError: offsets must ascend from 0 to at most capacity=3: [0 5]
    """
    if x.offsets.ndim == 1 and not isinstance(x.offsets, Tracer):
        seen = np.asarray(x.offsets)
        if len(seen) == 0 or seen[0] != 0 or (np.diff(seen) < 0).any() or seen[-1] > x.capacity:
            raise ValueError(f"offsets must ascend from 0 to at most capacity={x.capacity}: {seen}")
    if isinstance(x.values, Ragged):
        checked(x.values)
    return x


def _binary(f: Callable[..., Array], a: Any, b: Any) -> Ragged:
    from .ragged_elementwise import elementwise

    return elementwise(f, a, b)


def _masked(used: Array, values: Array) -> Array:
    used = used.reshape(-1, *(1,) * (values.ndim - 1))
    return jnp.where(used, values, jnp.zeros((), values.dtype))


def _grown(values: Array, capacity: int | None) -> Array:
    size = len(values) if capacity is None else capacity
    if size < len(values):
        raise ValueError(f"capacity={capacity} is too small: {len(values)} values are needed")
    return jnp.pad(values, [(0, size - len(values)), *[(0, 0)] * (values.ndim - 1)])


def _offsets_of_lengths(lengths: Any) -> Array:
    if not isinstance(lengths, Tracer) and (np.asarray(lengths) < 0).any():
        raise ValueError(f"lengths must not be negative: {np.asarray(lengths)}")
    lengths = jnp.asarray(lengths, jnp.int32)
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(lengths, dtype=jnp.int32)])


def _integers(name: str, x: Any) -> Array:
    x = jnp.asarray(x)
    if x.ndim != 1 or not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"{name} must be a vector of integers, not {x.dtype} of {x.shape}")
    return x.astype(jnp.int32)


def _outside(lengths: Array, most: int) -> bool:
    """Whether any is negative or more; by numpy, since jit traces what jnp does with constants."""
    seen = np.asarray(lengths)
    return bool(((seen < 0) | (seen > most)).any())
