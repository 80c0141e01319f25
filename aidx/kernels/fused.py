"""The fused kernels that aidx ships, declared as anybody's: norms, rotary embedding, gated
activations, softmax cross-entropy.

Each is the function of `aidx.ops` of its name, with `implementation=` and `config=` on top; it is
differentiated by a kernel of its own, and split over devices along the leading axes.
`docs/kernels_fused.md` says what was measured.

    from aidx.kernels import fused

    y, h = fused.residual_rms_norm(x, delta, scale, eps=1e-5)
    loss, lse = fused.softmax_cross_entropy(logits, targets, z_loss=1e-4)
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any

from ..ops import _fused, activations, cross_entropy, norm, rope
from ..ops._fused import CrossEntropyConfig, GatedConfig, NormConfig
from .builder import KernelBuilder
from .kernel import Tolerance

NORMS = [NormConfig(ctas=n) for n in (0, 4, 8, 16)]
GATES = [GatedConfig(n) for n in (1, 2, 4)]
LOSSES = [
    CrossEntropyConfig(ctas=n, vectors=v) for n, v in ((0, 8), (0, 4), (4, 8), (6, 4), (2, 16))
]


def _declared(
    reference: Callable[..., Any],
    backward: Callable[..., Any],
    rule: str,
    replicated: Sequence[str],
    configs: Sequence[Hashable] = (),
    shapes: Sequence[str] = (),
) -> KernelBuilder:
    """A kernel named as its reference, with the Pallas kernels of the same name."""
    name = reference.__name__
    sources = [f"pallas_kernels.fused.{part}" for part in ("_vectors", "config")]
    builder = (
        KernelBuilder(name)
        .reference(reference)
        .implementation("mosaic_gpu", getattr(_fused, name), backward=backward, platforms=("cuda",))
        .sharding(rule, replicated=replicated)
        .tolerance(Tolerance(float32=2e-5))
    )
    return builder.tuning(configs, sources=sources, shapes=shapes) if configs else builder


rms_norm = _declared(
    norm.rms_norm,
    _fused.rms_norm_backward,
    "... d, d -> ... d",
    ("d",),
    NORMS,
    ["8192x4096:bfloat16 4096:bfloat16"],
).build()

residual_rms_norm = _declared(
    norm.residual_rms_norm,
    _fused.residual_rms_norm_backward,
    "... d, ... d, d -> ... d, ... d",
    ("d",),
    NORMS,
    ["8192x4096:bfloat16 8192x4096:bfloat16 4096:bfloat16"],
).build()

layer_norm = _declared(
    norm.layer_norm,
    _fused.layer_norm_backward,
    "... d, d, d -> ... d",
    ("d",),
    NORMS,
    ["8192x4096:bfloat16 4096:bfloat16 4096:bfloat16"],
).build()

residual_layer_norm = _declared(
    norm.residual_layer_norm,
    _fused.residual_layer_norm_backward,
    "... d, ... d, d, d -> ... d, ... d",
    ("d",),
    NORMS,
    ["8192x4096:bfloat16 8192x4096:bfloat16 4096:bfloat16 4096:bfloat16"],
).build()

apply_rope = _declared(
    rope.apply_rope, _fused.apply_rope_backward, "... n h, ... c, ... c -> ... n h", ("h", "c")
).build()

gated = _declared(
    activations.gated,
    _fused.gated_backward,
    "... g f -> ... f",
    ("g",),
    GATES,
    ["8192x2x14336:bfloat16"],
).build()

softmax_cross_entropy = (
    _declared(
        cross_entropy.softmax_cross_entropy,
        _fused.softmax_cross_entropy_backward,
        "... v, ... -> ..., ...",
        ("v",),
        LOSSES,
        ["8192x128256:bfloat16 8192:int32"],
    )
    # The reference differentiated would make the log-normaliser anew.
    .implementation(
        "xla",
        cross_entropy.softmax_cross_entropy,
        backward=cross_entropy.softmax_cross_entropy_backward,
    )
    .build()
)
