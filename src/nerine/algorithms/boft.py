"""BOFT: the outputs are turned by a butterfly of orthogonal blocks, stage after stage.   W' = R_m · … · R_1 · W

With all stages every output reaches every other one, at a small part of the cost of one large rotation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nerine.algorithms.base import Call, Design, Params, Sandwich
from nerine.algorithms.diag_oft import rotations, turned_and_rescaled
from nerine.algorithms.settings import check_flag, check_number, check_rank, nearest_butterfly
from nerine.axes import Layout, Sizes, Spec
from nerine.ops.butterfly import added_by_runs, joined_stages, through_runs
from nerine.ops.cayley import bounded, cayley, skew
from nerine.ops.precision import same_dtype, wide
from nerine.ops.recompute import replay
from nerine.site import Site

__all__ = ["BOFT"]

_BLOCKS = Spec("m n s s", "oft_blocks", init="zeros", carrier=True, gate="n")


def _wrong(sizes: Sizes) -> str:
    """What is wrong with these sizes, if anything."""
    m, n, s = sizes["m"], sizes["n"], sizes["s"]
    if n > 0 and n & (n - 1) == 0 and 0 < m <= n.bit_length() and (s % 2 == 0 or n == 1):
        return ""
    return (
        f"oft_blocks has {m} stages of {n} blocks of {s} x {s}; expected a power of two of blocks, "
        "of an even size where there are several, and log2(n) + 1 stages at most"
    )


_LAYOUTS = tuple(replace(layout, check=_wrong) for layout in rotations(_BLOCKS))


@dataclass(frozen=True, kw_only=True)
class BOFT(Sandwich):
    """W' = rescale ∘ (R_m·…·R_1·W) with blocks B `[m, n, s, s]`, n·s = out and n a power of two.

    `block_size` is s; where it does not fit, the nearest even size whose number of blocks is a power of two. `stages`
    limits m (None: all, log2(n) + 1). `constraint` bounds |B - Bᵀ| over all stages by constraint·out (0: no bound).
    Source: Liu et al. (BOFT), arXiv:2311.06243.
    """

    name = "boft"
    source = "Liu et al., arXiv:2311.06243"
    passes = 60
    instead = ", for its stages turn one after the other; extract as DiagOFT, which has one, or as LoRA instead"
    pieces = frozenset({"post"})
    keeps_mean = False
    block_size: int = 32
    stages: int | None = None
    constraint: float = 0.0
    rescale: bool = False

    def __post_init__(self) -> None:
        check_rank("BOFT", self.block_size, "block_size")
        if self.stages is not None:
            check_rank("BOFT", self.stages, "stages")
        check_number("BOFT", "constraint", self.constraint)
        check_flag("BOFT", rescale=self.rescale)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        return _LAYOUTS

    def unsuited(self, site: Site) -> str:
        why = f"{site.shape[0]} outputs do not split into a power of two of blocks of a size near {self.block_size}"
        return super().unsuited(site) or ("" if nearest_butterfly(site.shape[0], self.block_size) > 1 else why)

    def design(self, site: Site) -> Design:
        out = site.shape[0]
        size = nearest_butterfly(out, self.block_size)
        most = (out // size).bit_length()
        stages = most if self.stages is None else min(self.stages, most)
        notes = [] if size == self.block_size else [f"blocks of {size}, of which {out} outputs have a power of two"]
        notes += [f"{most} stages are all there are"] if self.stages is not None and self.stages > most else []
        sizes = {**site.sizes, "m": stages, "n": out // size, "s": size}
        return Design(_LAYOUTS[self.rescale], sizes, float(self.constraint), note="; ".join(notes))

    def for_file(self, p: Params, weight: Tensor) -> Params:
        """Other readers know files of all stages only: the missing ones turn nothing."""
        blocks = p.tensors["blocks"]
        missing = blocks.shape[1].bit_length() - blocks.shape[0]
        return p.replaced(blocks=torch.cat([blocks, blocks.new_zeros((missing, *blocks.shape[1:]))]))

    def from_file(self, p: Params) -> Params:
        blocks = p.tensors["blocks"]
        stages = len(blocks) if self.stages is None else self.stages
        return p if blocks[stages:].any() else p.replaced(blocks=blocks[:stages])

    def size(self, p: Params, weight: Tensor) -> Tensor:
        return super().size(p.without("rescale"), weight)

    def reach(self, p: Params) -> int:
        stages, _, size, _ = p.tensors["blocks"].shape
        return size << (stages - 1)

    def post(self, p: Params, t: Tensor) -> Tensor:
        size, runs_of = p.tensors["blocks"].shape[-1], self._runs(p)

        def turned(t: Tensor, blocks: Tensor) -> Tensor:
            return added_by_runs(t, runs_of(blocks), size)

        return turned_and_rescaled(p, t, replay(turned, t, p.tensors["blocks"]))

    @staticmethod
    def _runs(p: Params) -> Callable[[Tensor], list[Tensor]]:
        """The stages joined into larger blocks, as a function of the blocks: where a layer is small they are too much
        to be kept for backward, which makes them again."""

        def found(blocks: Tensor) -> list[Tensor]:
            _, n, size, _ = blocks.shape
            return joined_stages(cayley(bounded(skew(blocks), p.scale * n * size)))

        if torch.is_grad_enabled():
            return found
        kept = p.once("runs", lambda: found(p.tensors["blocks"]))
        return lambda blocks: kept

    def output(self, p: Params, call: Call) -> Tensor:
        """rescale ∘ R·y + (bias - rescale ∘ R·bias), of which only y is kept."""
        site = call.site
        if call.y.dtype.itemsize < 4 or self._crosses_groups(p, site):
            return super().output(p, call)

        size, runs_of = p.tensors["blocks"].shape[-1], self._runs(p)
        bias = [] if call.bias is None else [call.bias]
        gain = [p.tensors["rescale"].reshape(-1)] if "rescale" in p.tensors else []

        def turned(t: Tensor, blocks: Tensor, *values: Tensor) -> Tensor:
            runs = runs_of(blocks)

            def whole(t: Tensor) -> Tensor:
                y = through_runs(t, runs, size)
                return y * same_dtype(values[-1], y) if gain else y

            y = whole(t)
            return y + same_dtype(wide(values[0]) - whole(wide(values[0])), y) if bias else y

        return site.channels_first(replay(turned, site.channels_last(call.y), p.tensors["blocks"], *bias, *gain))

    def cost(self, site: Site, design: Design) -> int:
        return site.shape[0] * design.sizes["s"] * design.sizes["m"]
