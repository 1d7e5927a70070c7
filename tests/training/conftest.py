"""Real runs in small: built-in pictures, a tiny network, the doors as a user calls them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

CONFIG = """
name: tiny
seed: 3
network: {type: MambaIRv2Light, upscale: 2, embed_dim: 8, d_state: 4, depths: [2], num_heads: [2], window_size: 8,
          inner_rank: 4, num_tokens: 8, mlp_ratio: 1.0, upsampler: pixelshuffledirect}
task: {kind: sr}
data:
  train: {shards: [shards], gt_size: 32, batch_size: 4}
  val: {every: 1000, crop_border: 2, test_y_channel: true, sets: {}}
train:
  total_iter: 6
  optim: {lr: 1e-3}
  scheduler: {type: MultiStepLR, milestones: [3]}
  pixel_loss: {type: L1Loss}
log: {print_freq: 1}
"""


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with four small colour photographs."""
    from skimage import data, io

    folder = tmp_path_factory.mktemp("pictures")
    for name, picture in (("astronaut", data.astronaut()), ("coffee", data.coffee()), ("cat", data.chelsea())):
        io.imsave(folder / f"{name}.png", picture[40:141, 60:201], check_contrast=False)
    io.imsave(folder / "rocket.png", data.rocket()[100:165, 200:270], check_contrast=False)
    return folder


@pytest.fixture(scope="session")
def shards(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures as x2 shards."""
    from mambair_ds.prepare import main

    folder = tmp_path_factory.mktemp("data") / "shards"
    assert main(["--gt", str(pictures), "--scale", "2", "--out", str(folder)]) == 0
    return folder


class Workplace:
    """A folder to train in."""

    door: Sequence[str] = ("-m", "mambair_ds.train")

    def __init__(self, folder: Path, shards: Path) -> None:
        self.folder = folder
        self.config = folder / "tiny.yml"
        self.config.write_text(CONFIG.replace("[shards]", f"[{shards}]"))

    def command(self, *overrides: str, ranks: int = 1, arguments: Sequence[str] = ()) -> list[str]:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        settings = [word for override in overrides for word in ("--set", override)]
        return [
            sys.executable,
            *(launcher if ranks > 1 else []),
            *self.door,
            *("--config", str(self.config)),
            *settings,
            *arguments,
        ]

    def train(
        self, *overrides: str, ranks: int = 1, arguments: Sequence[str] = (), timeout: float = 120
    ) -> subprocess.CompletedProcess[str]:
        """Run the door to its end; on `ranks` processes."""
        command = self.command(*overrides, ranks=ranks, arguments=arguments)
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def scalars(self, key: str = "losses/l_pix", name: str = "tiny") -> dict[int, float]:
        """Logged values by iteration; of an iteration done twice the later one."""
        lines = (self.folder / "experiments" / name / "log/metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return {row["iteration"]: row[key] for row in rows if key in row}


@pytest.fixture
def workplace(tmp_path: Path, shards: Path) -> Workplace:
    return Workplace(tmp_path, shards)


MakeWorkplace = Callable[[str], Workplace]


@pytest.fixture
def make_workplace(tmp_path: Path, shards: Path) -> MakeWorkplace:
    """Several places to train in, by name."""

    def make(name: str) -> Workplace:
        (tmp_path / name).mkdir()
        return Workplace(tmp_path / name, shards)

    return make
