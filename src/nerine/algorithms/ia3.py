"""(IA)³: one factor for each output, or for each input.   W' = (1 + w)·W   or   W·(1 + w)

The bias stays as it is: what is trained is a change of the weight, which merges.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.algorithms.base import Call, Design, Params, Sandwich
from nerine.algorithms.settings import check_flag
from nerine.axes import Layout, Spec
from nerine.ops.precision import same_dtype, wide
from nerine.ops.rescale import rescale
from nerine.site import Site

__all__ = ["IA3"]


def _layout(name: str, axis: str, mark: float) -> Layout:
    spec = Spec(f"?1 {axis} *1", "weight", init="zeros", carrier=True, gate=axis)
    return Layout({name: spec}, alpha="", marks={"on_input": mark})


_OUT, _IN = _layout("w", "out", 0.0), _layout("w_in", "in", 1.0)


@dataclass(frozen=True, kw_only=True)
class IA3(Sandwich):
    """W' = W + w ∘ W with w `[out]`, or with `on_input` W + W ∘ w with w `[in]` (`[1, out, 1, ...]` on convolutions).

    On a grouped convolution the groups share the factors of the inputs.
    Source: Liu et al., arXiv:2205.05638, without the bias.
    """

    name = "ia3"
    source = "Liu et al., arXiv:2205.05638"
    on_input: bool = False

    def __post_init__(self) -> None:
        check_flag("IA3", on_input=self.on_input)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (_OUT, _IN)

    def design(self, site: Site) -> Design:
        return Design(_IN if self.on_input else _OUT, site.sizes)

    def pieces_of(self, p: Params) -> frozenset[str]:
        return frozenset({"pre" if "w_in" in p.tensors else "post"})

    def pre(self, p: Params, t: Tensor, transpose: bool = False) -> Tensor:
        return t * same_dtype(p.tensors["w_in"].reshape(-1), t)

    def post(self, p: Params, t: Tensor) -> Tensor:
        return t * same_dtype(p.tensors["w"].reshape(-1), t)

    def output(self, p: Params, call: Call) -> Tensor:
        """y·(1 + w) - w·bias in one pass, where 1 + w loses nothing of w that counts."""
        if "w_in" in p.tensors or call.y.dtype.itemsize < 4:
            return super().output(p, call)
        w = same_dtype(p.tensors["w"].reshape(-1), call.y)
        offset = torch.zeros_like(w) if call.bias is None else -w * call.bias
        return rescale(call.y, 1 + w, offset, call.site.channel)

    def acts_on_input(self, site: Site, layout: Layout) -> bool:
        return "w_in" in layout.specs and site.kind != "embedding"

    def cost(self, site: Site, design: Design) -> int:
        return site.dense if "w_in" in design.layout.specs else site.shape[0]

    @torch.no_grad()
    def fit(self, site: Site, weight: Tensor, target: Tensor) -> Params:
        keep = 1 if self.on_input else 0
        rest = [i for i in range(weight.dim()) if i != keep]
        weight = wide(weight)
        change, square = wide(target) - weight, weight.square().sum(rest)
        w = torch.where(square > 0, (weight * change).sum(rest) / square, 0.0)  # nothing scales a row of zeros
        ((name, shape),) = self.design(site).shapes.items()
        return Params({name: w.reshape(shape)})
