"""A run's settings: what is read, and what a mistake is answered with."""

import subprocess
import sys
from pathlib import Path

import pytest

from mambair_ds.config import UserError, apply_debug, load_config

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yml"))

MINIMAL = """
name: tiny
network: {type: MambaIRv2Light, upscale: 2, embed_dim: 8, d_state: 4, depths: [1], num_heads: [2], inner_rank: 4,
          num_tokens: 8, mlp_ratio: 1.0, upsampler: pixelshuffledirect}
task: {kind: sr}
data: {train: {shards: [pictures], gt_size: 32, batch_size: 2}}
train:
  total_iter: 10
  optim: {lr: 2e-4}
  scheduler: {type: MultiStepLR, milestones: [5]}
  pixel_loss: {type: L1Loss}
"""


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yml"
    path.write_text(MINIMAL)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_valid_and_named_after_their_file(path: Path) -> None:
    assert load_config(path).name == path.stem


def test_floats_without_a_dot_are_numbers(minimal: Path) -> None:
    assert load_config(minimal).train.optim.lr == 2e-4


def test_overrides_win_and_reach_into_lists(minimal: Path) -> None:
    overrides = ["train.optim.lr=1e-3", "data.train.shards.0=others", "data.val.sets.Set5.gt=set5"]
    config = load_config(minimal, overrides)
    assert config.train.optim.lr == 1e-3
    assert config.data.train.shards[0].path == Path("others")
    assert config.data.val.sets["Set5"].gt == Path("set5")


def test_debug_prefixes_the_name_and_logs_every_step(minimal: Path) -> None:
    config = load_config(minimal, apply_debug(["log.tensorboard=true"], "tiny"))
    assert config.name == "debug_tiny"
    assert (config.log.print_freq, config.data.val.every, config.checkpoint.every) == (1, 8, 8)
    assert not config.log.tensorboard


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.totl_iter=4", ["--set train.totl_iter=4", "unknown key", "total_iter"]),
        ("data.val.sets.Set5.gtt=x", ["data.val.sets.Set5.gtt", "unknown key", "gt"]),
        ("network.embed_dim=wide", ["network.embed_dim=wide", "integer", "'wide'"]),
        ("network.num_heads=[3]", ["network", "embed_dim 8 is not divisible"]),
        ("train.precision=fp8", ["train.precision=fp8", "'fp32'", "'bf16'"]),
        ("train.optim.lr=-1", ["greater than 0", "-1"]),
        ("data.train.gt_size=33", ["gt_size 33", "multiple of network.upscale 2"]),
        ("task.sigma=15", ["sigma belongs to kind denoise"]),
        ("task.kind=denoise", ["sigma is missing"]),
        ("train.scheduler.gama=0.5", ["unknown key", "gamma"]),
        ("train.scheduler.type=Linear", ["train.scheduler", "MultiStepLR"]),
        ("train.scheduler={type: CosineAnnealingRestartLR, periods: [5]}", ["periods cover 5 of 10"]),
        ("train.precision=pure_bf16", ["zero_stage 1, 2 or 3"]),
        ("train.cuda_graphs=true", ["needs compile: true"]),
        ("train.overlap_comm=true", ["zero_stage 1, 2 or 3"]),
        ("data.train.shards.4=x", ["'4' is no index of a list of 1"]),
        ("name.first=x", ["name is a value, not a group"]),
        ("name=a/b", ["name=a/b"]),
        ("no equals sign", ["expected KEY=VALUE"]),
        ("name=[1", ["not valid YAML"]),
    ],
)
def test_a_wrong_setting_is_named_with_what_was_expected(minimal: Path, override: str, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(minimal, [override])
    for part in said:
        assert part in str(caught.value)


def test_every_wrong_key_of_a_file_is_listed_with_the_file(minimal: Path) -> None:
    minimal.write_text(MINIMAL.replace("total_iter: 10", "total_iter: many").replace("name: tiny", "nmae: tiny"))
    with pytest.raises(UserError) as caught:
        load_config(minimal)
    lines = str(caught.value).splitlines()
    assert len(lines) == 3  # the wrong type, the unknown key, and the key it was meant to be
    assert all(line.startswith(f"{minimal}: ") for line in lines)


@pytest.mark.parametrize(
    ("text", "said"),
    [("name: [", "not valid YAML"), ("- a list", "expected a mapping"), (MINIMAL + "name: again", "given twice")],
)
def test_a_malformed_file_is_an_error(minimal: Path, text: str, said: str) -> None:
    minimal.write_text(text)
    with pytest.raises(UserError, match=said):
        load_config(minimal)


def test_missing_files_and_folders_are_named(minimal: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no file .*absent\.yml"):
        load_config(tmp_path / "absent.yml")
    with pytest.raises(UserError, match=r"data\.train\.shards\.0: no folder pictures"):
        load_config(minimal).check_paths()
    with pytest.raises(UserError, match=r"data\.val\.sets\.Set5\.lq: no folder nowhere"):
        load_config(
            minimal,
            [
                f"data.train.shards.0={tmp_path}",
                f"data.val.sets.Set5.gt={tmp_path}",
                "data.val.sets.Set5.lq=nowhere",
            ],
        ).check_paths()


def test_the_schema_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, mambair_ds.config; sys.exit(any(name in sys.modules for name in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("door", ["train", "prepare", "demo"])
def test_help_of_every_door_needs_no_heavy_import(door: str) -> None:
    """The import list, not a clock: what makes --help slow is torch, deepspeed or DALI."""
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['{door}', '--help']\n"
        "try:\n"
        f"    runpy.run_module('mambair_ds.{door}', run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    heavy = {'torch', 'deepspeed', 'nvidia.dali', 'numba', 'cv2', 'numpy'} & set(sys.modules)\n"
        "    sys.exit(f'imported {heavy}' if heavy or end.code else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout
