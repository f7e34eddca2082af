"""Reading a file: dialect, layers of the model, algorithms, and the report of what became of every key."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from nerine.algorithms import Algorithm
from nerine.errors import FormatError, NerineError, shown
from nerine.files.checkpoint import Checkpoint, Layer
from nerine.files.dense import drop_incomplete, recognise_any
from nerine.files.detect import detect, dialect_named
from nerine.files.dialects.base import Dialect
from nerine.files.meta import Meta, read_meta
from nerine.files.names import flatten
from nerine.files.names.unflatten import unflatten
from nerine.files.pieces import Known, Parts, Piece, Stem
from nerine.files.recognise import Told
from nerine.files.reports import LoadReport, LoadRow
from nerine.files.resolve import Index, Match, Place, component_of
from nerine.files.rows import take
from nerine.files.store import Source
from nerine.site import Site

__all__ = ["read_checkpoint"]

Found = dict[Stem, Match]


def read_checkpoint(
    source: Source,
    sites: Mapping[str, Site] | None = None,
    *,
    dialect: str | None = None,
    component: str | None = None,
    others: Sequence[type[Algorithm]] = (),
) -> Checkpoint:
    """The adapters of an open file, for the layers at `sites` (by path), or for all that it names where there is no
    model. `component` says which part of a pipeline the model is, where the file has several that fit it.

    Raises:
        FormatError: the dialect cannot be told, nothing in the file belongs to these layers, a name may mean two of
            them, or the tensors of a layer are no known set.
        ShapeError: a tensor does not fit its layer.
    """
    meta = read_meta(source.metadata, str(source.path), others)
    known = Known(others)
    if dialect is None:
        chosen, found = detect(source, meta, known)
    else:
        chosen, found = dialect_named(dialect), {}
    parts = chosen.parts(source, known)
    drop_incomplete(parts)
    parts.unused.update(source.ignored)
    job = _Job(source, meta, known, chosen, parts)
    if sites is None:
        job.read_alone()
    else:
        job.read_for(Index(sites), sites, component)
    job.used |= {p.key: f"embedding {word}" for word, own in parts.embeddings.items() for p in own.values()}
    report = LoadReport(
        str(source.path),
        tuple(job.rows),
        parts.unused,
        job.missing(job.layers if sites is None else sites),
        tuple(n for n in [meta.note, *job.notes] if n),
        used=job.used,
        dialect=chosen.name,
        scores=found,
    )
    return Checkpoint(job.layers, meta, report, parts.embeddings, tuple(job.flat))


@dataclass
class _Job:
    """One file being read."""

    source: Source
    meta: Meta
    known: Known
    dialect: Dialect
    parts: Parts
    layers: dict[str, Layer] = field(default_factory=dict)
    rows: list[LoadRow] = field(default_factory=list)
    used: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    flat: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)  # of the layers read, as the file has them

    # -- for a model ---------------------------------------------------------------------------------------------
    def read_for(self, index: Index, sites: Mapping[str, Site], component: str | None) -> None:
        found, other = self._matches(index, sites, component)
        for stem, pieces in self.parts.layers.items():
            if stem not in found:
                why = other.get(stem) or f"the model has no layer {shown(stem.name)}"
                self.parts.unused.update(dict.fromkeys(_keys(pieces), why))
        if not found:
            raise FormatError(f"{self._nothing(index)}{_unknown(self.meta)}")
        order = {path: i for i, path in enumerate(sites)}
        for stem, match in sorted(found.items(), key=lambda item: order.get(item[1].places[0].path, -1)):
            self._read_match(stem, match, sites)

    def _matches(self, index: Index, sites: Mapping[str, Site], component: str | None) -> tuple[Found, dict[Stem, str]]:
        """What each name means, and why the names of other components were left."""
        by_component: dict[str, Found] = {}
        claimed = {stem.component for stem in self.parts.layers}
        for stem in self.parts.layers:
            for part in index.parts_for(stem.component, component or "", claimed):
                matches = index.find(stem, part)
                if matches:
                    match = self._the_one(matches, stem)
                    by_component.setdefault(stem.component if list(index.parts) == [""] else "", {})[stem] = match
                    break
        if len(by_component) <= 1 and (component is None or "" in by_component):
            return next(iter(by_component.values()), {}), {}  # there is nothing to choose, or the names tell no parts
        fits = self._components(by_component, sites, component)
        why = "it is for the {} of a pipeline, and this model was taken for its {}"
        left = {
            stem: why.format(stem.component, fits)
            for name, stems in by_component.items()
            for stem in stems
            if name != fits
        }
        return by_component.get(fits, {}), left

    def _components(self, found: Mapping[str, Found], sites: Mapping[str, Site], wanted: str | None) -> str:
        """The component that a model of one part is: the one that is told, or the only one whose shapes fit."""
        if wanted is not None:
            return component_of(wanted) or wanted
        fitting = [name for name, stems in found.items() if self._all_fit(stems, sites)]
        if len(fitting) > 1:
            raise FormatError(
                f"{self.source.path}: it has adapters for {' and for '.join(fitting)}, and this model could be either; "
                f"say which with component={fitting[0]!r}"
            )
        return fitting[0] if fitting else max(found, key=lambda name: len(found[name]))

    def _all_fit(self, stems: Found, sites: Mapping[str, Site]) -> bool:
        try:
            for stem, match in stems.items():
                site = _whole_site(match, sites)
                recognise_any(self._told(stem, match), site, self.parts.layers[stem], self.known)
        except NerineError:
            return False
        return True

    def _the_one(self, matches: list[Match], stem: Stem) -> Match:
        """The layer that a name in the file means; where several bear it, the one that the metadata tells."""
        told = [m for m in matches if m.name in self.meta.layers] if len(matches) > 1 else matches
        if len(told) != 1:
            raise FormatError(
                f"{self.source.path}: {shown(stem.text)} may mean {' or '.join(m.name for m in matches)}, and the file "
                "does not say which; rename one of the two in the model"
            )
        return told[0]

    def _told(self, stem: Stem, match: Match) -> Told:
        path = match.places[0].path if len(match.places) == 1 else match.name
        own = self.meta.layers.get(path) or self.meta.layers.get(match.name)
        return Told(str(self.source.path), path, own, self.meta.note)

    def _read_match(self, stem: Stem, match: Match, sites: Mapping[str, Site]) -> None:
        pieces = self.parts.layers[stem]
        told = self._told(stem, match)
        layer, row = recognise_any(told, _whole_site(match, sites), pieces, self.known)
        layer = self.dialect.settle(layer, stem, self.source)
        self.used.update(dict.fromkeys(_keys(pieces), told.path))
        self.names |= {match.name, f"{match.places[0].path.partition('.')[0]}.{match.name}"}
        for path, spans in _gathered(match.places, sites).items():
            self._put(path, layer if spans is None else _taken(layer, spans, f"{self.source.path}: {shown(stem.text)}"))
            self.rows.append(replace(row, layer=path))

    def _put(self, path: str, layer: Layer) -> None:
        if path in self.layers:
            raise FormatError(
                f"{self.source.path}: two adapters for the layer {shown(path)}; the file was put together from two"
            )
        self.layers[path] = layer

    # -- without one ---------------------------------------------------------------------------------------------
    def read_alone(self) -> None:
        by_flat = {flatten(path): path for path in self.meta.layers}
        for stem, pieces in self.parts.layers.items():
            path, is_flat = _path_alone(stem, by_flat)
            self.flat += [path] if is_flat else []
            own = self.meta.layers.get(by_flat.get(flatten(stem.name), ""))
            told = Told(str(self.source.path), shown(path), own, self.meta.note)
            layer, row = recognise_any(told, None, pieces, self.known)
            self._put(path, self.dialect.settle(layer, stem, self.source))
            self.rows.append(row)
            self.used.update(dict.fromkeys(_keys(pieces), path))
        if not self.layers:
            raise FormatError(f"{self.source.path}: no adapter in it, in the {self.dialect.name} dialect")

    # -- what is to be said --------------------------------------------------------------------------------------
    def missing(self, own: Iterable[str]) -> tuple[str, ...]:
        """Layers that the metadata tells and the file has no tensors for, where its names are those of this model."""
        told, own = list(self.meta.layers), set(own)
        if 2 * sum(path in own for path in told) < len(told):
            return ()
        here = {flatten(path) for path in [*self.layers, *self.used.values(), *self.names]}
        return tuple(path for path in told if flatten(path) not in here)

    def _nothing(self, index: Index) -> str:
        keys = [*self.parts.unused, *(key for pieces in self.parts.layers.values() for key in _keys(pieces))]
        in_file = ", ".join(map(shown, list(dict.fromkeys(keys))[:3])) or "no keys at all"
        names = [path for paths in index.parts.values() for path in paths][:3]
        stems = [self.dialect.stem_text(path) for path in names]
        return (
            f"{self.source.path}: none of its {len(self.source.keys)} keys belongs to this model, so nothing was "
            f"loaded. In the file ({self.dialect.name}): {in_file}. The model's layers would be called "
            f"{', '.join(stems) or 'nothing'}. Is it made for another model?"
        )


def _keys(pieces: Mapping[str, Piece]) -> list[str]:
    return [piece.key for piece in pieces.values() if piece.key]


def _unknown(meta: Meta) -> str:
    return f" {meta.note}; pass the classes of your own algorithms as `algorithms`" if meta.note else ""


def _whole_site(match: Match, sites: Mapping[str, Site]) -> Site:
    """The site of the layer that a name stands for in the program whose name it is."""
    first = match.places[0]
    own = sites[first.path]
    if all(place.rows is None for place in match.places):
        rows = first.own_rows
        return own if rows is None else own.rows(rows[1] - rows[0])
    return own.rows(max(place.rows[1] for place in match.places if place.rows is not None))


def _gathered(places: Iterable[Place], sites: Mapping[str, Site]) -> dict[str, list[tuple[int, int]] | None]:
    """{layer here, with its rows where it is fused: the rows of the file's layer that it gets, None for all of it}."""
    found: dict[str, list[tuple[int, int]] | None] = {}
    whole: dict[str, list[Place]] = {}
    for place in places:
        whole.setdefault(place.path, []).append(place)
    for path, own in whole.items():
        spans = [place.rows for place in own]
        if len(own) == 1 and own[0].own_rows is not None:
            start, stop = own[0].own_rows
            found[f"{path}[{start}:{stop}]"] = None if spans[0] is None else [spans[0]]
        else:
            own = sorted(own, key=lambda place: place.own_rows or (0, 0))
            found[path] = None if own[0].rows is None else [place.rows for place in own if place.rows is not None]
    return found


def _taken(layer: Layer, spans: Sequence[tuple[int, int]], where: str) -> Layer:
    return layer.changed(lambda record: take(record, spans, where))


def _path_alone(stem: Stem, by_flat: Mapping[str, str]) -> tuple[str, bool]:
    """The path of a layer whose model is not at hand, as the metadata tells it or by the words that names are made of;
    and whether neither helps, so that it stays as it is in the file."""
    lead = f"{stem.component}." if stem.component else ""
    told = by_flat.get(flatten(stem.name))
    if told is not None:
        return (told if component_of(told.split(".", 1)[0]) else lead + told), False
    name = unflatten(stem.name) if stem.flat else stem.name
    return lead + (name or stem.name), name is None
