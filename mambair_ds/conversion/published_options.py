"""Option files of the published training and test programs (BasicSR's YAML) as configurations of ours.

Every key is carried over, or named with what takes its place: nothing is dropped silently. Files with a train section
become runs, the others evaluations.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mambair_ds.config import EvaluationConfig, RunConfig, UserError, flatten, parse_yaml, validate

_TASKS = {"SR": "sr", "CAR": "jpeg", "denoising_color": "denoise", "denoising_gray": "denoise"}

# Keys that have no counterpart, by pattern, and what takes their place.
_INSTEAD = [
    (r"model_type|network_g\.img_size", "network.type says it"),
    (r"num_gpu|dist|dist_params\..*", "the launcher says it: deepspeed, torchrun, srun or plain python"),
    (r"scale", "network.upscale says it"),
    (r"datasets\.\w+\.(type|io_backend\..*|meta_info_file)", "training reads shards, validation plain folders"),
    (r"datasets\.\w+\.(use_shuffle|dataset_enlarge_ratio)", "shards are reshuffled every epoch, without an end"),
    (r"datasets\.\w+\.(num_worker_per_gpu|prefetch_mode|pin_memory)", "DALI reads them; see data.train.threads"),
    (r"datasets\.\w+\.(name|task|noise)", "said once, by task and the names of the sets"),
    (r"path\.resume_state", "a run goes on by itself; --resume names a checkpoint"),
    (r"path\.(root|experiments_root|results_root|log|visualization|models|training_states)", "see experiments_root"),
    (r"train\.pixel_opt\.reduction", "losses are means"),
    (r"train\.use_grad_clip", "see train.grad_clip, a number"),
    (r"val\.suffix", "pictures are named after the GT"),
    (r"val\.selfensemble_testing", "evaluate --self-ensemble"),
    (r"val\.(patchwise_testing|tile.*)", "tiles are cut as published; evaluate --tile, --overlap, --no-tiling"),
    (r"val\.(use_pbar|pbar|metrics\..*)", "PSNR and SSIM, on the channels and border of the first metric"),
    (r"logger\.wandb\.resume_id", "a run keeps its W&B run"),
    (r"find_unused_parameters", "every parameter is used"),
]


class Converted:
    """A converted file."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.settings: dict[str, Any] = {}
        """Our configuration, as YAML has it."""
        self.commands: list[str] = []
        """What packs the training pictures."""
        self.notes: list[str] = []
        """What was not carried over as it stood, and what takes its place."""

    def text(self) -> str:
        """Our YAML, under a comment of commands and notes."""
        head = [f"From {self.source}."]
        head += [f"Shards: {command}" for command in self.commands]
        head += self.notes
        comment = "".join(f"# {line}\n" for line in head)
        return comment + yaml.safe_dump(self.settings, sort_keys=False, default_flow_style=None, width=120)


def convert(path: Path, quality: int | None = None) -> Converted:
    """Convert an option file.

    Args:
        path: the YAML.
        quality: of JPEG, where the file has none: there the task's quality is just a part of folders' names.

    Raises:
        UserError: it cannot be read, or describes what has no counterpart at all, such as another network.
    """
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot read it: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict) or "network_g" not in tree or "datasets" not in tree:
        raise UserError(f"{path}: no option file of the published programs; expected network_g and datasets in it")
    return _Conversion(path, tree, quality).run()


class _Conversion:
    def __init__(self, path: Path, tree: dict[str, Any], quality: int | None) -> None:
        self.path = path
        self.left = flatten(tree)
        """Keys that nothing has asked for yet."""
        self.datasets: dict[str, dict[str, Any]] = {
            name: one for name, one in tree["datasets"].items() if isinstance(one, dict)
        }
        self.quality = quality
        self.out = Converted(path.name)

    def take(self, key: str, default: Any = None) -> Any:
        """The value of a key, which is dealt with thereby; None stands for an absent one."""
        value = self.left.pop(key, None)
        return default if value is None else value

    def run(self) -> Converted:
        settings = self.out.settings
        settings["name"] = re.sub(r"[^\w.+-]", "_", str(self.take("name", self.path.stem)))
        seed = self.take("manual_seed")
        trains = any(key.startswith("train.") for key in self.left)
        network = self.group("network_g")
        settings["network"] = network
        settings["task"] = self.task(int(network.get("upscale", 1)))
        start = self.start()
        if trains:
            if seed is not None:
                settings["seed"] = seed
            settings["data"] = {"train": self.train_data(network), "val": self.validation(network)}
            settings["train"] = self.training(start)
            settings["checkpoint"] = {"every": int(self.take("logger.save_checkpoint_freq", 5000))}
            settings["log"] = self.log()
            validate(settings, str(self.path), None, RunConfig)
        else:
            if start:
                settings["weights"] = start["path"]
            if seed is not None:
                self.out.notes.append(
                    f"manual_seed: {seed}: evaluation draws nothing but the published noise of seed 0"
                )
            settings["data"] = {"val": self.validation(network)}
            validate(settings, str(self.path), None, EvaluationConfig)
        self.rest()
        return self.out

    def group(self, prefix: str) -> dict[str, Any]:
        """All keys below a prefix."""
        keys = [key for key in self.left if key.startswith(f"{prefix}.")]
        return {key.removeprefix(f"{prefix}."): self.left.pop(key) for key in keys}

    def task(self, scale: int) -> dict[str, Any]:
        first = next(iter(self.datasets.values()), {})
        name = first.get("task", "SR")
        if name not in _TASKS:
            raise UserError(f"{self.path}: task {name!r} of the data; known are {', '.join(_TASKS)}")
        kind = _TASKS[name]
        if kind == "denoise":
            return {"kind": kind, "sigma": first.get("noise")}
        if kind == "jpeg":
            return {"kind": kind, "quality": self.quality or self.jpeg_quality(first)}
        return {"kind": kind}

    def jpeg_quality(self, data: Mapping[str, Any]) -> int:
        folder = Path(str(data.get("dataroot_lq") or "")).name
        named = re.search(r"_q(\d+)$", str(self.out.settings["name"]))
        if folder.isdecimal():
            return int(folder)
        if named:
            return int(named[1])
        raise UserError(f"{self.path}: says nothing of the JPEG quality; give --quality")

    def train_data(self, network: Mapping[str, Any]) -> dict[str, Any]:
        prefix = "datasets.train"
        name = str(self.datasets.get("train", {}).get("name", "train"))
        gts, lqs = (_list(self.take(f"{prefix}.{key}")) for key in ("dataroot_gt", "dataroot_lq"))
        template = self.take(f"{prefix}.filename_tmpl", "{}")
        scale, task = int(network.get("upscale", 1)), self.out.settings["task"]["kind"]
        shards = f"shards/{name}_x{scale}" if scale > 1 else f"shards/{name}"
        command = ["python", "-m", "mambair_ds.prepare", "--gt", *gts]
        if task == "sr" and lqs:
            command += ["--lq", *lqs, *(["--filename-tmpl", template] if template != "{}" else [])]
        elif task != "sr":
            self.out.notes.append(f"{prefix}.dataroot_lq: GT is degraded while training, as task says")
        if network.get("in_chans") == 1:
            command += ["--channels", "gray"]
        self.out.commands.append(shlex.join([*command, "--scale", str(scale), "--out", shards]))
        data: dict[str, Any] = {"shards": [shards]}
        for theirs, ours in (("gt_size", "gt_size"), ("batch_size_per_gpu", "batch_size")):
            data[ours] = self.take(f"{prefix}.{theirs}")
        for key in ("use_hflip", "use_rot"):
            data[key] = bool(self.take(f"{prefix}.{key}", False))
        return data

    def validation(self, network: Mapping[str, Any]) -> dict[str, Any]:
        sets = {}
        task = self.out.settings["task"]["kind"]
        for key, data in self.datasets.items():
            if key == "train":
                continue
            prefix = f"datasets.{key}"
            gt, lq = self.take(f"{prefix}.dataroot_gt"), self.take(f"{prefix}.dataroot_lq")
            one = {"gt": gt}
            if task == "denoise" or lq == gt:
                self.out.notes.append(f"{prefix}.dataroot_lq: made from GT, as task says")
                self.take(f"{prefix}.filename_tmpl")
            else:
                one |= {"lq": lq, "filename_tmpl": self.take(f"{prefix}.filename_tmpl", "{}")}
            sets[re.sub(r"[^\w.+-]", "_", str(data.get("name", key)))] = one
        metrics = [
            key.removesuffix(".crop_border")
            for key in self.left
            if re.fullmatch(r"val\.metrics\.\w+\.crop_border", key)
        ]
        first = metrics[0] if metrics else "val.metrics.psnr"
        border, y_channel = self.take(f"{first}.crop_border", 0), self.take(f"{first}.test_y_channel", False)
        frequency = self.take("val.val_freq")
        return {
            **({} if frequency is None else {"every": int(frequency)}),
            "crop_border": border,
            "test_y_channel": y_channel,
            "save_img": bool(self.take("val.save_img", False)),
            "sets": sets,
        }

    def start(self) -> dict[str, Any] | None:
        path = self.take("path.pretrain_network_g")
        strict, key = self.take("path.strict_load_g", True), self.take("path.param_key_g", "params")
        return None if path is None else {"path": path, "strict": strict, "param_key": key}

    def training(self, start: dict[str, Any] | None) -> dict[str, Any]:
        train: dict[str, Any] = {"total_iter": int(self.take("train.total_iter", 0))}
        train["optim"] = self.group("train.optim_g")
        train["scheduler"] = self.group("train.scheduler")
        train["warmup_iter"] = max(0, int(self.take("train.warmup_iter", 0)))
        pixel = {key: self.take(f"train.pixel_opt.{key}") for key in ("type", "loss_weight", "eps")}
        train["pixel_loss"] = {key: value for key, value in pixel.items() if value is not None}
        reduction = self.left.get("train.pixel_opt.reduction")
        if reduction not in (None, "mean"):
            raise UserError(f"{self.path}: train.pixel_opt.reduction {reduction}; only mean has a counterpart")
        train["ema_decay"] = self.take("train.ema_decay", 0.0)
        if start:
            train["pretrain"] = start
        return train

    def log(self) -> dict[str, Any]:
        log: dict[str, Any] = {"print_freq": int(self.take("logger.print_freq", 100))}
        log["tensorboard"] = bool(self.take("logger.use_tb_logger", False))
        if project := self.take("logger.wandb.project"):
            log["wandb"] = {"project": project}
        return log

    def rest(self) -> None:
        """Name every key that nothing has asked for and that says something."""
        for key, value in self.left.items():
            if value is None:
                continue
            instead = next((text for pattern, text in _INSTEAD if re.fullmatch(pattern, key)), "no counterpart")
            self.out.notes.append(f"{key}: {value}: {instead}")


def _list(value: Any) -> list[str]:
    return [] if value is None else [str(one) for one in value] if isinstance(value, list) else [str(value)]
