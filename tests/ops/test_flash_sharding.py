"""Attention over eight devices equals attention on one, and needs no collectives."""

from tests.many_devices import output_on_devices


def test_sharded_attention_equals_one_device_without_collectives():
    assert output_on_devices("tests.ops.sharded_attention", 8).splitlines() == [
        "jit: no collectives",
        "shard_map: equal",
        "shard_map: the gradient of what is replicated is summed",
        "shard_map: paged attention over heads equal",
        "export: equal",
    ]
