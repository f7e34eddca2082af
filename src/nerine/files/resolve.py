"""Which layer of a model a name in a file means.

Flattening a path ("a.b_c" -> "a_b_c") cannot be undone, so nothing is parsed: every name that a layer has in any
program is worked out from the model and looked up. A name may mean a whole layer, some rows of a layer that is fused
here, or a layer that is fused there and split here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from nerine.files.names import aliases, flatten
from nerine.files.pieces import Stem
from nerine.files.rows import Span
from nerine.parts import PARTS
from nerine.site import Site

__all__ = ["Index", "Match", "Place", "component_of", "split_parts"]


class Place(NamedTuple):
    """Some or all rows of a layer of the model (`own_rows`), and which rows of the file's layer they are (`rows`)."""

    path: str
    own_rows: Span | None = None
    rows: Span | None = None


@dataclass(frozen=True)
class Match:
    """A name of another program, dotted, with all the places that it covers."""

    name: str
    places: tuple[Place, ...]


def component_of(name: str) -> str:
    """The component that an attribute of a pipeline holds; empty where it is none."""
    return PARTS.get(name, "")


def split_parts(paths: Iterable[str]) -> dict[str, list[str]]:
    """{name of a part, "" for what is in none: paths}; a part is a module at the top that bears the name of a part of
    a pipeline."""
    parts: dict[str, list[str]] = {}
    for path in paths:
        top, dot, _ = path.partition(".")
        parts.setdefault(top if dot and component_of(top) else "", []).append(path)
    return parts


class Index:
    """Every name of every layer of a model."""

    def __init__(self, sites: Mapping[str, Site]) -> None:
        whole = {path: site.shape for path, site in sites.items() if "[" not in path}
        rows = [path for path in sites if "[" in path]
        self.parts = split_parts(whole)
        self._by_part: dict[str, dict[str, list[Match]]] = {"": {}}
        for path in [*whole, *rows]:
            self._put("", Match(path, (Place(path),)))
        for part, paths in self.parts.items():
            cut = len(part) + 1 if part else 0
            shapes = {path[cut:]: whole[path] for path in paths}
            self._by_part.setdefault(part, {})
            if part:
                for path in shapes:
                    self._put(part, Match(path, (Place(f"{part}.{path}"),)))
            foreign = _foreign(shapes, f"{part}." if part else "")
            for match in foreign:
                self._put(part, match)
            if component_of(part):
                own = [Match(path, (Place(f"{part}.{path}"),)) for path in shapes]
                self._put_as_elsewhere(part, [*own, *foreign])
        for part, paths in split_parts(rows).items():
            for path in paths if part else ():
                self._put(part, Match(path[len(part) + 1 :], (Place(path),)))

    def _put_as_elsewhere(self, part: str, matches: Iterable[Match]) -> None:
        """The names of the layers of a part in whole pipelines, where hosts call that part something else: what is
        `transformer` in diffusers is `diffusion_model` in ComfyUI. The model's own names go first."""
        names = [name for name, component in PARTS.items() if component == component_of(part)]
        known = set(self._by_part[""])
        for match in matches:
            for name in names:
                if flatten(f"{name}.{match.name}") not in known:
                    self._put("", Match(f"{name}.{match.name}", match.places))

    def _put(self, part: str, match: Match) -> None:
        found = self._by_part[part].setdefault(flatten(match.name), [])
        if match not in found:
            found.append(match)

    def find(self, stem: Stem, part: str) -> list[Match]:
        """What a name can mean in a part of the model; several where the names of layers differ only in dots and
        underscores."""
        found = self._by_part[part].get(flatten(stem.name), [])
        if stem.flat:
            return found
        return [match for match in found if match.name == stem.name] or found

    def parts_for(self, component: str, wanted: str = "", claimed: Collection[str] = ()) -> list[str]:
        """The parts of the model in which names of `component` are looked up, the likeliest first: `wanted`, where
        the model has a part of that name which could be it.

        Programs number text encoders differently, so a component without a part of its own may be any part, but for
        those of other components that the file has names for (`claimed`).
        """
        first = [wanted] if wanted in self.parts and component in ("", component_of(wanted)) else []
        if not component:
            return list(dict.fromkeys([*first, "", *self.parts]))
        same = [part for part in self.parts if part and component_of(part) == component]
        free = [part for part in self.parts if not part or component_of(part) not in claimed]
        return list(dict.fromkeys([*first, *same, *free]))


def _foreign(shapes: Mapping[str, Sequence[int]], lead: str) -> list[Match]:
    """The names of these layers in other programs."""
    found: dict[str, list[Place]] = {}
    for others in aliases({path: tuple(shape) for path, shape in shapes.items()}).values():
        for alias in others:
            found.setdefault(alias.name, []).append(Place(f"{lead}{alias.own}", alias.own_rows, alias.rows))
    return [Match(name, tuple(places)) for name, places in found.items()]
