"""The golden cases of tests/oracles, as checkpoints on disk and as expected values."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from aidx.models import bind_forward
from tests.oracles.weights import draw

ORACLES = pathlib.Path(__file__).resolve().parent.parent / "oracles"
TOLERANCE = 1e-4  # of the largest logit
PADDED = 112


@dataclasses.dataclass(frozen=True)
class Case:
    """config.json, tensors, prompt and what transformers makes of them."""

    name: str
    config: dict
    tensors: dict
    max_len: int
    tokens: np.ndarray
    logits: np.ndarray
    greedy: np.ndarray

    def write(self, directory, *, dtype=np.float32, change=lambda tensors: tensors, **config):
        """A checkpoint directory with one model.safetensors."""
        directory.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.astype(dtype) for k, v in change(dict(self.tensors)).items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        (directory / "config.json").write_text(json.dumps(self.config | config))
        return directory


def read_cases(file: pathlib.Path) -> dict[str, Case]:
    with np.load(file) as arrays:
        arrays = dict(arrays)
    cases = {}
    for key in [k for k in arrays if k.endswith("/meta")]:
        name = key.removesuffix("/meta")
        meta = json.loads(str(arrays[key]))
        tensors = {
            n: draw(meta["seed"], n, tuple(shape), meta["std"])
            for n, shape in meta["tensors"].items()
        }
        values = {k: arrays[f"{name}/{k}"] for k in ("tokens", "logits", "greedy")}
        cases[name] = Case(name, meta["config"], tensors, meta["max_len"], **values)
    return cases


@functools.cache
def golden_cases() -> dict[str, Case]:
    cases = {}
    for file in sorted(ORACLES.glob("models_*.npz")):
        cases |= read_cases(file)
    return cases


def dense_attend(cache, layer, q, k, v, *, window=None, scale=None, soft_cap=None, sinks=None):
    """Causal attention over the whole score matrix, in float32: the oracle's `Attend`."""
    assert soft_cap is None and sinks is None
    T, N, H = q.shape[-3:]
    K = k.shape[-2]
    q = q.reshape(*q.shape[:-2], K, N // K, H)
    scores = jnp.einsum("...tkgh,...skh->...kgts", q, k, preferred_element_type=jnp.float32)
    scores = scores * (H**-0.5 if scale is None else scale)
    back = np.arange(T)[:, None] - np.arange(T)[None, :]
    seen = (back >= 0) & (back < (window or T))
    scores = jnp.where(seen.reshape((1,) * (scores.ndim - 2) + (T, T)), scores, -jnp.inf)
    out = jnp.einsum("...kgts,...skh->...tkgh", jax.nn.softmax(scores), v)
    return out.reshape(*out.shape[:-3], N, v.shape[-1]).astype(q.dtype), cache


@functools.partial(jax.jit, static_argnums=0)
def run_forward(config, params, tokens):
    """Logits of a `[T]` prompt; one compilation per config."""
    positions = jnp.arange(tokens.shape[-1], dtype=jnp.int32)
    positions = jnp.broadcast_to(positions, tokens.shape)
    with jax.default_matmul_precision("highest"):
        return bind_forward(config)(params, tokens, positions, dense_attend, None)[0]


def prompt_logits(config, params, tokens):
    """Logits of the prompt's positions, through the padded shape that greedy decoding uses."""
    padded = np.zeros(PADDED, np.int32)
    padded[: len(tokens)] = tokens
    return np.asarray(run_forward(config, params, padded))[: len(tokens)]


def greedy_tokens(config, params, tokens, count):
    """Greedy decoding by recomputing the whole growing sequence."""
    padded = np.zeros(PADDED, np.int32)
    padded[: len(tokens)] = tokens
    for i in range(len(tokens), len(tokens) + count):
        padded[i] = np.asarray(run_forward(config, params, padded))[i - 1].argmax()
    return padded[len(tokens) : len(tokens) + count]


def distance(logits, case):
    """The largest difference from the reference, in units of its largest logit."""
    return np.abs(logits - case.logits).max() / np.abs(case.logits).max()
