"""The selective scan of Mamba (Gu and Dao 2023, arXiv 2312.00752, algorithm 2), channels last, in several backends."""

import torch
from torch import Tensor

from mambair_ds.kernels import load_backend

_FILES = {"reference": "reference", "torch": "cpu", "triton": "triton", "mamba_ssm": "mamba_ssm"}


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    *,
    prompt: Tensor | None = None,
    order: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Run h_t = exp(Δ_t·A)·h_{t-1} + Δ_t·B_t·u_t, y_t = C_t·h_t + D·u_t along a sequence, from h = 0.

    The sequence is that of the tokens, or what `order` makes of it: position i is token order[i], and y lies at its
    token again. `prompt` alone is given by position: there, C_i is C[order[i]] + prompt[i].

    Δ = softplus(delta + delta_bias), or delta + delta_bias without `delta_softplus`. Each channel has a state of N
    numbers, float32 whatever the inputs are (float64 for a float64 `u` on the `reference` backend, the only one that
    takes float64).

    Args:
        u: the input, (B, L, D), with at least one position; float32, bfloat16 or float16, as are delta, B and C.
        delta: the step before bias and softplus, (B, L, D).
        A: the decay rates, (D, N), float32; usually negative.
        B: what of the input enters the state, (B, L, N).
        C: what of the state leaves, (B, L, N).
        D: the weight of the direct path, (D,), float32; None is 0.
        delta_bias: (D,), float32; None is 0.
        prompt: what is added to C, (B, L, N), in the sequence's order, of any of C's dtypes; None is 0.
        order: a permutation of the tokens of every sample, (B, L), int64; it is not checked to be one. None is the
            tokens' own order.
        backend: "reference", "torch" (CPU), "triton" or "mamba_ssm"; None chooses by `u`'s device.

    Returns:
        y, (B, L, D), in `u`'s dtype. Gradients reach every input but `order`, each in its own dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown backend.
        ImportError: the `mamba_ssm` backend without the package of that name.
    """
    D = A.new_zeros(A.shape[0]) if D is None else D
    delta_bias = A.new_zeros(A.shape[0]) if delta_bias is None else delta_bias
    _check(u, delta, A, B, C, D, delta_bias, prompt, order, float64=backend == "reference")
    module = load_backend("selective_scan", _FILES, u.device.type, backend)
    return module.selective_scan(u, delta, A, B, C, D, delta_bias, prompt, order, delta_softplus)


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    prompt: Tensor | None,
    order: Tensor | None,
    *,
    float64: bool,
) -> None:
    if u.ndim != 3 or u.shape[1] < 1:
        raise ValueError(f"selective_scan: u has shape {tuple(u.shape)}, expected (batch, length >= 1, channels)")
    if A.ndim != 2:
        raise ValueError(f"selective_scan: A has shape {tuple(A.shape)}, expected (channels, states)")
    batch, length, channels = u.shape
    states = A.shape[1]
    tensors = {
        "u": (u, (batch, length, channels)),
        "delta": (delta, (batch, length, channels)),
        "A": (A, (channels, states)),
        "B": (B, (batch, length, states)),
        "C": (C, (batch, length, states)),
        "D": (D, (channels,)),
        "delta_bias": (delta_bias, (channels,)),
    }
    if prompt is not None:
        tensors["prompt"] = prompt, (batch, length, states)
    if order is not None:
        tensors["order"] = order, (batch, length)
    activations, parameters = [torch.float32, torch.bfloat16, torch.float16], [torch.float32]
    if float64:
        activations, parameters = [*activations, torch.float64], [*parameters, torch.float64]
    dtypes = dict.fromkeys(tensors, activations) | dict.fromkeys(("A", "D", "delta_bias"), parameters)
    dtypes["order"] = [torch.int64]
    for name, (tensor, shape) in tensors.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != u.device:
            raise ValueError(f"selective_scan: {name} is on {tensor.device}, but u on {u.device}")
        if tensor.dtype not in dtypes[name]:
            names = ", ".join(str(dtype) for dtype in dtypes[name])
            raise ValueError(f"selective_scan: {name} is {tensor.dtype}, expected {names}")
