"""Weights in and out: the published ``.pth`` layout ``{params, params_ema}``, and safetensors.

A file is read without executing anything in it, and written so that it is either whole or not there.
"""

import io
import logging
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn

from mambair_ds.config import NetworkConfig, UserError
from mambair_ds.files import write_whole
from mambair_ds.models import build_model
from mambair_ds.models.mambairv2 import MambaIRv2

logger = logging.getLogger(__name__)

_SHUFFLE_WEIGHT = re.compile(r"upsample\.\d+\.weight")
_SHOWN = 5  # differences that an error spells out


def open_network(path: str | Path, *, param_key: str = "params", config: NetworkConfig | None = None) -> MambaIRv2:
    """The network that a weight file belongs to, with its weights, in evaluation mode on the CPU.

    Args:
        path: as in `load_network`; or a run's folder, whose newest models/net_g_ITER.pth is taken.
        param_key: "params" or "params_ema" of a .pth.
        config: the network; None reads it off the tensors, see `describe_weights`.

    Raises:
        UserError: the file is missing, broken, or no MambaIRv2 of this configuration.
    """
    path = weight_file(path)
    if config is None:
        config = describe_weights(read_weights(path, param_key), str(path))
    network = build_model(config)
    load_network(network, path, param_key=param_key)
    return network.eval()


def weight_file(path: str | Path) -> Path:
    """The file itself, or the newest models/net_g_ITER.pth of a run's folder (or of its models folder).

    Raises:
        UserError: a folder without such a file.
    """
    path = Path(path)
    if not path.is_dir():
        return path
    found = [file for folder in (path / "models", path) for file in folder.glob("net_g_*.pth")]
    numbered = [(int(file.stem[6:]), file) for file in found if file.stem[6:].isdecimal()]
    if not numbered:
        raise UserError(f"{path}: no models/net_g_ITER.pth in this folder; expected a weight file or a run's folder")
    return max(numbered)[1]


def describe_weights(weights: Mapping[str, Tensor], source: str) -> NetworkConfig:
    """The configuration that tensors' names and shapes tell.

    All of it but `img_range`, which leaves no trace in the weights and is 1 as in every published network; give a
    configuration where it is not. `mlp_ratio` may differ from the one configured as long as it means the same width.

    Raises:
        UserError: the tensors are of no MambaIRv2.
    """
    first = "layers.0.residual_group.layers.0."
    try:
        dim, in_chans = weights["conv_first.weight"].shape[:2]
        hidden = weights[first + "convffn1.fc1.weight"].shape[0]
        depths: dict[int, int] = {}
        heads: dict[int, int] = {}
        for key, tensor in weights.items():
            if match := re.fullmatch(r"layers\.(\d+)\.residual_group\.layers\.(\d+)\.win_mhsa\.relative_.*_table", key):
                stage = int(match[1])
                depths[stage] = max(depths.get(stage, 0), int(match[2]) + 1)
                heads[stage] = tensor.shape[1]
        light = first + "convffn1.sg.conv.weight" in weights
        depthwise = "convffn1.sg.conv.weight" if light else "convffn1.dwconv.depthwise_conv.0.weight"
        tokens, rank = weights[first + "assm.embeddingB.weight"].shape
        upsampler, upscale = _describe_head(weights, in_chans)
        return NetworkConfig.model_validate(
            {
                "type": "MambaIRv2Light" if light else "MambaIRv2",
                "upscale": upscale,
                "upsampler": upsampler,
                "in_chans": in_chans,
                "embed_dim": dim,
                "d_state": weights[first + "assm.selectiveScan.A_logs"].shape[1],
                "depths": [depths[stage] for stage in sorted(depths)],
                "num_heads": [heads[stage] for stage in sorted(heads)],
                "window_size": round(weights["relative_position_index_SA"].shape[0] ** 0.5),
                "inner_rank": rank,
                "num_tokens": tokens,
                "convffn_kernel_size": weights[first + depthwise].shape[-1],
                # Half a channel more where the quotient would round down to one channel less.
                "mlp_ratio": hidden / dim if int(dim * (hidden / dim)) == hidden else (hidden + 0.5) / dim,
                "qkv_bias": first + "wqkv.bias" in weights,
                "resi_connection": "1conv" if "conv_after_body.weight" in weights else "3conv",
            }
        )
    except (KeyError, ValueError) as error:
        reason = f"no tensor {error}" if isinstance(error, KeyError) else str(error).split("\n")[0]
        raise UserError(f"{source}: not the weights of a MambaIRv2 ({reason})") from error


def _describe_head(weights: Mapping[str, Tensor], in_chans: int) -> tuple[str, int]:
    """Upsampler and scale."""
    if "conv_up1.weight" in weights:
        return "nearest+conv", 4
    if "upsample.0.weight" not in weights:
        return "", 1
    if "conv_last.weight" not in weights:
        return "pixelshuffledirect", round((weights["upsample.0.weight"].shape[0] / in_chans) ** 0.5)
    steps = [tensor.shape[0] // tensor.shape[1] for key, tensor in weights.items() if _SHUFFLE_WEIGHT.fullmatch(key)]
    return "pixelshuffle", round(math.prod(steps) ** 0.5)


def load_network(network: nn.Module, path: str | Path, *, strict: bool = True, param_key: str = "params") -> list[str]:
    """Load a weight file into a network.

    Args:
        network: takes the weights, in its own dtypes and on its own devices.
        path: a .pth of the published layout (or a bare state dict), or a .safetensors file.
        strict: refuse any difference. Otherwise tensors that are missing, unknown or of another shape are skipped, as
            the published ``strict_load_g: false`` does to start one scale from another.
        param_key: the weights of a .pth to take: "params" or "params_ema" (a file without a mean gives its params).

    Returns:
        What was skipped and why, a line a tensor; empty if strict. The same is logged.

    Raises:
        UserError: the file is missing, broken or not of weights; it differs (strict) or has nothing in common.
    """
    path = Path(path)
    tensors = read_weights(path, param_key)
    state = network.state_dict()
    fitting, differences = {}, []
    for key, tensor in state.items():
        if key not in tensors:
            differences.append(f"{key}: not in the file, the network has {_shape(tensor)}")
        elif tensors[key].shape != tensor.shape:
            differences.append(f"{key}: {_shape(tensors[key])} in the file, {_shape(tensor)} in the network")
        else:
            fitting[key] = tensors[key]
    differences += [
        f"{key}: {_shape(tensors[key])} in the file, not in the network" for key in tensors.keys() - state.keys()
    ]
    if differences and (strict or not fitting):
        shown = "\n  ".join(differences[:_SHOWN])
        more = f"\n  and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        raise UserError(
            f"{path}: weights of another network: {len(fitting)} of {len(state)} tensors fit, and these differ:\n"
            f"  {shown}{more}"
        )
    network.load_state_dict(fitting, strict=False)
    logger.info("Loaded %d of %d tensors from %s", len(fitting), len(state), path)
    for line in differences:
        logger.info("Skipped %s", line)
    return differences


def read_weights(path: str | Path, param_key: str = "params") -> dict[str, Tensor]:
    """The tensors of a weight file by name, on the CPU, without a leading ``module.``; see `load_network`.

    Raises:
        UserError: the file is missing, broken or not of weights.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror or error}") from error
    try:
        content: Any
        if path.suffix == ".safetensors":
            content = load_safetensors(data)
        else:
            content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # unpicklers raise whatever they like on broken bytes
        reason = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        raise UserError(f"{path}: broken, or no file of weights: {reason}") from error
    if isinstance(content, dict) and "params" in content:
        if param_key not in content:
            logger.info("%s has no %s, taking its params", path, param_key)
            param_key = "params"
        content = content[param_key]
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{path}: no weights in it; expected params, params_ema or tensors by name")
    return {key.removeprefix("module."): value for key, value in content.items()}


def save_network(path: str | Path, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a weight file, atomically: a reader finds the old file or the new one.

    Args:
        path: ends in .pth, or in .safetensors, which holds one set of tensors only. Its folder is made if need be.
        weights: state dicts by the published names: "params" and perhaps "params_ema".

    Raises:
        UserError: the file cannot be written; a file that was there before is untouched.
        ValueError: more than one set of weights for safetensors.
    """
    path = Path(path)
    sets = {name: {key: tensor.detach().cpu() for key, tensor in state.items()} for name, state in weights.items()}
    if path.suffix == ".safetensors":
        (tensors,) = sets.values()
        data = dump_safetensors({key: tensor.contiguous() for key, tensor in tensors.items()})
    else:
        buffer = io.BytesIO()
        torch.save(sets, buffer)
        data = buffer.getvalue()
    try:
        write_whole(path, data)
    except OSError as error:
        raise UserError(f"{path}: cannot write it: {error.strerror or error}") from error


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a scalar"
