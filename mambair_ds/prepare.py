"""Pack folders of pictures into training shards: ``python -m mambair_ds.prepare --gt DIR --scale 2 --out SHARDS``.

Exit codes: 0 the shards are complete, 1 they could not be written, 2 the input cannot be used, 130 and 143 interrupted
(run the same command again to continue).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from mambair_ds.options import positive


class _Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; see the module's docstring for the exit codes."""
    args = _parse(argv)
    # Only here: --help must not wait for NumPy, OpenCV and pydantic.
    from mambair_ds.config import UserError
    from mambair_ds.data.packing import Packing, pack

    packing = Packing(
        gt=args.gt,
        lq=args.lq,
        filename_tmpl=args.filename_tmpl,
        scale=args.scale,
        out=args.out,
        form=args.format,
        shard_size=args.shard_size * 2**20,
        seed=args.seed,
        workers=args.workers,
        skip_bad=args.skip_bad,
        channels=args.channels,
    )
    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        pack(packing, lambda line: print(line, file=sys.stderr, flush=True))
    except UserError as error:
        print(f"prepare: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"prepare: {args.out}: {error}; run the same command again to continue", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("prepare: interrupted; run the same command again to continue", file=sys.stderr)
        return 143 if isinstance(error, _Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise _Terminated


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mambair_ds.prepare",
        description="Pack folders of pictures into training shards. A second run of the same command continues an "
        "interrupted one, and does nothing when the shards are complete.",
    )
    add = parser.add_argument
    add("--gt", type=Path, nargs="+", required=True, metavar="DIR", help="folders of high-quality pictures")
    add(
        "--lq",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="folders of their low-quality partners, one for each --gt; absent: made by MATLAB's bicubic rule at "
        "scale > 1, none at scale 1 (denoising and JPEG degrade while training)",
    )
    add(
        "--filename-tmpl",
        default="{}",
        metavar="TMPL",
        help="name of the LQ file, {} for the name of the GT: '{}x2' pairs baby.png with babyx2.png (%(default)s)",
    )
    add("--scale", type=positive, required=True, help="GT size over LQ size; GT is cut to a multiple of it")
    add("--out", type=Path, required=True, metavar="SHARDS", help="folder to write; new, empty or of this very command")
    add(
        "--format",
        choices=["tif", "png"],
        default="tif",
        help="tif: uncompressed, crops are read without decoding; png: about a third smaller, far slower (%(default)s)",
    )
    add("--shard-size", type=positive, default=1024, metavar="MB", help="pixels in a shard (%(default)s)")
    add("--seed", type=int, default=0, help="of the order of the pictures (%(default)s)")
    add("--workers", type=positive, default=len(os.sched_getaffinity(0)), help="decoding threads (all cores)")
    add("--skip-bad", action="store_true", help="leave out what cannot be used and list it in the manifest")
    add("--channels", choices=["rgb", "gray"], default="rgb", help="gray: one channel, BT.601 luma (%(default)s)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
