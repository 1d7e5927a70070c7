"""A network and a picture: cutting it into tiles, restoring them, putting them together, and the self-ensemble.

Validation, evaluation and the restore command all go through `restore`. It takes any callable, so it knows no network.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

Network = Callable[[Tensor], Tensor]

PUBLISHED_TILE = 200
"""Largest side of a tile in the published validation, in LQ pixels."""


@torch.inference_mode()
def restore(
    network: Network,
    lq: Tensor,
    scale: int,
    *,
    tile: int | None = PUBLISHED_TILE,
    overlap: int | None = None,
    max_batch: int = 4,
    self_ensemble: bool = False,
    bf16: bool = False,
) -> Tensor:
    """Restore pictures of any size, by default cut as the published validation cuts them.

    A picture of H×W is extended to H//tile + 1 by W//tile + 1 equal tiles. Each is widened towards its neighbours by
    `overlap`, restored, and stripped of what its widened margin became.

    Args:
        network: maps (b, C, h, w) to (b, C, h·scale, w·scale), each picture by itself. A module runs in evaluation
            mode and is left in the mode it was in.
        lq: (B, C, H, W).
        scale: the network's output size over its input size.
        tile: largest side of a tile before it is widened, in LQ pixels. Less saves memory; None
            restores the picture in one piece.
        overlap: LQ pixels by which a tile is widened on each inner side; None: a tenth of its side, as published.
        max_batch: tiles of one size that the network gets at a time, at most.
        self_ensemble: average over the eight flips and transpositions of the picture (Timofte et al. 2016, section 3.6
            of "Seven ways to improve example-based single image super resolution").
        bf16: run the network under bfloat16 autocast instead of in float32.

    Returns:
        (B, C, H·scale, W·scale) in the network's dtype, not clamped.
    """
    autocast = torch.autocast(lq.device.type, torch.bfloat16) if bf16 else nullcontext()
    with _evaluating(network), autocast:
        if not self_ensemble:
            return _restore_tiled(network, lq, scale, tile, overlap, max_batch)
        outputs = []
        for transpose, flip_v, flip_h in product((False, True), repeat=3):
            turned = _transform(lq, transpose, flip_v, flip_h)
            restored = _restore_tiled(network, turned, scale, tile, overlap, max_batch)
            outputs.append(_transform(restored, transpose, flip_v, flip_h, undo=True))
        return torch.stack(outputs).mean(0)


def to_tensor(picture: np.ndarray, device: torch.device | str = "cpu") -> Tensor:
    """uint8 or float (H, W, C) to float32 (1, C, H, W) in [0, 1]."""
    values = picture.astype(np.float32) / np.float32(255) if picture.dtype == np.uint8 else picture.astype(np.float32)
    return torch.from_numpy(values).to(device).permute(2, 0, 1).unsqueeze(0)


def to_picture(output: Tensor) -> np.ndarray:
    """Float (1, C, H, W) to uint8 (H, W, C): clamped to [0, 1], rounded."""
    values = output[0].float().clamp(0, 1).mul(255).round()
    return values.permute(1, 2, 0).byte().cpu().numpy()


class _Span(NamedTuple):
    """A tile along one side of the picture."""

    wide: slice  # of the input: the tile with its margins
    middle: slice  # of the restored tile: without them
    place: slice  # of the output: where the middle goes


def widening(size: int, overlap: int | None) -> int:
    """LQ pixels by which a tile of this side is widened on each inner side."""
    return size // 10 if overlap is None else overlap


def _spans(count: int, size: int, scale: int, overlap: int | None) -> list[_Span]:
    margin, end = widening(size, overlap), count * size
    spans = []
    for start in range(0, end, size):
        wide = slice(max(start - margin, 0), min(start + size + margin, end))
        before = (start - wide.start) * scale
        place = slice(start * scale, (start + size) * scale)
        spans.append(_Span(wide, slice(before, before + size * scale), place))
    return spans


def _restore_tiled(
    network: Network, lq: Tensor, scale: int, tile: int | None, overlap: int | None, max_batch: int
) -> Tensor:
    batch, channels, height, width = lq.shape
    rows, columns = (1, 1) if tile is None else (height // tile + 1, width // tile + 1)
    tile_h, tile_w = -(-height // rows), -(-width // columns)
    lq = _reflect(_reflect(lq, 2, rows * tile_h), 3, columns * tile_w)

    groups = defaultdict(list)  # tiles of one size go through the network together
    for b, v, h in product(range(batch), _spans(rows, tile_h, scale, overlap), _spans(columns, tile_w, scale, overlap)):
        groups[v.wide.stop - v.wide.start, h.wide.stop - h.wide.start].append((b, v, h))
    output = None
    for group in groups.values():
        for start in range(0, len(group), max_batch):
            tiles = group[start : start + max_batch]
            restored = network(torch.stack([lq[b, :, v.wide, h.wide] for b, v, h in tiles]))
            if output is None:
                output = restored.new_empty(batch, channels, rows * tile_h * scale, columns * tile_w * scale)
            for (b, v, h), picture in zip(tiles, restored, strict=True):
                output[b, :, v.place, h.place] = picture[:, v.middle, h.middle]
    assert output is not None, "a picture has at least one tile"
    return output[:, :, : height * scale, : width * scale]


def _reflect(x: Tensor, dim: int, size: int) -> Tensor:
    """Extend to `size` by reflection at the last pixel, as `F.pad(mode="reflect")` does; goes to and fro if need be."""
    period = max(2 * (x.shape[dim] - 1), 1)
    place = torch.arange(size, device=x.device) % period
    return x.index_select(dim, torch.minimum(place, period - place))


def _transform(x: Tensor, transpose: bool, flip_v: bool, flip_h: bool, undo: bool = False) -> Tensor:
    """One of the eight symmetries of the square: transpose, then flip; undone in the other order."""
    dims = [dim for dim, flip in ((2, flip_v), (3, flip_h)) if flip]
    if transpose and not undo:
        x = x.transpose(2, 3)
    x = x.flip(dims)
    return x.transpose(2, 3) if transpose and undo else x


@contextmanager
def _evaluating(network: Network) -> Iterator[None]:
    if not isinstance(network, nn.Module):
        yield
        return
    modes = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
