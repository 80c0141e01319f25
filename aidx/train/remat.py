"""What a layer keeps for its backward pass: memory against recomputation."""

from collections.abc import Callable

import jax

ATTENTION_NAMES = ("flash_attention_out", "flash_attention_lse")

POLICIES: dict[str, Callable | None] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names(*ATTENTION_NAMES),
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "dots_attention": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names(*ATTENTION_NAMES),
    ),
}


def remat(policy: str) -> Callable[[Callable], Callable] | None:
    """The wrapper of layers for `forward(..., remat=...)`.

    Args:
      policy: `none` keeps everything; `full` keeps a layer's input only and computes the layer
        again (Chen et al., 2016); `attention` keeps what flash attention's backward needs as well;
        `dots` the results of matmuls; `dots_attention` both, so that only elementwise work is
        repeated.

    Returns:
      None for `none`, else a decorator of layers.

    Raises:
      ValueError: no such policy.

    >>> remat("none") is None, callable(remat("full"))
    (True, True)
    """
    if policy not in POLICIES:
        raise ValueError(f"remat policy {policy!r} is not one of {', '.join(POLICIES)}")
    if policy == "none":
        return None
    return lambda layer: jax.checkpoint(layer, policy=POLICIES[policy])
