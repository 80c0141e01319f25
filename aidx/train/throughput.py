"""How fast a run is, against what the hardware could do."""

import math
from typing import Any

import jax

from ..models.model import ModelConfig, is_shape, param_shapes
from ..telemetry.profiler import device_peak


def train_flops_per_token(config: ModelConfig, length: int) -> float:
    """Floating-point operations of a training step per token: `6 P + 3 L 4 N H S / 2`.

    P is the layers' matrices and the unembedding, once; attention is causal over S = length
    tokens (a window's shorter reach is counted).  Recomputation does not count as work.

    Args:
      config: of a model.
      length: tokens of a sequence, S.

    References:
      Chowdhery et al., PaLM, 2022, appendix B.

    >>> from aidx.models import PRESETS
    >>> f"{train_flops_per_token(PRESETS['llama-3.2-1b'], 4096) / 1e9:.2f} GFLOP"
    '8.22 GFLOP'
    """
    shapes = jax.tree_util.tree_leaves_with_path(param_shapes(config), is_leaf=is_shape)
    skipped = ("norm", "scale", "bias", "embed", "lm_head")
    matrices = config.vocab_size * config.dim + sum(
        math.prod(shape) for path, shape in shapes if not path[-1].key.endswith(skipped)
    )
    seen = 0.0  # keys a token sees on average, summed over layers
    for window in config.windows:
        w = min(window or length, length)
        seen += (w * (w + 1) / 2 + (length - w) * w) / length if window else length / 2
    return 6.0 * matrices + 12.0 * config.num_heads * config.head_dim * seen


def peak_flops(device: Any = None) -> float | None:
    """The dense bf16 peak of a device in FLOP/s; None where it is not known (a CPU).

    >>> peak_flops(jax.devices("cpu")[0]) is None
    True
    """
    peak = device_peak((device or jax.devices()[0]).device_kind)
    return None if peak is None else peak.flops


def model_flops_utilisation(
    tokens_per_second: float, flops_per_token: float, devices: int | None = None
) -> float | None:
    """MFU: the share of the devices' peak that goes into the model's own operations.

    Args:
      tokens_per_second: of all devices together.
      flops_per_token: of `train_flops_per_token`.
      devices: how many; None is all of them.

    Returns:
      In [0, 1]; None where the peak is not known.

    >>> model_flops_utilisation(1e5, 8e9) is None or jax.default_backend() == "gpu"
    True
    """
    peak = peak_flops()
    if peak is None:
        return None
    return tokens_per_second * flops_per_token / (peak * (devices or jax.device_count()))
