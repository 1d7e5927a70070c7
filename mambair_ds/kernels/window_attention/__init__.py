"""Attention inside windows with a learned bias (Liu et al. 2021, arXiv 2103.14030, equation 4), in two backends."""

from torch import Tensor

from mambair_ds.kernels import load_backend

_FILES = {"reference": "reference", "torch": "cpu"}


def window_attention(qkv: Tensor, bias: Tensor, kind: Tensor, backend: str | None = None) -> Tensor:
    """Let the tokens of each window attend to one another: softmax(q·kᵀ/√d + bias)·v in every head.

    Args:
        qkv: queries, keys and values, (windows, tokens, 3, heads, d); the windows of one picture after the other.
        bias: added to the logits of a window of each kind, (kinds, heads, tokens, tokens), a row for a query.
        kind: the kind of every window of a picture, (windows a picture,), int64.
        backend: "reference" (plain operations, differentiated by autograd) or "torch" (for the CPU, keeping no logits);
            None chooses by device.

    Returns:
        The attended values, (windows, tokens, heads·d), in qkv's dtype. Gradients reach `qkv` and `bias`.

    Raises:
        ValueError: shapes that do not fit one another, or an unknown backend.
    """
    windows, tokens, three, heads, _ = qkv.shape
    if three != 3 or bias.shape[1:] != (heads, tokens, tokens):
        raise ValueError(f"window_attention: qkv {tuple(qkv.shape)} and bias {tuple(bias.shape)} do not fit")
    if windows % len(kind):
        raise ValueError(f"window_attention: {windows} windows are no multiple of the {len(kind)} of a picture")
    module = load_backend("window_attention", _FILES, qkv.device.type, backend)
    return module.window_attention(qkv, bias, kind)
