"""Flash attention for Hopper: forward and backward kernels, masks as intervals, tile table."""

from .attention import Gradients as Gradients
from .attention import flash_attention_bwd as flash_attention_bwd
from .attention import flash_attention_fwd as flash_attention_fwd
from .config import BackwardConfig as BackwardConfig
from .config import ForwardConfig as ForwardConfig
from .mask import Band as Band
from .mask import Bounds as Bounds
from .mask import dynamic_bounds as dynamic_bounds
from .mask import packed_segments as packed_segments
from .reference import reference as reference
