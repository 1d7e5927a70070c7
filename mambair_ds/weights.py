"""Weights in and out: the published ``.pth`` layout ``{params, params_ema}``, and safetensors.

A file is read without executing anything in it, and written so that it is either whole or not there.
"""

import io
import logging
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as dump_safetensors
from torch import Tensor, nn

from mambair_ds.config import UserError

logger = logging.getLogger(__name__)

_SHOWN = 5  # differences that an error spells out


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
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError, SafetensorError) as error:
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
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot write it: {error.strerror or error}") from error


def _shape(tensor: Tensor) -> str:
    return "×".join(map(str, tensor.shape)) or "a scalar"
