"""LoRA (on convolutions also called LoCon): a low-rank product beside the weight.   delta = up · down

With `tucker`, a convolution has a small core between two matrices on the channels instead of one wide `down`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nerine.algorithms.base import FLOOR, Call, Design, Params, Sandwich
from nerine.algorithms.settings import check_alpha, check_flag, check_rank, scale_of
from nerine.axes import Layout, Shape, Spec
from nerine.ops.precision import same_dtype
from nerine.ops.row_norm import low_rank_row_square, norm_from_square
from nerine.ops.tucker import tucker_in
from nerine.site import Site

__all__ = ["LoRA"]

_UP = Spec("out rank *1", "lora_up.weight", init="zeros", carrier=True, gate="rank")
_PLAIN = Layout({"down": Spec("rank in *k", "lora_down.weight"), "up": _UP})
_TUCKER = Layout(
    {"down": Spec("rank in *1", "lora_down.weight"), "mid": Spec("rank rank *k", "lora_mid.weight"), "up": _UP}
)


@dataclass(frozen=True, kw_only=True)
class LoRA(Sandwich):
    """W' = W + (alpha/rank)·up·down, with up `[out, rank]` and down `[rank, in, *k]`.

    Settings: `alpha` None means rank; `tucker` gives convolutions with a real kernel a core `[rank, rank, *k]`;
    `scalar` learns one factor from zero; `rs` divides by √rank. Raises `OptionError` for values out of range.
    Source: Hu et al., arXiv:2106.09685; LoCon and Tucker form: Yeh et al., arXiv:2309.14859.
    """

    name = "lora"
    source = "Hu et al., arXiv:2106.09685"
    rank: int = 16
    alpha: float | None = None
    tucker: bool = False
    scalar: bool = False
    rs: bool = False

    def __post_init__(self) -> None:
        check_rank("LoRA", self.rank)
        check_alpha("LoRA", self.alpha)
        check_flag("LoRA", tucker=self.tucker, scalar=self.scalar, rs=self.rs)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (_PLAIN, _TUCKER)

    def design(self, site: Site) -> Design:
        layout = _TUCKER if self.tucker and not site.pointwise else _PLAIN
        scale = scale_of(self.rank, self.alpha, self.rs)
        return Design(layout, {**site.sizes, "rank": self.rank}, scale, self.scalar)

    @staticmethod
    def _factors(p: Params) -> tuple[Tensor, Tensor]:
        """up `[out, rank]` with the scale in it, and down `[rank, in, *k]`."""
        down = p.tensors["down"]
        if "mid" in p.tensors:
            down = tucker_in(p.tensors["mid"], down.flatten(1))
        return p.tensors["up"].flatten(1) * p.scale, down

    def delta(self, p: Params, shape: Shape) -> Tensor:
        up, down = self._factors(Params(p.tensors))
        return (up @ down.flatten(1)).reshape(shape)

    def add(self, p: Params, call: Call) -> Tensor:
        site = call.site
        up, down = self._factors(p)
        rank = down.shape[0]
        h = site.narrow(rank).op(call.x, site.per_group(down))
        return site.widen(rank).op(h, same_dtype(up, h).reshape(*up.shape, *[1] * len(site.kernel)))

    def row_norm(self, p: Params, weight: Tensor) -> Tensor:
        up, down = self._factors(p)
        return norm_from_square(low_rank_row_square(weight, up, down.flatten(1)), FLOOR)

    def cost(self, site: Site, design: Design) -> int:
        rank = design.sizes["rank"]
        return site.low_rank_cost(rank)
