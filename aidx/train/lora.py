"""LoRA as a transform of parameters: the model does not know of it.

    W' = W + (alpha / r) A B,    A [in, r] normal,  B [r, *out] zero

`Lora.init` makes the adapters, which are trained; `Lora.merge` makes the parameters that `forward`
is given, inside the loss (the base is a further argument of the step) and once more at the end.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from ..typing import Array, Params

MATRICES = ("qkv", "o", "gate_up", "up", "down")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Which matrices get adapters, and of which rank.

    Attributes:
      rank: r.
      alpha: the update is scaled by alpha / r.
      targets: names of matrices in the layers (`qkv`, `o`, `gate_up`, `up`, `down`).

    Raises:
      ValueError: a rank or alpha that is not positive, an unknown target.

    References:
      Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021.

    >>> from aidx.models import LlamaConfig, init_params
    >>> params = init_params(LlamaConfig(97, 32, 64, 2, 4, 2, 8), jax.random.key(0))
    >>> lora = Lora(rank=4, targets=("o",))
    >>> adapters = lora.init(params, jax.random.key(1))
    >>> {name: a["a"].shape for name, a in adapters.items()}
    {'layers.0.o': (32, 4), 'layers.1.o': (32, 4)}
    >>> merged = lora.merge(params, adapters)
    >>> bool((merged["layers"][0]["o"] == params["layers"][0]["o"]).all())  # B is zero
    True
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = MATRICES

    def __post_init__(self):
        if self.rank < 1 or not self.alpha > 0:
            raise ValueError(f"{self.rank=} and {self.alpha=} must be positive")
        if not self.targets or (unknown := set(self.targets) - set(MATRICES)):
            raise ValueError(f"targets {self.targets} must be some of {MATRICES}: {unknown=}")

    def init(self, params: Params, key: Array, dtype: Any = jnp.float32) -> dict[str, Any]:
        """Adapters whose merge is the base itself.

        Args:
          params: of a model, layers not stacked.
          key: of A; adapter j takes `fold_in(key, j)`.
          dtype: of the adapters; they are small, and trained.

        Returns:
          `{"layers.0.qkv": {"a": [in, r], "b": [r, *out]}, ...}`.

        Raises:
          ValueError: no matrix of the model is a target, or the layers are stacked.
        """
        if not isinstance(params["layers"], tuple | list):
            raise ValueError("LoRA takes a tuple of layers (see unstack_layers)")
        adapters: dict[str, Any] = {}
        for i, layer in enumerate(params["layers"]):
            for name in (n for n in self.targets if n in layer):
                (d, *out), j = layer[name].shape, len(adapters)
                a = jax.random.normal(jax.random.fold_in(key, j), (d, self.rank), dtype)
                b = jnp.zeros((self.rank, *out), dtype)
                adapters[f"layers.{i}.{name}"] = {"a": a / math.sqrt(d), "b": b}
        if not adapters:
            raise ValueError(f"the layers have {sorted(params['layers'][0])}, none of the targets")
        return adapters

    def merge(self, params: Params, adapters: dict[str, Any]) -> Params:
        """The parameters with `(alpha / r) A B` added, in their own dtype.

        Raises:
          KeyError: an adapter of a matrix that the model does not have.
        """
        layers = [dict(layer) for layer in params["layers"]]
        for name, adapter in adapters.items():
            _, i, matrix = name.split(".")
            base = layers[int(i)][matrix]
            with jax.named_scope("lora"):
                update = jnp.tensordot(
                    adapter["a"], adapter["b"], axes=1, preferred_element_type=jnp.float32
                )
                merged = base.astype(jnp.float32) + (self.alpha / self.rank) * update
                layers[int(i)][matrix] = merged.astype(base.dtype)
        return {**params, "layers": tuple(layers)}

    def params_of(self, adapters: dict[str, Any], params: Params) -> Params:
        """`merge` with what is trained first, as `language_model_loss(params_of=)` calls it."""
        return self.merge(params, adapters)
