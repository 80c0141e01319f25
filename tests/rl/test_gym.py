"""Linear Q-learning in real Gymnasium environments."""

import gymnasium
import jax.numpy as jnp
import pytest

from aidx.rl import LinearQConfig, evaluate_gym, features_for, init, q_values, train_gym


def test_frozen_lake_is_solved():
    env = gymnasium.make("FrozenLake-v1", is_slippery=False)
    features = features_for(env)
    agent = init(
        LinearQConfig(feature_size=16, action_size=4, learning_rate=0.5, discount=0.95,
                      epsilon_decay=0.9997, epsilon_end=0.1)
    )  # fmt: skip
    agent, returns = train_gym(agent, env, features, episodes=800, seed=3)
    assert (evaluate_gym(agent, env, features, episodes=3) == 1.0).all()
    assert returns[-100:].mean() > returns[:100].mean()
    start = float(q_values(agent, features(jnp.int32(0))).max())
    assert start == pytest.approx(0.95**5, abs=0.05)  # six steps to the goal


def test_cart_pole_balances_with_tiles():
    env = gymnasium.make("CartPole-v1")
    features = features_for(
        env, tiles=3, tilings=8, bounds=((-2.4, -3.0, -0.21, -3.0), (2.4, 3.0, 0.21, 3.0))
    )
    with pytest.raises(ValueError, match="give bounds"):
        features_for(env)
    agent = init(
        LinearQConfig(feature_size=features.size, action_size=2, learning_rate=0.05, discount=0.99,
                      epsilon_start=0.3, epsilon_decay=0.999, epsilon_end=0.0)
    )  # fmt: skip
    before = evaluate_gym(agent, env, features, episodes=5)
    agent, _ = train_gym(agent, env, features, episodes=70, seed=1)
    after = evaluate_gym(agent, env, features, episodes=5, seed=100)
    assert before.mean() < 15 and after.mean() > 60


def test_actions_that_do_not_fit_are_refused():
    env = gymnasium.make("CartPole-v1")
    agent = init(LinearQConfig(feature_size=4, action_size=3))
    with pytest.raises(ValueError, match="action_size=3"):
        train_gym(agent, env, lambda x: x, episodes=1)
