"""The noise generator's two distributions, counted in elements; always float32."""

from disassembly import Case, Shape
from triton import cdiv

from mambair_ds.kernels.philox import triton as philox

GENERATOR = 10 * 4 / 4
"""Instructions an element: ten rounds of 2 wide multiplications and 2 exclusive ors of three numbers give four."""
UNIFORM = 3
"""Bits to a number: shift, or, subtraction."""
EXPONENTIAL = 10
"""-log2 of a number: its distance to 1, a polynomial of degree 6, the special function, comparison, choice."""


def cases(shape: Shape, dtype: str, _capability: int) -> list[Case]:
    """A fill with each distribution, as many numbers as the router has scores."""
    count = shape.length * shape.classes
    elements = shape.batch * count
    types = {"seed": "i64", "stream": "i64", "positions": "*i64", "out": "*fp32", "count": "i32"}
    # Gumbel: a logarithm more and its scale. Normal, for two: root, sine and cosine (17), their choice and signs (8).
    distributions = {False: UNIFORM + EXPONENTIAL + 2, True: UNIFORM + (EXPONENTIAL + 1 + 17 + 8 + 2) / 2}
    return [
        Case(
            philox.fill,
            f"philox {'normal' if normal else 'gumbel'}",
            types,
            {"NORMAL": normal, "WHOLE": count % 4 == 0, "BLOCK": philox.BLOCK},
            warps=philox.WARPS,
            programs=shape.batch * cdiv(count, 4 * philox.BLOCK),
            unit="element",
            units=elements,
            units_per_thread=4 * philox.BLOCK / (32 * philox.WARPS),
            arithmetic=GENERATOR + arithmetic,
            trips=(),
            bytes=4 * elements,
        )
        for normal, arithmetic in distributions.items()
    ]
