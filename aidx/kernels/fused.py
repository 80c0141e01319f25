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

SMALL = (
    8 << 20
)  # bytes of the first operand below which XLA's fusions are as fast, and fuse further
NORMS = [NormConfig(ctas=n) for n in (0, 4, 8, 16)]
GATES = [GatedConfig(n) for n in (1, 2, 4)]
LOSSES = [
    CrossEntropyConfig(ctas=n, vectors=v) for n, v in ((0, 8), (0, 4), (4, 8), (6, 4), (2, 16))
]


def _left_to_xla(reference: Callable[..., Any]) -> KernelBuilder:
    """A kernel named as its reference, which is first where the operands are small."""

    def large(x: Any, *others: Any, **options: Any) -> str | None:
        size = x.size * x.dtype.itemsize
        return f"{size} bytes: a kernel pays from {SMALL} on" if size >= SMALL else None

    builder = KernelBuilder(reference.__name__).reference(reference)
    return builder.implementation("xla_small", reference, platforms=("cuda",), when=large)


def _with_kernels(
    builder: KernelBuilder,
    backward: Callable[..., Any],
    rule: str,
    replicated: Sequence[str],
    configs: Sequence[Hashable] = (),
    shapes: Sequence[str] = (),
) -> KernelBuilder:
    """The Pallas kernels of the builder's name, and how they are split and tuned."""
    fn, sources = getattr(_fused, builder.name), ("pallas_kernels.fused", "pallas_kernels._mgpu")
    builder = builder.implementation("mosaic_gpu", fn, backward=backward, platforms=("cuda",))
    builder = builder.sharding(rule, replicated=replicated).tolerance(Tolerance(float32=2e-5))
    return builder.tuning(configs, sources=sources, shapes=shapes) if configs else builder


rms_norm = _with_kernels(
    _left_to_xla(norm.rms_norm),
    _fused.rms_norm_backward,
    "... d, d -> ... d",
    ("d",),
    NORMS,
    ["8192x4096:bfloat16 4096:bfloat16"],
).build()

residual_rms_norm = _with_kernels(
    _left_to_xla(norm.residual_rms_norm),
    _fused.residual_rms_norm_backward,
    "... d, ... d, d -> ... d, ... d",
    ("d",),
    NORMS,
    ["8192x4096:bfloat16 8192x4096:bfloat16 4096:bfloat16"],
).build()

layer_norm = _with_kernels(
    _left_to_xla(norm.layer_norm),
    _fused.layer_norm_backward,
    "... d, d, d -> ... d",
    ("d",),
    NORMS,
    ["8192x4096:bfloat16 4096:bfloat16 4096:bfloat16"],
).build()

residual_layer_norm = _with_kernels(
    _left_to_xla(norm.residual_layer_norm),
    _fused.residual_layer_norm_backward,
    "... d, ... d, d, d -> ... d, ... d",
    ("d",),
    NORMS,
    ["8192x4096:bfloat16 8192x4096:bfloat16 4096:bfloat16 4096:bfloat16"],
).build()

# XLA's fusion is as fast as the kernel, and takes what made x into itself.
apply_rope = _with_kernels(
    KernelBuilder("apply_rope").reference(rope.apply_rope).implementation("xla", rope.apply_rope),
    _fused.apply_rope_backward,
    "... n h, ... c, ... c -> ... n h",
    ("h", "c"),
).build()

gated = _with_kernels(
    _left_to_xla(activations.gated),
    _fused.gated_backward,
    "... g f -> ... f",
    ("g",),
    GATES,
    ["8192x2x14336:bfloat16"],
).build()

softmax_cross_entropy = (
    _with_kernels(
        KernelBuilder("softmax_cross_entropy").reference(cross_entropy.softmax_cross_entropy),
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
