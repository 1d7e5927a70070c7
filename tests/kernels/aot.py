"""The ahead-of-time compiler of benchmarks/aot.py, for the tests' own programs."""

import importlib.util
import sys
from pathlib import Path

_spec = importlib.util.spec_from_file_location("benchmarks_aot", Path(__file__).parents[2] / "benchmarks" / "aot.py")
assert _spec is not None and _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = _module  # dataclasses look their module up
_spec.loader.exec_module(_module)
compile_kernel = _module.compile_kernel
