"""Routing: which class a token belongs to, the order of tokens by class, and the prompt that a class brings.

Every token of a picture is given one of T classes (Guo et al. 2025, arXiv 2411.15269, section 4). Tokens of one class
become neighbors in the scan's sequence, by a counting sort: linear in the tokens, where a general sort is not.
"""

from types import ModuleType

import torch
from torch import Tensor

from mambair_ds.kernels import load_backend

_FILES = {"reference": "reference", "torch": "cpu", "triton": "triton"}


def choose_class(logits: Tensor, backend: str | None = None) -> Tensor:
    """The class of greatest probability; of classes whose probabilities round to one number the first, as published.

    Args:
        logits: (B, n, T), float32 and finite; float64 on the `reference` backend only.
        backend: "reference" (plain operations), "torch" (CPU) or "triton"; None takes "reference" for
            float64, else chooses by device.

    Returns:
        (B, n) int64. The backends agree except where two probabilities differ by a last bit of their exponentials;
        `reference` and `torch` always do.

    Raises:
        ValueError: a shape or dtype that does not fit, or an unknown backend.
    """
    if logits.ndim != 3 or logits.numel() == 0:
        raise ValueError(f"routing: logits has shape {tuple(logits.shape)}, expected (batch, tokens, classes)")
    return _module(logits, backend).choose_class(logits)


def class_order(index: Tensor, classes: int, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The stable order of tokens by class, and its inverse.

    Args:
        index: each token's class, (B, n) int64, all below `classes`.
        classes: how many there are, at most 256.
        backend: as `choose_class`'s.

    Returns:
        Two (B, n) int64 permutations of each sample's tokens: `order`, at place k the token that comes k-th, tokens of
        one class as they were; and `inverse`, at token i its place.

    Raises:
        ValueError: a shape, dtype or number of classes that does not fit, or an unknown backend.
    """
    if index.ndim != 2 or index.numel() == 0 or index.dtype != torch.int64:
        raise ValueError(
            f"routing: index is {index.dtype} of shape {tuple(index.shape)}, expected torch.int64, (batch, tokens)"
        )
    if not 1 <= classes <= 256:
        raise ValueError(f"routing: {classes} classes, expected 1 to 256")
    return _module(index, backend).class_order(index, classes)


def class_prompt(logits: Tensor, table: Tensor, index: Tensor, backend: str | None = None) -> Tensor:
    """The prompts `table[index]`, with gradients as if the one-hot classes were softmax(logits).

    This is the straight-through Gumbel softmax (Jang et al. 2017, arXiv 1611.01144) times the table.

    Args:
        logits: (B, n, T), float32; float64 on the `reference` backend only.
        table: a prompt for each class, (T, N), in float32, bfloat16 or float16 (or float64, as `logits`).
        index: each token's class, (B, n) int64.
        backend: as `choose_class`'s.

    Returns:
        (B, n, N) in the table's dtype. Gradients reach `logits` and `table`.

    Raises:
        ValueError: a shape or dtype that does not fit, or an unknown backend.
    """
    if logits.ndim != 3 or table.ndim != 2 or logits.shape[2] != table.shape[0] or logits.shape[:2] != index.shape:
        raise ValueError(
            f"routing: logits {tuple(logits.shape)}, table {tuple(table.shape)} and index {tuple(index.shape)} "
            "do not fit; expected (batch, tokens, classes), (classes, states) and (batch, tokens)"
        )
    return _module(logits, backend).class_prompt(logits, table, index)


def _module(tensor: Tensor, backend: str | None) -> ModuleType:
    """The backend's module for index or logits."""
    if backend is None and tensor.dtype == torch.float64:
        backend = "reference"
    if tensor.dtype not in (torch.float32, torch.int64) and (tensor.dtype, backend) != (torch.float64, "reference"):
        raise ValueError(f"routing: logits is {tensor.dtype}, expected torch.float32")
    return load_backend("routing", _FILES, tensor.device.type, backend)
