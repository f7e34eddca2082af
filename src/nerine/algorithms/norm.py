"""Norm: the scale and the offset of a normalisation layer move freely.   w' = w + w_norm,   b' = b + b_norm"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.algorithms.base import Design, Params, Sandwich
from nerine.algorithms.settings import check_flag
from nerine.axes import Layout, Shape, Spec
from nerine.ops.precision import wide
from nerine.site import Site

__all__ = ["Norm"]

_WEIGHT = {"diff": Spec("out *k", "w_norm", init="zeros", carrier=True, gate="out")}
_BIAS = {"diff_b": Spec("out *k", "b_norm", init="zeros", carrier=True, gate="out")}
_BOTH, _ONLY_WEIGHT = Layout({**_WEIGHT, **_BIAS}, alpha=""), Layout(dict(_WEIGHT), alpha="")


@dataclass(frozen=True, kw_only=True)
class Norm(Sandwich):
    """w' = w + w_norm and b' = b + b_norm, of the shape of the layer's own; b_norm where it has an offset and `bias`.

    For LayerNorm, GroupNorm, BatchNorm and any RMSNorm. Layers without a scale of their own are left out.
    Source: LyCORIS files of `train_norm`.
    """

    name = "norm"
    source = "plain fine-tuning"
    pieces = frozenset({"delta", "shift"})
    kinds = frozenset({"norm"})
    bias: bool = True

    def __post_init__(self) -> None:
        check_flag("Norm", bias=self.bias)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (_BOTH, _ONLY_WEIGHT)

    def design(self, site: Site) -> Design:
        return Design(_BOTH if self.bias and site.has_bias else _ONLY_WEIGHT, site.sizes)

    def delta(self, p: Params, shape: Shape) -> Tensor:
        return p.tensors["diff"]

    def shift(self, p: Params) -> Tensor | None:
        return p.tensors.get("diff_b")

    @torch.no_grad()
    def fit(self, site: Site, weight: Tensor, target: Tensor) -> Params:
        diff = wide(target) - wide(weight)
        return Params({"diff": diff, **({"diff_b": diff.new_zeros(diff.shape)} if self.bias and site.has_bias else {})})
