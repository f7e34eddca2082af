"""Sums of changes in which not every entry has a say: TIES, DARE and pruning by size, on one layer at a time.

    linear            Σ wᵢ·Dᵢ
    magnitude_prune   of each D only the largest entries, the share `density` of them
    dare_linear       of each D a random share `density`, and those 1/density times as large
    ties, dare_ties   the same, then of each entry the mean over those Dᵢ that have the sign of most of them

Source: Yadav et al. (TIES), arXiv:2306.01708; Yu et al. (DARE), arXiv:2311.03099; the functions of these names in
PEFT's `utils/merge_utils.py`, whose results these have.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["VOTES", "vote"]

VOTES = ("linear", "magnitude_prune", "dare_linear", "ties", "dare_ties")


def _largest(change: Tensor, density: float) -> Tensor:
    """The largest entries alone."""
    count = int(density * change.numel())
    flat = change.reshape(-1)
    kept = torch.zeros_like(flat)
    index = torch.topk(flat.abs(), count).indices
    kept[index] = flat[index]
    return kept.reshape(change.shape)


def _by_chance(change: Tensor, density: float, rng: torch.Generator) -> Tensor:
    """A random share of the entries, as much larger as there are fewer. Drawn where the generator is, so that all
    devices draw the same."""
    chances = torch.full(change.shape, density, dtype=change.dtype, device=rng.device)
    return change * torch.bernoulli(chances, generator=rng).to(change.device) / density


def _of_one_sign(changes: Tensor, weights: Tensor, sign: str) -> Tensor:
    """The weighted changes `[n, ...]`, of each entry the mean over those that have the elected sign."""
    signs = changes.sign()
    elected = torch.where((changes if sign == "total" else signs).sum(0) >= 0, 1, -1)
    agree = signs == elected
    return (changes * weights * agree).sum(0) / agree.sum(0).clamp(min=1)


def vote(
    method: str,
    changes: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float = 0.5,
    sign: str = "total",
    rng: torch.Generator | None = None,
) -> Tensor:
    """What `method` makes of changes of one shape at their weights. `sign` elects by the sum of the entries ("total")
    or by their number ("frequency"); DARE draws from `rng`."""

    def thinned(change: Tensor) -> Tensor:
        if density >= 1 or method == "linear":
            return change
        if method in ("ties", "magnitude_prune"):
            return _largest(change, density)
        assert rng is not None, "DARE draws from a generator"
        return _by_chance(change, density, rng)

    stacked = torch.stack([thinned(change) for change in changes])
    own = stacked.new_tensor(list(weights)).reshape(-1, *[1] * (stacked.dim() - 1))
    if method in ("ties", "dare_ties"):
        return _of_one_sign(stacked, own, sign)
    return (stacked * own).sum(0)
