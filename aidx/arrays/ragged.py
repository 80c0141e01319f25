"""Everything about ragged rows in one place.

>>> import jax.numpy as jnp
>>> from aidx.arrays import ragged
>>> x = ragged.Ragged.from_list([[1.0, 1.0], [3.0]])
>>> ragged.softmax(x).to_list()
[[0.5, 0.5], [1.0]]
"""

from .ragged_array import NestedTensor as NestedTensor
from .ragged_array import Ragged as Ragged
from .ragged_array import RaggedTensor as RaggedTensor
from .ragged_array import checked as checked
from .ragged_elementwise import broadcast_rows as broadcast_rows
from .ragged_elementwise import elementwise as elementwise
from .ragged_layers import attention as attention
from .ragged_layers import embedding_lookup as embedding_lookup
from .ragged_layers import gelu as gelu
from .ragged_layers import layer_norm as layer_norm
from .ragged_layers import linear as linear
from .ragged_layers import log_softmax as log_softmax
from .ragged_layers import matmul as matmul
from .ragged_layers import rms_norm as rms_norm
from .ragged_layers import silu as silu
from .ragged_layers import softmax as softmax
from .ragged_ops import boolean_mask as boolean_mask
from .ragged_ops import concat as concat
from .ragged_ops import gather as gather
from .ragged_ops import merge_dims as merge_dims
from .ragged_ops import reduce_all as reduce_all
from .ragged_ops import reduce_any as reduce_any
from .ragged_ops import reduce_max as reduce_max
from .ragged_ops import reduce_mean as reduce_mean
from .ragged_ops import reduce_min as reduce_min
from .ragged_ops import reduce_sum as reduce_sum
from .ragged_ops import reverse_rows as reverse_rows
from .ragged_ops import stack as stack
from .serialize import register as _register


def _validate(x: Ragged) -> None:
    checked(x)


_register(Ragged, validate=_validate)  # what `save_tree` wrote is checked when it is read
