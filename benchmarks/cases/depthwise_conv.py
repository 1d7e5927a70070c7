"""The depthwise convolution's kernels with the epilogues that a network has, counted in outputs."""

from disassembly import Case, Shape
from triton import cdiv

from mambair_ds.kernels.depthwise_conv import triton as conv

GELU, SLOPE, SIGMOID = 10, 12, 5
"""Instructions of the activations and of GELU's derivative, as short as we know them."""


def walk(side: int, k: int, tile: dict) -> tuple[float, float]:
    """How often a program's two loops run: without masks and with them, averaged over the tiles of a picture."""
    rows, columns, steps, half = tile["ROWS"], tile["COLUMNS"], tile["STEPS"], k // 2
    groups = left = 0
    for row in range(0, side, rows):
        end = min(row + rows, side)
        for column in range(0, side, columns):
            inner = half <= column and column + columns + half <= side
            fast = max(min(end, side - half) - row, 0) // steps if inner else 0
            groups, left = groups + fast, left + end - row - fast * steps
    tiles = conv.tiles(side, side, tile)
    return groups / tiles, left / tiles


def cases(shape: Shape, dtype: str, _capability: int) -> list[Case]:
    """The feed-forward block's 5×5 (after a gate in the Light model) and the state space module's 3×3 convolution."""
    activations = {"x", "other", "y", "grad", "gate", "grad_c", "extra"}
    integers = {"batch", "height", "width"}
    wide = 2 if dtype == "bf16" else 4
    # What follows the convolution, channels, how far positions of the gate or the added tensor are apart, the
    # arithmetic of what follows, and how many activations each kernel reads and writes.
    if shape.gated:
        d = shape.hidden // 2
        uses = [
            (conv.convolve_tiles, 5, "gate", d, 2 * d, 1, 3),
            (conv.convolve_tiles, 5, "none", d, 0, 0, 2),
            (conv.differentiate_tiles, 5, "gate", d, 2 * d, 3, 5),
        ]
    else:
        d = shape.hidden
        uses = [
            (conv.convolve_tiles, 5, "gelu_residual", d, 0, GELU + 1, 2),
            (conv.convolve_tiles, 5, "add", d, d, 1, 3),
            (conv.differentiate_tiles, 5, "gelu_residual", d, 0, SLOPE + 2, 3),
        ]
    d = shape.hidden
    uses += [
        (conv.convolve_tiles, 3, "sigmoid_gate", d, 0, SIGMOID + 1, 2),
        (conv.convolve_tiles, 3, "add", d, d, 1, 3),
        (conv.differentiate_tiles, 3, "sigmoid_gate", d, 0, SIGMOID + 5, 4),
    ]
    result = []
    for kernel, k, epilogue, d, stride, extra, tensors in uses:
        which = kernel.__name__.removesuffix("_tiles")
        tile = conv.constants(which, k, epilogue)
        second = "other_stride" if which == "convolve" else "gate_stride"
        constants = {**tile, "channels": d, "x_stride": d, second: stride}
        programs = conv.tiles(shape.side, shape.side, tile) * cdiv(shape.batch * d, tile["WIDTH"])
        types = {x: f"*{dtype}" if x in activations else "i32" if x in integers else "*fp32" for x in kernel.arg_names}
        outputs = shape.batch * shape.length * d
        rows = shape.side / cdiv(shape.side, tile["ROWS"])
        columns = shape.side / cdiv(shape.side, tile["COLUMNS"])
        arithmetic = (2 if which == "differentiate" else 1) * k * k + extra
        name = f"{kernel.__name__} {k}×{k} {epilogue}"
        result.append(
            Case(
                kernel, name, types, constants, conv.WARPS, programs,
                "output", outputs, rows * columns * tile["WIDTH"] / (32 * conv.WARPS), arithmetic,
                walk(shape.side, k, tile), tensors * outputs * wide,
            )
        )  # fmt: skip
    return result + (_norm_cases(shape, dtype, wide) if shape.gated else [])


def _norm_cases(shape: Shape, dtype: str, wide: int) -> list[Case]:
    d = shape.hidden // 2
    tile = conv.norm_constants(d)
    tokens = shape.batch * shape.length
    result = []
    # Arithmetic a number: two sums, the mean's and the deviation's subtraction and product, and weight and bias; back
    # two sums and three multiply-adds more, and those of the gradients of weight and bias.
    for kernel, steps, arithmetic, tensors in (
        (conv.normalize_tokens, 1, 5, 2),
        (conv.normalize_tokens_backward, conv.NORM_STEPS, 12, 3),
    ):
        types = {name: "*fp32" for name in kernel.arg_names} | {"tokens": "i32"}
        types |= {name: f"*{dtype}" for name in ("x", "y", "grad", "grad_x")}
        constants = {**tile, "channels": d, "stride": 2 * d} | ({} if steps == 1 else {"STEPS": steps})
        units = tokens * d
        result.append(
            Case(
                kernel, kernel.__name__, types, constants, conv.NORM_WARPS,
                cdiv(tokens, steps * tile["TOKENS"]), "number", units,
                steps * tile["TOKENS"] * tile["WIDTH"] / (32 * conv.NORM_WARPS), arithmetic,
                () if steps == 1 else (steps,), tensors * units * wide,
            )
        )  # fmt: skip
    return result
