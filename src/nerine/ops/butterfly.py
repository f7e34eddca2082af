"""Butterfly products: m stages of small orthogonal blocks, each on other groups of channels, that together mix all.

Stage i sees the channels as `[groups, 2, 2ⁱ, s/2]`: a block takes s/2 neighbours from either half of a group. Within a
block the two halves are interleaved, as files of BOFT have it. Several stages in a row are first multiplied into one of
larger blocks, for a stage costs more in passes over the activation than in arithmetic.
Source: Liu et al. (BOFT), arXiv:2311.06243; the order of channels is that of files written by LyCORIS.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nerine.ops.cayley import unit
from nerine.ops.precision import full_precision, same_dtype

__all__ = ["added_by_runs", "butterfly", "butterfly_deviation", "joined_stages", "through_runs"]

_WIDEST = 128  # channels in the blocks of joined stages: there arithmetic and passes over memory cost about the same


def _joined(stages: int, half: int) -> list[int]:
    """How many stages are joined at a time, the shorter runs first."""
    most = max(1, (_WIDEST // max(1, half)).bit_length() - 1)
    runs = -(-stages // most)
    return [stages // runs + (i >= runs - stages % runs) for i in range(runs)]


def _join(turns: Tensor, first: int, count: int) -> Tensor:
    """R - I of the stages `first`, …, `first + count - 1` in one: `[groups, 2^first, w, w]` with w = 2^count·s/2."""
    _, n, size, _ = turns.shape
    half, step, parts = size // 2, 2**first, 2**count
    groups, width = 2 * n // (step * parts), parts * half
    start = turns[first].reshape(groups, parts // 2, step, half, 2, half, 2)  # a k x b y c
    joined = torch.diag_embed(start.permute(0, 2, 4, 3, 6, 5, 1), dim1=2, dim2=5)  # [groups, step, a, b, x, a', c, y]
    joined = joined.reshape(groups, step, width, width)
    eye = unit(joined)
    for i in range(1, count):
        low = 2**i
        turn = turns[first + i].reshape(groups, parts // (2 * low), low, step, half, 2, half, 2)
        whole = (joined + eye).reshape(groups, step, parts // (2 * low), 2, low, half, width)
        added = torch.einsum("gaokxbyc,gkacoyn->gkaboxn", turn, whole)
        joined = joined + added.reshape(joined.shape)
    return joined


def joined_stages(turns: Tensor) -> list[Tensor]:
    """R - I `[groups, 2^first, w, w]` of each run of joined stages; turns `[m, n, s, s]` are R - I of each stage and
    block. A single block of odd size has no halves."""
    stages, _, size, _ = turns.shape
    if size % 2:
        return [turns[0][:, None]]
    with full_precision(turns):
        counts = _joined(stages, size // 2)
        return [_join(turns, sum(counts[:i]), count) for i, count in enumerate(counts)]


def _geometry(joined: Tensor, size: int) -> tuple[int, int]:
    """(2^first, 2^count) of a run of stages with blocks of `size`."""
    return joined.shape[1], 1 if size % 2 else 2 * joined.shape[2] // size


def butterfly(t: Tensor, turns: Tensor) -> Tensor:
    """All stages applied to `t` `[..., out]`; turns `[m, n, s, s]` are R - I of each stage and block."""
    return through_runs(t, joined_stages(turns), turns.shape[-1])


def butterfly_deviation(t: Tensor, turns: Tensor) -> Tensor:
    """What all stages together add to `t`, likewise."""
    return added_by_runs(t, joined_stages(turns), turns.shape[-1])


def through_runs(t: Tensor, runs: Sequence[Tensor], size: int) -> Tensor:
    """The same, of stages of blocks of `size` that `joined_stages` has joined."""
    with full_precision(t):
        y: Tensor | None = None
        step = parts = 1
        for joined in runs:
            groups, width = joined.shape[0], joined.shape[-1]
            new_step, new_parts = _geometry(joined, size)
            matrices = same_dtype((joined + unit(joined)).flatten(0, 1).mT, t)
            if y is None:
                blocks = t.reshape(-1, groups * new_step, width).transpose(0, 1)
            else:  # [groups, new parts, step, tokens, parts, s/2] -> what stood apart comes together
                split = y.reshape(groups, new_parts, step, -1, parts, width // new_parts)
                blocks = split.permute(0, 4, 2, 3, 1, 5).reshape(groups * new_step, -1, width)
            y = torch.bmm(blocks, matrices)
            step, parts = new_step, new_parts
        assert y is not None
        return _in_order(y, step, parts, t)


def _in_order(y: Tensor, step: int, parts: int, t: Tensor) -> Tensor:
    """The channels of the last run `[groups·step, tokens, parts·s/2]` back in their order, in the shape of `t`."""
    split = y.reshape(-1, step, y.shape[1], parts, y.shape[2] // parts)
    return split.permute(2, 0, 3, 1, 4).reshape(t.shape)


def added_by_runs(t: Tensor, runs: Sequence[Tensor], size: int) -> Tensor:
    """What all stages together add to `t`; in half precision without a sum in which a small change would vanish."""
    if t.dtype.itemsize >= 4:
        return through_runs(t, runs, size) - t
    d: Tensor | None = None
    for joined in runs:
        step, parts = _geometry(joined, size)
        now = t if d is None else t + d
        with full_precision(t):
            split = now.reshape(-1, joined.shape[0], parts, step, joined.shape[-1] // parts)
            blocks = split.permute(1, 3, 0, 2, 4).reshape(joined.shape[0] * step, -1, joined.shape[-1])
            added = _in_order(torch.bmm(blocks, same_dtype(joined.flatten(0, 1).mT, t)), step, parts, t)
        d = added if d is None else d + added
    assert d is not None
    return d
