"""A checkpoint goes on, on any number of ranks at any ZeRO stage, as if nothing had happened."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import Workplace

from mambair_ds.training import checkpoint as checkpoints
from mambair_ds.training.fragments import join

SETTINGS = ["train.ema_decay=0.9", "train.grad_clip=0.5", "data.train.gt_size=16"]
BATCH = 4
LAYOUTS = [(ranks, stage) for ranks in (1, 2, 4) for stage in range(4)]
SAMPLED = [((1, 0), (2, 3)), ((2, 2), (1, 1)), ((2, 3), (2, 0))]


@dataclass
class Origin:
    begun: Workplace
    whole: Workplace
    iterations: int


def settings(ranks: int, stage: int) -> list[str]:
    return [f"data.train.batch_size={BATCH // ranks}", f"train.zero_stage={stage}"]


@pytest.fixture(scope="module")
def origin(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Origin:
    """A run of 3 iterations on one layout to go on from, and the same run, uninterrupted, to compare with."""
    layout, iterations = request.param
    folder = tmp_path_factory.mktemp("origin")
    places = []
    for name, total in (("begun", 3), ("whole", 3 + iterations)):
        (folder / name).mkdir()
        places.append(Workplace(folder / name, shards))
        done = places[-1].train(*SETTINGS, *settings(*layout), f"train.total_iter={total}", ranks=layout[0])
        assert done.returncode == 0, done.stderr
    return Origin(*places, iterations)


def continues(origin: Origin, resumed: tuple[int, int], place: Workplace) -> None:
    shutil.copytree(origin.begun.folder / "experiments", place.folder / "experiments")
    total = 3 + origin.iterations
    done = place.train(*SETTINGS, *settings(*resumed), f"train.total_iter={total}", ranks=resumed[0])
    assert done.returncode == 0, done.stderr
    assert place.scalars() == pytest.approx(origin.whole.scalars(), abs=1e-5)
    name = f"experiments/tiny/models/net_g_{total}.pth"
    expected, found = (torch.load(one.folder / name, weights_only=True) for one in (origin.whole, place))
    for kind in ("params", "params_ema"):
        for key, tensor in expected[kind].items():
            torch.testing.assert_close(found[kind][key], tensor, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("origin", "resumed"), [((saved, 4), resumed) for saved, resumed in SAMPLED], indirect=["origin"]
)
def test_a_checkpoint_goes_on_in_another_layout(origin: Origin, resumed: tuple[int, int], workplace: Workplace) -> None:
    continues(origin, resumed, workplace)


@pytest.mark.slow
@pytest.mark.parametrize("resumed", LAYOUTS, ids=str)
@pytest.mark.parametrize("origin", [(saved, 20) for saved in LAYOUTS], indirect=True, ids=map(str, LAYOUTS))
def test_every_layout_continues_every_other(origin: Origin, resumed: tuple[int, int], workplace: Workplace) -> None:
    continues(origin, resumed, workplace)


def test_the_same_command_on_other_ranks_keeps_the_batch(workplace: Workplace) -> None:
    assert workplace.train("data.train.batch_size=2", "train.total_iter=2", ranks=2).returncode == 0
    done = workplace.train("data.train.batch_size=2", "train.total_iter=3")
    assert done.returncode == 0, done.stderr
    assert "goes on taking 4 samples, as in the checkpoint: 2 a rank x 1 ranks x 2 accumulated" in done.stdout
    # Three ranks cannot share four samples.
    folder = workplace.folder / "experiments/tiny/checkpoints/0000003"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["batch"] == 4
    changed = manifest | {"batch": 5}
    (folder / "manifest.json").write_text(json.dumps(changed | {"sha256": checkpoints._own_sha256(changed)}))
    refused = workplace.train("data.train.batch_size=2", "train.total_iter=4", ranks=2)
    assert "5 samples a step, which 2 ranks cannot share evenly" in refused.stderr


def test_checkpoints_are_kept_by_age_by_number_and_by_metric(workplace: Workplace, pictures: object) -> None:
    done = workplace.train(
        "train.total_iter=7", "checkpoint.every=1", "checkpoint.keep=1", "checkpoint.keep_every=3",
        "checkpoint.keep_best=photos/psnr", "data.val.every=2", f"data.val.sets.photos.gt={pictures}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    psnr = workplace.scalars("metrics/photos/psnr")
    best = max(psnr, key=lambda iteration: psnr[iteration])
    kept = {int(path.name) for path in (workplace.folder / "experiments/tiny/checkpoints").iterdir()}
    assert kept == {3, 6, 7, best}


def test_what_replaces_a_damaged_checkpoint_leaves_it_there(workplace: Workplace) -> None:
    settings = ["train.total_iter=2", "checkpoint.every=1"]
    assert workplace.train(*settings).returncode == 0
    folder = workplace.folder / "experiments/tiny/checkpoints"
    (folder / "0000002/rank_00000.pt").write_bytes(b"")
    shutil.copytree(folder / "0000002", folder / "0000009.partial")
    assert workplace.train(*settings).returncode == 0
    assert {path.name for path in folder.iterdir()} == {"0000001", "0000002", "0000002.replaced", "0000009.partial"}


def test_runs_that_leave_a_gap_or_overlap_are_no_tensor() -> None:
    a, b = torch.arange(3.0), torch.arange(3.0, 5.0)
    assert torch.equal(join([(3, b), (0, a)], "x"), torch.arange(5.0))
    for parts in ([(0, a), (4, b)], [(0, a), (2, b)], [(1, a)]):
        with pytest.raises(ValueError, match="x: elements"):
            join(parts, "x")
