"""The optimizer's step with the mean, counted in weights; always float32, and the same for all shapes."""

from disassembly import Case, Shape
from triton import cdiv

from mambair_ds.kernels.adam import triton as adam

WEIGHTS = 2**24
"""About as many as Base has."""


def cases(_shape: Shape, _dtype: str, _capability: int) -> list[Case]:
    """The one kernel, with Adam's weight decay and AdamW's."""
    types = dict.fromkeys(("addresses", "blocks"), "*i64") | dict.fromkeys(("corrections", "skipped"), "*fp32")
    types |= {"tensors": "i32"} | dict.fromkeys(("lr", "share1", "share2", "eps", "weight_decay", "share"), "fp32")
    return [
        Case(
            adam.step_blocks,
            f"step_blocks {name}",
            types,
            {"DECOUPLED": name == "AdamW", "BLOCK": adam.BLOCK},
            warps=adam.WARPS,
            programs=cdiv(WEIGHTS, adam.BLOCK),
            unit="weight",
            units=WEIGHTS,
            units_per_thread=adam.BLOCK / (32 * adam.WARPS),
            # Decay 1, moments 2 + 3, root and division 6, step 3, mean 2.
            arithmetic=17,
            trips=(),
            bytes=WEIGHTS * 9 * 4,
        )
        for name in ("Adam", "AdamW")
    ]
