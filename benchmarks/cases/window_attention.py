"""The window attention's kernels, shifted, counted in logits."""

import torch
from disassembly import Case, Shape

from mambair_ds.kernels.window_attention import triton as attention

PRODUCTS = {"attend": 2, "differentiate_inputs": 5, "differentiate_bias": 2}
"""Of matrices, each with as many multiply-adds a logit as a head has channels."""
ARITHMETIC = {"attend": 5.5, "differentiate_inputs": 6, "differentiate_bias": 6}
"""Instructions a logit. All: the bias' load, the scale with maximum or logarithm, the exponential. Forward also the
maximum, the sum, and half a conversion of the weight for the next product. Backward also the difference and the product
that make the gradient of the logit, and its sum over windows, or half a conversion each of weight and gradient."""
MASK = 2
"""A comparison and a subtraction more where a window crosses the border, which is what is counted."""


def cases(shape: Shape, dtype: str, _capability: int) -> list[Case]:
    """The forward pass and the parts of the backward pass."""
    element = torch.bfloat16 if dtype == "bf16" else torch.float32
    wide = 2 if dtype == "bf16" else 4
    activations = {"qkv", "out", "grad", "grad_qkv"}
    tokens = shape.window**2
    windows = shape.batch * shape.length // tokens
    logits = windows * shape.heads * tokens**2
    pixels = shape.batch * shape.length
    channels, numbers = pixels * shape.dim * wide, 4 * pixels * shape.heads
    part = 4 * shape.heads * tokens**2
    groups = min(attention.GROUPS, windows)
    bytes_of = {  # activations, numbers a pixel and head, and sums over windows
        "attend": 4 * channels + numbers,
        "differentiate_inputs": 8 * channels + 2 * numbers,
        "differentiate_bias": 4 * channels + 2 * numbers + groups * part,
    }
    result = []
    for kernel in (attention.attend, attention.differentiate_inputs, attention.differentiate_bias):
        name = kernel.__name__
        constants = attention.constants(name, shape.dim, shape.heads, shape.window, shape.window // 2, element)
        queries, keys = constants["QUERIES"], constants.get("KEYS", tokens)
        if name == "differentiate_bias":
            tiles = (tokens // queries) * (tokens // keys)
            programs, trips = groups * shape.heads * tiles, (windows // groups,)
        else:
            programs, trips = windows * shape.heads, (tokens // queries,)
        integers = {"height", "width", "windows", "groups"}
        if name != "attend":
            constants |= {"height": shape.side, "width": shape.side}
        types = {x: f"*{dtype}" if x in activations else "i32" if x in integers else "*fp32" for x in kernel.arg_names}
        options = attention.options(name, element)
        warps = options["num_warps"]
        dim = shape.dim // shape.heads
        result.append(
            Case(
                kernel, name, types, constants, warps,
                programs, "logit", logits, logits / programs / (32 * warps), ARITHMETIC[name] + MASK, trips,
                bytes_of[name],
                matrix=2 * PRODUCTS[name] * dim * logits, stages=attention.STAGES,
            )
        )  # fmt: skip
    side = 2 * shape.window - 1
    programs, additions = shape.heads * side, shape.heads * tokens**2
    result.append(
        Case(
            attention.sum_diagonals, "sum_diagonals", {"grad_bias": "*fp32", "grad_table": "*fp32"},
            {"WINDOW": shape.window, "HEADS": shape.heads}, 1,
            programs, "number", additions, additions / programs / 32, 1, (shape.window**2 / side,),
            4 * (additions + programs * side),
        )
    )  # fmt: skip
    return result
