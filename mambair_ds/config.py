"""The one schema of a run: every setting is a typed, documented field here, and nowhere else.

A run is a YAML file plus dotted overrides (``--set train.total_iter=1000``). `load_config` reads both, checks every key
and type, and raises one readable `UserError` that names the file, the key and what was expected. Defaults live in
these fields only: no other module carries one. This module imports neither torch nor numpy, so that a mistake in a
file is reported before anything heavy starts.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, overload

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]


class UserError(Exception):
    """A user's mistake. The message is one readable text: what is wrong, where, and what was expected.

    Every door prints it without a traceback and exits with code 2.
    """


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=())


class NetworkConfig(_Schema):
    """The network, with the key names of the published ``network_g`` option."""

    type: Literal["MambaIRv2", "MambaIRv2Light"]
    """MambaIRv2 (Small, Base, Large) or MambaIRv2Light (gated MLP instead of ConvFFN)."""
    upscale: PositiveInt
    """Output size over input size; 1 for denoising and JPEG repair."""
    in_chans: Literal[1, 3] = 3
    """Picture channels: 3 (RGB) or 1 (grey)."""
    img_size: PositiveInt = 64
    """Nominal LQ patch size of the published files. Accepted and kept, but nothing depends on it: any size works."""
    img_range: PositiveFloat = 1.0
    """Range that the input in [0, 1] is stretched to inside the network."""
    embed_dim: PositiveInt
    """Width C of the token stream."""
    d_state: PositiveInt
    """State size N of the selective scan."""
    depths: Annotated[list[PositiveInt], Field(min_length=1)]
    """Attentive layers per stage."""
    num_heads: Annotated[list[PositiveInt], Field(min_length=1)]
    """Attention heads per stage; each must divide embed_dim."""
    window_size: Annotated[int, Field(ge=2, multiple_of=2)] = 16
    """Side of the attention window in tokens."""
    inner_rank: PositiveInt
    """Rank r of the prompt table P = B·A."""
    num_tokens: Annotated[int, Field(gt=1, le=256)]
    """Number T of token classes, the rows of the prompt table."""
    convffn_kernel_size: Annotated[int, Field(gt=0)] = 5
    """Kernel of the depthwise convolution in the feed-forward blocks (odd)."""
    mlp_ratio: PositiveFloat = 2.0
    """Hidden width over embed_dim."""
    qkv_bias: bool = True
    """Whether the query, key and value projection has a bias."""
    upsampler: Literal["", "pixelshuffle", "pixelshuffledirect", "nearest+conv"] = ""
    """Reconstruction head; "" adds the output to the input (upscale 1)."""
    resi_connection: Literal["1conv", "3conv"] = "1conv"
    """Convolution at the end of a stage: one 3x3, or a bottleneck of three."""
    use_checkpoint: bool | Literal["selective"] = False
    """Recompute every attentive layer in the backward pass instead of storing its activations; selective keeps the
    results of scan and attention, the layer's slow parts."""

    @model_validator(mode="after")
    def _consistent(self) -> NetworkConfig:
        if len(self.depths) != len(self.num_heads):
            raise ValueError(f"depths has {len(self.depths)} stages but num_heads has {len(self.num_heads)}")
        if any(self.embed_dim % heads for heads in self.num_heads):
            raise ValueError(f"embed_dim {self.embed_dim} is not divisible by every num_heads {self.num_heads}")
        if self.convffn_kernel_size % 2 == 0:
            raise ValueError(f"convffn_kernel_size must be odd, not {self.convffn_kernel_size}")
        if self.type == "MambaIRv2Light" and int(self.embed_dim * self.mlp_ratio) % 2:
            raise ValueError(
                f"embed_dim {self.embed_dim} times mlp_ratio {self.mlp_ratio} must be even: its gate halves it"
            )
        if self.upsampler == "" and self.upscale != 1:
            raise ValueError(f"upscale {self.upscale} needs an upsampler")
        if self.upsampler == "nearest+conv" and self.upscale != 4:
            raise ValueError(f"upsampler nearest+conv is a x4 head, upscale is {self.upscale}")
        if self.upsampler == "pixelshuffle" and self.upscale != 3 and self.upscale & (self.upscale - 1):
            raise ValueError(f"upsampler pixelshuffle scales by 3 or a power of two, not by {self.upscale}")
        return self


Range = tuple[float, float]
Probability = Annotated[float, Field(ge=0, le=1)]


class DegradationStage(_Schema):
    """One round of blur, resize, noise and JPEG, with the option names of Real-ESRGAN."""

    blur_prob: Probability = 1.0
    """How often there is a blur."""
    sinc_prob: Probability = 0.1
    """How often it is a sinc filter."""
    kernel_prob: tuple[Probability, Probability, Probability, Probability, Probability, Probability] = (
        0.45, 0.25, 0.12, 0.03, 0.12, 0.03,
    )  # fmt: skip
    """Else: shares of round and elliptic Gaussian, generalized Gaussian, and plateau kernels."""
    blur_sigma: Range = (0.2, 3.0)
    """Standard deviation of the kernels, in pixels."""
    betag_range: Range = (0.5, 4.0)
    """Exponent of generalized Gaussian kernels."""
    betap_range: Range = (1.0, 2.0)
    """Exponent of plateau kernels."""
    resize_prob: tuple[Probability, Probability, Probability] = (0.2, 0.7, 0.1)
    """Shares of enlarging, reducing and neither."""
    resize_range: Range = (0.15, 1.5)
    """Smallest and largest factor."""
    gaussian_noise_prob: Probability = 0.5
    """Share of Gaussian noise; the rest is Poisson noise."""
    noise_range: Range = (1.0, 30.0)
    """Standard deviation of Gaussian noise, in grey levels of 255."""
    poisson_scale_range: Range = (0.05, 3.0)
    """Factor on Poisson noise."""
    gray_noise_prob: Probability = 0.4
    """How often all channels get the same noise."""
    jpeg_range: Range = (30.0, 95.0)
    """JPEG quality."""

    @model_validator(mode="after")
    def _ordered(self) -> DegradationStage:
        for key in ("kernel_prob", "resize_prob"):
            if abs(sum(getattr(self, key)) - 1) > 1e-6:
                raise ValueError(f"{key} sums to {sum(getattr(self, key)):g}, not to 1")
        for key in (
            "blur_sigma",
            "betag_range",
            "betap_range",
            "resize_range",
            "noise_range",
            "poisson_scale_range",
            "jpeg_range",
        ):
            low, high = getattr(self, key)
            if not 0 <= low <= high:
                raise ValueError(f"{key} {low:g} to {high:g} is no range")
        return self


class DegradationConfig(_Schema):
    """How LQ is made from GT while training, in place of the shards' LQ."""

    type: Literal["bicubic", "second_order"]
    """bicubic: MATLAB's rule, of the crop; second_order: the chain of Real-ESRGAN for pictures of the real world."""
    first: DegradationStage = DegradationStage()
    """second_order: the first round."""
    second: DegradationStage = DegradationStage(
        blur_prob=0.8, blur_sigma=(0.2, 1.5), resize_prob=(0.3, 0.4, 0.3), resize_range=(0.3, 1.2),
        noise_range=(1.0, 25.0), poisson_scale_range=(0.05, 2.5),
    )  # fmt: skip
    """second_order: the second round."""
    final_sinc_prob: Probability = 0.8
    """second_order: how often a sinc filter goes with the last resize."""


class TaskConfig(_Schema):
    """What the network learns to undo."""

    kind: Literal["sr", "denoise", "jpeg"]
    """sr: super-resolution from the shards' LQ; denoise and jpeg: degrade GT on the fly."""
    sigma: PositiveFloat | None = None
    """denoise: standard deviation of the Gaussian noise, in grey levels of 255."""
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    """jpeg: compression quality."""
    degradation: DegradationConfig | None = None
    """sr: make LQ from GT while training; absent: take the shards' LQ."""

    @model_validator(mode="after")
    def _parameters(self) -> TaskConfig:
        for key, kind in (("sigma", "denoise"), ("quality", "jpeg")):
            given = getattr(self, key) is not None
            if given != (self.kind == kind):
                raise ValueError(f"{key} {'belongs to' if given else 'is missing for'} kind {kind}")
        if self.degradation and self.kind != "sr":
            raise ValueError("degradation belongs to kind sr")
        return self


class ShardFolderConfig(_Schema):
    """A folder of shards and its share of an epoch."""

    path: Path
    """Folder written by `python -m mambair_ds.prepare`."""
    weight: PositiveFloat = 1.0
    """How often each picture is drawn in an epoch; 0.5 takes half of the pictures, in turn."""


def _shard_folder(value: Any) -> Any:
    return {"path": value} if isinstance(value, (str, Path)) else value


class TrainDataConfig(_Schema):
    """Training pictures: shards read by DALI."""

    shards: Annotated[
        list[
            Annotated[ShardFolderConfig, BeforeValidator(_shard_folder, json_schema_input_type=str | ShardFolderConfig)]
        ],
        Field(min_length=1),
    ]
    """Shard folders, each a path or {path, weight}."""
    gt_size: PositiveInt
    """Side of the square GT crop in pixels; a multiple of the scale."""
    batch_size: PositiveInt
    """Samples per rank in one forward pass (the published batch_size_per_gpu)."""
    use_hflip: bool = True
    """Flip crops left-right at random."""
    use_rot: bool = True
    """Flip crops up-down and transpose them at random; with use_hflip all eight orientations."""
    threads: PositiveInt = 2
    """CPU threads of the DALI pipeline, per rank."""
    verify: bool = False
    """Compare every shard's checksum with its manifest at the start, which reads all of it; sizes always are."""


class ValSetConfig(_Schema):
    """One validation set: a GT folder (with an LQ folder, or LQ made on the fly), or a folder of shards."""

    gt: Path | None = None
    """Folder of GT pictures."""
    lq: Path | None = None
    """Folder of LQ pictures; absent: made from GT as the task says (MATLAB bicubic, noise of seed 0, JPEG)."""
    filename_tmpl: str = "{}"
    """LQ file name without ending, from the GT's: '{}x2' pairs baby.png with babyx2.png."""
    shards: Path | None = None
    """Shard folder, instead of gt and lq."""

    @model_validator(mode="after")
    def _one_source(self) -> ValSetConfig:
        if (self.gt is None) == (self.shards is None):
            raise ValueError("give either gt (and perhaps lq) or shards")
        if self.shards is not None and self.lq is not None:
            raise ValueError("lq goes with gt, not with shards")
        if "{}" not in self.filename_tmpl:
            raise ValueError(f"filename_tmpl {self.filename_tmpl!r} has no {{}} for the GT's name")
        return self


class ValidationConfig(_Schema):
    """When and how the network is measured."""

    every: PositiveInt = 5000
    """Iterations between validations (the published val_freq)."""
    sets: dict[Annotated[str, Field(pattern=r"^[\w.+-]+$")], ValSetConfig] = {}
    """Validation sets by name."""
    crop_border: NonNegativeInt = 0
    """Pixels cut from every side before measuring; the field uses the scale for SR, 0 otherwise."""
    test_y_channel: bool = False
    """Measure on Y of BT.601 instead of RGB."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Arithmetic of the network while it is measured; published numbers are of fp32."""
    save_img: bool = False
    """Write the restored pictures to experiments/NAME/visualization."""


class DataConfig(_Schema):
    """Where pictures come from."""

    train: TrainDataConfig
    """Training shards, crops and batches."""
    val: ValidationConfig = ValidationConfig()
    """Validation sets and metrics."""


class OptimizerConfig(_Schema):
    """The optimizer (torch.optim)."""

    type: Literal["Adam", "AdamW"] = "Adam"
    """Adam (the published one) or AdamW."""
    lr: PositiveFloat
    """Learning rate before any schedule."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.99)
    """Decay rates of the two moments."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Weight decay."""


class MultiStepConfig(_Schema):
    """Multiply the rate by gamma after each milestone."""

    type: Literal["MultiStepLR"]
    milestones: list[PositiveInt]
    """Iterations after which the rate drops; a milestone m is felt at iteration m + 1."""
    gamma: PositiveFloat = 0.5
    """Factor at a milestone."""
    restarts: list[NonNegativeInt] = []
    """Iterations after which the rate returns to lr times the matching restart weight."""
    restart_weights: list[PositiveFloat] = []
    """One weight a restart."""

    @model_validator(mode="after")
    def _paired(self) -> MultiStepConfig:
        if len(self.restarts) != len(self.restart_weights):
            raise ValueError("restarts and restart_weights differ in length")
        return self


class CosineConfig(_Schema):
    """Cosine annealing with restarts."""

    type: Literal["CosineAnnealingRestartLR"]
    periods: Annotated[list[PositiveInt], Field(min_length=1)]
    """Length of each cosine in iterations."""
    restart_weights: list[PositiveFloat] = [1.0]
    """Factor on lr, one a period."""
    eta_min: Annotated[float, Field(ge=0)] = 0.0
    """Lowest rate."""

    @model_validator(mode="after")
    def _paired(self) -> CosineConfig:
        if len(self.periods) != len(self.restart_weights):
            raise ValueError("periods and restart_weights differ in length")
        return self


class LossConfig(_Schema):
    """The pixel loss."""

    type: Literal["L1Loss", "MSELoss", "CharbonnierLoss"]
    """Absolute, squared, or sqrt(d² + eps) per pixel, averaged."""
    loss_weight: PositiveFloat = 1.0
    """Factor on the loss."""
    eps: PositiveFloat = 1e-3
    """CharbonnierLoss: the constant under the root (the published code adds eps itself, not its square)."""


class PerceptualConfig(_Schema):
    """L1 distance of VGG19's features (Johnson et al. 2016; layers and normalization as in BasicSR)."""

    weights: Path
    """torchvision's file of VGG19's weights (vgg19-dcbb9e9d.pth)."""
    layer_weights: dict[Annotated[str, Field(pattern=r"^conv[1-5]_[1-4]$")], PositiveFloat] = {"conv5_4": 1.0}
    """Factor of every layer that counts, before its activation."""
    loss_weight: PositiveFloat = 1.0
    """Factor on the loss."""


class FftConfig(_Schema):
    """L1 distance of the Fourier transforms, real and imaginary parts apart."""

    loss_weight: PositiveFloat
    """Factor on the loss."""


class PretrainConfig(_Schema):
    """Weights to start from (ignored when a checkpoint of this run is resumed)."""

    path: Path
    """A .pth of the published layout or a .safetensors file."""
    strict: bool = True
    """Refuse any missing, unexpected or differently shaped tensor; false reports and skips them (fine-tuning)."""
    param_key: Literal["params", "params_ema"] = "params"
    """Which weights of a .pth to take."""


class TrainConfig(_Schema):
    """The optimization."""

    total_iter: PositiveInt
    """Optimizer steps of the run."""
    optim: OptimizerConfig
    """Optimizer."""
    scheduler: Annotated[MultiStepConfig | CosineConfig, Field(discriminator="type")]
    """Learning rate over the iterations."""
    warmup_iter: NonNegativeInt = 0
    """Iterations of linear warm-up; 0 for none."""
    pixel_loss: LossConfig
    """Loss between output and GT."""
    perceptual_loss: PerceptualConfig | None = None
    """Loss between the features of output and GT, added."""
    fft_loss: FftConfig | None = None
    """Loss between the spectra of output and GT, added."""
    ema_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the running mean of the weights; 0 keeps none."""
    accumulation: PositiveInt = 1
    """Forward passes per optimizer step."""
    grad_clip: Annotated[float, Field(ge=0)] = 0.0
    """Largest norm of the whole gradient; 0 for no clipping."""
    precision: Literal["auto", "fp32", "bf16", "pure_bf16"] = "auto"
    """bf16: autocast over float32 parameters; pure_bf16: bf16 parameters; auto: bf16 on a GPU, fp32 on a CPU."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """What DeepSpeed's ZeRO splits over ranks: nothing, optimizer, + gradients, + parameters."""
    overlap_comm: bool | None = None
    """Reduce gradients while the backward pass goes on; null: as DeepSpeed does by default, at stage 3 alone."""
    compile: bool = False
    """Let torch.compile fuse what lies between the operators; takes a minute or more at the start of a run."""
    cuda_graphs: bool = False
    """Replay the compiled network's kernels as CUDA graphs, without the host; keeps their memory apart."""
    gumbel: Literal["counter", "published"] = "counter"
    """Routing noise: counter-based (same on any number of ranks) or torch's global generator as published."""
    pretrain: PretrainConfig | None = None
    """Weights to start from."""

    @model_validator(mode="after")
    def _schedule_covers_run(self) -> TrainConfig:
        if isinstance(self.scheduler, CosineConfig) and sum(self.scheduler.periods) < self.total_iter:
            raise ValueError(f"scheduler.periods cover {sum(self.scheduler.periods)} of {self.total_iter} iterations")
        if self.precision == "pure_bf16" and self.zero_stage == 0:
            raise ValueError("precision pure_bf16 needs zero_stage 1, 2 or 3 (DeepSpeed's stage 0 is wrong with it)")
        if self.cuda_graphs and not self.compile:
            raise ValueError("cuda_graphs needs compile: true")
        if self.cuda_graphs and self.zero_stage == 3:
            raise ValueError("cuda_graphs needs zero_stage 0, 1 or 2: stage 3 gathers parameters to other places")
        if self.cuda_graphs and self.zero_stage == 0 and self.accumulation > 1:
            raise ValueError("cuda_graphs with accumulation needs zero_stage 1 or 2: a replay overwrites the gradients")
        if self.overlap_comm and (self.zero_stage == 0 or (self.compile and self.zero_stage < 3)):
            raise ValueError(
                "overlap_comm needs zero_stage 1, 2 or 3, and at 1 and 2 no compile, with which DeepSpeed reduces "
                "gradients before they are there"
            )
        if self.compile and self.gumbel == "published":
            raise ValueError(
                "compile needs gumbel: counter; compiled code draws other numbers than the published noise"
            )
        return self


class CheckpointConfig(_Schema):
    """When the run is saved."""

    every: PositiveInt = 5000
    """Iterations between checkpoints; the last iteration is always saved."""
    keep: PositiveInt = 3
    """Newest checkpoints kept on disk."""
    keep_every: NonNegativeInt = 0
    """Keep the checkpoints of every so many iterations for good as well; 0 for none."""
    keep_best: str | None = None
    """Keep the checkpoint of the best value too, as SET/psnr or SET/ssim; it is found if one was saved then."""
    retries: NonNegativeInt = 2
    """How often a write that failed is tried again before the run stops."""
    retry_wait: Annotated[float, Field(ge=0)] = 5.0
    """Seconds before each new try."""


class FaultsConfig(_Schema):
    """What a run bears before it stops."""

    timeout: PositiveFloat = 600.0
    """Seconds that a rank may be late, in a step or a save, before the others name it and leave."""
    max_skipped: PositiveInt = 10
    """Steps in a row that may be skipped for a gradient that is not finite; one more stops the run."""
    max_damaged: NonNegativeInt = 10
    """Pictures that may be unreadable, on all ranks together; each is named and its neighbour taken, one more stops the
    run."""
    lock_timeout: PositiveFloat = 60.0
    """Seconds without a sign of life after which a run on another machine no longer holds the run's folder."""


class WandbConfig(_Schema):
    """Weights & Biases."""

    project: str
    """Project name."""
    entity: str | None = None
    """Team or user; absent: the account's default."""
    mode: Literal["online", "offline"] = "online"
    """offline writes to disk, for a later `wandb sync`."""


class LogConfig(_Schema):
    """What is said while training."""

    print_freq: PositiveInt = 100
    """Iterations between log lines."""
    report_pictures: NonNegativeInt = 3
    """Pictures of each validation set to look at in experiments/NAME/report."""
    tensorboard: bool = False
    """Write TensorBoard events to experiments/NAME/log/tensorboard."""
    wandb: WandbConfig | None = None
    """Log to Weights & Biases; absent: off."""


class RunConfig(_Schema):
    """A training run."""

    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")]
    """Name of the run: its folder is experiments_root/name."""
    experiments_root: Path = Path("experiments")
    """Folder that holds the runs' folders."""
    seed: NonNegativeInt | None = None
    """Seed of weights, data order and noise; absent: drawn, logged and saved."""
    network: NetworkConfig
    """The network."""
    task: TaskConfig
    """What it learns to undo."""
    data: DataConfig
    """Pictures."""
    train: TrainConfig
    """Optimization."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    faults: FaultsConfig = FaultsConfig()
    """Damage, silence and other runs."""
    log: LogConfig = LogConfig()
    """Logging."""

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.data.train.gt_size % self.network.upscale:
            raise ValueError(
                f"data.train.gt_size {self.data.train.gt_size} is not a multiple of network.upscale "
                f"{self.network.upscale}"
            )
        if self.task.kind != "sr" and self.network.upscale != 1:
            raise ValueError(f"task.kind {self.task.kind} needs network.upscale 1, not {self.network.upscale}")
        best = self.checkpoint.keep_best
        if best and best not in [f"{name}/{metric}" for name in self.data.val.sets for metric in ("psnr", "ssim")]:
            raise ValueError(f"checkpoint.keep_best {best!r} is no SET/psnr or SET/ssim of data.val.sets")
        return self

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.experiments_root / self.name

    def check_paths(self) -> None:
        """Check that every file and folder the run reads is there.

        Raises:
            UserError: naming the key and the missing path.
        """
        wanted: list[tuple[str, Path | None]] = [
            (f"data.train.shards.{i}", folder.path) for i, folder in enumerate(self.data.train.shards)
        ]
        for name, val in self.data.val.sets.items():
            wanted += [(f"data.val.sets.{name}.{key}", getattr(val, key)) for key in ("gt", "lq", "shards")]
        for key, path in wanted:
            if path is not None and not path.is_dir():
                raise UserError(f"{key}: no folder {path}")
        if self.train.pretrain and not self.train.pretrain.path.is_file():
            raise UserError(f"train.pretrain.path: no file {self.train.pretrain.path}")
        perceptual = self.train.perceptual_loss
        if perceptual and not perceptual.weights.is_file():
            raise UserError(
                f"train.perceptual_loss.weights: no file {perceptual.weights}; it is torchvision's VGG19, "
                "https://download.pytorch.org/models/vgg19-dcbb9e9d.pth"
            )


class EvaluationDataConfig(_Schema):
    """Pictures to measure on."""

    val: ValidationConfig
    """Validation sets and metrics."""


class EvaluationConfig(_Schema):
    """What `evaluate` needs: these parts of a run's file, or a file of these parts alone."""

    name: str = "evaluation"
    """Name in the results."""
    weights: Path | None = None
    """Weight file, or the folder of a run."""
    network: NetworkConfig | None = None
    """The network; absent: read off the weights."""
    task: TaskConfig
    """What the network undoes."""
    data: EvaluationDataConfig
    """Pictures."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's floats (PyYAML takes 2e-4 for text), and an error for a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"), list("-+0123456789.")
)


def parse_yaml(text: str) -> Any:
    """Parse YAML with floats such as 2e-4 and without duplicate keys.

    Raises:
        yaml.YAMLError: on malformed text.
    """
    return yaml.load(text, Loader=_Loader)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run from a YAML file and ``key=value`` overrides, which win.

    Raises:
        UserError: one message with every wrong key, its place and what was expected.
    """
    tree, overridden = _read(Path(path), overrides)
    return validate(tree, str(path), overridden)


def load_evaluation(path: str | Path, overrides: Sequence[str] = ()) -> EvaluationConfig:
    """Read what `evaluate` needs from a run's file, whose weights are then the run's own, or from a file of it alone.

    Raises:
        UserError: as `load_config`.
    """
    tree, overridden = _read(Path(path), overrides)
    if "train" not in tree:
        return validate(tree, str(path), overridden, EvaluationConfig)
    run = validate(tree, str(path), overridden)
    return EvaluationConfig(
        name=run.name,
        weights=run.folder,
        network=run.network,
        task=run.task,
        data=EvaluationDataConfig(val=run.data.val),
    )


def _read(path: Path, overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The settings of a file with overrides, and the text of every override by its key."""
    if not path.is_file():
        raise UserError(f"--config: no file {path}")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    overridden = {}
    for override in overrides:
        key, value = _parse_override(override)
        _set(tree, key, value, override)
        overridden[key] = override
    return tree, overridden


_Schemas = TypeVar("_Schemas", bound=_Schema)


@overload
def validate(tree: Mapping[str, Any], source: str, overridden: Mapping[str, str] | None = None) -> RunConfig: ...
@overload
def validate(
    tree: Mapping[str, Any], source: str, overridden: Mapping[str, str] | None, schema: type[_Schemas]
) -> _Schemas: ...
def validate(
    tree: Mapping[str, Any],
    source: str,
    overridden: Mapping[str, str] | None = None,
    schema: type[_Schema] = RunConfig,
) -> _Schema:
    """Turn a nested mapping into a `RunConfig`, or into another schema.

    Args:
        tree: settings.
        source: where they come from, for errors.
        overridden: text of every override by its key, for errors.
        schema: class to make of it.

    Raises:
        UserError: one line per wrong key.
    """
    try:
        return schema.model_validate(tree)
    except ValidationError as error:
        items = error.errors(include_url=False)
        lines = [_explain(dict(item), source, overridden or {}, schema) for item in items]
        raise UserError("\n".join(lines)) from error


def apply_debug(overrides: Sequence[str], name: str) -> list[str]:
    """Overrides of ``--debug``, as published: debug_ before the name, log every step, validate and save every 8."""
    return [
        *overrides,
        f"name=debug_{name}",
        "log.print_freq=1",
        "data.val.every=8",
        "checkpoint.every=8",
        "log.tensorboard=false",
        "log.wandb=null",
    ]


def _parse_override(override: str) -> tuple[str, Any]:
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"--set {override}: expected KEY=VALUE, as in --set train.total_iter=1000")
    try:
        return key.strip(), parse_yaml(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not valid YAML") from error


def _set(tree: dict[str, Any], key: str, value: Any, override: str) -> None:
    *parents, last = key.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if isinstance(node, list):
            node = _item(node, part, override)
            continue
        if node.get(part) is None:
            node[part] = {}
        node = node[part]
        if not isinstance(node, (dict, list)):
            raise UserError(f"--set {override}: {'.'.join(parents[: depth + 1])} is a value, not a group of settings")
    if isinstance(node, list):
        _item(node, last, override)
        node[int(last)] = value
    else:
        node[last] = value


def _item(node: list[Any], part: str, override: str) -> Any:
    if not part.isdigit() or int(part) >= len(node):
        raise UserError(f"--set {override}: {part!r} is no index of a list of {len(node)}")
    return node[int(part)]


def _explain(item: dict[str, Any], source: str, overridden: Mapping[str, str], root: type[_Schema]) -> str:
    # A discriminated union puts its tag into the location; users know only the keys.
    loc = [str(part) for part in item["loc"] if part not in ("MultiStepLR", "CosineAnnealingRestartLR")]
    key = ".".join(loc)
    place = f"--set {overridden[key]}" if key in overridden else f"{source}: {key}" if key else source
    if item["type"] == "extra_forbidden":
        known = _known_keys(root, loc[:-1])
        close = difflib.get_close_matches(loc[-1], known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"known here: {', '.join(known)}"
        return f"{place}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{place}: missing; it has no default"
    message = item["msg"].removeprefix("Value error, ")
    if item["type"] == "value_error":
        return f"{place}: {message}"
    return f"{place}: {message[0].lower()}{message[1:]}, got {item['input']!r}"


def _known_keys(root: type[_Schema], path: Sequence[str]) -> list[str]:
    """Keys that the schema has at a location (empty inside free-form mappings)."""
    schema: Any = root.model_json_schema()
    definitions = schema["$defs"]

    def resolve(node: Any) -> list[Any]:
        if "$ref" in node:
            return resolve(definitions[node["$ref"].rsplit("/", 1)[-1]])
        branches = node.get("anyOf") or node.get("oneOf")
        return [found for branch in branches for found in resolve(branch)] if branches else [node]

    nodes = [schema]
    for part in path:
        children = []
        for node in nodes:
            child = node.get("properties", {}).get(part) or node.get("items")
            for free_form in [child] if child else node.get("patternProperties", {}).values():
                children += resolve(free_form)
        nodes = children
    return sorted({name for node in nodes for name in node.get("properties", {})})
