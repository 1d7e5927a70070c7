#!/bin/bash
# slim.sh SITE_PACKAGES: take out of an environment for CPUs what training, the demo and the tests never touch.
set -euo pipefail
cd "$1"
python -m pip uninstall --yes --quiet nvidia-libnvcomp-cu13 nvidia-nvjpeg nvidia-nvjpeg2k-cu13 nvidia-nvtiff-cu13
rm -rf torch/test torch/include nvidia/dali/include nvidia/dali/test
find torch/bin -type f ! -name torch_shm_manager -delete
# DALI's module for each of the other versions of Python; CUPTI, which is for profiling.
version=$(python -c 'import sys; print(f"{sys.version_info[0]}{sys.version_info[1]}")')
find nvidia/dali -name 'backend_impl.cpython-*' ! -name "backend_impl.cpython-$version-*" -delete
rm -rf triton/backends/nvidia/lib/cupti triton/backends/nvidia/include triton/instrumentation triton/FileCheck
for package in numpy scipy skimage numba sympy networkx mpmath; do
    find "$package" -depth -type d -name tests -exec rm -rf {} +
done
strip --strip-unneeded torch/lib/libtorch_cpu.so triton/_C/libtriton.so llvmlite/binding/libllvmlite.so nvidia/dali/libdali*.so
