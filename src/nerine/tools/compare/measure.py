"""How the changes of one layer in two files lie to each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from nerine.files.checkpoint import Layer, Record
from nerine.ops.precision import is_finite, wide
from nerine.tools.change import Change, Seen, change_of, experts_of, inner
from nerine.tools.compare.matched import Pair
from nerine.tools.compare.report import CompareRow, cosine_of
from nerine.tools.inspect.places import spot_of

__all__ = ["row_of"]

MOST_DIRECTIONS = 16


@torch.no_grad()
def row_of(pair: Pair, device: str | torch.device) -> CompareRow:
    """The comparison of a layer."""
    spot = spot_of(pair.path)
    names = (type(pair.a.algorithm).__name__, type(pair.b.algorithm).__name__)
    bare = CompareRow(pair.path, spot.component, spot.block or spot.kind, names)
    one, two = (_record(layer, device) for layer in (pair.a, pair.b))
    for which, record in (("first", one), ("second", two)):
        if not all(is_finite(t) for t in record.params.tensors.values()):
            return replace(bare, why=f"NaN or infinity in the {which} file")
    same, weight = _same(one, two), _weight(pair, device)
    seen = [_seen(record, weight) for record in (one, two)]
    lacking = next((s.lacking for side in seen for s in side if s.lacking), "")
    first, second = ([s.change for s in side if s.change is not None] for side in seen)
    if len(first) + len(second) < sum(map(len, seen)):
        if same:
            return replace(bare, cosine=1.0, distance=0.0, same_tensors=True)
        return replace(bare, why="the changes need the base")
    if len(first) != len(second):
        return replace(bare, why=f"{len(first)} experts in one and {len(second)} in the other")
    for x, y in zip(first, second, strict=True):
        if x.shape != y.shape:
            return replace(bare, why=f"its change is {_by(x.shape)} in one and {_by(y.shape)} in the other")
    measures = _measures(first, second, same, one.site.kind != "norm")
    why = f"compared {lacking}" if lacking and not same else ""
    return replace(bare, **measures, bias_distance=_bias_distance(one, two), same_tensors=same, why=why)


def _record(layer: Layer, device: str | torch.device) -> Record:
    record = layer.record()
    tensors = record.params.tensors.values()
    return Record(record.algorithm, record.site, record.params.filled(wide(t).to(device) for t in tensors))


def _by(shape: tuple[int, int]) -> str:
    return f"{shape[0]} x {shape[1]}"


def _weight(pair: Pair, device: str | torch.device) -> Tensor | None:
    base = pair.b.base if pair.a.base is None else pair.a.base
    return None if base is None else base.weight().to(device)


def _same(a: Record, b: Record) -> bool:
    one, two = a.params.tensors, b.params.tensors
    return (
        type(a.algorithm) is type(b.algorithm)
        and a.params.scale == b.params.scale
        and one.keys() == two.keys()
        and all(one[name].shape == two[name].shape and torch.equal(one[name], two[name]) for name in one)
    )


def _seen(record: Record, weight: Tensor | None) -> list[Seen]:
    experts = experts_of(record)
    weights = [weight] if not record.site.experts else [None] * len(experts) if weight is None else list(weight)
    return [change_of(one, own) for one, own in zip(experts, weights, strict=True)]


def _measures(first: Sequence[Change], second: Sequence[Change], same: bool, has_directions: bool) -> dict[str, Any]:
    norms = [math.hypot(*(change.norm for change in side)) for side in (first, second)]
    most = max(norms)
    product = norms[0] ** 2 if same else sum(inner(x, y) for x, y in zip(first, second, strict=True))
    apart = 0.0 if same else math.sqrt(max(norms[0] ** 2 + norms[1] ** 2 - 2 * product, 0.0))
    found: dict[str, Any] = {
        "norm_a": norms[0],
        "norm_b": norms[1],
        "product": product,
        "cosine": cosine_of(product, *norms),
        "distance": apart / most if most else 0.0,
    }
    count = min(min(x.rank, y.rank, MOST_DIRECTIONS) for x, y in zip(first, second, strict=True))
    if has_directions and count:
        found["directions"] = count
        both = [(x.leading(count), y.leading(count)) for x, y in zip(first, second, strict=True)]
        found["overlap_out"] = sum(_overlap(x.outputs, y.outputs) for x, y in both) / len(both)
        found["overlap_in"] = sum(_overlap(x.inputs, y.inputs) for x, y in both) / len(both)
    return found


def _overlap(one: Tensor, two: Tensor) -> float:
    """The mean squared cosine of the principal angles between two spaces of orthonormal columns."""
    return min(float((one.mT @ two).square().sum()) / one.shape[1], 1.0)


def _bias_distance(a: Record, b: Record) -> float | None:
    """How far apart the changes of the bias are, relative to the larger; None where there are none."""
    shifts = [record.algorithm.shift(record.params) for record in (a, b)]
    known = [shift for shift in shifts if shift is not None]
    if not known:
        return None
    one, two = (torch.zeros_like(known[0]) if shift is None else shift for shift in shifts)
    most = max(float(one.norm()), float(two.norm()))
    return float((one - two).norm()) / most if most else 0.0
