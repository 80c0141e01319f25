"""Linear Q-learning: updates by hand, the optimum of a small MDP, and exact continuation."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from aidx.arrays.serialize import deserialize, serialize
from aidx.rl import (
    Algorithm,
    LinearQ,
    LinearQConfig,
    TileCoding,
    Transition,
    act,
    init,
    load,
    one_hot,
    policy,
    q_values,
    save,
    train,
    update,
)

F, A = 3, 2
W = np.array([[1.0, -2.0, 0.5], [0.5, 1.0, 2.0]], np.float32)
X, Y = np.array([1.0, 2.0, -1.0], np.float32), np.array([0.5, -1.0, 3.0], np.float32)


def agent_of(**options):
    options = dict(feature_size=F, action_size=A, learning_rate=0.25, discount=0.5) | options
    agent = init(LinearQConfig(**options))
    weights = np.stack([W, -W]) if agent.weights.ndim == 3 else W
    return agent.replace(weights=jnp.asarray(weights))


jitted_update = jax.jit(update)


@pytest.mark.smoke
@pytest.mark.parametrize("done", [False, True])
@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_an_update_is_the_one_computed_by_hand(algorithm, done):
    agent = agent_of(algorithm=algorithm, epsilon_start=0.5, epsilon_decay=0.5, epsilon_end=0.1)
    new, delta = jitted_update(
        agent, Transition(X, jnp.int32(1), jnp.float32(2.0), Y, jnp.bool_(done))
    )
    changed = 0
    if algorithm is Algorithm.DOUBLE_Q:
        moved = np.asarray(new.weights) != np.asarray(agent.weights)
        changed = int(moved[1].any())
        assert moved.any(axis=(1, 2)).sum() == 1  # one of the two learns
        own, other = np.asarray(agent.weights)[[changed, 1 - changed]]
        value = (other @ Y)[np.argmax(own @ Y)]
    elif algorithm is Algorithm.EXPECTED_SARSA:
        own, q = W, W @ Y
        pi = np.full(A, 0.25)
        pi[np.argmax(q)] += 0.5
        value = pi @ q
    else:
        own = W
        value = (W @ Y).max()
    target = 2.0 + (0.0 if done else 0.5 * value)
    expected = own.copy()
    expected[1] += 0.25 * (target - own[1] @ X) * X
    learned = new.weights[changed] if algorithm is Algorithm.DOUBLE_Q else new.weights
    np.testing.assert_allclose(learned, expected, rtol=1e-6)
    np.testing.assert_allclose(delta, target - own[1] @ X, rtol=1e-6)
    assert int(new.step) == 1 and float(new.epsilon) == 0.25


def test_epsilon_decays_to_its_end_and_not_below():
    agent = agent_of(epsilon_start=0.2, epsilon_decay=0.5, epsilon_end=0.1)
    transition = Transition(X, jnp.int32(0), jnp.float32(0.0), Y, jnp.bool_(True))
    epsilons = []
    for _ in range(3):
        agent, _ = jitted_update(agent, transition)
        epsilons.append(float(agent.epsilon))
    np.testing.assert_allclose(epsilons, [0.1, 0.1, 0.1])


def test_actions_follow_the_policy_and_the_key():
    agent = agent_of(epsilon_start=0.6)
    draw = jax.jit(jax.vmap(lambda key: act(agent.replace(key=key), X)[1]))
    actions = np.asarray(draw(jax.random.split(jax.random.key(1), 4000)))
    share = np.bincount(actions, minlength=A) / actions.size
    np.testing.assert_allclose(policy(agent, X), [0.3, 0.7], rtol=1e-6)  # W @ X = [-3.5, 0.5]
    np.testing.assert_allclose(share, [0.3, 0.7], atol=0.03)
    first, second = act(agent, X), act(agent, X)
    assert first[1] == second[1]  # the same agent does the same
    assert (jax.random.key_data(first[0].key) != jax.random.key_data(agent.key)).any()
    still, best = act(agent, X, greedy=True)
    assert still is agent and int(best) == 1


# A corridor of five states: left and right; the right end pays 1, the left end 0.2, both terminal.
STATES, GAMMA = 5, 0.9


def corridor(state, action, key):
    del key
    after = state + 2 * action - 1
    left, right = after < 0, after >= STATES
    reward = jnp.where(right, 1.0, jnp.where(left, 0.2, 0.0))
    return jnp.clip(after, 0, STATES - 1), reward, left | right


def optimum():
    """Value iteration in float64."""
    q = np.zeros((STATES, 2))
    for _ in range(200):
        v = q.max(1)
        for s in range(STATES):
            q[s, 0] = 0.2 if s == 0 else GAMMA * v[s - 1]
            q[s, 1] = 1.0 if s == STATES - 1 else GAMMA * v[s + 1]
    return q


def learn(agent, env_state, steps):
    return train(
        agent,
        env_state,
        lambda key: jax.random.randint(key, (), 0, STATES),
        corridor,
        lambda s: one_hot(s, STATES),
        jax.random.key(5),
        steps=steps,
    )


run = jax.jit(learn, static_argnums=2)


def corridor_agent(algorithm):
    # Explore always: off-policy learning finds the optimum all the same.  On-policy expected SARSA
    # learns the value of what it does, so its exploration has to end.
    on_policy = algorithm is Algorithm.EXPECTED_SARSA
    return init(
        LinearQConfig(
            feature_size=STATES,
            action_size=2,
            learning_rate=0.2,
            discount=GAMMA,
            epsilon_end=0.0 if on_policy else 1.0,
            epsilon_decay=0.9992 if on_policy else 1.0,
            algorithm=algorithm,
        )
    )


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_learning_finds_the_optimum_of_a_small_mdp(algorithm):
    agent, _, seen = run(corridor_agent(algorithm), jnp.int32(2), 8000)
    q, best = np.asarray(q_values(agent, jnp.eye(STATES))), optimum()
    np.testing.assert_array_equal(q.argmax(1), best.argmax(1))
    if algorithm is Algorithm.EXPECTED_SARSA:
        np.testing.assert_allclose(q.max(1), best.max(1), atol=0.02)
    else:
        np.testing.assert_allclose(q, best, atol=0.02)
    assert abs(np.asarray(seen.delta[-500:])).mean() < abs(np.asarray(seen.delta[:500])).mean() / 5


@pytest.mark.parametrize("algorithm", list(Algorithm))
def test_a_saved_agent_goes_on_bit_for_bit(algorithm, tmp_path):
    whole, state, _ = run(*run(corridor_agent(algorithm), jnp.int32(2), 8000)[:2], 8000)
    half, middle, _ = run(corridor_agent(algorithm), jnp.int32(2), 8000)
    save(tmp_path / "agent.aidx", half)
    loaded = load(tmp_path / "agent.aidx")
    assert loaded.config == half.config and type(loaded) is LinearQ
    resumed, state2, _ = run(loaded, deserialize(serialize(middle)), 8000)
    as_bytes = lambda agent: bytes(serialize(agent))
    assert as_bytes(resumed) == as_bytes(whole) and int(state) == int(state2)


def test_bytes_that_are_no_agent_are_refused(tmp_path):
    agent = agent_of()
    good = serialize(agent)
    for bad in (
        agent.replace(weights=jnp.zeros((A, F + 1))),
        agent.replace(weights=jnp.zeros((A, F), jnp.bfloat16)),
        agent.replace(key=jnp.zeros(2, jnp.uint32)),
        agent.replace(step=3),
    ):
        with pytest.raises(ValueError, match="refuses what was read"):
            deserialize(serialize(bad))
    data = bytes(good).replace(b"feature_size", b"feature_sizes")
    with pytest.raises(ValueError):
        deserialize(data)
    (tmp_path / "tree").write_bytes(serialize([1, 2]))
    with pytest.raises(ValueError, match="holds a list, not a LinearQ"):
        load(tmp_path / "tree")


def test_a_time_limit_is_not_a_terminal_state():
    """Truncated after every step, a state that pays 1 for ever is still worth 1 / (1 - gamma)."""
    forever = lambda state, action, key: (state, jnp.float32(1), False, True)
    agent = init(LinearQConfig(feature_size=1, action_size=1, learning_rate=0.5, discount=0.5))
    agent, _, seen = train(
        agent, jnp.ones(1), lambda key: jnp.ones(1), forever, lambda s: s, jax.random.key(0),
        steps=100,
    )  # fmt: skip
    np.testing.assert_allclose(q_values(agent, jnp.ones(1)), [2.0], rtol=1e-5)
    assert seen.done.all()


def test_configs_are_validated():
    for bad in (
        dict(feature_size=0), dict(action_size=0), dict(learning_rate=0.0), dict(discount=-0.1),
        dict(epsilon_start=1.1), dict(epsilon_start=0.1, epsilon_end=0.2), dict(epsilon_decay=2.0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=next(iter(bad))):
            LinearQConfig(**{"feature_size": 2, "action_size": 2, **bad})
    with pytest.raises(ValueError, match="unknown Algorithm 'sarsa'; known: q_learning, double_q"):
        LinearQConfig(feature_size=2, action_size=2, algorithm="sarsa")
    with pytest.raises(ValueError, match="feature_size"):
        q_values(agent_of(), jnp.ones(F + 1))
    with pytest.raises(dataclasses.FrozenInstanceError):
        agent_of().step = 3


def test_tiles_are_where_they_should_be():
    coding = TileCoding((0.0, -1.0), (1.0, 1.0), (4, 2), tilings=4)
    rng = np.random.default_rng(0)
    points = rng.uniform((0, -1), (1, 1), (200, 2)).astype(np.float32)
    index = np.asarray(coding.indices(points))
    expected = np.empty_like(index)
    for i, p in enumerate(points):
        for t in range(4):
            cell = []
            for d, (lo, hi, n) in enumerate(((0.0, 1.0, 4), (-1.0, 1.0, 2))):
                where = (p[d] - np.float32(lo)) / np.float32(hi - lo) * np.float32(n)
                cell.append(int(np.floor(where + (t * (2 * d + 1) / 4) % 1.0)))
            expected[i, t] = t * 15 + cell[0] * 3 + cell[1]
    assert (index == expected).mean() > 0.999  # up to points on a border
    x = np.asarray(coding(points))
    assert x.shape == (200, coding.size) and (x.sum(1) == 4).all()
    outside = coding(np.array([[9.0, -9.0]], np.float32))
    np.testing.assert_array_equal(outside, coding(np.array([[1.0, -1.0]], np.float32)))
    # Points share more tiles the nearer they are.
    line = np.stack([np.linspace(0, 0.3, 7), np.zeros(7)], 1).astype(np.float32)
    shared = np.asarray(coding(line) @ coding(line[:1]).T)[:, 0]
    assert shared[0] == 4 and shared[-1] == 0 and (np.diff(shared) <= 0).all()
    for bad in (((0.0,), (0.0,), (4,)), ((0.0,), (np.inf,), (4,)), ((0.0,), (1.0,), (0,))):
        with pytest.raises(ValueError):
            TileCoding(*bad)
