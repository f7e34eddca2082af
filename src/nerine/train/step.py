"""Step: a batch in, the loss of each picture out. It is the one module that engines wrap: all that is trained is in it.

Its random numbers come from where the pictures stand in the run, whatever the number of processes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nerine.model.network import Network
from nerine.model.pipeline import Parts
from nerine.train.batch import Batch, Latents, Text
from nerine.train.families.base import Base
from nerine.train.objective import Objective
from nerine.train.randomness import Dice

__all__ = ["Step", "moved"]


class Step(nn.Module):
    """`step(batch, times)` gives the losses `[batch]` in fp32, weighted, with gradients for the adapters in `parts`.
    `penalty` is the weight of what the algorithms ask for beside."""

    def __init__(
        self, base: Base, parts: Parts, network: Network, objective: Objective, dice: Dice, penalty: float = 0.0
    ) -> None:
        super().__init__()
        self.parts = parts
        self.base = base
        self.network = network
        self.objective = objective
        self.dice = dice
        self.penalty = penalty

    def forward(self, batch: Batch, times: Tensor, purpose: str = "train") -> Tensor:
        """`times` [batch] in [0, 1000]; `purpose` keeps the noise of validation apart."""
        where = batch.where
        text = batch.text if batch.text is not None else self.base.encode_text(batch.captions)
        latents = self.objective.sample(batch.latents, self.dice, purpose, where)
        noise = self.objective.noise(latents, self.dice, purpose, where)
        self.network.set_timestep(times)
        noisy = self.objective.noisy(latents, noise, times)
        prediction = self.base.predict(noisy, times, text, batch.sizes)
        target = self.objective.target(latents, noise, times)
        losses = self.objective.loss(prediction, target, times) * batch.weights
        return losses + self.penalty * self.network.penalty() if self.penalty and purpose == "train" else losses


def moved(batch: Batch, device: torch.device, dtype: torch.dtype) -> Batch:
    """The batch on the device of the denoiser; texts in its number format."""
    mean, std = batch.latents
    latents = Latents(mean.to(device, non_blocking=True), None if std is None else std.to(device, non_blocking=True))
    text: Text | None = None
    if batch.text is not None:
        text = {name: _placed(t, device, dtype) for name, t in batch.text.items()}
    return Batch(
        latents=latents,
        text=text,
        captions=batch.captions,
        sizes=batch.sizes.to(device),
        weights=batch.weights.to(device),
        where=batch.where,
    )


def _placed(t: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    return t.to(device, dtype, non_blocking=True) if t.is_floating_point() else t.to(device, non_blocking=True)
