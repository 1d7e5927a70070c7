"""The linear layer's kernels at every use in a network, counted in numbers of x and y (or of their gradients)."""

import torch
from disassembly import Case, Shape
from triton import cdiv

from mambair_ds.kernels import gpu_class
from mambair_ds.kernels.linear import triton as linear

GELU = 10
"""Instructions of the activation."""
SLOPE = 15
"""Of its derivative, with the product."""
NORM = 6
"""Of a normalized number: two sums, the centering twice, the square, the product with 1 / deviation."""


def uses(shape: Shape) -> dict[str, tuple[int, int, frozenset[str]]]:
    """Inputs, outputs and options of the linear layers of an attentive layer."""
    d, hidden, rank = shape.dim, shape.hidden, shape.dim // 3
    norm, gelu, residual, skip = "NORM", "GELU", "RESIDUAL", "SKIP"
    return {
        "wqkv": (d, 3 * d, frozenset({norm})),
        "proj": (d, d, frozenset({residual})),
        "fc1": (d, hidden, frozenset({norm, gelu})),
        "fc2": (hidden // 2 if shape.gated else hidden, d, frozenset({residual, skip})),
        "in_proj": (d, hidden, frozenset({norm})),
        "router 1": (d, rank, frozenset({norm, gelu})),
        "router 2": (rank, shape.classes, frozenset()),
        "out_proj": (hidden, d, frozenset({norm, residual})),
    }


def cases(shape: Shape, dtype: str, capability: int) -> list[Case]:
    """Forward and backward kernels of every use."""
    result = []
    for use, (inputs, outputs, options) in uses(shape).items():
        result += _cases(use, shape.batch * shape.length, inputs, outputs, options, dtype, capability)
    return result


def _cases(
    use: str, rows: int, inputs: int, outputs: int, options: frozenset[str], dtype: str, capability: int
) -> list[Case]:
    wide, product = (2, torch.bfloat16) if dtype == "bf16" else (4, torch.float32)
    target = linear.Target(product, gpu_class(divmod(capability, 10)))
    floats = {"shift", "statistics", "part_scale", "parts", "weight", "bias", "gamma", "beta", "scale"}
    integers = {"rows", "steps"}
    norm, gelu, residual, skip = (name in options for name in ("NORM", "GELU", "RESIDUAL", "SKIP"))
    x, y = rows * inputs, rows * outputs
    width, height = linear.width(inputs), linear.height(outputs)
    cuts = {name: linear.plan(name, inputs, target) for name in ("multiply", "differentiate", "weight")}
    programs, ranges, steps = linear.ranges(rows, inputs, outputs, target)
    rate = 1 if wide == 2 else 6  # as float32 a product is three of TF32, each at half of bfloat16's rate

    def flops(name: str) -> int:
        return 2 * rows * width * cdiv(outputs, cuts[name].outputs) * cuts[name].outputs * rate

    normalized = NORM * x if norm else 0
    weights = width * height * wide

    def case(kernel, which, programs, units, each, arithmetic, trips, moved, flops=0):  # type: ignore[no-untyped-def]
        constants = {
            **linear.constants(which, inputs, outputs, target),
            **{name: name in options for name in ("NORM", "GELU", "RESIDUAL", "SKIP")},
            "BIAS": True,
        }
        constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
        types = {
            name: "i32" if name in integers else "*fp32" if name in floats else f"*{dtype}" for name in kernel.arg_names
        }
        cut = cuts.get(which)
        warps, stages, most = (cut.warps, cut.stages, cut.registers) if cut else (linear.PACK_WARPS, None, None)
        return Case(
            kernel, f"{kernel.__name__} {use}", types, constants, warps, programs, "number", units,
            each / (32 * warps), arithmetic / units, trips, moved, flops, stages, most,
        )  # fmt: skip

    forward, backward = cdiv(rows, cuts["multiply"].rows), cdiv(rows, cuts["differentiate"].rows)
    return [
        case(
            linear.pack_weight, "pack", height, inputs * outputs, inputs, inputs * outputs, (),
            4 * inputs * outputs + weights,
        ),
        case(
            linear.multiply_rows, "multiply", forward, x + y, cuts["multiply"].rows * (inputs + outputs),
            normalized + (1 + GELU * gelu + residual + 2 * skip) * y, (cdiv(outputs, cuts["multiply"].outputs),),
            (x + (1 + residual + skip) * y) * wide + weights + 8 * rows * norm, flops("multiply"),
        ),
        case(
            linear.differentiate_rows, "differentiate", backward, x + y,
            cuts["differentiate"].rows * (inputs + outputs), normalized + (3 * skip + SLOPE * gelu) * y,
            (cdiv(outputs, cuts["differentiate"].outputs),),
            ((1 + (norm or gelu)) * x + (1 + gelu + 2 * skip) * y) * wide + weights
            + 4 * (2 * rows * norm + backward * outputs * skip),
            flops("differentiate") * (1 + gelu),
        ),
        case(
            linear.differentiate_weight, "weight", programs * ranges, x + y,
            rows * (inputs + outputs) / (programs * ranges), 2 * norm * x, (steps,),
            (x + y) * wide + 4 * (2 * rows * norm + ranges * outputs * (inputs + 1)), flops("weight"),
        ),
    ]  # fmt: skip
