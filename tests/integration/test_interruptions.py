"""Killed, interrupted or out of room at random moments: the old file or the new one, and nothing besides."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).parents[1] / "interrupted.py"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has neither fork nor these signals")


def stopped(folder: Path, way: str, tries: int) -> dict[str, Any]:
    """{command: how its runs ended, and what broke the promise}."""
    command = [sys.executable, str(PROGRAM), str(folder), way, str(tries)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert [line for one in found.values() for line in one["broken"]] == []
    return found


def seen(found: dict[str, Any], how: str) -> int:
    return sum(one["seen"].get(how, 0) for one in found.values())


@pytest.mark.slow
def test_a_hundred_kills_leave_the_old_file_or_the_new(tmp_path: Path) -> None:
    found = stopped(tmp_path, "kill", 100)
    assert seen(found, "signal 9") >= 30, "most were killed before they were done"


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_behind(tmp_path: Path) -> None:
    found = stopped(tmp_path, "interrupt", 24)
    assert seen(found, "exit 130") >= 6


@pytest.mark.slow
def test_no_room_leaves_what_was_there(tmp_path: Path) -> None:
    found = stopped(tmp_path, "full", 12)
    assert seen(found, "exit 1") >= 6
