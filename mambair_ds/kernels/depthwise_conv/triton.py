"""The depthwise convolution on GPUs: a warp walks down a strip of the picture, channels of samples in its lanes.

A program has `ROWS` and `COLUMNS` of the picture and `WIDTH` of the B·C channels of all samples together, so that a
few channels waste no lanes. The rows that the kernel covers, and the kernel itself, lie in registers, and every step
down loads one row more: an output takes k² multiply-adds and (COLUMNS + k - 1) / COLUMNS loads, where a thread for
each output would take k². Two loops walk: one over `STEPS` rows at a time, without a mask; then one over single rows
that asks for each position whether it is in the picture. The second walks what lies at the left, right and lower
border; no size need be a multiple of anything.

Sums are float32. There are no atomics: each program's part of the gradients of kernel and bias goes to its own place
and is added up in a fixed order, so two runs agree to the bit. docs/kernels.md counts it all.
"""

# mypy: disable-error-code="assignment, no-untyped-def"
# ruff: noqa: RUF005 (Triton's tuples grow by +)

import torch
import triton
import triton.language as tl
from torch import Tensor

from mambair_ds.kernels.depthwise_conv.operator import EPS, make_operator
from mambair_ds.kernels.gpu import gelu, gelu_slope

WARPS = 1
TILES = {
    "convolve": {"ROWS": 16, "COLUMNS": 4, "WIDTH": 64, "STEPS": 4},
    "differentiate": {"ROWS": 32, "COLUMNS": 4, "WIDTH": 32, "STEPS": 2},
}
NORM_WARPS = 4
NORM_STEPS = 4
"""How many tiles of tokens a program of `normalize_tokens_backward` takes."""

NORM_EPS = tl.constexpr(EPS)

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _sigmoid(x):
    root = tl.rsqrt(1.0 + tl.exp2(-x * LOG2E))  # a division would take more instructions
    return root * root


@triton.jit
def _place(
    batch, height, width,
    channels: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """What this program works on: every lane's sample, channel and whether they exist; a first row and column.

    Lanes that do not exist have another sample: loads need no mask, only stores do.
    """
    lane = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sample = tl.minimum(lane // channels, batch - 1).to(tl.int64)
    strips = tl.cdiv(width, COLUMNS)
    row, column = tl.program_id(0) // strips * ROWS, tl.program_id(0) % strips * COLUMNS
    return sample, lane % channels, lane < batch * channels, row, column


@triton.jit
def _load(pointer, inside):
    return tl.load(pointer, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_row(x, inside, column, width, stride: tl.constexpr, COUNT: tl.constexpr):
    """COUNT positions from x on, the first at `column`; zeros for a row or a column outside the picture."""
    row = ()
    for j in tl.static_range(COUNT):
        row = row + (_load(x + j * stride, inside & (column + j >= 0) & (column + j < width)),)
    return row


@triton.jit
def _fetch_row(x, wanted, stride: tl.constexpr, COUNT: tl.constexpr):
    """COUNT positions from x on, all in the picture, not converted yet; none if not wanted."""
    row = ()
    for j in tl.static_range(COUNT):
        row = row + (tl.load(x + j * stride, mask=wanted),)
    return row


@triton.jit
def _to_float(row):
    values = ()
    for j in tl.static_range(len(row)):
        values = values + (row[j].to(tl.float32),)
    return values


@triton.jit
def _load_window(x, lane, row, column, height, width, stride: tl.constexpr, K: tl.constexpr, COUNT: tl.constexpr):
    """The K - 1 rows from `row` on, each COUNT positions from `column` on; x is at the first of them."""
    window = ()
    for a in tl.static_range(K - 1):
        inside = (row + a >= 0) & (row + a < height)
        window = window + _load_row(x + lane, inside, column, width, stride, COUNT)
        x += width * stride
    return window


@triton.jit
def _load_kernel(kernel, channels: tl.constexpr, K: tl.constexpr):
    taps = ()
    for i in tl.static_range(K * K):
        taps = taps + (tl.load(kernel + i * channels),)
    return taps


@triton.jit
def _unmasked(row, end, column, height, width, K: tl.constexpr, COLUMNS: tl.constexpr, STEPS: tl.constexpr):
    """How often STEPS rows can be walked from `row` on without touching the left, right or lower border."""
    across = (column >= K // 2) & (column + COLUMNS + K // 2 <= width)
    return tl.where(across, tl.maximum(tl.minimum(end, height - K // 2) - row, 0) // STEPS, 0)


@triton.jit
def _dot(window, j: tl.constexpr, taps, total, K: tl.constexpr):
    """total + the kernel times the window at column j; the window holds K rows, one after the other."""
    SPAN: tl.constexpr = len(window) // K
    for a in tl.static_range(K):
        for b in tl.static_range(K):
            total = tl.fma(taps[a * K + b], window[a * SPAN + j + b], total)
    return total


@triton.jit
def _convolve_row(
    rows, taps, shift, others, y, left, exists, channels: tl.constexpr,
    K: tl.constexpr, EPILOGUE: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store one row of y, of which `left` columns are left in the picture."""
    SPAN: tl.constexpr = COLUMNS + K - 1
    for j in tl.static_range(COLUMNS):
        c = _dot(rows, j, taps, shift, K)
        center = rows[K // 2 * SPAN + j + K // 2]
        if EPILOGUE == "gelu_residual":
            c = center + gelu(c)
        elif EPILOGUE == "sigmoid_gate":
            c = center * _sigmoid(c)
        elif EPILOGUE == "gate":
            c = c * others[j]
        elif EPILOGUE == "add":
            c = c + others[j]
        tl.store(y + j * channels, c.to(y.dtype.element_ty), mask=exists & (j < left) if MASKED else exists)


@triton.jit
def convolve_tiles(
    x, kernel, bias, other, y, batch, height, width,
    channels: tl.constexpr, x_stride: tl.constexpr, other_stride: tl.constexpr,
    K: tl.constexpr, EPILOGUE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """y, (B, H, W, C), of x and other, whose positions are `x_stride` and `other_stride` elements apart."""
    sample, d, exists, row, column = _place(batch, height, width, channels, ROWS, COLUMNS, WIDTH)
    taps = _load_kernel(kernel + d, channels, K)
    shift = tl.load(bias + d)
    SPAN: tl.constexpr = COLUMNS + K - 1
    HALF: tl.constexpr = K // 2
    size, start = sample * height * width, row.to(tl.int64) * width + column
    x_lane, other_lane, y_lane = size * x_stride + d, size * other_stride + d, size * channels + d
    x += (start - HALF * width - HALF) * x_stride
    other += start * other_stride
    y += start * channels
    window = _load_window(x, x_lane, row - HALF, column - HALF, height, width, x_stride, K, SPAN)
    x += (K - 1) * width * x_stride
    end = tl.minimum(row + ROWS, height)
    groups = _unmasked(row, end, column, height, width, K, COLUMNS, STEPS)
    OTHERS: tl.constexpr = COLUMNS if EPILOGUE == "gate" or EPILOGUE == "add" else 0
    ahead = _fetch_row(x + x_lane, groups > 0, x_stride, SPAN)
    others = _fetch_row(other + other_lane, groups > 0, other_stride, OTHERS)
    for i in range(groups):
        for a in tl.static_range(STEPS):
            rows, values = window + _to_float(ahead), _to_float(others)
            x += width * x_stride
            other += width * other_stride
            further = True if a + 1 < STEPS else i + 1 < groups  # its row; loaded before this one's is needed
            ahead = _fetch_row(x + x_lane, further, x_stride, SPAN)
            others = _fetch_row(other + other_lane, further, other_stride, OTHERS)
            _convolve_row(rows, taps, shift, values, y + y_lane, COLUMNS, exists, channels, K, EPILOGUE, COLUMNS, False)
            window = rows[SPAN:]
            y += width * channels
    for i in range(row + groups * STEPS, end):
        rows = window + _load_row(x + x_lane, i + HALF < height, column - HALF, width, x_stride, SPAN)
        values = _load_row(other + other_lane, True, column, width, other_stride, OTHERS)
        _convolve_row(
            rows, taps, shift, values, y + y_lane, width - column, exists, channels, K, EPILOGUE, COLUMNS, True
        )
        window = rows[SPAN:]
        x += width * x_stride
        other += width * other_stride
        y += width * channels


@triton.jit
def _differentiate_row(
    rows, taps, shift, total, sums, grads, gates, grad_c, extra, left, exists, channels: tl.constexpr,
    K: tl.constexpr, EPILOGUE: tl.constexpr, COLUMNS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Store one row of grad_c and extra; the sums of the gradients of bias and kernel with this row's."""
    SPAN: tl.constexpr = COLUMNS + K - 1
    for j in tl.static_range(COLUMNS):
        inside = exists & (j < left) if MASKED else exists
        g = grads[j]
        if EPILOGUE != "none":
            c = _dot(rows, j, taps, shift, K)
            if EPILOGUE == "gelu_residual":
                g = g * gelu_slope(c)
            elif EPILOGUE == "sigmoid_gate":
                s = _sigmoid(c)
                c = g * s
                g = c * (rows[K // 2 * SPAN + j + K // 2] * (1.0 - s))
            elif EPILOGUE == "gate":
                c = g * c
                g = g * gates[j]
            if EPILOGUE != "gelu_residual":
                tl.store(extra + j * channels, c.to(extra.dtype.element_ty), mask=inside)
            tl.store(grad_c + j * channels, g.to(grad_c.dtype.element_ty), mask=inside)
        total += g
        new_sums = ()
        for a in tl.static_range(K):
            for b in tl.static_range(K):
                new_sums = new_sums + (tl.fma(g, rows[a * SPAN + j + b], sums[a * K + b]),)
        sums = new_sums
    return total, sums


@triton.jit
def differentiate_tiles(
    grad, x, kernel, bias, gate, grad_c, extra, part_kernel, part_bias, batch, height, width,
    channels: tl.constexpr, x_stride: tl.constexpr, gate_stride: tl.constexpr,
    K: tl.constexpr, EPILOGUE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    STEPS: tl.constexpr,
):  # fmt: skip
    """The gradient of c, what else needs c, and this tile's part of the gradients of kernel and bias.

    `part_kernel` is (B, tiles, K², C), `part_bias` (B, tiles, C), in float32.
    """
    sample, d, exists, row, column = _place(batch, height, width, channels, ROWS, COLUMNS, WIDTH)
    taps = _load_kernel(kernel + d, channels, K)
    shift = tl.load(bias + d)
    SPAN: tl.constexpr = COLUMNS + K - 1
    HALF: tl.constexpr = K // 2
    size, start = sample * height * width, row.to(tl.int64) * width + column
    lane, x_lane, gate_lane = size * channels + d, size * x_stride + d, size * gate_stride + d
    x += (start - HALF * width - HALF) * x_stride
    gate += start * gate_stride
    grad += start * channels
    grad_c += start * channels
    extra += start * channels
    total = tl.zeros((WIDTH,), tl.float32)
    sums = (total,) * (K * K)
    window = _load_window(x, x_lane, row - HALF, column - HALF, height, width, x_stride, K, SPAN)
    x += (K - 1) * width * x_stride
    end = tl.minimum(row + ROWS, height)
    groups = _unmasked(row, end, column, height, width, K, COLUMNS, STEPS)
    GATES: tl.constexpr = COLUMNS if EPILOGUE == "gate" else 0
    ahead = _fetch_row(x + x_lane, groups > 0, x_stride, SPAN)
    grads = _fetch_row(grad + lane, groups > 0, channels, COLUMNS)
    gates = _fetch_row(gate + gate_lane, groups > 0, gate_stride, GATES)
    for i in range(groups):
        for a in tl.static_range(STEPS):
            rows, g, values = window + _to_float(ahead), _to_float(grads), _to_float(gates)
            x += width * x_stride
            grad += width * channels
            gate += width * gate_stride
            further = True if a + 1 < STEPS else i + 1 < groups
            ahead = _fetch_row(x + x_lane, further, x_stride, SPAN)
            grads = _fetch_row(grad + lane, further, channels, COLUMNS)
            gates = _fetch_row(gate + gate_lane, further, gate_stride, GATES)
            total, sums = _differentiate_row(
                rows, taps, shift, total, sums, g, values, grad_c + lane, extra + lane, COLUMNS, exists, channels,
                K, EPILOGUE, COLUMNS, False,
            )  # fmt: skip
            window = rows[SPAN:]
            grad_c += width * channels
            extra += width * channels
    for i in range(row + groups * STEPS, end):
        rows = window + _load_row(x + x_lane, i + HALF < height, column - HALF, width, x_stride, SPAN)
        g = _load_row(grad + lane, True, column, width, channels, COLUMNS)
        values = _load_row(gate + gate_lane, True, column, width, gate_stride, GATES)
        total, sums = _differentiate_row(
            rows, taps, shift, total, sums, g, values, grad_c + lane, extra + lane, width - column, exists, channels,
            K, EPILOGUE, COLUMNS, True,
        )  # fmt: skip
        window = rows[SPAN:]
        x += width * x_stride
        gate += width * gate_stride
        grad += width * channels
        grad_c += width * channels
        extra += width * channels
    part = sample * tl.num_programs(0) + tl.program_id(0)
    tl.store(part_bias + part * channels + d, total, mask=exists)
    for i in tl.static_range(K * K):
        tl.store(part_kernel + (part * (K * K) + i) * channels + d, sums[i], mask=exists)


@triton.jit
def _normalize(x, in_d, channels: tl.constexpr):
    """x less its mean over its deviation, along the channels, and 1 over the deviation."""
    x = tl.where(in_d, x - tl.sum(x, 1)[:, None] * (1.0 / channels), 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 1) * (1.0 / channels) + NORM_EPS)[:, None]
    return x * scale, scale


@triton.jit
def normalize_tokens(
    x, weight, bias, y, tokens,
    channels: tl.constexpr, stride: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """y, (tokens, C), the LayerNorm of x, whose tokens are `stride` elements apart."""
    token = (tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS))[:, None]
    d = tl.arange(0, WIDTH)[None, :]
    inside = (token < tokens) & (d < channels)
    value, _ = _normalize(_load(x + token * stride + d, inside), d < channels, channels)
    value = value * _load(weight + d, d < channels) + _load(bias + d, d < channels)
    tl.store(y + token * channels + d, value.to(y.dtype.element_ty), mask=inside)


@triton.jit
def normalize_tokens_backward(
    grad, x, weight, grad_x, parts, tokens,
    channels: tl.constexpr, stride: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """The gradient of x, and this program's part of those of weight and bias, in `parts` (programs, 2, C), float32."""
    d = tl.arange(0, WIDTH)[None, :]
    scale = _load(weight + d, d < channels)
    grad_weight = tl.zeros((TOKENS, WIDTH), tl.float32)
    grad_bias = tl.zeros((TOKENS, WIDTH), tl.float32)
    first = tl.program_id(0).to(tl.int64) * (STEPS * TOKENS)
    for i in range(STEPS):
        token = (first + i * TOKENS + tl.arange(0, TOKENS))[:, None]
        inside = (token < tokens) & (d < channels)
        normal, deviation = _normalize(_load(x + token * stride + d, inside), d < channels, channels)
        g = _load(grad + token * channels + d, inside)
        grad_weight += g * normal
        grad_bias += g
        g *= scale
        mean, slope = tl.sum(g, 1)[:, None] * (1.0 / channels), tl.sum(g * normal, 1)[:, None] * (1.0 / channels)
        g = (g - mean - normal * slope) * deviation
        tl.store(grad_x + token * channels + d, g.to(grad_x.dtype.element_ty), mask=inside)
    parts += tl.program_id(0) * (2 * channels) + tl.arange(0, WIDTH)
    tl.store(parts, tl.sum(grad_weight, 0), mask=tl.arange(0, WIDTH) < channels)
    tl.store(parts + channels, tl.sum(grad_bias, 0), mask=tl.arange(0, WIDTH) < channels)


def _rows(x: Tensor) -> tuple[Tensor, int]:
    """x, and how far its positions are apart; copied unless they are evenly spaced with their channels together."""
    stride = x.stride(2)
    spaced = (x.shape[1] * x.shape[2] * stride, x.shape[2] * stride, stride, 1)
    return (x, stride) if x.stride() == spaced else (x.contiguous(), x.shape[3])


def constants(kernel: str, k: int, epilogue: str) -> dict[str, int | str]:
    """The `tl.constexpr` arguments of the kernel "convolve" or "differentiate" besides channels and strides."""
    return {"K": k, "EPILOGUE": epilogue, **TILES[kernel]}


def norm_constants(channels: int) -> dict[str, int]:
    """The `tl.constexpr` arguments of the norm's kernels besides channels and strides."""
    width = triton.next_power_of_2(channels)
    return {"TOKENS": triton.cdiv(1024, width), "WIDTH": width}


def tiles(height: int, width: int, constants: dict) -> int:
    """How many tiles a picture has."""
    return triton.cdiv(height, constants["ROWS"]) * triton.cdiv(width, constants["COLUMNS"])


def convolve(x: Tensor, kernel: Tensor, bias: Tensor, other: Tensor | None, epilogue: str) -> Tensor:
    """The forward pass; see `make_operator`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, x_stride = _rows(x)
    other, other_stride = (x, 0) if other is None else _rows(other)
    batch, height, width, channels = x.shape
    tile = constants("convolve", len(kernel), epilogue)
    grid = tiles(height, width, tile), triton.cdiv(batch * channels, tile["WIDTH"])
    with torch.cuda.device_of(x):
        convolve_tiles[grid](
            x, kernel, bias, other, y, batch, height, width, channels, x_stride, other_stride, **tile, num_warps=WARPS
        )
    return y


def differentiate(
    grad: Tensor, x: Tensor, kernel: Tensor, bias: Tensor, gate: Tensor | None, epilogue: str
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The backward pass up to c; see `make_operator`."""
    grad_c = grad if epilogue == "none" else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    extra = torch.empty_like(grad_c) if epilogue in ("sigmoid_gate", "gate") else None
    batch, height, width, channels = x.shape
    tile = constants("differentiate", len(kernel), epilogue)
    parts = batch, tiles(height, width, tile)
    part_kernel, part_bias = kernel.new_empty(*parts, *kernel.shape), kernel.new_empty(*parts, *bias.shape)
    grad = grad.contiguous()
    x, x_stride = _rows(x)
    gate, gate_stride = (x, 0) if gate is None else _rows(gate)
    with torch.cuda.device_of(x):
        differentiate_tiles[parts[1], triton.cdiv(batch * channels, tile["WIDTH"])](
            grad, x, kernel, bias, gate, grad_c, grad_c if extra is None else extra, part_kernel, part_bias,
            batch, height, width, channels, x_stride, gate_stride, **tile, num_warps=WARPS,
        )  # fmt: skip
    return grad_c, extra, part_kernel.sum((0, 1)), part_bias.sum((0, 1))


def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The norm; see `make_operator`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, stride = _rows(x)
    tokens, tile = x.numel() // x.shape[3], norm_constants(x.shape[3])
    with torch.cuda.device_of(x):
        normalize_tokens[triton.cdiv(tokens, tile["TOKENS"]),](
            x, weight, bias, y, tokens, x.shape[3], stride, **tile, num_warps=NORM_WARPS
        )
    return y


def normalize_backward(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The norm's backward pass; see `make_operator`."""
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    x, stride = _rows(x)
    tokens, tile = x.numel() // x.shape[3], norm_constants(x.shape[3])
    programs = triton.cdiv(tokens, tile["TOKENS"] * NORM_STEPS)
    parts = weight.new_empty(programs, 2, x.shape[3])
    with torch.cuda.device_of(x):
        normalize_tokens_backward[programs,](
            grad, x, weight, grad_x, parts, tokens, x.shape[3], stride, **tile, STEPS=NORM_STEPS, num_warps=NORM_WARPS
        )
    return grad_x, parts[:, 0].sum(0), parts[:, 1].sum(0)


_operator = make_operator("depthwise_conv_triton", convolve, differentiate, normalize, normalize_backward)


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, norm: tuple[Tensor, Tensor] | None, epilogue: str
) -> Tensor:
    """See `mambair_ds.kernels.depthwise_conv.depthwise_conv`."""
    norm_weight, norm_bias = norm or (None, None)
    return _operator(x, weight, bias, gate, norm_weight, norm_bias, epilogue.removeprefix("norm_"))
