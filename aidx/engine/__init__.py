"""Continuous batching: requests, the scheduler, the step, and the engine that owns them."""

from aidx.engine.config import EngineConfig as EngineConfig
from aidx.engine.engine import Engine as Engine
from aidx.engine.engine import EngineDeadError as EngineDeadError
from aidx.engine.outputs import CompletionOutput as CompletionOutput
from aidx.engine.outputs import Logprob as Logprob
from aidx.engine.outputs import RequestMetrics as RequestMetrics
from aidx.engine.outputs import RequestOutput as RequestOutput
from aidx.engine.request import Request as Request
from aidx.engine.request import SequenceState as SequenceState
from aidx.engine.request import SequenceStatus as SequenceStatus
from aidx.engine.sampling_params import BeamSearchParams as BeamSearchParams
from aidx.engine.sampling_params import SamplingParams as SamplingParams
from aidx.engine.scheduler import BatchScheduler as BatchScheduler
from aidx.engine.scheduler import SchedulerConfig as SchedulerConfig
from aidx.engine.stats import EngineStats as EngineStats

ContinuousBatcher = Engine
"""`Engine` under the name of what it does."""
