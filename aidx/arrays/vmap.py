"""`vmap`: `jax.vmap` with bounded memory, keys split for you, and ragged and sparse arguments.

A call is brought to one form, a flat list of arrays with one axis each (`_Plan`), and run in one
go, in chunks (`lax.map` over slices) or, with ragged arguments, in buckets of rows of like length.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .formats import Array
from .ragged_array import Ragged
from .vmap_axes import along, is_axis, is_unit, unit_axes
from .vmap_ragged import Bucket, buckets_of, merge_outputs, rows_as_stack


def vmap(
    f: Callable[..., Any],
    in_axes: Any = 0,
    out_axes: Any = 0,
    *,
    kwarg_axes: Mapping[str, Any] | int | None = 0,
    chunk_size: int | None = None,
    randomness: Literal["error", "same", "different"] = "error",
    axis_name: Hashable | None = None,
    axis_size: int | None = None,
    spmd_axis_name: Any = None,
    ragged: Literal["bucket", "segment"] = "bucket",
    max_length: int | None = None,
) -> BatchedFunction:
    """`f` over a batch axis of its arguments.

    Args:
      f: a function of pytrees to a pytree.
      in_axes: the axis to map per positional argument, None for none: an int for all, or a tuple of
        ints, None and trees that are prefixes of the arguments.  Negative axes count from the end.
        A stack of sparse matrices is mapped along its leading axes; an entry may also be a matrix
        of axes (`pattern.replace(data=0, indices=None, ...)`).
      out_axes: where the mapped axis goes, a prefix of the result; None for a result that does not
        depend on it.
      kwarg_axes: the same for keyword arguments: one axis for all, or by name (others unmapped).
      chunk_size: elements computed at a time; memory is that of a chunk, in the gradient too.  The
        last chunk overlaps the one before it where the sizes do not divide.
      randomness: what happens to keys (`jax.random.key`) that are not mapped: an error, the same
        key for every element, or one split off for each.
      axis_name: as `jax.vmap`'s; collectives need the whole axis, so not with chunk_size.
      axis_size: as `jax.vmap`'s; needed where nothing is mapped.
      spmd_axis_name: as `jax.vmap`'s.
      ragged: how a mapped `Ragged` is taken apart.  "bucket": f gets each row as a `Ragged` of one
        row; rows run together with those of the same power-of-two length, and ragged results are
        packed again.  "segment": f gets the whole `Ragged` once, for functions that keep rows
        apart by themselves (all of `aidx.arrays`).
      max_length: bound of a row's length for "bucket" under jit, where rows share one bucket;
        longer rows are cut.

    Returns:
      A `BatchedFunction`.

    Raises:
      ValueError: sizes that differ (naming the argument), axes out of range, an unmapped key under
        randomness="error", or options that exclude each other.

    >>> vmap(lambda x, y: x + y, in_axes=(0, None), chunk_size=2)(jnp.arange(3), 10).tolist()
    [10, 11, 12]
    """
    return BatchedFunction(
        f,
        in_axes=in_axes,
        out_axes=out_axes,
        kwarg_axes=kwarg_axes,
        chunk_size=chunk_size,
        randomness=randomness,
        axis_name=axis_name,
        axis_size=axis_size,
        spmd_axis_name=spmd_axis_name,
        ragged=ragged,
        max_length=max_length,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class BatchedFunction:
    """What `vmap` returns: the function and how it is mapped, callable.

    >>> double = BatchedFunction(lambda x: 2 * x, chunk_size=2)
    >>> double(jnp.arange(3)).tolist(), double.replace(chunk_size=None).chunk_size
    ([0, 2, 4], None)
    """

    f: Callable[..., Any]
    in_axes: Any = 0
    out_axes: Any = 0
    kwarg_axes: Mapping[str, Any] | int | None = 0
    chunk_size: int | None = None
    randomness: str = "error"
    axis_name: Hashable | None = None
    axis_size: int | None = None
    spmd_axis_name: Any = None
    ragged: str = "bucket"
    max_length: int | None = None

    def __post_init__(self):
        if self.randomness not in ("error", "same", "different"):
            raise ValueError(f"randomness={self.randomness!r} is none of error, same, different")
        if self.ragged not in ("bucket", "segment"):
            raise ValueError(f"ragged={self.ragged!r} is neither bucket nor segment")
        if self.chunk_size is not None and self.chunk_size < 1:
            raise ValueError(f"chunk_size={self.chunk_size} must be positive")
        if self.chunk_size is not None and self.axis_name is not None:
            raise ValueError("collectives over axis_name would see a chunk only: drop chunk_size")

    def replace(self, **changes: Any) -> BatchedFunction:
        """The same function mapped in another way."""
        return dataclasses.replace(self, **changes)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`f` over the batch."""
        named = _named_axes(self, args, kwargs)
        ragged = [x for _, x, axis in named if isinstance(x, Ragged) and axis is not None]
        if ragged and self.ragged == "segment":
            return _whole(self, named, args, kwargs)
        size = _batch_size(self, named)
        leaves, axes = _flatten(self, named, size)
        tree = jax.tree.structure((args, kwargs))
        out_leaves, out_tree = jax.tree.flatten(self.out_axes, is_leaf=is_axis)
        plan = _Plan(
            self.f,
            tree,
            tuple(axes),
            (tuple(out_leaves), out_tree),
            size,
            self.chunk_size,
            self.axis_name,
            self.spmd_axis_name,
        )
        if any(isinstance(x, Ragged) and x.offsets.ndim == 1 for x in ragged):
            out = _run_buckets(plan, leaves, named, self.max_length)
        else:
            out = _run(plan, leaves)
        return _place_outputs(self.out_axes, out)


# --- from arguments to a flat form ---------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Plan:
    """A call with its arrays left out; hashable, so that chunks and buckets compile once."""

    f: Callable[..., Any]
    tree: Any  # of (args, kwargs)
    axes: tuple[int | None, ...]  # per leaf
    out_axes: tuple[tuple[Any, ...], Any]  # the prefix, flattened
    size: int
    chunk_size: int | None
    axis_name: Hashable | None
    spmd_axis_name: Any

    def batched(self, size: int) -> Callable[..., Any]:
        """The function of the leaves, mapped over `size` elements at once, batch axes first."""

        def of_leaves(*leaves: Any) -> Any:
            args, kwargs = jax.tree.unflatten(self.tree, leaves)
            return self.f(*args, **kwargs)

        axes, tree = self.out_axes
        first = jax.tree.unflatten(tree, [None if a is None else 0 for a in axes])
        return jax.vmap(
            of_leaves,
            in_axes=self.axes,
            out_axes=first,
            axis_name=self.axis_name,
            axis_size=size,
            spmd_axis_name=self.spmd_axis_name,
        )


def _named_axes(b: BatchedFunction, args: Any, kwargs: Any) -> list[tuple[str, Any, Any]]:
    """(path, array or container, its axis or tree of axes), in flattening order."""
    in_axes = b.in_axes
    if isinstance(in_axes, list):
        in_axes = tuple(in_axes)
    if is_axis(in_axes):
        in_axes = (in_axes,) * len(args)
    if not isinstance(in_axes, tuple) or len(in_axes) != len(args):
        raise ValueError(f"{in_axes=} for {len(args)} positional arguments")
    if is_axis(b.kwarg_axes):
        by_name = {name: b.kwarg_axes for name in kwargs}
    else:
        assert isinstance(b.kwarg_axes, Mapping)
        unknown = sorted(set(b.kwarg_axes) - set(kwargs))
        if unknown:
            raise ValueError(f"kwarg_axes names {unknown}, the call has {sorted(kwargs)}")
        by_name = {name: b.kwarg_axes.get(name) for name in kwargs}
    out = []
    for i, (axes, arg) in enumerate(zip(in_axes, args, strict=True)):
        out += along(f"args[{i}]", axes, arg)
    for name in sorted(kwargs):
        out += along(name, by_name[name], kwargs[name])
    return out


def _is_row_mapped(x: Any, axis: Any) -> bool:
    return isinstance(x, Ragged) and axis is not None and x.offsets.ndim == 1


def _batch_size(b: BatchedFunction, named: Any) -> int:
    """The one size of all mapped axes."""
    first: tuple[str, int] | None = None
    for path, x, axis in named:
        axes = unit_axes(path, x, axis)
        if _is_row_mapped(x, axis):
            sizes = [x.num_rows]
        else:
            leaves = jax.tree.leaves(x)
            sizes = [jnp.shape(v)[a] for v, a in zip(leaves, axes, strict=True) if a is not None]
        for size in sizes:
            if first is not None and size != first[1]:
                raise ValueError(
                    f"{path} has size {size} along its mapped axis {axis}, but {first[0]} has "
                    f"{first[1]}"
                )
            first = first or (path, size)
    if first is None:
        if b.axis_size is None:
            raise ValueError("nothing is mapped: give an in_axes entry that is not None")
        return b.axis_size
    if b.axis_size is not None and b.axis_size != first[1]:
        raise ValueError(f"axis_size={b.axis_size}, but {first[0]} has {first[1]}")
    return first[1]


def _flatten(b: BatchedFunction, named: Any, size: int) -> tuple[list[Any], list[int | None]]:
    """All arrays and their axes, with unmapped keys split or refused."""
    leaves, axes = [], []
    for path, x, axis in named:
        of_unit = [0] * len(jax.tree.leaves(x))
        if not _is_row_mapped(x, axis):
            of_unit = unit_axes(path, x, axis)
        for leaf, at in zip(jax.tree.leaves(x), of_unit, strict=True):
            if at is None and _is_key(leaf):
                leaf, at = _shared_key(b.randomness, path, leaf, size)
            leaves.append(leaf)
            axes.append(at)
    return leaves, axes


def _is_key(x: Any) -> bool:
    return hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _shared_key(randomness: str, path: str, key: Any, size: int) -> tuple[Any, int | None]:
    if randomness == "error":
        raise ValueError(
            f"{path} is a key that is not mapped: every element would draw the same numbers. "
            f'Pass randomness="different" to split it, or "same" to mean that'
        )
    if randomness == "same":
        return key, None
    split = lambda k: jax.random.split(k, size)
    for _ in range(key.ndim):
        split = jax.vmap(split, out_axes=1)
    return split(key), 0


# --- running -------------------------------------------------------------------------------------


def _run(plan: _Plan, leaves: list[Any]) -> Any:
    if plan.chunk_size is None or plan.chunk_size >= plan.size:
        return plan.batched(plan.size)(*leaves)
    return _run_chunks(plan, *leaves)


@functools.partial(jax.jit, static_argnums=0)
def _run_chunks(plan: _Plan, *leaves: Any) -> Any:
    """Slices of `chunk_size` one after another; what a slice computed is not remembered."""
    assert plan.chunk_size is not None
    chunk, size = plan.chunk_size, plan.size
    count = -(-size // chunk)
    batched = plan.batched(chunk)

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def one(i: Array, leaves: Any) -> Any:
        start = jnp.minimum(i * chunk, size - chunk)
        cut = lambda x, axis: jax.lax.dynamic_slice_in_dim(x, start, chunk, axis)
        parts = (x if a is None else cut(x, a) for x, a in zip(leaves, plan.axes, strict=True))
        return batched(*parts)

    with jax.named_scope("vmap_chunks"):
        stacked = jax.lax.map(lambda i: one(i, leaves), jnp.arange(count))
        overlap = count * chunk - size

        def join(axis: Any, x: Array) -> Array:
            if axis is None:
                return x[0]
            flat = x.reshape(count * chunk, *x.shape[2:])
            if not overlap:
                return flat
            return jnp.concatenate([flat[: (count - 1) * chunk], x[-1, overlap:]])

        axes = jax.tree.unflatten(plan.out_axes[1], plan.out_axes[0])
        spread = jax.tree.broadcast(axes, stacked, is_leaf=is_axis)
        return jax.tree.map(join, spread, stacked, is_leaf=is_axis)


def _run_buckets(plan: _Plan, leaves: list[Any], named: Any, max_length: int | None) -> Any:
    """Rows of like lengths together; see `vmap_ragged`."""
    mapped = [(path, x) for path, x, axis in named if _is_row_mapped(x, axis)]
    for path, x in mapped:
        if x.ragged_rank != 1:
            raise ValueError(f'{path} is nested: merge_dims first, or ragged="segment"')
    rows = [x for _, x in mapped]
    traced = any(isinstance(x.offsets, Tracer) for x in rows)
    if traced and max_length is None:
        raise ValueError("max_length= must be given under jit: lengths of rows are not known")
    if not any(axis is not None for axis in plan.out_axes[0]):
        raise ValueError("out_axes=None cannot be asked of rows that run in buckets")
    buckets = buckets_of(rows, max_length, traced)
    units = jax.tree.leaves(jax.tree.unflatten(plan.tree, leaves), is_leaf=is_unit)
    outputs = [_run_bucket(plan, units, bucket) for bucket in buckets]
    return merge_outputs(buckets, outputs, rows[0])


def _run_bucket(plan: _Plan, units: list[Any], bucket: Bucket) -> Any:
    """One bucket: ragged units as stacks of one-row arrays, other mapped units at its rows."""
    leaves, axes, lengths = [], list(plan.axes), iter(bucket.lengths)
    for x in units:
        parts = jax.tree.leaves(x)
        of_unit = axes[len(leaves) : len(leaves) + len(parts)]
        if isinstance(x, Ragged) and of_unit[0] is not None and x.offsets.ndim == 1:
            parts = jax.tree.leaves(rows_as_stack(x, bucket.rows, next(lengths)))
        elif bucket.rows is not None:
            rows = bucket.rows
            take = lambda v, a: v if a is None else jnp.take(v, rows, axis=a, mode="clip")
            parts = [take(v, a) for v, a in zip(parts, of_unit, strict=True)]
        leaves += parts
    size = plan.size if bucket.rows is None else len(bucket.rows)
    return _run_jitted(dataclasses.replace(plan, size=size), *leaves)


@functools.partial(jax.jit, static_argnums=0)
def _run_jitted(plan: _Plan, *leaves: Any) -> Any:
    return _run(plan, list(leaves))


def _whole(b: BatchedFunction, named: Any, args: Any, kwargs: Any) -> Any:
    """`f` once, on arguments whose mapped ones keep their rows apart by themselves."""
    for path, x, axis in named:
        if axis is not None and not isinstance(x, Ragged):
            raise ValueError(f'{path} is mapped and not ragged: ragged="segment" cannot split it')
        if axis is None and _is_key(x) and b.randomness != "same":
            raise ValueError(f'{path} is one key for all rows in ragged="segment": "same" it is')
    if b.chunk_size is not None or b.axis_name is not None:
        raise ValueError('ragged="segment" has no axis: drop chunk_size and axis_name')
    _batch_size(b, named)
    if b.out_axes != 0:
        raise ValueError(f'ragged="segment" gives rows first, not out_axes={b.out_axes}')
    return b.f(*args, **kwargs)


def _place_outputs(out_axes: Any, out: Any) -> Any:
    """The batch axis, which comes first, moved to where it was asked for."""
    if isinstance(out_axes, int) and out_axes == 0:
        return out
    stop = lambda x: is_axis(x) or is_unit(x)
    skeleton = jax.tree.map(lambda x: 0, out, is_leaf=is_unit)
    spread = jax.tree.broadcast(out_axes, skeleton, is_leaf=stop)

    def place(axis: Any, x: Any) -> Any:
        if axis is None or axis == 0:
            return x
        places = unit_axes("the result", x, axis)
        leaves = zip(jax.tree.leaves(x), places, strict=True)
        moved = [jnp.moveaxis(leaf, 0, at or 0) for leaf, at in leaves]
        return jax.tree.unflatten(jax.tree.structure(x), moved)

    return jax.tree.map(place, spread, out, is_leaf=stop)
