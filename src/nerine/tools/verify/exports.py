"""Export = reload: the layers as a file of a dialect, in memory, and read back for the same base.

Nothing is written. The tensors of such a file are made when the reading asks for them, a layer at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from nerine.algorithms import Algorithm
from nerine.errors import FormatError, NerineError
from nerine.files.checkpoint import Layer, Record
from nerine.files.dialects.base import Dialect
from nerine.files.header import place
from nerine.files.meta import write_meta
from nerine.files.reading import read_checkpoint
from nerine.files.rows import Span
from nerine.files.store import Source
from nerine.files.writing import Written, lay_out, split_rows
from nerine.model.adapter import weight_deviation
from nerine.tools.verify.faces import CLOSE, ROUNDING, distance, widened
from nerine.tools.weights import Weights, beside
from nerine.version import __version__

__all__ = ["Export", "Piece", "export", "pieces_of", "reloaded"]

Piece = tuple[Span | None, Layer]  # some rows of a layer, or all of them, and the adapter on these


@dataclass(frozen=True)
class Export:
    """A file of a dialect that was laid out and read back, in memory.

    `refused` says which layers the dialect cannot hold and why, `error` why it cannot be written or read at all
    (`broken` where it was written, and should be readable).
    """

    dialect: Dialect
    refused: Mapping[str, str] = field(default_factory=dict)
    written: Written | None = None
    pieces: Mapping[str, Sequence[Piece]] = field(default_factory=dict)
    error: str = ""
    broken: bool = False


def pieces_of(layers: Mapping[str, Layer]) -> dict[str, list[Piece]]:
    """{path of a whole layer: the adapters on it, or on some of its rows}."""
    found: dict[str, list[Piece]] = {}
    for path, layer in layers.items():
        whole, rows = split_rows(path)
        found.setdefault(whole, []).append((rows, layer))
    return {path: sorted(pieces, key=lambda piece: piece[0] or (0, 0)) for path, pieces in found.items()}


def export(
    layers: Mapping[str, Layer],
    dialect: Dialect,
    base: Weights,
    component: str | None,
    algorithms: Sequence[type[Algorithm]],
) -> Export:
    """The layers that a dialect can hold, written and read back as far as names and shapes go."""
    refused = {path: why for path, layer in layers.items() if (why := dialect.refuses(layer.sketch()))}
    held = {path: layer for path, layer in layers.items() if path not in refused}
    if not held:
        return Export(dialect, refused)
    try:
        written = lay_out(held, dialect, sites=base.sites, component=component)
    except FormatError as error:
        return Export(dialect, dict.fromkeys(layers, str(error)))
    try:
        source = _source(written, held, dialect)
        found = read_checkpoint(
            source, base.sites_for(source), dialect=dialect.name, component=component, others=algorithms
        )
        again = {path: beside(layer, base.base(path)) for path, layer in found.layers.items()}
    except NerineError as error:
        return Export(dialect, refused, written, error=str(error), broken=True)
    return Export(dialect, refused, written, pieces_of(again))


def _source(written: Written, layers: Mapping[str, Layer], dialect: Dialect) -> Source:
    """A file as if it had been written."""
    makers = {outgoing.key: outgoing.make for outgoing in written.tensors}
    entries = place(((o.key, tuple(o.shape), o.dtype) for o in written.tensors), "(memory)")
    told = {path: layer.algorithm for path, layer in layers.items()}
    metadata = write_meta(told, __version__, written.header, dialect.name)

    def read(key: str) -> Tensor:
        with torch.no_grad():
            return makers[key]().detach().to("cpu", copy=True, memory_format=torch.contiguous_format)

    source = Source(Path("(memory)"), entries, metadata, read)
    source.config = written.config
    return source


# -- the same numbers? -------------------------------------------------------------------------------------------------
def reloaded(
    given: Sequence[Piece], found: Sequence[Piece], weight: Tensor, change: Tensor | None
) -> tuple[float, bool]:
    """How far the change of a whole layer is off after reading, over that change, and whether that is within what the
    number format of its tensors explains. `weight` is that of the layer; `change` W' - W, where it is known already."""
    if not found:
        return float("inf"), False
    if len(given) == len(found) and all(map(_is_same, given, found)):
        return 0.0, True
    want = _change(given, weight) if change is None else change
    got = _change(found, weight)
    off, shifted = distance(got, want, want), _shifted(given, found, weight)
    close, of_weight = _tolerance(given), distance(got, want, weight)
    return max(off, shifted), shifted <= close and (off <= close or of_weight <= ROUNDING)


def _tolerance(pieces: Sequence[Piece]) -> float:
    """A few numbers may be rounded once more on the way, each by half of the last place of its format."""
    kept = [dtype for _, layer in pieces for dtype in layer.dtypes.values() if dtype.is_floating_point]
    return max([CLOSE, *(2 * torch.finfo(dtype).eps for dtype in kept if dtype.itemsize < 4)])


def _is_same(one: Piece, other: Piece) -> bool:
    """Whether two adapters are the same bit by bit."""
    if one[0] != other[0] or one[1].algorithm != other[1].algorithm or one[1].shapes != other[1].shapes:
        return False
    a, b = one[1].record().params, other[1].record().params
    same = a.scale == b.scale and a.tensors.keys() == b.tensors.keys()
    return same and all(t.dtype == b.tensors[n].dtype and torch.equal(t, b.tensors[n]) for n, t in a.tensors.items())


def _records(pieces: Sequence[Piece], weight: Tensor) -> list[tuple[slice, Record]]:
    return [
        (slice(None) if rows is None else slice(*rows), widened(layer.record(), weight.device, weight.dtype))
        for rows, layer in pieces
    ]


def _change(pieces: Sequence[Piece], weight: Tensor) -> Tensor:
    """W' - W of a whole layer."""
    if len(pieces) == 1 and pieces[0][0] is None:
        ((_, record),) = _records(pieces, weight)
        return weight_deviation(record.algorithm, record.site, record.params, weight)
    total = torch.zeros_like(weight)
    for rows, record in _records(pieces, weight):
        total[rows] += weight_deviation(record.algorithm, record.site, record.params, weight[rows])
    return total


def _shifted(given: Sequence[Piece], found: Sequence[Piece], weight: Tensor) -> float:
    """How far the change of the bias is off, over that change."""
    want, got = _shift(given, weight), _shift(found, weight)
    if want is None or got is None:
        return 0.0 if want is got else float("inf")
    return distance(got, want, want)


def _shift(pieces: Sequence[Piece], weight: Tensor) -> Tensor | None:
    """bias' - bias of a whole layer; None where the bias stays."""
    found = [(rows, r.algorithm.shift(r.params)) for rows, r in _records(pieces, weight)]
    shifts = [(rows, shift) for rows, shift in found if shift is not None]
    if len(shifts) < 2 and (not shifts or shifts[0][0] == slice(None)):
        return shifts[0][1] if shifts else None
    total = weight.new_zeros(weight.shape[:1])
    for rows, shift in shifts:
        total[rows] += shift
    return total
