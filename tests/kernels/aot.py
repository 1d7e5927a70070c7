"""Compiles Triton kernels ahead of time, without a GPU, and reads off what they will occupy on one.

It knows nothing of the kernels: a caller hands over a kernel with its argument types and constants. Triton's wheel
brings `ptxas` and `cuobjdump`. Not usable in a process where Triton's interpreter is on.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@dataclass(frozen=True)
class Usage:
    """A compiled kernel's resources."""

    registers: int
    """A thread's."""
    stack: int
    """Bytes of local memory a thread has; more than 0 where registers were spilled."""
    shared: int
    """Bytes of shared memory a block has."""


def compile_kernel(
    kernel: Any, types: Mapping[str, str], constants: Mapping[str, Any], capability: int, warps: int
) -> Usage:
    """Compile `kernel` for a compute capability (80, 90, 100, ...).

    Args:
        types: for every argument that is no constant, Triton's name of its type ("*bf16", "i32", ...).
        constants: the values of the `tl.constexpr` arguments.
    """
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, values)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        report = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", report)
    assert numbers is not None, report
    return Usage(*(int(number) for number in numbers.groups()))
