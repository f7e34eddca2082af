"""The types that travel with nerine, as a project that uses it meets them: mypy and pyright, both strict."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONSUMER = Path(__file__).parents[1] / "consumer"


def mypy_errors(file: Path, folder: Path) -> set[int]:
    """The lines in which mypy finds something, with no settings but strictness."""
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--cache-dir", str(folder / "cache")]
    done = subprocess.run([*command, str(file)], capture_output=True, text=True, cwd=folder, timeout=900)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    return {int(line) for line in re.findall(rf"{file.name}:(\d+): error", done.stdout)}


def pyright_errors(file: Path, folder: Path) -> set[int]:
    """The lines in which pyright finds something, strict but for what torch itself leaves untyped."""
    folder = folder / file.stem  # what lies beside a program is checked with it
    folder.mkdir()
    shutil.copy(file, folder)
    settings = {
        "typeCheckingMode": "strict",
        "reportUnknownMemberType": False,
        "reportUnknownVariableType": False,
        "reportUnknownArgumentType": False,
        "reportMissingTypeStubs": False,
    }
    (folder / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "-p", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = json.loads(done.stdout[done.stdout.index("{") :])
    assert found["summary"]["filesAnalyzed"] == 1, found
    return {one["range"]["start"]["line"] + 1 for one in found["generalDiagnostics"] if one["severity"] == "error"}


@pytest.mark.parametrize(
    "errors_of", [pyright_errors, pytest.param(mypy_errors, marks=pytest.mark.slow)], ids=["pyright", "mypy"]
)
def test_checkers_see_what_is_right_and_what_is_wrong(errors_of, tmp_path: Path) -> None:
    mistakes = CONSUMER / "mistakes.py"
    marked = {n for n, line in enumerate(mistakes.read_text().splitlines(), 1) if "# WRONG" in line}
    assert errors_of(CONSUMER / "program.py", tmp_path) == set()
    assert errors_of(mistakes, tmp_path) == marked
    assert len(marked) > 10


def test_the_program_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(CONSUMER / "program.py"), str(tmp_path)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
