"""Small shard folders for the tests of the data pipeline."""

from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import skimage.data

from mambair_ds.data.shards import Sample, store_picture, write_manifest, write_shard


def photographs() -> dict[str, np.ndarray]:
    """Pictures of different sizes: uint8 (H, W, 3)."""
    return {
        "astronaut": skimage.data.astronaut()[:300, :280],
        "chelsea": skimage.data.chelsea()[:, :450],
        "coffee": skimage.data.coffee()[100:300, :190],
        "rocket": skimage.data.rocket()[100:260, 200:500],
        "coins": np.repeat(skimage.data.coins()[:130, :130, None], 3, axis=2),
    }


def gray(picture: np.ndarray) -> np.ndarray:
    """(H, W, 1) of (H, W, 3)."""
    return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[..., None]


def write_folder(
    folder: Path, pictures: dict[str, np.ndarray], scale: int = 2, form: Literal["tif", "png"] = "tif"
) -> Path:
    """Pack pictures, two to a shard; scale 1 packs GT alone, others add an LQ by averaging."""
    folder.mkdir()
    samples = []
    for key, picture in pictures.items():
        height, width = (side // scale for side in picture.shape[:2])
        gt = picture[: height * scale, : width * scale]
        lq = None
        if scale > 1:
            small = cv2.resize(gt, (width, height), interpolation=cv2.INTER_AREA).reshape(height, width, -1)
            lq = store_picture(small, form)
        samples.append(Sample(key, store_picture(gt, form), lq, {}))
    channels = "gray" if samples[0].gt.shape[2] == 1 else "rgb"
    shards = [write_shard(folder, i // 2, samples[i : i + 2]) for i in range(0, len(samples), 2)]
    write_manifest(folder, {"scale": scale, "channels": channels}, shards)
    return folder
