"""Diag-OFT: the outputs are turned by orthogonal blocks.   W' = Rᵀ·W,   R = Cayley(B - Bᵀ), block by block

Turning keeps the angles between the neurons of a layer. With `constraint` the turn is bounded (COFT); with `rescale`
each output has a trained factor as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nerine.algorithms.base import FLOOR, Call, Design, Params, Sandwich
from nerine.algorithms.settings import check_flag, check_number, check_rank, nearest_divisor
from nerine.axes import Layout, Spec
from nerine.ops.blocks import turn_channels
from nerine.ops.cayley import bounded, cayley, skew, unit
from nerine.ops.precision import full_precision, same_dtype, wide
from nerine.ops.procrustes import nearest_turn, nearest_turn_and_gain
from nerine.ops.row_norm import norm_from_square, turned_row_square
from nerine.site import Site

__all__ = ["DiagOFT", "rotations", "turned_and_rescaled"]


def rotations(blocks: Spec) -> tuple[Layout, ...]:
    """The layouts of a rotation of the outputs: without and with a factor of each output."""
    rescale = Spec("out 1 *1", "rescale", init="ones")
    return tuple(
        Layout({"blocks": blocks, **more}, ("out = n s",), alpha="constraint") for more in ({}, {"rescale": rescale})
    )


_BLOCKS = Spec("n s s", "oft_blocks", init="zeros", carrier=True, gate="n")
_LAYOUTS = rotations(_BLOCKS)


def turned_and_rescaled(p: Params, t: Tensor, turned: Tensor) -> Tensor:
    """The deviation of `t` `[..., out]` from that of the turn, with the factor of each output where there is one."""
    if "rescale" not in p.tensors:
        return turned
    gain = p.tensors["rescale"].reshape(-1)
    return turned + same_dtype(gain - 1, t) * (t + turned)


@dataclass(frozen=True, kw_only=True)
class DiagOFT(Sandwich):
    """W' = rescale ∘ (Rᵀ·W) with blocks B `[n, s, s]` and n·s = out.

    `block_size` is s; where it does not divide the outputs, the nearest divisor. `constraint` bounds |B - Bᵀ| over all
    blocks by constraint·out (0: no bound).
    Source: Qiu et al. (OFT, COFT), arXiv:2306.07280.
    """

    name = "diag-oft"
    source = "Qiu et al., arXiv:2306.07280"
    passes = 8
    pieces = frozenset({"post"})
    keeps_mean = False
    block_size: int = 32
    constraint: float = 0.0
    rescale: bool = False

    def __post_init__(self) -> None:
        check_rank("DiagOFT", self.block_size, "block_size")
        check_number("DiagOFT", "constraint", self.constraint)
        check_flag("DiagOFT", rescale=self.rescale)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return _LAYOUTS

    def unsuited(self, site: Site) -> str:
        why = f"{site.shape[0]} outputs have no blocks of a size near {self.block_size}"
        return super().unsuited(site) or ("" if nearest_divisor(site.shape[0], self.block_size) > 1 else why)

    def design(self, site: Site) -> Design:
        size = nearest_divisor(site.shape[0], self.block_size)
        sizes = {**site.sizes, "n": site.shape[0] // size, "s": size}
        note = "" if size == self.block_size else f"blocks of {size}, which divides {site.shape[0]} outputs"
        return Design(_LAYOUTS[self.rescale], sizes, float(self.constraint), note=note)

    @staticmethod
    def _turn(p: Params, blocks: Tensor) -> Tensor:
        """R - I `[n, s, s]`."""
        n, size, _ = blocks.shape
        return cayley(bounded(skew(blocks), p.scale * n * size))

    def size(self, p: Params, weight: Tensor) -> Tensor:
        return super().size(p.without("rescale"), weight)

    def reach(self, p: Params) -> int:
        return p.tensors["blocks"].shape[1]

    def post(self, p: Params, t: Tensor) -> Tensor:
        return turned_and_rescaled(p, t, turn_channels(t, p.once("turn", lambda: self._turn(p, p.tensors["blocks"]))))

    def output(self, p: Params, call: Call) -> Tensor:
        """(y - bias)·R + bias in one pass over y, with the factor of each output in R."""
        site = call.site
        if call.y.dtype.itemsize < 4 or self._crosses_groups(p, site):
            return super().output(p, call)

        matrices = p.once("matrices", lambda: self._whole(p))
        offset = None
        if call.bias is not None:
            with full_precision(call.y):
                bias = wide(call.bias).reshape(len(matrices), 1, -1)
                offset = (bias - torch.bmm(bias, matrices)).reshape(-1)
        return site.channels_first(turn_channels(site.channels_last(call.y), matrices, offset))

    def _whole(self, p: Params) -> Tensor:
        """R `[n, s, s]`, with the factor of each output in it."""
        turn = self._turn(p, p.tensors["blocks"])
        matrices = turn + unit(turn)
        return matrices * p.tensors["rescale"].reshape(len(turn), 1, -1) if "rescale" in p.tensors else matrices

    def row_norm(self, p: Params, weight: Tensor) -> Tensor:
        """|Rᵀ·W| from the products of the rows within each block, which are as small as the blocks."""
        matrices = p.once("matrices", lambda: self._whole(p))
        return norm_from_square(turned_row_square(weight, matrices), FLOOR)

    def fit(self, site: Site, weight: Tensor, target: Tensor) -> Params:
        """The blocks that turn the weight nearest to `target` (Procrustes), within the bound; with `rescale` the
        factors in turns with them."""
        design = self.design(site)
        limit = design.scale * site.shape[0]
        before, after = (wide(t).reshape(-1, design.sizes["s"], site.flat) for t in (weight, target))
        if not self.rescale:
            return Params({"blocks": nearest_turn(before, after, limit) / 2}, design.scale)
        q, gain = nearest_turn_and_gain(before, after, limit)
        return Params({"blocks": q / 2, "rescale": gain.reshape(design.shapes["rescale"])}, design.scale)

    def cost(self, site: Site, design: Design) -> int:
        return site.shape[0] * design.sizes["s"]
