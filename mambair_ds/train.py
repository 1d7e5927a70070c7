"""Train a network: `python -m mambair_ds.train --config configs/x2.yml`.

Runs alone, under torchrun, the deepspeed launcher or srun. Continues from the newest whole checkpoint of the run.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from mambair_ds.config import UserError, apply_debug, load_config
from mambair_ds.options import positive
from mambair_ds.training.stop import INTERRUPTED, Stop, parse_duration

_STARTED = time.monotonic()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The door's arguments."""
    parser = argparse.ArgumentParser(prog="python -m mambair_ds.train", description="Train MambaIRv2 on shards.")
    parser.add_argument("--config", required=True, type=Path, metavar="FILE", help="YAML file of the run")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        dest="overrides",
        help="override a setting, as in --set train.total_iter=1000; may be repeated",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--resume", type=Path, metavar="DIR", help="continue this checkpoint instead of the newest")
    start.add_argument("--fresh", action="store_true", help="start over; the old run is kept under a time stamp")
    parser.add_argument(
        "--debug",
        action="store_true",
        help="prefix the name with debug_, log every step, validate and save every 8, no TensorBoard or W&B",
    )
    parser.add_argument(
        "--time-budget",
        type=parse_duration,
        metavar="TIME",
        help="save and leave with exit code 75 before this much time has passed (MINUTES, HH:MM:SS, D-HH:MM:SS)",
    )
    check = parser.add_argument_group("check, then stop")
    check.add_argument(
        "--check",
        action="store_true",
        help="check settings, shards, folders and disk, print the plan, and start nothing",
    )
    check.add_argument("--ranks", type=positive, metavar="N", help="plan for so many ranks (those of the launcher)")
    check.add_argument(
        "--card-memory", type=float, default=80.0, metavar="GB", help="plan for GPUs of this memory (%(default)s)"
    )
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # added by the deepspeed launcher
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; returns the exit code: 0 done, 1 failed, 2 a user's mistake, 75 interrupted, to be run again."""
    args = parse(argv)
    stop = Stop(_STARTED, args.time_budget)
    stop.listen()
    try:
        config = load_config(args.config, args.overrides)
        if args.debug:
            config = load_config(args.config, apply_debug(args.overrides, config.name))
        config.check_paths()
        from mambair_ds.training import launch

        place = launch.detect(args.local_rank)
        launch.share_cores(place)
        if args.check:
            from mambair_ds.training.plan import GB, describe

            plan = describe(config, args.ranks or place.world_size, args.card_memory * GB)
            if place.is_main:
                print(plan)
            return 0
        # Heavy from here on: torch, DeepSpeed, DALI.
        from mambair_ds.training.checkpoint import RunError
        from mambair_ds.training.trainer import run

        try:
            finished = run(config, place, args.resume, args.fresh, stop)
        except RunError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
                raise
            print(f"error: cannot write to {config.folder}: {error}", file=sys.stderr)
            return 1
    except UserError as error:
        # Every rank finds the same mistake; one a node says it.
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if finished else INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
