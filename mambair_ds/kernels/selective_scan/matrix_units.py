"""Products and sums of a warp's values by the matrix units, with every operand where the lanes have it.

Each lane gives a part of a product's left side and gets a part of the sums. So a right side that is mostly zeros
multiplies every lane's values by numbers that all lanes share, and a left side of ones adds values up over lanes. All
are in TF32, enough where results end as 16-bit numbers. docs/kernels.md says where the scan has them.
"""

# mypy: disable-error-code="assignment, no-untyped-def"
# ruff: noqa: RUF005 (Triton's tuples grow by +)

import triton
import triton.language as tl


def _sum_lanes_in_ptx() -> str:
    """Eight sums over a warp by its matrix units, which cut their inputs to TF32's ten bits behind the point.

    A product's right side has row c and column g in lane 4 g + c. The first four products (16x8 times 8x8) have two
    values there, in rows 0-3 and 4-7; their left side's ones put the sum over c of values[i] into row i of the result.
    Of that, lane 4 g + c gets row g, columns 2 c and 2 c + 1, as a left side has them: rows g and g + 8, column c. So
    the fifth product (16x4 times 4x8) sums over c again, the even columns in its rows 0-7, the odd ones in 8-15; the
    ones on its right side put both into one pair of columns, which one lane of each four gets. What the first products
    have in rows 8-15 is not read.
    """
    names = [f"${i}" for i in range(25)]
    out, values, ones, group, sums = names[:4], names[4:12], names[12:20], names[20], names[21:]
    lines = [".reg .b32 v<8>, e<8>, s, none<8>; .reg .f32 p<4>;", f"mov.b32 s, {group};"]
    lines += [f"mov.b32 v{i}, {values[i]}; mov.b32 e{i}, {ones[i]};" for i in range(8)]
    lines += [f"mov.f32 p{i}, 0f00000000;" for i in range(4)]
    for i in range(0, 8, 2):
        lines.append(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
            f"{{p0, p1, p2, p3}}, {{e{i}, none{i}, e{i + 1}, none{i + 1}}}, {{v{i}, v{i + 1}}}, {{p0, p1, p2, p3}};"
        )
    lines.append(".reg .b32 q<2>; mov.b32 q0, p0; mov.b32 q1, p1;")
    lines.append("mma.sync.aligned.m16n8k4.row.col.f32.tf32.tf32.f32")
    lines.append(f"{{{', '.join(out)}}}, {{q0, q1}}, {{s}}, {{{', '.join(sums)}}};")
    return "{" + "\n".join(lines) + "}"


def _product_in_ptx(depth: int) -> str:
    """sums + left · right by the matrix units, 16 rows of `depth` times 8 columns, all where the units have it.

    In lane 4 g + t, left has rows g and g + 8 of column t; right row t of column g; the sums columns 2 t and 2 t + 1 of
    row g, then both of row g + 8. Depth 8 adds both of column t + 4 to left and row t + 4 to right. Left and right are
    cut to TF32's ten bits.
    """
    left, right = depth // 2, depth // 4
    names, values = [f"${i}" for i in range(8 + left + right)], [f"v{i}" for i in range(left + right)]
    lines = [f".reg .b32 v<{left + right}>;", *(f"mov.b32 {v}, {n};" for v, n in zip(values, names[4:], strict=False))]
    operands = names[:4], values[:left], values[left:], names[-4:]
    lines.append(f"mma.sync.aligned.m16n8k{depth}.row.col.f32.tf32.tf32.f32")
    lines.append(", ".join(f"{{{', '.join(registers)}}}" for registers in operands) + ";")
    return "{" + "\n".join(lines) + "}"


SUM_LANES = tl.constexpr(_sum_lanes_in_ptx())
SUM_LANES_OPERANDS = tl.constexpr(",".join(["=f"] * 4 + ["f"] * 21))
PRODUCT_4 = tl.constexpr(_product_in_ptx(4))
PRODUCT_4_OPERANDS = tl.constexpr(",".join(["=f"] * 4 + ["f"] * 7))
PRODUCT_8 = tl.constexpr(_product_in_ptx(8))
PRODUCT_8_OPERANDS = tl.constexpr(",".join(["=f"] * 4 + ["f"] * 10))


@triton.jit
def round_to_tf32(x):
    """x so that TF32, which cuts, has it rounded."""
    return (x.to(tl.int32, bitcast=True) + 0x1000).to(tl.float32, bitcast=True)


@triton.jit
def multiply(left, right, sums, DEPTH: tl.constexpr):
    """sums + left · right; see `_product_in_ptx`."""
    a, b, c, d = tl.inline_asm_elementwise(
        PRODUCT_4 if DEPTH == 4 else PRODUCT_8,
        PRODUCT_4_OPERANDS if DEPTH == 4 else PRODUCT_8_OPERANDS,
        left + right + sums,
        dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
    )  # fmt: skip
    return (a, b, c, d)


@triton.jit
def split_channels(x):
    """A lane's two channels of x, (32, 2)."""
    first, second = tl.split(x)
    return (first, second)


@triton.jit
def load_for_lanes(pointer, COUNT: tl.constexpr):
    """COUNT numbers from each lane's own place, (32,), as a tuple, four by one load."""
    numbers = ()
    for i in tl.static_range(0, COUNT, 4):
        even, odd = tl.split(tl.reshape(tl.load(pointer[:, None] + (i + tl.arange(0, 4))[None, :]), (32, 2, 2)))
        first, third = tl.split(even)
        second, fourth = tl.split(odd)
        numbers = numbers + (first, second, third, fourth)
    return numbers


@triton.jit
def place_for_lanes(FIRST: tl.constexpr, SECOND: tl.constexpr, ZEROS: tl.constexpr, MATRIX: tl.constexpr):
    """Where a lane has the numbers that all lanes share: at FIRST, where all of them have them.

    With MATRIX they are its part of the right sides of products that give every lane its own values times the numbers
    at FIRST in one column of the sums, times those at SECOND in the other. Lanes that hold neither's place have zeros.
    """
    at = FIRST
    if MATRIX:
        lane = tl.arange(0, 32)
        at = tl.where(lane // 8 == lane % 4, tl.where(lane // 4 % 2 == 0, FIRST, SECOND), ZEROS)
    return at


@triton.jit
def sum_channels(x):
    """Over a lane's two."""
    first, second = tl.split(x)
    return first + second


@triton.jit
def _fold(x, y, lane, BIT: tl.constexpr):
    """Half a sum over lanes of two values at once: x's lies in the lanes without BIT, y's in those with it."""
    low = (lane & BIT) == 0
    return tl.where(low, x, y) + tl.gather(tl.where(low, y, x), lane ^ BIT, 0)


@triton.jit
def sum_lanes(values, sums, ones, lane, GROUP: tl.constexpr, MATRIX: tl.constexpr):
    """Sums of eight values over a warp's 32 lanes: that of values[i] goes to lane 4 i + GROUP of sums[0] + sums[2].

    `sums` come from the calls for other groups, 0 at first; ones[i] is 1 in lanes 4 i to 4 i + 3 and 0 elsewhere.
    With MATRIX by the matrix units, in TF32: enough where sums end as 16-bit numbers. Without, in float32 by folding.
    """
    if MATRIX:
        a, b, c, d = tl.inline_asm_elementwise(
            SUM_LANES, SUM_LANES_OPERANDS, values + ones + ((lane // 8 == GROUP).to(tl.float32),) + sums,
            dtype=(tl.float32, tl.float32, tl.float32, tl.float32), is_pure=True, pack=1,
        )  # fmt: skip
        return (a, b, c, d)
    for level in tl.static_range(3):
        folded = ()
        for j in tl.static_range(4 >> level):
            folded = folded + (_fold(values[2 * j], values[2 * j + 1], lane, 4 << level),)
        values = folded
    total = values[0]
    total += tl.gather(total, lane ^ 1, 0)
    total += tl.gather(total, lane ^ 2, 0)
    return tl.where(lane % 4 == GROUP, total, sums[0]), sums[1], sums[2], sums[3]
