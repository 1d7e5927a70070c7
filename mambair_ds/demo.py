"""The whole path on built-in pictures: `python -m mambair_ds.demo`, or `make demo`.

Photographs that scikit-image ships become shards, a small network trains on them, and one photograph that it never saw
is restored and measured beside bicubic. The two commands it runs are those a user types, and it prints them. Started
again, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mambair_ds.config import RunConfig, UserError, load_config

if TYPE_CHECKING:
    import numpy as np

CONFIG = Path("configs/demo.yml")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the door; returns the exit code of the first step that failed, or 0."""
    parser = argparse.ArgumentParser(
        prog="python -m mambair_ds.demo", description="Train a small network on built-in pictures and show the result."
    )
    parser.parse_args(argv)
    try:
        config = load_config(CONFIG)
        pictures = config.data.val.sets["held_out"].gt
        assert pictures is not None
        write_pictures(pictures.parent)
        shards = config.data.train.shards[0].path
        prepare = ["-m", "mambair_ds.prepare", "--gt", str(pictures.parent / "train"), "--scale", "2", "--out"]
        code = _run([sys.executable, *prepare, str(shards)]) or _run([*_launcher(), "--config", str(CONFIG)])
        if code == 0:
            show(config)
        return code
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def write_pictures(folder: Path) -> None:
    """Write scikit-image's photographs as PNG: folder/train, and folder/held_out with the cat.

    Raises:
        UserError: if scikit-image is not installed.
    """
    try:
        from skimage import data, io
    except ImportError as error:
        raise UserError("the demo's pictures come with scikit-image: pip install 'mambair-ds[demo]'") from error
    motorcycle, _, _ = data.stereo_motorcycle()
    train = {
        "astronaut": data.astronaut(),
        "coffee": data.coffee(),
        "hubble": data.hubble_deep_field(),
        "ihc": data.immunohistochemistry(),
        "motorcycle": motorcycle,
        "rocket": data.rocket(),
    }
    for part, named in (("train", train), ("held_out", {"cat": data.chelsea()})):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for name, picture in named.items():
            io.imsave(folder / part / f"{name}.png", picture, check_contrast=False)


def show(config: RunConfig) -> None:
    """Restore the held-out picture, print the table and write LQ, bicubic, network and GT side by side."""
    import torch

    from mambair_ds.data.degradations import resize_uint8
    from mambair_ds.data.folders import open_validation_set
    from mambair_ds.inference import restore, to_picture, to_tensor
    from mambair_ds.models import build_model
    from mambair_ds.training.validation import degrade, measure
    from mambair_ds.weights import load_network

    scale, val = config.network.upscale, config.data.val
    _, gt = open_validation_set(val.sets["held_out"], scale, "rgb").load(0)
    lq = degrade(gt, config.task, scale)
    network = build_model(config.network).eval()
    weights = config.folder / "models" / f"net_g_{config.train.total_iter}.pth"
    load_network(network, weights, param_key="params_ema")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    restored = to_picture(restore(network.to(device), to_tensor(lq, device), scale))
    bicubic = resize_uint8(lq, scale)

    print(f"\nA photograph the network never saw, x{scale}, after {config.train.total_iter} iterations:\n")
    print("| method  | PSNR (Y, dB) | SSIM (Y) |\n| ------- | ------------ | -------- |")
    for name, picture in (("bicubic", bicubic), ("network", restored)):
        psnr, ssim = measure(picture, gt, val)
        print(f"| {name} | {psnr:12.2f} | {ssim:8.4f} |")
    path = config.experiments_root.parent / "result.png"
    _write_strip({"LQ": lq, "bicubic": bicubic, "network": restored, "GT": gt}, path)
    print(f"\nLQ, bicubic, network and GT side by side: {path}")


def _write_strip(pictures: dict[str, np.ndarray], path: Path) -> None:
    """The same detail of every picture, enlarged without smoothing, under its name."""
    from PIL import Image, ImageDraw

    height, width = pictures["GT"].shape[:2]
    side, zoom = 96, 3
    strip = Image.new("RGB", (len(pictures) * side * zoom, side * zoom + 20), "white")
    draw = ImageDraw.Draw(strip)
    for i, (name, picture) in enumerate(pictures.items()):
        whole = Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST)
        left, top = int(0.28 * width), int(0.25 * height)
        detail = whole.crop((left, top, left + side, top + side))
        strip.paste(detail.resize((side * zoom, side * zoom), Image.Resampling.NEAREST), (i * side * zoom, 20))
        draw.text((i * side * zoom + 4, 4), name, fill="black")
    strip.save(path)


def _launcher() -> list[str]:
    import torch

    gpus = torch.cuda.device_count()
    if gpus:
        return ["deepspeed", "--num_gpus", str(gpus), "--module", "mambair_ds.train"]
    return [sys.executable, "-m", "mambair_ds.train"]


def _run(command: Sequence[str]) -> int:
    """Run a command to its end; SIGTERM is the command's to answer, so that a stopped container's training saves."""
    print(f"$ {shlex.join(command)}", flush=True)
    with subprocess.Popen(command) as process:
        previous = signal.signal(signal.SIGTERM, lambda number, _: process.send_signal(number))
        try:
            return process.wait()
        finally:
            signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
