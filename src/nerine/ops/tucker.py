"""Tucker-2 form of a convolution kernel: a small core between two matrices on the channel axes.

W[o, i, *k] = Σ_pq  up[o, p] · core[p, q, *k] · down[q, i]
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["tucker", "tucker_in"]


def tucker_in(core: Tensor, down: Tensor) -> Tensor:
    """The core `[p, q, *k]` with the input matrix `[q, in]` taken into it: `[p, in, *k]`."""
    p, q, *kernel = core.shape
    mixed = down.mT @ core.reshape(p, q, -1)  # [p, in, taps]
    return mixed.reshape(p, down.shape[1], *kernel)


def tucker(core: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The kernel `[out, in, *k]` from core `[p, q, *k]`, up `[out, p]` and down `[q, in]`."""
    inner = tucker_in(core, down)
    return (up @ inner.flatten(1)).reshape(up.shape[0], *inner.shape[1:])
