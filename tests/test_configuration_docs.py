"""What is generated from the schema is up to date, and describes the files in configs/."""

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def generated():
    spec = importlib.util.spec_from_file_location("configuration", ROOT / "docs/configuration.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("file", "what"), [("docs/configuration.md", "markdown"), ("configs/schema.json", "schema")])
def test_generated_files_are_up_to_date(generated, file, what):
    text = getattr(generated, what)()
    assert (ROOT / file).read_text(encoding="utf-8") == text, "run python docs/configuration.py"


def test_every_setting_is_described(generated):
    rows = [line for line in generated.markdown().splitlines() if line.startswith("| `")]
    assert len(rows) > 90
    assert not [row for row in rows if row.rstrip().endswith("|  |") and "`type`" not in row]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yml")), ids=lambda path: path.stem)
def test_configurations_name_and_fit_the_schema(path):
    jsonschema = pytest.importorskip("jsonschema")
    assert path.read_text().startswith("# yaml-language-server: $schema=schema.json\n")
    from mambair_ds.config import parse_yaml

    validator = jsonschema.Draft202012Validator(json.loads((ROOT / "configs/schema.json").read_text()))
    tree = parse_yaml(path.read_text())
    validator.validate(tree)
    tree["network"]["stars"] = 3
    assert not validator.is_valid(tree)
