"""Every Python block of the README and the documents runs, each document as one program in an empty folder."""

from __future__ import annotations

import re
import shlex
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from commands import run

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
NEEDS = {"pipelines.md": ("diffusers", "transformers", "accelerate", "peft")}  # packages that are not always there
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(document: Path) -> list[str]:
    """The Python blocks of a document, each at its own line numbers, so that a traceback points into the document."""
    text = document.read_text(encoding="utf-8")
    return ["\n" * text[: m.start(1)].count("\n") + m.group(1) for m in BLOCK.finditer(text)]


def runnable() -> list[Any]:
    """The documents with code; where it uses other packages, those may warn of their own future."""
    warns = [
        pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
        pytest.mark.no_device_guard,
    ]
    return [pytest.param(d, id=d.name, marks=warns if d.name in NEEDS else []) for d in DOCUMENTS if blocks(d)]


@pytest.mark.parametrize("document", runnable())
def test_the_blocks_run(document: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in NEEDS.get(document.name, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    program = types.ModuleType("document")
    monkeypatch.setitem(sys.modules, "document", program)  # where dataclasses and pickle look a class up
    for code in blocks(document):
        exec(compile(code, str(document), "exec", dont_inherit=True), program.__dict__)


COMMAND = re.compile(r"^```(python|sh)\n(.*?)^```", re.MULTILINE | re.DOTALL)


WORK = {"inspect", "compare", "verify", "merge", "extract", "suggest", "convert", "resize", "combine"}


@pytest.mark.no_device_guard
@pytest.mark.parametrize(("page", "commands"), [("tools.md", WORK), ("training.md", {"train", "generate"})])
def test_the_commands_of_a_page_run(
    page: str, commands: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every `nerine` line of a page, in order, on the files that its first block makes."""
    for package in ("diffusers", "accelerate"):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    ran: dict[str, int] = {}
    space: dict[str, Any] = {}
    for kind, code in COMMAND.findall(text):
        if kind == "python":
            exec(compile(code, f"docs/{page}", "exec", dont_inherit=True), space)
            continue
        for line in code.splitlines():
            words = shlex.split(line)
            assert words[0] == "nerine", line
            done = run(capsys, *words[1:])
            assert done.code == 0, f"{line}\n{done.out}\n{done.err}"
            assert done.out.strip(), line
            ran[words[1]] = ran.get(words[1], 0) + 1
    assert set(ran) >= commands


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_the_links_lead_somewhere(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text) + re.findall(r'src="([^":]+)"', text)
    assert [t for t in targets if not (document.parent / t).exists()] == []


def test_the_readme_shows_code() -> None:
    assert blocks(ROOT / "README.md")
