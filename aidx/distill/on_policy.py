"""On-policy distillation (GKD): the student is corrected on what it says itself.

Agarwal et al., 2024, algorithm 1: with probability `fraction` the student answers a prompt itself,
else the data's answer is taken; the loss is a divergence from the teacher on the answer's tokens.
Who samples is an argument: `sampler(prompts) -> answers`, lists of token ids.
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from flax import struct

from aidx.distill.divergence import divergence, weighted_mean
from aidx.distill.options import Divergence
from aidx.typing import Array

Tokens = Sequence[int]
Sampler = Callable[[Sequence[Tokens]], Sequence[Tokens]]


@struct.dataclass
class OnPolicyBatch:
    """Prompts and answers, padded: what a step needs of a batch."""

    tokens: Array  # [B, T + 1] i32
    weights: Array  # [B, T] f32: 1 where tokens[:, 1:] is an answer's
    own: Array  # [B] bool: the student answered


def on_policy_batch(
    prompts: Sequence[Tokens],
    sampler: Sampler | None,
    *,
    length: int,
    answers: Sequence[Tokens] | None = None,
    fraction: float = 1.0,
    rng: np.random.Generator | None = None,
    pad: int = 0,
) -> OnPolicyBatch:
    """Let the student answer some of the prompts, and pad.

    Args:
        prompts: token ids, none empty.
        sampler: the student: `aidx.LLM.generate`, or any function of prompts.
        length: T; what is longer is cut at its end.
        answers: of the data, for the prompts that the student does not answer.
        fraction: probability that the student answers (lambda in the paper).
        rng: draws who answers; needed where fraction is neither 0 nor 1.
        pad: token at the ends, of weight 0.

    Raises:
        ValueError: numbers out of range, or a source of answers that is needed and absent.

    Example:
        >>> batch = on_policy_batch([[1, 2], [3]], lambda p: [[9] * len(x) for x in p], length=4)
        >>> batch.tokens.tolist(), batch.weights.tolist()[1]
        ([[1, 2, 9, 9, 0], [3, 9, 0, 0, 0]], [1.0, 0.0, 0.0, 0.0])
    """
    if not 0 <= fraction <= 1 or length < 1:
        raise ValueError(f"{fraction=} must lie in [0, 1] and {length=} be positive")
    if not prompts or not all(len(p) for p in prompts):
        raise ValueError("there must be prompts, and none may be empty")
    if 0 < fraction < 1 and rng is None:
        raise ValueError(f"{fraction=} needs an rng to draw who answers")
    draws = np.zeros(len(prompts)) if rng is None else rng.random(len(prompts))
    own = draws < fraction
    if own.any() and sampler is None:
        raise ValueError(f"{fraction=} but no sampler")
    if not own.all() and (answers is None or len(answers) != len(prompts)):
        raise ValueError("prompts that the student does not answer need the data's answers")
    asked = [p for p, mine in zip(prompts, own, strict=True) if mine]
    said = iter(sampler(asked) if sampler is not None and asked else ())
    tokens = np.full((len(prompts), length + 1), pad, np.int32)
    weights = np.zeros((len(prompts), length), np.float32)
    for i, prompt in enumerate(prompts):
        answer = next(said, None) if own[i] else answers[i]  # pyright: ignore
        if answer is None:
            raise ValueError(f"the sampler answered {i} of {int(own.sum())} prompts")
        row = [*prompt, *answer][: length + 1]
        tokens[i, : len(row)] = row
        weights[i, len(prompt) - 1 : len(row) - 1] = 1.0
    return OnPolicyBatch(jnp.asarray(tokens), jnp.asarray(weights), jnp.asarray(own))


def gkd_loss(
    student_logits: Array,
    teacher_logits: Array,
    weights: Array | None = None,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
) -> Array:
    """The generalised Jensen-Shannon divergence of GKD (Agarwal et al., 2024, eq. 3).

        L = mean beta KL(t || m) + (1 - beta) KL(s || m),  m = beta t + (1 - beta) s

    with beta = 0 and 1 standing for their limits' directions: forward and reverse KL.  The student
    that sampled the tokens gets no gradient through the sampling, as in the paper.

    Args:
        student_logits: `[*B, V]`.
        teacher_logits: `[*B, V]`.
        weights: `[*B]`, of the tokens.
        beta: in [0, 1].
        temperature: of both; the loss is not multiplied by its square.

    Raises:
        ValueError: shapes, or beta outside [0, 1].

    Example:
        >>> s, t = jnp.array([[0.0, 0.0]]), jnp.array([[jnp.log(3.0), 0.0]])
        >>> [round(float(gkd_loss(s, t, beta=b)), 4) for b in (0.0, 0.5, 1.0)]
        [0.1308, 0.0338, 0.1438]
    """
    if not 0 <= beta <= 1:
        raise ValueError(f"{beta=} must lie in [0, 1]")
    kind = {0.0: Divergence.FORWARD_KL, 1.0: Divergence.REVERSE_KL}.get(beta, Divergence.JSD)
    inside = beta if kind is Divergence.JSD else 0.5
    per_token = divergence(
        student_logits, teacher_logits, kind=kind, beta=inside, temperature=temperature
    )
    return weighted_mean(per_token, weights)
