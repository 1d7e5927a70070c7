"""Compiles every Triton kernel as the networks use it and prints what it occupies.

`python tests/kernels/aot_report.py CAPABILITY STATES DTYPE`, for example `90 16 bf16`. A program of its own because the
tests' process runs Triton's interpreter.
"""

import sys

from aot import compile_kernel

from mambair_ds.kernels.philox import triton as philox
from mambair_ds.kernels.selective_scan import triton as scan

ACTIVATIONS = {"u", "delta", "B", "C", "y", "grad_y", "grad_u", "grad_delta"}
INTEGERS = {
    "length": "i32",
    "channels": "i32",
    "chunks": "i32",
    "count": "i32",
    "seed": "i64",
    "stream": "i64",
    "positions": "*i64",
}


def report(capability: int, states: int, dtype: str) -> None:
    """Print one line a kernel: its name, registers, stack and shared memory."""
    common = {"N": states, "CHUNK": scan.CHUNK, "WIDTH": scan.WIDTH, "SOFTPLUS": True}
    tile = {**common, "ROWS": states}
    kernels = [
        (scan.forward_chunks, tile, scan.WARPS),
        (scan.carry, {"N": states, "WIDTH": scan.WIDTH, "REVERSE": True}, scan.WARPS),
        (scan.forward_outputs, tile, scan.WARPS),
        (scan.backward_chunks, tile, scan.WARPS),
        (scan.backward_inputs, common, scan.WARPS),
        (philox.fill, {"NORMAL": False, "BLOCK": philox.BLOCK}, 4),
        (philox.fill, {"NORMAL": True, "BLOCK": philox.BLOCK}, 4),
    ]
    for kernel, constants, warps in kernels:
        types = {name: INTEGERS.get(name, f"*{dtype}" if name in ACTIVATIONS else "*fp32") for name in kernel.arg_names}
        usage = compile_kernel(kernel, types, constants, capability, warps)
        print(kernel.__name__, usage.registers, usage.stack, usage.shared)


if __name__ == "__main__":
    report(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
