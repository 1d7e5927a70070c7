"""Turn weights and option files into other forms: ``python -m mambair_ds.convert weights SOURCE --out FILE``.

The other kinds are ``onnx`` and ``config``.

Exit codes: 0 written, 2 the command cannot be run as it is, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from mambair_ds.options import new_file, positive, run_door


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; see the module's docstring for the exit codes."""
    args = _parse(argv)
    return run_door("convert", lambda: args.convert(args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mambair_ds.convert", description="Turn weights and option files into other forms."
    )
    kinds = parser.add_subparsers(required=True, metavar="weights|onnx|config")
    where = "a .pth or .safetensors, the folder of a run (its newest weights), or of a checkpoint"
    weights = kinds.add_parser("weights", help="checkpoints, .pth and safetensors into one another")
    weights.add_argument("source", type=Path, metavar="SOURCE", help=where)
    weights.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help=".pth, in the published layout, or .safetensors"
    )
    weights.add_argument(
        "--param-key",
        choices=["params", "params_ema"],
        help="the set to write, under the name params (.pth: all; .safetensors: params_ema if there is one)",
    )
    weights.set_defaults(convert=_weights)
    onnx = kinds.add_parser("onnx", help="weights into an ONNX graph for pictures of any size")
    onnx.add_argument("source", type=Path, metavar="SOURCE", help=where)
    onnx.add_argument("--out", type=Path, required=True, metavar="FILE", help=".onnx")
    onnx.add_argument(
        "--param-key", choices=["params", "params_ema"], default="params_ema", help="the set to write (%(default)s)"
    )
    onnx.set_defaults(convert=_onnx)
    config = kinds.add_parser("config", help="a published option file (BasicSR's YAML) into a configuration")
    config.add_argument("source", type=Path, metavar="OPTIONS", help="a train or test option file")
    config.add_argument("--out", type=Path, required=True, metavar="FILE", help=".yml")
    config.add_argument("--quality", type=positive, help="of JPEG, where the file does not tell")
    config.set_defaults(convert=_config)
    for one in (weights, onnx, config):
        one.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    return parser.parse_args(argv)


def _weights(args: argparse.Namespace) -> int:
    _check_out(args, (".pth", ".safetensors"))
    from mambair_ds.conversion.weights import read, write_card
    from mambair_ds.weights import save_network

    source = read(args.source)
    if args.param_key and args.param_key not in source.sets:
        from mambair_ds.config import UserError

        raise UserError(f"{args.source}: no {args.param_key} in it, just {', '.join(source.sets)}")
    if args.param_key or args.out.suffix == ".safetensors":
        key, tensors = source.chosen(args.param_key or "params_ema")
        save_network(args.out, {"params": tensors})
    else:
        key = " and ".join(source.sets)
        save_network(args.out, source.sets)
    card = write_card(args.out, source, key, {})
    print(f"{args.out}: {key} of {source.path}; card: {card}")
    return 0


def _onnx(args: argparse.Namespace) -> int:
    _check_out(args, (".onnx",))
    import numpy as np
    import torch

    from mambair_ds.conversion import onnx
    from mambair_ds.conversion.weights import read, write_card

    source = read(args.source)
    key, _ = source.chosen(args.param_key)
    network = source.build(key)
    onnx.export(network, args.out)
    lq = np.random.default_rng(0).random((1, source.network.in_chans, 50, 41), np.float32)
    with torch.inference_mode():
        ours = network(torch.from_numpy(lq)).numpy()
    difference = float(np.abs(ours - onnx.run(args.out, lq)).max())
    facts = {
        "Inputs and outputs": "`lq` and `restored`, float32, any batch, height and width; routing without noise",
        "Largest difference from PyTorch": f"{difference:.1e} on noise of 50x41 pixels, in onnxruntime",
    }
    card = write_card(args.out, source, key, facts)
    print(f"{args.out}: {key} of {source.path}; differs by {difference:.1e} at most; card: {card}")
    return 0


def _config(args: argparse.Namespace) -> int:
    from mambair_ds.config import UserError
    from mambair_ds.conversion.published_options import convert
    from mambair_ds.files import write_whole

    _check_out(args, (".yml", ".yaml"), card=False)
    converted = convert(args.source, args.quality)
    try:
        write_whole(args.out, converted.text().encode())
    except OSError as error:
        raise UserError(f"{args.out}: cannot write it: {error.strerror or error}") from error
    for command in converted.commands:
        print(f"shards: {command}")
    for note in converted.notes:
        print(f"not carried over: {note}")
    print(f"{args.out}: written")
    return 0


def _check_out(args: argparse.Namespace, suffixes: Sequence[str], card: bool = True) -> None:
    from mambair_ds.config import UserError

    if args.out.suffix not in suffixes:
        raise UserError(f"--out {args.out}: expected a name that ends in {' or '.join(suffixes)}")
    new_file(args.out, args.overwrite)
    if card:
        new_file(args.out.with_suffix(".md"), args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
