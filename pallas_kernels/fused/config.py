"""What may be tuned of the fused kernels."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """How the rows are shared out.

    Attributes:
      ctas: CTAs an SM, one warpgroup each, that share the rows of the forward; 0 makes one for
        every row.
      backward_warpgroups: of the backward's one CTA an SM; 0: what is fastest for the width.
      backward_stages: rows in shared memory, or on their way there, for each of them; 0: what is
        fastest for the width.

    Raises:
      ValueError: a count that is out of range.

    >>> NormConfig().ctas
    0
    """

    ctas: int = 0
    backward_warpgroups: int = 0
    backward_stages: int = 0

    def __post_init__(self):
        if self.ctas < 0:
            raise ValueError(f"{self.ctas=} must not be negative")
        if not (0 <= self.backward_warpgroups <= 8 and 0 <= self.backward_stages <= 8):
            raise ValueError(f"{self.backward_warpgroups=}, {self.backward_stages=} must be 0 to 8")


@dataclasses.dataclass(frozen=True)
class GatedConfig:
    """How much a CTA takes.

    Attributes:
      vectors: 16-byte vectors of gate and of up for each of its 128 threads.

    Raises:
      ValueError: a count that is out of range.

    >>> GatedConfig().vectors
    1
    """

    vectors: int = 1

    def __post_init__(self):
        if not 1 <= self.vectors <= 8:
            raise ValueError(f"{self.vectors=} must be 1 to 8")


@dataclasses.dataclass(frozen=True)
class CrossEntropyConfig:
    """How the rows are shared out.

    Attributes:
      ctas: CTAs an SM, one warpgroup each; 0 makes one for every row.
      vectors: 16-byte vectors that a thread of the forward loads at a time.
      backward_ctas: CTAs an SM of the backward; 0 makes one for every row.
      backward_vectors: as vectors.

    Raises:
      ValueError: a count that is out of range.

    >>> CrossEntropyConfig().vectors
    8
    """

    ctas: int = 0
    vectors: int = 8
    backward_ctas: int = 0
    backward_vectors: int = 4

    def __post_init__(self):
        if self.ctas < 0 or self.backward_ctas < 0:
            raise ValueError(f"{self.ctas=} and {self.backward_ctas=} must not be negative")
        if not (1 <= self.vectors <= 16 and 1 <= self.backward_vectors <= 16):
            raise ValueError(f"{self.vectors=} and {self.backward_vectors=} must be 1 to 16")


# What is used where nothing is said: the fastest of `bench/fused.py --variants` on an H200.
NORM, GATED, CROSS_ENTROPY = NormConfig(), GatedConfig(), CrossEntropyConfig()
