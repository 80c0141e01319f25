"""Linear Q-learning: `Q(s, a) = w_a . x(s)`, as pure functions of a frozen agent.

    agent = init(LinearQConfig(feature_size=F, action_size=A))
    agent, action = act(agent, x)
    agent, error = update(agent, Transition(x, action, reward, next_x, done))

The agent holds its key and its step, so what it does next is a function of it alone: saved and
loaded, it goes on bit for bit.
"""

import dataclasses
import enum
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from aidx.arrays.serialize import load_tree, register, save_tree
from aidx.typing import Array


class Algorithm(enum.StrEnum):
    """Which target an update moves to; see `update`."""

    Q_LEARNING = "q_learning"
    DOUBLE_Q = "double_q"
    EXPECTED_SARSA = "expected_sarsa"

    @classmethod
    def _missing_(cls, value: object):
        raise ValueError(f"unknown Algorithm {value!r}; known: {', '.join(cls)}")


@dataclasses.dataclass(frozen=True)
class LinearQConfig:
    """What an agent is, beside what it has learned.

    Attributes:
        feature_size: F.
        action_size: A.
        learning_rate: of the update, per unit of squared feature length.
        discount: gamma, of the next state's value.
        epsilon_start: probability of a random action in the first step.
        epsilon_end: the least probability of one.
        epsilon_decay: epsilon is multiplied by it after every update.
        seed: of the exploration.
        algorithm: q_learning, double_q or expected_sarsa.

    Raises:
        ValueError: a number out of range or an unknown algorithm.

    Example:
        >>> LinearQConfig(feature_size=4, action_size=2).algorithm.value
        'q_learning'
        >>> LinearQConfig(feature_size=4, action_size=2, discount=1.5)
        Traceback (most recent call last):
        ValueError: discount=1.5 must lie in [0, 1]
    """

    feature_size: int
    action_size: int
    learning_rate: float = 0.1
    discount: float = 0.99
    epsilon_start: float = 1.0
    epsilon_end: float = 0.01
    epsilon_decay: float = 0.995
    seed: int = 0
    algorithm: Algorithm | str = Algorithm.Q_LEARNING

    def __post_init__(self):
        object.__setattr__(self, "algorithm", Algorithm(self.algorithm))
        for name in ("feature_size", "action_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be positive")
        for name in ("discount", "epsilon_start", "epsilon_end", "epsilon_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if self.epsilon_end > self.epsilon_start:
            raise ValueError(f"{self.epsilon_end=} is above {self.epsilon_start=}")


@struct.dataclass
class LinearQ:
    """An agent: its weights, how far it is, and its key."""

    weights: Array  # [A, F] f32; double_q [2, A, F]
    step: Array  # [] i32, updates made
    epsilon: Array  # [] f32, probability of a random action
    key: Array  # typed PRNG key; every act and every update of double_q takes a new one from it
    config: LinearQConfig = struct.field(pytree_node=False)


@struct.dataclass
class Transition:
    """One step in an environment."""

    features: Array  # [F]
    action: Array  # [] i32
    reward: Array  # [] f32
    next_features: Array  # [F]
    done: Array  # [] bool: the next state is terminal and has no value (a time limit is not that)


def init(config: LinearQConfig, key: Array | None = None) -> LinearQ:
    """An agent that knows nothing: all weights zero.

    Args:
        config: static.
        key: of the exploration; None is `jax.random.key(config.seed)`.

    Example:
        >>> init(LinearQConfig(feature_size=4, action_size=2)).weights.shape
        (2, 4)
    """
    double = config.algorithm is Algorithm.DOUBLE_Q
    shape = (*((2,) if double else ()), config.action_size, config.feature_size)
    return LinearQ(
        jnp.zeros(shape, jnp.float32),
        jnp.int32(0),
        jnp.float32(config.epsilon_start),
        jax.random.key(config.seed) if key is None else key,
        config,
    )


def q_values(agent: LinearQ, features: Array) -> Array:
    """`Q(s, a)` of every action: features `[*B, F]` to f32 `[*B, A]`; of double_q, the mean.

    Raises:
        ValueError: another number of features.

    Example:
        >>> agent = init(LinearQConfig(feature_size=2, action_size=2))
        >>> q_values(agent.replace(weights=jnp.eye(2)), jnp.array([3.0, 4.0])).tolist()
        [3.0, 4.0]
    """
    if features.shape[-1] != agent.config.feature_size:
        raise ValueError(f"{features.shape=}, the agent has {agent.config.feature_size=}")
    weights = agent.weights.mean(0) if agent.weights.ndim == 3 else agent.weights
    return _q(weights, features)


def _q(weights: Array, features: Array) -> Array:
    return jnp.einsum("...f,af->...a", features.astype(jnp.float32), weights, precision="highest")


def act(agent: LinearQ, features: Array, *, greedy: bool = False) -> tuple[LinearQ, Array]:
    """An epsilon-greedy action: random with probability epsilon, else the best (first of equals).

    Args:
        agent: gives the key, and takes the next one.
        features: `[F]`.
        greedy: no exploration; the agent stays as it is.

    Returns:
        `(agent, action i32 [])`.

    Example:
        >>> agent = init(LinearQConfig(feature_size=2, action_size=2, epsilon_start=0.01))
        >>> _, action = act(agent.replace(weights=jnp.eye(2)), jnp.array([0.0, 1.0]), greedy=True)
        >>> int(action)
        1
    """
    best = q_values(agent, features).argmax(-1).astype(jnp.int32)
    if greedy:
        return agent, best
    key, explore, draw = jax.random.split(agent.key, 3)
    random = jax.random.randint(draw, (), 0, agent.config.action_size, jnp.int32)
    action = jnp.where(jax.random.uniform(explore) < agent.epsilon, random, best)
    return agent.replace(key=key), action  # pyright: ignore


def policy(agent: LinearQ, features: Array) -> Array:
    """The probabilities of `act`: `[F]` to `[A]`, `epsilon / A` each and the rest for the best.

    Example:
        >>> agent = init(LinearQConfig(feature_size=2, action_size=2, epsilon_start=0.5))
        >>> policy(agent, jnp.ones(2)).tolist()
        [0.75, 0.25]
    """
    return _epsilon_greedy(q_values(agent, features), agent.epsilon)


def _epsilon_greedy(q: Array, epsilon: Array) -> Array:
    best = jax.nn.one_hot(q.argmax(-1), q.shape[-1], dtype=jnp.float32)
    return epsilon / q.shape[-1] + (1 - epsilon) * best


def update(agent: LinearQ, transition: Transition) -> tuple[LinearQ, Array]:
    """One step of temporal-difference learning.

        q_learning      G = r + gamma max_a Q(s', a)                       (Watkins, 1989)
        double_q        G = r + gamma Q_B(s', argmax_a Q_A(s', a)), A and B drawn by a coin, and
                        A learns                                           (van Hasselt, 2010)
        expected_sarsa  G = r + gamma sum_a pi(a | s') Q(s', a), pi epsilon-greedy
                                                                           (van Seijen et al., 2009)
        delta = G - Q(s, a)        w_a += learning_rate delta x(s)

    with no value beyond a terminal state.  Then epsilon decays.

    Returns:
        `(agent, delta)`, delta before the update.

    Example:
        >>> agent = init(LinearQConfig(feature_size=2, action_size=2, learning_rate=0.5))
        >>> x = jnp.array([1.0, 2.0])
        >>> agent, delta = update(agent, Transition(x, 1, 3.0, x, True))
        >>> agent.weights.tolist(), float(delta)
        ([[0.0, 0.0], [1.5, 3.0]], 3.0)
    """
    config, t = agent.config, transition
    key = agent.key
    w, w_next = agent.weights, agent.weights
    coin = jnp.int32(0)
    if config.algorithm is Algorithm.DOUBLE_Q:
        key, draw = jax.random.split(key)
        coin = jax.random.bernoulli(draw).astype(jnp.int32)
        w, w_next = agent.weights[coin], agent.weights[1 - coin]
    with jax.named_scope("target"):
        value = _next_value(config.algorithm, w, w_next, t.next_features, agent.epsilon)
        target = t.reward + config.discount * jnp.where(t.done, 0.0, value)
        delta = target - _q(w, t.features)[t.action]
    with jax.named_scope("update"):
        w = w.at[t.action].add(config.learning_rate * delta * t.features)
        weights = agent.weights.at[coin].set(w) if config.algorithm is Algorithm.DOUBLE_Q else w
    epsilon = jnp.maximum(config.epsilon_end, config.epsilon_decay * agent.epsilon)
    new = agent.replace(weights=weights, step=agent.step + 1, epsilon=epsilon, key=key)  # pyright: ignore
    return new, delta


def _next_value(algorithm, w, w_next, features, epsilon):
    q = _q(w, features)
    if algorithm is Algorithm.EXPECTED_SARSA:
        return (_epsilon_greedy(q, epsilon) * q).sum()
    return _q(w_next, features)[q.argmax()]


@struct.dataclass
class Trajectory:
    """What `train` saw, step by step."""

    reward: Array  # [steps]
    done: Array  # [steps] bool, the episode ended (terminated or truncated)
    delta: Array  # [steps]
    action: Array  # [steps] i32


def train(
    agent: LinearQ,
    env_state: Any,
    reset: Callable[[Array], Any],
    step: Callable[[Any, Array, Array], tuple],
    features: Callable[[Any], Array],
    key: Array,
    *,
    steps: int,
) -> tuple[LinearQ, Any, Trajectory]:
    """Act and update `steps` times inside one `lax.scan`; episodes begin anew when they end.

    Args:
        agent: the learner.
        env_state: of the environment; `reset(key)` gives one.
        reset: `key -> env_state`.
        step: `(env_state, action, key) -> (env_state, reward, terminated)`, or with `truncated` as
            a fourth: the episode ends without the next state being terminal.
        features: `env_state -> [F]`.
        key: of the environment's randomness; step t takes `fold_in(key, t)` of the agent's step.
        steps: static.

    Returns:
        `(agent, env_state, trajectory)`: trained further with the same key it goes on where it
        stopped, so that two calls of n steps are one of 2 n.

    Example:
        >>> agent = init(LinearQConfig(feature_size=1, action_size=2, discount=0.0))
        >>> bandit = lambda state, action, key: (state, jnp.float32(action), False)
        >>> agent, _, seen = jax.jit(lambda agent: train(
        ...     agent, jnp.ones(1), lambda key: jnp.ones(1), bandit, lambda s: s,
        ...     jax.random.key(0), steps=200))(agent)
        >>> int(q_values(agent, jnp.ones(1)).argmax()), seen.reward.shape
        (1, (200,))
    """

    def body(carry, _):
        agent, state = carry
        now = jax.random.fold_in(key, agent.step)
        step_key, reset_key = jax.random.split(now)
        x = features(state)
        agent, action = act(agent, x)
        after, reward, terminated, *rest = step(state, action, step_key)
        terminated = jnp.asarray(terminated, bool)
        done = terminated | rest[0] if rest else terminated
        seen = Transition(x, action, jnp.float32(reward), features(after), terminated)
        agent, delta = update(agent, seen)
        state = jax.tree.map(
            lambda fresh, old: jnp.where(done, fresh, old), reset(reset_key), after
        )
        return (agent, state), Trajectory(seen.reward, done, delta, action)

    (agent, env_state), trajectory = jax.lax.scan(body, (agent, env_state), length=steps)
    return agent, env_state, trajectory


def save(path: str | Path, agent: LinearQ) -> None:
    """Write an agent, its key and its config with it; see `aidx.arrays.save_tree`.

    Example:
        >>> import tempfile
        >>> agent = init(LinearQConfig(feature_size=4, action_size=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(f"{folder}/agent.aidx", agent)
        ...     load(f"{folder}/agent.aidx").config == agent.config
        True
    """
    save_tree(path, agent)


def load(path: str | Path) -> LinearQ:
    """An agent that goes on bit for bit.

    Raises:
        ValueError: the file is not what `save` wrote, or not an agent.
        FileNotFoundError: there is no such file.

    Example:
        >>> load("no/such/file")
        Traceback (most recent call last):
        FileNotFoundError: ...
    """
    agent = load_tree(path)
    if not isinstance(agent, LinearQ):
        raise ValueError(f"{path} holds a {type(agent).__name__}, not a LinearQ agent")
    return agent


def _check(agent: LinearQ) -> None:
    """Refuse bytes whose arrays are not those of the config."""
    expected = jax.eval_shape(lambda: init(agent.config))
    for name in ("weights", "step", "epsilon", "key"):
        a, b = getattr(agent, name), getattr(expected, name)
        if not isinstance(a, jax.Array) or a.shape != b.shape:
            raise ValueError(f"{name} of shape {getattr(a, 'shape', None)}, not {b.shape}")
        key = jnp.issubdtype(b.dtype, jax.dtypes.prng_key)
        if key != jnp.issubdtype(a.dtype, jax.dtypes.prng_key) or (not key and a.dtype != b.dtype):
            raise ValueError(f"{name} of dtype {a.dtype}, not {b.dtype}")


for _cls, _validate in (
    (Algorithm, None),
    (LinearQConfig, None),
    (Transition, None),
    (LinearQ, _check),
):
    register(_cls, name=f"aidx.rl.{_cls.__name__}", validate=_validate)
