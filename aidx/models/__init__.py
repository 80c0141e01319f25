"""Decoders, one module per architecture family, and Hugging Face checkpoints in and out."""

from .gpt2 import GPT2Config as GPT2Config
from .llama import LlamaConfig as LlamaConfig
from .load import load_model as load_model
from .load import save_model as save_model
from .model import PRESETS as PRESETS
from .model import Model as Model
from .model import ModelConfig as ModelConfig
from .model import bind_forward as bind_forward
from .model import init_params as init_params
from .model import num_params as num_params
from .model import param_shapes as param_shapes
from .model import stack_layers as stack_layers
from .model import unstack_layers as unstack_layers
from .sharding import param_shardings as param_shardings
from .sharding import shard_params as shard_params
from .tokenizer import Tokenizer as Tokenizer
