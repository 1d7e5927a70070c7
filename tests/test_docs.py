"""Every command of README and docs works: run for real in small, or checked against what it names."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from networks import build_tiny, tiny_network
from PIL import Image

from mambair_ds.config import load_config
from mambair_ds.weights import save_network

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
DOOR = re.compile(r"mambair_ds\.(?!download)\w+")
REDUCED = [f"network={{{', '.join(f'{k}: {v}' for k, v in tiny_network(upsampler='pixelshuffledirect').items())}}}"]
REDUCED += ["data.train.gt_size=32", "data.train.batch_size=1", "train.total_iter=1", "data.val.sets={}"]


def commands() -> list[str]:
    """The lines of all shell blocks, continued ones joined, without their comments."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```(?:sh|bash)\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                line = re.sub(r"\s+#.*", "", line).strip()
                found += [part.strip() for part in line.split("&&") if part.strip() and not part.startswith("#")]
    return list(dict.fromkeys(found))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder in which the names that the docs use are there, in small."""
    folder = tmp_path_factory.mktemp("docs")
    random = np.random.default_rng(0)

    def pictures(name, count=2, size=(48, 56), suffix="png", names="{}"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture = Image.fromarray(random.integers(0, 256, (*size, 3), np.uint8))
            picture.save(folder / name / f"{names.format(f'p{i}')}.{suffix}")

    for name in ("datasets/DF2K/HR", "datasets/DFWB", "DIV2K/HR", "HR", "photos", "datasets/CBSD68"):
        pictures(name)
    pictures("Flickr2K/HR", names="f{}")
    pictures("more", suffix="jpg", names="m{}")
    Image.fromarray(random.integers(0, 256, (20, 24), np.uint8)).convert("RGB").save(folder / "photo.png")
    pictures("datasets/Classic5")
    pictures("LR_bicubic/X2", size=(24, 28), names="{}x2")
    for name in ("Set5", "Set14"):
        pictures(f"datasets/{name}/HR")
        pictures(f"datasets/{name}/LR_bicubic/X2", size=(24, 28), names="{}x2")
    (folder / "configs").symlink_to(ROOT / "configs")
    tiny = build_tiny().state_dict()
    for name in ("x2", "x2_light"):
        save_network(folder / f"experiments/{name}/models/net_g_500000.pth", {"params": tiny})
    save_network(folder / "weights/mambairv2_lightSR_x2.pth", {"params": tiny})
    same = build_tiny(upscale=1, upsampler="").state_dict()
    save_network(folder / "weights/mambairv2_ColorDN_15.pth", {"params": same})
    grey = build_tiny(upscale=1, upsampler="", in_chans=1).state_dict()
    save_network(folder / "weights/mambairv2_jpeg_q10.pth", {"params": grey})
    return folder


def run_door(module: str, arguments: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    with pytest.raises(SystemExit) as left:
        runpy.run_module(module, run_name="__main__")
    return int(left.value.code or 0)


@pytest.mark.parametrize("command", commands())
def test_a_command_of_the_docs_works(command, place, monkeypatch, capsys):
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    match words:
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert set(target for target in targets if "=" not in target) <= set(known)
        case ["sbatch", *rest]:
            script = next(word for word in rest if word.endswith(".sh"))
            assert subprocess.run(["bash", "-n", ROOT / script]).returncode == 0
            assert all((ROOT / word).is_file() for word in rest if word.endswith(".yml"))
        case ["python" | "deepspeed" | "torchrun" | "srun", *rest] if any(DOOR.fullmatch(word) for word in rest):
            at = next(i for i, word in enumerate(rest) if DOOR.fullmatch(word))
            run_one(rest[at], rest[at + 1 :], command, place, monkeypatch)
        case ["python", "-m", "mambair_ds.download", name]:
            from mambair_ds.download import FILES

            assert name in FILES
        case ["python", "-c", _]:
            if "shards/x2" in command and not (place / "shards/x2").exists():
                packing = next(c for c in commands() if "prepare" in c and c.endswith("--out shards/x2"))
                assert run_door("mambair_ds.prepare", shlex.split(packing)[3:], place, monkeypatch) == 0
            assert subprocess.run([sys.executable, *words[1:]], cwd=place).returncode == 0
        case (
            ["python", "docs/configuration.py"]
            | ["pre-commit", "install"]
            | ["git", "clone", *_]
            | ["cd", _]
            | [".", _]
        ):
            pass
        case ["docker" | "podman" | "apptainer" | "enroot" | "docker/multinode.sh" | "pip", *rest]:
            paths = [word for word in rest if "/" in word and not word.startswith(("-", "/")) and ":" not in word]
            assert all((ROOT / path).exists() or path.startswith("experiments") for path in paths)
        case _:
            pytest.fail("no test knows this command")


def run_one(module, arguments, command, place, monkeypatch):
    if module != "mambair_ds.train":
        if "configs/" in command and module == "mambair_ds.evaluate":
            arguments += ["--set", REDUCED[0], "--set", "data.val.sets={Set5: {gt: datasets/Set5/HR}}"]
        if "<" in arguments or ">" in arguments:
            source, target = arguments[arguments.index("<") + 1], arguments[arguments.index(">") + 1]
            arguments = arguments[: arguments.index("<")]
            program = [sys.executable, "-m", module, *arguments]
            with (place / source).open("rb") as read, (place / target).open("wb") as write:
                assert subprocess.run(program, cwd=place, stdin=read, stdout=write).returncode == 0
            return
        if module == "mambair_ds.restore":
            arguments.append("--overwrite")
        assert run_door(module, arguments, place, monkeypatch) == 0
        return
    arguments = [word for word in arguments if word not in ("--resume", "DIR")]
    config = load_config(ROOT / arguments[arguments.index("--config") + 1])  # the file itself is right
    shards = place / "shards/ready"
    if not shards.exists():
        assert (
            run_door("mambair_ds.prepare", ["--gt", "HR", "--scale", "2", "--out", str(shards)], place, monkeypatch)
            == 0
        )
    reduced = [*REDUCED, f"data.train.shards=[{shards}]", f"name=docs_{config.name}"]
    if "train.pretrain.path" not in command:
        reduced.append("train.pretrain=null")
    if config.task.kind != "sr":
        reduced.append("task={kind: sr}")
    for setting in reduced:
        arguments += ["--set", setting]
    program = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(program, cwd=place, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_links_between_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_yaml_of_the_docs_is_known_to_the_schema():
    from mambair_ds.config import RunConfig, parse_yaml, validate

    base = (ROOT / "configs/x4.yml").read_text()
    for page in PAGES:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            tree = parse_yaml(base)
            for key, value in parse_yaml(block).items():
                if isinstance(value, dict) and isinstance(tree.get(key), dict):
                    tree[key] |= value
                else:
                    tree[key] = value
            validate(tree, page.name, None, RunConfig)
