"""Who will read a file: for every program, how many layers exactly, approximately (and how far off) and not at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nerine.files.checkpoint import Layer, Record
from nerine.files.dialects import DIALECTS
from nerine.files.dialects.base import Dialect
from nerine.files.readers.formulas import deviation
from nerine.files.readers.programs import READERS, Reader, Verdict
from nerine.files.reports import ReaderRow

__all__ = ["READERS", "Reader", "Verdict", "readers_of"]

LOOKED_AT = 16  # layers whose deviation is worked out, spread over the file


def readers_of(layers: Mapping[str, Layer], dialect: Dialect) -> tuple[ReaderRow, ...]:
    """How each program reads these layers (by the name before the suffix) in a file of `dialect`."""
    sketches = {stem: layer.sketch() for stem, layer in layers.items()}
    return tuple(_row(reader, layers, sketches, dialect) for reader in READERS)


def _row(reader: Reader, layers: Mapping[str, Layer], sketches: Mapping[str, Record], dialect: Dialect) -> ReaderRow:
    verdicts = reader.judge_all(sketches, dialect)
    exact, near, no = (sum(v.level == level for v in verdicts.values()) for level in ("exact", "near", "no"))
    whys = list(dict.fromkeys(verdict.why for verdict in verdicts.values() if verdict.why))
    off = [stem for stem, verdict in verdicts.items() if verdict.formula]
    worst = _worst(reader, {stem: layers[stem] for stem in off}, verdicts)
    better = "" if exact == len(layers) else _better(reader, sketches, dialect)
    return ReaderRow(reader.name, exact, near, no, "; ".join(whys[:2]), worst, better)


def _worst(reader: Reader, layers: Mapping[str, Layer], verdicts: Mapping[str, Verdict]) -> float | None:
    """The largest deviation of some layers; None where no weights are at hand."""
    step = max(1, len(layers) // LOOKED_AT)
    found = []
    for stem, layer in list(layers.items())[::step]:
        if verdicts[stem].formula == "scaled":
            found.append(abs(verdicts[stem].factor - 1))
            continue
        if layer.base is None:
            return None
        with torch.no_grad():
            found.append(deviation(verdicts[stem].formula, layer.record(), layer.base.weight()))
    return max(found, default=None)


def _better(reader: Reader, sketches: Mapping[str, Record], dialect: Dialect) -> str:
    """The first dialect that holds all layers exactly and is read exactly."""
    for other in DIALECTS.values():
        if other is dialect or any(other.refuses(sketch) for sketch in sketches.values()):
            continue
        if all(verdict.level == "exact" for verdict in reader.judge_all(sketches, other).values()):
            return other.name
    return ""
