"""Teachers: frozen pytrees that are called with inputs and say `Outputs`.

    teacher(inputs) -> Outputs              through which no gradient passes

What a teacher learns (online, adaptive, curriculum, self) is in new values of it: methods return
them, and a step takes and returns the teacher like any state.  An `apply` is any pure function
`(params, inputs) -> logits or Outputs`.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from aidx.cache import no_cache_attend
from aidx.distill.aggregate import count_or_mean, ensemble_logits, normalised_weights
from aidx.distill.options import DistributedAggregation, EnsembleAggregation
from aidx.distill.outputs import Outputs, decoder_outputs
from aidx.models import Model, load_model, unstack_layers
from aidx.typing import Array, Params, PyTree

Apply = Callable[[Params, Any], "Array | Outputs"]
Teacher = Callable[..., Outputs]


def as_outputs(said: "Array | Outputs") -> Outputs:
    """Logits as `Outputs`; no gradient passes.

    Example:
        >>> as_outputs(jnp.ones((2, 3))).logits.shape
        (2, 3)
    """
    out = said if isinstance(said, Outputs) else Outputs(logits=said)
    return jax.lax.stop_gradient(out)


@struct.dataclass
class NetworkTeacher:
    """Any network (`neural_network`): Hinton, Vinyals and Dean, 2015.

    Example:
        >>> teacher = network_teacher(lambda w, x: x @ w, jnp.eye(2))
        >>> teacher(jnp.ones((1, 2))).logits.tolist()
        [[1.0, 1.0]]
    """

    params: Params
    apply: Apply = struct.field(pytree_node=False)

    def __call__(self, inputs: Any) -> Outputs:
        """What the network says."""
        return as_outputs(self.apply(self.params, inputs))


def network_teacher(apply: Apply, params: Params) -> NetworkTeacher:
    """A teacher of a function and its parameters.

    Example:
        >>> network_teacher(lambda w, x: x * w, 2.0)(jnp.ones((1, 2))).logits.tolist()
        [[2.0, 2.0]]
    """
    return NetworkTeacher(params, apply)


def transformer_teacher(
    model: Model, *, features: Sequence[int] = (), attention: Sequence[int] = ()
) -> NetworkTeacher:
    """A decoder (`transformer`) whose inputs are tokens.

    Its inputs are tokens i32 `[B, T]`, or a mapping with `tokens` and, if wanted, `positions` and
    `segment_ids` of the same shape (packed documents).  Logits are `[B, T, V]`.

    Args:
        model: of `aidx.load_model`.
        features: layers whose hidden states `[B, T, D]` are wanted.
        attention: layers whose attention maps `[B, N, T, T]` are wanted.

    Example:
        >>> from aidx.models import LlamaConfig, init_params
        >>> config = LlamaConfig(97, 32, 64, 2, 4, 2, 8)
        >>> model = Model(config, init_params(config, jax.random.key(0)))
        >>> transformer_teacher(model)(jnp.ones((1, 3), jnp.int32)).logits.shape
        (1, 3, 97)
    """
    return NetworkTeacher(
        model.params, decoder_apply(model, features=features, attention=attention)
    )


def decoder_apply(
    model: Model, *, features: Sequence[int] = (), attention: Sequence[int] = ()
) -> Apply:
    """`apply(params, tokens or mapping) -> Outputs` of a decoder, for teachers and students.

    Example:
        >>> from aidx.models import LlamaConfig, init_params
        >>> config = LlamaConfig(97, 32, 64, 2, 4, 2, 8)
        >>> model = Model(config, init_params(config, jax.random.key(0)))
        >>> apply = decoder_apply(model, features=[0, -1])
        >>> len(apply(model.params, {"tokens": jnp.ones((1, 3), jnp.int32)}).features)
        2
    """
    forward = model.forward

    def apply(params: Params, inputs: Any) -> Outputs:
        said = inputs if isinstance(inputs, Mapping) else {"tokens": inputs}
        tokens = said["tokens"]
        T = tokens.shape[-1]
        positions = said.get("positions")
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), tokens.shape)
        if not isinstance(params["layers"], tuple | list):
            params = unstack_layers(params)
        attend = no_cache_attend(segment_ids=said.get("segment_ids"))
        return decoder_outputs(
            forward, params, tokens, positions, attend, features=features, attention=attention
        )

    return apply


def pretrained_teacher(
    path: str | Path,
    *,
    features: Sequence[int] = (),
    attention: Sequence[int] = (),
    **options: Any,
) -> NetworkTeacher:
    """A Hugging Face directory (`pretrained`) as a teacher; options are `aidx.load_model`'s.

    Raises:
        FileNotFoundError, ValueError: as `aidx.load_model`.

    Example:
        >>> pretrained_teacher("no/such/directory")
        Traceback (most recent call last):
        FileNotFoundError: no/such/directory is neither ...
    """
    model = load_model(path, **options)
    return transformer_teacher(model, features=features, attention=attention)


@struct.dataclass
class EnsembleTeacher:
    """Several teachers of one task (`ensemble`); see `ensemble_logits`.

    Example:
        >>> one = network_teacher(lambda w, x: x + w, jnp.array([[1.0, 0.0]]))
        >>> two = network_teacher(lambda w, x: x + w, jnp.array([[0.0, 1.0]]))
        >>> teacher = ensemble_teacher([one, two])
        >>> f"{jnp.exp(teacher(jnp.zeros((1, 2))).logits)[0, 0]:.2f}"
        '0.50'
    """

    teachers: tuple[Any, ...]
    weights: Array | None
    aggregation: EnsembleAggregation = struct.field(pytree_node=False)

    def __call__(self, inputs: Any) -> Outputs:
        """The aggregate of what all say."""
        logits = jnp.stack([_logits(teacher(inputs)) for teacher in self.teachers])
        return as_outputs(ensemble_logits(logits, self.weights, aggregation=self.aggregation))


def ensemble_teacher(
    teachers: Sequence[Teacher],
    weights: Sequence[float] | None = None,
    *,
    aggregation: EnsembleAggregation | str = EnsembleAggregation.WEIGHTED_AVERAGE,
) -> EnsembleTeacher:
    """An `EnsembleTeacher`.

    Raises:
        ValueError: no teachers, weights that do not fit, or where they would have no effect.

    Example:
        >>> ensemble_teacher([])
        Traceback (most recent call last):
        ValueError: an ensemble needs teachers
    """
    aggregation = EnsembleAggregation(aggregation)
    if not teachers:
        raise ValueError("an ensemble needs teachers")
    unweighted = (EnsembleAggregation.MAXIMUM, EnsembleAggregation.MEDIAN)
    if weights is not None and aggregation in unweighted:
        raise ValueError(f"weights have no effect on the {aggregation}")
    w = None if weights is None else normalised_weights(weights, len(teachers))
    return EnsembleTeacher(tuple(teachers), w, aggregation)


@struct.dataclass
class MultiModalTeacher:
    """A teacher per modality (`multi_modal`), fused late: `p = sum_m w_m p_m` of those present.

    Gupta, Hoffman and Malik (2016) distil across modalities.  Inputs are a mapping from modality
    to that teacher's input; absent modalities leave the others' weights to grow.

    Example:
        >>> teacher = multi_modal_teacher({
        ...     "image": network_teacher(lambda w, x: x * w, 0.0),
        ...     "text": network_teacher(lambda w, x: x * w, 1.0)}, {"image": 1.0, "text": 3.0})
        >>> x = jnp.log(jnp.array([[0.9, 0.1]]))
        >>> for inputs in ({"text": x}, {"text": x, "image": x}):
        ...     print(f"{jnp.exp(teacher(inputs).logits)[0, 0]:.2f}")
        0.90
        0.80
    """

    teachers: dict[str, Any]
    weights: dict[str, Array]

    def __call__(self, inputs: Mapping[str, Any]) -> Outputs:
        """The average over the modalities in inputs.

        Raises:
            ValueError: no modality, or one without a teacher.
        """
        if not inputs or set(inputs) - set(self.teachers):
            raise ValueError(f"modalities {sorted(inputs)}; teachers for {sorted(self.teachers)}")
        names = sorted(inputs)
        logits = jnp.stack([_logits(self.teachers[m](inputs[m])) for m in names])
        return as_outputs(ensemble_logits(logits, jnp.stack([self.weights[m] for m in names])))


def multi_modal_teacher(
    teachers: Mapping[str, Teacher], weights: Mapping[str, float] | None = None
) -> MultiModalTeacher:
    """A `MultiModalTeacher`; weights None weighs all modalities alike.

    Raises:
        ValueError: no teachers, or weights of other modalities or not positive.

    Example:
        >>> multi_modal_teacher({"text": network_teacher(lambda w, x: x, 0)}, {"image": 1.0})
        Traceback (most recent call last):
        ValueError: weights of ['image'] for teachers of ['text']
    """
    if not teachers:
        raise ValueError("a multi-modal teacher needs teachers")
    weights = dict.fromkeys(teachers, 1.0) if weights is None else weights
    if set(weights) != set(teachers):
        raise ValueError(f"weights of {sorted(weights)} for teachers of {sorted(teachers)}")
    if not all(w > 0 for w in weights.values()):
        raise ValueError(f"weights {dict(weights)} must be positive")
    return MultiModalTeacher(dict(teachers), {m: jnp.float32(w) for m, w in weights.items()})


@struct.dataclass
class SelfTeacher:
    """An earlier generation of the student (`self`): born-again networks, Furlanello et al., 2018.

    Example:
        >>> teacher = self_teacher(lambda w, x: x * w, jnp.float32(2.0))
        >>> later = teacher.next_generation(jnp.float32(3.0))
        >>> later.generation.item(), later(jnp.ones((1, 2))).logits.tolist()
        (1, [[3.0, 3.0]])
    """

    params: Params
    generation: Array  # [] i32
    apply: Apply = struct.field(pytree_node=False)

    def __call__(self, inputs: Any) -> Outputs:
        """What the last generation says."""
        return as_outputs(self.apply(self.params, inputs))

    def next_generation(self, student_params: Params) -> "SelfTeacher":
        """The student becomes the teacher; its parameters are copied, for training donates them."""
        return self.replace(params=_copy(student_params), generation=self.generation + 1)  # pyright: ignore


def self_teacher(apply: Apply, params: Params) -> SelfTeacher:
    """A `SelfTeacher` of generation 0, with a copy of the student's parameters.

    Example:
        >>> int(self_teacher(lambda w, x: x, jnp.float32(1)).generation)
        0
    """
    return SelfTeacher(_copy(params), jnp.int32(0), apply)


@struct.dataclass
class Int8:
    """A matrix as int8 with a scale per output channel: `w = values * scale`."""

    values: Array  # [in, *out] i8
    scale: Array  # [*out] f32

    def dequantize(self, dtype: Any = jnp.float32) -> Array:
        """`values * scale`."""
        return (self.values.astype(jnp.float32) * self.scale[None]).astype(dtype)


def quantize_params(params: Params) -> PyTree:
    """Every floating leaf of two or more axes as `Int8`, the others as they are.

        scale = max_in |w| / 127,  values = round(w / scale)        (Jacob et al., 2018)

    No weight moves by more than half a scale.

    Example:
        >>> q = quantize_params({"w": jnp.array([[1.0, -2.0], [0.5, 2.0]]), "b": jnp.ones(2)})
        >>> q["w"].values.tolist(), q["b"].dtype.name
        ([[127, -127], [64, 127]], 'float32')
    """

    def quantize(w):
        if w.ndim < 2 or not jnp.issubdtype(w.dtype, jnp.floating):
            return w
        top = jnp.abs(w.astype(jnp.float32)).max(0)
        scale = jnp.where(top > 0, top / 127, 1.0)
        return Int8(jnp.round(w.astype(jnp.float32) / scale[None]).astype(jnp.int8), scale)

    return jax.tree.map(quantize, params)


def dequantize_params(params: PyTree, dtype: Any = jnp.float32) -> Params:
    """The inverse of `quantize_params`, up to the rounding.

    Example:
        >>> dequantize_params(quantize_params({"w": jnp.eye(2)}))["w"].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    leaf = lambda x: x.dequantize(dtype) if isinstance(x, Int8) else x
    return jax.tree.map(leaf, params, is_leaf=lambda x: isinstance(x, Int8))


@struct.dataclass
class QuantizedTeacher:
    """A network kept in int8 (`quantized`): a quarter of the memory of f32.

    Weights become floats inside the call, which XLA fuses with the matmul that reads them.

    Example:
        >>> teacher = quantized_teacher(lambda w, x: x @ w, jnp.eye(2))
        >>> teacher.params.values.dtype.name, teacher(jnp.ones((1, 2))).logits.tolist()
        ('int8', [[1.0, 1.0]])
    """

    params: PyTree
    apply: Apply = struct.field(pytree_node=False)
    dtype: Any = struct.field(pytree_node=False, default=jnp.float32)

    def __call__(self, inputs: Any) -> Outputs:
        """What the network says with rounded weights."""
        return as_outputs(self.apply(dequantize_params(self.params, self.dtype), inputs))


def quantized_teacher(
    apply: Apply, params: Params, *, dtype: Any = jnp.float32
) -> QuantizedTeacher:
    """A `QuantizedTeacher`; dtype is that of the weights in the computation.

    Example:
        >>> quantized_teacher(lambda w, x: x * w, jnp.float32(1)).params.item()  # no matrix
        1.0
    """
    return QuantizedTeacher(quantize_params(params), apply, dtype)


@struct.dataclass
class DistributedTeacher:
    """k teachers of one architecture, spread over the devices of a mesh axis (`distributed`).

        average  p = 1/k sum_i p_i              voting  p = 1/k sum_i onehot(argmax_v p_i)

    Every device runs its own teachers; what crosses the network is one sum of `[*B, V]`.

    Example:
        >>> mesh = jax.make_mesh((1,), ("teachers",), devices=jax.devices()[:1])
        >>> weights = [jnp.array([[2.0, 0.0]]), jnp.array([[1.0, 0.0]]), jnp.array([[0.0, 9.0]])]
        >>> for how in DistributedAggregation:
        ...     teacher = distributed_teacher(lambda w, x: x + w, weights, mesh, aggregation=how)
        ...     print(f"{jnp.exp(teacher(jnp.zeros((1, 2))).logits)[0, 0]:.2f}")
        0.54
        0.67
    """

    params: Params  # leaves [k, ...], sharded over the axis
    count: int = struct.field(pytree_node=False)
    apply: Apply = struct.field(pytree_node=False)
    mesh: Mesh = struct.field(pytree_node=False)
    axis: str = struct.field(pytree_node=False)
    aggregation: DistributedAggregation = struct.field(pytree_node=False)
    smoothing: float = struct.field(pytree_node=False, default=0.0)

    def __call__(self, inputs: Any) -> Outputs:
        """The average of all, or the shares of their votes."""

        def local(params, inputs):
            logits = jax.vmap(lambda p: _logits(as_outputs(self.apply(p, inputs))))(params)
            return jax.lax.psum(count_or_mean(logits, self.aggregation).sum(0), self.axis)

        spread = jax.shard_map(
            local,
            mesh=self.mesh,
            in_specs=(PartitionSpec(self.axis), PartitionSpec()),
            out_specs=PartitionSpec(),
        )
        p = spread(self.params, inputs) / self.count
        p = (1 - self.smoothing) * p + self.smoothing / p.shape[-1]
        return as_outputs(jnp.log(p))


def distributed_teacher(
    apply: Apply,
    params: Sequence[Params],
    mesh: Mesh,
    *,
    axis: str | None = None,
    aggregation: DistributedAggregation | str = DistributedAggregation.AVERAGE,
    smoothing: float = 0.0,
) -> DistributedTeacher:
    """A `DistributedTeacher`.

    Args:
        apply: of every teacher.
        params: of each teacher; as many as a multiple of the axis.
        mesh: the devices.
        axis: of the mesh; None is its first.
        aggregation: `average` or `voting`.
        smoothing: share of the uniform distribution: no class has probability zero.

    Raises:
        ValueError: numbers that do not go together, or smoothing outside [0, 1).

    Example:
        >>> mesh = jax.make_mesh((1,), ("teachers",), devices=jax.devices()[:1])
        >>> distributed_teacher(lambda w, x: x, [], mesh)
        Traceback (most recent call last):
        ValueError: 0 teachers over 1 devices of axis 'teachers'
    """
    axis = str(mesh.axis_names[0]) if axis is None else axis
    if axis not in mesh.shape:
        raise ValueError(f"axis {axis!r} is not one of {mesh.axis_names}")
    k, devices = len(params), mesh.shape[axis]
    if not k or k % devices:
        raise ValueError(f"{k} teachers over {devices} devices of axis {axis!r}")
    if not 0 <= smoothing < 1:
        raise ValueError(f"{smoothing=} must lie in [0, 1)")
    sharding = NamedSharding(mesh, PartitionSpec(axis))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return DistributedTeacher(
        jax.device_put(stacked, sharding),
        k,
        apply,
        mesh,
        axis,
        DistributedAggregation(aggregation),
        smoothing,
    )


def _logits(outputs: Outputs) -> Array:
    if outputs.logits is None:
        raise ValueError("a teacher that is to be combined with others must say logits")
    return outputs.logits


def _copy(params: Params) -> Params:
    return jax.tree.map(lambda x: jnp.array(x, copy=True), params)
