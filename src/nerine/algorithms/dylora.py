"""DyLoRA: a LoRA whose ranks are trained so that any number of the first ones is a good adapter by itself.

Each training step draws a block of ranks; the ranks below it take part without learning, those above are silent. The
trained adapter is a plain LoRA with all its ranks, at the scale with which it was trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.algorithms.base import Design, Params, scaled
from nerine.algorithms.low_rank import PLAIN, LowRank
from nerine.algorithms.settings import check_alpha, check_flag, check_rank, scale_of
from nerine.axes import Layout
from nerine.site import Site

__all__ = ["DyLoRA"]


@dataclass(frozen=True, kw_only=True)
class DyLoRA(LowRank):
    """W' = W + (alpha/rank)·up·down, trained with a random number of its ranks, in blocks of `block_size`.

    Up is `[out, rank]`, down `[rank, in, *k]`. The scale is always alpha/rank, whatever the number drawn, so that the
    trained adapter is the one in the file (LyCORIS divides by the number of blocks drawn).
    Source: Valipour et al., arXiv:2210.07558.
    """

    name = "dylora"
    source = "Valipour et al., arXiv:2210.07558"
    rank: int = 16
    alpha: float | None = None
    block_size: int = 1
    rs: bool = False

    def __post_init__(self) -> None:
        check_rank("DyLoRA", self.rank)
        check_rank("DyLoRA", self.block_size, "block_size")
        check_alpha("DyLoRA", self.alpha)
        check_flag("DyLoRA", rs=self.rs)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return (PLAIN,)

    def design(self, site: Site) -> Design:
        note = f"the last block has {self.rank % self.block_size} ranks" if self.rank % self.block_size else ""
        return Design(PLAIN, {**site.sizes, "rank": self.rank}, scale_of(self.rank, self.alpha, self.rs), note=note)

    def draw(self, p: Params, uniform: Callable[[], Tensor]) -> Params:
        down, up = p.tensors["down"], p.tensors["up"]
        rank = down.shape[0]
        blocks = -(-rank // self.block_size)
        drawn = (uniform() * blocks).floor()
        block = ((torch.ones_like(up.flatten(1)[0]).cumsum(0) - 1) / self.block_size).floor()  # of each rank
        learns, silent = block == drawn, block > drawn
        over_up, over_down = (1, rank, *[1] * (up.dim() - 2)), (rank, *[1] * (down.dim() - 1))
        up = torch.where(learns.reshape(over_up), up, up.detach())
        up = torch.where(silent.reshape(over_up), torch.zeros_like(up), up)
        return p.replaced(down=torch.where(learns.reshape(over_down), down, down.detach()), up=up)

    def fit(self, site: Site, weight: Tensor, target: Tensor) -> Params:
        return self.nearest(site, weight, target, self.rank, scale_of(self.rank, self.alpha, self.rs))

    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        return scaled(p.tensors["up"].flatten(1), p.scale), p.tensors["down"]
