"""The enums of distillation and `KnowledgeDistillationOptions`, which ties them to one loss.

A value that is not known raises a `ValueError` that lists the known ones, and an option that the
chosen strategy does not read is refused: nothing is ignored.
"""

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import Any


class Choice(enum.StrEnum):
    """A string enum whose errors list what is known.

    Example:
        >>> Divergence("kl")
        Traceback (most recent call last):
        ValueError: unknown Divergence 'kl'; known: forward_kl, reverse_kl, jsd, total_variation
    """

    @classmethod
    def _missing_(cls, value: object):
        known = ", ".join(cls)
        raise ValueError(f"unknown {cls.__name__} {value!r}; known: {known}")


class DistillationStrategy(Choice):
    """What the student imitates."""

    RESPONSE_BASED = "response_based"
    FEATURE_BASED = "feature_based"
    ATTENTION_BASED = "attention_based"
    RELATION_BASED = "relation_based"
    CONTRASTIVE = "contrastive"
    SIMILARITY_PRESERVING = "similarity_preserving"
    FLOW_BASED = "flow_based"
    PROBABILISTIC_TRANSFER = "probabilistic_transfer"
    VARIATIONAL_INFORMATION = "variational_information"
    FACTOR_TRANSFER = "factor_transfer"
    NEURON_SELECTIVITY = "neuron_selectivity"
    SELF_DISTILLATION = "self_distillation"
    HYBRID = "hybrid"


class TeacherModelType(Choice):
    """Who teaches."""

    NEURAL_NETWORK = "neural_network"
    ENSEMBLE = "ensemble"
    PRETRAINED = "pretrained"
    TRANSFORMER = "transformer"
    MULTI_MODAL = "multi_modal"
    ADAPTIVE = "adaptive"
    ONLINE = "online"
    CURRICULUM = "curriculum"
    SELF = "self"
    QUANTIZED = "quantized"
    DISTRIBUTED = "distributed"


class Divergence(Choice):
    """Between the softmaxes of teacher and student; see `aidx.distill.divergence`."""

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JSD = "jsd"
    TOTAL_VARIATION = "total_variation"


class AttentionMatching(Choice):
    """How attention maps are compared."""

    MSE = "mse"
    KL = "kl"
    COSINE = "cosine"


class ContrastiveMode(Choice):
    """How embeddings are told apart."""

    INFO_NCE = "info_nce"
    TRIPLET = "triplet"
    NT_XENT = "nt_xent"


class FactorMode(Choice):
    """Which factors of the features are transferred."""

    LOW_RANK_APPROXIMATION = "low_rank_approximation"
    NUCLEAR_NORM_MATCHING = "nuclear_norm_matching"
    FACTOR_MATCHING = "factor_matching"


class SelectivityMetric(Choice):
    """What says how selective a neuron is."""

    VARIANCE = "variance"
    SPARSITY = "sparsity"
    PEAK_TO_AVERAGE = "peak_to_average"


class ProbabilisticMode(Choice):
    """How distributions of features, or of predictions, are matched."""

    MOMENT_MATCHING = "moment_matching"
    MAXIMUM_MEAN_DISCREPANCY = "maximum_mean_discrepancy"
    ENTROPY_TRANSFER = "entropy_transfer"


class RelationalDistance(Choice):
    """Between two examples of a batch."""

    EUCLIDEAN = "euclidean"
    COSINE = "cosine"
    MANHATTAN = "manhattan"


class VariationalMode(Choice):
    """Which bound on the information shared with the teacher."""

    ELBO = "elbo"
    INFORMATION_BOTTLENECK = "information_bottleneck"
    LATENT_SPACE_KL = "latent_space_kl"


class DistributedAggregation(Choice):
    """How teachers on several devices agree."""

    AVERAGE = "average"
    VOTING = "voting"


class EnsembleAggregation(Choice):
    """How an ensemble's distributions become one."""

    WEIGHTED_AVERAGE = "weighted_average"
    GEOMETRIC_MEAN = "geometric_mean"
    MAXIMUM = "maximum"
    MEDIAN = "median"


class CurriculumOrder(Choice):
    """Which examples come first."""

    EASY_TO_HARD = "easy_to_hard"
    HARD_TO_EASY = "hard_to_easy"


class OnlineUpdate(Choice):
    """How an online teacher follows its student."""

    EMA = "ema"
    GRADIENT_BASED = "gradient_based"
    MOMENTUM_BASED = "momentum_based"


class AdaptiveMetric(Choice):
    """What says that the student has difficulties."""

    ACCURACY_BASED = "accuracy_based"
    CONFIDENCE_BASED = "confidence_based"
    ENTROPY_BASED = "entropy_based"


S = DistillationStrategy
READS: Mapping[DistillationStrategy, tuple[str, ...]] = {
    S.RESPONSE_BASED: ("temperature", "divergence", "jsd_beta"),
    S.FEATURE_BASED: ("layer_weights",),
    S.ATTENTION_BASED: ("attention_matching", "layer_weights"),
    S.RELATION_BASED: ("relational_distance", "distance_weight", "angle_weight"),
    S.CONTRASTIVE: ("contrastive_mode", "contrastive_temperature", "margin"),
    S.SIMILARITY_PRESERVING: ("layer_weights",),
    S.FLOW_BASED: ("layer_weights",),
    S.PROBABILISTIC_TRANSFER: ("probabilistic_mode", "moments", "bandwidth"),
    S.VARIATIONAL_INFORMATION: ("variational_mode", "prior_weight", "temperature"),
    S.FACTOR_TRANSFER: ("factor_mode", "rank", "norm_order"),
    S.NEURON_SELECTIVITY: ("selectivity_metric",),
    S.SELF_DISTILLATION: ("temperature", "divergence", "jsd_beta", "feature_weight"),
}
"""The options that each strategy reads, beside strategy and alpha."""

MODE_READS: Mapping[str, tuple[str, tuple[Choice, ...]]] = {
    "contrastive_temperature": (
        "contrastive_mode",
        (ContrastiveMode.INFO_NCE, ContrastiveMode.NT_XENT),
    ),
    "margin": ("contrastive_mode", (ContrastiveMode.TRIPLET,)),
    "moments": ("probabilistic_mode", (ProbabilisticMode.MOMENT_MATCHING,)),
    "bandwidth": ("probabilistic_mode", (ProbabilisticMode.MAXIMUM_MEAN_DISCREPANCY,)),
    "prior_weight": (
        "variational_mode",
        (VariationalMode.ELBO, VariationalMode.INFORMATION_BOTTLENECK),
    ),
    "rank": ("factor_mode", (FactorMode.LOW_RANK_APPROXIMATION,)),
    "norm_order": ("factor_mode", (FactorMode.FACTOR_MATCHING,)),
    "jsd_beta": ("divergence", (Divergence.JSD,)),
}
"""Options that only some modes of a strategy read."""


@dataclasses.dataclass(frozen=True)
class KnowledgeDistillationOptions:
    """One distillation loss, fully said; `aidx.distill.make_loss` builds it.

        L = alpha CE(student, labels) + (1 - alpha) L_strategy     (without labels: L_strategy)

    and `L_hybrid = sum_i w_i L_i` over `hybrid`.

    Attributes:
        strategy: see `DistillationStrategy`; enums are also taken as their strings.
        temperature: T of the softmaxes.
        alpha: share of the hard labels.
        divergence, jsd_beta: between softmaxes.
        attention_matching: of attention_based.
        contrastive_mode, contrastive_temperature, margin: of contrastive.
        factor_mode, rank, norm_order: of factor_transfer.
        selectivity_metric: of neuron_selectivity.
        probabilistic_mode, moments, bandwidth: of probabilistic_transfer; bandwidth None is the
            median distance between the teacher's examples.
        relational_distance, distance_weight, angle_weight: of relation_based.
        variational_mode, prior_weight: of variational_information.
        feature_weight: of the exits' features in self_distillation; 0 leaves them out.
        layer_weights: one per layer (per pair of layers for flow_based); None weighs all alike.
        hybrid: (strategy, weight) pairs.

    Raises:
        ValueError: an unknown value (the message lists the known), a number out of range, or an
            option that the strategy does not read.

    Example:
        >>> KnowledgeDistillationOptions("contrastive").contrastive_mode
        <ContrastiveMode.INFO_NCE: 'info_nce'>
        >>> KnowledgeDistillationOptions("feature_based", margin=0.5)
        Traceback (most recent call last):
        ValueError: margin=0.5 is not read by feature_based
        >>> KnowledgeDistillationOptions("response")
        Traceback (most recent call last):
        ValueError: unknown DistillationStrategy 'response'; known: response_based, ...
    """

    strategy: DistillationStrategy | str = S.RESPONSE_BASED
    temperature: float = 3.0
    alpha: float = 0.3
    divergence: Divergence | str = Divergence.FORWARD_KL
    jsd_beta: float = 0.5
    attention_matching: AttentionMatching | str = AttentionMatching.MSE
    contrastive_mode: ContrastiveMode | str = ContrastiveMode.INFO_NCE
    contrastive_temperature: float = 0.1
    margin: float = 1.0
    factor_mode: FactorMode | str = FactorMode.FACTOR_MATCHING
    rank: int = 8
    norm_order: int = 1
    selectivity_metric: SelectivityMetric | str = SelectivityMetric.VARIANCE
    probabilistic_mode: ProbabilisticMode | str = ProbabilisticMode.MOMENT_MATCHING
    moments: int = 2
    bandwidth: float | None = None
    relational_distance: RelationalDistance | str = RelationalDistance.EUCLIDEAN
    distance_weight: float = 1.0
    angle_weight: float = 2.0
    variational_mode: VariationalMode | str = VariationalMode.ELBO
    prior_weight: float = 1e-3
    feature_weight: float = 0.0
    layer_weights: tuple[float, ...] | None = None
    hybrid: tuple[tuple[DistillationStrategy | str, float], ...] = ()

    def __post_init__(self):
        for name, choice in CHOICES.items():
            object.__setattr__(self, name, choice(getattr(self, name)))
        pairs = self.hybrid.items() if isinstance(self.hybrid, Mapping) else self.hybrid
        hybrid = tuple((DistillationStrategy(s), float(w)) for s, w in pairs)
        object.__setattr__(self, "hybrid", hybrid)
        if self.layer_weights is not None:
            object.__setattr__(self, "layer_weights", tuple(map(float, self.layer_weights)))
        self._check_numbers()
        self._check_hybrid()
        self._check_read()

    def _check_numbers(self):
        for name in ("temperature", "contrastive_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite")
        for name in ("margin", "distance_weight", "angle_weight", "prior_weight", "feature_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} must lie between 0 and 1")
        if not 0 < self.jsd_beta < 1:
            raise ValueError(f"jsd_beta={self.jsd_beta} must lie strictly between 0 and 1")
        if self.bandwidth is not None and not 0 < self.bandwidth < math.inf:
            raise ValueError(f"bandwidth={self.bandwidth} must be positive, or None")
        if self.rank < 1 or self.moments < 1:
            raise ValueError(f"rank={self.rank} and moments={self.moments} must be positive")
        if self.norm_order not in (1, 2):
            raise ValueError(f"norm_order={self.norm_order} must be 1 or 2")
        if self.layer_weights is not None and not all(w >= 0 for w in self.layer_weights):
            raise ValueError(f"layer_weights={self.layer_weights} must not be negative")

    def _check_hybrid(self):
        if self.strategy is not S.HYBRID:
            if self.hybrid:
                raise ValueError(f"hybrid={self.hybrid} is not read by {self.strategy}")
            return
        if not self.hybrid:
            raise ValueError("hybrid needs (strategy, weight) pairs")
        strategies = [s for s, _ in self.hybrid]
        if S.HYBRID in strategies or len(set(strategies)) < len(strategies):
            raise ValueError(f"hybrid={strategies}: each strategy once, and not hybrid itself")
        if not all(0 <= w < math.inf for _, w in self.hybrid):
            raise ValueError(f"hybrid={self.hybrid}: weights must not be negative")

    def _check_read(self):
        """Refuse what would have no effect."""
        chosen = [s for s, _ in self.hybrid] or [self.strategy]
        read = {name for s in chosen for name in READS[DistillationStrategy(s)]}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in ("strategy", "alpha", "hybrid") or value == field.default:
                continue
            if field.name not in read:
                raise ValueError(f"{field.name}={value} is not read by {', '.join(chosen)}")
            mode, readers = MODE_READS.get(field.name, ("", ()))
            if mode and getattr(self, mode) not in readers:
                raise ValueError(f"{field.name}={value} is not read by {getattr(self, mode)}")

    def replace(self, **changes: Any) -> "KnowledgeDistillationOptions":
        """A validated copy with fields changed."""
        return dataclasses.replace(self, **changes)


CHOICES: Mapping[str, type[Choice]] = {
    "strategy": DistillationStrategy,
    "divergence": Divergence,
    "attention_matching": AttentionMatching,
    "contrastive_mode": ContrastiveMode,
    "factor_mode": FactorMode,
    "selectivity_metric": SelectivityMetric,
    "probabilistic_mode": ProbabilisticMode,
    "relational_distance": RelationalDistance,
    "variational_mode": VariationalMode,
}
"""The enum of each option that is one."""
