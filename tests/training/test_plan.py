"""The plan of a run: counted memory against what layers really keep, and what --check says and refuses."""

import contextlib
from pathlib import Path

import pytest
import torch
from conftest import Workplace
from torch._dynamo.trace_rules import get_torch_obj_rule_map

from mambair_ds import kernels
from mambair_ds.config import load_config
from mambair_ds.kernels.philox import NoiseKey
from mambair_ds.models import build_model
from mambair_ds.training.plan import GB, head_per_token, kept_per_token, predict

CONFIGS = Path(__file__).parents[2] / "configs"


def kept(network, side: int) -> int:
    """Bytes of everything that autograd keeps but parameters, for one picture: on meta tensors, nothing is computed."""
    with torch.device("meta"):
        model = build_model(network)
        x = torch.empty(1, network.in_chans, side, side)
        parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in parameters:
                seen[storage._cdata] = storage.nbytes()
                alive.append(tensor)
            return tensor

        alive: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = model(x, noise=NoiseKey(0, torch.zeros(1, dtype=torch.int64)))
            loss = (output - torch.empty_like(output)).abs().mean()
    assert loss.requires_grad
    return sum(seen.values())


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Operators of a GPU, on meta tensors, of which PyTorch knows no autocast."""
    get_torch_obj_rule_map()  # Dynamo looks PyTorch's functions up once: before they are replaced
    monkeypatch.setattr(kernels, "_preferred", lambda *_: "triton")
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


@pytest.mark.parametrize("name", ["x2", "x3", "x4", "x2_light", "x2_small", "denoise_50", "jpeg_10"])
@pytest.mark.parametrize("depth", [1, 2])
def test_activations_are_counted_as_the_gpus_operators_keep_them(name: str, depth: int, on_meta: None) -> None:
    heads = load_config(CONFIGS / f"{name}.yml").network.num_heads[0]
    config = load_config(CONFIGS / f"{name}.yml", [f"network.depths=[{depth}]", f"network.num_heads=[{heads}]"])
    network, side = config.network, 64
    predicted = side**2 * (depth * kept_per_token(network, 4, 4) + head_per_token(network, 4, 4))
    assert predicted == pytest.approx(kept(network, side), rel=0.01)


def test_the_nearest_head_is_counted_too(on_meta: None) -> None:
    settings = ["network.depths=[1]", "network.num_heads=[6]", "network.upsampler=nearest+conv"]
    network = load_config(CONFIGS / "x4.yml", settings).network
    predicted = 64**2 * (kept_per_token(network, 4, 4) + head_per_token(network, 4, 4))
    assert predicted == pytest.approx(kept(network, 64), rel=0.01)


def test_stages_and_checkpointing_take_less() -> None:
    def memory(*settings: str, ranks: int = 8):  # type: ignore[no-untyped-def]
        return predict(load_config(CONFIGS / "x2.yml", list(settings)), 23_000_000, ranks, precision="bf16")

    fixed = [memory(f"train.zero_stage={stage}").fixed for stage in (1, 2, 3)]
    assert fixed == sorted(fixed, reverse=True)
    samples = [memory(f"network.use_checkpoint={how}").sample for how in ("false", "selective", "true")]
    assert samples[0] > 2 * samples[1] > 2 * samples[2]
    assert samples[2] < 0.15 * samples[0]
    assert memory("data.train.batch_size=8").peak(8) > memory().peak(4)
    plain = memory()
    assert plain.peak(plain.largest_batch(80 * GB)) <= 80 * GB < plain.peak(plain.largest_batch(80 * GB) + 1)


def test_check_prints_the_plan_and_starts_nothing(workplace: Workplace) -> None:
    done = workplace.train("data.train.batch_size=2", arguments=["--check", "--ranks", "4"])
    assert done.returncode == 0, done.stderr
    assert "2 a rank x 4 ranks x 1 accumulated = 8" in done.stdout
    assert "experiments/tiny: new" in done.stdout and "fits into 80 GB" in done.stdout
    assert not (workplace.folder / "experiments").exists()
    assert workplace.train().returncode == 0
    done = workplace.train(arguments=["--check"])
    assert "goes on from iteration 6" in done.stdout and "samples/s of its last log line" in done.stdout


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.optim.lr=-1", "train.optim.lr=-1"),
        ("data.train.shards=[nowhere]", "no folder nowhere"),
        ("checkpoint.keep=1000000000", "make room"),
    ],
)
def test_check_refuses_what_cannot_run(workplace: Workplace, setting: str, said: str) -> None:
    done = workplace.train(setting, arguments=["--check"])
    assert done.returncode == 2
    assert said in done.stderr and "Traceback" not in done.stderr
