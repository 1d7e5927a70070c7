"""Restore pictures with a trained network: ``python -m mambair_ds.restore --weights FILE INPUT... --out OUT``.

Exit codes: 0 all are restored, 1 some are not (each is named), 2 the command cannot be run as it is, 130 interrupted.
"""

from __future__ import annotations

import argparse
import glob
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mambair_ds.options import add_network_options, network_options, new_file, positive, run_door

if TYPE_CHECKING:
    from mambair_ds.restorer import Restorer

_FORMS = {".png": "png", ".jpg": "jpg", ".jpeg": "jpg", ".webp": "webp"}


class _Job(NamedTuple):
    source: Path | None  # None: stdin
    target: Path | None  # None: stdout
    form: str


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; see the module's docstring for the exit codes."""
    args = _parse(argv)
    return run_door("restore", lambda: _restore(args))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m mambair_ds.restore",
        description="Restore pictures. Depth (8 or 16 bits), grey, alpha, color profile and EXIF are kept.",
    )
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="pictures, folders (with their subfolders), globs, or - for stdin")
    add("--weights", type=Path, required=True, metavar="FILE", help="a .pth or .safetensors, or the folder of a run")
    add(
        "--out",
        required=True,
        metavar="OUT",
        help="folder for the restored pictures, which keep their names; of one picture also a file "
        f"({', '.join(_FORMS)}) or - for stdout",
    )
    add("--format", choices=["png", "jpg", "webp"], help="of the files in the folder; png keeps 16 bits (png)")
    add("--quality", type=positive, default=95, help="of jpg and webp, 1 to 100 (%(default)s)")
    existing = parser.add_mutually_exclusive_group()
    existing.add_argument("--overwrite", action="store_true", help="replace files that are there already")
    existing.add_argument("--skip-existing", action="store_true", help="leave out pictures that are restored already")
    add_network_options(parser)
    args = parser.parse_args(argv)
    if args.quality > 100:
        parser.error("argument --quality: expected 1 to 100")
    return args


def _restore(args: argparse.Namespace) -> int:
    from mambair_ds.restorer import Restorer

    jobs = _plan(args.inputs, args.out, args.format)
    if args.skip_existing:
        jobs = [job for job in jobs if job.target is None or not job.target.exists()]
    for job in jobs:
        if job.target:
            new_file(job.target, args.overwrite)
    restorer = Restorer.open(args.weights, **network_options(args))
    failed = 0
    for i, job in enumerate(jobs, 1):
        head = f"[{i}/{len(jobs)}] {job.source or 'stdin'}"
        try:
            print(f"{head}: {_restore_one(restorer, job, args.quality)}", file=sys.stderr, flush=True)
        except _Failure as failure:
            failed += 1
            print(f"{head}: NOT RESTORED: {failure}", file=sys.stderr, flush=True)
    if failed:
        print(f"restore: {failed} of {len(jobs)} pictures are not restored", file=sys.stderr)
    return 1 if failed else 0


def _plan(inputs: Sequence[str], out: str, form: str | None) -> list[_Job]:
    """What becomes what.

    Raises:
        UserError: an input is not there or no picture, or two would become one file.
    """
    from mambair_ds.config import UserError

    if "-" in inputs and len(inputs) > 1:
        raise UserError("INPUT -: stdin is one picture; give no others with it")
    found = [pair for text in inputs for pair in _find(text)]
    single = len(found) == 1 and not Path(inputs[0]).is_dir()
    if out == "-":
        if not single:
            raise UserError(f"--out -: stdout takes one picture, INPUT names {len(found)}")
        return [_Job(found[0][0], None, form or "png")]
    folder = Path(out)
    if single and not folder.is_dir() and folder.suffix.lower() in _FORMS:
        if form:
            raise UserError(f"--format {form}: --out {out} names a file, whose ending says the format")
        return [_Job(found[0][0], folder, _FORMS[folder.suffix.lower()])]
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {out}: is a file; expected a folder for {len(found)} pictures")
    if single and not folder.is_dir() and folder.suffix:
        raise UserError(f"--out {out}: expected a folder, or a file that ends in {', '.join(_FORMS)}")
    form = form or "png"
    jobs: dict[Path, _Job] = {}
    for source, name in found:
        target = folder / name.with_suffix(f".{form}")
        if target in jobs:
            raise UserError(f"{jobs[target].source} and {source} would both become {target}")
        jobs[target] = _Job(source, target, form)
    return list(jobs.values())


def _find(text: str) -> list[tuple[Path | None, Path]]:
    """The pictures that one INPUT names, each with its name below the output folder."""
    from mambair_ds.config import UserError
    from mambair_ds.data.pictures import SUFFIXES

    path = Path(text)
    if text == "-":
        return [(None, Path("stdin"))]
    if path.is_dir():
        found = [(file, file.relative_to(path)) for file in sorted(path.rglob("*"))]
    elif path.is_file():
        return [(path, Path(path.name))]
    elif glob.has_magic(text):
        found = [(Path(file), Path(Path(file).name)) for file in sorted(glob.glob(text, recursive=True))]
    else:
        raise UserError(f"{text}: no such file or folder")
    pictures = [(file, name) for file, name in found if file.is_file() and file.suffix.lower() in SUFFIXES]
    if not pictures:
        raise UserError(f"{text}: no pictures ({', '.join(sorted(SUFFIXES))})")
    return list(pictures)


class _Failure(Exception):
    """One picture could not be restored; the message says why."""


def _restore_one(restorer: Restorer, job: _Job, quality: int) -> str:
    """Restore one picture; returns what is said of it."""
    import numpy as np
    import torch

    from mambair_ds.data.picture_files import PictureFile, decode, encode, resized_exif
    from mambair_ds.data.pictures import PictureError
    from mambair_ds.files import write_whole

    started = time.perf_counter()
    try:
        data = job.source.read_bytes() if job.source else sys.stdin.buffer.read()
        picture = decode(data)
        parts = [picture.pixels] if picture.alpha is None else [picture.pixels, picture.alpha]
        if picture.alpha is not None and picture.pixels.shape[2] == 1:
            parts.insert(0, np.repeat(picture.pixels, 2, axis=2))  # grey with alpha goes as colors
        restored = restorer(np.concatenate(parts, axis=2))
        alpha = restored[..., 3:] if picture.alpha is not None else None
        pixels = restored[..., : picture.pixels.shape[2]]
        height, width = pixels.shape[:2]
        exif = resized_exif(picture.exif, width, height)
        encoded, lost = encode(PictureFile(pixels, alpha, picture.icc, exif), job.form, quality)
        if job.target:
            write_whole(job.target, encoded)
        else:
            sys.stdout.buffer.write(encoded)
            sys.stdout.buffer.flush()
    except (PictureError, OSError) as error:
        raise _Failure(str(error)) from error
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise _Failure("out of memory; try --memory with the GB that are free, or a smaller --tile") from error
    old = "x".join(map(str, picture.pixels.shape[1::-1]))
    notes = "".join(f"; {text}" for text in lost)
    return f"{old} -> {job.target or 'stdout'} {width}x{height}, {time.perf_counter() - started:.1f} s{notes}"


if __name__ == "__main__":
    sys.exit(main())
