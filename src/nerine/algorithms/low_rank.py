"""What every low-rank algorithm shares: both faces of W' = W + up·down, once its two factors are known.

An algorithm on top says what its factors are (`factors`); the product is never built in training, nor for a norm.
"""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from nerine.algorithms.base import FLOOR, Call, Design, Params, Sandwich, scaled
from nerine.axes import Layout, Shape, Spec
from nerine.ops.low_rank_fit import leading
from nerine.ops.precision import full_precision, same_dtype, wide
from nerine.ops.row_norm import low_rank_column_square, low_rank_row_norm, low_rank_size, norm_from_square
from nerine.site import Site

__all__ = ["DOWN", "PLAIN", "UP", "LowRank", "best_low_rank", "from_base"]

UP = Spec("out rank *1", "lora_up.weight", init="zeros", carrier=True, gate="rank")
DOWN = Spec("rank in *k", "lora_down.weight")
PLAIN = Layout({"down": DOWN, "up": UP})


def from_base(up: Tensor, down: Tensor, base_up: Tensor, base_down: Tensor) -> tuple[Tensor, Tensor]:
    """Factors of up·down - base_up·base_down, of twice the rank, in which nothing large cancels:
    up·(down - base_down) + (up - base_up)·base_down. Ups are `[out, rank]`, downs `[rank, ...]`."""
    return torch.cat([up, up - base_up], 1), torch.cat([down - base_down, base_down])


class LowRank(Sandwich):
    """W' = W + up·down. A subclass writes `factors`, and is given the rest."""

    @abstractmethod
    def factors(self, p: Params) -> tuple[Tensor, Tensor]:
        """up `[out, rank]` with the scale in it, and down `[rank, in, *k]`."""

    def delta(self, p: Params, shape: Shape) -> Tensor:
        up, down = self.factors(Params(p.tensors))
        return (up @ down.flatten(1)).reshape(shape)

    def add_to(self, total: Tensor, p: Params, weight: Tensor, strength: Tensor | float) -> Tensor:
        """One product into the memory of `total`."""
        up, down = self.factors(p)
        up, down = same_dtype(up * strength, total), same_dtype(down.flatten(1), total)
        if not total.is_contiguous():
            return total.add_((up @ down).reshape(total.shape))
        total.view(total.shape[0], -1).addmm_(up, down)
        return total

    def _bare(self, p: Params) -> tuple[Tensor, Tensor]:
        """The factors without the scale."""
        return p.once("factors", lambda: self.factors(Params(p.tensors)))

    def _through(self, p: Params, call: Call) -> tuple[Tensor, Tensor]:
        """down(x), and up without the scale."""
        up, down = self._bare(p)
        h = call.site.op(call.x, call.site.per_group(down))  # an operation that has as many outputs as its weight
        if call.gate is not None:
            h = h * _over_samples(call.gate, h, call.site)
        return h, same_dtype(up, h)

    def add(self, p: Params, call: Call) -> Tensor:
        h, up = self._through(p, call)
        up = scaled(up, p.scale)
        return call.site.spread(h, up.reshape(*up.shape, *[1] * len(call.site.kernel)))

    def output(self, p: Params, call: Call) -> Tensor:
        if call.sink is None or call.y.dim() != 2:
            return super().output(p, call)
        h, up = self._through(p, call)  # y + scale·up·h as one product, in the memory of y
        return call.y.addmm_(h, up.mT, alpha=p.scale) if h.dtype == call.y.dtype else super().output(p, call)

    def row_norm(self, p: Params, weight: Tensor) -> Tensor:
        up, down = self._bare(p)
        return low_rank_row_norm(weight, up, down.flatten(1), p.scale, FLOOR)

    def column_norm(self, p: Params, weight: Tensor) -> Tensor:
        up, down = self.factors(p)
        square = low_rank_column_square(weight, up, down.flatten(1))
        return norm_from_square(square.reshape(weight.shape[1], -1).sum(1), FLOOR)

    def size(self, p: Params, weight: Tensor) -> Tensor:
        up, down = self.factors(p)
        return low_rank_size(up, down.flatten(1))

    @staticmethod
    def nearest(site: Site, weight: Tensor, target: Tensor, rank: int, scale: float) -> Params:
        """Plain up and down whose product, times `scale`, is nearest to `target - weight` (within 0.1 % of the error
        of the very best)."""
        up, down = leading((wide(target) - wide(weight)).flatten(1) / scale, rank).halves(rank)
        ones = [1] * len(site.kernel)
        return Params({"down": down.reshape(rank, *site.shape[1:]), "up": up.reshape(-1, rank, *ones)}, scale)

    def cost(self, site: Site, design: Design) -> int:
        return site.low_rank_cost(design.sizes["rank"])


def _over_samples(gate: Tensor, h: Tensor, site: Site) -> Tensor:
    """`gate` `[batch, rank]` shaped to multiply `h`, whose first axis is the batch (times what was folded into it)."""
    ranks = h.shape[site.channel]
    gate = same_dtype(gate.repeat(1, ranks // gate.shape[1]), h)
    gate = gate.repeat_interleave(h.shape[0] // gate.shape[0], 0)
    return gate.reshape(gate.shape[0], *[1] * (h.dim() - 2 - len(site.kernel)), ranks, *[1] * len(site.kernel))


@torch.no_grad()
def best_low_rank(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """up `[out, rank]` and down `[rank, in]` whose product is nearest to `matrix`, the singular values shared out."""
    with full_precision(matrix):
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    up, down = u[:, :rank] * root, root[:, None] * vh[:rank]
    if up.shape[1] < rank:  # more ranks than there are dimensions: the rest is silent
        missing = rank - up.shape[1]
        up = torch.cat([up, up.new_zeros((up.shape[0], missing))], 1)
        down = torch.cat([down, down.new_zeros((missing, down.shape[1]))])
    return up, down
