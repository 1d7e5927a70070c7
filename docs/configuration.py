"""Write what follows from the schema of a run: docs/configuration.md, and configs/schema.json for editors.

    python docs/configuration.py

A test fails while either file is out of date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mambair_ds.config import EvaluationConfig, RunConfig

ROOT = Path(__file__).parent.parent
HEAD = """# Configuration

Every setting of a run, written by `python docs/configuration.py` from
[`mambair_ds/config.py`](../mambair_ds/config.py). `--set KEY=VALUE` overrides any of them, as in
`--set train.optim.lr=1e-4` or `--set 'data.train.shards=[a, b]'`. An unknown key is an error that names the closest
one. Editors that know YAML schemas complete keys and show these texts: the files in `configs/` name
`configs/schema.json` in their first line.

A file for `evaluate --config` may also hold `weights`, `network`, `task` and `data.val` alone.
"""


def schema() -> str:
    """JSON schema of the files in configs/: runs, and evaluations."""
    run, evaluation = (model.model_json_schema() for model in (RunConfig, EvaluationConfig))
    definitions = run.pop("$defs") | evaluation.pop("$defs")
    tree = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A run or an evaluation of mambair_ds",
        "if": {"required": ["train"]},
        "then": run,
        "else": evaluation,
        "$defs": definitions,
    }
    return json.dumps(tree, indent=1) + "\n"


def markdown() -> str:
    """The reference: a table for every group of settings."""
    tree = RunConfig.model_json_schema()
    definitions, parts = tree["$defs"], [HEAD]

    def group(name: str, node: dict[str, Any]) -> None:
        title = f"`{name}`" if name else "A run"
        rows, groups = [], []
        for key, value in node["properties"].items():
            path = f"{name}.{key}" if name else key
            inner = _groups(value, definitions)
            default = "required" if key in node.get("required", []) else _default(value, bool(inner))
            rows.append(f"| `{key}` | {_kind(value, definitions)} | {default} | {_text(value)} |")
            groups += [(path + where, one) for where, one in inner]
        about = _text(node)
        table = "\n".join(["| key | type | default | |", "| --- | --- | --- | --- |", *rows])
        parts.append(f"## {title}\n\n{about}\n\n{table}\n")
        for path, one in groups:
            group(path, one)

    group("", tree)
    return "\n".join(parts)


def _groups(node: dict[str, Any], definitions: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The groups of settings that a value may be, and how its path goes on."""
    if "$ref" in node:
        found = definitions[node["$ref"].rsplit("/", 1)[-1]]
        return [("", found)] if "properties" in found else []
    if "items" in node:
        return [(f".N{where}", one) for where, one in _groups(node["items"], definitions)]
    if "patternProperties" in node:
        inner = next(iter(node["patternProperties"].values()))
        return [(f".NAME{where}", one) for where, one in _groups(inner, definitions)]
    branches = [found for branch in node.get("anyOf", node.get("oneOf", [])) for found in _groups(branch, definitions)]
    if len(branches) > 1:  # told apart by their type
        return [(f" ({one['properties']['type']['const']})", one) for _, one in branches]
    return branches


def _kind(node: dict[str, Any], definitions: dict[str, Any]) -> str:
    if "$ref" in node or "oneOf" in node or "patternProperties" in node:
        return "group"
    if "anyOf" in node:
        kinds = [_kind(branch, definitions) for branch in node["anyOf"]]
        return " or ".join(dict.fromkeys(kind for kind in kinds if kind != "null"))
    if "const" in node:
        return f"`{node['const']}`"
    if "enum" in node:
        return ", ".join(f"`{value!r}`".replace("'", '"') if value == "" else f"`{value}`" for value in node["enum"])
    if node.get("type") == "array":
        inner = node.get("items") or (node.get("prefixItems") or [{}])[0]
        count = f"{len(node['prefixItems'])} times " if "prefixItems" in node else "list of "
        return count + _kind(inner, definitions)
    limits = [
        f"{sign} {node[key]:g}"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
        if key in node
    ]
    name = "path" if node.get("format") == "path" else node.get("type", "any")
    return " ".join([name, ", ".join(limits)]).strip()


def _default(node: dict[str, Any], is_group: bool) -> str:
    value = node.get("default")
    if value is None:
        return "absent"
    return "see there" if is_group and value else f"`{json.dumps(value)}`"


def _text(node: dict[str, Any]) -> str:
    return " ".join(node.get("description", "").split()).replace("|", "\\|")


if __name__ == "__main__":
    (ROOT / "docs/configuration.md").write_text(markdown(), encoding="utf-8")
    (ROOT / "configs/schema.json").write_text(schema(), encoding="utf-8")
