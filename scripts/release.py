"""The checklist of a release, as a program: what it can check it checks, what a person must do it says.

    scripts/release check 0.2.0      whether this tree could become 0.2.0; changes nothing
    scripts/release prepare 0.2.0    version, CHANGELOG.md and CITATION.cff are written; look at them and commit
    scripts/release build            every check, every test, the documents; then dist/ with its checksums

Nothing is uploaded, tagged or pushed. Exit code 1: something is not in order.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
KINDS = ("added", "changed", "fixed", "removed")
SEMVER = re.compile(r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)")
LONG = (
    ("scripts/check",),
    ("scripts/test",),
    ("scripts/test", "-m", "slow"),
    ("scripts/docs",),
    ("scripts/speed",),
    ("scripts/fuzz", "20000"),
)
BY_HAND = (
    "Run the GPU checks of benchmarks/ on a card, and commit what they found under benchmarks/results/.",
    "Open site/index.html, the tutorial and one page of an algorithm: do they read well, are the pictures right?",
    "Install dist/*.whl into a new environment on another machine and run `nerine doctor`.",
    "Commit, tag v{version}, push; upload dist/ with `twine upload dist/*`.",
    "Write to those whose reports were fixed.",
)


@dataclass(frozen=True)
class Item:
    """A line of the checklist; `found` says what is wrong, or nothing."""

    title: str
    found: str = ""

    def __str__(self) -> str:
        return f"[x] {self.title}" if not self.found else f"[ ] {self.title}: {self.found}"


def version_in(root: Path) -> str:
    """The version that the package says it has."""
    found = re.search(r'__version__ = "([^"]+)"', (root / "src/nerine/version.py").read_text())
    assert found, "src/nerine/version.py has no __version__"
    return found[1]


def notes_of(root: Path) -> dict[str, list[str]]:
    """{kind: texts} of the notes that wait for a release."""
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for file in sorted((root / "changelog.d").glob("*.*.md")):
        kind = file.suffixes[-2].removeprefix(".")
        if kind not in found:
            raise SystemExit(f"{file}: expected <slug>.<{'|'.join(KINDS)}>.md")
        found[kind].append(file.read_text().strip())
    return found


def is_next(new: str, old: str, notes: dict[str, list[str]], *, is_first: bool) -> str:
    """What speaks against going from `old` to `new`, or nothing; the first release has the version that is there."""
    if not SEMVER.fullmatch(new):
        return f"expected MAJOR.MINOR.PATCH, found {new!r}"
    if is_first:
        return "" if new == old else f"nothing was released yet, so the first one is {old}; found {new}"
    (major, minor, patch), before = map(int, new.split(".")), tuple(map(int, old.split(".")))
    allowed = {
        "patch": (before[0], before[1], before[2] + 1),
        "minor": (before[0], before[1] + 1, 0),
        "major": (before[0] + 1, 0, 0),
    }
    kind = next((name for name, value in allowed.items() if value == (major, minor, patch)), "")
    if not kind:
        return f"after {old} comes one of {', '.join('.'.join(map(str, v)) for v in allowed.values())}, found {new}"
    breaks = notes["changed"] or notes["removed"]
    needed = ("major" if before[0] else "minor") if breaks else "minor" if notes["added"] else "patch"
    ranks = ("patch", "minor", "major")
    if ranks.index(kind) < ranks.index(needed):
        return f"the notes ask for a {needed} version, {new} is a {kind} one"
    return ""


def git(root: Path, *words: str) -> str:
    return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()


def tags_of(root: Path) -> list[str]:
    """The versions that were released, the newest first."""
    return git(root, "tag", "--list", "v*", "--sort=-creatordate").split()


def semantics(root: Path) -> Item:
    """Golden numbers for every version of the semantics, and none of them changed since the last tag."""
    found = re.search(r"^SEMANTICS\s*(?::.*)?=\s*(\d+)", (root / "src/nerine/files/meta.py").read_text(), re.MULTILINE)
    title = "golden numbers of every semantics version are there, and as they were"
    if not found:
        return Item(title, "src/nerine/files/meta.py has no SEMANTICS")
    files = [f"tests/golden/semantics-{n}.json" for n in range(1, int(found[1]) + 1)]
    if missing := [file for file in files if not (root / file).exists()]:
        return Item(title, f"missing: {', '.join(missing)}")
    tags = tags_of(root)
    changed = git(root, "diff", "--name-only", "--diff-filter=MD", tags[0], "--", "tests/golden") if tags else ""
    return Item(title, f"changed since {tags[0]}: {changed.replace(chr(10), ', ')}" if changed else "")


def items(root: Path, new: str) -> Iterator[Item]:
    """The lines of the checklist that need no long run."""
    notes, old, is_first = notes_of(root), version_in(root), not tags_of(root)
    yield Item(f"{new} follows by the rules of docs/versioning.md", is_next(new, old, notes, is_first=is_first))
    yield Item("there are notes for the changelog", "" if any(notes.values()) else "changelog.d is empty")
    changed = git(root, "status", "--porcelain").splitlines()
    yield Item("nothing is uncommitted", f"{len(changed)} files, such as {changed[0].split()[-1]}" if changed else "")
    citation = re.search(r"^version: (.+)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    said = citation[1] if citation else "nothing"
    yield Item("CITATION.cff has the version of the package", "" if said == old else f"{said} there, {old} here")
    yield semantics(root)
    needed = ("LICENSE", "NOTICE", "SECURITY.md", "CONTRIBUTING.md", "README.md")
    yield Item("licence, notices and policies are there", ", ".join(f for f in needed if not (root / f).exists()))


def section(new: str, notes: dict[str, list[str]], day: str) -> str:
    """The part of CHANGELOG.md for one version."""
    lines = [f"## {new} ({day})", ""]
    for kind in KINDS:
        if notes[kind]:
            lines += [f"### {kind.capitalize()}", ""]
            lines += ["- " + text.replace("\n", "\n  ") for text in notes[kind]] + [""]
    return "\n".join(lines)


def prepare(root: Path, new: str, day: str) -> None:
    """Write version, changelog and citation; the notes leave their folder."""
    notes, log = notes_of(root), root / "CHANGELOG.md"
    old = log.read_text() if log.exists() else "# Changes\n\n"
    head, first, rest = old.partition("\n## ")
    log.write_text(f"{head.rstrip()}\n\n{section(new, notes, day)}" + (f"\n## {rest}" if first else ""))
    code = root / "src/nerine/version.py"
    code.write_text(code.read_text().replace(f'"{version_in(root)}"', f'"{new}"'))
    citation = root / "CITATION.cff"
    text = re.sub(r"^date-released: .+\n", "", citation.read_text(), flags=re.MULTILINE)
    citation.write_text(re.sub(r"^version: .+$", f"version: {new}\ndate-released: {day}", text, flags=re.MULTILINE))
    for file in (root / "changelog.d").glob("*.*.md"):
        file.unlink()


def check(root: Path, new: str) -> int:
    found = list(items(root, new))
    print(*found, sep="\n")
    print("\nBy hand, after `scripts/release build`:", *(f"- {line.format(version=new)}" for line in BY_HAND), sep="\n")
    return int(any(item.found for item in found))


def build(root: Path, run: Callable[[tuple[str, ...]], int]) -> int:
    """Everything that takes long, to its end; then the archives, where all of it passed."""
    failed = [" ".join(words) for words in LONG if run(words)]
    if failed:
        print(*(f"[ ] {name}" for name in failed), sep="\n")
        return 1
    shutil.rmtree(root / "dist", ignore_errors=True)
    python = sys.executable
    if run((python, "-m", "build", "--no-isolation")):
        return 1
    made = sorted((root / "dist").iterdir())
    if run((python, "-m", "twine", "check", "--strict", *map(str, made))):
        return 1
    for file in made:
        print(hashlib.sha256(file.read_bytes()).hexdigest(), file.name)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    doing = parser.add_subparsers(dest="doing", required=True)
    for name in ("check", "prepare"):
        doing.add_parser(name).add_argument("version")
    doing.add_parser("build")
    told = parser.parse_args()
    if told.doing == "build":
        return build(ROOT, lambda words: subprocess.run(words, cwd=ROOT).returncode)
    if told.doing == "check":
        return check(ROOT, told.version)
    if speaks := is_next(told.version, version_in(ROOT), notes_of(ROOT), is_first=not tags_of(ROOT)):
        print(speaks, file=sys.stderr)
        return 1
    prepare(ROOT, told.version, datetime.date.today().isoformat())
    print(git(ROOT, "status", "--short"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
