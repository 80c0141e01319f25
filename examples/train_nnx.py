"""One loop for any model: the same classifier as a Flax NNX module and as plain functions.

    python examples/train_nnx.py

A loss function takes a pytree of parameters and returns a sum and its weight; where the pytree
comes from is nobody's business.  An NNX module is split into its structure (static) and its state
(the pytree); plain functions have a dict.  Both are trained by one `make_train_step` and `fit`, and
as they start from equal numbers and compute the same, they end equal.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from aidx.train import cross_entropy, fit, init_state, make_evaluate, make_train_step

CLASSES, FEATURES, HIDDEN = 3, 2, 32


def spirals(step: int, rows: int = 128) -> dict[str, np.ndarray]:
    """Points of three spiral arms, and which arm: a batch is a function of its number."""
    rng = np.random.default_rng(step)
    label = rng.integers(0, CLASSES, rows)
    radius = rng.uniform(0.1, 1.0, rows)
    angle = 4 * radius + 2 * np.pi * label / CLASSES + rng.normal(0, 0.1, rows)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=-1)
    return {"x": points.astype(np.float32), "y": label.astype(np.int32)}


class Classifier(nnx.Module):
    """Two hidden layers."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(FEATURES, HIDDEN, rngs=rngs)
        self.second = nnx.Linear(HIDDEN, HIDDEN, rngs=rngs)
        self.last = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = jnp.tanh(self.first(x))
        return self.last(jnp.tanh(self.second(x)))


def plain(params: dict, x: jax.Array) -> jax.Array:
    """The same network, a function of a dict."""
    layer = lambda name, x: x @ params[name]["kernel"] + params[name]["bias"][None]
    return layer("last", jnp.tanh(layer("second", jnp.tanh(layer("first", x)))))


def train(apply, params, steps: int) -> tuple[dict, dict[str, float]]:
    """Train any `apply(params, x) -> logits`; the parameters and a held-out evaluation."""

    def loss_fn(params, batch, key):
        del key  # nothing is random here
        return cross_entropy(apply(params, batch["x"]), batch["y"])

    optimizer = optax.adam(1e-2)
    step = make_train_step(loss_fn, optimizer, clip_norm=1.0)
    state = init_state(params, optimizer, jax.random.key(0))
    held = [spirals(10**6)]
    result = fit(step, state, spirals, steps=steps, evaluate=make_evaluate(loss_fn, held))
    return result.state.params, result.evaluation


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(argv)
    structure, params = nnx.split(Classifier(nnx.Rngs(0)))
    copied = jax.tree.map(jnp.asarray, nnx.to_pure_dict(params))
    trained, evaluation = train(lambda p, x: nnx.merge(structure, p)(x), params, args.steps)
    model = nnx.merge(structure, trained)  # a module again, with trained weights
    assert model(jnp.zeros((1, FEATURES))).shape == (1, CLASSES)
    _, again = train(plain, copied, args.steps)
    for name, found in (("nnx", evaluation), ("plain functions", again)):
        print(f"{name:16} loss {found['loss']:.4f} accuracy {found['accuracy']:.1%}")
    return {"nnx": evaluation, "plain": again}


if __name__ == "__main__":
    main()
