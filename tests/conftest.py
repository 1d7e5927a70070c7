"""Options of the whole suite: GPU tests skip without a CUDA device, others wait for ``-m`` to name them."""

import os

# One thread count for every float32 sum of the suite; set before torch or numba start.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# DeepSpeed looks for an accelerator and warns; tests outside `gpu` run on the CPU by design.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("-m") or ""
    for item in items:
        if "gpu" in item.keywords:
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        for marker, target in (("slow", "test-slow"), ("cluster", "slurm-test")):
            if item.get_closest_marker(marker) and marker not in wanted:
                item.add_marker(pytest.mark.skip(reason=f"{marker}; run with `make {target}`"))
