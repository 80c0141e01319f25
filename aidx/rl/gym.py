"""Gymnasium environments: an adapter for agents that are pure functions.

The environment keeps its own state, so this loop is Python's; the agent's part of a step is one
compiled program.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from aidx.rl.features import TileCoding, one_hot
from aidx.rl.linear_q import LinearQ, Transition, act, update
from aidx.typing import Array

Features = Callable[[Array], Array]


def features_for(env: Any, *, tiles: int = 8, tilings: int = 8, bounds: Any = None) -> Features:
    """Features of an environment's observations, by their space.

    Args:
        env: of gymnasium; its observations are `Discrete` (one-hot) or a one-dimensional `Box`
            (tile coding).
        tiles: per dimension of a box.
        tilings: of a box.
        bounds: `(low, high)` of a box whose own are infinite or far too wide.

    Returns:
        `observation -> [F]`, with a `size`.

    Raises:
        ValueError: another space, or a box without finite bounds.

    Example:
        >>> import gymnasium
        >>> features_for(gymnasium.make("FrozenLake-v1")).size
        16
    """
    from gymnasium import spaces

    space = env.observation_space
    if isinstance(space, spaces.Discrete):
        return OneHot(int(space.n), int(space.start))
    if not isinstance(space, spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"{space} is neither Discrete nor a Box of one axis")
    low, high = (space.low, space.high) if bounds is None else bounds
    low, high = (tuple(float(x) for x in np.asarray(side)) for side in (low, high))
    if max(map(abs, (*low, *high))) > 1e6:
        raise ValueError(f"{space} has no usable bounds: give bounds=(low, high)")
    return TileCoding(low, high, (tiles,) * len(low), tilings)


class OneHot:
    """`one_hot` of observations that begin at `start`; equal sizes are equal, as jit wants it.

    Example:
        >>> OneHot(3, 1)(np.int32(2)).tolist()
        [0.0, 1.0, 0.0]
    """

    def __init__(self, size: int, start: int = 0):
        self.size, self.start = size, start

    def __eq__(self, other: object) -> bool:
        return isinstance(other, OneHot) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.size, self.start))

    def __call__(self, observation: Array) -> Array:
        """`[size]`, one at the observation's place."""
        return one_hot(observation - self.start, self.size)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _act(features, agent: LinearQ, observation, greedy: bool):
    return act(agent, features(observation), greedy=greedy)


@functools.partial(jax.jit, static_argnums=0)
def _learn_and_act(features, agent, before, action, reward, after, terminated):
    """Update with the step made, then choose the next action: one program per step."""
    x, y = features(before), features(after)
    agent, delta = update(agent, Transition(x, action, reward, y, terminated))
    agent, action = act(agent, y)
    return agent, action, delta


def train_gym(
    agent: LinearQ, env: Any, features: Features, *, episodes: int, seed: int = 0
) -> tuple[LinearQ, np.ndarray]:
    """Learn from whole episodes of a Gymnasium environment.

    An episode that was cut by a time limit (`truncated`) is not taken for one that ended: the
    value of its last state counts.

    Args:
        agent: the learner.
        env: of `gymnasium.make`.
        features: `observation -> [F]`, hashable (`features_for`).
        episodes: how many.
        seed: of the first reset; the environment draws on from there.

    Returns:
        `(agent, returns [episodes])`, undiscounted.

    Raises:
        ValueError: the environment's actions are not those of the agent.

    Example:
        >>> import gymnasium
        >>> from aidx.rl import LinearQConfig, init
        >>> env = gymnasium.make("FrozenLake-v1", is_slippery=False)
        >>> agent = init(LinearQConfig(feature_size=16, action_size=4))
        >>> agent, returns = train_gym(agent, env, features_for(env), episodes=2)
        >>> returns.shape, int(agent.step) > 0
        ((2,), True)
    """
    first = _actions(agent, env)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed if episode == 0 else None)
        agent, action = _act(features, agent, observation, False)
        ended = False
        while not ended:
            chosen = int(action)
            after, reward, terminated, truncated, _ = env.step(first + chosen)
            agent, action, _ = _learn_and_act(
                features, agent, observation, chosen, float(reward), after, bool(terminated)
            )
            observation, ended = after, terminated or truncated
            returns[episode] += float(reward)
    return agent, returns


def evaluate_gym(
    agent: LinearQ, env: Any, features: Features, *, episodes: int, seed: int = 0
) -> np.ndarray:
    """The returns of greedy episodes; the agent learns nothing.

    Raises:
        ValueError: the environment's actions are not those of the agent.

    Example:
        >>> import gymnasium
        >>> from aidx.rl import LinearQConfig, init
        >>> env = gymnasium.make("FrozenLake-v1", is_slippery=False)
        >>> agent = init(LinearQConfig(feature_size=16, action_size=4))
        >>> evaluate_gym(agent, env, features_for(env), episodes=1).tolist()
        [0.0]
    """
    first = _actions(agent, env)
    returns = np.zeros(episodes)
    for episode in range(episodes):
        observation, _ = env.reset(seed=seed if episode == 0 else None)
        ended = False
        while not ended:
            _, action = _act(features, agent, observation, True)
            observation, reward, terminated, truncated, _ = env.step(first + int(action))
            returns[episode] += float(reward)
            ended = terminated or truncated
    return returns


def _actions(agent: LinearQ, env: Any) -> int:
    """The first action's number, after a check of how many there are."""
    from gymnasium import spaces

    space = env.action_space
    if not isinstance(space, spaces.Discrete) or int(space.n) != agent.config.action_size:
        raise ValueError(f"actions {space}, the agent has {agent.config.action_size=}")
    return int(space.start)
