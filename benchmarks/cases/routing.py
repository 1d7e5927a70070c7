"""The routing's kernels, counted in logits or tokens."""

from typing import Any

from disassembly import Case, Shape
from triton import cdiv

from mambair_ds.kernels.routing import triton as routing


def cases(shape: Shape, dtype: str) -> list[Case]:
    """Class, order and the prompt's gradient; always float32."""
    tokens, t, n = shape.batch * shape.length, shape.classes, shape.states
    logits = tokens * t
    pointers = {"index": "*i64", "order": "*i64", "inverse": "*i64", "counts": "*i32"}
    integers = {"count", "classes", "length"}

    def types(kernel: Any) -> dict[str, str]:
        return {x: pointers.get(x, "i32" if x in integers else "*fp32") for x in kernel.arg_names}

    blocks = shape.batch * cdiv(shape.length, routing.BLOCK)
    parts = shape.batch * cdiv(shape.length, routing.TOKENS)
    tile = {"CLASSES": t, "ROWS": routing.ROWS}
    sort = {"CLASSES": t, "BLOCK": routing.BLOCK}
    prompt = {**tile, "N": n, "STATES": max(16, n), "TOKENS": routing.TOKENS}
    per_sample = cdiv(shape.length, routing.BLOCK)
    return [
        Case(
            routing.choose_rows, "choose_rows", types(routing.choose_rows), tile, routing.WARPS,
            cdiv(tokens, routing.ROWS), "logit", logits, routing.ROWS * t / (32 * routing.WARPS), 5, (), 4 * logits + 8 * tokens,
        ),
        Case(
            routing.count_classes, "count_classes", types(routing.count_classes), sort, routing.WARPS,
            blocks, "token", tokens, routing.BLOCK / (32 * routing.WARPS), 1, (), 8 * tokens + 4 * blocks * t,
        ),
        Case(
            routing.place_tokens, "place_tokens", types(routing.place_tokens), sort, routing.WARPS,
            blocks, "token", tokens, routing.BLOCK / (32 * routing.WARPS), routing.BLOCK, (per_sample // 4, per_sample % 4), 24 * tokens + 4 * blocks * t,
        ),
        Case(
            routing.differentiate_prompt, "differentiate_prompt", types(routing.differentiate_prompt), prompt,
            routing.PROMPT_WARPS, parts, "logit", logits, routing.TOKENS * t / (32 * routing.PROMPT_WARPS), 5 + 2 * n, (routing.TOKENS // routing.ROWS,),
            8 * logits + tokens * (4 * n + 8) + 4 * parts * t * n,
        ),
    ]  # fmt: skip
