"""Compiles the depthwise convolution's Triton kernels as the networks use them and prints what they occupy.

`python tests/kernels/aot_depthwise_conv.py CAPABILITY DTYPE`, for example `90 bf16`; a program of its own because the
tests' process runs Triton's interpreter.
"""

import sys

from aot import compile_kernel

from mambair_ds.kernels.depthwise_conv import triton as conv

ACTIVATIONS = {"x", "other", "y", "grad", "gate", "grad_c", "extra"}
INTEGERS = {"height", "width", "channels", "x_stride", "other_stride", "gate_stride"}


def report(capability: int, dtype: str) -> None:
    """Print one line a kernel: its name, registers, stack and shared memory."""
    uses = [(5, "gelu_residual"), (5, "gate"), (3, "sigmoid_gate"), (5, "none")]
    kernels = [(conv.convolve_tiles, 5, "add"), (conv.convolve_tiles, 3, "add")]
    kernels += [(kernel, *use) for kernel in (conv.convolve_tiles, conv.differentiate_tiles) for use in uses]
    for kernel, k, epilogue in kernels:
        constants = conv.constants(kernel.__name__.removesuffix("_tiles"), k, epilogue)
        types = {name: "i32" if name in INTEGERS else "*fp32" for name in kernel.arg_names}
        types |= {name: f"*{dtype}" for name in ACTIVATIONS}
        usage = compile_kernel(kernel, types, constants, capability, conv.WARPS)
        print(f"{kernel.__name__}/{k}/{epilogue}", usage.registers, usage.stack, usage.shared)


if __name__ == "__main__":
    report(int(sys.argv[1]), sys.argv[2])
