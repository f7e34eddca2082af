"""The table of extras in docs/install.md is the one of pyproject.toml, package by package."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGE = (ROOT / "docs" / "install.md").read_text()


def bare(requirement: str) -> str:
    return re.split(r"[\s<>=;\[~]", requirement)[0]


def test_every_extra_is_in_the_table_with_its_packages() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.+?) \|", PAGE, re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    assert rows.keys() == extras.keys()
    for name, packages in extras.items():
        said = {re.sub(r"\s*\(.*\)", "", word).strip() for word in rows[name].split(",")}
        if name == "dev":  # "and more"
            assert {word.partition(" and ")[0] for word in said} <= {bare(p) for p in packages}
        else:
            assert said == {bare(p) for p in packages}, name


def test_what_the_core_needs_is_named() -> None:
    for requirement in PROJECT["dependencies"]:
        assert re.search(rf"\b{bare(requirement)}\b", PAGE), requirement
