"""Knowledge distillation: losses, teachers and steps, all pure functions.

make_loss(KnowledgeDistillationOptions(...)) -> loss(student, teacher, labels)
"""

from aidx.distill.divergence import cross_entropy as cross_entropy
from aidx.distill.divergence import divergence as divergence
from aidx.distill.divergence import response_loss as response_loss
from aidx.distill.fused import linear_divergence as linear_divergence
from aidx.distill.fused import linear_response_loss as linear_response_loss
from aidx.distill.losses import distill_loss as distill_loss
from aidx.distill.losses import make_loss as make_loss
from aidx.distill.options import AdaptiveMetric as AdaptiveMetric
from aidx.distill.options import AttentionMatching as AttentionMatching
from aidx.distill.options import ContrastiveMode as ContrastiveMode
from aidx.distill.options import CurriculumOrder as CurriculumOrder
from aidx.distill.options import DistillationStrategy as DistillationStrategy
from aidx.distill.options import DistributedAggregation as DistributedAggregation
from aidx.distill.options import Divergence as Divergence
from aidx.distill.options import EnsembleAggregation as EnsembleAggregation
from aidx.distill.options import FactorMode as FactorMode
from aidx.distill.options import KnowledgeDistillationOptions as KnowledgeDistillationOptions
from aidx.distill.options import OnlineUpdate as OnlineUpdate
from aidx.distill.options import ProbabilisticMode as ProbabilisticMode
from aidx.distill.options import RelationalDistance as RelationalDistance
from aidx.distill.options import SelectivityMetric as SelectivityMetric
from aidx.distill.options import TeacherModelType as TeacherModelType
from aidx.distill.options import VariationalMode as VariationalMode
from aidx.distill.outputs import Gaussian as Gaussian
from aidx.distill.outputs import Outputs as Outputs
from aidx.distill.outputs import decoder_outputs as decoder_outputs
