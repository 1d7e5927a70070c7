"""The routing's kernels, counted in scores or tokens; the noise is drawn inside, as in training."""

from typing import Any

from disassembly import Case, Shape
from triton import cdiv, next_power_of_2

from mambair_ds.kernels.routing import triton as routing

NOISE = 10 + 3 + 10 + 1
"""Instructions a number: the generator's, bits to a number, its logarithm and the logarithm of that (see philox.py)."""


def cases(shape: Shape, dtype: str, _capability: int) -> list[Case]:
    """Class, order and the prompt's gradient; scores and gradients in `dtype`."""
    tokens, t, n = shape.batch * shape.length, shape.classes, shape.states
    scores, size = tokens * t, 2 if dtype == "bf16" else 4
    wide = {"seed": "i64", "stream": "i64", "length": "i32", "blocks": "i32"}
    pointers = {"noise": "*fp32", "counts": "*i32", "part_table": "*fp32"}
    pointers |= dict.fromkeys(("positions", "index", "order", "inverse"), "*i64")

    def types(kernel: Any) -> dict[str, str]:
        return {x: wide.get(x) or pointers.get(x, f"*{dtype}") for x in kernel.arg_names}

    per_sample = cdiv(shape.length, routing.BLOCK)
    blocks = shape.batch * per_sample
    parts = shape.batch * cdiv(shape.length, routing.TOKENS)
    sort = {"CLASSES": t, "BLOCK": routing.BLOCK}
    noisy = {"classes": t, "NOISE": routing.DRAWN.value}
    choice = noisy | routing.choice_tile(t)
    tile = routing.prompt_tile(t)
    warps, rows = tile.pop("num_warps"), tile["ROWS"]
    prompt = noisy | tile | {"N": n, "STATES": max(16, next_power_of_2(n)), "TOKENS": routing.TOKENS}
    prompt["FULL"] = shape.length % rows == 0
    return [
        Case(
            routing.choose_rows, "choose_rows", types(routing.choose_rows), choice, routing.WARPS,
            # The score's conversion and addition, the greatest sum, comparison and choice.
            shape.batch * cdiv(shape.length, choice["ROWS"]), "score", scores,
            choice["ROWS"] * t / (32 * routing.WARPS),
            NOISE + 5, (), size * scores + 8 * tokens,
        ),
        Case(
            routing.count_classes, "count_classes", types(routing.count_classes), sort, routing.WARPS,
            blocks, "token", tokens, routing.BLOCK / (32 * routing.WARPS), 1, (), 8 * tokens + 4 * blocks * t,
        ),
        Case(
            routing.place_tokens, "place_tokens", types(routing.place_tokens),
            sort | {"GROUP": routing.GROUP, "CHUNK": routing.CHUNK}, 1,
            # A comparison with each token of its group and its addition.
            blocks, "token", tokens, routing.BLOCK / 32, 2 * routing.GROUP,
            (cdiv(per_sample, routing.CHUNK),), 24 * tokens + 4 * blocks * t,
        ),
        Case(
            routing.differentiate_prompt, "differentiate_prompt", types(routing.differentiate_prompt), prompt, warps,
            # Conversion and addition, the greatest; exponential and its argument, their sum; q times it, their sum;
            # three for the result, one to round it, one to compare classes.
            parts, "score", scores, routing.TOKENS * t / (32 * warps), NOISE + 3 + 2 + 1 + 1 + 3 + 1 + 1,
            (routing.TOKENS // rows,), 2 * size * scores + tokens * (size * n + 8) + 4 * parts * t * n,
            matrix=2 * 2 * scores * n * (1 if dtype == "bf16" else 6),
        ),
    ]  # fmt: skip
