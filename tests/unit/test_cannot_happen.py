"""The page of what cannot happen: every claim names a test, and every test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "cannot-happen.md").read_text(encoding="utf-8")
CLAIMS, NOT_YET = PAGE.split("## Not yet")
ROWS = [
    line
    for line in CLAIMS.splitlines()
    if line.startswith("| ") and not line.startswith("| you meet")  # the heads of the tables
]
TEST = re.compile(r"`([\w/]+\.py)::(\w+)`")


def is_there(file: str, name: str) -> bool:
    path = ROOT / "tests" / file
    return path.is_file() and re.search(rf"^def {name}\(", path.read_text(encoding="utf-8"), re.MULTILINE) is not None


def test_every_claim_names_tests() -> None:
    for row in ROWS:
        *_, proof = row.strip("| ").split(" | ")
        assert TEST.findall(proof), f"no test is named: {row}"
        assert TEST.sub("", proof).strip(", ") == "", f"something that is no test: {proof}"


def test_the_tests_that_are_named_are_there() -> None:
    named = [found for row in ROWS for found in TEST.findall(row)]
    assert [f"{file}::{name}" for file, name in named if not is_there(file, name)] == []


def test_every_row_has_four_cells() -> None:
    assert [row for row in ROWS if len(row.strip("| ").split(" | ")) != 4] == []
    assert len(ROWS) > 40


def test_what_is_not_solved_is_told() -> None:
    assert NOT_YET.count("\n- ") >= 5
