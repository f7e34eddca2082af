"""Which layer of one adapter file is which of another, whatever the two call them.

With the base both are read for its layers. Without it, paths are compared as words without dots; where that leaves
layers over, each file is read for the layers of the other as if that were the model, so that the names of its family
and the rows of fused layers count as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from nerine.errors import FormatError, ShapeError
from nerine.files.checkpoint import Checkpoint, Layer, Record
from nerine.files.names import flatten
from nerine.files.reading import read_checkpoint
from nerine.files.resolve import component_of
from nerine.files.rows import take
from nerine.files.store import Source

__all__ = ["Matched", "Pair", "matched"]


class Pair(NamedTuple):
    """One layer of both files."""

    path: str
    a: Layer
    b: Layer


@dataclass(frozen=True)
class Matched:
    """Layers that are in both files, those that are in one alone, and how they were found."""

    pairs: tuple[Pair, ...] = ()
    only_a: tuple[str, ...] = ()
    only_b: tuple[str, ...] = ()
    how: str = ""
    used: int = field(default=0, repr=False)  # keys of both files that belong to a pair


def matched(a: Checkpoint, source_a: Source, b: Checkpoint, source_b: Source, has_base: bool) -> Matched:
    """The layers of `a` beside those of `b`; `has_base` says that both were read for the layers of one model."""
    if has_base:
        return _by_path(
            a, b, {path: path for path in a.layers}, {path: path for path in b.layers}, "layers of the base"
        )
    found = _by_path(a, b, _bare_names(a, b), _bare_names(b, a), "names")
    if not (found.only_a or found.only_b):
        return found
    others = [_as_in(a, source_a, b, "first"), _turned(_as_in(b, source_b, a, "second"))]
    return max([found, *others], key=lambda one: one.used)


def _bare_names(own: Checkpoint, other: Checkpoint) -> dict[str, str]:
    """{what a layer is compared by: its path}. The part of a pipeline counts where both files tell it."""
    parts = [{_split(path)[0] for path in one.layers} for one in (own, other)]
    told = all("" not in found for found in parts)
    names: dict[str, str] = {}
    for path in own.layers:
        part, rest = _split(path)
        names.setdefault(f"{part} {flatten(rest)}" if told else flatten(rest), path)
    return names


def _split(path: str) -> tuple[str, str]:
    """The part of a pipeline ("" where the path tells none), and the path in it."""
    top, dot, rest = path.partition(".")
    component = component_of(top) if dot else ""
    return (component, rest) if component else ("", path)


def _by_path(a: Checkpoint, b: Checkpoint, names_a: Mapping[str, str], names_b: Mapping[str, str], how: str) -> Matched:
    pairs = [
        Pair(names_b[name], a.layers[path], b.layers[names_b[name]])
        for name, path in names_a.items()
        if name in names_b
    ]
    both_a = {path for name, path in names_a.items() if name in names_b}
    both_b = {pair.path for pair in pairs}
    if how == "layers of the base":
        pairs += _in_rows(a, b, both_a, both_b)
    return _result(pairs, a, b, both_a, both_b, how)


def _in_rows(a: Checkpoint, b: Checkpoint, both_a: set[str], both_b: set[str]) -> list[Pair]:
    """Layers that one file has whole and the other in pieces of its rows."""
    found = []
    for path, layer in b.layers.items():
        whole = path.partition("[")[0]
        if path not in both_b and whole != path and whole in a.layers:
            found.append(Pair(path, _rows_of(a.layers[whole], path), layer))
            both_a.add(whole)
            both_b.add(path)
    for path, layer in a.layers.items():
        whole = path.partition("[")[0]
        if path not in both_a and whole != path and whole in b.layers:
            found.append(Pair(path, layer, _rows_of(b.layers[whole], path)))
            both_a.add(path)
            both_b.add(whole)
    return found


def _rows_of(layer: Layer, path: str) -> Layer:
    """The rows of a layer that the end of a path such as "to_qkv[0:64]" names."""
    match = re.search(r"\[(\d+):(\d+)\]$", path)
    assert match is not None
    rows = (int(match[1]), int(match[2]))

    def cut(record: Record) -> Record:
        return take(record, [rows], path)

    base = layer.base
    return replace(layer.changed(cut), base=None if base is None else base.rows(*rows))


def _as_in(a: Checkpoint, source: Source, b: Checkpoint, which: str) -> Matched:
    """`a` read again for the layers of `b`; nothing where that does not work out."""
    try:
        again = read_checkpoint(
            source, {path: layer.site for path, layer in b.layers.items()}, dialect=a.report.dialect
        )
        pairs, both_b = [], set()
        for path, layer in again.layers.items():
            whole = path.partition("[")[0]
            other = b.layers[path] if path in b.layers else _rows_of(b.layers[whole], path)
            pairs.append(Pair(path, layer, other))
            both_b.add(path if path in b.layers else whole)
    except (FormatError, ShapeError):
        return Matched(how="names")
    both_a = {a.report.used[key] for key in again.report.used if key in a.report.used}
    return _result(pairs, a, b, both_a, both_b, f"names of the {which} file in the other's")


def _turned(found: Matched) -> Matched:
    """The same with the files in each other's place."""
    pairs = tuple(Pair(path, b, a) for path, a, b in found.pairs)
    return replace(found, pairs=pairs, only_a=found.only_b, only_b=found.only_a)


def _result(pairs: list[Pair], a: Checkpoint, b: Checkpoint, both_a: set[str], both_b: set[str], how: str) -> Matched:
    used = sum(path in both_a for path in a.report.used.values()) + sum(p in both_b for p in b.report.used.values())
    return Matched(
        tuple(pairs),
        tuple(path for path in a.layers if path not in both_a),
        tuple(path for path in b.layers if path not in both_b),
        how,
        used,
    )
