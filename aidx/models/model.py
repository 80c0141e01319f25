"""`Model`: what the engine, training and the command line are given; random weights; stacking."""

import dataclasses
import functools
from types import MappingProxyType, ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from ..ops.rope import Rope
from ..typing import Forward, Params
from . import gpt2, llama
from .gpt2 import GPT2Config
from .llama import LlamaConfig
from .tokenizer import Tokenizer

ModelConfig = LlamaConfig | GPT2Config

FAMILIES: dict[type, ModuleType] = {LlamaConfig: llama, GPT2Config: gpt2}


@dataclasses.dataclass(frozen=True, eq=False)  # two models are equal if they are one
class Model:
    """A decoder ready to run: static config, parameters, the bound forward and its text side.

    Attributes:
      config: static and hashable.
      params: the parameter tree (see the family's module).
      tokenizer: None where the checkpoint has none; then prompts are token ids.
      generation_config: what generation_config.json said (temperature, top_p, ...), read-only.
      eos_token_ids: every id that ends a sequence, of all the files that name one.
      bos_token_id: None where the checkpoint names none.

    >>> config = LlamaConfig(97, 32, 64, 2, 4, 2, 8)
    >>> model = Model(config, init_params(config, jax.random.key(0)))
    >>> model.num_layers, model.num_kv_heads, model.head_dim, str(model.dtype)
    (2, 2, 8, 'float32')
    """

    config: ModelConfig
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer | None = dataclasses.field(default=None, repr=False)
    generation_config: Any = dataclasses.field(default_factory=lambda: MappingProxyType({}))
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None

    @property
    def forward(self) -> Forward:
        """The family's forward with the config bound; equal configs give the same function."""
        return bind_forward(self.config)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_layers

    @property
    def num_heads(self) -> int:
        """N."""
        return self.config.num_heads

    @property
    def num_kv_heads(self) -> int:
        """K."""
        return self.config.num_kv_heads

    @property
    def head_dim(self) -> int:
        """H."""
        return self.config.head_dim

    @property
    def vocab_size(self) -> int:
        """V: the width of the logits, which may exceed the tokenizer's vocabulary."""
        return self.config.vocab_size

    @property
    def max_model_len(self) -> int:
        """The longest context the frequencies and position tables are made for."""
        return self.config.max_model_len

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Per layer, how many keys a query sees with its own; None for all."""
        return self.config.windows

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the parameters, hence of the activations."""
        return self.params["embed"].dtype

    def replace(self, **changes: Any) -> "Model":
        """A copy with fields changed."""
        return dataclasses.replace(self, **changes)

    def with_max_model_len(
        self, max_model_len: int, *, allow_long_max_model_len: bool = False
    ) -> "Model":
        """The same weights for another longest context.

        `dynamic` rotary frequencies are fixed by this length, so keys cached under another length
        are not valid under it.

        Raises:
          ValueError: the length is not positive, or passes a table of learned positions, or what
            the rotary embedding is made for and `allow_long_max_model_len` does not ask for that.
        """
        config = self.config.with_max_model_len(
            max_model_len, allow_long_max_model_len=allow_long_max_model_len
        )
        return self.replace(config=config)


@functools.cache
def bind_forward(config: ModelConfig) -> Forward:
    """`forward` of the config's family with the config bound; cached, so jit caches are shared.

    >>> config = LlamaConfig(97, 32, 64, 2, 4, 2, 8)
    >>> bind_forward(config) is bind_forward(LlamaConfig(97, 32, 64, 2, 4, 2, 8))
    True
    """
    return functools.partial(FAMILIES[type(config)].forward, config)


def param_shapes(config: ModelConfig) -> Params:
    """The family's parameter tree with a shape tuple at every leaf.

    >>> param_shapes(LlamaConfig(97, 32, 64, 2, 4, 2, 8))["embed"]
    (97, 32)
    """
    return FAMILIES[type(config)].param_shapes(config)


def is_shape(leaf: Any) -> bool:
    """Whether a leaf of `param_shapes` was reached (layers are a tuple too, but of dicts).

    >>> is_shape((2, 3)), is_shape(({}, {}))
    (True, False)
    """
    return isinstance(leaf, tuple) and all(isinstance(n, int) for n in leaf)


def num_params(config: ModelConfig) -> int:
    """How many parameters a model of this shape has; a tied table counts once.

    >>> num_params(PRESETS["llama-3.2-1b"])
    1235814400
    """
    return sum(
        functools.reduce(lambda a, b: a * b, shape, 1)
        for shape in jax.tree.leaves(param_shapes(config), is_leaf=is_shape)
    )


def init_params(
    config: ModelConfig, key: jax.Array, dtype: Any = jnp.float32, *, std: float = 0.02
) -> Params:
    """Random parameters of any shape: matrices normal with std, norm scales 1, biases 0.

    Args:
      config: the shape.
      key: of `jax.random`; parameter j of the flattened tree takes `fold_in(key, j)`.
      dtype: of every parameter.
      std: standard deviation of the matrices.

    Returns:
      The tree of the family's module.

    >>> params = init_params(LlamaConfig(97, 32, 64, 2, 4, 2, 8), jax.random.key(0), jnp.bfloat16)
    >>> params["layers"][1]["down"].shape
    (64, 32)
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(config), is_leaf=is_shape)
    made = []
    for j, (path, shape) in enumerate(leaves):
        name = "/".join(str(getattr(entry, "key", entry)) for entry in path)
        if name.endswith("bias"):
            made.append(jnp.zeros(shape, dtype))
        elif name.endswith(("norm", "scale")):
            made.append(jnp.ones(shape, dtype))
        else:
            made.append(_normal(jax.random.fold_in(key, j), shape, std, jnp.dtype(dtype)))
    return jax.tree.unflatten(tree, made)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _normal(key, shape, std, dtype):
    # Drawn in f32 and rounded, so a bf16 model is the rounding of the f32 model of the same key.
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def stack_layers(params: Params) -> Params:
    """The same parameters with the layers' trees stacked on a leading axis L, for `lax.scan`.

    >>> params = init_params(LlamaConfig(97, 32, 64, 2, 4, 2, 8), jax.random.key(0))
    >>> stack_layers(params)["layers"]["down"].shape
    (2, 64, 32)
    """
    layers = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params["layers"])
    return {**params, "layers": layers}


def unstack_layers(params: Params) -> Params:
    """The inverse of `stack_layers`: a tuple of per-layer trees.

    >>> params = init_params(LlamaConfig(97, 32, 64, 2, 4, 2, 8), jax.random.key(0))
    >>> len(unstack_layers(stack_layers(params))["layers"])
    2
    """
    layers = params["layers"]
    L = jax.tree.leaves(layers)[0].shape[0]
    return {**params, "layers": tuple(jax.tree.map(lambda a, i=i: a[i], layers) for i in range(L))}


_LLAMA3_ROPE = Rope(
    theta=500000.0, type="llama3", factor=8.0, original_max_position_embeddings=8192
)

PRESETS: dict[str, LlamaConfig | GPT2Config] = {
    "llama-3.2-1b": LlamaConfig(
        vocab_size=128256,
        dim=2048,
        ffn_dim=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        rope=dataclasses.replace(_LLAMA3_ROPE, factor=32.0),
        max_position_embeddings=131072,
        tied=True,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256,
        dim=4096,
        ffn_dim=14336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        rope=_LLAMA3_ROPE,
        max_position_embeddings=131072,
    ),
}
"""Shapes of released models, for benchmarks with random weights."""
