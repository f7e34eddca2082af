"""SDXL: a UNet that is also told the sizes of pictures, and two CLIP text encoders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from nerine.train.batch import Text
from nerine.train.families.latent import LatentBase

__all__ = ["StableDiffusionXL"]


class StableDiffusionXL(LatentBase):
    """`StableDiffusionXLPipeline`."""

    family: ClassVar[str] = "sdxl"
    classes: ClassVar[tuple[str, ...]] = ("StableDiffusionXLPipeline",)
    guidance: ClassVar[float] = 5.0

    def encode_text(self, captions: Sequence[str]) -> Text:
        device = self.pipeline.text_encoder_2.device
        states, _, pooled, _ = self.pipeline.encode_prompt(
            list(captions), device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {"states": states, "pooled": pooled}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
        more = {"text_embeds": text["pooled"], "time_ids": sizes.to(text["pooled"].dtype)}
        found: Tensor = self.denoiser(
            noisy.to(self.format), timesteps, text["states"], added_cond_kwargs=more, return_dict=False
        )[0]
        return found
