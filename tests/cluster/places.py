"""What the cluster's tests and the storm train: noise as pictures, a tiny network, and their runs read back."""

import json
import re
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES = 12
CONFIG = """
name: tiny
seed: 3
network: {type: MambaIRv2Light, upscale: 2, embed_dim: 8, d_state: 4, depths: [1], num_heads: [2], window_size: 8,
          inner_rank: 4, num_tokens: 8, mlp_ratio: 1.0, upsampler: pixelshuffledirect}
task: {kind: sr}
data:
  train: {shards: [shards], gt_size: 32, batch_size: 1}
train:
  total_iter: 200
  optim: {lr: 1e-3}
  scheduler: {type: MultiStepLR, milestones: [100]}
  pixel_loss: {type: L1Loss}
  ema_decay: 0.9
checkpoint: {every: 10, keep: 3}
log: {print_freq: 1}
"""


def make_place(folder: Path) -> Path:
    """Write the configuration and shards of random pictures into `folder`; returns the configuration."""
    from mambair_ds.prepare import main

    gt = folder / "gt"
    gt.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i in range(PICTURES):
        coarse = Image.fromarray(random.integers(0, 256, (12, 12, 3), np.uint8))
        coarse.resize((48, 48), Image.Resampling.BICUBIC).save(gt / f"{i:02d}.png")
    assert main(["--gt", str(gt), "--scale", "2", "--out", str(folder / "shards"), "--workers", "1"]) == 0
    config = folder / "tiny.yml"
    config.write_text(CONFIG)
    return config


def losses(run: Path) -> dict[int, float]:
    """Losses by iteration; of an iteration done twice the later one. A line that a kill cut off is passed over."""
    log = run / "log/metrics.jsonl"
    found = {}
    for record in re.findall(r'\{"iteration"[^{}]*\}', log.read_text(errors="replace") if log.exists() else ""):
        row = json.loads(record)
        if "losses/l_pix" in row:
            found[row["iteration"]] = row["losses/l_pix"]
    return found
