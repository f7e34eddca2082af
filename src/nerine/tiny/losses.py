"""The training loss of the tiny model: rectified flow. Knows tensors and a UNet, nothing of files or prompts.

x_t = (1 - t) x + t·noise        v = noise - x        loss = mean |unet(x_t, 1000 t, text) - v|²
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TIMESTEPS = 1000  # the unet counts time from 0 (picture) to 1000 (noise)


def denoising_loss(unet: nn.Module, text_states: Tensor, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """The loss of one batch at random noise and logit-normal times; a 0-d tensor with a gradient.

    `text_states [n, tokens, dim]`, `pictures [n, 3, h, w]` in [-1, 1]. The random numbers are drawn on the
    generator's device, so a CPU generator gives the same numbers for a model on any device.

    Source: Esser et al. 2024 (arXiv 2403.03206), eq. 13 and section 3.1 with m = 0, s = 1.
    """
    noise = torch.randn(pictures.shape, generator=generator, device=generator.device).to(pictures)
    time = torch.randn(len(pictures), generator=generator, device=generator.device).sigmoid().to(pictures)
    return flow_error(unet, text_states, pictures, noise, time)


def flow_error(unet: nn.Module, text_states: Tensor, pictures: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """Mean squared error of the velocity at the given noise and times `[n]` in [0, 1]; a 0-d tensor."""
    t = time[:, None, None, None]
    noisy = (1 - t) * pictures + t * noise
    velocity = unet(noisy, time * TIMESTEPS, encoder_hidden_states=text_states, return_dict=False)[0]
    return F.mse_loss(velocity, noise - pictures)


def drop_prompts(text_states: Tensor, empty: Tensor, chance: float, generator: torch.Generator) -> Tensor:
    """The text states with each row replaced by the empty prompt's `[1, tokens, dim]` at that chance.

    This is what makes classifier-free guidance work: the model also learns to draw without a prompt.
    """
    drop = torch.rand(len(text_states), generator=generator, device=generator.device) < chance
    return torch.where(drop.to(text_states.device)[:, None, None], empty, text_states)


@torch.no_grad()
def held_out_loss(
    unet: nn.Module, text_states: Tensor, pictures: Tensor, *, times: int = 4, batch: int = 64, seed: int = 7
) -> float:
    """The loss at fixed noise and fixed times: the same number for the same weights, on every run.

    The times are the midpoints of `times` equal shares of the logit-normal law, so that few of them already
    estimate the expected training loss well.
    """
    generator = torch.Generator().manual_seed(seed)
    shares = (torch.arange(times, dtype=torch.float64) + 0.5) / times
    points = torch.special.ndtri(shares).sigmoid()
    total = 0.0
    with _evaluating(unet):
        for point in points.tolist():
            for start in range(0, len(pictures), batch):
                part = slice(start, start + batch)
                noise = torch.randn(pictures[part].shape, generator=generator).to(pictures)
                time = pictures.new_full((len(noise),), point)
                total += float(flow_error(unet, text_states[part], pictures[part], noise, time)) * len(noise)
    return total / (times * len(pictures))


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)
