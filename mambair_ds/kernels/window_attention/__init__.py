"""Attention inside shifted windows with a learned bias (Liu et al. 2021, arXiv 2103.14030), in several backends."""

import torch
from torch import Tensor

from mambair_ds.kernels import capability, gpu_class, load_backend, on_cpu

_FILES = {"reference": "reference", "torch": "cpu", "triton": "triton"}
_TRITON_WINDOWS = (4, 8, 16)


def window_attention(
    qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int, backend: str | None = None
) -> Tensor:
    """Let the pixels of each w×w window attend to one another: softmax(q·kᵀ/√d + bias + mask)·v in every head.

    The windows tile the picture rolled by `shift` up and to the left, and the result is rolled back; nothing is copied
    for it. The bias is `table[(Δrow + w - 1)·(2w - 1) + Δcolumn + w - 1]`, Δ from key to query. The mask is -100, as
    published, between pixels of a window that the roll brought together across the picture's border, else 0.

    Logits and sums are float32 (float64 for a float64 `qkv` on the `reference` backend, the only one that takes
    float64). The backward pass of `torch` and `triton` computes the logits again from one number a pixel and head.

    Args:
        qkv: queries, keys and values, (B, H, W, 3·C), channels ordered (3, heads, d); H and W multiples of w; float32,
            bfloat16 or float16.
        table: the bias of every relative position, ((2w - 1)², heads).
        num_heads: heads, each of d = C / num_heads channels.
        window_size: w, in pixels.
        shift: 0 or w // 2, in pixels.
        backend: "reference" (plain operations), "torch" (CPU) or "triton" (w of 4, 8 or 16); None takes "reference"
            for float64 and, on a GPU, for what triton lacks (other windows; float32 before Hopper), else chooses by
            `qkv`'s device.

    Returns:
        The attended values, (B, H, W, C), in `qkv`'s dtype. Gradients reach `qkv` and `table`, each in its own dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown backend.
    """
    if backend is None and (qkv.dtype == torch.float64 or not _fits(qkv, window_size)):
        backend = "reference"
    _check(qkv, table, num_heads, window_size, shift, float64=backend == "reference")
    if backend == "triton" and window_size not in _TRITON_WINDOWS:
        raise ValueError(f"window_attention: the triton backend has windows of 4, 8 and 16, not of {window_size}")
    module = load_backend("window_attention", _FILES, qkv.device.type, backend)
    return module.window_attention(qkv, table, num_heads, window_size, shift)


def _fits(qkv: Tensor, window_size: int) -> bool:
    """Whether the device's own backend can do it."""
    if on_cpu(qkv.device):
        return True
    # In float32 the kernels need 224 KiB of shared memory.
    roomy = qkv.dtype != torch.float32 or gpu_class(capability(qkv.device)) in ("H100", "B200")
    return roomy and window_size in _TRITON_WINDOWS


def _check(qkv: Tensor, table: Tensor, num_heads: int, window_size: int, shift: int, *, float64: bool) -> None:
    if qkv.ndim != 4 or qkv.numel() == 0:
        raise ValueError(f"window_attention: qkv has shape {tuple(qkv.shape)}, expected (batch, height, width, 3·C)")
    _, height, width, channels = qkv.shape
    if channels % (3 * num_heads):
        raise ValueError(f"window_attention: {channels} channels are no multiple of 3 × {num_heads} heads")
    if height % window_size or width % window_size:
        raise ValueError(f"window_attention: {height}×{width} pixels do not divide into windows of {window_size}")
    if shift not in (0, window_size // 2):
        raise ValueError(f"window_attention: shift is {shift}, expected 0 or {window_size // 2}")
    expected = ((2 * window_size - 1) ** 2, num_heads)
    if tuple(table.shape) != expected:
        raise ValueError(f"window_attention: table has shape {tuple(table.shape)}, expected {expected}")
    allowed = [torch.float32, torch.bfloat16, torch.float16, *([torch.float64] if float64 else [])]
    for name, tensor in {"qkv": qkv, "table": table}.items():
        if tensor.device != qkv.device:
            raise ValueError(f"window_attention: {name} is on {tensor.device}, but qkv on {qkv.device}")
        if tensor.dtype not in allowed:
            names = ", ".join(str(dtype) for dtype in allowed)
            raise ValueError(f"window_attention: {name} is {tensor.dtype}, expected {names}")
