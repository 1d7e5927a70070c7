// The instantiations that mamba-ssm's binding refers to and that benchmarks/mamba_ssm_peer.py does not build.

#include <c10/cuda/CUDAStream.h>
#include <torch/python.h>

#include "selective_scan.h"

using Complex = c10::complex<float>;

template <typename T, typename W>
void selective_scan_fwd_cuda(SSMParamsBase &, cudaStream_t) {
    TORCH_CHECK(false, "only bfloat16 with real rates is built");
}

template <typename T, typename W>
void selective_scan_bwd_cuda(SSMParamsBwd &, cudaStream_t) {
    TORCH_CHECK(false, "only bfloat16 with real rates is built");
}

#define FORWARD(T, W) template void selective_scan_fwd_cuda<T, W>(SSMParamsBase &, cudaStream_t);
#define BACKWARD(T, W) template void selective_scan_bwd_cuda<T, W>(SSMParamsBwd &, cudaStream_t);

FORWARD(at::Half, float)
FORWARD(at::Half, Complex)
FORWARD(float, float)
FORWARD(float, Complex)
BACKWARD(at::Half, float)
BACKWARD(at::Half, Complex)
BACKWARD(float, float)
BACKWARD(float, Complex)
BACKWARD(at::BFloat16, Complex)
