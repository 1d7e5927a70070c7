"""The CUDA scan of the package mamba-ssm, to be measured against: built from its source, or as it is installed.

Only the kernels for bfloat16 activations and real rates are built, which takes minutes as it is.
"""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from mambair_ds.kernels.selective_scan import selective_scan

_FLAGS = ["-O3", "--use_fast_math", "--expt-relaxed-constexpr", "--expt-extended-lambda"]
_FLAGS += [f"-U__CUDA_NO_{kind}_OPERATORS__" for kind in ("HALF", "BFLOAT16", "BFLOAT162")]
_FLAGS += [f"-U__CUDA_NO_{kind}_CONVERSIONS__" for kind in ("HALF", "BFLOAT16", "BFLOAT162")]


def load(sdist: Path | None) -> ModuleType | str:
    """The extension, shown to compute what our reference does, or why there is none.

    Args:
        sdist: unpacked source of mamba-ssm, of which csrc/selective_scan is used; None tries to import it.
    """
    try:
        extension = _build(sdist) if sdist is not None else importlib.import_module("selective_scan_cuda")
        error = _error(extension)
    except (ImportError, OSError, RuntimeError) as problem:  # what nvcc says is part of the message
        return f"not available: {problem}"
    return extension if error < 0.02 else f"not used: y is off by {error:.2g} of its norm"


def scan(extension: ModuleType, **inputs: Tensor) -> Tensor:
    """Differentiable: u and delta (B, D, L), B and C (B, 1, N, L), all bfloat16; A (D, N), D and delta_bias float32."""
    return _Scan.apply(extension, *(inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")))


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, extension: ModuleType, *inputs: Tensor) -> Tensor:
        u, delta, A, B, C, D, bias = inputs
        y, states, *_ = extension.fwd(u, delta, A, B, C, D, None, bias, True)
        ctx.extension = extension
        ctx.save_for_backward(*inputs, states)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, bias, states = ctx.saved_tensors
        arguments = (u, delta, A, B, C, D, None, bias, grads[0].contiguous(), states, None, None, True, False)
        return None, *ctx.extension.bwd(*arguments)[:7]


def _build(sdist: Path) -> ModuleType:
    from torch.utils import cpp_extension

    source = sdist.resolve() / "csrc" / "selective_scan"
    files = ("selective_scan.cpp", "selective_scan_fwd_bf16.cu", "selective_scan_bwd_bf16_real.cu")
    return cpp_extension.load(
        "mambair_ds_mamba_ssm_scan",
        [*(str(source / file) for file in files), str(Path(__file__).with_name("mamba_ssm_absent.cpp"))],
        extra_cflags=["-O3"],
        extra_cuda_cflags=_FLAGS,
        extra_include_paths=[str(source)],
    )


def _error(extension: ModuleType) -> float:
    """How far y is from the reference's, relative to y."""
    generator = torch.Generator("cuda").manual_seed(0)
    u, delta, B, C = (torch.randn(2, 300, n, generator=generator, device="cuda").bfloat16() for n in (8, 8, 16, 16))
    A = -torch.arange(1, 17.0, device="cuda").repeat(8, 1)
    D, bias = torch.ones(8, device="cuda"), torch.full((8,), -2.0, device="cuda")
    y = selective_scan(u.float(), delta.float(), A, B.float(), C.float(), D, bias, backend="reference")
    u, delta, B, C = (x.mT.contiguous() for x in (u, delta, B, C))
    peers = scan(extension, u=u, delta=delta, A=A, B=B[:, None], C=C[:, None], D=D, delta_bias=bias)
    return ((peers.mT - y).norm() / y.norm()).item()
