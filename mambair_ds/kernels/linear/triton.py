"""The linear layer on GPUs: a program has whole rows of x, so that it reads them once and writes each output once.

The norm is folded into the weights: with x̂ = (x - mean) / deviation, LayerNorm(x) · Wᵀ is x̂ · (W γ)ᵀ + W β.
`pack_weight` makes W γ in the dtype of the product, padded with zeros to whole tiles, and bias + W β. Then
`multiply_rows` keeps its rows' x̂ as tiles, and walks over the outputs.

Backward, with g the gradient of the result and a the product, `differentiate_rows` walks over the outputs in the same
way: g' = g · GELU'(a), g' · W γ collected for all of x's channels, and at the end the norm's derivative. g', which it
writes where it is not g, goes to `differentiate_weight`, which computes P = g'ᵀ · (x̂, 1) for ranges of rows.
All parameters' gradients are small sums over P: of the bias P's last column p, of W it is P γ + p β, of γ and β the
sums of W P and W p over outputs.

Sums are float32. There are no atomics: parts are added up in a fixed order, so two runs agree to the bit.
"""

# mypy: disable-error-code="assignment, index, no-untyped-def, var-annotated"
# ruff: noqa: RUF005 (Triton's tuples grow by +)

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambair_ds.kernels import capability, gpu_class
from mambair_ds.kernels.gpu import dot, gelu, gelu_slope
from mambair_ds.kernels.linear import reference
from mambair_ds.kernels.linear.operator import make_operator

HEIGHT = 64
"""A multiple of the outputs of every step, to which the packed weight is filled up."""
PACK_WARPS = 1
NARROW = 192
GROUP = 3
"""Tiles of x's channels, at most, whose sums a program of `differentiate_weight` has in registers."""
PROGRAMS = 132
"""How many programs `differentiate_weight` is divided into, about; a constant, as sums depend on it."""
LARGEST = 512
"""Inputs of a row that are kept at once. Beyond, the product takes longer than memory, and PyTorch's is good."""


class Plan(NamedTuple):
    """How a kernel is cut."""

    rows: int
    """Of a program, or of one step of `differentiate_weight`."""
    outputs: int
    """Of one step, or of a program of `differentiate_weight`."""
    tile: int
    """Channels of x that are multiplied at once."""
    warps: int
    stages: int
    """Steps whose loads are in flight or in use at once."""
    registers: int | None = None
    """A thread's at most, so that two programs fit a multiprocessor."""


PLANS = {
    ("multiply", "narrow"): Plan(128, 64, 64, 8, 2, 128),
    ("multiply", "wide"): Plan(128, 32, 64, 8, 3),
    ("multiply", "float32"): Plan(16, 32, 64, 4, 1),
    ("differentiate", "narrow"): Plan(128, 32, 64, 8, 3),
    ("differentiate", "wide"): Plan(64, 64, 128, 8, 2),
    ("differentiate", "float32"): Plan(16, 32, 64, 8, 1),
    ("weight", "narrow"): Plan(64, 128, 64, 8, 3),
    ("weight", "wide"): Plan(64, 128, 64, 8, 3),
    ("weight", "float32"): Plan(32, 64, 64, 8, 1),
}
"""By kernel and by what it multiplies: rows of at most `NARROW` channels, wider ones, or float32."""
OTHER_PLANS = {
    ("A100", "multiply", "wide"): Plan(128, 32, 64, 8, 2),
    ("A100", "weight", "narrow"): Plan(32, 128, 64, 8, 2),
    ("A100", "weight", "wide"): Plan(32, 128, 64, 8, 2),
    ("B200", "multiply", "narrow"): Plan(128, 64, 64, 8, 2),
    ("B200", "multiply", "wide"): Plan(128, 32, 64, 8, 2),
    ("small", "multiply", "narrow"): Plan(128, 64, 64, 8, 2),
    ("small", "multiply", "wide"): Plan(64, 32, 64, 8, 2),
    ("small", "weight", "narrow"): Plan(32, 128, 64, 8, 2),
    ("small", "weight", "wide"): Plan(32, 128, 64, 8, 2),
}
"""Instead of those above, by `gpu_class`: GPUs with less shared memory, or for which code spills registers."""

EPSILON = tl.constexpr(1e-5)


class Target(NamedTuple):
    """What multiplies."""

    dtype: torch.dtype
    """Of the product."""
    gpu: str
    """See `gpu_class`."""


@triton.jit
def _load_tile(x, r, inside, j: tl.constexpr, IN: tl.constexpr, TILE: tl.constexpr):
    """Tile j of rows r of x, float32, zeros where there is nothing; its places, and which of them exist."""
    k = j * TILE + tl.arange(0, TILE)
    place = r[:, None] * IN + k[None, :]
    mask = inside[:, None] & (k < IN)[None, :]
    return tl.load(x + place, mask=mask, other=0.0).to(tl.float32), place, mask


@triton.jit
def _load_tiles(x, r, inside, IN: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr):
    """Rows r of x as a tuple of tiles."""
    tiles = ()
    for j in tl.static_range(TILES):
        tile, _place, _mask = _load_tile(x, r, inside, j, IN, TILE)
        tiles = tiles + (tile,)
    return tiles


@triton.jit
def _statistics(tiles, IN: tl.constexpr):
    """Mean of every row and 1 / its deviation."""
    TILE: tl.constexpr = tiles[0].shape[1]
    total = tiles[0]
    for j in tl.static_range(1, len(tiles)):
        total += tiles[j]
    mean = tl.sum(total, 1) / IN
    squares = tl.zeros_like(total)
    for j in tl.static_range(len(tiles)):
        k = j * TILE + tl.arange(0, TILE)
        centered = tl.where((k < IN)[None, :], tiles[j] - mean[:, None], 0.0)
        squares += centered * centered
    return mean, tl.rsqrt(tl.sum(squares, 1) / IN + EPSILON)


@triton.jit
def _load_statistics(pointer, rows, inside):
    return tl.load(pointer, mask=inside, other=0.0), tl.load(pointer + rows, mask=inside, other=0.0)


@triton.jit
def _normalize(tiles, mean, rate, dtype: tl.constexpr):
    """x̂ for the product. Behind the last channel it is not 0, but there the weight is."""
    normal = ()
    for j in tl.static_range(len(tiles)):
        normal = normal + (((tiles[j] - mean[:, None]) * rate[:, None]).to(dtype),)
    return normal


@triton.jit
def _convert(tiles, dtype: tl.constexpr):
    converted = ()
    for j in tl.static_range(len(tiles)):
        converted = converted + (tiles[j].to(dtype),)
    return converted


@triton.jit
def _load_weights(packed, n, TILES: tl.constexpr, TILE: tl.constexpr):
    """The weights of outputs n, a tile for each tile of x."""
    weights = ()
    for j in tl.static_range(TILES):
        k = j * TILE + tl.arange(0, TILE)
        weights = weights + (tl.load(packed + n[:, None] * (TILES * TILE) + k[None, :]),)
    return weights


@triton.jit
def _multiply(tiles, weights, shift, PRECISION: tl.constexpr):
    """A tile of the product."""
    total = tl.zeros((tiles[0].shape[0], weights[0].shape[0]), tl.float32)
    for j in tl.static_range(len(tiles)):
        total = dot(tiles[j], tl.trans(weights[j]), total, PRECISION)
    return total + shift[None, :]


@triton.jit
def pack_weight(
    weight, bias, gamma, beta, packed, shift,
    IN: tl.constexpr, OUT: tl.constexpr, WIDTH: tl.constexpr, LANES: tl.constexpr,
    NORM: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """`packed`, W γ with zeros up to whole tiles, WIDTH channels a row, and `shift`, bias + W β, float32."""
    n, k = tl.program_id(0), tl.arange(0, LANES)
    there = k < IN
    w = tl.load(weight + n * IN + k, mask=there & (n < OUT), other=0.0).to(tl.float32)
    total = tl.load(bias + n, mask=n < OUT, other=0.0).to(tl.float32) if BIAS else 0.0
    if NORM:
        total += tl.sum(w * tl.load(beta + k, mask=there, other=0.0).to(tl.float32))
        w *= tl.load(gamma + k, mask=there, other=0.0).to(tl.float32)
    tl.store(packed + n * WIDTH + k, w.to(packed.dtype.element_ty), mask=k < WIDTH)
    tl.store(shift + n, total)


@triton.jit
def multiply_rows(
    x, packed, shift, residual, skip, scale, y, statistics, rows, steps,
    IN: tl.constexpr, OUT: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, PRECISION: tl.constexpr,
    NORM: tl.constexpr, GELU: tl.constexpr, RESIDUAL: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """y, (rows, OUT), of x, (rows, IN); with NORM also `statistics`, (2, rows)."""
    first = tl.program_id(0).to(tl.int64) * ROWS
    r = tl.arange(0, ROWS)
    inside = r < (rows - first).to(tl.int32)
    tiles = _load_tiles(x + first * IN, r, inside, IN, TILES, TILE)
    if NORM:
        mean, rate = _statistics(tiles, IN)
        tl.store(statistics + first + r, mean, mask=inside)
        tl.store(statistics + rows + first + r, rate, mask=inside)
        tiles = _normalize(tiles, mean, rate, packed.dtype.element_ty)
    else:
        tiles = _convert(tiles, packed.dtype.element_ty)
    residual += first * OUT
    skip += first * OUT
    y += first * OUT
    for step in range(0, steps):
        n = step * STEP + tl.arange(0, STEP)
        value = _multiply(tiles, _load_weights(packed, n, TILES, TILE), tl.load(shift + n), PRECISION)
        if GELU:
            value = gelu(value)
        place = r[:, None] * OUT + n[None, :]
        mask = inside[:, None] & (n < OUT)[None, :]
        if RESIDUAL:
            value += tl.load(residual + place, mask=mask, other=0.0).to(tl.float32)
        if SKIP:
            factor = tl.load(scale + n, mask=n < OUT, other=0.0).to(tl.float32)
            value += factor[None, :] * tl.load(skip + place, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + place, value.to(y.dtype.element_ty), mask=mask)


@triton.jit
def differentiate_rows(
    grad, x, packed, shift, scale, skip, grad_skip, grad_x, grad_a, part_scale, statistics, rows, steps,
    IN: tl.constexpr, OUT: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, NORM: tl.constexpr, GELU: tl.constexpr, SKIP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of x and skip, and these rows' part of the scale's, `part_scale` (programs, OUT).

    With GELU also `grad_a`, (rows, OUT), the gradient of the product.
    """
    first = tl.program_id(0).to(tl.int64) * ROWS
    r = tl.arange(0, ROWS)
    inside = r < (rows - first).to(tl.int32)
    dtype: tl.constexpr = packed.dtype.element_ty
    x += first * IN
    statistics += first + r
    if GELU:
        tiles = _load_tiles(x, r, inside, IN, TILES, TILE)
        if NORM:
            mean, rate = _load_statistics(statistics, rows, inside)
            tiles = _normalize(tiles, mean, rate, dtype)
        else:
            tiles = _convert(tiles, dtype)
    grad += first * OUT
    grad_a += first * OUT
    skip += first * OUT
    grad_skip += first * OUT
    sums = ()
    for _j in tl.static_range(TILES):
        sums = sums + (tl.zeros((ROWS, TILE), tl.float32),)
    for step in range(0, steps):
        n = step * STEP + tl.arange(0, STEP)
        place = r[:, None] * OUT + n[None, :]
        mask = inside[:, None] & (n < OUT)[None, :]
        g = tl.load(grad + place, mask=mask, other=0.0)
        weights = _load_weights(packed, n, TILES, TILE)
        if SKIP:
            wide = g.to(tl.float32)
            factor = tl.load(scale + n, mask=n < OUT, other=0.0).to(tl.float32)
            tl.store(grad_skip + place, (factor[None, :] * wide).to(grad_skip.dtype.element_ty), mask=mask)
            part = tl.sum(wide * tl.load(skip + place, mask=mask, other=0.0).to(tl.float32), 0)
            tl.store(part_scale + tl.program_id(0) * OUT + n, part, mask=n < OUT)
        if GELU:
            slope = gelu_slope(_multiply(tiles, weights, tl.load(shift + n), PRECISION))
            g = (g.to(tl.float32) * slope).to(dtype)
            tl.store(grad_a + place, g, mask=mask)
        g = g.to(dtype)
        new = ()
        for j in tl.static_range(TILES):
            new = new + (dot(g, weights[j], sums[j], PRECISION),)
        sums = new
    grad_x += first * IN
    if NORM:
        mean, rate = _load_statistics(statistics, rows, inside)  # again: no registers for them in the loop
        plain = tl.zeros((ROWS,), tl.float32)
        along = tl.zeros((ROWS,), tl.float32)
        scaled = ()
        for j in tl.static_range(TILES):
            tile, _place, _mask = _load_tile(x, r, inside, j, IN, TILE)
            value = sums[j] * rate[:, None]
            plain += tl.sum(value, 1)
            along += tl.sum(value * (tile - mean[:, None]), 1)
            scaled = scaled + (value,)
            tl.debug_barrier()  # so that x is loaded tile by tile, and once more below: no registers for it either
        sums = scaled
        plain = plain / IN
        along = along * rate * rate / IN
    for j in tl.static_range(TILES):
        tile, place, mask = _load_tile(x, r, inside, j, IN, TILE)
        value = sums[j]
        if NORM:
            mean, _rate = _load_statistics(statistics, rows, inside)
            value -= plain[:, None] + (tile - mean[:, None]) * along[:, None]
        tl.store(grad_x + place, value.to(grad_x.dtype.element_ty), mask=mask)


@triton.jit
def differentiate_weight(
    grad, x, statistics, like, parts, rows, steps,
    IN: tl.constexpr, OUT: tl.constexpr, TILES: tl.constexpr, TILE: tl.constexpr, ROWS: tl.constexpr,
    STEP: tl.constexpr, NORM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """`parts`, (ranges, OUT, IN + 1): gᵀ · (x̂, 1) of ranges of ROWS · steps rows, in the dtype of `like`.

    A program has STEP outputs and TILES tiles of x's channels.
    """
    dtype: tl.constexpr = like.dtype.element_ty
    GROUPS: tl.constexpr = IN // (TILE * TILES) + 1
    n = tl.program_id(0) // GROUPS * STEP + tl.arange(0, STEP)
    into = tl.program_id(0) % GROUPS * (TILE * TILES)
    first = tl.program_id(1).to(tl.int64) * (ROWS * steps)
    r = tl.arange(0, ROWS)
    one = tl.full((1, 1), 1.0, tl.float32).to(dtype)
    sums = ()
    for _j in tl.static_range(TILES):
        sums = sums + (tl.zeros((STEP, TILE), tl.float32),)
    for step in range(0, steps):
        begin = first + step * ROWS
        inside = r < (rows - begin).to(tl.int32)
        mask = inside[:, None] & (n < OUT)[None, :]
        g = tl.load(grad + begin * OUT + r[:, None] * OUT + n[None, :], mask=mask, other=0.0).to(dtype)
        if NORM:
            mean, rate = _load_statistics(statistics + begin + r, rows, inside)
        new = ()
        for j in tl.static_range(TILES):
            k = into + j * TILE + tl.arange(0, TILE)
            mask = inside[:, None] & (k < IN)[None, :]
            tile = tl.load(x + begin * IN + r[:, None] * IN + k[None, :], mask=mask, other=0.0)
            if NORM:
                tile = (tile.to(tl.float32) - mean[:, None]) * rate[:, None]
            tile = tl.where((k == IN)[None, :], one, tile.to(dtype))
            new = new + (dot(tl.trans(g), tile, sums[j], PRECISION),)
        sums = new
    parts += tl.program_id(1).to(tl.int64) * (OUT * (IN + 1))
    for j in tl.static_range(TILES):
        k = into + j * TILE + tl.arange(0, TILE)
        mask = (n < OUT)[:, None] & (k <= IN)[None, :]
        tl.store(parts + n[:, None] * (IN + 1) + k[None, :], sums[j], mask=mask)


def width(inputs: int) -> int:
    """Channels of x in whole tiles, with at least one more, for the ones beside x̂."""
    step = 64 if inputs < NARROW else 128
    return triton.cdiv(inputs + 1, step) * step


def height(outputs: int) -> int:
    """Outputs of the packed weight."""
    return triton.cdiv(outputs, HEIGHT) * HEIGHT


def plan(kernel: str, inputs: int, target: Target) -> Plan:
    """How `kernel` is cut for rows of x of `inputs` channels."""
    what = "float32" if target.dtype == torch.float32 else "narrow" if width(inputs) <= NARROW else "wide"
    return OTHER_PLANS.get((target.gpu, kernel, what), PLANS[kernel, what])


def ranges(rows: int, inputs: int, outputs: int, target: Target) -> tuple[int, int, int]:
    """Programs, ranges of rows, and steps of a range of `differentiate_weight`."""
    cut = plan("weight", inputs, target)
    programs = triton.cdiv(outputs, cut.outputs) * triton.cdiv(inputs + 1, cut.tile * GROUP)
    steps = triton.cdiv(rows, cut.rows)
    steps = triton.cdiv(steps, min(steps, max(1, PROGRAMS // programs)))
    return programs, triton.cdiv(rows, steps * cut.rows), steps


def constants(kernel: str, inputs: int, outputs: int, target: Target) -> dict[str, int | str]:
    """The `tl.constexpr` arguments of a kernel that follow from sizes and what multiplies."""
    shape: dict[str, int | str] = {"IN": inputs, "OUT": outputs}
    if kernel == "pack":
        return {**shape, "WIDTH": width(inputs), "LANES": triton.next_power_of_2(width(inputs))}
    cut = plan(kernel, inputs, target)
    tiles = width(inputs) // cut.tile
    shape |= {"TILES": min(GROUP, tiles) if kernel == "weight" else tiles, "TILE": cut.tile}
    shape |= {"ROWS": cut.rows, "STEP": cut.outputs}
    return {**shape, "PRECISION": "tf32x3" if target.dtype == torch.float32 else "tf32"}  # which bfloat16 ignores


def _launch(kernel: str, inputs: int, outputs: int, target: Target) -> dict[str, int | str]:
    cut = plan(kernel, inputs, target)
    compiled = {"num_warps": cut.warps, "num_stages": cut.stages}
    compiled |= {} if cut.registers is None else {"maxnreg": cut.registers}
    return constants(kernel, inputs, outputs, target) | compiled


def _pack(
    weight: Tensor, bias: Tensor | None, gamma: Tensor | None, beta: Tensor | None, target: Target
) -> tuple[Tensor, Tensor]:
    outputs, inputs = weight.shape
    packed = torch.empty(height(outputs), width(inputs), dtype=target.dtype, device=weight.device)
    shift = torch.empty(height(outputs), dtype=torch.float32, device=weight.device)
    present = {"NORM": gamma is not None, "BIAS": bias is not None}
    weight, bias, gamma, beta = (weight if p is None else p.contiguous() for p in (weight, bias, gamma, beta))
    pack_weight[(height(outputs),)](
        weight, bias, gamma, beta, packed, shift,
        **constants("pack", inputs, outputs, target), **present, num_warps=PACK_WARPS,
    )  # fmt: skip
    return packed, shift


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """See `make_operator`."""
    (rows, inputs), outputs = x.shape, len(weight)
    target = Target(dtype, gpu_class(capability(x.device)))
    cut = plan("multiply", inputs, target)
    y = torch.empty(rows, outputs, dtype=out_dtype, device=x.device)
    statistics = x.new_empty(2, 0 if gamma is None else rows, dtype=torch.float32)
    present = {"NORM": gamma is not None, "RESIDUAL": residual is not None, "SKIP": skip is not None}
    residual, skip = (y if t is None else t for t in (residual, skip))
    with torch.cuda.device_of(x):
        packed, shift = _pack(weight, bias, gamma, beta, target)
        scale = shift if scale is None else scale.contiguous()
        multiply_rows[(triton.cdiv(rows, cut.rows),)](
            x, packed, shift, residual, skip, scale, y, statistics, rows, triton.cdiv(outputs, cut.outputs),
            **_launch("multiply", inputs, outputs, target), **present, GELU=gelu,
        )  # fmt: skip
    return y, statistics


def backward(
    grad: Tensor,
    statistics: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """See `make_operator`."""
    (rows, inputs), outputs = x.shape, len(weight)
    target = Target(dtype, gpu_class(capability(x.device)))
    cut = plan("differentiate", inputs, target)
    programs = triton.cdiv(rows, cut.rows)
    groups, count, steps = ranges(rows, inputs, outputs, target)
    norm = {"NORM": gamma is not None}
    grad_x = torch.empty_like(x)
    grad_a = torch.empty(rows, outputs, dtype=dtype, device=x.device) if gelu else grad
    grad_skip = None if skip is None else torch.empty_like(skip)
    part_scale = x.new_empty(0 if skip is None else programs, outputs, dtype=torch.float32)
    parts = x.new_empty(count, outputs, inputs + 1, dtype=torch.float32)
    with torch.cuda.device_of(x):
        packed, shift = _pack(weight, bias, gamma, beta, target)
        skips = (shift, grad, grad) if skip is None or scale is None else (scale.contiguous(), skip, grad_skip)
        differentiate_rows[(programs,)](
            grad, x, packed, shift, *skips, grad_x, grad_a, part_scale, statistics,
            rows, triton.cdiv(outputs, cut.outputs),
            **_launch("differentiate", inputs, outputs, target), **norm, GELU=gelu, SKIP=skip is not None,
        )  # fmt: skip
        differentiate_weight[groups, count](
            grad_a, x, statistics, packed, parts, rows, steps, **_launch("weight", inputs, outputs, target), **norm
        )
    sums = parts.sum(0)
    grad_weight, grad_bias = sums[:, :-1], sums[:, -1]
    grad_gamma = grad_beta = None
    if gamma is not None and beta is not None:
        grad_gamma = (weight * grad_weight).sum(0).to(gamma.dtype)
        grad_beta = (weight * grad_bias[:, None]).sum(0).to(beta.dtype)
        grad_weight = grad_weight * gamma + grad_bias[:, None] * beta
    return (
        grad_x,
        grad_weight.to(weight.dtype).contiguous(),
        None if bias is None else grad_bias.to(bias.dtype).contiguous(),
        grad_gamma,
        grad_beta,
        grad_skip,
        None if scale is None else part_scale.sum(0).to(scale.dtype),
    )


_operator = make_operator("linear_triton", forward, backward)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    residual: Tensor | None,
    skip: Tensor | None,
    scale: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """See `mambair_ds.kernels.linear.linear`; `dtype` is that of the product."""
    arguments = (x, weight, bias, gamma, beta, residual, skip, scale, gelu, dtype)
    return _operator(*arguments)[0] if weight.shape[1] <= LARGEST else reference.linear(*arguments)
