"""The loop: batches in, weights out, with validation, logging and checkpoints as calls in it."""

from __future__ import annotations

import copy
import datetime
import json
import logging
import os
import secrets
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import yaml
from torch import Tensor, nn

from mambair_ds.config import RunConfig
from mambair_ds.data.pipeline import TrainStream, check_train_data
from mambair_ds.kernels.philox import NoiseKey
from mambair_ds.models import build_model
from mambair_ds.runlog import LIVE, Progress, Trackers, describe_environment, log_to_console, log_to_file
from mambair_ds.training import checkpoint as checkpoints
from mambair_ds.training import fragments
from mambair_ds.training.agreement import Agreement, is_about_ranks
from mambair_ds.training.checkpoint import Checkpoint, RunError, RunState
from mambair_ds.training.engine import Engine, start_process_group
from mambair_ds.training.heartbeat import Heartbeat
from mambair_ds.training.launch import Launch
from mambair_ds.training.lock import RunLock
from mambair_ds.training.losses import Losses
from mambair_ds.training.optimizer import MEAN
from mambair_ds.training.saving import Saver
from mambair_ds.training.schedule import learning_rate
from mambair_ds.training.skipping import SkipWatch
from mambair_ds.training.stop import Stop
from mambair_ds.training.validation import ValidationSet, open_sets, validate
from mambair_ds.weights import load_network, save_network

logger = logging.getLogger(__name__)


def run(config: RunConfig, launch: Launch, resume: Path | None, fresh: bool, stop: Stop) -> bool:
    """Train as configured, from the newest whole checkpoint of the run if there is one.

    Args:
        config: the run, its paths checked.
        launch: this process's place among the ranks.
        resume: a checkpoint folder to continue instead of the newest.
        fresh: start over; the old run's folder is kept under a time stamp.
        stop: asks to leave before the end.

    Returns:
        Whether the last iteration is done; otherwise `stop` had its way and the state is saved.

    Raises:
        UserError: before any process group or GPU is touched.
        RunError: if the run cannot go on: a checkpoint cannot be written, too many steps are not finite, ...
    """
    console = log_to_console(launch.rank)
    console.info("%s: rank %d of %d, started by %s", config.name, launch.rank, launch.world_size, launch.launcher)
    stream_checksum = check_train_data(config.data.train, config.task, config.network, verify=launch.is_main)
    val_sets = open_sets(config)
    checkpoint = None if fresh else _find_checkpoint(config, resume)
    if checkpoint:
        checkpoints.check_resumable(checkpoint, config, stream_checksum)
        config = checkpoints.keep_batch(checkpoint, config, launch.world_size)
    seed = checkpoint.manifest["seed"] if checkpoint else config.seed
    state = RunState(seed=secrets.randbelow(2**31) if seed is None else seed, stream=stream_checksum)
    _seed_everything(state.seed)
    network = build_model(config.network)
    pretrain = config.train.pretrain
    if pretrain and not checkpoint:
        load_network(network, pretrain.path, strict=pretrain.strict, param_key=pretrain.param_key)

    device = torch.device("cuda", launch.local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    losses = Losses(config.train, device)
    lock = None
    if launch.is_main:

        def lost(reason: str) -> None:
            logger.error("%s; leaving without saving", reason)
            os._exit(1)

        lock = RunLock(config.folder, config.faults.lock_timeout, lost)
        stop.hold(lock.release)
    try:
        start_process_group(device, config.faults.timeout)
        if launch.is_main:
            _prepare_folder(config, launch, keep=checkpoint is not None)
        dist.barrier()
        if launch.is_main:
            log_to_file(config.folder / "log" / f"train_{config.name}_{_timestamp()}.log")
        trainer = Trainer(config, launch, device, network, losses, state, val_sets, checkpoint, stop)
        heartbeat = Heartbeat(config.faults.timeout, lambda: trainer.state.iteration)
        try:
            return trainer.fit()
        except RuntimeError as error:
            if launch.world_size == 1 or not is_about_ranks(error):
                raise
            logger.error(
                "Rank %d, iteration %d: the ranks have lost one another: %s (%s). Leaving; start the same command "
                "again to continue from the newest checkpoint",
                launch.rank, trainer.state.iteration, heartbeat.diagnosis(), " ".join(str(error).split())[:200],
            )  # fmt: skip
            if lock:
                lock.release()
            logging.shutdown()
            os._exit(1)  # what waits for the lost rank, in threads and destructors, would wait on
        finally:
            heartbeat.close()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if lock:
            lock.release()


class Trainer:
    """One run on one rank."""

    def __init__(
        self,
        config: RunConfig,
        launch: Launch,
        device: torch.device,
        network: nn.Module,
        losses: Losses,
        state: RunState,
        val_sets: dict[str, ValidationSet],
        checkpoint: Checkpoint | None,
        stop: Stop,
    ) -> None:
        """Build engine and data stream around `network`, and restore `checkpoint` into them if given."""
        self.config, self.launch, self.device, self.val_sets, self.stop = config, launch, device, val_sets, stop
        train, data = config.train, config.data.train
        self.precision = train.precision
        if self.precision == "auto":
            self.precision = "bf16" if device.type == "cuda" else "fp32"

        # Rank 0's weights and seed count: without a seed in the config every rank has drawn its own.
        saved = checkpoints.read_tensors(checkpoint) if checkpoint else None
        if saved:
            with torch.no_grad():
                for name, parameter in network.named_parameters():
                    parameter.copy_(saved["params"][name].view(parameter.shape))
        network.to(device)
        for tensor in network.state_dict().values():
            dist.broadcast(tensor, src=0)
        seed = torch.tensor(state.seed, device=device)
        dist.broadcast(seed, src=0)
        state.seed = int(seed)
        self.state = state
        # A plain copy: the layout of exported weights, and the network that validates, whatever ZeRO does to the other.
        self.whole = copy.deepcopy(network).eval().requires_grad_(False)
        if train.compile:
            self.whole.compile(dynamic=True)  # validation pictures come in all sizes
        self.engine = Engine(network, train, data.batch_size, self.precision)
        if saved:
            fragments.put(self.engine, saved)
        # Ranks draw different published noise and the same counter-based noise, which is keyed by the sample.
        _seed_everything(self.state.seed + launch.rank)
        if checkpoint:
            self.state = checkpoints.read_state(checkpoint, launch.rank)
        self.stream = TrainStream(
            data,
            config.task,
            seed=self.state.seed,
            rank=launch.rank,
            world_size=launch.world_size,
            batch_size=data.batch_size,
            position=self.state.position,
            device=device,
            scale=config.network.upscale,
            max_damaged=config.faults.max_damaged,
        )
        self.losses = losses
        self.agreement = Agreement(config.faults.timeout)
        retrying = config.checkpoint.retries * config.checkpoint.retry_wait
        self.saver = Saver(
            config.folder / "checkpoints", config.checkpoint, launch, timeout=config.faults.timeout + retrying
        )
        self.skips = SkipWatch(
            self.state, config.faults.max_skipped, config.folder / "log", self._samples_of, self._tell_skipped
        )
        # Guesses for the first of each, in seconds.
        self._longest_step, self._longest_save, self._longest_validation = 1.0, 5.0, 0.0
        self.progress = Progress(config.name, self.state.iteration, train.total_iter, show=launch.is_main)
        self.trackers: Trackers | None = None
        if launch.is_main:
            self._describe(checkpoint)
            self.trackers = Trackers(config, self.state.iteration, self.state.wandb_id)
            self.state.wandb_id = self.trackers.wandb_id

    def fit(self) -> bool:
        """Train to the last iteration, or until asked to stop; returns whether it was the last."""
        config, state, total = self.config, self.state, self.config.train.total_iter
        start = self._interval_start = time.perf_counter()
        self._data_time, self._interval_iteration = 0.0, state.iteration
        self.stop.hold(None)
        if state.validated < state.iteration and state.iteration % config.data.val.every == 0:
            self._validate()
        stopped, first = False, state.iteration + 1
        logger.info("The first step compiles what no cache has yet: seconds on a CPU, on a new GPU machine minutes")
        while state.iteration < total and not stopped:
            began = time.perf_counter()
            stop = self.stop.reason(self._seconds_needed()) is not None
            self.agreement.start({"stop": stop, "unsaved": self.saver.failed, "damaged": self.stream.damaged})
            state.iteration += 1
            logs, last = state.iteration % config.log.print_freq == 0, state.iteration == total
            losses, norm = self._step(want_norm=logs)
            self.progress.step()
            if logs:
                self._log(losses, norm)
            counts = self.agreement.finish()
            if counts["unsaved"]:
                self.saver.wait()
            if counts["damaged"] > config.faults.max_damaged:
                raise RunError(
                    f"iteration {state.iteration}: {counts['damaged']} pictures could not be read (see the warnings); "
                    f"faults.max_damaged is {config.faults.max_damaged}"
                )
            stopped = counts["stop"] > 0 and not last
            if state.iteration == first:  # which compiles and allocates
                logger.info("The first step is done, %.1f s after the start", time.monotonic() - self.stop.started)
            else:
                self._longest_step = max(self._longest_step, time.perf_counter() - began)
            # Who is asked to stop has little time: the validation that is due then comes first after the restart.
            if (state.iteration % config.data.val.every == 0 or last) and not stopped:
                self._validate()
            if state.iteration % config.checkpoint.every == 0 or last or stopped:
                self._save()
        self.saver.wait()
        elapsed = datetime.timedelta(seconds=round(time.perf_counter() - start))
        if stopped:
            logger.info("Stopped after iteration %s, to be continued. Time: %s", f"{state.iteration:,}", elapsed)
        else:
            logger.info("End of training. Time consumed: %s", elapsed)
        self.stream.close()
        self.progress.close()
        if self.trackers:
            self.trackers.close()
        return not stopped

    def _seconds_needed(self) -> float:
        """How long the next step, what may follow it, and saving may take; twice what they took at most so far."""
        validates = (self.state.iteration + 1) % self.config.data.val.every == 0
        return 2 * (self._longest_step + self._longest_save + (self._longest_validation if validates else 0.0))

    def _step(self, want_norm: bool) -> tuple[Tensor, float | None]:
        """One optimizer step; the losses, means of its micro-batches (on the device), and the gradient norm."""
        lr = learning_rate(self.config.train, self.state.iteration)
        losses, norm, position = [], None, self.stream.position
        for _ in range(self.config.train.accumulation):
            waiting = time.perf_counter()
            batch = self.stream.next()
            self._data_time += time.perf_counter() - waiting
            lq, gt = batch.to_float()
            positions = batch.positions.to(self.device, non_blocking=True)  # once, not in every layer
            noise = NoiseKey(self.state.seed, positions) if self.config.train.gumbel == "counter" else None
            parts = self.losses(self.engine(lq, noise=noise), gt)
            norm = self.engine.step(parts.sum(), lr, want_norm)
            losses.append(parts.detach())
        self.state.position = self.stream.position
        self.skips.add(self.state.iteration, position, self.engine.skipped)
        return torch.stack(losses).mean(0), norm

    def _samples_of(self, position: int) -> list[str]:
        return self.stream.keys(position, self.config.train.accumulation)

    def _tell_skipped(self, iteration: int) -> None:
        if self.trackers:
            self.trackers.event("skipped", iteration, reason="the gradient is not finite")

    def _log(self, losses: Tensor, norm: float | None) -> None:
        """Say where the run is; the only place in a step that reads from the device."""
        dist.all_reduce(losses)
        values = dict(zip(self.losses.names, (losses / self.launch.world_size).tolist(), strict=True))
        said = " ".join(f"{name}: {value:.6e}" for name, value in values.items())
        now, state, train = time.perf_counter(), self.state, self.config.train
        steps = state.iteration - self._interval_iteration
        seconds, data_seconds = (now - self._interval_start) / steps, self._data_time / steps
        samples = self._batch / seconds
        lr = learning_rate(train, state.iteration)
        if self.trackers:
            eta = datetime.timedelta(seconds=round((train.total_iter - state.iteration) * seconds))
            logger.info(
                "[%s][epoch:%3d, iter:%8s, lr:(%.3e,)] [eta: %s, time (data): %.3f (%.3f)] %s "
                "[%.1f samples/s, grad norm: %s, memory: %.0f MB]",
                self.config.name[:12],
                self.stream.epoch,
                f"{state.iteration:,}",
                lr,
                eta,
                seconds,
                data_seconds,
                said,
                samples,
                "-" if norm is None else f"{norm:.4f}",
                _memory_mb(self.device),
                extra=LIVE,
            )
            self.progress.say(f"loss {sum(values.values()):.3e}, {samples:.1f} samples/s")
            scalars = {
                **{f"losses/{name}": value for name, value in values.items()},
                "lr": lr,
                "time/iteration": seconds,
                "time/data": data_seconds,
                "samples_per_second": samples,
                "memory_mb": _memory_mb(self.device),
                "skipped": state.skipped,
            }
            self.trackers.scalars(scalars | ({} if norm is None else {"grad_norm": norm}), state.iteration)
        self._interval_start, self._interval_iteration, self._data_time = now, state.iteration, 0.0

    def _weights(self) -> dict[str, dict[str, Tensor]]:
        """Whole weights in the published layout, on every rank; all ranks call together."""
        buffers = dict(self.whole.named_buffers())
        kinds = ("params", MEAN) if MEAN in self.engine.optimizer.kinds else ("params",)
        weights = {kind: fragments.whole(self.engine, kind) | buffers for kind in kinds}
        keys = self.whole.state_dict().keys()
        return {name: {key: tensors[key] for key in keys} for name, tensors in weights.items()}

    def _validate(self) -> None:
        """Measure the network (its running mean if there is one) on every validation set."""
        self.state.validated = self.state.iteration
        if not self.val_sets:
            return
        began = time.perf_counter()
        weights = self._weights()
        self.whole.load_state_dict(weights.get(MEAN, weights["params"]))
        results = validate(self.whole, self.val_sets, self.config, self.state.iteration, self.launch, self.device)
        for name, metrics in results.items():
            best = self.state.best.setdefault(name, {})
            for metric, value in metrics.items():
                if metric not in best or value > best[metric][0]:
                    best[metric] = (value, self.state.iteration)
            said = ", ".join(f"{m}: {v:.4f} (best {best[m][0]:.4f} @ {best[m][1]:,})" for m, v in metrics.items())
            logger.info("Validation %s, iter %s: %s", name, f"{self.state.iteration:,}", said)
            if self.trackers:
                scalars = {f"metrics/{name}/{m}": v for m, v in metrics.items()}
                self.trackers.scalars(scalars, self.state.iteration)
        seconds = time.perf_counter() - began
        self._longest_validation = max(self._longest_validation, seconds)
        # The next log line measures training alone.
        self._interval_start += seconds

    @property
    def _batch(self) -> int:
        """Samples of a step, on all ranks together."""
        return self.config.data.train.batch_size * self.config.train.accumulation * self.launch.world_size

    def _save(self) -> None:
        """Begin to write a checkpoint to resume from, and the weights for everything else."""
        began = time.perf_counter()
        self.skips.finish()
        state, launch = self.state, self.launch
        manifest = {
            "iteration": state.iteration,
            "world_size": launch.world_size,
            "batch": self._batch,
            "seed": state.seed,
            "stream": state.stream,
            "config": self.config.model_dump(mode="json"),
        }
        content = {
            "tensors": fragments.take(self.engine),
            "rng": checkpoints.rng_state(),
            "state": asdict(state),
        }
        weights = self._weights()
        if launch.is_main:  # copies: training goes on while they are written
            weights = {
                name: {k: t.to("cpu", copy=True) for k, t in tensors.items()} for name, tensors in weights.items()
            }
        best = set()
        if self.config.checkpoint.keep_best:
            name, metric = self.config.checkpoint.keep_best.rsplit("/", 1)
            best = {state.best[name][metric][1]} if name in state.best else set()
        path = self.config.folder / "models" / f"net_g_{state.iteration}.pth"
        self.saver.start(content, manifest, best, lambda: save_network(path, weights))
        seconds = time.perf_counter() - began
        self._longest_save = max(self._longest_save, seconds)
        if self.trackers:
            self.trackers.scalars({"time/save": seconds}, state.iteration)
        self._interval_start += seconds

    def _describe(self, checkpoint: Checkpoint | None) -> None:
        config, train, data = self.config, self.config.train, self.config.data.train
        environment = describe_environment(self.launch.launcher, self.launch.world_size)
        (config.folder / "environment.json").write_text(json.dumps(environment, indent=1))
        (config.folder / "config.yml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        logger.info("Environment: %s", json.dumps(environment))
        logger.info("DeepSpeed: %s", json.dumps(self.engine.config))
        parameters = sum(p.numel() for p in self.whole.parameters())
        logger.info(
            "Network %s: %s parameters, precision %s, seed %d%s",
            config.network.type,
            f"{parameters:,}",
            self.precision,
            self.state.seed,
            "" if config.seed is not None else " (drawn)",
        )
        logger.info(
            "Training pictures: %s, an epoch: %s samples. Batch: %d a rank x %d ranks x %d accumulated = %d. "
            "Iterations an epoch: %.1f; %s iterations are %.1f epochs",
            f"{self.stream.pictures:,}",
            f"{self.stream.epoch_size:,}",
            data.batch_size,
            self.launch.world_size,
            train.accumulation,
            self._batch,
            self.stream.epoch_size / self._batch,
            f"{train.total_iter:,}",
            train.total_iter * self._batch / self.stream.epoch_size,
        )
        if checkpoint:
            logger.info("Resumed from %s, iteration %s", checkpoint.path, f"{checkpoint.iteration:,}")
            if train.pretrain:
                logger.info("train.pretrain is not loaded: the checkpoint has the weights")
        for name, val_set in self.val_sets.items():
            logger.info("Validation set %s: %d pictures", name, len(val_set))


def _find_checkpoint(config: RunConfig, resume: Path | None) -> Checkpoint | None:
    return checkpoints.read(resume, checksums=True) if resume else checkpoints.newest(config.folder / "checkpoints")


def _prepare_folder(config: RunConfig, launch: Launch, keep: bool) -> None:
    """Make the run's folder; one of an earlier run is moved aside under a time stamp."""
    if config.folder.exists() and not keep:
        archive = config.folder.with_name(f"{config.name}_archived_{_timestamp()}")
        shutil.move(config.folder, archive)
        logger.info("%s exists; moved to %s", config.folder, archive)
    config.folder.mkdir(parents=True, exist_ok=True)


def _seed_everything(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)


def _timestamp() -> str:
    return datetime.datetime.now().strftime("%Y%m%d_%H%M%S")


def _memory_mb(device: torch.device) -> float:
    """Largest memory in use so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
