"""The algorithms that have a page, each with what no code can tell: algorithms.toml, read into `Entry`.

Knows the registry and the TOML file; what can be computed is in `facts`, what it looks like in `pictures` and
`algorithms`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nerine.algorithms import REGISTRY, Algorithm, DoRA, LoRA
from nerine.model.toml import parse

__all__ = ["PROSE", "Entry", "entries", "meanings", "read_prose"]

PROSE = Path(__file__).with_name("algorithms.toml")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One algorithm: its registry name and class, and its words.

    `picture` are the signs and tensors of the formula in their order (a tensor by its name in the layout; "W", "w" and
    "b" are the base's own), `labels` what stands under a tensor instead of its name, `shades` how strong the parts of a
    rank are drawn, `caption` what else is to be seen. `performance` and `quality` are rows of the recorded benchmarks.
    `variants` are settings that other programs read in another way; `example` is the call in the page's program.
    """

    name: str
    title: str
    formula: str
    about: str
    picture: tuple[str, ...]
    take: tuple[str, ...]
    leave: tuple[str, ...]
    recommended: str
    example: str
    performance: tuple[str, ...] = ()
    quality: tuple[str, ...] = ()
    variants: tuple[Mapping[str, Any], ...] = ()
    caption: str = ""
    shades: tuple[float, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, str] = field(default_factory=dict)  # meanings that are not those of everyone
    cls: type[Algorithm] = LoRA

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm at its defaults; DoRA around a LoRA."""
        return DoRA(LoRA()) if self.cls is DoRA else self.cls()

    @property
    def page(self) -> str:
        return f"algorithms/{self.name}.md"


def classes() -> dict[str, type[Algorithm]]:
    """Every algorithm that has a page, by its name: those of the registry, and DoRA."""
    return {**REGISTRY, DoRA.name: DoRA}


def read_prose() -> dict[str, Any]:
    """algorithms.toml as it stands: a table for each algorithm, and one of "settings" that many have."""
    return parse(PROSE.read_text(encoding="utf-8"), PROSE.name)


def entries() -> dict[str, Entry]:
    """Every algorithm that has a page, in the order of the registry.

    Raises:
        ValueError: an algorithm has no words, or words have no algorithm.
    """
    prose, known = read_prose(), classes()
    missing, unknown = sorted(set(known) - set(prose)), sorted(set(prose) - set(known) - {"settings"})
    if missing or unknown:
        raise ValueError(f"{PROSE.name}: no table for {missing or 'none'}; tables of no algorithm: {unknown or 'none'}")
    return {name: _entry(name, cls, prose[name]) for name, cls in known.items()}


def _entry(name: str, cls: type[Algorithm], table: Mapping[str, Any]) -> Entry:
    values: dict[str, Any] = {}
    for key, value in table.items():
        values[key] = tuple(value) if isinstance(value, list) else value.strip() if isinstance(value, str) else value
    return Entry(name=name, cls=cls, **values)


def meanings(entry: Entry) -> dict[str, str]:
    """What each setting means, in the order of the fields.

    Raises:
        ValueError: a setting has no meaning, or a meaning no setting.
    """
    shared = read_prose()["settings"]
    names = [f.name for f in dataclasses.fields(entry.cls)]
    found = {name: entry.settings.get(name) or shared.get(name) for name in names}
    missing, unknown = [n for n, text in found.items() if not text], sorted(set(entry.settings) - set(names))
    if missing or unknown:
        raise ValueError(f"{PROSE.name}: {entry.name}: no meaning for {missing}; no such setting: {unknown}")
    return {name: str(text) for name, text in found.items()}
