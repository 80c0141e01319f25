"""PNG and animated PNG of arrays, with the standard library alone: lossless, read by browsers."""

import struct
import zlib

import numpy as np

COLOUR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # channels -> grey, grey + alpha, RGB, RGBA


def encode_png(frames: np.ndarray, fps: float = 1.0) -> bytes:
    """u8 `[T, H, W, C]` as one PNG file; more than one frame makes it an animation.

    Raises:
      ValueError: not u8, channels other than 1 to 4, no frame, or fps that is not positive.

    >>> encode_png(np.zeros((1, 2, 3, 1), np.uint8))[:8]
    b'\\x89PNG\\r\\n\\x1a\\n'
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] not in COLOUR_TYPES:
        raise ValueError(f"{frames.dtype} {frames.shape} is not u8 [T, H, W, 1 to 4]")
    T, H, W, C = frames.shape
    if not T or not fps > 0:
        raise ValueError(f"{T} frames at {fps=}")
    parts = [chunk(b"IHDR", struct.pack(">IIBBBBB", W, H, 8, COLOUR_TYPES[C], 0, 0, 0))]
    if T > 1:
        parts.append(chunk(b"acTL", struct.pack(">II", T, 0)))
    sequence = 0
    for t, frame in enumerate(frames):
        # Every line begins with its filter: 0, none.
        lines = np.concatenate([np.zeros((H, 1), np.uint8), frame.reshape(H, W * C)], axis=1)
        data = zlib.compress(lines.tobytes(), 6)
        if T > 1:
            delay = max(1, round(1000 / fps))
            control = struct.pack(">IIIIIHHBB", sequence, W, H, 0, 0, delay, 1000, 0, 0)
            parts.append(chunk(b"fcTL", control))
            sequence += 1
        if t == 0:
            parts.append(chunk(b"IDAT", data))
        else:
            parts.append(chunk(b"fdAT", struct.pack(">I", sequence) + data))
            sequence += 1
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG file: length, kind, data, checksum.

    >>> chunk(b"IEND", b"").hex()
    '0000000049454e44ae426082'
    """
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
