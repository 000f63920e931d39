"""Prints `name==bound` for each dependency in pyproject.toml, for `pip install -r`. Needs Python 3.11 (tomllib)."""

from __future__ import annotations

import sys
from pathlib import Path

import tomllib


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for dependency in project["dependencies"]:
        name, found, bound = dependency.partition(">=")
        if not found or not bound.replace(".", "").isdigit():
            sys.exit(f"pyproject.toml: {dependency!r} is not NAME>=VERSION, so its lowest version is unknown")
        print(f"{name}=={bound}")


if __name__ == "__main__":
    main()
