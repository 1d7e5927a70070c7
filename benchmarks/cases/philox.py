"""The noise generator's two distributions, counted in elements; always float32."""

from disassembly import Case, Shape

from mambair_ds.kernels.philox import triton as philox


def cases(shape: Shape, dtype: str) -> list[Case]:
    """A fill with each distribution, as many numbers as the router has logits."""
    elements = shape.batch * shape.length * shape.classes
    types = {"seed": "i64", "stream": "i64", "positions": "*i64", "out": "*fp32", "count": "i32"}
    return [
        Case(
            philox.fill,
            f"philox {'normal' if normal else 'gumbel'}",
            types,
            {"NORMAL": normal, "BLOCK": philox.BLOCK},
            warps=4,
            programs=elements // (4 * philox.BLOCK),
            unit="element",
            units=elements,
            units_per_thread=4 * philox.BLOCK / 128,
            # Ten rounds of 2 wide multiplications, 2 additions to the key and 4 exclusive ors (two instructions, as
            # three operands fit one) give 4 elements; then the distribution, of some 10 instructions.
            arithmetic=10 * 8 / 4 + 10,
            trips=(),
            bytes=4 * elements,
        )
        for normal in (False, True)
    ]
