"""LoRA (on convolutions also called LoCon): a low-rank product beside the weight.   delta = up · down

With `tucker`, a convolution has a small core between two matrices on the channels instead of one wide `down`. With
`init="pissa"` or `"olora"` it starts on the leading directions of the weight itself; what it starts with is subtracted,
so that the base stays as it is and strength 0 is the base.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.algorithms.base import Design, Params, scaled
from nerine.algorithms.low_rank import DOWN, PLAIN, UP, LowRank, best_low_rank, from_base
from nerine.algorithms.settings import check_alpha, check_choice, check_flag, check_rank, scale_of
from nerine.axes import Layout, Spec
from nerine.errors import OptionError
from nerine.ops.precision import full_precision, wide
from nerine.ops.tucker import tucker_in
from nerine.ops.tucker_fit import leading_tucker
from nerine.site import Site

__all__ = ["LoRA"]

_TUCKER = Layout(
    {"down": Spec("rank in *1", "lora_down.weight"), "mid": Spec("rank rank *k", "lora_mid.weight"), "up": UP}
)
_ON_WEIGHT = Layout(
    {
        "down": DOWN,
        "up": UP,
        "base_down": Spec("rank in *k", "base_down.weight", trained=False),
        "base_up": Spec("out rank *1", "base_up.weight", carrier=True, gate="rank", trained=False),
    }
)
_PLAIN_STARTS = ("kaiming", "gaussian", "orthogonal")


@dataclass(frozen=True, kw_only=True)
class LoRA(LowRank):
    """W' = W + (alpha/rank)·up·down, with up `[out, rank]` and down `[rank, in, *k]`.

    Settings: `alpha` None means rank; `tucker` gives convolutions with a real kernel a core `[rank, rank, *k]`;
    `scalar` learns one factor from zero; `rs` divides by √rank. `init` is how down starts, where up is zero: "kaiming",
    "gaussian" (σ = 1/rank), "orthogonal"; or where both start on the weight: "pissa" (its leading singular directions)
    or "olora" (its QR factors). Files of the latter two hold a LoRA of twice the rank, which any program reads.
    Raises `OptionError` for values out of range.
    Source: Hu et al., arXiv:2106.09685; LoCon and Tucker form: Yeh et al., arXiv:2309.14859; PiSSA: Meng et al.,
    arXiv:2404.02948; OLoRA: Büyükakyüz, arXiv:2406.01775.
    """

    name = "lora"
    source = "Hu et al., arXiv:2106.09685"
    rank: int = 16
    alpha: float | None = None
    tucker: bool = False
    scalar: bool = False
    rs: bool = False
    init: str = "kaiming"

    def __post_init__(self) -> None:
        check_rank("LoRA", self.rank)
        check_alpha("LoRA", self.alpha)
        check_flag("LoRA", tucker=self.tucker, scalar=self.scalar, rs=self.rs)
        check_choice("LoRA", "init", self.init, (*_PLAIN_STARTS, "pissa", "olora"))
        if self.tucker and self._is_on_weight:
            raise OptionError(f"LoRA: init={self.init!r} has no Tucker form; leave tucker out")
        if self.scalar and self._is_on_weight:
            raise OptionError(f"LoRA: init={self.init!r} starts at no change by itself, where a scalar cannot learn")

    @property
    def _is_on_weight(self) -> bool:
        return self.init not in _PLAIN_STARTS

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (PLAIN, _TUCKER, _ON_WEIGHT)

    def design(self, site: Site) -> Design:
        rank, note = self.rank, ""
        if self._is_on_weight and rank > min(site.shape[0], site.flat):
            rank = min(site.shape[0], site.flat)
            note = f"rank {rank}, which is all that the weight has"
        layout = _ON_WEIGHT if self._is_on_weight else _TUCKER if self.tucker and not site.pointwise else PLAIN
        scale = scale_of(rank, self.alpha, self.rs)
        return Design(layout, {**site.sizes, "rank": rank}, scale, self.scalar, note)

    def start(self, site: Site, weight: Tensor, rng: torch.Generator | None = None) -> Params:
        p = super().start(site, weight, rng)
        if self._is_on_weight:
            rank = p.tensors["down"].shape[0]
            flat = wide(weight).flatten(1)
            with full_precision(flat):
                up, down = best_low_rank(flat, rank) if self.init == "pissa" else _by_qr(flat, rank)
            up, down = up.reshape(p.tensors["up"].shape), down.reshape(p.tensors["down"].shape)
            return p.replaced(down=down, up=up, base_down=down.clone(), base_up=up.clone())
        return p

    def start_of(self, name: str, spec: Spec, design: Design) -> str:
        starts = {"gaussian": f"normal:{1 / self.rank}", "orthogonal": "orthogonal"}
        return starts[self.init] if name == "down" and self.init in starts else super().start_of(name, spec, design)

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        down, up = p.tensors["down"], p.tensors["up"].flatten(1)
        if "mid" in p.tensors:
            with full_precision(down):
                down = tucker_in(p.tensors["mid"], down.flatten(1))
        if "base_down" in p.tensors:
            up, down = from_base(up, down, p.tensors["base_up"].flatten(1), p.tensors["base_down"])
        return scaled(up, p.scale), down

    def cost(self, site: Site, design: Design) -> int:
        return site.low_rank_cost(design.sizes["rank"] * (2 if "base_down" in design.layout.specs else 1))

    def for_file(self, p: Params, weight: Tensor) -> Params:
        if "base_down" not in p.tensors:
            return p
        up, down = self.factors(Params(p.tensors))
        return Params({"down": down, "up": up.reshape(*up.shape, *[1] * (down.dim() - 2))}, p.scale)

    def from_file(self, p: Params) -> Params:
        if not self._is_on_weight or set(p.tensors) != {"down", "up"} or p.tensors["down"].shape[0] % 2:
            return p
        rank = p.tensors["down"].shape[0] // 2
        down, up = p.tensors["down"], p.tensors["up"]
        base_down, first = down[rank:], up[:, :rank]
        whole = {"down": down[:rank] + base_down, "up": first}
        return Params({**whole, "base_down": base_down, "base_up": first - up[:, rank:]}, p.scale)

    def fit(self, site: Site, weight: Tensor, target: Tensor) -> Params:
        """The nearest product; with a core the leading directions of outputs and inputs, and what is between them."""
        scale = scale_of(self.rank, self.alpha, self.rs)
        if not self.tucker or site.pointwise:
            return self.nearest(site, weight, target, self.rank, scale)
        up, core, down = leading_tucker((wide(target) - wide(weight)) / scale, self.rank)
        ones = [1] * len(site.kernel)
        return Params(
            {"down": down.reshape(*down.shape, *ones), "mid": core, "up": up.reshape(*up.shape, *ones)}, scale
        )


def _by_qr(flat: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    q, r = torch.linalg.qr(flat)
    return q[:, :rank].clone(), r[:rank].clone()
