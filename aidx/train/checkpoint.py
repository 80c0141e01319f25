"""Checkpoints of a run through orbax: asynchronous, atomic, the last n kept.

A checkpoint is a directory named after its step.  Orbax writes it under another name and renames
it when it is complete, so what has the name of a step can be restored, whatever happened since.
"""

import pathlib
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np

from ..typing import PyTree


class Checkpoints:
    """The checkpoints of one run in one folder.

    `save` copies the state to the host and returns; a thread writes.  The step that donates the
    state may run at once.

    Args:
      folder: made if absent.
      keep: how many of the last checkpoints stay; None keeps all.

    Raises:
      ValueError: keep is not positive.

    >>> import tempfile, jax.numpy as jnp
    >>> with Checkpoints(tempfile.mkdtemp(), keep=2) as checkpoints:
    ...     for step in range(3):
    ...         checkpoints.save(step, {"w": jnp.full(2, step)}, {"note": "hi"})
    ...     checkpoints.wait()
    ...     state, meta = checkpoints.restore({"w": jnp.zeros(2, jnp.int32)})
    ...     print(checkpoints.steps, state["w"].tolist(), meta)
    [1, 2] [2, 2] {'note': 'hi'}
    """

    def __init__(self, folder: str | pathlib.Path, *, keep: int | None = 3):
        import orbax.checkpoint as ocp  # a second to import: only who saves pays

        if keep is not None and keep < 1:
            raise ValueError(f"{keep=} must be positive or None")
        self.folder = pathlib.Path(folder).resolve()
        self._args: Any = ocp.args
        self._manager = ocp.CheckpointManager(
            self.folder,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "meta": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep, create=True, enable_async_checkpointing=True
            ),
        )

    @property
    def steps(self) -> list[int]:
        """The steps that can be restored, ascending."""
        self._manager.reload()
        return sorted(self._manager.all_steps())

    @property
    def latest(self) -> int | None:
        """The last step that can be restored, or None."""
        return max(self.steps, default=None)

    def save(self, step: int, state: PyTree, meta: dict[str, Any] | None = None) -> None:
        """Save a pytree of arrays and a JSON object as the checkpoint of a step.

        A step that has been saved is left as it is.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=self._args.Composite(
                state=self._args.StandardSave(named_leaves(jax.tree.map(unwrapped, state))),
                meta=self._args.JsonSave(dict(meta or {})),
            ),
        )

    def restore(self, like: PyTree, step: int | None = None) -> tuple[PyTree, dict[str, Any]]:
        """The state and the JSON object of a checkpoint.

        Args:
          like: a tree of arrays (or, keys excepted, `ShapeDtypeStruct`s): structure, shapes, dtypes
            and shardings of what comes back (`init_state(...)`).
          step: which; None is the last.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: it holds another tree; the message names the leaves that differ.
        """
        step = self.latest if step is None else step
        if step is None or step not in self.steps:
            raise FileNotFoundError(f"{self.folder} has no checkpoint {step}, only {self.steps}")
        wanted = named_leaves(jax.tree.map(unwrapped, like))
        self._check(step, wanted)
        found = self._manager.restore(
            step,
            args=self._args.Composite(
                state=self._args.StandardRestore(wanted), meta=self._args.JsonRestore()
            ),
        )
        leaves, tree = jax.tree.flatten(like)
        values = [found["state"][name] for name in wanted]
        wrapped = [
            jax.random.wrap_key_data(x, impl=jax.random.key_impl(leaf)) if is_key(leaf) else x
            for x, leaf in zip(values, leaves, strict=True)
        ]
        return jax.tree.unflatten(tree, wrapped), found["meta"]

    def _check(self, step: int, wanted: dict[str, Any]) -> None:
        held = self._manager.item_metadata(step)["state"].tree
        if set(held) != set(wanted):
            raise ValueError(
                f"checkpoint {step} of {self.folder} lacks {sorted(set(wanted) - set(held))[:5]} "
                f"and has {sorted(set(held) - set(wanted))[:5]} besides"
            )
        for name, leaf in wanted.items():
            if tuple(held[name].shape) != tuple(leaf.shape):
                raise ValueError(f"{name} has {held[name].shape}, {leaf.shape} is wanted")

    def wait(self) -> None:
        """Return when everything saved is on disk; what a write raised is raised here."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Wait, and let go of the threads."""
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def is_key(x: Any) -> bool:
    """Whether a leaf is a typed PRNG key.

    >>> is_key(jax.random.key(0)), is_key(np.zeros(2))
    (True, False)
    """
    return isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)


def unwrapped(x: Any) -> Any:
    """A leaf as what is stored: a typed key as its data, anything else as it is.

    >>> unwrapped(jax.random.key(3)).tolist()
    [0, 3]
    """
    return jax.random.key_data(x) if is_key(x) else x


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """The leaves of a tree by dotted names, in order.

    Raises:
      ValueError: two leaves have one name.

    >>> named_leaves({"a": (1, {"b": 2})})
    {'a.0': 1, 'a.1.b': 2}
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}
    if len(named) != len(leaves):
        raise ValueError(f"{len(leaves)} leaves have {len(named)} distinct names")
    return named


def same_bits(a: PyTree, b: PyTree) -> bool:
    """Whether two trees are equal leaf for leaf, bit for bit; keys by their data.

    >>> same_bits({"x": np.float32(0.0)}, {"x": np.float32(-0.0)})
    False
    """

    def bits(x: Any) -> tuple:
        host = np.asarray(unwrapped(x))
        return host.shape, host.dtype, host.tobytes()

    equal = jax.tree.map(lambda x, y: bits(x) == bits(y), a, b)
    return all(jax.tree.leaves(equal))
