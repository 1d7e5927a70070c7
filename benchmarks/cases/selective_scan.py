"""The selective scan's kernels, counted in state updates."""

from typing import Any

from disassembly import Case, Shape
from triton import cdiv

from mambair_ds.kernels.selective_scan import triton as scan


def cases(shape: Shape, dtype: str, _capability: int) -> list[Case]:
    """The passes of a forward and a backward pass, with an order and a prompt."""
    b, length, d, n, wide = shape.batch, shape.length, shape.hidden, shape.states, 2 if dtype == "bf16" else 4
    segments, tokens = cdiv(length, scan.SEGMENT), b * length
    packed = tokens * n * 4  # B, C or zeros, float32
    order = tokens * 8
    entering = b * segments * d * n * 4
    states = b * cdiv(length, scan.CHUNK) * d * n * wide
    activation = tokens * d * wide
    blocks = cdiv(d, scan.WIDTH)
    groups = scan.SEGMENT // scan.UNROLL["ends"]
    turns_of_states = scan.TURNS if dtype == "bf16" else 1
    chunks, turns = scan.SEGMENT // scan.CHUNK, scan.CHUNK // scan.unroll_outputs(n)
    # Bytes; arithmetic: the exponent's product, the exponential and the recurrence's multiply-adds; trips of the loops.
    passes: dict[str, tuple[int, int, tuple[int, ...]]] = {
        "forward_ends": (2 * activation + 2 * packed + entering + order, 4, (groups,)),
        "forward_outputs": (3 * activation + 3 * packed + entering + states + order, 5, (chunks, turns)),
        "backward_ends": (2 * activation + 2 * packed + 2 * entering + order, 4, (groups,)),
        "backward_inputs": (
            5 * activation + 4 * packed + 4 * entering + states + blocks * 2 * packed + order,
            12,
            (chunks, n // turns_of_states),
        ),
    }
    activations = {"u", "x", "delta", "y", "grad_y", "grad_u", "grad_delta"}
    activations |= {"B", "C", "prompt", "grad_B", "grad_C", "grad_prompt"}
    scalars = dict.fromkeys(("length", "segments", "channels", "chunks", "blocks", "row"), "i32") | {"order": "*i64"}
    scalars |= dict.fromkeys(("sample_B", "row_B", "sample_C", "row_C"), "i32")
    sizes = {"channels": d, "N": n, "SEGMENT": scan.SEGMENT, "CHUNK": scan.CHUNK, "PAD": n}

    def types(kernel: Any) -> dict[str, str]:
        return {x: scalars.get(x, f"*{dtype}" if x in activations else "*fp32") for x in kernel.arg_names}

    result = []
    for name, (moved, arithmetic, trips) in passes.items():
        kernel = scan.segment_ends if name.endswith("ends") else getattr(scan, name)
        constants = {
            **sizes,
            "UNROLL": scan.UNROLL["ends"] if name.endswith("ends") else scan.unroll_outputs(n),
            "WIDTH": scan.WIDTH,
            "TURNS": turns_of_states,
            "SOFTPLUS": True,
            "NARROW": dtype == "bf16",
            "FULL": length % scan.CHUNK == 0,
            "MATRIX": dtype == "bf16",
            "REVERSE": name == "backward_ends",
        }
        constants = {x: value for x, value in constants.items() if x in kernel.arg_names}
        programs, work = b * segments * cdiv(d, scan.WIDTH), tokens * d * n
        # The network scans in an order; the second variant only shows that it builds.
        for title, variant in ((name, constants), (f"{name} without order", {**constants, "order": None})):
            result.append(
                Case(
                    kernel, title, types(kernel), variant, scan.WARPS, programs, "state update", work,
                    scan.SEGMENT * n * scan.WIDTH / (32 * scan.WARPS), arithmetic, trips, moved,
                    registers=scan.REGISTERS if name == "backward_inputs" and dtype == "bf16" else None,
                )
            )  # fmt: skip
    programs, moved, work = cdiv(d, 32) * n * b, 2 * entering + entering // n, b * segments * d * n
    result.append(
        Case(
            scan.carry, "carry", types(scan.carry), {"N": n, "WIDTH": 32, "REVERSE": True}, scan.WARPS,
            programs, "segment", work, segments, 3, (segments,), moved,
        )
    )  # fmt: skip
    constants = {"N": n, "PAD": n, "SEGMENT": scan.SEGMENT, "CHUNK": scan.CHUNK, "MATRIX": dtype == "bf16"}
    numbers = 2 * tokens * n  # of B and C
    moved = numbers * wide + 7 * packed + numbers // 2 * wide + order
    result.append(
        Case(
            scan.pack, "pack", types(scan.pack), constants, 4,
            b * segments, "number", numbers, 2 * scan.SEGMENT * n / 128, 0.5, (), moved,
        )
    )  # fmt: skip
    constants = {"N": n, "CHUNK": scan.CHUNK, "STATES": n}
    moved = blocks * numbers * 4 + numbers * wide + numbers // 2 * wide + order
    result.append(
        Case(
            scan.sum_blocks, "sum_blocks", types(scan.sum_blocks), constants, scan.WARPS,
            b * length // scan.CHUNK, "partial sum", blocks * numbers, blocks * scan.CHUNK * n / 16,
            1, (blocks // 4, blocks % 4), moved,  # the compiler unrolls it
        )
    )  # fmt: skip
    return result
