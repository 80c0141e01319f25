"""The checksum of event files is tensorboardX's, at every length about a block's borders."""

import hypothesis
import hypothesis.strategies as st
import pytest
from tensorboardX.crc32c import crc32c

from aidx.telemetry._checksum import BLOCK, SHORT, crc32c_of

BORDERS = [m * BLOCK + d for m in (1, 2, 3) for d in range(-5, 6)]


@pytest.mark.parametrize("size", [0, 1, SHORT - 1, SHORT, SHORT + 1, *BORDERS])
def test_every_length(size):
    data = bytes((7 * i + 13) % 251 for i in range(size))
    assert crc32c_of(data) == crc32c(data)


@hypothesis.given(st.binary(min_size=SHORT, max_size=300))
def test_any_bytes(data):
    assert crc32c_of(data) == crc32c(data)
    assert crc32c_of(data[:-1] + bytes([data[-1] ^ 1])) != crc32c_of(data)
