"""Routing: which class a token belongs to, the order of tokens by class, and the prompt that a class brings.

Every token of a picture is given one of T classes (Guo et al. 2025, arXiv 2411.15269, section 4). Tokens of one class
become neighbors in the scan's sequence, by a counting sort: linear in the tokens, where a general sort is not.
"""

from types import ModuleType

import torch
from torch import Tensor

from mambair_ds.kernels import load_backend
from mambair_ds.kernels.philox import KeyedNoise, check_key

_FILES = {"reference": "reference", "torch": "cpu", "triton": "triton"}


def choose_class(scores: Tensor, noise: Tensor | KeyedNoise | None = None, backend: str | None = None) -> Tensor:
    """The class of greatest softmax(log_softmax(scores) + noise), the first of those that round to one number.

    Args:
        scores: the router's linear outputs, (B, n, T), finite, in float32, bfloat16 or float16; float64 on the
            `reference` backend only.
        noise: None; float32 of the scores' shape; or Gumbel noise that the operator draws itself, number for number
            that of `mambair_ds.kernels.philox.gumbel` for the scores' shape.
        backend: "reference" (plain operations), "torch" (CPU) or "triton"; None takes "reference" for
            float64, else chooses by device.

    Returns:
        (B, n) int64. For given noise `torch` is always equal to `reference`. `triton` chooses the first class whose
        score + noise is within 4e-8 of the greatest, which is another one where rounding decides: by a float32
        emulation about 1e-7 of all tokens at T = 128 with noise; without, from 4e-8 at a standard deviation of
        the scores of 3 to 2e-6 at 0.1. Noise drawn by two backends differs in its last bits.

    Raises:
        ValueError: a shape, dtype or key that does not fit, or an unknown backend.
    """
    if scores.ndim != 3 or scores.numel() == 0:
        raise ValueError(f"routing: scores has shape {tuple(scores.shape)}, expected (batch, tokens, classes)")
    _check_noise(scores, noise)
    return _module(scores, backend).choose_class(scores, noise)


def class_order(index: Tensor, classes: int, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """The stable order of tokens by class, and its inverse.

    Args:
        index: each token's class, (B, n) int64, all below `classes`. Only the CPU's backend checks that: elsewhere
            the check would wait for the device, and an index out of range gives results that are no permutations.
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
    return load_backend("routing", _FILES, index.device.type, backend).class_order(index, classes)


def class_prompt(
    scores: Tensor,
    table: Tensor,
    index: Tensor,
    noise: Tensor | KeyedNoise | None = None,
    backend: str | None = None,
) -> Tensor:
    """The prompts `table[index]`, with gradients as if the one-hot classes were softmax(log_softmax(scores) + noise).

    This is the straight-through Gumbel softmax (Jang et al. 2017, arXiv 1611.01144) times the table.

    Args:
        scores: as `choose_class`'s.
        table: a prompt for each class, (T, N), T at most 256, in float32, bfloat16 or float16 (or float64, as scores).
        index: each token's class, (B, n) int64.
        noise: as `choose_class`'s; drawn noise is drawn again in the backward pass.
        backend: as `choose_class`'s.

    Returns:
        (B, n, N) in the table's dtype. Gradients reach `scores` and `table`.

    Raises:
        ValueError: a shape, dtype or key that does not fit, or an unknown backend.
    """
    if scores.ndim != 3 or table.ndim != 2 or scores.shape[2] != table.shape[0] or scores.shape[:2] != index.shape:
        raise ValueError(
            f"routing: scores {tuple(scores.shape)}, table {tuple(table.shape)} and index {tuple(index.shape)} "
            "do not fit; expected (batch, tokens, classes), (classes, states) and (batch, tokens)"
        )
    _check_noise(scores, noise)
    return _module(scores, backend).class_prompt(scores, table, index, noise)


def _check_noise(scores: Tensor, noise: Tensor | KeyedNoise | None) -> None:
    if isinstance(noise, KeyedNoise):
        check_key(noise.key, noise.stream, len(scores))
    elif noise is not None and (noise.dtype != torch.float32 or noise.shape != scores.shape):
        raise ValueError(
            f"routing: noise is {noise.dtype} of shape {tuple(noise.shape)}, "
            f"expected torch.float32 of shape {tuple(scores.shape)}"
        )


def _module(scores: Tensor, backend: str | None) -> ModuleType:
    """The backend's module for scores of this dtype and device."""
    if not scores.is_floating_point():
        raise ValueError(f"routing: scores is {scores.dtype}, expected a floating-point dtype")
    if scores.dtype == torch.float64:
        if backend not in (None, "reference"):
            raise ValueError("routing: scores is torch.float64, which only the reference backend takes")
        backend = "reference"
    return load_backend("routing", _FILES, scores.device.type, backend)
