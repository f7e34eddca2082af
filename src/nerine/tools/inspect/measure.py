"""The measures of one layer: sizes and ranks of the change that its adapter makes, from factors where it has any."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.algorithms import DoRA
from nerine.files.checkpoint import Base, Layer, Record
from nerine.ops.precision import is_finite, wide
from nerine.tools.change import Change, change_of, experts_of, turn_size

__all__ = ["Measures", "measure"]

MOST_VALUES = 64


@dataclass(frozen=True)
class Measures:
    """See `LayerRow`, whose fields these are."""

    norm: float | None = None
    spectral: float | None = None
    effective_rank: float | None = None
    stable_rank: float | None = None
    limit: int | None = None
    values: tuple[float, ...] = ()
    relative: float | None = None
    base_norm: float | None = None
    bias_norm: float | None = None
    lacking: str = ""
    not_finite: tuple[str, ...] = ()


@torch.no_grad()
def measure(layer: Layer, device: str | torch.device) -> Measures:
    """The measures of a layer, whose weight is at `layer.base` where it is at hand."""
    record = layer.record()
    tensors = record.params.tensors
    broken = tuple(name for name, t in tensors.items() if not is_finite(t))
    if broken:
        return Measures(not_finite=broken)
    params = record.params.filled(wide(t).to(device) for t in tensors.values())
    record = Record(record.algorithm, record.site, params)
    weight = _weight(layer.base, device)
    experts = experts_of(record)
    weights = [None] * len(experts) if weight is None else list(weight) if record.site.experts else [weight]
    seen = [change_of(one, own) for one, own in zip(experts, weights, strict=True)]
    shift = record.algorithm.shift(params)
    size = None if weight is None else float(torch.linalg.vector_norm(wide(weight)))
    bias = None if shift is None else float(torch.linalg.vector_norm(shift))
    known = [one.change for one in seen if one.change is not None]
    if len(known) < len(seen):
        norm = math.hypot(*(turn_size(_within(one)) for one in experts))
        return Measures(norm=norm, base_norm=size, bias_norm=bias, lacking=seen[0].lacking)
    norm = math.hypot(*(change.norm for change in known))
    relative = norm / size if size and not seen[0].lacking else None
    spectrum = Measures() if record.site.kind == "norm" else _spectrum(known)
    return Measures(
        norm,
        spectrum.spectral,
        spectrum.effective_rank,
        spectrum.stable_rank,
        spectrum.limit,
        spectrum.values,
        relative,
        size,
        bias,
        seen[0].lacking,
    )


def _weight(base: Base | None, device: str | torch.device) -> Tensor | None:
    return None if base is None else base.weight().to(device)


def _within(record: Record) -> Record:
    """An adapter without the magnitudes around it."""
    algorithm = record.algorithm
    if not isinstance(algorithm, DoRA):
        return record
    return Record(algorithm.inner, record.site, record.params.without("magnitude"))


def _spectrum(changes: list[Change]) -> Measures:
    """Ranks and values of one matrix, or of several experts: their values together, their ranks on average."""
    squares = torch.cat([change.squares for change in changes]).sort(descending=True).values
    total, count = float(squares.sum()), len(changes)
    limit = sum(len(change.squares) for change in changes) // count
    if not total:
        return Measures(spectral=0.0, limit=limit)
    shares = squares / total
    entropy = -float(torch.special.xlogy(shares, shares).sum())
    values = squares[:MOST_VALUES].sqrt().tolist()
    return Measures(
        spectral=values[0],
        effective_rank=math.exp(entropy) / count,
        stable_rank=total / float(squares[0]) / count,
        limit=limit,
        values=tuple(float(f"{value:.5g}") for value in values),
    )
