#!/bin/bash
# published_kernels.sh ARCHITECTURES: build mamba-ssm (with its Mamba-1 scan) and causal-conv1d for the GPUs named, as in
# "8.0;9.0", and install them into the python on PATH. Needs nvcc and a CUDA build of torch.
set -euo pipefail
[[ -n ${1:-} ]] || exit 0
export TORCH_CUDA_ARCH_LIST=$1
# Build here, whatever the releases offer; keep the scan that newer versions leave out unless asked.
export MAMBA_FORCE_BUILD=TRUE MAMBA_KEEP_CUDA_BUILD=TRUE CAUSAL_CONV1D_FORCE_BUILD=TRUE
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip install ninja packaging 'setuptools>=77' wheel
for package in mamba-ssm causal-conv1d; do
    MAMBA_SKIP_CUDA_BUILD=TRUE CAUSAL_CONV1D_SKIP_CUDA_BUILD=TRUE pip download --no-deps --no-build-isolation \
        --no-binary "$package" --constraint constraints.txt --dest "$work" "$package"
done
for archive in "$work"/*.tar.gz; do
    tar -xf "$archive" -C "$work"
    # With the list of setup.py gone, torch passes TORCH_CUDA_ARCH_LIST to nvcc.
    sed -i -E 's/cc_flag\.append\("(-gencode|arch=compute)[^)]*\)/pass/' "${archive%.tar.gz}/setup.py"
    pip wheel --no-deps --no-build-isolation --wheel-dir "$work/wheels" "${archive%.tar.gz}"
done
pip install --constraint constraints.txt "$work"/wheels/*.whl
