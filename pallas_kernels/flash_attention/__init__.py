"""Flash attention for Hopper: forward and backward kernels, masks as intervals, tile table."""

from .attention import Gradients as Gradients
from .attention import backward_widths as backward_widths
from .attention import flash_attention_bwd as flash_attention_bwd
from .attention import flash_attention_fwd as flash_attention_fwd
from .attention import forward_widths as forward_widths
from .config import BackwardConfig as BackwardConfig
from .config import ForwardConfig as ForwardConfig
from .heuristics import backward_config as backward_config
from .heuristics import forward_config as forward_config
from .mask import Band as Band
from .mask import BlockKinds as BlockKinds
from .mask import Bounds as Bounds
from .mask import dynamic_bounds as dynamic_bounds
from .mask import packed_segments as packed_segments
from .problem import Dropout as Dropout
from .problem import Modifier as Modifier
from .problem import Options as Options
from .program import Program as Program
from .program import scalar_program as scalar_program
from .program import split as split
from .reference import reference as reference
