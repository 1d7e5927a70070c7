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
    backend: str | None = None,
) -> Tensor:
    """Run h_t = exp(Δ_t·A)·h_{t-1} + Δ_t·B_t·u_t, y_t = C_t·h_t + D·u_t along a sequence, from h = 0.

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
        backend: "reference", "torch" (CPU), "triton" or "mamba_ssm"; None chooses by `u`'s device.

    Returns:
        y, (B, L, D), in `u`'s dtype. Gradients reach every input, each in its own dtype.

    Raises:
        ValueError: a shape, dtype or device that does not fit, or an unknown backend.
        ImportError: the `mamba_ssm` backend without the package of that name.
    """
    D = A.new_zeros(A.shape[0]) if D is None else D
    delta_bias = A.new_zeros(A.shape[0]) if delta_bias is None else delta_bias
    _check(u, delta, A, B, C, D, delta_bias, float64=backend == "reference")
    module = load_backend("selective_scan", _FILES, u.device.type, backend)
    return module.selective_scan(u, delta, A, B, C, D, delta_bias, delta_softplus)


def _check(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, *, float64: bool
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
    parameters = ("A", "D", "delta_bias")
    for name, (tensor, shape) in tensors.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != u.device:
            raise ValueError(f"selective_scan: {name} is on {tensor.device}, but u on {u.device}")
        allowed = [torch.float32] if name in parameters else [torch.float32, torch.bfloat16, torch.float16]
        if float64:
            allowed.append(torch.float64)
        if tensor.dtype not in allowed:
            names = ", ".join(str(dtype) for dtype in allowed)
            raise ValueError(f"selective_scan: {name} is {tensor.dtype}, expected {names}")
