"""Teacher logits on disk: the k most probable tokens of every position, computed once.

A directory holds three raw arrays and a header:

    top_k.json         format, version, tokens (n), k, vocab_size and the dtypes
    indices.bin        [n, k] u16, or u32 where the vocabulary is larger; most probable first
    log_probs.bin      [n, k] f16, natural

At k = 64 a token takes 256 bytes, where its logits over 128k words take 256 thousand.
"""

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from aidx.distill.divergence import log_softmax, weighted_mean
from aidx.typing import Array

FORMAT, VERSION = "aidx-top-k", 1


@dataclasses.dataclass(frozen=True)
class TopK:
    """The teacher's k best of each of n positions, memory-mapped."""

    indices: np.ndarray  # [n, k] u16 or u32
    log_probs: np.ndarray  # [n, k] f16
    vocab_size: int

    def __len__(self) -> int:
        return self.indices.shape[0]

    def __getitem__(self, where: Any) -> tuple[np.ndarray, np.ndarray]:
        """`(indices i32, log_probs f32)` of some positions, read from disk."""
        return (
            np.asarray(self.indices[where]).astype(np.int32),
            np.asarray(self.log_probs[where]).astype(np.float32),
        )


def top_k_of(logits: Array, k: int) -> tuple[Array, Array]:
    """The k most probable tokens: `[*B, V]` to indices i32 and log-probabilities f32 `[*B, k]`.

    Raises:
        ValueError: k is not between 1 and V.

    Example:
        >>> indices, log_probs = top_k_of(jnp.log(jnp.array([0.2, 0.5, 0.3])), 2)
        >>> indices.tolist(), [f"{p:.2f}" for p in jnp.exp(log_probs)]
        ([1, 2], ['0.50', '0.30'])
    """
    if not 1 <= k <= logits.shape[-1]:
        raise ValueError(f"{k=} must lie between 1 and {logits.shape[-1]} tokens")
    log_probs, indices = jax.lax.top_k(log_softmax(logits), k)
    return indices, log_probs


def write_top_k(path: str | Path, batches: Iterable[tuple[Any, Any]], *, vocab_size: int) -> TopK:
    """Write what `top_k_of` gives, batch after batch; the header last, so that all is there.

    Args:
        path: of the directory, made if need be.
        batches: `(indices, log_probs)`, each `[..., k]`, in the order of the positions.
        vocab_size: V.

    Raises:
        ValueError: batches that differ in k, indices outside the vocabulary, positive or NaN
            log-probabilities, or nothing to write.

    Example:
        >>> import tempfile
        >>> batch = top_k_of(jnp.array([[0.0, 1.0, 2.0]]), 2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     stored = write_top_k(folder, [batch, batch], vocab_size=3)
        ...     len(stored), stored[1][0].tolist()
        (2, [2, 1])
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "top_k.json").unlink(missing_ok=True)
    dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
    n, k = 0, 0
    with (folder / "indices.bin").open("wb") as ids, (folder / "log_probs.bin").open("wb") as logs:
        for indices, log_probs in batches:
            indices, log_probs = np.asarray(indices), np.asarray(log_probs)
            if indices.shape != log_probs.shape or (k and indices.shape[-1] != k):
                raise ValueError(f"{indices.shape=} and {log_probs.shape=} after k={k}")
            if indices.size and not 0 <= indices.min() <= indices.max() < vocab_size:
                raise ValueError(f"indices up to {indices.max()} outside {vocab_size=}")
            if not (log_probs <= 1e-3).all():
                raise ValueError("log-probabilities must not be positive, nor NaN")
            k = indices.shape[-1]
            n += indices.size // k
            ids.write(indices.astype(dtype).tobytes())
            logs.write(np.minimum(log_probs, 0).astype(np.float16).tobytes())
    if not n:
        raise ValueError("nothing to write")
    header = {
        "format": FORMAT,
        "version": VERSION,
        "tokens": n,
        "k": k,
        "vocab_size": vocab_size,
        "indices": dtype.name,
        "log_probs": "float16",
    }
    (folder / "top_k.json").write_text(json.dumps(header, indent=1) + "\n")
    return read_top_k(folder)


def read_top_k(path: str | Path) -> TopK:
    """Open a directory of `write_top_k`; the arrays are memory-mapped.

    Raises:
        ValueError: the directory is not complete, or not what its header says.

    Example:
        >>> read_top_k("no/such/directory")
        Traceback (most recent call last):
        ValueError: no/such/directory/top_k.json is missing: no complete top-k logits
    """
    folder = Path(path)
    file = folder / "top_k.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing: no complete top-k logits")
    try:
        header = json.loads(file.read_text())
        n, k, vocab_size = (int(header[name]) for name in ("tokens", "k", "vocab_size"))
        known = (header["format"], header["version"]) == (FORMAT, VERSION)
        dtypes = {"indices": header["indices"], "log_probs": header["log_probs"]}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a header of top-k logits: {error!r}") from error
    allowed = {"indices": ("uint16", "uint32"), "log_probs": ("float16",)}
    if not known or n < 1 or k < 1 or any(dtypes[a] not in allowed[a] for a in allowed):
        raise ValueError(f"{file}: {header} is not version {VERSION} of {FORMAT}")
    arrays = {}
    for name, dtype in dtypes.items():
        part, wanted = folder / f"{name}.bin", n * k * np.dtype(dtype).itemsize
        if not part.is_file() or part.stat().st_size != wanted:
            raise ValueError(f"{part} does not hold the {wanted} bytes of [{n}, {k}] {dtype}")
        arrays[name] = np.memmap(part, dtype, "r", shape=(n, k))
    return TopK(arrays["indices"], arrays["log_probs"], vocab_size)


def top_k_loss(
    student_logits: Array,
    indices: Array,
    log_probs: Array,
    *,
    temperature: float = 1.0,
    tail: str = "bucket",
    weights: Array | None = None,
) -> Array:
    """Forward KL to a teacher of whom only the k best tokens are known.

        bucket       T = 1: the other V - k tokens are one event, of probability 1 - sum_k t
                     (the KL of k + 1 events: a lower bound of the whole, exact where k = V)
        renormalise  any T: both distributions are cut to the k tokens and normalised there

        L = T^2 mean_b sum_i t_i (log t_i - log s_i)

    Args:
        student_logits: `[*B, V]`.
        indices: i32 `[*B, k]`.
        log_probs: of the teacher at temperature 1, f32 `[*B, k]`.
        temperature: T.
        tail: what becomes of the rest.
        weights: `[*B]`.

    Raises:
        ValueError: shapes, an unknown tail, or a bucket at another temperature than 1 (the tail's
            share at that temperature is not on the disk).

    Example:
        >>> logits = jnp.array([[0.0, 1.0, 2.0]])
        >>> abs(float(top_k_loss(logits, *top_k_of(logits, 2)))) < 1e-6
        True
    """
    check_top_k(student_logits.shape[:-1], indices, log_probs, temperature, tail)
    z = student_logits.astype(jnp.float32)
    picked = jnp.take_along_axis(z, indices, axis=-1)
    lse = jax.nn.logsumexp(z, axis=-1)
    rows = event_divergence(picked, lse, log_probs, temperature, tail)
    return temperature**2 * weighted_mean(rows, weights)


def check_top_k(shape: tuple, indices: Array, log_probs: Array, temperature: float, tail: str):
    """Refuse what `top_k_loss` says it refuses; `shape` is `[*B]` of the student.

    Example:
        >>> check_top_k((2,), jnp.zeros((2, 3), int), jnp.zeros((2, 3)), 2.0, "bucket")
        Traceback (most recent call last):
        ValueError: a bucket for the tail is known at temperature 1, not 2.0
    """
    if indices.shape != log_probs.shape or indices.shape[:-1] != shape:
        raise ValueError(
            f"{indices.shape=}, {log_probs.shape=} and a student of {shape} do not go together"
        )
    if tail not in ("bucket", "renormalise"):
        raise ValueError(f"unknown tail {tail!r}; known: bucket, renormalise")
    if tail == "bucket" and temperature != 1.0:
        raise ValueError(f"a bucket for the tail is known at temperature 1, not {temperature}")
    if not temperature > 0:
        raise ValueError(f"{temperature=} must be positive")


def event_divergence(
    picked: Array, lse: Array, log_probs: Array, temperature: float, tail: str
) -> Array:
    """`sum_i t_i (log t_i - log s_i)` of the known events, per position; see `top_k_loss`.

    Args:
        picked: the student's logits at the teacher's tokens, f32 `[*B, k]`.
        lse: the logsumexp of all its logits, f32 `[*B]`.
        log_probs: of the teacher, `[*B, k]`.
        temperature, tail: as `top_k_loss`.

    Example:
        >>> z = jnp.array([[1.0, 0.0]])
        >>> float(event_divergence(z, jax.nn.logsumexp(z, -1), jax.nn.log_softmax(z), 2.0,
        ...                        "renormalise")[0])
        0.0
    """
    if tail == "renormalise":
        log_s, log_t = log_softmax(picked, temperature), log_softmax(log_probs, temperature)
    else:
        log_s = _with_tail(picked - lse[..., None])
        log_t = _with_tail(log_probs.astype(jnp.float32))
    t = jnp.exp(log_t)
    return jnp.where(t > 0, t * jnp.where(t > 0, log_t - log_s, 0.0), 0.0).sum(-1)


def _with_tail(log_p: Array) -> Array:
    """`log(1 - sum p)` appended; f16 may leave a sum above one, which is no tail at all."""
    rest = 1 - jnp.exp(log_p).sum(-1, keepdims=True)
    tiny = 1e-7
    log_rest = jnp.where(rest > tiny, jnp.log(jnp.maximum(rest, tiny)), jnp.log(tiny))
    return jnp.concatenate([log_p, log_rest], axis=-1)
