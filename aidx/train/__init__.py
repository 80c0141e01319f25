"""Training: pure steps, fused losses, data, checkpoints and a loop.

params -> init_state -> make_train_step(loss_fn, optimizer) -> fit -> save_model
"""

from .checkpoint import Checkpoints as Checkpoints
from .data import PackedTokens as PackedTokens
from .data import TokenFile as TokenFile
from .data import device_crops as device_crops
from .data import open_tokens as open_tokens
from .data import prefetch as prefetch
from .data import read_documents as read_documents
from .data import write_tokens as write_tokens
from .loop import Callback as Callback
from .loop import FitResult as FitResult
from .loop import NonFiniteError as NonFiniteError
from .loop import ProgressBar as ProgressBar
from .loop import fit as fit
from .loop import make_evaluate as make_evaluate
from .lora import Lora as Lora
from .loss import cross_entropy as cross_entropy
from .loss import fused_cross_entropy as fused_cross_entropy
from .loss import language_model_loss as language_model_loss
from .loss import next_token_batch as next_token_batch
from .recipe import Recipe as Recipe
from .recipe import run_recipe as run_recipe
from .remat import remat as remat
from .state import LossScale as LossScale
from .state import TrainState as TrainState
from .state import init_state as init_state
from .state import loss_scale as loss_scale
from .step import Metrics as Metrics
from .step import make_train_step as make_train_step
from .throughput import model_flops_utilisation as model_flops_utilisation
from .throughput import peak_flops as peak_flops
from .throughput import train_flops_per_token as train_flops_per_token
