"""A training run of its own process, for tests that kill it: `killed.py FOLDER WHEN`.

WHEN is `never`, `step:N` (SIGKILL while step N is in flight), `save:N` (SIGKILL while the
checkpoint of step N is being written) or `term:N` (SIGTERM to itself in step N).
"""

import os
import pathlib
import signal
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax

from aidx.train import Callback, Checkpoints, fit, init_state, make_train_step

STEPS, SAVE_EVERY = 12, 3
OPTIMIZER = optax.adamw(0.05)


def loss_fn(p, batch, key):
    x = batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)
    return ((jnp.tanh(x @ p["w"]) - batch["y"]) ** 2).sum(), batch["y"].size


def batch(step):
    rng = np.random.default_rng(step)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    return {"x": draw(4, 8), "y": draw(4, 3)}


def first_state():
    # The padding makes a save long enough to be killed within.
    params = {"w": jnp.ones((8, 3)), "padding": jnp.ones((1 << 20,))}
    return init_state(params, OPTIMIZER, jax.random.key(5), ema=True)


class Kill(Callback):
    def __init__(self, folder, when, number):
        self.folder, self.when, self.number = pathlib.Path(folder), when, number

    def on_state(self, step, state):
        if step == self.number and self.when == "step":
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.number and self.when == "term":
            os.kill(os.getpid(), signal.SIGTERM)

    def on_save(self, step):
        if self.when == "save" and step == self.number:
            threading.Thread(target=self.when_half_written, args=(step,)).start()
            time.sleep(60)  # the write goes on beside

    def when_half_written(self, step):
        while not any(p.name != str(step) for p in self.folder.glob(f"{step}*")):
            assert not (self.folder / str(step)).exists(), "the save was over too soon"
        os.kill(os.getpid(), signal.SIGKILL)


def run(folder, when="never"):
    when, _, number = when.partition(":")
    kill = Kill(folder, when, int(number or -1))
    step = make_train_step(loss_fn, OPTIMIZER, ema_decay=0.9, microbatches=2)
    with Checkpoints(folder, keep=2) as checkpoints:
        return fit(
            step, first_state(), batch, steps=STEPS, checkpoints=checkpoints,
            save_every=SAVE_EVERY, callbacks=[kill],
        )  # fmt: skip


if __name__ == "__main__":
    run(*sys.argv[1:])
