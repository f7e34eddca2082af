"""Kernels in Triton, each for an operation of `nerine.ops` that stays the reference. Off unless somebody asks for one.

Importing this package does not import triton; asking a kernel whether it can take tensors, or for its function, does.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nerine.errors import MissingExtra

__all__ = ["Kernel", "kernels"]


@dataclass(frozen=True)
class Kernel:
    """One kernel: `name` of its function, the module that holds it, the reference that it `replaces`, and in words what
    it `takes` and what it `fuses`; `check` is the function beside it that `unsuited` asks."""

    name: str
    module: str
    replaces: str
    takes: str
    fuses: str
    check: str = "unsuited"

    def _find(self, name: str) -> Any:
        try:
            importlib.import_module("triton")
        except ImportError as error:
            raise MissingExtra(f"the kernel {self.name} needs triton ({error}): pip install triton") from error
        return getattr(importlib.import_module(f"{__name__}.{self.module}"), name)

    @property
    def function(self) -> Callable[..., Tensor]:
        """What computes the same as the reference, gradients included, from the same arguments.

        Raises:
            MissingExtra: triton is not installed.
        """
        found: Callable[..., Tensor] = self._find(self.name)
        return found

    def unsuited(self, *arguments: Any) -> str:
        """Why `function` cannot take these arguments, for their formats, shapes or device; empty if it can.

        Raises:
            MissingExtra: triton is not installed.
        """
        why: str = self._find(self.check)(*arguments)
        return why


_HALF_TOO = "fp32, fp16, bf16"


def kernels() -> dict[str, Kernel]:
    """Every kernel there is, by name."""
    found = (
        Kernel(
            "low_rank_row_square",
            "row_norm",
            "nerine.ops.row_norm.low_rank_row_square",
            f"weight in {_HALF_TOO}, any strides; factors in fp32, rank at most 128",
            "widening, product, squares and row sums of DoRA's norm; backward one pass over the weight",
        ),
        Kernel(
            "low_rank_row_norm",
            "row_norm",
            "nerine.ops.row_norm.low_rank_row_norm",
            f"weight in {_HALF_TOO}, any strides; factors in fp32, rank at most 128",
            "the same, and a root with a floor behind it",
        ),
        Kernel(
            "rescale",
            "rescale",
            "nerine.ops.rescale.rescale",
            f"input in {_HALF_TOO}, gain and offset likewise or in fp32; channels last, or apart as in a convolution",
            "product and sum, rounded once; backward all three gradients",
        ),
        Kernel(
            "stretch",
            "rescale",
            "nerine.ops.rescale.stretch",
            f"input in {_HALF_TOO}, the rest in fp32; channels last, or apart as in a convolution",
            "the same, with DoRA's gain and offset before it",
            "unsuited_stretch",
        ),
        Kernel(
            "cayley",
            "cayley",
            "nerine.ops.cayley.cayley",
            "fp32, blocks of at most 64 x 64",
            "the direct solution of a whole block; backward one more",
        ),
        Kernel(
            "turn_channels",
            "blocks",
            "nerine.ops.blocks.turn_channels",
            f"input in {_HALF_TOO}, matrices and offset likewise or in fp32; blocks of at most 64 x 64",
            "product, order of channels and offset; backward all three gradients",
        ),
        Kernel(
            "kron_linear",
            "kron",
            "nerine.ops.kron.mix_channels, then a product with w2",
            f"input of a linear layer in {_HALF_TOO}, factors likewise or in fp32; w1 of at most 16 x 16",
            "both products and the sum with the base; backward all but one product",
        ),
        Kernel(
            "butterfly",
            "butterfly",
            "nerine.ops.butterfly.butterfly",
            f"input in {_HALF_TOO}, turns likewise or in fp32; blocks of at most 64 x 64",
            "all stages; backward both gradients of a stage",
        ),
        Kernel(
            "butterfly_deviation",
            "butterfly",
            "nerine.ops.butterfly: added_by_runs of joined_stages",
            f"input in {_HALF_TOO}, turns likewise or in fp32; blocks of at most 64 x 64",
            "all stages; backward both gradients of a stage",
        ),
        Kernel(
            "hadamard",
            "hadamard",
            "(a1 @ b1) * (a2 @ b2) * scale, as in LoHa.delta",
            "fp32, ranks at most 32",
            "both products and their product; backward all four gradients from one reading",
        ),
    )
    return {kernel.name: kernel for kernel in found}
