"""Get published weights: ``python -m mambair_ds.download x2_light``, named after the configuration they belong to.

Exit codes: 0 they are there, 1 they could not be had, 2 the command cannot be run as it is, 130 interrupted.
"""

from __future__ import annotations

import argparse
import http.client
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from mambair_ds.options import new_file, run_door

RELEASE = "https://github.com/csguoh/MambaIR/releases/download/v1.0"
_SIZES = {"": "classicSR_Base", "_small": "classicSR_Small", "_large": "classicSR_Large", "_light": "lightSR"}
FILES = {
    **{f"x{scale}{ours}": f"mambairv2_{theirs}_x{scale}.pth" for ours, theirs in _SIZES.items() for scale in (2, 3, 4)},
    "denoise_15": "mambairv2_ColorDN_15.pth",
    **{f"jpeg_{quality}": f"mambairv2_jpeg_q{quality}.pth" for quality in (10, 30, 40)},
}
"""Published files by the name of our configuration; not all of them are sure to be there."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; see the module's docstring for the exit codes."""
    parser = argparse.ArgumentParser(
        prog="python -m mambair_ds.download", description="Get the published weights of a configuration."
    )
    parser.add_argument("name", choices=FILES, metavar="NAME", help=f"one of {', '.join(FILES)}")
    parser.add_argument("--out", type=Path, default=Path("weights"), metavar="DIR", help="folder (%(default)s)")
    parser.add_argument("--url", default=RELEASE, help="folder to get them from, such as a mirror (%(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there already")
    args = parser.parse_args(argv)
    return run_door("download", lambda: _download(args))


def _download(args: argparse.Namespace) -> int:
    file = FILES[args.name]
    path, url = args.out / file, f"{args.url}/{file}"
    new_file(path, args.overwrite)
    try:
        data = _get(url)
    except (OSError, http.client.HTTPException, ValueError) as error:
        print(
            f"download: {url}: {error}\n"
            f"On a machine with a network, open that address and copy the file to {path}; "
            f"then: python -m mambair_ds.evaluate --weights {path} ...",
            file=sys.stderr,
        )
        return 1
    from mambair_ds.config import UserError
    from mambair_ds.files import write_whole
    from mambair_ds.weights import describe_weights, read_weights

    partial = path.with_name(f"unchecked_{file}")
    try:
        write_whole(partial, data)
        network = describe_weights(read_weights(partial), url)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot write it: {error.strerror or error}") from error
    finally:
        partial.unlink(missing_ok=True)
    print(f"{path}: {network.type} x{network.upscale}, {len(data):,} bytes")
    return 0


def _get(url: str) -> bytes:
    """A file as large as the server said it is.

    Raises:
        OSError, http.client.HTTPException, ValueError: it cannot be had; less arrived; the address is none.
    """
    with urllib.request.urlopen(url, timeout=60) as response:
        data: bytes = response.read()  # IncompleteRead if the connection ends early
        expected = response.headers["Content-Length"]
    if expected is not None and len(data) != int(expected):
        raise OSError(f"{len(data)} bytes arrived of {expected}")
    return data


if __name__ == "__main__":
    sys.exit(main())
