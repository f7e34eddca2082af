"""How much noise there is at a time: the schedules of diffusers' schedulers, read from their configurations.

For epsilon and v times are whole numbers, and x_t = sqrt(a_t)·x + sqrt(1 - a_t)·noise with a_t the cumulated alphas.
For flow, x_t = (1 - s)·x + s·noise with s = t/1000.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nerine.errors import OptionError

__all__ = ["TIMES", "cumulated_alphas", "signal_to_noise"]

TIMES = 1000  # times are counted from 0 to this, growing with the noise


def cumulated_alphas(config: Mapping[str, Any], zero_terminal_snr: bool = False) -> Tensor:
    """The cumulated alphas `[1000]` in fp64 of a scheduler's configuration, from little noise to much.

    With `zero_terminal_snr`, or where the configuration says so, they end in noise alone (Lin et al.,
    arXiv:2305.08891, algorithm 1).

    Raises:
        OptionError: the schedule is of a kind that is not known here.
    """
    count = int(config.get("num_train_timesteps", TIMES))
    if count != TIMES:
        raise OptionError(f"the scheduler counts {count} timesteps; {TIMES} are expected")
    alphas = torch.cumprod(1 - _betas(config), 0)
    if zero_terminal_snr or config.get("rescale_betas_zero_snr"):
        root = alphas.sqrt()
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        alphas = root.square()
    return alphas


def _betas(config: Mapping[str, Any]) -> Tensor:
    given = config.get("trained_betas")
    if given is not None:
        return torch.as_tensor(given, dtype=torch.float64)
    kind = config.get("beta_schedule", "linear")
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    if kind == "linear":
        return torch.linspace(start, end, TIMES, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, TIMES, dtype=torch.float64).square()
    if kind == "squaredcos_cap_v2":  # Nichol and Dhariwal, arXiv:2102.09672, eq. 17
        edges = torch.arange(TIMES + 1, dtype=torch.float64) / TIMES
        bar = ((edges + 0.008) / 1.008 * math.pi / 2).cos().square()
        return (1 - bar[1:] / bar[:-1]).clamp(max=0.999)
    raise OptionError(
        f"the scheduler's beta_schedule is {kind!r}; expected linear, scaled_linear, squaredcos_cap_v2 or trained_betas"
    )


def signal_to_noise(alphas: Tensor) -> Tensor:
    """The ratio of signal to noise, in squares: a/(1 - a)."""
    return alphas / (1 - alphas)
