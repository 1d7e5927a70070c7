"""The selective scan by the CUDA kernel of the package mamba-ssm, whose layout has the sequence last."""

from torch import Tensor

from mambair_ds.kernels.selective_scan.reference import put_rows, take_rows


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    prompt: Tensor | None,
    order: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """See `mambair_ds.kernels.selective_scan.selective_scan`; raises ImportError where mamba-ssm is missing."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError as error:
        raise ImportError(
            "selective_scan: the mamba_ssm backend needs the package mamba-ssm with its compiled CUDA scan "
            "(pip install 'mambair-ds[mamba]', with nvcc and a CUDA build of torch); "
            f"importing it failed with: {error}"
        ) from error
    # The kernel wants the sequence contiguous, and all activations in one dtype.
    u_, delta, B, C = (take_rows(x, order) for x in (u, delta, B, C))
    C = C if prompt is None else C + prompt
    u_, delta, B, C = (x.to(u.dtype).transpose(1, 2).contiguous() for x in (u_, delta, B, C))
    y = selective_scan_fn(u_, delta, A, B, C, D, delta_bias=delta_bias, delta_softplus=delta_softplus)
    return put_rows(y.transpose(1, 2), order)
