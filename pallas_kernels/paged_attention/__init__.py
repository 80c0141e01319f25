"""Paged attention for Hopper: decode, verification and chunked prefill over a block pool."""

from .api import Config as Config
from .api import default_plan as default_plan
from .api import paged_attention as paged_attention
from .cluster import ClusterConfig as ClusterConfig
from .prefill import PrefillConfig as PrefillConfig
from .reference import paged_attention_reference as paged_attention_reference
from .split import SplitConfig as SplitConfig
from .worklist import WorkList as WorkList
from .worklist import make_work_list as make_work_list
from .write import write_kv as write_kv
