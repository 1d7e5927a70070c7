"""Measure a trained network on picture sets: ``python -m mambair_ds.evaluate --weights FILE --gt DIR --lq DIR``.

The sets come from folders, or from a configuration with several of them. Any launcher spreads the pictures over several
GPUs. Exit codes: 0 measured, 2 the command cannot be run as it is, 130 interrupted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mambair_ds.options import add_network_options, network_options, new_file, positive, run_door

if TYPE_CHECKING:
    from mambair_ds.config import EvaluationConfig

METRICS = ("psnr", "ssim", "lpips", "dists")
_PICTURE_FOLDERS = ("hr", "gt", "hq", "gtmod12", "original")  # names that say nothing of the set above them


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; see the module's docstring for the exit codes."""
    args = _parse(argv)
    return run_door("evaluate", lambda: _evaluate(args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mambair_ds.evaluate",
        description="Measure a network on picture sets, as published: tiled, PSNR in dB and SSIM of 8-bit pictures.",
    )
    add = parser.add_argument
    add(
        "--weights",
        metavar="FILE",
        help="a .pth or .safetensors; the folder of a run; or 'bicubic', which measures the enlarged LQ itself. "
        "Absent: what the configuration names, else its run's newest weights",
    )
    add(
        "--out",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="results as .json or .csv; may be repeated",
    )
    add("--overwrite", action="store_true", help="replace result files that are there already")
    add("--save-img", type=Path, metavar="DIR", help="write the restored pictures to DIR/SET/NAME.png")
    add(
        "--metrics",
        nargs="+",
        choices=METRICS,
        default=["psnr", "ssim"],
        help="lpips and dists need pip install 'mambair-ds[perceptual]' (psnr ssim)",
    )
    sets = parser.add_argument_group("sets from a configuration")
    sets.add_argument("--config", type=Path, metavar="FILE", help="a run's, or one with task and data.val alone")
    sets.add_argument("--set", action="append", default=[], dest="overrides", metavar="KEY=VALUE", help="override")
    folders = parser.add_argument_group("sets from folders")
    add = folders.add_argument
    add("--gt", type=Path, nargs="+", default=[], metavar="DIR", help="folders of GT pictures, a set each")
    add("--lq", type=Path, nargs="+", default=[], metavar="DIR", help="their LQ folders; absent: made as the task says")
    add("--filename-tmpl", default="{}", metavar="TMPL", help="LQ's name from GT's: '{}x2' pairs baby and babyx2")
    add("--task", choices=["sr", "denoise", "jpeg"], default="sr", help="what the network undoes (%(default)s)")
    add("--scale", type=positive, help="of bicubic; a network brings its own")
    add("--sigma", type=float, help="denoise: standard deviation of the noise in grey levels of 255")
    add("--quality", type=int, help="jpeg: quality of the encoder")
    add("--crop-border", type=int, metavar="N", help="pixels cut from every side (sr: the scale, others: 0)")
    channel = folders.add_mutually_exclusive_group()
    channel.add_argument("--y-channel", action="store_true", default=None, help="measure on Y of BT.601 (sr, jpeg)")
    channel.add_argument("--rgb", action="store_false", dest="y_channel", help="measure on RGB (denoise)")
    add_network_options(parser)
    parser.set_defaults(precision=None)  # then the configuration says it
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the deepspeed launcher
    args = parser.parse_args(argv)
    if bool(args.config) == bool(args.gt):
        parser.error("give either --config or --gt")
    if args.lq and len(args.lq) != len(args.gt):
        parser.error(f"--lq names {len(args.lq)} folders, --gt {len(args.gt)}; expected one for each, or none")
    if args.overrides and not args.config:
        parser.error("--set needs --config")
    return args


def _evaluate(args: argparse.Namespace) -> int:
    from mambair_ds.config import UserError, ValidationConfig, load_evaluation
    from mambair_ds.training import launch

    for path in args.out:
        if path.suffix not in (".json", ".csv"):
            raise UserError(f"--out {path}: expected a name that ends in .json or .csv")
        new_file(path, args.overwrite)
    config = load_evaluation(args.config, args.overrides) if args.config else None
    weights = args.weights or (config.weights if config else None)
    if weights is None:
        raise UserError("--weights: missing; expected a weight file, the folder of a run, or bicubic")
    place = launch.detect(args.local_rank)
    launch.share_cores(place)
    # Heavy from here on.
    from mambair_ds.evaluation import Bicubic, Evaluation, evaluate
    from mambair_ds.restorer import Restorer

    network = config.network if config else None
    method: Bicubic | Restorer
    if str(weights) == "bicubic":
        if network is None and args.scale is None:
            raise UserError("--weights bicubic: --scale is missing")
        gray = network.in_chans == 1 if network else args.task == "jpeg"
        method = Bicubic(network.upscale if network else args.scale, 1 if gray else 3)
    else:
        args.precision = args.precision or (config.data.val if config else ValidationConfig()).precision
        method = Restorer.open(weights, config=network, device=place.device, **network_options(args))
        if args.scale not in (None, method.scale):
            raise UserError(f"--scale {args.scale}: the network of {weights} has scale {method.scale}")
    config = config or _from_folders(args, method.scale)
    results = evaluate(
        Evaluation(config.name, str(weights), method, config.task, config.data.val, args.metrics, args.save_img), place
    )
    if place.is_main:
        print(results.table())
        for path in args.out:
            results.write(path)
    return 0


def _from_folders(args: argparse.Namespace, scale: int) -> EvaluationConfig:
    """The configuration that the options describe; crop and channels as the field measures the task."""
    from mambair_ds.config import EvaluationConfig, UserError, validate

    sets: dict[str, object] = {}
    for i, gt in enumerate(args.gt):
        name = gt.parent.name if gt.name.lower() in _PICTURE_FOLDERS and gt.parent.name else gt.name
        if name in sets:
            raise UserError(f"--gt: two sets of the name {name}; name them in a configuration (--config)")
        sets[name] = {"gt": gt, "lq": args.lq[i] if args.lq else None, "filename_tmpl": args.filename_tmpl}
    val = {
        "sets": sets,
        "crop_border": scale if args.crop_border is None and args.task == "sr" and scale > 1 else args.crop_border or 0,
        "test_y_channel": args.task != "denoise" if args.y_channel is None else args.y_channel,
    }
    task = {"kind": args.task, "sigma": args.sigma, "quality": args.quality}
    return validate({"task": task, "data": {"val": val}}, "command line", None, EvaluationConfig)


if __name__ == "__main__":
    sys.exit(main())
