"""Compiles the routing's Triton kernels as the networks use them and prints what they occupy.

`python tests/kernels/aot_routing.py CAPABILITY CLASSES STATES`, for example `90 128 16`; a program of its own because
the tests' process runs Triton's interpreter.
"""

import sys

from aot import compile_kernel

from mambair_ds.kernels.routing import triton as routing

TYPES = {"index": "*i64", "order": "*i64", "inverse": "*i64", "counts": "*i32"}
INTEGERS = {"count", "classes", "length"}


def report(capability: int, classes: int, states: int) -> None:
    """Print one line a kernel: its name, registers, stack and shared memory."""
    tile = {"CLASSES": classes, "ROWS": routing.ROWS}
    sort = {"CLASSES": classes, "BLOCK": routing.BLOCK}
    prompt = {**tile, "N": states, "STATES": max(16, states), "TOKENS": routing.TOKENS}
    kernels = [
        (routing.choose_rows, tile, routing.WARPS),
        (routing.count_classes, sort, routing.WARPS),
        (routing.place_tokens, sort, routing.WARPS),
        (routing.differentiate_prompt, prompt, routing.PROMPT_WARPS),
    ]
    for kernel, constants, warps in kernels:
        types = {name: TYPES.get(name, "i32" if name in INTEGERS else "*fp32") for name in kernel.arg_names}
        usage = compile_kernel(kernel, types, constants, capability, warps)
        print(kernel.__name__, usage.registers, usage.stack, usage.shared)


if __name__ == "__main__":
    report(*(int(argument) for argument in sys.argv[1:]))
