"""Train = merge, for one layer: what an adapter adds to the output in training against the weight that a merge makes.

Where the fp32 numbers differ by more than `CLOSE` of the deviation, that may be the rounding of a small change to a
large weight; then, and on a few layers in any case, both are computed in fp64, where nothing of the kind is left.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.algorithms import Algorithm, Call, Params
from nerine.files.checkpoint import Record
from nerine.model.adapter import weight_deviation
from nerine.ops.precision import is_finite, wide
from nerine.site import Site

__all__ = ["CLOSE", "EXACT", "ROUNDING", "Faces", "Merged", "distance", "faces_of", "merged_of", "widened"]

CLOSE = 1e-4  # of the deviation: sums of fp32 in another order; a wrong formula is off by far more
ROUNDING = 1e-5  # of the output or weight itself: fp32 has 6e-8, and norms and rotations add a row of such numbers
EXACT = 1e-8  # of the deviation in fp64


@dataclass(frozen=True)
class Faces:
    """How far apart the two faces are, as shares of the deviation and (in fp32) of the output; None where the layer
    computes with the changed weight itself, so that there is only one."""

    error: float | None
    of_output: float = 0.0
    error64: float | None = None

    @property
    def holds(self) -> bool:
        if self.error is None:
            return True
        if self.error64 is not None and not self.error64 <= EXACT:
            return False
        return self.error <= CLOSE or (self.error64 is not None and self.of_output <= ROUNDING)


@dataclass(frozen=True)
class Merged:
    """A merged weight: its change over its size, how far what a merge sums is from W + (W' - W), as a share of the
    weight, the share of the change that rounding to the base's format takes, and whether all of it are numbers."""

    change: float
    error: float
    lost: float
    square: float  # of the change, and of what is lost, for the sum over layers
    lost_square: float
    is_finite: bool


def widened(record: Record, device: torch.device | str, dtype: torch.dtype | None = None) -> Record:
    """A record whose tensors are on a device in at least fp32, as a layer has them in training."""
    tensors = (t.to(device=device, dtype=dtype or wide(t[:0] if t.dim() else t).dtype) for t in _values(record))
    return Record(record.algorithm, record.site, record.params.filled(tensors))


def _values(record: Record) -> list[Tensor]:
    return list(record.params.tensors.values())


def distance(found: Tensor, want: Tensor, size: Tensor) -> float:
    """|found - want| / |size| over all entries; 0 where both are the same, so that nothing is divided by nothing."""
    apart = float(torch.linalg.vector_norm(found - want))
    return apart / max(float(torch.linalg.vector_norm(size)), 1e-30) if apart else 0.0


# -- merge -------------------------------------------------------------------------------------------------------------
def merged_of(record: Record, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> tuple[Merged, Tensor]:
    """What a merge makes of `weight` in at least fp32, and W' - W; `bias` is that of the layer."""
    algorithm, p = record.algorithm, record.params
    change = weight_deviation(algorithm, record.site, p, weight)
    exact = weight + change
    error = 0.0
    if not record.site.experts:
        summed = algorithm.add_to(weight.clone(memory_format=torch.contiguous_format), p, weight, 1.0)
        error = distance(summed, exact, weight)
        exact = summed
    lost = wide(exact.to(dtype)) - exact
    norms = [float(torch.linalg.vector_norm(t)) for t in (change, lost, weight)]
    shift = algorithm.shift(p)
    finite = all(map(is_finite, (change, lost))) and (
        shift is None or is_finite(shift if bias is None else bias + shift)
    )
    found = Merged(
        norms[0] / max(norms[2], 1e-30),
        error,
        norms[1] / norms[0] if norms[0] else 0.0,
        norms[0] ** 2,
        norms[1] ** 2,
        finite,
    )
    return found, change


# -- train -------------------------------------------------------------------------------------------------------------
def faces_of(
    record: Record, weight: Tensor, bias: Tensor | None, change: Tensor, samples: int, seed: int, doubled: bool
) -> Faces:
    """The faces on random inputs, in fp32 and, with `doubled` or where those differ, in fp64."""
    if record.site.kind == "norm" or record.site.experts:
        return Faces(None)
    x = _input(record.site, samples, seed, weight)
    error, of_output = _apart(record, x, weight, bias, change)
    if not (doubled or error > CLOSE) or weight.device.type == "mps":  # which has no fp64
        return Faces(error, of_output)
    wider = widened(record, weight.device, torch.float64)
    weight = weight.double()
    change = wider.algorithm.weight_deviation(wider.params, weight)
    x = x.double() if x.is_floating_point() else x
    error64, _ = _apart(wider, x, weight, None if bias is None else bias.double(), change)
    return Faces(error, of_output, error64)


def _input(site: Site, samples: int, seed: int, like: Tensor) -> Tensor:
    """A random input, the same for the same seed on any device."""
    generator = torch.Generator().manual_seed(seed)
    if site.kind == "embedding":
        return torch.randint(0, site.shape[1], (samples,), generator=generator).to(like.device)
    channels = site.groups * site.shape[1]
    shape = (1, channels, *(k + 2 for k in site.kernel)) if site.kernel else (samples, channels)
    return torch.randn(shape, generator=generator).to(like)


def _apart(record: Record, x: Tensor, weight: Tensor, bias: Tensor | None, change: Tensor) -> tuple[float, float]:
    """How far the farthest of the ways to compute is from op(x, W' - W), over that and over op(x, W)."""
    algorithm, p, site = record.algorithm, record.params, record.site
    want, y = site.op(x, change), site.op(x, weight, bias)
    plain = site.op(x, weight)
    shift = algorithm.shift(p)
    if shift is not None:
        want = want + site.over_channels(shift)
    found = list(_ways(algorithm, p, Call(site, x, y, bias, lambda: weight)))
    return max(distance(d, want, want) for d in found), max(distance(d, want, plain) for d in found)


def _ways(algorithm: Algorithm, p: Params, call: Call) -> Iterator[Tensor]:
    """What the adapter adds to the layer's output, in each of the ways in which a layer may compute it."""
    site, bias = call.site, call.bias
    shift = algorithm.shift(p)
    more = 0.0 if shift is None else site.over_channels(shift)
    yield algorithm.deviation(p, call) + more
    yield algorithm.output(p, call) - call.y + more
    changed = algorithm.changed_input(p, site, call.x, call.weight, None)
    if changed is not None:
        y = site.op(changed.x, call.weight(), bias)
        if changed.then is not None:
            inner, own = changed.then
            y = y + inner.deviation(own, Call(site, changed.x, y, bias, call.weight))
        yield y - call.y + more
