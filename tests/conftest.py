"""Options of the whole suite: GPU tests skip without a CUDA device, others wait for ``-m`` to name them."""

import os
from collections.abc import Iterator

# One thread count for every float32 sum of the suite; set before torch or numba start.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# DeepSpeed looks for an accelerator and warns; tests outside `gpu` run on the CPU by design.
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import pytest


@pytest.fixture(autouse=True)
def no_launcher_left_behind() -> Iterator[None]:
    """A door that ran in this process told torch where to meet; processes started later would read it."""
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in names}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


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
