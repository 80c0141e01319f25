"""Parameters and KV heads spread over a mesh change no token."""

from tests.many_devices import output_on_devices


def test_two_devices_give_the_tokens_of_one():
    assert output_on_devices("tests.engine.tensor_parallel", 2).endswith("equal\n")
