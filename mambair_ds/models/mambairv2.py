"""MambaIRv2 (Guo et al., CVPR 2025, arXiv 2411.15269), readable from top to bottom: picture in, restored picture out.

Parameter names, shapes and their order are the published ones, so that published checkpoints load. Activations are
(B, H, W, C) between the first and the last convolution.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from mambair_ds.config import NetworkConfig
from mambair_ds.kernels.philox import NoiseKey
from mambair_ds.kernels.window_attention.reference import relative_position_index
from mambair_ds.models.attention import WindowAttention
from mambair_ds.models.layout import convolve, project
from mambair_ds.models.state_space import AttentiveStateSpace

_HEAD_WIDTH = 64  # channels of the pixelshuffle and nearest+conv heads
_RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K

FeedForward = Callable[[int, int, int], nn.Module]  # dim, hidden width, kernel size


class MambaIRv2(nn.Module):
    """The network. In training mode routing is noisy, in evaluation mode it is not.

    Args:
        config: the published ``network_g`` keys.
        feed_forward: class of the feed-forward blocks.
        scan_backend: backend of the selective scan; None chooses by device.
    """

    def __init__(self, config: NetworkConfig, feed_forward: FeedForward, scan_backend: str | None = None) -> None:
        super().__init__()
        self.config = config
        dim = config.embed_dim
        # A part of every published checkpoint, though the attention here does without.
        self.register_buffer("relative_position_index_SA", relative_position_index(config.window_size))
        self.conv_first = nn.Conv2d(config.in_chans, dim, 3, padding=1)
        self.patch_embed = nn.ModuleDict({"norm": nn.LayerNorm(dim)})  # the nesting is that of the published names
        self.layers = nn.ModuleList()
        for stage, depth in enumerate(config.depths):
            self.layers.append(Stage(config, stage, sum(config.depths[:stage]), depth, feed_forward, scan_backend))
        self.norm = nn.LayerNorm(dim)
        self.conv_after_body = _residual_conv(dim, config.resi_connection)
        self._build_head()
        self.apply(_initialize)

    def forward(self, x: Tensor, noise: NoiseKey | None = None) -> Tensor:
        """Restore a batch of pictures of any size.

        Args:
            x: (B, in_chans, H, W) in [0, 1].
            noise: training mode: key of the routing noise; None draws from torch's global generator, as published.

        Returns:
            (B, in_chans, H·upscale, W·upscale), about [0, 1], not clamped.
        """
        height, width = x.shape[2:]
        mean = channel_mean(self.config.in_chans, x.device)
        x = (pad_to_windows(x, self.config.window_size) - mean) * self.config.img_range
        x = self._reconstruct(x, noise)
        x = x / self.config.img_range + mean
        return x[:, :, : height * self.config.upscale, : width * self.config.upscale]

    def _deep(self, x: Tensor, noise: NoiseKey | None) -> Tensor:
        """conv_first and the stages: (B, in_chans, H, W) to features (B, dim, H, W)."""
        x = x.to(self.conv_first.weight.dtype, memory_format=torch.channels_last)
        shallow = self.conv_first(x)
        norm = self.patch_embed["norm"]
        # The stream that layers add to is as wide as the weights: autocast leaves it so on a GPU, but not on a CPU.
        x = norm(shallow.permute(0, 2, 3, 1)).to(norm.weight.dtype)
        for stage in self.layers:
            x = stage(x, noise)
        return self.conv_after_body(self.norm(x).permute(0, 3, 1, 2)) + shallow

    def _build_head(self) -> None:
        config, dim, width = self.config, self.config.embed_dim, _HEAD_WIDTH
        if config.upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(*_shuffle_step(dim, config.in_chans, config.upscale))
            return
        if config.upsampler == "":
            self.conv_last = nn.Conv2d(dim, config.in_chans, 3, padding=1)
            return
        self.conv_before_upsample = nn.Sequential(nn.Conv2d(dim, width, 3, padding=1), nn.LeakyReLU(0.01))
        if config.upsampler == "pixelshuffle":
            steps = [3] if config.upscale == 3 else [2] * (config.upscale.bit_length() - 1)
            self.upsample = nn.Sequential(*(module for step in steps for module in _shuffle_step(width, width, step)))
        else:
            self.conv_up1 = nn.Conv2d(width, width, 3, padding=1)
            self.conv_up2 = nn.Conv2d(width, width, 3, padding=1)
            self.conv_hr = nn.Conv2d(width, width, 3, padding=1)
        self.conv_last = nn.Conv2d(width, config.in_chans, 3, padding=1)

    def _reconstruct(self, x: Tensor, noise: NoiseKey | None) -> Tensor:
        """The normalized picture (B, in_chans, H, W) to the restored one, still normalized."""
        features = self._deep(x, noise)
        upsampler = self.config.upsampler
        if upsampler == "":
            return x + self.conv_last(features)
        if upsampler == "pixelshuffledirect":
            return self.upsample(features)
        features = self.conv_before_upsample(features)
        if upsampler == "pixelshuffle":
            return self.conv_last(self.upsample(features))
        for conv in (self.conv_up1, self.conv_up2):
            features = F.leaky_relu(conv(F.interpolate(features, scale_factor=2, mode="nearest")), 0.2)
        return self.conv_last(F.leaky_relu(self.conv_hr(features), 0.2))


class Stage(nn.Module):
    """Attentive layers, a convolution, and a way around both."""

    def __init__(
        self,
        config: NetworkConfig,
        stage: int,
        first_index: int,
        depth: int,
        feed_forward: FeedForward,
        scan_backend: str | None,
    ) -> None:
        super().__init__()
        self.use_checkpoint = config.use_checkpoint
        layers = nn.ModuleList(
            AttentiveLayer(config, config.num_heads[stage], bool(j % 2), first_index + j, feed_forward, scan_backend)
            for j in range(depth)
        )
        self.residual_group = nn.ModuleDict({"layers": layers})  # the nesting is that of the published names
        self.conv = _residual_conv(config.embed_dim, config.resi_connection)

    def forward(self, x: Tensor, noise: NoiseKey | None) -> Tensor:
        shortcut = x
        for layer in self.residual_group["layers"].children():
            if self.use_checkpoint and torch.is_grad_enabled():
                # Keyed noise is drawn again by its key; only the published draw needs the generator's state.
                settings: dict[str, Any] = {"context_fn": _SELECTIVE} if self.use_checkpoint == "selective" else {}
                x = checkpoint(layer, x, noise, use_reentrant=False, preserve_rng_state=noise is None, **settings)
            else:
                x = layer(x, noise)
        return convolve(self.conv, x) + shortcut


def _keep_slow(_context: object, operator: torch._ops.OpOverload, *_: object, **__: object) -> CheckpointPolicy:
    """Keep what scan and attention give; everything else is quickly computed again."""
    slow = operator.name().startswith(("mambair_ds::selective_scan", "mambair_ds::window_attention"))
    return CheckpointPolicy.MUST_SAVE if slow else CheckpointPolicy.PREFER_RECOMPUTE


_SELECTIVE = functools.partial(create_selective_checkpoint_contexts, _keep_slow)


class AttentiveLayer(nn.Module):
    """Window attention, then the attentive state space module, each followed by a feed-forward block and a scaled
    way around."""

    def __init__(
        self,
        config: NetworkConfig,
        num_heads: int,
        shifted: bool,
        index: int,
        feed_forward: FeedForward,
        scan_backend: str | None,
    ) -> None:
        super().__init__()
        dim, hidden = config.embed_dim, int(config.embed_dim * config.mlp_ratio)
        self.scale1 = nn.Parameter(torch.full((dim,), 1e-4))
        self.scale2 = nn.Parameter(torch.full((dim,), 1e-4))
        self.norm1 = nn.LayerNorm(dim)
        self.norm2 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.norm4 = nn.LayerNorm(dim)
        self.wqkv = nn.Linear(dim, 3 * dim, bias=config.qkv_bias)
        self.win_mhsa = WindowAttention(dim, config.window_size, num_heads, shifted)
        self.assm = AttentiveStateSpace(
            dim, hidden, config.d_state, config.inner_rank, config.num_tokens, index, scan_backend
        )
        self.convffn1 = feed_forward(dim, hidden, config.convffn_kernel_size)
        self.convffn2 = feed_forward(dim, hidden, config.convffn_kernel_size)
        self.embeddingA = nn.Embedding(config.inner_rank, config.d_state)
        nn.init.uniform_(self.embeddingA.weight, -1 / config.inner_rank, 1 / config.inner_rank)

    def forward(self, x: Tensor, noise: NoiseKey | None) -> Tensor:
        y = self.win_mhsa(project(self.wqkv, x, self.norm1), residual=x)
        x = self.convffn1(y, self.norm2, x, self.scale1)
        z = self.assm(x, self.norm3, self.embeddingA.weight, noise)
        return self.convffn2(z, self.norm4, x, self.scale2)


def pad_to_windows(x: Tensor, size: int) -> Tensor:
    """Extend (B, C, H, W) below and to the right to multiples of `size`: picture, flipped picture, picture, and so on.

    The flip repeats the border pixel, unlike `F.pad(mode="reflect")`, as published; that a small picture goes on
    repeating is ours.
    """
    for dim in (2, 3):
        side = x.shape[dim]
        if torch.compiler.is_exporting() or side % size:  # an exported network takes any size
            place = torch.arange((side + size - 1) // size * size, device=x.device) % (2 * side)
            x = x.index_select(dim, torch.minimum(place, 2 * side - 1 - place))
    return x


def channel_mean(in_chans: int, device: torch.device) -> Tensor:
    """What is subtracted from a picture, (1, in_chans, 1, 1) float32. No buffer: no cast of the network rounds it."""
    mean = _RGB_MEAN if in_chans == 3 else (0.0,)
    return torch.cat([torch.full((1, 1, 1, 1), value, device=device) for value in mean], 1)  # copied from no host


def _residual_conv(dim: int, kind: str) -> nn.Module:
    if kind == "1conv":
        return nn.Conv2d(dim, dim, 3, padding=1)
    return nn.Sequential(
        nn.Conv2d(dim, dim // 4, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(dim // 4, dim // 4, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(dim // 4, dim, 3, padding=1),
    )


def _shuffle_step(dim: int, out_dim: int, scale: int) -> list[nn.Module]:
    return [nn.Conv2d(dim, out_dim * scale**2, 3, padding=1), nn.PixelShuffle(scale)]


def _initialize(module: nn.Module) -> None:
    """Linear layers as published. Convolutions and norms keep PyTorch's default, others are drawn where made."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
