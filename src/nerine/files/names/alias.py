"""An alias: another program's name of a layer, or of some of its rows."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["Alias", "Shapes", "Span"]

from collections.abc import Mapping

Span = tuple[int, int]
Shapes = Mapping[str, tuple[int, ...]]  # layer path inside of one part of a pipeline: weight [out, in, *k]


class Alias(NamedTuple):
    """`name` there is `own` here; or only `own_rows` of that, where it is in one piece here and in several there; or
    `rows` of the layer there are what `own` (or its `own_rows`) is, where it is in one piece there."""

    name: str
    own: str
    own_rows: Span | None = None
    rows: Span | None = None
