"""Geometries: presets, validation, and memory that is what it was estimated to be."""

import pytest

from aidx.cache import KVCache, KVCacheConfig
from aidx.cache.config import PRESETS


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", (12, 12, 12, 64, 1024, None)),
        ("gpt2-medium", (24, 16, 16, 64, 1024, None)),
        ("gpt2-large", (36, 20, 20, 64, 1024, None)),
        ("gpt2-xl", (48, 25, 25, 64, 1024, None)),
        ("llama-7b", (32, 32, 32, 128, 4096, None)),
        ("llama-13b", (40, 40, 40, 128, 4096, None)),
        ("llama-70b", (80, 64, 8, 128, 4096, None)),
        ("llama-3-8b", (32, 32, 8, 128, 8192, None)),
        ("llama-3-70b", (80, 64, 8, 128, 8192, None)),
        ("mistral-7b", (32, 32, 8, 128, 32768, 4096)),
        ("qwen2-7b", (28, 28, 4, 128, 32768, None)),
        ("qwen3-8b", (36, 32, 8, 128, 40960, None)),
    ],
)
def test_presets_are_the_models(name, expected):
    config = KVCacheConfig.for_model(name)
    assert expected == (
        config.num_layers,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.max_seq_len,
        config.window,
    )


def test_every_preset_is_valid_and_takes_changes():
    for name in PRESETS:
        config = KVCacheConfig.for_model(name.upper(), max_batch=3, max_seq_len=64, dtype="int8")
        assert (config.max_batch, config.max_seq_len, config.dtype) == (3, 64, "int8")
    with pytest.raises(ValueError, match=r"'gpt5'; known: gpt2, "):
        KVCacheConfig.for_model("gpt5")
    with pytest.raises(TypeError, match="max_batches"):
        KVCacheConfig.for_model("gpt2", max_batches=1)


GEOMETRY = dict(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_layers=0), "num_layers=0"),
        (dict(head_dim=-1), "head_dim=-1"),
        (dict(max_seq_len=0), "max_seq_len=0"),
        (dict(max_batch=0), "max_batch=0"),
        (dict(num_kv_heads=3), "num_heads=4 is not a multiple of .*num_kv_heads=3"),
        (dict(window=0), "window=0"),
        (dict(window=(4,)), "1 windows for .*num_layers=2"),
        (dict(rollback=-1), "rollback=-1"),
        (dict(dtype="int4"), "'int4' is none of bfloat16"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        KVCacheConfig(**{**GEOMETRY, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(dtype="int8", max_batch=3),
        dict(dtype="float8_e4m3fn", window=5),
        dict(dtype="float16", window=(None, 5), rollback=2),
        dict(window=100),
    ],
)
def test_memory_is_what_it_was_estimated_to_be(changes):
    config = KVCacheConfig(**GEOMETRY, max_seq_len=16, **changes)
    cache = KVCache.create(config)
    assert cache.memory_bytes == config.estimate_memory_bytes()
    assert cache.stats().memory_bytes == cache.memory_bytes
    assert tuple(cache.capacity(layer) for layer in range(2)) == config.capacities


def test_int8_halves_the_cache_but_for_the_scales():
    half = KVCacheConfig.for_model("llama-3-8b").estimate_memory_bytes()
    eighth = KVCacheConfig.for_model("llama-3-8b", dtype="int8").estimate_memory_bytes()
    assert eighth == half // 2 * (128 + 4) // 128
