"""The learning rate over time, as a function of the step and nothing else: it has no state that could be lost."""

from __future__ import annotations

import math

from nerine.train.settings import OptimizerSettings

__all__ = ["Rates"]


class Rates:
    """`rates(step)` is what the learning rates are multiplied with in that step, of `steps`, counted from 0; the rate
    at the end would be reached in the step after the last."""

    def __init__(self, settings: OptimizerSettings, steps: int) -> None:
        self.settings = settings
        self.steps = steps
        warmup = settings.warmup
        self.warmup = min(steps, round(warmup * steps) if warmup < 1 else round(warmup))

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        return self._after(min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup)))

    def _after(self, share: float) -> float:
        """The factor at a share of the time after the warm-up."""
        settings, end = self.settings, self.settings.end_lr
        if settings.schedule == "constant":
            return 1.0
        if settings.schedule == "linear":
            level = 1 - share
        elif settings.schedule == "polynomial":
            level = (1 - share) ** settings.schedule_power
        else:
            cycles = settings.schedule_cycles if settings.schedule == "cosine-restarts" else 1
            within = 1.0 if share == 1 else share * cycles % 1
            level = (1 + math.cos(math.pi * within)) / 2  # Loshchilov and Hutter, arXiv:1608.03983, eq. 5
        return end + (1 - end) * level
