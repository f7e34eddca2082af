"""Several adapter files side by side: which of their layers are one and the same, and at which strength each counts.

Beside a base the layers go by its paths. Without one they go by the names in the files, dots or not, whichever program
wrote them: a name that another program gives to a layer of the first file is looked up there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from torch import nn

from nerine.algorithms import DoRA
from nerine.errors import FormatError, OptionError, TargetError, nearest, shown
from nerine.files.checkpoint import Checkpoint, Layer
from nerine.files.names import flatten
from nerine.files.pieces import Stem
from nerine.files.resolve import Index, component_of
from nerine.files.writing import split_rows
from nerine.model.patterns import matches
from nerine.model.strengths import Strength, check_strengths, strengths_at
from nerine.model.targets import every_spot, spot_at
from nerine.parts import PARTS
from nerine.site import Site
from nerine.tools.edits import strengths_of
from nerine.tools.weights import Weights

__all__ = ["Term", "line_up", "strengths_by_path"]


@dataclass(frozen=True)
class Term:
    """The adapter of a layer in one of the files (by its number), and the strength at which it counts."""

    layer: Layer
    strength: float
    file: int


def line_up(
    reads: Sequence[Checkpoint], strengths: Sequence[Strength], base: Weights | nn.Module | None
) -> dict[str, list[Term]]:
    """{layer: what the files have for it}, in the order in which they are first met.

    Raises:
        FormatError: what bears one name has different shapes, or is one layer in one file and several in another.
        TargetError: a pattern of strengths matches no layer.
    """
    names = [{path: path for path in read.layers} for read in reads]
    if base is None:
        names = _common_names(reads)
    found: dict[str, list[Term]] = {}
    for number, (read, strength) in enumerate(zip(reads, strengths, strict=True)):
        wanted = strengths_by_path(strength, list(read.layers), base)
        for path, layer in read.layers.items():
            term = Term(layer, wanted[path], number)
            found.setdefault(names[number][path], []).append(term)
    return {path: _of_one_shape(path, terms, reads) for path, terms in found.items()}


def _of_one_shape(path: str, terms: list[Term], reads: Sequence[Checkpoint]) -> list[Term]:
    """The terms with the kernel that one of them shows, where the others fold it into their inputs."""
    shown_by = [term for term in terms if _shows_inputs(term)]
    site = next((t.layer.site for t in terms if t.layer.site.kernel), (shown_by or terms)[0].layer.site)
    for term in terms:
        own = term.layer.site
        flat = own.flat if _shows_inputs(term) else site.flat
        if own.shape[0] != site.shape[0] or flat != site.flat or own.experts != site.experts:
            raise FormatError(
                f"{path}: {site.shape} in {reads[terms[0].file].report.file} and {own.shape} in "
                f"{reads[term.file].report.file}; these adapters are not for one model"
            )
    return [replace(t, layer=t.layer if t.layer.site.kernel else replace(t.layer, site=_with(t, site))) for t in terms]


def _shows_inputs(term: Term) -> bool:
    """Whether the tensors of an adapter tell the inputs of its layer; those that act on outputs alone do not."""
    sketch = term.layer.sketch()
    return term.layer.base is not None or sketch.algorithm.is_fixed(sketch.params) or isinstance(sketch.algorithm, DoRA)


def _with(term: Term, site: Site) -> Site:
    own = term.layer.site
    return own if own.shape == site.shape or own.kind != "linear" else site


# -- names without a model ---------------------------------------------------------------------------------------------
def _split(path: str) -> tuple[str, str]:
    """The component that leads a path, and the rest of it."""
    top, dot, rest = path.partition(".")
    component = component_of(top) if dot else ""
    return (component, rest) if component else ("", path)


def _common_names(reads: Sequence[Checkpoint]) -> list[dict[str, str]]:
    """For each file {its path: the path that all files share}."""
    known: dict[tuple[str, str], str] = {}  # component and name without dots: the path
    found: list[dict[str, str]] = []
    index: Index | None = None
    for number, read in enumerate(reads):
        own: dict[str, str] = {}
        for path in read.layers:
            component, rest = _split(path)
            at = _same(known, component, flatten(rest))
            if at is None and number and index is not None:
                at = _elsewhere(index, path, component, rest, read)
            own[path] = path if at is None else at
        if number and known.keys().isdisjoint(_keys(own.values())):
            _check_strangers(reads[0], read)
        for common in own.values():
            component, rest = _split(common)
            known.setdefault((component, flatten(rest)), common)
        found.append(own)
        if not number:
            index = Index({path: layer.site for path, layer in read.layers.items()})
    return _dotted(reads, found)


def _keys(paths: Iterable[str]) -> set[tuple[str, str]]:
    return {(component, flatten(rest)) for component, rest in map(_split, paths)}


def _check_strangers(first: Checkpoint, other: Checkpoint) -> None:
    """Refuse files of different programs without a layer in common: more likely the names differ than the layers.

    Raises:
        FormatError: they are such.
    """
    parts = [{_split(path)[0] for path in read.layers} for read in (first, other)]
    if first.report.dialect != other.report.dialect and (parts[0] & parts[1] or {""} in parts):
        raise FormatError(
            f"{other.report.file} ({other.report.dialect}) has no layer in common with {first.report.file} "
            f"({first.report.dialect}), as far as their names tell; give the base, which settles what is what"
        )


def _same(known: Mapping[tuple[str, str], str], component: str, flat: str) -> str | None:
    """The layer of that name: of that component, or the only one where one of the two tells none."""
    exact = known.get((component, flat))
    if exact is not None:
        return exact
    if component:
        return known.get(("", flat))
    others = [path for (other, name), path in known.items() if name == flat and other]
    return others[0] if len(others) == 1 else None


def _elsewhere(index: Index, path: str, component: str, rest: str, read: Checkpoint) -> str | None:
    """The layer of the first file that has this name in another program.

    Raises:
        FormatError: it is several layers there, or some rows of one.
    """
    stem = Stem(path, component, rest, path in read.flat)
    for part in index.parts_for(component):
        for match in index.find(stem, part):
            (place, *more) = match.places
            if more or place.rows is not None or place.own_rows is not None:
                raise FormatError(
                    f"{read.report.file}: {shown(path)} is one layer here and several in the first file, or the other "
                    "way round; give the base, which settles what is what"
                )
            return place.path
    return None


def _dotted(reads: Sequence[Checkpoint], names: list[dict[str, str]]) -> list[dict[str, str]]:
    """Names with dots where one of the files has them, and with the component where one tells it."""
    best: dict[str, tuple[tuple[bool, bool], str]] = {}
    for read, own in zip(reads, names, strict=True):
        for path, common in own.items():
            component, rest = _split(path)
            score = ("." in rest and path not in read.flat, bool(component))
            if flatten(rest) == flatten(_split(common)[1]) and (common not in best or score > best[common][0]):
                best[common] = (score, path)
    return [{path: best[common][1] for path, common in own.items()} for own in names]


# -- strengths ---------------------------------------------------------------------------------------------------------
def strengths_by_path(
    value: Strength, paths: Iterable[str], base: Weights | nn.Module | None = None
) -> dict[str, float]:
    """The strength at each layer, one where no pattern matches it; the last pattern that does counts.

    Raises:
        OptionError: it is no strength, or a pattern asks for the class of a module and there is no base.
        TargetError: a pattern matches none of the layers.
    """
    paths = list(paths)
    if isinstance(base, Weights):
        return strengths_of(base, paths, value)
    if base is not None:
        spots = every_spot(base)
        at = [(split_rows(path)[0], spot_at(spots, path).holder) for path in paths]
        wanted = strengths_at(value, at, base)
        return {path: 1.0 if own is None else own for path, own in zip(paths, wanted, strict=True)}
    check_strengths(value)
    if not isinstance(value, Mapping):
        return dict.fromkeys(paths, float(value))
    found = dict.fromkeys(paths, 1.0)
    for match, number in value.items():
        if not isinstance(match, str) or match.startswith("type:"):
            raise OptionError(f"strength: {match!r} is about the class of a module, for which the base is needed")
        meant = [path for path in paths if _is_meant(match, path)]
        if not meant:
            words = {word for path in paths for word in path.split(".") if not word.isdigit()}
            raise TargetError(f"no adapted layer matches {match!r}. {nearest(match.split('.')[-1], words)}")
        found.update(dict.fromkeys(meant, float(number)))
    return found


def _is_meant(pattern: str, path: str) -> bool:
    """Whether a pattern means a layer, whatever its part of the pipeline is called, and with or without its dots."""
    whole = split_rows(path)[0]
    component, rest = _split(whole)
    leads = [name for name, known in PARTS.items() if known == component] if component else []
    nowhere = nn.Module()  # the class of a module plays no role here
    if any(matches(pattern, name, nowhere) for name in (whole, *(f"{lead}.{rest}" for lead in leads))):
        return True
    if "." in rest or set("*?[:") & set(pattern):
        return False
    return f"_{flatten(pattern)}_" in f"_{rest}_"
