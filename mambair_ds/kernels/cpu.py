"""What the CPU backends share: compilation by numba, and a loop over independent tasks on several threads.

The kernels release the GIL and run on plain Python threads rather than under numba's own `prange`: no OpenMP runtime has to be found
on the machine, calls from several threads and after a fork are safe, and the number of threads is torch's at the moment of the call.
"""

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import torch


def jit(function: Callable[..., Any], *, fastmath: frozenset[str] = frozenset({"contract", "nsz"})) -> Callable[..., Any]:
    """Compile a kernel for this CPU on its first call, without the GIL and with fused multiply-adds.

    The machine code is kept beside the source, or in the user's cache folder where that is read-only. Where neither can be written
    it is compiled anew in every process.
    """
    options = {"nogil": True, "fastmath": set(fastmath), "error_model": "numpy"}
    try:
        return numba.njit(cache=True, **options)(function)
    except RuntimeError:  # numba found no folder to keep it in
        return numba.njit(**options)(function)


# For a kernel that sums over its inner loop: the compiler may change the order of additions, once and for all, to vectorise them.
jit_reassociating = functools.partial(jit, fastmath=frozenset({"contract", "nsz", "reassoc"}))


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
