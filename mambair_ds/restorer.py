"""A trained network as a function of pictures: what evaluate and restore call, and what a program calls.

restorer = Restorer.open("net_g_500000.pth")
restored = restorer(picture)  # uint8 or uint16 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4)
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor

from mambair_ds.config import NetworkConfig, UserError
from mambair_ds.data.degradations import imresize
from mambair_ds.inference import PUBLISHED_TILE, restore, to_picture, to_tensor, widening
from mambair_ds.models.mambairv2 import MambaIRv2
from mambair_ds.weights import open_network

_PIXEL_BYTES = 96
"""Peak of activations per LQ pixel and channel of the network: 54 to 94 measured on a CPU, see docs/restore.md."""


class Restorer:
    """Restores pictures with one network."""

    def __init__(
        self,
        network: MambaIRv2,
        *,
        tile: int | None = PUBLISHED_TILE,
        overlap: int | None = None,
        self_ensemble: bool = False,
        precision: str = "fp32",
        compile: bool = False,
        memory: float | None = None,
    ) -> None:
        """Wrap a network that lies on the device to compute on.

        Args:
            network: in any mode, any floating dtype.
            tile, overlap, self_ensemble: see `mambair_ds.inference.restore`.
            precision: fp32, or bf16 for autocast.
            compile: let torch.compile fuse what lies between the operators, for any size of picture; the first picture
                takes minutes.
            memory: GB that activations may take: the tile as large as they allow, one at a time.

        Raises:
            UserError: the memory is too small for any tile.
        """
        self.network = network.eval()
        self.scale = network.config.upscale
        self.channels = network.config.in_chans
        self.device = next(network.parameters()).device
        if memory is not None:
            tile = tile_for(network.config, memory, overlap)
        if compile:
            self.network.compile(dynamic=True)
        self._restore = partial(
            restore,
            self.network,
            scale=self.scale,
            tile=tile,
            overlap=overlap,
            self_ensemble=self_ensemble,
            bf16=precision == "bf16",
            max_batch=4 if memory is None else 1,
        )

    @classmethod
    def open(
        cls,
        path: str | Path,
        *,
        config: NetworkConfig | None = None,
        param_key: str = "params_ema",
        device: str | torch.device | None = None,
        **options: Any,
    ) -> Restorer:
        """The restorer of a weight file.

        Args:
            path: a .pth or .safetensors, or the folder of a run, whose newest weights are taken.
            config: the network; None reads it off the weights.
            param_key: weights of a .pth to take, params_ema (if it has them) or params.
            device: where to compute; None takes the GPU if there is one.
            options: as for `Restorer`.

        Raises:
            UserError: the file is missing, broken or no MambaIRv2; the memory is too small for any tile.
        """
        network = open_network(path, param_key=param_key, config=config)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(network.to(device), **options)

    def restore(self, lq: Tensor) -> Tensor:
        """(B, channels, H, W) in [0, 1] on any device to (B, channels, H·scale, W·scale), float32, not clamped."""
        return self._restore(lq.to(self.device)).float()

    def restore_lq(self, lq: np.ndarray) -> np.ndarray:
        """LQ (H, W, channels), uint8 or float32 in units of 1, to the uint8 result, as evaluations take it."""
        return to_picture(self.restore(to_tensor(lq)))

    def __call__(self, picture: np.ndarray) -> np.ndarray:
        """Restore a picture.

        Grey becomes RGB for a network of colors and grey again. Of a color picture a network of one channel restores
        the luma; its chroma is enlarged bicubically, as alpha is.

        Args:
            picture: uint8 or uint16, (H, W), (H, W, 1), (H, W, 3) RGB or (H, W, 4) RGBA.

        Returns:
            Same dtype and channels, H and W times the scale.

        Raises:
            ValueError: on other dtypes or shapes.
        """
        channels = 1 if picture.ndim == 2 else picture.shape[2] if picture.ndim == 3 else 0
        if picture.dtype not in (np.uint8, np.uint16) or channels not in (1, 3, 4) or not picture.size:
            raise ValueError(
                "expected uint8 or uint16 (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), "
                f"got {picture.dtype} {picture.shape}"
            )
        top = np.iinfo(picture.dtype).max
        unit = np.atleast_3d(picture).astype(np.float32) / np.float32(top)
        restored = self._grey(unit) if channels == 1 else self._color(unit[..., :3])
        if channels == 4:
            restored = np.concatenate((restored, self._enlarge(unit[..., 3:])), axis=2)
        whole = np.rint(np.clip(restored, 0, 1) * top).astype(picture.dtype)
        return whole[..., 0] if picture.ndim == 2 else whole

    def _grey(self, grey: np.ndarray) -> np.ndarray:
        if self.channels == 1:
            return self._network(grey)
        return cv2.cvtColor(self._network(np.repeat(grey, 3, axis=2)), cv2.COLOR_RGB2GRAY)[..., None]

    def _color(self, color: np.ndarray) -> np.ndarray:
        if self.channels == 3:
            return self._network(color)
        luma, chroma = np.split(cv2.cvtColor(color, cv2.COLOR_RGB2YCrCb), [1], axis=2)
        parts = (self._network(luma), self._enlarge(chroma))
        return cv2.cvtColor(np.concatenate(parts, axis=2), cv2.COLOR_YCrCb2RGB)

    def _network(self, unit: np.ndarray) -> np.ndarray:
        """float32 (H, W, channels) in [0, 1] to the restored one."""
        return np.ascontiguousarray(self.restore(to_tensor(unit))[0].permute(1, 2, 0).cpu().numpy())

    def _enlarge(self, unit: np.ndarray) -> np.ndarray:
        return imresize(unit, self.scale).astype(np.float32) if self.scale > 1 else unit


def tile_for(config: NetworkConfig, memory: float, overlap: int | None) -> int:
    """The largest tile (LQ pixels) whose activations in float32 fit into `memory` GB.

    Raises:
        UserError: not even a window fits.
    """
    pixels = memory * 2**30 / (_PIXEL_BYTES * config.embed_dim)
    side = math.isqrt(int(max(pixels, 0)))
    tile = side
    while tile > 0 and tile + 2 * widening(tile, overlap) > side:
        tile -= 1
    if tile < config.window_size:
        raise UserError(
            f"--memory {memory:g}: too little for this network, which needs tiles of {config.window_size} pixels"
        )
    return tile
