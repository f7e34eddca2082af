"""The objective: how pictures are made noisy, what the denoiser is to say of them, and how its errors count.

Noise is drawn for each picture from its place in the run. All of it is in fp32, whatever the denoiser computes in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nerine.errors import OptionError
from nerine.train.batch import Latents
from nerine.train.randomness import Dice
from nerine.train.schedules import TIMES, cumulated_alphas, signal_to_noise
from nerine.train.settings import ObjectiveSettings

__all__ = ["Objective"]

Places = Sequence[tuple[int, int]]
_LEAST = 1e-8  # of a ratio of signal to noise that is divided by


class Objective:
    """What is asked of a denoiser. `prediction` is "epsilon", "v" or "flow".

    Raises:
        OptionError: the settings ask for what its schedule cannot give.
    """

    def __init__(self, settings: ObjectiveSettings, prediction: str, scheduler: Mapping[str, Any]) -> None:
        self.settings = settings
        self.prediction = prediction if settings.prediction == "auto" else settings.prediction
        if settings.zero_terminal_snr and self.prediction != "v":
            raise OptionError(
                f"zero_terminal_snr: at the end there is noise alone, of which {self.prediction} says nothing; it goes "
                "with v"
            )
        self._alphas = torch.empty(0)
        if self.prediction != "flow":
            self._alphas = cumulated_alphas(scheduler, settings.zero_terminal_snr)

    # -- noise ---------------------------------------------------------------------------------------------------------
    def sample(self, latents: Latents, dice: Dice, purpose: str, where: Places) -> Tensor:
        """Latents `[batch, channels, height, width]` drawn from what the VAE says."""
        mean = latents.mean.float()
        if latents.std is None:
            return mean
        return mean + latents.std.float() * _normal(mean, dice, f"{purpose} latent", where)

    def noise(self, latents: Tensor, dice: Dice, purpose: str, where: Places) -> Tensor:
        """Noise in the shape of `latents`; with `noise_offset` some of it is the same for all of a channel.

        Source: the offset is Guttenberg's, 2023 (crosslabs.org, "Diffusion with offset noise").
        """
        found = _normal(latents, dice, f"{purpose} noise", where)
        if self.settings.noise_offset:
            offset = _normal(latents[:, :, :1, :1], dice, f"{purpose} offset", where)
            found = found + self.settings.noise_offset * offset
        return found

    def noisy(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """x_t."""
        signal, level = self._mix(times, latents)
        return signal * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser should say: the noise; sqrt(a)·noise - sqrt(1 - a)·x for v (Salimans and Ho,
        arXiv:2202.00512, appendix D); noise - x for flow."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "flow":
            return noise - latents
        signal, level = self._mix(times, latents)
        return signal * noise - level * latents

    def _mix(self, times: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """The shares of picture and noise at `times`, to be multiplied with `like`."""
        shape = (-1, *[1] * (like.dim() - 1))
        if self.prediction == "flow":
            level = (times / TIMES).to(like).reshape(shape)
            return 1 - level, level
        alphas = self._alphas_at(times)
        return alphas.sqrt().to(like).reshape(shape), (1 - alphas).sqrt().to(like).reshape(shape)

    def _alphas_at(self, times: Tensor) -> Tensor:
        if self._alphas.device != times.device:
            self._alphas = self._alphas.to(times.device, torch.float32 if times.device.type == "mps" else torch.float64)
        return self._alphas[times.long()]

    # -- loss ----------------------------------------------------------------------------------------------------------
    def loss(self, prediction: Tensor, target: Tensor, times: Tensor) -> Tensor:
        """The error of each picture `[batch]`, the mean over all but the batch, weighted by its time."""
        prediction, target = prediction.float(), target.float()
        if self.settings.loss == "l2":
            errors = F.mse_loss(prediction, target, reduction="none")
        elif self.settings.loss == "l1":
            errors = F.l1_loss(prediction, target, reduction="none")
        else:  # twice, so that small errors count as with l2
            errors = 2 * F.huber_loss(prediction, target, reduction="none", delta=self.settings.huber_c)
        losses = errors.flatten(1).mean(1)
        return losses if self.settings.weighting == "none" else losses * self.weight(times)

    def weight(self, times: Tensor) -> Tensor:
        """How much the errors at `times` count, `[batch]`, with r the ratio of signal to noise (in squares):

            min-snr     min(r, g)/r for epsilon, min(r, g)/(r + 1) for v, min(r, g)·s² for flow
            debiased    1/sqrt(r) for epsilon, sqrt(r)/(r + 1) for v, s·(1 - s) for flow

        Both are given for epsilon in the papers; an error of epsilon is r times that of x (in squares), one of v r + 1
        times, one of the velocity 1/s² times, with s = t/1000 and r = ((1 - s)/s)² for flow. (sd-scripts has 1/(r + 1)
        for debiased v.) Source: Hang et al., arXiv:2303.09556, section 3.4; Yu et al., arXiv:2310.08442, eq. 10.
        """
        kind, gamma = self.settings.weighting, self.settings.min_snr_gamma
        if kind == "none":
            return torch.ones_like(times)
        if self.prediction == "flow":
            level = (times / TIMES).clamp(min=1e-3)
            ratio = ((1 - level) / level).square()
            return ratio.clamp(max=gamma) * level.square() if kind == "min-snr" else level * (1 - level)
        ratio = signal_to_noise(self._alphas_at(times)).clamp(min=_LEAST)
        if kind == "min-snr":
            found = ratio.clamp(max=gamma) / (ratio if self.prediction == "epsilon" else ratio + 1)
        else:
            found = ratio.rsqrt() if self.prediction == "epsilon" else ratio.sqrt() / (ratio + 1)
        return found.float()


def _normal(like: Tensor, dice: Dice, purpose: str, where: Places) -> Tensor:
    """Standard normal numbers in the shape of `like`, row by row from where the pictures stand."""
    shape = tuple(like.shape[1:])
    rows = [dice.normal(shape, purpose, *place) for place in where]
    return torch.stack(rows).to(like.device)
