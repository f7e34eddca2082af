"""Full: every entry of the weight, and the bias, moves freely.   W' = W + diff,   bias' = bias + diff_b

What is trained and saved is the difference, so that strength, stacking and merging work as for any other adapter.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.algorithms.base import Design, Params, Sandwich
from nerine.algorithms.settings import check_flag
from nerine.axes import Layout, Shape, Spec
from nerine.ops.precision import wide
from nerine.site import Site

__all__ = ["Full"]

_WEIGHT = {"diff": Spec("out in *k", "diff", init="zeros", carrier=True, gate="out")}
_BIAS = {"diff_b": Spec("out", "diff_b", init="zeros", carrier=True, gate="out")}
_BOTH, _ONLY_WEIGHT, _ONLY_BIAS = (
    Layout(specs, alpha="") for specs in ({**_WEIGHT, **_BIAS}, dict(_WEIGHT), dict(_BIAS))
)


@dataclass(frozen=True, kw_only=True)
class Full(Sandwich):
    """W' = W + diff `[out, in, *k]`, bias' = bias + diff_b `[out]` where there is a bias and `bias` is not False.

    Source: plain fine-tuning, kept as a difference.
    """

    name = "full"
    source = "plain fine-tuning"
    pieces = frozenset({"delta", "shift"})
    bias: bool = True

    def __post_init__(self) -> None:
        check_flag("Full", bias=self.bias)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (_BOTH, _ONLY_WEIGHT, _ONLY_BIAS)

    def design(self, site: Site) -> Design:
        return Design(_BOTH if self.bias and site.has_bias else _ONLY_WEIGHT, site.sizes)

    def delta(self, p: Params, shape: Shape) -> Tensor:
        diff = p.tensors.get("diff")
        return p.tensors["diff_b"].new_zeros(shape) if diff is None else diff

    def shift(self, p: Params) -> Tensor | None:
        return p.tensors.get("diff_b")

    @torch.no_grad()
    def fit(self, site: Site, weight: Tensor, target: Tensor) -> Params:
        diff = wide(target) - wide(weight)
        shift = {"diff_b": diff.new_zeros((site.shape[0],))} if self.bias and site.has_bias else {}
        return Params({"diff": diff, **shift})
