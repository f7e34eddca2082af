"""LoRA (on convolutions also called LoCon): a low-rank product beside the weight.   delta = up · down

With `tucker`, a convolution has a small core between two matrices on the channels instead of one wide `down`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nerine.algorithms.base import FLOOR, Call, Design, Params, Sandwich
from nerine.algorithms.settings import check_alpha, check_flag, check_rank, scale_of
from nerine.axes import Layout, Shape, Spec
from nerine.ops.precision import full_precision, same_dtype
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
            with full_precision(down):
                down = tucker_in(p.tensors["mid"], down.flatten(1))
        return p.tensors["up"].flatten(1) * p.scale, down

    def delta(self, p: Params, shape: Shape) -> Tensor:
        up, down = self._factors(Params(p.tensors))
        return (up @ down.flatten(1)).reshape(shape)

    def _through(self, p: Params, call: Call) -> tuple[Tensor, Tensor]:
        """down(x) and up, scale in it."""
        up, down = self._factors(p)
        h = call.site.narrow(down.shape[0]).op(call.x, call.site.per_group(down))
        return h, same_dtype(up, h)

    def add(self, p: Params, call: Call) -> Tensor:
        h, up = self._through(p, call)
        return call.site.widen(up.shape[1]).op(h, up.reshape(*up.shape, *[1] * len(call.site.kernel)))

    def output(self, p: Params, call: Call) -> Tensor:
        if call.sink is None or call.y.dim() != 2:
            return super().output(p, call)
        h, up = self._through(p, call)  # y + up·h as one product, in the memory of y
        return call.y.addmm_(h, up.mT) if h.dtype == call.y.dtype else super().output(p, call)

    def row_norm(self, p: Params, weight: Tensor) -> Tensor:
        up, down = self._factors(p)
        return norm_from_square(low_rank_row_square(weight, up, down.flatten(1)), FLOOR)

    def cost(self, site: Site, design: Design) -> int:
        rank = design.sizes["rank"]
        return site.low_rank_cost(rank)
