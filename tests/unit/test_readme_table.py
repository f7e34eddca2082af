"""The figures in the README are the recorded ones, to the letter."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_shows_the_recorded_figures() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "benchmarks" / "readme_table.py"))["readme"](text) == text
