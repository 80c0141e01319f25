"""Device count does not change a training step."""

from tests.many_devices import output_on_devices


def test_a_batch_over_four_devices_is_the_batch_on_one():
    assert output_on_devices("tests.train.sharded", 4).strip() == "equal"
