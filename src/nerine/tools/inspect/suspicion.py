"""Which layers of a file look wrong, and why: a list of tests on the measures of a layer and of those like it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import median

from nerine.tools.inspect.report import Finding, LayerRow

__all__ = ["suspicious"]

TIMES_MEDIAN = 20.0  # a change this many times that of the layers like it explodes
SHARE_OF_MEDIAN = 1e-3  # one of this share of it does nothing beside them
LEAST_RELATIVE = 1e-6  # of the weight; a tenth of what fp32 resolves
FEW = 4  # so few layers of a kind have no median worth the name
LARGEST_SCALE = 100.0
COLLAPSED, OF_RANK = 2.0, 8

Sizes = Mapping[tuple[str, ...], Sequence[float]]


def suspicious(rows: Sequence[LayerRow]) -> tuple[Finding, ...]:
    """What there is to be said against each layer; a layer may have several findings."""
    sizes: dict[tuple[str, ...], list[float]] = {}
    for row in rows:
        size = _size(row)
        if size:
            for group in _groups(row):
                sizes.setdefault(group, []).append(size)
    have_alpha = any(row.alpha is not None and not _lacks_alpha(row) for row in rows)
    return tuple(finding for row in rows for finding in _of(row, sizes, have_alpha))


def _of(row: LayerRow, sizes: Sizes, have_alpha: bool) -> Iterator[Finding]:
    def found(problem: str, reason: str) -> Finding:
        return Finding(row.layer, problem, reason)

    if row.not_finite:
        yield found("not finite", f"NaN or infinity in {', '.join(row.not_finite)}")
    elif not row.norm and not row.bias_norm:
        yield found("dead", "it changes nothing at all: never trained, or not saved")
    elif row.norm:
        yield from (found(*one) for one in _wrong_size(row, sizes))
    if row.alpha is not None and not 0 <= row.scale <= LARGEST_SCALE:
        yield found("alpha", f"alpha/rank is {row.scale:g}, expected something like 0.1 to 10")
    if "alpha is 0" in row.note:
        yield found("alpha", "alpha is 0: some programs switch the layer off, others read it as the rank")
    elif _lacks_alpha(row) and have_alpha:
        yield found("alpha", "no alpha, while other layers have one: its strength is a guess")
    if row.effective_rank is not None and row.effective_rank < COLLAPSED and (row.limit or 0) >= OF_RANK:
        yield found("collapsed", f"effective rank {row.effective_rank:.1f} of {row.limit}: one direction does it all")


def _lacks_alpha(row: LayerRow) -> bool:
    return "no alpha in the file" in row.note


def _wrong_size(row: LayerRow, sizes: Sizes) -> Iterator[tuple[str, str]]:
    """A change that is too large or too small, by the weight and by the layers like it."""
    size, typical = _size(row), _typical(row, sizes)
    times = size / typical if typical else 1.0
    if row.relative is not None and row.relative > 1:
        yield "exploding", f"the change is {row.relative:.3g} times as large as the weight"
    elif times > TIMES_MEDIAN:
        yield "exploding", f"the change is {times:,.0f} times that of the layers like it"
    elif row.relative is not None and row.relative < LEAST_RELATIVE:
        yield "tiny", f"the change is {row.relative:.1g} of the weight: it does nothing"
    elif times < SHARE_OF_MEDIAN:
        yield "tiny", f"the change is {times:.1g} of that of the layers like it"


def _groups(row: LayerRow) -> Iterable[tuple[str, ...]]:
    """The layers like this one: of its kind, else of its part of the pipeline."""
    kept = (row.algorithm, row.lacking)
    return (row.component, row.kind, *kept), (row.component, *kept)


def _size(row: LayerRow) -> float:
    """The relative change, or the root of the mean square of the entries; layers of different sizes compare by it."""
    if row.relative is not None:
        return row.relative
    return (row.norm or 0.0) / math.sqrt(max(1, math.prod(row.shape)))


def _typical(row: LayerRow, sizes: Sizes) -> float:
    for group in _groups(row):
        others = sizes.get(group, ())
        if len(others) >= FEW:
            return median(others)
    return 0.0
