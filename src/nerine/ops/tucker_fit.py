"""The Tucker-2 form of a given kernel: leading directions of its outputs and of its inputs, and the core between them.

The directions are those of the two unfoldings (a truncated higher-order SVD). Those of fewer ranks are the first of
those of more, so that one decomposition tells what every rank keeps.

Source: De Lathauwer, De Moor and Vandewalle 2000 (HOSVD), over the two channel axes alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nerine.ops.precision import full_precision, same_dtype, wide

__all__ = ["Tucker", "kept_squares", "leading_tucker", "tucker_of"]


class Tucker(NamedTuple):
    """up `[out, p]` and down `[q, in]` of orthonormal columns and rows, and core `[p, q, *k]`."""

    up: Tensor
    core: Tensor
    down: Tensor


@torch.no_grad()
def tucker_of(kernel: Tensor) -> Tucker:
    """All directions of a kernel `[out, in, *k]`; the three multiplied are the kernel."""
    with full_precision(kernel):
        own = wide(kernel)
        up, down = _directions(own), _directions(own.transpose(0, 1))
        half = (up.mT @ own.flatten(1)).reshape(up.shape[1], *own.shape[1:])
        core = (down.mT @ half.transpose(0, 1).flatten(1)).reshape(down.shape[1], up.shape[1], *own.shape[2:])
        return Tucker(up, core.transpose(0, 1), down.mT)


def _directions(unfolded: Tensor) -> Tensor:
    """Left singular vectors `[n, n]` of a matrix with `n` rows, the leading ones first."""
    rows = unfolded.flatten(1)
    rows = _double(rows)
    _, vectors = torch.linalg.eigh(rows @ rows.mT)
    return same_dtype(vectors.flip(1), unfolded)


def _double(t: Tensor) -> Tensor:
    """In fp64, where the device has it."""
    return t if t.device.type == "mps" else t.double()


@torch.no_grad()
def kept_squares(kernel: Tensor) -> Tensor:
    """The squares of a kernel that the leading form of each rank keeps, in fp64: entry r - 1 that of rank r, as many
    as there are outputs or inputs, whichever are more."""
    squares = _double(tucker_of(kernel).core).square().flatten(2).sum(2)
    most = max(squares.shape)
    whole = squares.new_zeros((most, most))
    whole[: squares.shape[0], : squares.shape[1]] = squares
    return whole.cumsum(0).cumsum(1).diagonal()


@torch.no_grad()
def leading_tucker(kernel: Tensor, rank: int) -> Tucker:
    """The form of that rank on both sides, its size shared out between the three; zeros beyond the ranks that a side
    has. up `[out, rank]`, core `[rank, rank, *k]`, down `[rank, in]`."""
    up, core, down = tucker_of(kernel)
    up, core, down = up[:, :rank], core[:rank, :rank], down[:rank]
    share = torch.linalg.vector_norm(core).clamp_min(torch.finfo(core.dtype).tiny) ** (1 / 3)
    p, q = rank - up.shape[1], rank - down.shape[0]
    padding = [0, 0] * (core.dim() - 2)
    pad = torch.nn.functional.pad
    return Tucker(
        pad(up * share, (0, p)), pad(core / share**2, (*padding, 0, q, 0, p)), pad(down * share, (0, 0, 0, q))
    )
