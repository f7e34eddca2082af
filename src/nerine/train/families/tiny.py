"""The little model that comes with nerine: rectified flow on pixels, a CLIP text encoder, no VAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from nerine.train.batch import Latents, Text
from nerine.train.families.base import Base

__all__ = ["Tiny"]


class Tiny(Base):
    """`nerine.tiny.TinyPipeline`."""

    family: ClassVar[str] = "tiny"
    classes: ClassVar[tuple[str, ...]] = ("TinyPipeline",)
    lr: ClassVar[float] = 4e-3
    guidance: ClassVar[float] = 2.0

    @property
    def prediction(self) -> str:
        return "flow"

    @property
    def resolution(self) -> int:
        return int(self.pipeline.unet.config.sample_size)

    @property
    def step(self) -> int:
        return 4  # two halvings

    def encode_text(self, captions: Sequence[str]) -> Text:
        return {"states": self.pipeline.encode(captions)}

    def encode_pictures(self, pictures: Tensor) -> Latents:
        return Latents(pictures)

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
        unet = self.pipeline.unet
        found: Tensor = unet(noisy.to(unet.dtype), timesteps, text["states"], return_dict=False)[0]
        return found

    def call(self, asked: dict[str, Any], generators: list[torch.Generator], size: tuple[int, int]) -> Any:
        shape = (1, 3, size[1], size[0])
        return self.pipeline(**asked, latents=torch.cat([torch.randn(shape, generator=g) for g in generators]))
