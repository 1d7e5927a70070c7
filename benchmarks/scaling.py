"""What more ranks cost: bytes on the wire by ZeRO stage and precision, and the step's time on 1, 2 and 4 of them.

    python benchmarks/scaling.py [--config demo] [--steps 5]

Ranks are processes on this machine's CPU (gloo, one thread each, the same batch on each). Bytes are counted where
DeepSpeed calls a collective, and are those that a rank sends in a ring: 2 (n-1)/n of an all-reduced tensor, (n-1)/n
of one that is gathered or scattered. Time in collectives is that of the calls, all of it exposed with gloo on a CPU.
More ranks than cores share them: CPU seconds a rank say more than seconds then. docs/scaling.md makes a model of it.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

CONFIGS = Path(__file__).parent.parent / "configs"
SHARES = {  # of a tensor's bytes that a rank sends in a ring, times (n - 1) / n
    "all_reduce": 2, "reduce": 1, "broadcast": 1, "all_gather_into_tensor": 1, "reduce_scatter_tensor": 1,
    "all_gather": 1, "reduce_scatter": 1, "all_gather_coalesced": 1, "all_to_all_single": 1,
}  # fmt: skip


class Wire:
    """Counts what goes through `torch.distributed`."""

    def __init__(self) -> None:
        self.bytes, self.seconds, self.calls = 0.0, 0.0, 0
        for name, share in SHARES.items():
            if hasattr(dist, name):
                setattr(dist, name, self._counted(getattr(dist, name), share, name))

    def _counted(self, call, share, name):  # type: ignore[no-untyped-def]
        def counted(*tensors, **options):  # type: ignore[no-untyped-def]
            began = time.perf_counter()
            result = call(*tensors, **options)
            self.seconds += time.perf_counter() - began
            self.calls += 1
            # The whole tensor is the larger of output and input.
            whole = max(_size(x) for x in (*tensors[:2], *options.values()))
            self.bytes += share * whole * (dist.get_world_size() - 1) / dist.get_world_size()
            return result

        return counted


def _size(x: object) -> int:
    if isinstance(x, torch.Tensor):
        return x.numel() * x.element_size()
    return sum(map(_size, x)) if isinstance(x, list | tuple) else 0


def run_rank(rank: int, world_size: int, config: str, stage: int, precision: str, steps: int, results) -> None:  # type: ignore[no-untyped-def]
    """Train a little on one rank; rank 0 answers."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "LOCAL_WORLD_SIZE": str(world_size)}
    torch.set_num_threads(1)
    wire = Wire()
    from mambair_ds.config import load_config
    from mambair_ds.kernels.philox import NoiseKey
    from mambair_ds.models import build_model
    from mambair_ds.training.engine import Engine, start_process_group

    start_process_group(torch.device("cpu"), 600)
    run = load_config(CONFIGS / f"{config}.yml", [f"train.zero_stage={stage}"])
    torch.manual_seed(0)
    batch, side = 2, 32
    engine = Engine(build_model(run.network), run.train, batch, precision)
    lq = torch.rand(batch, run.network.in_chans, side, side)
    walls, cpus = [], []
    for step in range(steps + 1):
        if step == 1:
            wire.bytes, wire.seconds, wire.calls = 0.0, 0.0, 0
        began, began_cpu = time.perf_counter(), time.process_time()
        noise = NoiseKey(0, torch.arange(batch) + step * batch)
        engine.step(engine(lq, noise=noise).float().square().mean(), 1e-4, want_norm=False)
        walls.append(time.perf_counter() - began)
        cpus.append(time.process_time() - began_cpu)
    if rank == 0:
        parameters = sum(p.ds_numel if stage == 3 else p.numel() for p in engine.deepspeed.module.parameters())
        row = (statistics.median(walls[1:]), statistics.median(cpus[1:]), wire.seconds / steps, wire.bytes / steps)
        results.put((*row, wire.calls / steps, parameters))
    dist.barrier()
    dist.destroy_process_group()


def measure(world_size: int, config: str, stage: int, precision: str, steps: int) -> tuple[float, ...]:
    """Seconds, CPU seconds, seconds in collectives, bytes and calls a step, and the network's parameters."""
    os.environ["MASTER_PORT"] = str(29000 + os.getpid() % 900 + world_size + 10 * stage)
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    arguments = (world_size, config, stage, precision, steps, results)
    mp.spawn(run_rank, arguments, nprocs=world_size)
    answer: tuple[float, ...] = results.get()
    return answer


def main() -> None:
    """Print Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--config", default="demo", help="a name in configs/ (%(default)s)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps (%(default)s)")
    arguments = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    print(f"{os.cpu_count()} cores, torch {torch.__version__}, {arguments.config}, batch 2 of 32x32 a rank\n")
    head = "ranks | ZeRO | precision | s a step | CPU s a rank | efficiency by CPU s | s in collectives | bytes sent"
    print(f"| {head} | of the weights' float32 bytes | calls |")
    print("| --- " * 10 + "|")
    alone: float | None = None
    cases = [(1, 0, "fp32"), (2, 0, "fp32"), (4, 0, "fp32")]
    cases += [(2, stage, precision) for stage in (0, 1, 2, 3) for precision in ("fp32", "bf16")][1:]
    cases += [(2, stage, "pure_bf16") for stage in (1, 2, 3)]
    for world_size, stage, precision in cases:
        wall, cpu, waiting, sent, calls, parameters = measure(
            world_size, arguments.config, stage, precision, arguments.steps
        )
        alone = alone or cpu
        efficiency = f"{100 * alone / cpu:.0f} %" if precision == "fp32" and stage == 0 else ""
        row = f"| {world_size} | {stage} | {precision} | {wall:.3f} | {cpu:.3f} | {efficiency} | {waiting:.4f} "
        print(f"{row}| {sent:,.0f} | {sent / (4 * parameters):.2f} | {calls:.0f} |")


if __name__ == "__main__":
    main()
