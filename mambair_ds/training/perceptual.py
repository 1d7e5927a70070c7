"""The perceptual loss: distance of VGG19's features (Johnson et al. 2016, arXiv 1603.08155)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mambair_ds.config import PerceptualConfig, UserError
from mambair_ds.weights import read_weights

_BLOCKS = (2, 2, 4, 4, 4)  # convolutions between two poolings
_WIDTHS = (64, 128, 256, 512, 512)
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which it was trained on


class PerceptualLoss(nn.Module):
    """Weighted L1 distance of features before their activation, as BasicSR takes it; the network is frozen."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: PerceptualConfig) -> None:
        """Read torchvision's weights, up to the last layer that counts.

        Raises:
            UserError: the file cannot be read or is not VGG19's.
        """
        super().__init__()
        self.config = config
        weights = read_weights(config.weights)
        self.features = nn.ModuleDict()
        index, inputs, last = 0, 3, max(config.layer_weights)
        for block, (count, width) in enumerate(zip(_BLOCKS, _WIDTHS, strict=True), 1):
            for number in range(1, count + 1):
                conv = nn.Conv2d(inputs, width, 3, padding=1)
                try:
                    conv.load_state_dict({key: weights[f"features.{index}.{key}"] for key in ("weight", "bias")})
                except (KeyError, RuntimeError) as error:
                    raise UserError(
                        f"{config.weights}: not torchvision's VGG19: features.{index} does not fit"
                    ) from error
                self.features[f"conv{block}_{number}"] = conv
                index, inputs = index + 2, width  # each with its ReLU
                if f"conv{block}_{number}" == last:
                    break
            else:
                index += 1  # the pooling
                continue
            break
        self.register_buffer("mean", torch.tensor(_MEAN).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(_STD).view(1, 3, 1, 1))
        self.requires_grad_(False).eval()

    def forward(self, output: Tensor, gt: Tensor) -> Tensor:
        """The loss of float32 (B, C, H, W) in [0, 1]; grey is repeated."""
        x, y = ((p.expand(-1, 3, -1, -1) - self.mean) / self.std for p in (output, gt))
        total, block = output.new_zeros(()), "1"
        for name, conv in self.features.items():
            if name[4] != block:
                block = name[4]
                x, y = (nn.functional.max_pool2d(p, 2) for p in (x, y))
            x, y = conv(x), conv(y)
            if name in self.config.layer_weights:
                total = total + self.config.layer_weights[name] * (x - y).abs().mean()
            x, y = x.relu(), y.relu()
        return self.config.loss_weight * total
