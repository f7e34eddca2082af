"""What an examination of the installation found: plain facts in sections, what is wrong with them, and their text.

Nothing here looks at anything, and nothing prints.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nerine.tables import table

__all__ = ["Check", "DoctorReport", "Extra", "Finding"]

_WIDTH = 80


@dataclass(frozen=True)
class Finding:
    """Something to know about the installation. `is_wrong`: nerine does not work as promised with it."""

    text: str
    is_wrong: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"text": self.text, "wrong": self.is_wrong}


@dataclass(frozen=True)
class Extra:
    """One extra of nerine: what it is for, and which of its packages are there (with their versions) or missing."""

    name: str
    purpose: str
    versions: Mapping[str, str]
    missing: Sequence[str]

    @property
    def state(self) -> str:
        """In words: installed, or what is missing."""
        if not self.missing:
            return "installed"
        return f"missing: {', '.join(self.missing)}" if self.versions else "not installed"

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "for": self.purpose,
            "installed": not self.missing,
            "versions": dict(self.versions),
            "missing": list(self.missing),
        }


@dataclass(frozen=True)
class Check:
    """The promise tried with one algorithm on one device: largest differences relative to the largest output.

    `reloaded` is trained against saved and loaded again, `merged` trained against merged into the weight.
    """

    algorithm: str
    device: str
    reloaded: float
    merged: float
    holds: bool
    error: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {
            "algorithm": self.algorithm,
            "device": self.device,
            "reloaded": self.reloaded,
            "merged": self.merged,
            "holds": self.holds,
            "error": self.error,
        }


@dataclass(frozen=True)
class DoctorReport:
    """What was found: facts by section ({section: {name: value}}), extras, the checks of the promise, and findings."""

    facts: Mapping[str, Mapping[str, str]]
    extras: Sequence[Extra]
    checks: Sequence[Check]
    seconds: float
    findings: Sequence[Finding] = field(default_factory=tuple)

    @property
    def is_sound(self) -> bool:
        """Whether nothing is wrong."""
        return not any(one.is_wrong for one in self.findings)

    def sections(self) -> list[tuple[str, str]]:
        """(title, text) of all that is to be shown, in lines of at most 80 columns."""
        found = [(title, _pairs(rows)) for title, rows in self.facts.items() if rows]
        found.append(("Extras", "\n".join(_extra(extra) for extra in self.extras)))
        if self.checks:
            found.append((f"train = merge = export = reload ({self.seconds:.1f} s)", self._self_test()))
        found.append(("Findings", "\n".join(_finding(one) for one in self.findings) or "  nothing to report"))
        return found

    def _self_test(self) -> str:
        rows = [
            (c.algorithm, c.device, f"{c.reloaded:.1e}", f"{c.merged:.1e}", "holds" if c.holds else "DOES NOT HOLD")
            for c in self.checks
        ]
        return textwrap.indent(table(("algorithm", "device", "reloaded", "merged", ""), rows), "  ")

    def to_dict(self) -> dict[str, Any]:
        return {
            "sound": self.is_sound,
            "facts": {title: dict(rows) for title, rows in self.facts.items()},
            "extras": [one.to_dict() for one in self.extras],
            "checks": [one.to_dict() for one in self.checks],
            "seconds": self.seconds,
            "findings": [one.to_dict() for one in self.findings],
        }

    def __str__(self) -> str:
        return "\n\n".join(f"{title}\n{text}" for title, text in self.sections())


def _pairs(rows: Mapping[str, str]) -> str:
    width = max(map(len, rows))
    return "\n".join(_wrapped(f"  {name.ljust(width)}  ", value) for name, value in rows.items())


def _extra(extra: Extra) -> str:
    line = _wrapped(f"  {extra.name.ljust(10)}  ", f"{extra.state}; for {extra.purpose}")
    return f'{line}\n{" " * 14}pip install "nerine[{extra.name}]"' if extra.missing else line


def _finding(one: Finding) -> str:
    return _wrapped("  WRONG  " if one.is_wrong else "  note   ", one.text)


def _wrapped(head: str, text: str) -> str:
    return textwrap.fill(
        text,
        _WIDTH,
        initial_indent=head,
        subsequent_indent=" " * len(head),
        break_long_words=False,
        break_on_hyphens=False,
    )
