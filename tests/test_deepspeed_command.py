"""docker/deepspeed: the launcher's -m, and nothing else, becomes --module."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMAND = Path(__file__).parent.parent / "docker/deepspeed"


@pytest.mark.parametrize(
    ("typed", "handed_over"),
    [
        ("--num_gpus 8 -m mambair_ds.train --config x.yml", "--num_gpus 8 --module mambair_ds.train --config x.yml"),
        ("--module pkg.train -m 3", "--module pkg.train -m 3"),
        ("-m pkg.train -m 3", "--module pkg.train -m 3"),
        ("--num_nodes 2 train.py -m 3", "--num_nodes 2 train.py -m 3"),
        ("--help", "--help"),
    ],
)
def test_only_the_launchers_own_m_is_rewritten(tmp_path: Path, typed: str, handed_over: str) -> None:
    package = tmp_path / "deepspeed" / "launcher"
    package.mkdir(parents=True)
    (tmp_path / "deepspeed/__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "runner.py").write_text("import sys\ndef main():\n    print(*sys.argv[1:])\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, COMMAND, *typed.split()], env=environment, capture_output=True, text=True)
    assert done.stdout.strip() == handed_over
    assert done.returncode == 0
