"""Weights from wherever they lie, and the card that goes with an export."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from mambair_ds.config import NetworkConfig, UserError
from mambair_ds.files import write_whole
from mambair_ds.models import build_model
from mambair_ds.models.mambairv2 import MambaIRv2
from mambair_ds.weights import describe_weights, read_weights, weight_file


@dataclass(frozen=True)
class Source:
    """Weights and what is known of them."""

    path: Path
    """The file or folder they lie in."""
    network: NetworkConfig
    sets: Mapping[str, Mapping[str, Tensor]]
    """State dicts in the published layout: params, and params_ema if there is a running mean."""
    run: Mapping[str, Any] | None
    """The configuration of the run that made them, if it lies beside them."""
    iteration: int | None
    """Optimizer steps, if known."""

    def chosen(self, key: str) -> tuple[str, Mapping[str, Tensor]]:
        """The set of that name, or params where there is none, with its name."""
        key = key if key in self.sets else "params"
        return key, self.sets[key]

    def build(self, key: str) -> MambaIRv2:
        """The network with a set's weights, in evaluation mode."""
        network = build_model(self.network)
        network.load_state_dict(self.chosen(key)[1])
        return network.eval()


def read(path: Path) -> Source:
    """Read weights.

    Args:
        path: a .pth or .safetensors; a run's folder, whose newest weights are taken; or a checkpoint's folder.

    Raises:
        UserError: it is missing, broken or of no MambaIRv2.
    """
    if (path / "manifest.json").is_file():
        return _from_checkpoint(path)
    file = weight_file(path)
    sets = {"params": read_weights(file)}
    if file.suffix != ".safetensors":
        mean = read_weights(file, "params_ema")
        if any(not torch.equal(tensor, sets["params"][key]) for key, tensor in mean.items()):
            sets["params_ema"] = mean
    run = _configuration(file.parent.parent / "config.yml")
    number = file.stem.removeprefix("net_g_")
    network = NetworkConfig.model_validate(run["network"]) if run else describe_weights(sets["params"], str(file))
    return Source(file, network, sets, run, int(number) if number.isdecimal() else None)


def _from_checkpoint(path: Path) -> Source:
    # Imports DeepSpeed, whose arrangement of tensors a checkpoint undoes.
    from mambair_ds.training import checkpoint as checkpoints

    checkpoint = checkpoints.read(path, checksums=True)
    run = checkpoint.manifest["config"]
    network = NetworkConfig.model_validate(run["network"])
    saved = checkpoints.read_tensors(checkpoint)
    template = build_model(network).state_dict()
    sets: dict[str, dict[str, Tensor]] = {
        kind: {
            key: saved[kind][key].view(tensor.shape) if key in saved[kind] else tensor
            for key, tensor in template.items()
        }
        for kind in ("params", "params_ema")
        if kind in saved
    }
    return Source(path, network, sets, run, checkpoint.iteration)


def _configuration(path: Path) -> Mapping[str, Any] | None:
    if not path.is_file():
        return None
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict) or "network" not in tree:
        raise UserError(f"{path}: expected the configuration of the run that wrote the weights beside it")
    return tree


def write_card(path: Path, source: Source, key: str, facts: Mapping[str, str]) -> Path:
    """Write a model card beside an export; returns its path.

    Args:
        path: the export.
        source: where its weights are from.
        key: the set that was exported, or "params and params_ema".
        facts: more rows of its table.

    Raises:
        UserError: it cannot be written.
    """
    network, run = source.network, source.run or {}
    task = run.get("task", {})
    known = {k: v for k, v in task.items() if v is not None}
    rows = {
        "File": f"`{path.name}`, SHA-256 `{hashlib.sha256(path.read_bytes()).hexdigest()}`",
        "Network": f"{network.type}, x{network.upscale}, {'RGB' if network.in_chans == 3 else 'grey'}",
        "Parameters": f"{sum(p.numel() for p in build_model(network).parameters()):,}",
        "Weights": key,
        "Trained": f"run {run['name']}" if run else "not recorded beside the weights",
        "Task": ", ".join(f"{k} {v}" for k, v in known.items()) if known else "not recorded",
        "Iterations": f"{source.iteration:,}" if source.iteration is not None else "not recorded",
        **facts,
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
    settings = yaml.safe_dump(
        dict(run) or {"network": network.model_dump()}, sort_keys=False, default_flow_style=None, width=100
    )
    text = (
        f"# {path.stem}\n\n"
        "MambaIRv2 image restoration (Guo et al., CVPR 2025, arXiv 2411.15269), exported by mambair_ds.\n\n"
        f"| | |\n| --- | --- |\n{table}\n"
        "Input: a picture in [0, 1], (batch, channels, height, width). Output: the restored picture, about [0, 1]; "
        "clamp it.\n\n"
        f"## Settings\n\n```yaml\n{settings}```\n"
    )
    card = path.with_suffix(".md")
    try:
        write_whole(card, text.encode())
    except OSError as error:
        raise UserError(f"{card}: cannot write it: {error.strerror or error}") from error
    return card
