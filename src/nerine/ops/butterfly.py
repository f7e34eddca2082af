"""Butterfly products: m stages of small orthogonal blocks, each on other groups of channels, that together mix all.

Stage i sees the channels as `[groups, 2, 2ⁱ, s/2]`: a block takes s/2 neighbours from either half of a group. Within a
block the two halves are interleaved, as files of BOFT have it.
Source: Liu et al. (BOFT), arXiv:2311.06243; the order of channels is that of files written by LyCORIS.
"""

from __future__ import annotations

from torch import Tensor

from nerine.ops.precision import full_precision, same_dtype

__all__ = ["butterfly"]


def butterfly(t: Tensor, turns: Tensor) -> Tensor:
    """What all stages together add to `t` `[..., out]`; turns `[m, n, s, s]` are R - I of each stage and block."""
    d: Tensor | None = None
    for stage, turn in enumerate(turns):
        step = _stage(t if d is None else t + d, turn, stage)
        d = step if d is None else d + step
    assert d is not None
    return d


def _stage(t: Tensor, turn: Tensor, stage: int) -> Tensor:
    """(R - I)·t of one stage."""
    n, size, _ = turn.shape
    if n == 1:
        with full_precision(t):
            return t @ same_dtype(turn[0].mT, t)
    half, step = size // 2, 2**stage
    groups = n // step
    split = t.reshape(-1, groups, 2, step, half).permute(1, 3, 0, 4, 2)  # [groups, step, tokens, half, 2]
    with full_precision(t):
        turned = split.reshape(n, -1, size) @ same_dtype(turn.mT, t)
    back = turned.reshape(groups, step, -1, half, 2).permute(2, 0, 4, 1, 3)
    return back.reshape(t.shape)
