"""Flux.1: a transformer trained with rectified flow, on latents in patches of two by two; CLIP and T5."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from nerine.errors import OptionError
from nerine.train.batch import Text
from nerine.train.families.latent import LatentBase
from nerine.train.schedules import TIMES

__all__ = ["Flux"]

GUIDANCE = 1.0  # what a distilled model is told in training, where there is no guidance


class Flux(LatentBase):
    """`FluxPipeline`."""

    family: ClassVar[str] = "flux"
    classes: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    guidance: ClassVar[float] = 3.5

    @property
    def resolution(self) -> int:
        return int(self.pipeline.default_sample_size) * self.scale

    @property
    def step(self) -> int:
        return 2 * self.scale

    @property
    def grain(self) -> int:
        return 2 * self.scale

    def call(self, asked: dict[str, Any], generators: list[torch.Generator], size: tuple[int, int]) -> Any:
        if "negative_prompt" in asked:  # the pipeline would take it, and not heed it
            raise OptionError(f"negative: {type(self.pipeline).__name__} takes none, its guidance is distilled into it")
        return super().call(asked, generators, size)

    def encode_text(self, captions: Sequence[str]) -> Text:
        prompts = list(captions)
        states, pooled, _ = self.pipeline.encode_prompt(prompts, prompts, device=self.pipeline.text_encoder.device)
        return {"states": states, "pooled": pooled}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
        height, width = noisy.shape[2:]
        guided = bool(self.config.guidance_embeds)
        found: Tensor = self.denoiser(
            hidden_states=_packed(noisy.to(self.format)),
            timestep=timesteps / TIMES,
            guidance=torch.full_like(timesteps, GUIDANCE) if guided else None,
            pooled_projections=text["pooled"],
            encoder_hidden_states=text["states"],
            txt_ids=noisy.new_zeros(text["states"].shape[1], 3, dtype=self.format),
            img_ids=_places(height // 2, width // 2, noisy.device, self.format),
            return_dict=False,
        )[0]
        return _unpacked(found, height, width)


def _packed(latents: Tensor) -> Tensor:
    """`[batch, c, 2h, 2w]` as `[batch, h·w, 4c]`."""
    batch, channels, height, width = latents.shape
    tiles = latents.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(batch, height // 2 * (width // 2), channels * 4)


def _unpacked(packed: Tensor, height: int, width: int) -> Tensor:
    batch, _, values = packed.shape
    tiles = packed.reshape(batch, height // 2, width // 2, values // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tiles.reshape(batch, values // 4, height, width)


def _places(height: int, width: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(0, row, column) of every patch, `[height·width, 3]`."""
    rows = torch.arange(height, device=device, dtype=dtype)
    columns = torch.arange(width, device=device, dtype=dtype)
    grid = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), -1)
    return torch.cat([torch.zeros_like(grid[..., :1]), grid], -1).reshape(-1, 3)
