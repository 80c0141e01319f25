"""aidx's own ops keep the laws, on eight devices."""

import re

from tests.many_devices import output_on_devices


def test_the_ops_of_aidx_keep_every_law():
    output = output_on_devices("tests.kernels.checked_ops", 8)
    checked = re.findall(r"^op_check (\w+): (\d+) ok$", output, re.MULTILINE)
    counts = {name: int(count) for name, count in checked}
    ops = ("rms_norm", "layer_norm", "turned", "flash", "paged", "write_kv", "drawn")
    ops = (*ops, "spmm", "sddmm", "two_four")
    assert all(counts[name] >= 7 for name in ops), counts
    assert output.count("devices  ") >= 7 and output.count("there is one device") == 0
    assert output.splitlines()[-1] == "-- check_custom --"
