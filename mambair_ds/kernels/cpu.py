"""What the CPU backends share: compilation by numba, a loop over independent tasks on several threads, and 2^x.

The kernels release the GIL and run on plain Python threads rather than under numba's own `prange`: no OpenMP runtime
has to be found on the machine, calls from several threads and after a fork are safe, and the number of threads is
torch's at the moment of the call.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from mambair_ds.kernels.vectors import LANES, power_of_two


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a kernel for this CPU on its first call, without the GIL and with fused multiply-adds."""
    return _compile(function)


def jit_inline(function: Callable[..., Any]) -> Callable[..., Any]:
    """`jit` for a part of kernels whose vectors are to stay in registers."""
    return _compile(function, forceinline=True)


def _compile(function: Callable[..., Any], **options: bool) -> Callable[..., Any]:
    compiler = functools.partial(numba.njit, nogil=True, fastmath={"contract", "nsz"}, error_model="numpy", **options)
    try:  # the machine code is kept beside the source or, where that is read-only, in the user's cache folder
        return compiler(cache=True)(function)
    except RuntimeError:  # neither can be written: every process compiles anew
        return compiler()(function)


@jit
def exp2(x):  # type: ignore[no-untyped-def]
    """2^x, of a number or a vector, for x clamped to ±126, within 1e-7 of it.

    A power of two times a polynomial on [-1/2, 1/2].
    """
    x = min(max(x, np.float32(-126)), np.float32(126))
    shifted = x + np.float32(12582912)  # 1.5 * 2^23: rounds x to an integer, which stands in the low bits
    f = x - (shifted - np.float32(12582912))
    p = np.float32(0.00015469732) * f + np.float32(0.0013400432)
    p = p * f + np.float32(0.009618025603)
    p = p * f + np.float32(0.05550327214)
    p = p * f + np.float32(0.2402265121)
    p = p * f + np.float32(0.6931472067)
    p = p * f + np.float32(1)
    return p * power_of_two(shifted)


def to_lanes(tensor: Tensor, value: float = 0.0) -> np.ndarray:
    """float32, the last dimension extended by `value` to a multiple of `LANES`; no copy where neither is needed."""
    missing = -tensor.shape[-1] % LANES
    tensor = pad(tensor.float(), (0, missing), value=value) if missing else tensor.float()
    return tensor.detach().contiguous().numpy()


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="mambair_ds.kernels")


os.register_at_fork(after_in_child=_pool.cache_clear)  # a child process inherits the pool but not its threads


def run_tasks(kernel: Callable[..., None], count: int, *args: Any) -> None:
    """Call `kernel(task, *args)` for every task below `count`, on `torch.get_num_threads()` threads.

    Tasks must be independent of one another: which thread runs which is not defined.
    """
    tasks = iter(range(count))

    def work() -> None:
        for task in tasks:  # advancing a range iterator is atomic under the GIL
            kernel(task, *args)

    helpers = [_pool().submit(work) for _ in range(min(torch.get_num_threads(), count) - 1)]
    work()
    for helper in helpers:
        helper.result()
