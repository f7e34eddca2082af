"""The library's source as syntax trees: what the tests about the house itself read."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "nerine"


class Source(NamedTuple):
    path: Path
    tree: ast.Module

    @property
    def where(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def module(self) -> tuple[str, ...]:
        """The dotted name in pieces; a package stands for its `__init__`."""
        pieces = self.path.relative_to(PACKAGE.parent).with_suffix("").parts
        return pieces[:-1] if pieces[-1] == "__init__" else pieces


def sources(*folders: str) -> Iterator[Source]:
    """Every file of the library, or of the named folders in it; folders not yet there are empty."""
    for folder in folders or (".",):
        for path in sorted((PACKAGE / folder).rglob("*.py")):
            yield Source(path, ast.parse(path.read_text(encoding="utf-8"), str(path)))


def dotted(node: ast.AST) -> str:
    """`a.b.c` for such an expression; what cannot be named is left out, so `f().to` is `.to`."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""
