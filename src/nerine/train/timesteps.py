"""At which times a step trains: one draw for each picture, from its place in the run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nerine.train.randomness import Dice
from nerine.train.schedules import TIMES
from nerine.train.settings import ObjectiveSettings

__all__ = ["draw_times", "fixed_times", "law_of"]


def law_of(settings: ObjectiveSettings, prediction: str) -> str:
    """How times are drawn: "uniform", "logit-normal" or "shifted"."""
    if settings.timesteps == "auto":
        return "logit-normal" if prediction == "flow" else "uniform"
    return settings.timesteps


def draw_times(
    settings: ObjectiveSettings, prediction: str, dice: Dice, where: Sequence[tuple[int, int]], purpose: str = "time"
) -> Tensor:
    """Times `[batch]` in [0, 1000] in fp32; whole numbers from 0 to 999 for epsilon and v."""
    shares = torch.tensor([dice.chance(purpose, *place) for place in where], dtype=torch.float64)
    return _at(settings, prediction, shares)


def fixed_times(settings: ObjectiveSettings, prediction: str, count: int) -> Tensor:
    """Times `[count]` that stand for all: the midpoints of equal shares of the law that `draw_times` draws from."""
    return _at(settings, prediction, (torch.arange(count, dtype=torch.float64) + 0.5) / count)


def _at(settings: ObjectiveSettings, prediction: str, shares: Tensor) -> Tensor:
    """The times below which the law has these shares of [0, 1): quantiles, so that a uniform number is all it takes.

    Source: logit-normal and shift are Esser et al., arXiv:2403.03206, section 3.1 and eq. 23.
    """
    low, high = settings.min_timestep / TIMES, settings.max_timestep / TIMES
    law = law_of(settings, prediction)
    if law == "logit-normal":
        inner = shares.clamp(1e-12, 1 - 1e-12)
        levels = (settings.timestep_mean + settings.timestep_std * torch.special.ndtri(inner)).sigmoid()
    elif law == "shifted":
        shift = settings.timestep_shift
        levels = shift * shares / (1 + (shift - 1) * shares)
    else:
        levels = shares
    times = (low + (high - low) * levels) * TIMES
    if prediction != "flow":
        times = times.floor().clamp(settings.min_timestep, min(settings.max_timestep, TIMES) - 1)
    found: Tensor = times.float()
    return found
