"""Print the requirements of pyproject.toml, one a line, for a layer of the image that changes seldom.

Usage: requirements.py [EXTRA ...]; `test` stands for what the tests need of the extra `dev`.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
extras["test"] = [
    line for line in extras["dev"] if line.startswith(("pytest", "psutil", "hypothesis", "jsonschema", "ninja"))
]
print(*project["dependencies"], *(line for name in sys.argv[1:] for line in extras[name]), sep="\n")
