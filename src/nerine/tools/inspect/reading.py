"""Reading a file of which some layers may be damaged: the others are read, and every tensor left out has a reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nerine.errors import FormatError, ShapeError, shown
from nerine.files.checkpoint import Checkpoint
from nerine.files.detect import detect, dialect_named
from nerine.files.header import Entry
from nerine.files.meta import read_meta
from nerine.files.pieces import Known, split
from nerine.files.reading import read_checkpoint
from nerine.files.store import Source
from nerine.tools.weights import Weights, read_adapter

__all__ = ["read_what_is_whole"]


def read_what_is_whole(
    source: Source, base: Weights | None, dialect: str | None
) -> tuple[Checkpoint, Mapping[str, str], Mapping[str, str]]:
    """The adapters of a file, why layers were left out ({name in the file: reason}), and the keys of those.

    Raises:
        FormatError: nothing of it can be read, or it does not belong to the base.
    """
    try:
        return read_adapter(source, base, dialect=dialect), {}, {}
    except (FormatError, ShapeError):
        left_out, keys = _unreadable(source, dialect)
        if not left_out:
            raise
        whole = _part_of(source, set(source.keys) - set(keys))
        return read_adapter(whole, base, dialect=dialect), left_out, keys


def _unreadable(source: Source, dialect: str | None) -> tuple[dict[str, str], dict[str, str]]:
    """Why layers cannot be read by themselves, by name, and the same by key."""
    known = Known()
    meta = read_meta(source.metadata, str(source.path))
    chosen = dialect_named(dialect) if dialect else detect(source, meta, known)[0]
    suffixes = {**known.suffixes, **chosen.renamed}
    stems: dict[str, set[str]] = {}
    for key in source.keys:
        parts = split(key, suffixes)
        if parts is not None:
            stems.setdefault(parts[0], set()).add(key)
    left_out: dict[str, str] = {}
    for stem, pieces in chosen.parts(source, known).layers.items():
        own = stems.get(stem.text, set()) | {piece.key for piece in pieces.values() if piece.key}
        try:
            read_checkpoint(_part_of(source, own), dialect=chosen.name)
        except (FormatError, ShapeError) as error:
            left_out[shown(stem.text)] = str(error).removeprefix(f"{source.path}: ")
            stems[stem.text] = own
    keys = {key: why for name, why in left_out.items() for key in stems.get(name, ())}
    return left_out, keys


def _part_of(source: Source, keys: Iterable[str]) -> Source:
    """An open file as if it had these tensors alone."""
    entries = {key: Entry(source.dtype(key), source.shape(key), 0, source.nbytes(key)) for key in keys}
    part = Source(source.path, entries, source.metadata, source.read, source.ignored)
    part.config = source.config
    return part
