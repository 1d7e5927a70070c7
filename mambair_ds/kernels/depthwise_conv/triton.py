"""The depthwise convolution on GPUs: a warp walks down a strip of the picture, a channel in each lane.

A program has `WIDTH` channels, and the ROWS and COLUMNS that `TILES` says. The rows of the picture that the kernel
covers, and the kernel itself, lie in registers, and every step down loads one row more: an output takes k²
multiply-adds and (COLUMNS + k - 1) / COLUMNS loads, where a thread for each output would take k². Loads ask for each
position inside the picture, so no size need be a multiple of anything.

Sums are float32. There are no atomics: each program's part of the gradients of kernel and bias goes to its own place
and is added up in a fixed order, so two runs agree to the bit.
"""

# mypy: disable-error-code="assignment, no-untyped-def"
# ruff: noqa: RUF005 (Triton's tuples grow by +)

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambair_ds.kernels.depthwise_conv.operator import make_operator

TILES = {"convolve": (16, 4), "differentiate": (32, 2)}
"""Rows and columns of a program; with 4 columns, `differentiate_tiles` spills registers on sm_100."""
WIDTH = 32
WARPS = 1

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _gelu(x):
    """As the CPU's: GELU and its derivative, Φ from φ times a polynomial fitted to Mills' ratio."""
    density = tl.exp2(x * x * (-0.5 * LOG2E))
    t = 1.0 / (1.0 + 0.24 * tl.abs(x))
    p = -0.0529172495 * t + 0.1517656446
    p = p * t - 0.0626010746
    p = p * t + 0.1142163277
    p = p * t + 0.0663544238
    p = p * t + 0.0916993693
    p = p * t + 0.0957460776
    p = p * t + 0.0957363620
    tail = density * p * t
    phi = tl.where(x >= 0, 1.0 - tail, tail)
    return x * phi, phi + x * density * 0.3989422804014327


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def _place(height, width, channels, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr):
    """What this program works on: a sample, a first row, a first column, channels and which of them exist."""
    blocks = tl.cdiv(channels, WIDTH)
    d = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)
    strips = tl.cdiv(width, COLUMNS)
    tile = tl.program_id(0) // blocks
    return tl.program_id(1).to(tl.int64), tile // strips * ROWS, tile % strips * COLUMNS, d, d < channels


@triton.jit
def _load(pointer, mask):
    return tl.load(pointer, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_row(x, y, first, stride, height, width, d, in_d, COUNT: tl.constexpr):
    """COUNT positions of row y from column `first` on, zeros outside the picture. Positions are `stride` apart."""
    row = ()
    for j in tl.static_range(COUNT):
        column = first + j
        inside = in_d & (y >= 0) & (y < height) & (column >= 0) & (column < width)
        row = row + (_load(x + (y * width + column) * stride + d, inside),)
    return row


@triton.jit
def _load_kernel(kernel, channels, d, in_d, K: tl.constexpr):
    taps = ()
    for i in tl.static_range(K * K):
        taps = taps + (_load(kernel + i * channels + d, in_d),)
    return taps


@triton.jit
def _dot(window, j: tl.constexpr, taps, total, K: tl.constexpr):
    """total + the kernel times the window at column j; the window holds K rows, one after the other."""
    SPAN: tl.constexpr = len(window) // K
    for a in tl.static_range(K):
        for b in tl.static_range(K):
            total += taps[a * K + b] * window[a * SPAN + j + b]
    return total


@triton.jit
def convolve_tiles(
    x, kernel, bias, other, y, height, width, channels, x_stride, other_stride,
    K: tl.constexpr, EPILOGUE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y, (B, H, W, C), of x and other, whose positions are `x_stride` and `other_stride` elements apart."""
    sample, row, column, d, in_d = _place(height, width, channels, ROWS, COLUMNS, WIDTH)
    x += sample * height * width * x_stride
    other += sample * height * width * other_stride
    y += sample * height * width * channels
    taps = _load_kernel(kernel, channels, d, in_d, K)
    shift = _load(bias + d, in_d)
    SPAN: tl.constexpr = COLUMNS + K - 1
    window = ()
    for a in tl.static_range(K - 1):
        window = window + _load_row(x, row + a - K // 2, column - K // 2, x_stride, height, width, d, in_d, SPAN)
    for i in range(row, tl.minimum(row + ROWS, height)):
        rows = window + _load_row(x, i + K // 2, column - K // 2, x_stride, height, width, d, in_d, SPAN)
        for j in tl.static_range(COLUMNS):
            c = _dot(rows, j, taps, shift, K)
            inside = in_d & (column + j < width)
            center = rows[K // 2 * SPAN + j + K // 2]
            place = i * width + column + j
            if EPILOGUE == "gelu_residual":
                value, _ = _gelu(c)
                c = center + value
            elif EPILOGUE == "sigmoid_gate":
                c = center * _sigmoid(c)
            elif EPILOGUE == "gate":
                c = c * _load(other + place * other_stride + d, inside)
            elif EPILOGUE == "add":
                c = c + _load(other + place * other_stride + d, inside)
            tl.store(y + place * channels + d, c.to(y.dtype.element_ty), mask=inside)
        window = rows[SPAN:]


@triton.jit
def differentiate_tiles(
    grad, x, kernel, bias, gate, grad_c, extra, part_kernel, part_bias,
    height, width, channels, x_stride, gate_stride,
    K: tl.constexpr, EPILOGUE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """The gradient of c, what else needs c, and this tile's part of the gradients of kernel and bias.

    `part_kernel` is (B, tiles, K², C), `part_bias` (B, tiles, C), in float32.
    """
    sample, row, column, d, in_d = _place(height, width, channels, ROWS, COLUMNS, WIDTH)
    grad += sample * height * width * channels
    x += sample * height * width * x_stride
    gate += sample * height * width * gate_stride
    grad_c += sample * height * width * channels
    extra += sample * height * width * channels
    taps = _load_kernel(kernel, channels, d, in_d, K)
    shift = _load(bias + d, in_d)
    SPAN: tl.constexpr = COLUMNS + K - 1
    zero = tl.zeros((WIDTH,), tl.float32)
    total = zero
    sums = (zero,) * (K * K)
    window = ()
    for a in tl.static_range(K - 1):
        window = window + _load_row(x, row + a - K // 2, column - K // 2, x_stride, height, width, d, in_d, SPAN)
    for i in range(row, tl.minimum(row + ROWS, height)):
        rows = window + _load_row(x, i + K // 2, column - K // 2, x_stride, height, width, d, in_d, SPAN)
        for j in tl.static_range(COLUMNS):
            inside = in_d & (column + j < width)
            place = i * width + column + j
            g = _load(grad + place * channels + d, inside)
            if EPILOGUE != "none":
                c = _dot(rows, j, taps, shift, K)
                if EPILOGUE == "gelu_residual":
                    _, slope = _gelu(c)
                    g = g * slope
                elif EPILOGUE == "sigmoid_gate":
                    s = _sigmoid(c)
                    c = g * s
                    g = c * rows[K // 2 * SPAN + j + K // 2] * (1.0 - s)
                elif EPILOGUE == "gate":
                    c = g * c
                    g = g * _load(gate + place * gate_stride + d, inside)
                if EPILOGUE != "gelu_residual":
                    tl.store(extra + place * channels + d, c.to(extra.dtype.element_ty), mask=inside)
                tl.store(grad_c + place * channels + d, g.to(grad_c.dtype.element_ty), mask=inside)
            total += g
            new_sums = ()
            for a in tl.static_range(K):
                for b in tl.static_range(K):
                    new_sums = new_sums + (sums[a * K + b] + g * rows[a * SPAN + j + b],)
            sums = new_sums
        window = rows[SPAN:]
    part = sample * (tl.num_programs(0) // tl.cdiv(channels, WIDTH)) + tl.program_id(0) // tl.cdiv(channels, WIDTH)
    tl.store(part_bias + part * channels + d, total, mask=in_d)
    for i in tl.static_range(K * K):
        tl.store(part_kernel + (part * (K * K) + i) * channels + d, sums[i], mask=in_d)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x, and how far its positions are apart; copied unless they are evenly spaced with their channels together."""
    stride = x.stride(2)
    spaced = (x.shape[1] * x.shape[2] * stride, x.shape[2] * stride, stride, 1)
    return (x, stride) if x.stride() == spaced else (x.contiguous(), x.shape[3])


def _tiles(x: Tensor, kernel: str) -> int:
    rows, columns = TILES[kernel]
    return triton.cdiv(x.shape[1], rows) * triton.cdiv(x.shape[2], columns)


def _grid(x: Tensor, kernel: str) -> tuple[int, int]:
    return _tiles(x, kernel) * triton.cdiv(x.shape[3], WIDTH), len(x)


def constants(kernel: str, k: int, epilogue: str) -> dict[str, int | str]:
    """The `tl.constexpr` arguments of the kernel "convolve" or "differentiate"."""
    rows, columns = TILES[kernel]
    return {"K": k, "EPILOGUE": epilogue, "ROWS": rows, "COLUMNS": columns, "WIDTH": WIDTH}


def convolve(x: Tensor, kernel: Tensor, bias: Tensor, other: Tensor | None, epilogue: str) -> Tensor:
    """The forward pass; see `make_operator`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, x_stride = _rows(x)
    other, other_stride = (x, 0) if other is None else _rows(other)
    sizes = (*x.shape[1:], x_stride, other_stride)
    with torch.cuda.device_of(x):
        convolve_tiles[_grid(x, "convolve")](
            x, kernel, bias, other, y, *sizes, **constants("convolve", len(kernel), epilogue), num_warps=WARPS
        )
    return y


def differentiate(
    grad: Tensor, x: Tensor, kernel: Tensor, bias: Tensor, gate: Tensor | None, epilogue: str
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The backward pass up to c; see `make_operator`."""
    grad_c = grad if epilogue == "none" else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    extra = torch.empty_like(grad_c) if epilogue in ("sigmoid_gate", "gate") else None
    parts = len(x), _tiles(x, "differentiate")
    part_kernel, part_bias = kernel.new_empty(*parts, *kernel.shape), kernel.new_empty(*parts, *bias.shape)
    grad = grad.contiguous()
    x, x_stride = _rows(x)
    gate, gate_stride = (x, 0) if gate is None else _rows(gate)
    sizes = (*x.shape[1:], x_stride, gate_stride)
    with torch.cuda.device_of(x):
        differentiate_tiles[_grid(x, "differentiate")](
            grad, x, kernel, bias, gate, grad_c, grad_c if extra is None else extra, part_kernel, part_bias,
            *sizes, **constants("differentiate", len(kernel), epilogue), num_warps=WARPS,
        )  # fmt: skip
    return grad_c, extra, part_kernel.sum((0, 1)), part_bias.sum((0, 1))


_operator = make_operator("depthwise_conv_triton", convolve, differentiate)


def depthwise_conv(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, epilogue: str) -> Tensor:
    """See `mambair_ds.kernels.depthwise_conv.depthwise_conv`."""
    return _operator(x, weight, bias, gate, epilogue)
