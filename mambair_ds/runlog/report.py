"""A run as one page: experiments/NAME/report/index.html, made anew while the run goes on, readable without a network.

Everything but pictures stands in the page itself; pictures lie beside it in report/pictures. The page is a function of
the run's folder alone, so it can be made at any time: ``python -m mambair_ds.runlog.report experiments/NAME``.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from mambair_ds.runlog.metrics import FILE, History, read_history

if TYPE_CHECKING:
    import numpy as np

logger = logging.getLogger(__name__)

_POINTS = 1200  # a curve on the page; a longer one is averaged over neighbours
_DETAIL = 288  # side of the detail of a picture, in GT pixels
_NETWORK = re.compile(r"network_(\d+)\.png")
_TEMPLATE = Path(__file__).with_name("report.html")


def write_report(run: Path) -> Path:
    """Write the page of a run's folder, atomically, and return its path.

    Raises:
        OSError: if there are no numbers yet or the page cannot be written.
    """
    history = read_history(run / "log")
    data = {
        "name": run.name,
        "updated": history.updated,
        "seconds": history.seconds,
        "series": {name: _thin(values) for name, values in history.series.items()},
        "events": history.events,
        "pictures": _pictures(run / "report" / "pictures", history),
        "config": yaml.safe_load(_text(run / "config.yml")),
        "config_text": _text(run / "config.yml"),
        "environment": json.loads(_text(run / "environment.json") or "null"),
    }
    # "</" would end the script element that holds the data.
    text = json.dumps(data, separators=(",", ":")).replace("</", "<\\/")
    page = run / "report" / "index.html"
    page.parent.mkdir(parents=True, exist_ok=True)
    partial = page.with_name(f".index.html.{os.getpid()}")
    partial.write_text(_TEMPLATE.read_text(encoding="utf-8").replace("__DATA__", text), encoding="utf-8")
    partial.replace(page)
    return page


def save_detail(
    run: Path, set_name: str, name: str, iteration: int, lq: np.ndarray, restored: np.ndarray, gt: np.ndarray
) -> None:
    """Keep the liveliest detail of a validation picture for the page: LQ, bicubic and GT once, the network's each time.

    Args:
        run: the run's folder.
        set_name, name: of the validation set and of the picture in it.
        iteration: of this validation.
        lq: (h, w, C), uint8 or float in [0, 1].
        restored, gt: (H, W, C) uint8, H and W the same multiple of h and w.

    What goes wrong is said, and no reason to stop the run.
    """
    try:
        _save_detail(run / "report" / "pictures" / set_name / name, iteration, lq, restored, gt)
    except Exception as error:
        logger.warning("No picture of %s for the report (%s: %s)", name, type(error).__name__, error)


def _save_detail(folder: Path, iteration: int, lq: np.ndarray, restored: np.ndarray, gt: np.ndarray) -> None:
    import cv2
    import numpy as np

    from mambair_ds.data.degradations import resize_uint8

    folder.mkdir(parents=True, exist_ok=True)
    scale = gt.shape[0] // lq.shape[0]
    side = [min(_DETAIL, n) // scale * scale for n in gt.shape[:2]]
    # Where GT has most detail: the mean of its Laplacian's absolute value over every window.
    lively = cv2.blur(np.abs(cv2.Laplacian(gt[..., 0].astype(np.float32), cv2.CV_32F)), (side[1], side[0]))
    inner = lively[side[0] // 2 : gt.shape[0] - (side[0] - 1) // 2, side[1] // 2 : gt.shape[1] - (side[1] - 1) // 2]
    top, left = (int(n) // scale * scale for n in np.unravel_index(int(inner.argmax()), inner.shape))

    def write(file: str, picture: np.ndarray, factor: int = 1) -> None:
        y, x, height, width = (n // (scale // factor) for n in (top, left, *side))
        detail = np.ascontiguousarray(picture[y : y + height, x : x + width, ::-1])
        if not cv2.imwrite(str(folder / file), detail):
            raise OSError(f"could not write {folder / file}")

    if not (folder / "gt.png").exists():
        if lq.dtype != np.uint8:
            lq = np.rint(np.clip(lq, 0, 1) * 255).astype(np.uint8)
        write("lq.png", lq, 1)
        if scale > 1:
            write("bicubic.png", resize_uint8(lq, scale), scale)
        write("gt.png", gt, scale)
    write(f"network_{iteration:07d}.png", restored, scale)


def _pictures(folder: Path, history: History) -> list[dict[str, Any]]:
    """What `save_detail` kept, without iterations that do not count."""
    pictures = []
    for gt in sorted(folder.glob("*/*/gt.png")):
        counted = history.series.get(f"metrics/{gt.parent.parent.name}/psnr", {})
        found = sorted(int(match[1]) for path in gt.parent.iterdir() if (match := _NETWORK.fullmatch(path.name)))
        pictures.append(
            {
                "set": gt.parent.parent.name,
                "name": gt.parent.name,
                "bicubic": gt.with_name("bicubic.png").exists(),
                "iterations": [iteration for iteration in found if iteration in counted],
            }
        )
    return pictures


def _thin(values: dict[int, float]) -> list[list[float]]:
    """[iterations, values] of a curve of at most `_POINTS` points, each the mean of its neighbours."""
    x, y = list(values), list(values.values())
    step = -(-len(x) // _POINTS)
    groups = [slice(i, i + step) for i in range(0, len(x), step)]
    return [[x[group][-1] for group in groups], [float(f"{sum(y[g]) / len(y[g]):.6g}") for g in groups]]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "log" / FILE).is_file():
        sys.exit(f"usage: python -m mambair_ds.runlog.report experiments/NAME (a folder with log/{FILE})")
    print(write_report(Path(sys.argv[1])))
