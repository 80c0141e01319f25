"""Reinforcement learning: linear Q-learning as pure functions.

init -> act / update (or train, in one scan) -> save
"""

from .features import TileCoding as TileCoding
from .features import one_hot as one_hot
from .gym import evaluate_gym as evaluate_gym
from .gym import features_for as features_for
from .gym import train_gym as train_gym
from .linear_q import Algorithm as Algorithm
from .linear_q import LinearQ as LinearQ
from .linear_q import LinearQConfig as LinearQConfig
from .linear_q import Trajectory as Trajectory
from .linear_q import Transition as Transition
from .linear_q import act as act
from .linear_q import init as init
from .linear_q import load as load
from .linear_q import policy as policy
from .linear_q import q_values as q_values
from .linear_q import save as save
from .linear_q import train as train
from .linear_q import update as update
