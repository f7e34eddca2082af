"""One weight and one bias with all adapters in them: W + Σ strength·(W' - W), always in at least fp32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nerine.algorithms import Params
from nerine.model.adapter import Adapter
from nerine.ops.precision import full_precision, wide

__all__ = ["Share", "changed", "summed", "summed_bias"]

Share = tuple[Adapter, Params, Tensor | float]


def summed(shares: list[Share]) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A function of the weight and of all tensors that gives W + Σ strength·(W' - W) in at least fp32; the tensors."""
    first = shares[0][0]
    is_plain = len(shares) == 1 and first.is_plain and not first.site.experts

    def build(weight: Tensor, *values: Tensor) -> Tensor:
        with full_precision(weight):
            if is_plain:
                return first.algorithm.weight(shares[0][1].filled(values), weight)
            rest = iter(values)
            filled = [(adapter, p.filled(next(rest) for _ in p.tensors), s) for adapter, p, s in shares]
            return changed(wide(weight), filled)

    return build, [t for _, p, _ in shares for t in p.tensors.values()]


def changed(weight: Tensor, shares: list[Share]) -> Tensor:
    """W + Σ strength·(W' - W) of a weight in at least fp32."""
    total = weight.clone(memory_format=torch.contiguous_format)
    for adapter, p, strength in shares:
        if adapter.site.experts:
            total = total + adapter.weight_deviation(p, weight) * strength
        else:
            total = adapter.algorithm.add_to(total, p, weight, strength)
    return total


def summed_bias(shares: list[Share], bias: Tensor | None) -> Tensor | None:
    """The bias with all shifts, in at least fp32 where there are any."""
    for adapter, p, strength in shares:
        shift = adapter.algorithm.shift(p)
        if shift is not None:
            bias = shift * strength if bias is None else wide(bias) + shift * strength
    return bias
