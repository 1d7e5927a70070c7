"""Compile a run's kernels ahead: ``python -m mambair_ds.compile --config configs/x2.yml [--capability 9.0]``.

A run's first step compiles some fifty kernels, one after the other. This does it beforehand and on all cores, for a GPU
that need not be there: for an image, or so that a job's ranks do not all do it on the cluster's time. They go to
Triton's cache, TRITON_CACHE_DIR or ~/.triton/cache, and serve the same version of Triton.

Exit codes: 0 compiled, 2 the command cannot be run as it is, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mambair_ds.options import run_door

CAPABILITIES = ("8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "11.0", "12.0", "12.1")
"""What Triton's compiler knows; given another it ends the process."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; see the module's docstring for the exit codes."""
    args = _parse(argv)
    return run_door("compile", lambda: _compile(args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mambair_ds.compile", description="Compile a run's kernels for a GPU that need not be there."
    )
    parser.add_argument("--config", type=Path, required=True, nargs="+", metavar="FILE", help="of one run or several")
    parser.add_argument(
        "--capability",
        type=_capability,
        default="9.0",
        metavar="X.Y",
        help="the GPU's compute capability: 8.0 is an A100, 9.0 an H100 or H200, 10.0 a B200 (%(default)s)",
    )
    return parser.parse_args(argv)


def _capability(text: str) -> tuple[int, int]:
    """Type of an argument: one of `CAPABILITIES`."""
    if text not in CAPABILITIES:
        known = ", ".join(CAPABILITIES)
        raise argparse.ArgumentTypeError(f"expected a compute capability of 8.0 or more ({known}), got {text!r}")
    major, minor = text.split(".")
    return int(major), int(minor)


def _compile(args: argparse.Namespace) -> int:
    from mambair_ds.config import load_config

    configs = [load_config(path) for path in args.config]
    from mambair_ds.kernels.ahead import compile_kernels

    for path, config in zip(args.config, configs, strict=True):
        began = time.monotonic()
        total, found = compile_kernels(config, args.capability)
        took = time.monotonic() - began
        print(f"{path}: {total} kernels, {found} of them were there already, {took:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
