"""The figures on the page about serving are the recorded ones, to the letter."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_the_page_shows_the_recorded_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    script = runpy.run_path(str(ROOT / "benchmarks" / "serving.py"))
    recorded = json.loads((ROOT / "benchmarks" / "results" / "serving.json").read_text("utf-8"))
    batches = [script["Batch"](**row) for row in recorded["batches"]]
    table = script["tables"](batches, [script["Swap"](**row) for row in recorded["swaps"]])
    page = (ROOT / "docs" / "serving.md").read_text("utf-8")
    assert script["into"](page, table) == page
    assert table in (ROOT / "benchmarks" / "results" / "serving.md").read_text("utf-8")
