"""The depthwise convolution on the CPU: oneDNN convolves, and a loop compiled by numba sums the kernel's gradient.

PyTorch's convolution is fast forward but several times slower backward. Here the gradient of the input is one more
convolution, with the kernel turned around, and the gradient of the kernel is a loop, vectorised over channels, over
tiles of `ROWS` rows, `COLUMNS` columns and up to `WIDTH` channels of one sample. A tile has zeros around it, so that
the inner loop knows no borders.

Tiles are the same whatever the number of threads and samples, and what they sum is added up in a fixed order: results
are equal to the bit on any number of threads, and a sample's do not depend on its batch. That is why GELU and sigmoid
are computed here too, in whole blocks: PyTorch's round a few elements differently where its threads meet.
"""

# mypy: disable-error-code="no-untyped-def"

import functools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mambair_ds.kernels.cpu import exp2, jit, run_tasks
from mambair_ds.kernels.depthwise_conv.operator import EPS, make_operator

ROWS = 16
COLUMNS = 32
WIDTH = 64
BLOCK = 8192

_LOG2E = np.float32(1.4426950408889634)
_ZERO, _ONE = np.float32(0), np.float32(1)


@jit
def gelu(x):
    """GELU and its derivative, x·Φ(x) and Φ(x) + x·φ(x), with Φ of the normal distribution within 2e-7.

    Below 0, Φ is φ times a polynomial of 1 / (1 + 0.24 |x|), fitted to Mills' ratio, so tails keep their digits.
    """
    density = exp2(x * x * (np.float32(-0.5) * _LOG2E))
    t = _ONE / (_ONE + np.float32(0.24) * abs(x))
    p = np.float32(-0.0529172495) * t + np.float32(0.1517656446)
    p = p * t - np.float32(0.0626010746)
    p = p * t + np.float32(0.1142163277)
    p = p * t + np.float32(0.0663544238)
    p = p * t + np.float32(0.0916993693)
    p = p * t + np.float32(0.0957460776)
    p = p * t + np.float32(0.0957363620)
    tail = density * p * t
    phi = _ONE - tail if x >= _ZERO else tail
    return x * phi, phi + x * density * np.float32(0.3989422804014327)


@jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return _ONE / (_ONE + exp2(-x * _LOG2E))


@jit
def _take(x, first):
    """A block of x, zeros behind its end."""
    source, block = x[first : first + BLOCK], np.zeros(BLOCK, np.float32)
    for i in range(len(source)):
        block[i] = source[i]
    return block


@jit
def _put(block, x, first):
    target = x[first : first + BLOCK]
    for i in range(len(target)):
        target[i] = block[i]


@jit
def _finish(task, c, x, is_gelu):
    """c becomes x + GELU(c), or x · sigmoid(c)."""
    c_block, x_block = _take(c, task * BLOCK), _take(x, task * BLOCK)
    if is_gelu:
        for i in range(BLOCK):
            c_block[i] = x_block[i] + gelu(c_block[i])[0]
    else:
        for i in range(BLOCK):
            c_block[i] = x_block[i] * sigmoid(c_block[i])
    _put(c_block, c, task * BLOCK)


@jit
def _differentiate(task, grad, x, is_gelu, c, grad_c):
    """c's gradient; for the gate c becomes grad · sigmoid(c)."""
    c_block, g_block = _take(c, task * BLOCK), _take(grad, task * BLOCK)
    if is_gelu:
        for i in range(BLOCK):
            g_block[i] *= gelu(c_block[i])[1]
    else:
        x_block = _take(x, task * BLOCK)
        for i in range(BLOCK):
            s = sigmoid(c_block[i])
            c_block[i] = g_block[i] * s
            g_block[i] = c_block[i] * (x_block[i] * (_ONE - s))
        _put(c_block, c, task * BLOCK)
    _put(g_block, grad_c, task * BLOCK)


@jit
def _load(x, sample, row, column, first, count, border):
    """A tile of x and `border` positions around it; zeros outside the picture and up to a multiple of 8 channels."""
    tile = np.zeros((ROWS + 2 * border, COLUMNS + 2 * border, (count + 7) // 8 * 8), np.float32)
    for i in range(max(0, border - row), min(tile.shape[0], x.shape[1] + border - row)):
        for j in range(max(0, border - column), min(tile.shape[1], x.shape[2] + border - column)):
            source, target = x[sample, row + i - border, column + j - border, first : first + count], tile[i, j]
            for d in range(count):
                target[d] = source[d]
    return tile


@jit
def _correlate(task, grad, x, part_kernel, part_bias):
    """The sums over one tile of grad, and of grad times x moved by each position of the kernel."""
    _, height, width, channels = x.shape
    k = part_kernel.shape[1]
    blocks, across, down = -(-channels // WIDTH), -(-width // COLUMNS), -(-height // ROWS)
    part, first = task // blocks, task % blocks * WIDTH
    sample, row, column = part // (across * down), part // across % down * ROWS, part % across * COLUMNS
    count = min(WIDTH, channels - first)
    g_tile = _load(grad, sample, row, column, first, count, 0)
    x_tile = _load(x, sample, row, column, first, count, k // 2)
    sums = np.zeros((k, k, g_tile.shape[2]), np.float32)
    bias = np.zeros(g_tile.shape[2], np.float32)
    for i in range(min(ROWS, height - row)):
        g = g_tile[i]
        for j in range(COLUMNS):
            g_j = g[j]
            for d in range(len(bias)):
                bias[d] += g_j[d]
        for a in range(k):
            line = x_tile[i + a]
            for b in range(k):
                total = sums[a, b]
                for j in range(0, COLUMNS, 8):
                    x0, x1, x2, x3 = line[j + b], line[j + b + 1], line[j + b + 2], line[j + b + 3]
                    x4, x5, x6, x7 = line[j + b + 4], line[j + b + 5], line[j + b + 6], line[j + b + 7]
                    g0, g1, g2, g3, g4, g5, g6, g7 = (
                        g[j],
                        g[j + 1],
                        g[j + 2],
                        g[j + 3],
                        g[j + 4],
                        g[j + 5],
                        g[j + 6],
                        g[j + 7],
                    )
                    for d in range(len(total)):
                        total[d] += (g0[d] * x0[d] + g1[d] * x1[d] + g2[d] * x2[d] + g3[d] * x3[d]) + (
                            g4[d] * x4[d] + g5[d] * x5[d] + g6[d] * x6[d] + g7[d] * x7[d]
                        )
    part_bias[part, first : first + count] = bias[:count]
    for a in range(k):
        for b in range(k):
            part_kernel[part, a, b, first : first + count] = sums[a, b, :count]


def _flat(x: Tensor) -> np.ndarray:
    """x, (n,) float32; it shares memory with a contiguous float32 x."""
    return x.detach().float().contiguous().view(-1).numpy()


def _conv(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        weight = kernel.permute(2, 0, 1)[:, None].contiguous()
        picture = x.float().permute(0, 3, 1, 2)  # nothing moves: this is PyTorch's channels_last
        c = F.conv2d(picture, weight, bias, padding=len(kernel) // 2, groups=len(weight))
    return c.permute(0, 2, 3, 1).contiguous()


def convolve(x: Tensor, kernel: Tensor, bias: Tensor, other: Tensor | None, epilogue: str) -> Tensor:
    """The forward pass; see `make_operator`."""
    c = _conv(x, kernel, bias)
    if epilogue in ("gelu_residual", "sigmoid_gate"):
        run_tasks(_finish, -(-c.numel() // BLOCK), _flat(c), _flat(x), epilogue == "gelu_residual")
    elif other is not None:
        c = c.mul_(other) if epilogue == "gate" else c.add_(other)
    return c.to(x.dtype)


def differentiate(
    grad: Tensor, x: Tensor, kernel: Tensor, bias: Tensor, gate: Tensor | None, epilogue: str
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """The backward pass up to c; see `make_operator`."""
    grad_c, extra = grad.float(), None
    if epilogue in ("gelu_residual", "sigmoid_gate"):
        c, grad_c = _conv(x, kernel, bias), torch.empty(x.shape)
        arguments = _flat(grad), _flat(x), epilogue == "gelu_residual", _flat(c), _flat(grad_c)
        run_tasks(_differentiate, -(-c.numel() // BLOCK), *arguments)
        extra = c if epilogue == "sigmoid_gate" else None
    elif gate is not None:
        extra = _conv(x, kernel, bias).mul_(grad_c)
        grad_c = grad_c * gate
    tiles = -(-x.shape[1] // ROWS) * -(-x.shape[2] // COLUMNS)
    part_kernel = torch.empty(len(x) * tiles, *kernel.shape)
    part_bias = torch.empty(len(x) * tiles, *bias.shape)
    inputs = [tensor.detach().float().contiguous().numpy() for tensor in (grad_c, x)]
    tasks = len(x) * tiles * -(-x.shape[3] // WIDTH)
    run_tasks(_correlate, tasks, *inputs, part_kernel.numpy(), part_bias.numpy())
    # One after the other: torch's own sum may choose its order by shape and number of threads.
    grad_kernel, grad_bias = (
        functools.reduce(torch.add, [functools.reduce(torch.add, sample) for sample in part.split(tiles)])
        for part in (part_kernel, part_bias)
    )
    return grad_c.to(x.dtype), extra, grad_kernel, grad_bias


_operator = make_operator("depthwise_conv_cpu", convolve, differentiate)


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor | None, norm: tuple[Tensor, Tensor] | None, epilogue: str
) -> Tensor:
    """See `mambair_ds.kernels.depthwise_conv.depthwise_conv`."""
    if norm is not None:  # PyTorch keeps mean and deviation: computing them again would take a third more time
        x = F.layer_norm(x.float(), bias.shape, norm[0].float(), norm[1].float(), EPS).to(x.dtype)
    return _operator(x, weight, bias, gate, None, None, epilogue.removeprefix("norm_"))
