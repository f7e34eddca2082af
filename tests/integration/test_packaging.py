"""What is built is what was promised: the wheel, the source archive, and a stranger's empty environment."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

pytest.importorskip("build")
pytest.importorskip("hatchling")
ROOT = Path(__file__).parents[2]
CONSUMER = ROOT / "tests" / "consumer"


def run(command: Sequence[str | Path], folder: Path, **more: str) -> str:
    """What a command prints; the test fails with all of it where it ends badly. It sees none of the checkout."""
    hidden = ("PYTHONPATH", "VIRTUAL_ENV", "NERINE_SCREENSHOTS")
    told = {key: value for key, value in os.environ.items() if key not in hidden} | {"OMP_NUM_THREADS": "1"} | more
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=folder, env=told, timeout=1500)
    if done.returncode:
        pytest.fail(
            f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stdout}\n{done.stderr}", pytrace=False
        )
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the source archive, and with the wheel made from that archive."""
    folder = tmp_path_factory.mktemp("dist")
    run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT], folder)
    return folder


needs_git = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what belongs into a package is what git knows")


def wheel_of(built: Path) -> Path:
    (found,) = built.glob("*.whl")
    return found


def tracked(under: str) -> set[str]:
    """The files below `under` that would travel: all that git knows or would add."""
    listed = run(["git", "ls-files", "--cached", "--others", "--exclude-standard", "--deduplicate", under], ROOT)
    return {line for line in listed.splitlines() if (ROOT / line).is_file()}


@needs_git
def test_the_wheel_holds_the_package_and_its_licences(built: Path) -> None:
    with zipfile.ZipFile(wheel_of(built)) as wheel:
        names = set(wheel.namelist())
        info = next(name.partition("/")[0] for name in names if ".dist-info/" in name)
        metadata = wheel.read(f"{info}/METADATA").decode()
    package = {name for name in names if not name.startswith(info)}
    assert package == {name.removeprefix("src/") for name in tracked("src")}
    assert {f"{info}/licenses/LICENSE", f"{info}/licenses/NOTICE"} <= names
    assert "nerine/py.typed" in package
    assert "License-Expression: Apache-2.0" in metadata
    needed = [line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert {re.split(r"[\s<>=;]", line.removeprefix("Requires-Dist: "))[0] for line in needed} == {
        *("torch", "safetensors", "numpy", "tomli", "typer", "rich"),
    }


@needs_git
def test_the_source_archive_holds_what_its_tests_need(built: Path) -> None:
    (archive,) = built.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    for folder in ("src", "tests", "docs", "benchmarks", "scripts", "examples", "integrations"):
        assert tracked(folder) <= names, folder
    assert {"README.md", "LICENSE", "NOTICE", "CITATION.cff", "SECURITY.md", "CONTRIBUTING.md"} <= names
    assert not [name for name in names if name.startswith((".venv", "site/", "dist/", ".ci"))]


def test_the_description_is_in_order(built: Path) -> None:
    pytest.importorskip("twine")
    run([sys.executable, "-m", "twine", "check", "--strict", *built.iterdir()], built)


@pytest.mark.slow
def test_a_stranger_installs_and_uses_it(built: Path, tmp_path: Path) -> None:
    """Into an empty environment: the core alone, then with the extras of the demo; from outside the checkout."""
    home = tmp_path / "env"
    venv.create(home, with_pip=True)
    python, nerine = home / "bin" / "python", home / "bin" / "nerine"
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    torch = importlib.metadata.version("torch").partition("+")[0]
    run([*pip, f"torch=={torch}", wheel_of(built)], tmp_path)

    installed = run([python, "-c", "import nerine; print(nerine.__file__)"], tmp_path).strip()
    assert Path(installed).is_relative_to(home)
    assert run([nerine, "--version"], tmp_path).strip() == importlib.metadata.version("nerine")
    run([python, "-W", "error", CONSUMER / "program.py", tmp_path], tmp_path)
    report = json.loads(run([nerine, "inspect", "own.safetensors", "--json"], tmp_path))
    assert report
    refused = subprocess.run([nerine, "demo"], capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert refused.returncode == 1
    assert 'pip install "nerine[train' in refused.stderr.replace("\n", " ")

    run([*pip, f"{wheel_of(built)}[train,plots]"], tmp_path)
    run([python, "-m", "pip", "check"], tmp_path)
    told = json.loads(run([nerine, "demo", "--steps", "40", "--out", "shown", "--json"], tmp_path))
    assert told
    made = {path.suffix for path in (tmp_path / "shown").iterdir()}
    assert {".safetensors", ".png"} <= made
    run([nerine, "doctor", "--json"], tmp_path)
    found = run([sys.executable, "-m", "pyright", "--pythonpath", python, CONSUMER / "program.py"], tmp_path)
    assert "0 errors" in found
