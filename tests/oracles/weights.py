"""Random weights that are the same everywhere: numpy's frozen RandomState, one stream per name.

Imported by the scripts of this folder, which run under a Python with torch and without aidx, and
by the tests, which run under a Python with aidx and without torch.
"""

import zlib

import numpy as np


def draw(seed: int, name: str, shape: tuple[int, ...], std: float) -> np.ndarray:
    """A float32 tensor by name: matrices and biases normal with std, norm scales 1 + 0.3 normal.

    At the customary std of 0.02 attention is nearly uniform and a wrong rotary embedding changes
    almost nothing; norm scales and biases are random so that leaving one out shows.
    """
    state = np.random.RandomState((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**32)
    x = state.standard_normal(shape).astype(np.float32)
    is_scale = len(shape) == 1 and name.endswith("weight")
    return 1.0 + 0.3 * x if is_scale else np.float32(std) * x


def draw_tokens(seed: int, length: int, vocab_size: int) -> np.ndarray:
    """Prompt ids, i32 `[length]`."""
    return np.random.RandomState(seed).randint(0, vocab_size, length).astype(np.int32)
