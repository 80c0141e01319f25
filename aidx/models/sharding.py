"""Where parameters lie on a mesh: tensor parallelism as Megatron does it (Shoeybi 2019).

Projections into heads and features are split by column (a device owns whole KV groups and a slice
of F), projections back by row, the vocabulary tables by row; everything else is on every device.
One all-reduce after attention and one after the feed-forward is all the traffic of a layer.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ..typing import Params
from .model import ModelConfig, is_shape, param_shapes

AXIS_NAMES = ("tensor", "model")

# The axis of each parameter that is split; those not named are replicated.
SPLIT_AXIS = {
    "embed": 0,
    "lm_head": 0,
    "qkv": 1,
    "qkv_bias": 0,
    "o": 0,
    "gate_up": 2,
    "gate_up_bias": 1,
    "up": 1,
    "up_bias": 0,
    "down": 0,
}


def param_specs(config: ModelConfig, axis: str = "tensor") -> Params:
    """The parameter tree with a `PartitionSpec` at every leaf.

    >>> from aidx.models import LlamaConfig
    >>> param_specs(LlamaConfig(96, 32, 64, 1, 4, 2, 8))["layers"][0]["down"][0]
    'tensor'
    """

    def spec(path, shape):
        at = SPLIT_AXIS.get(path[-1].key)
        return PartitionSpec() if at is None else PartitionSpec(*[None] * at, axis)

    return jax.tree_util.tree_map_with_path(spec, param_shapes(config), is_leaf=is_shape)


def param_shardings(config: ModelConfig, mesh: Mesh) -> Params:
    """The parameter tree with a `NamedSharding` at every leaf.

    The mesh's axis called "tensor" or "model" splits; the other axes replicate.  The axes are taken
    as `AxisType.Auto`: XLA places the collectives.

    Raises:
      ValueError: the mesh has neither axis, or its size does not divide what is split.

    >>> from aidx.models import LlamaConfig
    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> param_shardings(LlamaConfig(96, 32, 64, 1, 4, 2, 8), mesh)["embed"].spec[0]
    'tensor'
    """
    axis = next((name for name in AXIS_NAMES if name in mesh.axis_names), None)
    if axis is None:
        raise ValueError(f"{mesh.axis_names=} has neither of the axes {AXIS_NAMES}")
    n = mesh.shape[axis]
    for field in ("num_kv_heads", "ffn_dim", "vocab_size"):
        if getattr(config, field) % n:
            raise ValueError(
                f"{field}={getattr(config, field)} does not divide over {n} devices of {axis!r}"
            )
    auto = mesh.update(axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    return jax.tree.map(lambda spec: NamedSharding(auto, spec), param_specs(config, axis))


def shard_params(config: ModelConfig, params: Params, mesh: Mesh) -> Params:
    """Place parameters on a mesh by `param_shardings`.

    >>> from aidx.models import LlamaConfig, init_params
    >>> config = LlamaConfig(96, 32, 64, 1, 4, 2, 8)
    >>> mesh = jax.make_mesh((1,), ("tensor",))
    >>> params = shard_params(config, init_params(config, jax.random.key(0)), mesh)
    >>> params["embed"].sharding.spec[0]
    'tensor'
    """
    return jax.tree.map(jax.device_put, params, param_shardings(config, mesh))
