"""The pipeline of the tiny text-to-image model: prompt in, 16 px picture out, in pixel space.

This file needs diffusers and transformers; `nerine.tiny` imports it only when a pipeline is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    ImagePipelineOutput,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from nerine.errors import OptionError

OUTPUT_TYPES = ("pil", "pt", "latent")


class TinyPipeline(DiffusionPipeline):  # type: ignore[misc]
    """A UNet that draws digits, a CLIP text encoder that reads the prompt, and a rectified-flow scheduler."""

    model_cpu_offload_seq = "text_encoder->unet"

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text states `[n, tokens, dim]` of the prompts, on the text encoder's device; long ones are cut."""
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt")
        states: Tensor = self.text_encoder(tokens.input_ids.to(self.text_encoder.device)).last_hidden_state
        return states

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        num_inference_steps: int = 16,
        guidance_scale: float = 2.0,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        """One picture per prompt: an ImagePipelineOutput with `.images`, or a 1-tuple if not `return_dict`.

        `output_type` is `"pil"` (a list of pictures), `"pt"` (`[n, 3, h, w]` in [0, 1]) or `"latent"` (the
        same in [-1, 1], the model's own range). `latents` is the starting noise, drawn from `generator` if
        absent; a CPU generator gives the same noise for a model on any device.

        *Raises* OptionError for an unknown output type or for no prompts.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if output_type not in OUTPUT_TYPES:
            known = ", ".join(OUTPUT_TYPES)
            raise OptionError(f"output_type: expected one of {known}, found {output_type!r}")
        if not prompts:
            raise OptionError("prompt: expected at least one prompt, found an empty list")
        noise = self._noise(prompts, generator, latents)
        pictures = self._denoise(prompts, num_inference_steps, guidance_scale, noise).clamp(-1, 1)
        images: Any = pictures if output_type == "latent" else (pictures + 1) / 2
        if output_type == "pil":
            images = self.numpy_to_pil(images.cpu().permute(0, 2, 3, 1).float().numpy())
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _noise(self, prompts: list[str], generator: torch.Generator | None, latents: Tensor | None) -> Tensor:
        if latents is None:
            config = self.unet.config
            shape = (len(prompts), config.in_channels, config.sample_size, config.sample_size)
            device = generator.device if generator is not None else self.unet.device
            latents = torch.randn(shape, generator=generator, device=device)
        return latents.to(self.unet.device, self.unet.dtype)

    def _denoise(self, prompts: list[str], steps: int, guidance: float, pictures: Tensor) -> Tensor:
        guided = guidance != 1.0
        states = self.encode([""] * len(prompts) + prompts if guided else prompts)
        states = states.to(self.unet.device, self.unet.dtype)
        sigmas = torch.linspace(1, 1 / steps, steps).tolist()
        self.scheduler.set_timesteps(sigmas=sigmas, device=pictures.device)
        with self.progress_bar(total=steps) as bar:
            for time in self.scheduler.timesteps:
                given = torch.cat([pictures, pictures]) if guided else pictures
                velocity = self.unet(given, time.expand(len(given)), states, return_dict=False)[0]
                if guided:
                    free, asked = velocity.chunk(2)
                    velocity = free + guidance * (asked - free)
                pictures = self.scheduler.step(velocity, time, pictures, return_dict=False)[0]
                bar.update()
        return pictures
