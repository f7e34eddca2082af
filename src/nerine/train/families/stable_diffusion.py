"""Stable Diffusion 1.x and 2.x: a UNet on latents, one CLIP text encoder, epsilon or v."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from nerine.train.batch import Text
from nerine.train.families.latent import LatentBase

__all__ = ["StableDiffusion"]


class StableDiffusion(LatentBase):
    """`StableDiffusionPipeline`."""

    family: ClassVar[str] = "sd"
    classes: ClassVar[tuple[str, ...]] = ("StableDiffusionPipeline",)
    guidance: ClassVar[float] = 7.5

    def encode_text(self, captions: Sequence[str]) -> Text:
        device = self.pipeline.text_encoder.device
        states, _ = self.pipeline.encode_prompt(list(captions), device, 1, False)
        return {"states": states}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
        found: Tensor = self.denoiser(noisy.to(self.format), timesteps, text["states"], return_dict=False)[0]
        return found
