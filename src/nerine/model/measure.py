"""How large adapters are, and what keeps them from growing larger."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from nerine.errors import OptionError
from nerine.model.adapter import Adapter
from nerine.model.mount import Mount, settle, weight_at
from nerine.model.reports import MaxNorm, NormReport

__all__ = ["Located", "norms_of", "shrink_to"]

Located = tuple[str, nn.Module, Mount, str, Adapter]  # path of the layer, who holds its weight, mount, name, adapter


def _norm(tensors: list[Tensor]) -> Tensor:
    """The norm over all entries of all tensors, 0-d."""
    norms = [torch.linalg.vector_norm(t.detach().float()) for t in tensors]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return whole


def _grads(adapter: Adapter) -> list[Tensor]:
    grads = [p.grad for p in adapter.parameters() if p.grad is not None]
    return grads or [torch.zeros(1)]


def _numbers(values: Sequence[Tensor]) -> list[float]:
    """0-d tensors as Python floats, with one wait for the device and not one for each."""
    found: list[float] = torch.stack([v.detach().float().to(values[0].device) for v in values]).tolist()
    return found


def shrink_to(limit: float, located: Iterable[Located]) -> MaxNorm:
    """Shrink every adapter whose |W' - W| exceeds `limit`.

    Raises:
        OptionError: the limit is no positive number, or an adapter has nothing that carries its size.
    """
    if isinstance(limit, bool) or not isinstance(limit, int | float) or not 0 < limit < math.inf:
        raise OptionError(f"max_norm: the limit must be a positive number, got {limit!r}")
    before, after = [], []
    for path, holder, mount, _, adapter in located:
        if not adapter.carriers:
            raise OptionError(f"{path}: {adapter.algorithm} names no tensor that carries its size")
        settle(holder, mount)
        weight = weight_at(holder, mount).detach()
        first = size = adapter.size(weight)
        for _ in range(1 if adapter.algorithm.keeps_mean else 6):  # a rotation does not grow in proportion
            adapter.shrink((limit / size).clamp(max=1))
            size = adapter.size(weight)
        before.append(first)
        after.append(size)
    sizes, now = _numbers(before), _numbers(after)
    return MaxNorm(sum(size > limit for size in sizes), sum(now) / len(now), max(now))


def norms_of(located: Iterable[Located]) -> NormReport:
    """How far each adapter has moved its weight, and the gradients it has now."""
    found = []
    for path, holder, mount, _, adapter in located:
        settle(holder, mount)
        weight = weight_at(holder, mount).detach()
        found.append((path, adapter.size(weight), _norm([weight]), _norm(_grads(adapter))))
    columns = [_numbers([row[i] for row in found]) for i in (1, 2, 3)]  # type: ignore[misc]
    return NormReport(tuple(zip((row[0] for row in found), *columns, strict=True)))
