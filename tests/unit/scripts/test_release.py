"""The checklist of a release sees what is missing, and writes version, changelog and citation."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def release() -> ModuleType:
    spec = importlib.util.spec_from_file_location("release_checklist", ROOT / "scripts" / "release.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A project with everything in order, released once as 0.1.0."""
    files = {
        "src/nerine/version.py": '__version__ = "0.1.0"\n',
        "src/nerine/files/meta.py": "SEMANTICS = 1\n",
        "tests/golden/semantics-1.json": "{}\n",
        "CITATION.cff": "cff-version: 1.2.0\nversion: 0.1.0\nlicense: Apache-2.0\n",
        "changelog.d/README.md": "how to\n",
        "changelog.d/shelf.added.md": "A shelf\nof adapters.\n",
        **dict.fromkeys(("LICENSE", "NOTICE", "SECURITY.md", "CONTRIBUTING.md", "README.md"), "x\n"),
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"], ["tag", "v0.1.0"]):
        own = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        subprocess.run(["git", *own, *words], cwd=tmp_path, check=True)
    return tmp_path


def wrong(release: Any, tree: Path, new: str = "0.2.0") -> str:
    """What the checklist says is not in order."""
    return "; ".join(f"{item.title}: {item.found}" for item in release.items(tree, new) if item.found)


def test_a_tree_in_order_may_be_released(release: Any, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert wrong(release, tree) == ""
    assert release.check(tree, "0.2.0") == 0
    assert "tag v0.2.0" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "text", "said"),
    [
        ("CITATION.cff", "version: 0.0.9\n", "0.0.9 there, 0.1.0 here"),
        ("tests/golden/semantics-1.json", "{1}\n", r"changed since v0.1.0: tests/golden/semantics-1.json"),
        ("src/nerine/files/meta.py", "SEMANTICS = 2\n", "missing: tests/golden/semantics-2.json"),
        ("new.py", "x\n", "1 files, such as new.py"),
        ("changelog.d/dora.removed.md", "gone\n", "1 files, such as"),
    ],
)
def test_what_is_not_in_order_is_said(release: Any, tree: Path, file: str, text: str, said: str) -> None:
    (tree / file).write_text(text)
    assert said in wrong(release, tree)
    assert release.check(tree, "0.2.0") == 1


def test_a_missing_policy_and_missing_notes_are_said(release: Any, tree: Path) -> None:
    (tree / "SECURITY.md").unlink()
    (tree / "changelog.d/shelf.added.md").unlink()
    found = wrong(release, tree, "0.1.1")
    assert "policies are there: SECURITY.md" in found
    assert "changelog.d is empty" in found


@pytest.mark.parametrize(
    ("new", "old", "kinds", "first", "said"),
    [
        ("0.1.1", "0.1.0", {"fixed"}, False, ""),
        ("0.1.1", "0.1.0", {"added"}, False, "ask for a minor version, 0.1.1 is a patch one"),
        ("0.2.0", "0.1.4", {"removed"}, False, ""),
        ("1.3.0", "1.2.0", {"changed"}, False, "ask for a major version"),
        ("2.0.0", "1.2.0", {"changed"}, False, ""),
        ("0.4.0", "0.1.0", {"added"}, False, "after 0.1.0 comes one of 0.1.1, 0.2.0, 1.0.0, found 0.4.0"),
        ("0.2", "0.1.0", {"added"}, False, "expected MAJOR.MINOR.PATCH"),
        ("0.1.0", "0.1.0", {"added"}, True, ""),
        ("0.2.0", "0.1.0", {"added"}, True, "nothing was released yet"),
    ],
)
def test_the_version_follows_the_notes(
    release: Any, new: str, old: str, kinds: set[str], first: bool, said: str
) -> None:
    notes = {kind: ["x"] if kind in kinds else [] for kind in release.KINDS}
    found = release.is_next(new, old, notes, is_first=first)
    assert said in found
    assert bool(said) == bool(found)


def test_preparing_moves_the_notes(release: Any, tree: Path) -> None:
    (tree / "CHANGELOG.md").write_text("# Changes\n\n## 0.1.0 (2026-01-01)\n\n- The first one.\n")
    release.prepare(tree, "0.2.0", "2026-11-28")
    assert (tree / "CHANGELOG.md").read_text() == (
        "# Changes\n\n## 0.2.0 (2026-11-28)\n\n### Added\n\n- A shelf\n  of adapters.\n\n"
        "## 0.1.0 (2026-01-01)\n\n- The first one.\n"
    )
    assert release.version_in(tree) == "0.2.0"
    assert "version: 0.2.0\ndate-released: 2026-11-28\n" in (tree / "CITATION.cff").read_text()
    assert [file.name for file in (tree / "changelog.d").iterdir()] == ["README.md"]


def test_a_note_of_no_kind_is_named(release: Any, tree: Path) -> None:
    (tree / "changelog.d/x.better.md").write_text("x\n")
    with pytest.raises(SystemExit, match=r"x\.better\.md: expected"):
        release.notes_of(tree)


def test_nothing_is_built_where_something_fails(release: Any, tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran: list[tuple[str, ...]] = []

    def run(words: tuple[str, ...]) -> int:
        ran.append(words)
        return int(words == ("scripts/speed",))

    assert release.build(tree, run) == 1
    assert ran == list(release.LONG)
    assert "[ ] scripts/speed" in capsys.readouterr().out


def test_this_tree_is_in_order_but_for_commits(release: Any) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("the checklist asks git")
    released = bool(release.tags_of(ROOT))  # then this version is out already, and there may be no notes yet
    found = {item.title for item in release.items(ROOT, release.version_in(ROOT)) if item.found}
    between = {title for title in found if "notes for" in title or "follows" in title}
    assert found - (between if released else set()) <= {"nothing is uncommitted"}
