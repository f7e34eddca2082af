"""OFTv2: the inputs are turned by orthogonal blocks.   W' = W·Rᵀ,   y = op(x·R, W)

Turning the activation costs two passes over it and nothing of the weight's size. On a convolution with a real kernel
the blocks run over the flattened rows of the weight, as PEFT has it, and the changed weight is built instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from nerine.algorithms.base import Algorithm, Call, ChangedInput, Design, Params, Sandwich, Strength
from nerine.algorithms.settings import check_rank, nearest_divisor
from nerine.axes import Layout, Sizes, Spec
from nerine.errors import OptionError
from nerine.ops.blocks import turn_channels
from nerine.ops.cayley import cayley, neumann, skew_of_upper
from nerine.ops.recompute import replay
from nerine.site import Site

__all__ = ["OFTv2"]

_MOST_TERMS = 100  # each is a product of matrices in every call, and a file may ask for as many as it likes


def _wrong(sizes: Sizes) -> str:
    """What is wrong with these sizes, if anything."""
    half = sizes["s"] * (sizes["s"] - 1) // 2 if "s" in sizes else sizes["half"]
    if sizes["half"] == half:
        return ""
    return (
        f"blocks of {sizes['s']} x {sizes['s']} have {half} entries above the diagonal, "
        f"and oft_R.weight has {sizes['half']}"
    )


_LAYOUT = Layout(
    {"upper": Spec("n half", "oft_R.weight", init="zeros", carrier=True, gate="n")},
    ("flat = in *k", "flat = n s"),
    alpha="",
    check=_wrong,
)


@dataclass(frozen=True, kw_only=True)
class OFTv2(Sandwich):
    """W' = W·Rᵀ on rows of length n·s = in·Πk; Q is kept as its entries above the diagonal `[n, s·(s-1)/2]`.

    `block_size` is s, or the divisor nearest to it. R is a series of `terms` powers of Q (Cayley-Neumann), or the exact
    Cayley transform (I - Q)·(I + Q)⁻¹ with `terms=0`. Of the same tensors the two turn in opposite directions, as PEFT
    has it (`use_cayley_neumann`).
    Source: Qiu et al., arXiv:2506.19847.
    """

    name = "oft-v2"
    source = "Qiu et al., arXiv:2506.19847"
    instead = ", for its rotations are a series; extract as DiagOFT, which turns the outputs, or as LoRA instead"
    pieces = frozenset({"pre"})
    keeps_mean = False
    block_size: int = 32
    terms: int = 5

    def __post_init__(self) -> None:
        check_rank("OFTv2", self.block_size, "block_size")
        is_whole = isinstance(self.terms, int) and not isinstance(self.terms, bool)
        if not is_whole or (self.terms != 0 and not 4 <= self.terms <= _MOST_TERMS):
            raise OptionError(
                f"OFTv2: terms must be 0 (exact) or a whole number from 4 to {_MOST_TERMS}, got {self.terms!r}"
            )

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (_LAYOUT,)

    def unsuited(self, site: Site) -> str:
        why = f"rows of {site.flat} inputs have no blocks of a size near {self.block_size}"
        return super().unsuited(site) or ("" if nearest_divisor(site.flat, self.block_size) > 1 else why)

    def design(self, site: Site) -> Design:
        size = nearest_divisor(site.flat, self.block_size)
        sizes = {**site.sizes, "flat": site.flat, "n": site.flat // size, "s": size, "half": size * (size - 1) // 2}
        note = "" if size == self.block_size else f"blocks of {size}, which divides rows of {site.flat}"
        return Design(_LAYOUT, sizes, note=note)

    def _turn(self, upper: Tensor) -> Tensor:
        """R - I `[n, s, s]`."""
        size = round((1 + (1 + 8 * upper.shape[1]) ** 0.5) / 2)
        q = skew_of_upper(upper, size)
        return neumann(q, self.terms) if self.terms else cayley(-q)

    def pre(self, p: Params, t: Tensor, transpose: bool = False) -> Tensor:
        turn = p.once("turn", lambda: replay(self._turn, p.tensors["upper"]))
        return turn_channels(t, turn.mT if transpose else turn)

    def cost(self, site: Site, design: Design) -> int:
        return site.groups * site.flat * design.sizes["s"] if site.pointwise else site.dense

    def weight_deviation(self, p: Params, weight: Tensor) -> Tensor:
        return self.pre(p, weight.flatten(1), transpose=True).reshape(weight.shape)

    def deviation(self, p: Params, call: Call) -> Tensor:
        return super().deviation(p, call) if call.site.pointwise else Algorithm.deviation(self, p, call)

    def acts_on_input(self, site: Site, layout: Layout) -> bool:
        return site.pointwise and site.kind != "embedding"

    def changed_input(
        self, p: Params, site: Site, x: Tensor, weight: Callable[[], Tensor], strength: Strength
    ) -> ChangedInput | None:
        return super().changed_input(p, site, x, weight, strength) if site.pointwise else None
