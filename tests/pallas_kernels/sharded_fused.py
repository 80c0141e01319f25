"""Run by test_fused_doors.py in a process with eight CPU devices: sharding rules lose nothing."""

from aidx.kernels import op_check
from tests.pallas_kernels.fused_cases import case, split
from tests.pallas_kernels.test_fused_doors import KERNELS, STATIC

if __name__ == "__main__":
    for name, kernel in KERNELS.items():
        shape = case(
            name, (8,), 16, shard=split(name), dtypes=("float32",), static=STATIC.get(name, {})
        )
        op_check(kernel, [shape], laws=["reference", "devices"])
        print(name, "kept over 8 devices", flush=True)
