"""The depthwise convolution's kernels with the epilogues that a network has, counted in outputs."""

from disassembly import Case, Shape
from triton import cdiv

from mambair_ds.kernels.depthwise_conv import triton as conv

GELU, SIGMOID = 14, 4
"""Instructions of the activations, and about as many of their derivatives once these are there."""


def cases(shape: Shape, dtype: str) -> list[Case]:
    """The feed-forward block's 5×5 (after a gate in the Light model) and the state space module's 3×3 convolution."""
    activations = {"x", "other", "y", "grad", "gate", "grad_c", "extra"}
    integers = {"height", "width", "channels", "x_stride", "other_stride", "gate_stride"}
    wide = 2 if dtype == "bf16" else 4
    # What follows the convolution, its arithmetic, and how many activations each kernel reads and writes.
    if shape.gated:
        d = shape.hidden // 2
        uses = [
            (conv.convolve_tiles, 5, "gate", d, 1, 3),
            (conv.convolve_tiles, 5, "none", d, 0, 2),
            (conv.differentiate_tiles, 5, "gate", d, 2, 5),
        ]
    else:
        d = shape.hidden
        uses = [
            (conv.convolve_tiles, 5, "gelu_residual", d, GELU + 1, 2),
            (conv.convolve_tiles, 5, "add", d, 1, 3),
            (conv.differentiate_tiles, 5, "gelu_residual", d, GELU + 3, 3),
        ]
    uses += [
        (conv.convolve_tiles, 3, "sigmoid_gate", shape.hidden, SIGMOID + 1, 2),
        (conv.convolve_tiles, 3, "add", shape.hidden, 1, 3),
        (conv.differentiate_tiles, 3, "sigmoid_gate", shape.hidden, SIGMOID + 4, 4),
    ]
    result = []
    for kernel, k, epilogue, d, extra, tensors in uses:
        which = kernel.__name__.removesuffix("_tiles")
        constants = conv.constants(which, k, epilogue)
        rows, columns = conv.TILES[which]
        programs = shape.batch * cdiv(shape.side, rows) * cdiv(shape.side, columns) * cdiv(d, conv.WIDTH)
        types = {x: f"*{dtype}" if x in activations else "i32" if x in integers else "*fp32" for x in kernel.arg_names}
        outputs = shape.batch * shape.length * d
        arithmetic = (2 if which == "differentiate" else 1) * k * k + extra
        name = f"{kernel.__name__} {k}×{k} {epilogue}"
        result.append(
            Case(
                kernel, name, types, constants, conv.WARPS,
                programs, "output", outputs, rows * columns * conv.WIDTH / (32 * conv.WARPS), arithmetic, (rows,), tensors * outputs * wide,
            )
        )  # fmt: skip
    return result
