"""GLoRA: a low-rank change that acts on the weight's own inputs, beside a plain one.

    delta = W·(a1·a2) + b1·b2

Through the rank it is one low-rank product of rank 2r, for W·a1 is only out × rank: `[W·a1 | b1]·[a2 ; b2]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.algorithms.base import FLOOR, Algorithm, Call, Design, Params, Sandwich
from nerine.algorithms.settings import check_alpha, check_flag, check_rank, scale_of
from nerine.axes import Layout, Shape, Spec
from nerine.ops.precision import full_precision, same_dtype, wide
from nerine.ops.recompute import over_wide, replay
from nerine.ops.reduced_rank import beside_the_weight
from nerine.ops.row_norm import low_rank_row_square, norm_from_square
from nerine.site import Site

__all__ = ["GLoRA"]

_NEW = Layout(
    {
        "a1": Spec("in rank *1", "a1.weight"),
        "a2": Spec("rank in *1", "a2.weight", init="zeros", carrier=True, gate="rank"),
        "b1": Spec("out rank *1", "b1.weight"),
        "b2": Spec("rank in *k", "b2.weight", init="zeros", carrier=True, gate="rank"),
    }
)
_OLD = Layout(  # before 2024: the same four under each other's keys
    {
        "a1": Spec("in rank *1", "a2.weight"),
        "a2": Spec("rank in *1", "a1.weight"),
        "b1": Spec("out rank *1", "b2.weight"),
        "b2": Spec("rank in *k", "b1.weight"),
    }
)


@dataclass(frozen=True, kw_only=True)
class GLoRA(Sandwich):
    """W' = W + (alpha/rank)·(W·a1·a2 + b1·b2), a1 `[in, rank]`, a2 `[rank, in]`, b1 `[out, rank]`, b2 `[rank, in, *k]`.

    Settings as for `LoRA`. The change depends on W: merging another adapter first changes what this one does.
    Source: Chavan et al., arXiv:2306.07967, the two main parts, as LyCORIS has it.
    """

    name = "glora"
    source = "Chavan et al., arXiv:2306.07967"
    pieces = frozenset({"pre", "delta"})
    rank: int = 16
    alpha: float | None = None
    scalar: bool = False
    rs: bool = False

    def __post_init__(self) -> None:
        check_rank("GLoRA", self.rank)
        check_alpha("GLoRA", self.alpha)
        check_flag("GLoRA", scalar=self.scalar, rs=self.rs)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (_NEW, _OLD)

    def design(self, site: Site) -> Design:
        scale = scale_of(self.rank, self.alpha, self.rs)
        return Design(_NEW, {**site.sizes, "rank": self.rank}, scale, self.scalar)

    def pre(self, p: Params, t: Tensor, transpose: bool = False) -> Tensor:
        a1, a2 = same_dtype(p.tensors["a1"].flatten(1), t), same_dtype(p.tensors["a2"].flatten(1), t)
        return t @ a1 @ a2 if transpose else t @ a2.mT @ a1.mT

    def delta(self, p: Params, shape: Shape) -> Tensor:
        return (p.tensors["b1"].flatten(1) @ p.tensors["b2"].flatten(1)).reshape(shape)

    @staticmethod
    def _on_rank(weight: Tensor, a1: Tensor) -> Tensor:
        """W·a1 `[out, rank, *k]`."""
        with full_precision(weight):
            mixed = torch.matmul(a1.flatten(1).mT, weight.reshape(*weight.shape[:2], -1))  # [out, rank, taps]
        return mixed.reshape(weight.shape[0], -1, *weight.shape[2:])

    def _ups(self, p: Params, weight: Tensor) -> tuple[Tensor, Tensor]:
        """W·a1 `[out, rank, *k]` and b1 `[out, rank]`, scale in both."""
        a1 = p.tensors["a1"] * p.scale
        if weight.dim() > 2:  # the product over taps would keep a reordered copy of the weight
            first = replay(lambda weight, a1: self._on_rank(wide(weight), a1), weight, a1)
        else:
            first = over_wide(self._on_rank, weight, a1)
        return first, p.tensors["b1"].flatten(1) * p.scale

    def deviation(self, p: Params, call: Call) -> Tensor:
        site, t = call.site, p.tensors
        if site.kind == "embedding":
            return Algorithm.deviation(self, p, call)
        first, b1 = p.once("ups", lambda: self._ups(p, call.weight()))
        rank = b1.shape[1]
        if site.kind == "linear":
            return site.spread(site.op(call.x, torch.cat([t["a2"], t["b2"]])), torch.cat([first, b1], 1))
        x = site.prepared(call.x)
        ones = (1,) * len(site.kernel)
        inner = Site("conv", (site.groups * rank, site.shape[1], *ones), ones, (0,) * len(ones), ones, site.groups)
        through = site.with_inputs(rank).product(inner.product(x, site.per_group(t["a2"])), first)
        h = site.product(x, site.per_group(t["b2"]))
        return through + site.spread(h, b1.reshape(*b1.shape, *ones))

    def row_norm(self, p: Params, weight: Tensor) -> Tensor:
        if weight.dim() > 2:
            return super().row_norm(p, weight)
        first, b1 = p.once("ups", lambda: self._ups(p, weight))
        down = torch.cat([p.tensors["a2"], p.tensors["b2"]])
        return norm_from_square(low_rank_row_square(weight, torch.cat([first, b1], 1), down), FLOOR)

    def fit(self, site: Site, weight: Tensor, target: Tensor) -> Params:
        """Both parts in turns; never worse than a LoRA of the same rank."""
        design = self.design(site)
        weight = wide(weight)
        found = beside_the_weight(weight, (wide(target) - weight) / design.scale, self.rank)
        shapes = design.shapes
        return Params({name: t.reshape(shapes[name]) for name, t in found._asdict().items()}, design.scale)

    def cost(self, site: Site, design: Design) -> int:
        if site.kind == "embedding":
            return site.dense
        rank = design.sizes["rank"]
        return 2 * site.low_rank_cost(rank)
