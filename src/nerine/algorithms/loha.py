"""LoHa: the entrywise (Hadamard) product of two low-rank products beside the weight.   delta = (a₁·b₁) ∘ (a₂·b₂)

The rank of the product reaches r². Training uses the identity of `ops.khatri_rao`: it *is* one low-rank product of
rank r², built on the fly from the small factors and never kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.algorithms.base import FLOOR, Call, Design, Params, Sandwich
from nerine.algorithms.settings import check_alpha, check_flag, check_rank, scale_of
from nerine.axes import Layout, Shape, Spec
from nerine.errors import OptionError
from nerine.ops.hadamard_fit import nearest_hadamard
from nerine.ops.khatri_rao import paired_columns, paired_rows
from nerine.ops.precision import full_precision, wide
from nerine.ops.recompute import contract, replay
from nerine.ops.row_norm import low_rank_row_norm
from nerine.ops.tucker import tucker
from nerine.site import Site

__all__ = ["LoHa"]

_PLAIN = Layout(
    {
        "w1_a": Spec("out rank", "hada_w1_a", init="normal:0.1", carrier=True, gate="rank"),
        "w1_b": Spec("rank flat", "hada_w1_b", init="normal:1"),
        "w2_a": Spec("out rank", "hada_w2_a", init="zeros", live="normal:0.1"),
        "w2_b": Spec("rank flat", "hada_w2_b", init="normal:1"),
    },
    ("flat = in *k",),
)
_TUCKER = Layout(
    {
        "t1": Spec("rank rank *k", "hada_t1", init="normal:0.1"),
        "w1_a": Spec("rank out", "hada_w1_a", init="normal:0.1", carrier=True, gate="rank"),
        "w1_b": Spec("rank in", "hada_w1_b", init="normal:1"),
        "t2": Spec("rank rank *k", "hada_t2", init="normal:0.1"),
        "w2_a": Spec("rank out", "hada_w2_a", init="zeros", live="normal:0.1"),
        "w2_b": Spec("rank in", "hada_w2_b", init="normal:1"),
    }
)


_SQUARED = 576  # ranks of the product up to which a norm from its factors is cheaper


@dataclass(frozen=True, kw_only=True)
class LoHa(Sandwich):
    """W' = W + (alpha/rank)·(w1_a·w1_b) ∘ (w2_a·w2_b), with w_a `[out, rank]` and w_b `[rank, in·Πk]`.

    Settings as for `LoRA`; with `tucker` each half of a convolution is a core `[rank, rank, *k]` between two matrices.
    Source: Hyeon-Woo et al. (FedPara), arXiv:2108.06098; Yeh et al., arXiv:2309.14859.
    """

    name = "loha"
    source = "Hyeon-Woo et al., arXiv:2108.06098"
    rank: int = 8
    alpha: float | None = None
    tucker: bool = False
    scalar: bool = False
    rs: bool = False

    def __post_init__(self) -> None:
        check_rank("LoHa", self.rank)
        check_alpha("LoHa", self.alpha)
        check_flag("LoHa", tucker=self.tucker, scalar=self.scalar, rs=self.rs)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (_PLAIN, _TUCKER)

    def design(self, site: Site) -> Design:
        sizes = {**site.sizes, "rank": self.rank, "flat": site.dense // site.shape[0]}
        layout = _TUCKER if self.tucker and not site.pointwise else _PLAIN
        return Design(layout, sizes, scale_of(self.rank, self.alpha, self.rs), self.scalar)

    def delta(self, p: Params, shape: Shape) -> Tensor:
        t = p.tensors
        if "t1" in t:
            return tucker(t["t1"], t["w1_a"].mT, t["w1_b"]) * tucker(t["t2"], t["w2_a"].mT, t["w2_b"])
        return ((t["w1_a"] @ t["w1_b"]) * (t["w2_a"] @ t["w2_b"])).reshape(shape)

    def weight(self, p: Params, weight: Tensor) -> Tensor:
        t = p.tensors
        if "t1" in t:
            return super().weight(p, weight)
        first = (t["w1_a"] * p.scale) @ t["w1_b"]
        return torch.addcmul(wide(weight), first.reshape(weight.shape), (t["w2_a"] @ t["w2_b"]).reshape(weight.shape))

    def output(self, p: Params, call: Call) -> Tensor:
        factored = call.sink is not None and self._is_factored(p, call.site)
        return self._apply(p, call, call.sink) if factored else super().output(p, call)

    def add(self, p: Params, call: Call) -> Tensor:
        return self._apply(p, call) if self._is_factored(p, call.site) else super().add(p, call)

    @staticmethod
    def _is_factored(p: Params, site: Site) -> bool:
        return "t1" not in p.tensors and site.low_rank_cost(p.tensors["w1_b"].shape[0] ** 2) < site.dense

    def _apply(self, p: Params, call: Call, into: Tensor | None = None) -> Tensor:
        """One low-rank product of rank r²; the result is added to `into` where that is given."""
        t, site = p.tensors, call.site
        rank = t["w1_b"].shape[0] ** 2
        down_shape, up_tail = (rank, *site.shape[1:]), [1] * len(site.kernel)

        def down(b1: Tensor, b2: Tensor) -> Tensor:
            with full_precision(b1):
                return site.per_group(paired_columns(b1, b2).reshape(down_shape))

        def up(a1: Tensor, a2: Tensor) -> Tensor:
            with full_precision(a1):
                return paired_rows(a1, a2 * p.scale).reshape(-1, rank, *up_tail)

        h = contract(site, call.x, down, [t["w1_b"], t["w2_b"]], lambda x, *_: site.prepared(x))
        return contract(site.widen(rank), h, up, [t["w1_a"], t["w2_a"]], lambda h, *_: h, into=into)

    def row_norm(self, p: Params, weight: Tensor) -> Tensor:
        """From the factors of rank r², where they are cheaper than the passes over a weight that is built."""
        t = p.tensors
        squared = t["w1_b"].shape[0] ** 2
        if "t1" in t or squared > _SQUARED:
            return super().row_norm(p, weight)

        def norm(weight: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
            with full_precision(a1):
                up, down = paired_rows(a1, a2), paired_columns(b1, b2)
            return low_rank_row_norm(weight, up, down, p.scale, FLOOR)

        factors = [t[name] for name in ("w1_a", "w1_b", "w2_a", "w2_b")]
        keeps_much = 2 * squared * (2 * weight.shape[0] + t["w1_b"].shape[1]) > weight.numel()
        return replay(norm, weight, *factors) if keeps_much else norm(weight, *factors)

    @torch.no_grad()
    def fit(self, site: Site, weight: Tensor, target: Tensor) -> Params:
        """Near to the best, by least squares in turns; never worse than a LoRA of the same rank."""
        design = self.design(site)
        if "t1" in design.shapes:
            raise OptionError("LoHa: a Tucker core is not fitted; leave tucker out")
        found = nearest_hadamard((wide(target) - wide(weight)).flatten(1) / design.scale, self.rank)
        return Params(dict(zip(design.shapes, found, strict=True)), design.scale)

    def cost(self, site: Site, design: Design) -> int:
        if "t1" in design.layout.specs:
            return site.dense
        return min(site.dense, site.low_rank_cost(design.sizes["rank"] ** 2))
