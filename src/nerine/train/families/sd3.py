"""Stable Diffusion 3 and 3.5: a transformer trained with rectified flow, two CLIP text encoders and T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from nerine.train.batch import Text
from nerine.train.families.latent import LatentBase

__all__ = ["StableDiffusion3"]


class StableDiffusion3(LatentBase):
    """`StableDiffusion3Pipeline`; without T5 its place holds zeros, as in the pipeline."""

    family: ClassVar[str] = "sd3"
    classes: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    guidance: ClassVar[float] = 5.0

    def encode_text(self, captions: Sequence[str]) -> Text:
        prompts = list(captions)
        states, _, pooled, _ = self.pipeline.encode_prompt(
            prompts, prompts, prompts, device=self.pipeline.text_encoder.device, do_classifier_free_guidance=False
        )
        return {"states": states, "pooled": pooled}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
        found: Tensor = self.denoiser(
            hidden_states=noisy.to(self.format),
            timestep=timesteps,
            encoder_hidden_states=text["states"],
            pooled_projections=text["pooled"],
            return_dict=False,
        )[0]
        return found
