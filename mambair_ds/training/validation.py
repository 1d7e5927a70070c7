"""Measure a network on validation sets, the pictures spread over all ranks."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from mambair_ds.config import RunConfig, TaskConfig, ValidationConfig
from mambair_ds.data.degradations import add_validation_noise, jpeg_roundtrip, resize_uint8
from mambair_ds.data.folders import ValidationSet, open_validation_set
from mambair_ds.inference import restore, to_picture, to_tensor
from mambair_ds.metrics import psnr, ssim
from mambair_ds.runlog import save_detail
from mambair_ds.training.launch import Launch


def open_sets(config: RunConfig) -> dict[str, ValidationSet]:
    """Open every validation set of a run.

    Raises:
        UserError: naming what is missing.
    """
    scale, channels = config.network.upscale, config.network.in_chans
    return {
        name: open_validation_set(val, scale, "gray" if channels == 1 else "rgb")
        for name, val in config.data.val.sets.items()
    }


def degrade(gt: np.ndarray, task: TaskConfig, scale: int) -> np.ndarray:
    """The LQ of a validation picture that has none, as the field makes it.

    Args:
        gt: uint8 (H, W, C); for sr a multiple of `scale` in both sides.

    Returns:
        uint8 (MATLAB bicubic, JPEG) or float32 in units of 1 (noise: not clipped, not rounded).
    """
    if task.kind == "denoise":
        assert task.sigma is not None
        return add_validation_noise(gt, task.sigma)
    if task.kind == "jpeg":
        assert task.quality is not None
        return jpeg_roundtrip(gt, task.quality)
    return resize_uint8(gt, 1 / scale)


def measure(picture: np.ndarray, gt: np.ndarray, options: ValidationConfig) -> tuple[float, float]:
    """PSNR in dB and SSIM of a uint8 (H, W, C) picture against its GT, on the channels and border asked for."""
    border, y_channel = options.crop_border, options.test_y_channel
    return psnr(picture, gt, border, y_channel), ssim(picture, gt, border, y_channel)


def validate(
    network: nn.Module,
    sets: dict[str, ValidationSet],
    config: RunConfig,
    iteration: int,
    launch: Launch,
    device: torch.device,
) -> dict[str, dict[str, float]]:
    """PSNR in dB and SSIM, averaged over each set; all ranks call together and get the same numbers."""
    options = config.data.val
    results = {}
    for set_name, val_set in sets.items():
        values = torch.zeros(len(val_set), 2, dtype=torch.float64)
        for i in range(launch.rank, len(val_set), launch.world_size):
            lq, gt = val_set.load(i)
            if lq is None:
                lq = degrade(gt, config.task, config.network.upscale)
            restored = restore(network, to_tensor(lq, device), config.network.upscale, bf16=options.precision == "bf16")
            picture = to_picture(restored)
            values[i] = torch.tensor(measure(picture, gt, options))
            if i < config.log.report_pictures:
                save_detail(config.folder, set_name, val_set.name(i), iteration, lq, picture, gt)
            if options.save_img:
                _save(picture, config.folder / "visualization" / val_set.name(i), f"{val_set.name(i)}_{iteration}.png")
        values = values.to(device)
        dist.all_reduce(values)
        mean = values.mean(dim=0).tolist()
        results[set_name] = {"psnr": mean[0], "ssim": mean[1]}
    return results


def _save(picture: np.ndarray, folder: Path, name: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    bgr = picture if picture.shape[2] == 1 else cv2.cvtColor(picture, cv2.COLOR_RGB2BGR)
    if not cv2.imwrite(str(folder / name), bgr):
        raise OSError(f"could not write {folder / name}")
