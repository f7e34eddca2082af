"""The tables of the trainer's pages are what the code and the recorded results say, to the letter."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("program", "pages"),
    [
        ("training_table.py", ("docs/training.md",)),
        ("quality_table.py", ("docs/which-algorithm.md", "README.md")),
    ],
)
def test_the_tables_are_those_of_today(program: str, pages: tuple[str, ...]) -> None:
    made = runpy.run_path(str(ROOT / "benchmarks" / program))["page"]
    for name in pages:
        text = (ROOT / name).read_text(encoding="utf-8")
        assert made(text) == text, f"{name}: run benchmarks/{program}"
