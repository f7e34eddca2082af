"""Which dialect a file is in: by how much of it each dialect explains, never by trying one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from nerine.errors import FormatError, OptionError, nearest, shown
from nerine.files.dialects import DIALECTS
from nerine.files.dialects.base import EMBEDDINGS, Dialect
from nerine.files.meta import Meta
from nerine.files.pieces import Known, split
from nerine.files.store import Source

__all__ = ["detect", "dialect_named", "scores"]

MARGIN = 0.005  # two dialects that explain a file this equally are not told apart


def dialect_named(name: str) -> Dialect:
    """The dialect of that name.

    Raises:
        OptionError: there is none.
    """
    if name not in DIALECTS:
        raise OptionError(f"no dialect is called {name!r}. {nearest(name, DIALECTS)}")
    return DIALECTS[name]


def scores(source: Source, known: Known, dialects: Iterable[Dialect] = ()) -> dict[str, float]:
    """{dialect: the share of the keys that it explains}, best first, those that explain nothing left out."""
    suffixes = known.suffixes
    splits = {key: split(key, suffixes) for key in source.keys if not key.startswith(EMBEDDINGS)}
    found = {d.name: d.score(source, splits, known) for d in dialects or DIALECTS.values()}
    return {name: score for name, score in sorted(found.items(), key=lambda item: -item[1]) if score > 0}


def detect(source: Source, meta: Meta, known: Known) -> tuple[Dialect, Mapping[str, float]]:
    """The dialect of a file and the scores of all; the one that nerine's own metadata names explains it by itself.

    Raises:
        FormatError: no dialect explains any key, or two explain the file equally well.
    """
    found = scores(source, known)
    if meta.dialect in DIALECTS:
        return DIALECTS[meta.dialect], found
    if not found:
        keys = ", ".join(map(shown, source.keys[:3])) or "no keys at all"
        raise FormatError(
            f"{source.path}: none of its {len(source.keys)} keys is one of an adapter in any of the dialects "
            f"{', '.join(DIALECTS)}, so nothing was loaded. In the file: {keys}"
        )
    best, *others = found.items()
    rivals = [name for name, score in others if best[1] - score < MARGIN]
    if rivals:
        scored = ", ".join(f"{name} ({score:.0%})" for name, score in found.items())
        raise FormatError(
            f"{source.path}: {best[0]} and {' and '.join(rivals)} explain this file equally well; say which it is with "
            f"dialect={best[0]!r}. Candidates: {scored}"
        )
    return DIALECTS[best[0]], found
