"""What the doors share on their command lines. Imports nothing heavy, so that --help answers at once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def positive(text: str) -> int:
    """Type of an argument: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """Type of an argument: a whole number, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, got {text!r}")
    return int(text)


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """The options of doors that run a network on pictures; see `network_options`."""
    group = parser.add_argument_group("the network")
    group.add_argument(
        "--param-key",
        choices=["params_ema", "params"],
        default="params_ema",
        help="weights of a .pth to take; a file without a running mean gives its params (%(default)s)",
    )
    group.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16 is faster on a GPU (fp32)")
    group.add_argument(
        "--compile", action="store_true", help="compile the network first: takes minutes, for many pictures or a GPU"
    )
    group.add_argument(
        "--self-ensemble",
        action="store_true",
        help="average over the eight flips and turns of a picture: 8 times slower",
    )
    tiling = group.add_mutually_exclusive_group()
    tiling.add_argument(
        "--tile", type=positive, metavar="N", help="largest side of a tile in LQ pixels (200, as published)"
    )
    tiling.add_argument(
        "--memory", type=float, metavar="GB", help="the largest tiles whose activations fit into so much memory"
    )
    tiling.add_argument("--no-tiling", action="store_true", help="restore every picture in one piece")
    group.add_argument(
        "--overlap", type=not_negative, metavar="M", help="LQ pixels by which a tile is widened (a tenth of its side)"
    )


_SHARED = ("param_key", "precision", "compile", "self_ensemble", "overlap", "memory")


def network_options(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_network_options` read, as keywords of `Restorer.open`."""
    options = {key: getattr(args, key) for key in _SHARED}
    if args.no_tiling:
        options["tile"] = None
    elif args.tile:
        options["tile"] = args.tile
    return options


def run_door(name: str, door: Callable[[], int]) -> int:
    """Run a door and turn a user's mistake into one message and exit code 2, Ctrl-C into 130."""
    from mambair_ds.config import UserError

    try:
        return door()
    except UserError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130


def new_file(path: Path, overwrite: bool) -> None:
    """Refuse an output that is there already, unless told to replace it.

    Raises:
        UserError: it is there, or its folder is no folder.
    """
    from mambair_ds.config import UserError

    if path.is_dir():
        raise UserError(f"{path}: is a folder; expected the name of a file")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: there already; --overwrite replaces it")
