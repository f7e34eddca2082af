"""Strengths of parts of a model, written as text: `double_blocks.0-9=0.5, single_blocks=0.8`.

The patterns are those of `Rule`, and a number may be a range; the first one that matches a layer decides. A layer that
none matches has strength one.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from nerine.errors import OptionError, TargetError, nearest, shown
from nerine.model.targets import matches

__all__ = ["Block", "read_blocks", "refuse_idle", "strength_of"]

_RANGE = re.compile(r"(\d{1,4})-(\d{1,4})")
_EXAMPLE = "double_blocks.0-9=0.5, single_blocks=0.8"


@dataclass(frozen=True)
class Block:
    """One entry: as it was written, the pattern that it stands for, and the strength."""

    text: str
    pattern: str
    strength: float

    def matches(self, path: str) -> bool:
        return matches(self.pattern, path, _NONE)


_NONE = nn.Module()  # patterns ask for no module


def read_blocks(text: str) -> list[Block]:
    """The entries of a text, between commas or line breaks; what stands after # is left out. A regular expression
    ("re:...") has a line of its own, for it may have commas.

    Raises:
        OptionError: an entry is not of the form name=number.
    """
    found = []
    for line in text.splitlines():
        line = line.partition("#")[0].strip()
        for entry in [line] if line.startswith("re:") else line.split(","):
            if entry.strip():
                found.append(_block(entry.strip()))
    return found


def _block(entry: str) -> Block:
    pattern, equals, number = (word.strip() for word in entry.rpartition("="))
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not equals or not pattern or not math.isfinite(strength):
        raise OptionError(
            f"strength per block: expected name=number as in {_EXAMPLE!r}, found {shown(entry)!r}; separate entries by "
            "commas or line breaks"
        )
    return Block(entry, _with_ranges(pattern), strength)


def _with_ranges(pattern: str) -> str:
    """The pattern of `Rule` that one with bare ranges stands for: blocks.0-2 is blocks.[0-2]."""
    if pattern.startswith("re:"):
        return pattern
    words = []
    for word in pattern.split("."):
        edges = _RANGE.fullmatch(word)
        words.append(f"[{word}]" if edges and int(edges[1]) <= int(edges[2]) else word)
    return ".".join(words)


def strength_of(blocks: Sequence[Block], path: str) -> float:
    """The strength of the layer at `path`."""
    return next((block.strength for block in blocks if block.matches(path)), 1.0)


def refuse_idle(blocks: Sequence[Block], paths: Sequence[str]) -> None:
    """Refuse an entry that matches no layer, which is a slip of the pen.

    Raises:
        TargetError: there is one.
    """
    for block in blocks:
        if not any(block.matches(path) for path in paths):
            names = {word for path in paths for word in path.split(".") if not word.isdigit()}
            name = next((word for word in block.pattern.split(".") if word not in names), block.pattern)
            tops = {".".join(path.split(".")[:2]) for path in paths} if len(names) > 60 else set()
            raise TargetError(
                f"strength per block: {shown(block.text)!r} matches no layer of this model. "
                f"{nearest(name, tops or names)}"
            )
