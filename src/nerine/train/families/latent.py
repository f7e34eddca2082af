"""What families have in common that work on the latents of a VAE."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from nerine.errors import UnsupportedBase
from nerine.train.batch import Latents
from nerine.train.families.base import Base

__all__ = ["LatentBase", "prediction_of"]

_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "flow_prediction": "flow"}


def prediction_of(scheduler: Any) -> str:
    """What a denoiser with this scheduler predicts: "epsilon", "v" or "flow".

    Raises:
        UnsupportedBase: something else.
    """
    if "FlowMatch" in type(scheduler).__name__:
        return "flow"
    kind = scheduler.config.get("prediction_type", "epsilon")
    if kind not in _PREDICTIONS:
        raise UnsupportedBase(
            f"{type(scheduler).__name__}: it wants the prediction of {kind!r}; {', '.join(_PREDICTIONS)} can be trained"
        )
    return _PREDICTIONS[kind]


class LatentBase(Base):
    """A denoiser of latents: sizes and encoding are those of the VAE."""

    @property
    def config(self) -> Any:
        """The denoiser's configuration."""
        return self.denoiser.config

    @property
    def prediction(self) -> str:
        return prediction_of(self.pipeline.scheduler)

    @property
    def resolution(self) -> int:
        size = self.config.sample_size
        return int(size if isinstance(size, int) else max(size)) * self.scale

    @property
    def scale(self) -> int:
        """Pixels to a latent, along a side."""
        return int(getattr(self.pipeline, "vae_scale_factor", 8))

    @property
    def step(self) -> int:
        config = self.config
        blocks = config.get("block_out_channels")
        halvings = 2 ** (len(blocks) - 1) if blocks else int(config.get("patch_size") or 1)
        return self.scale * halvings

    @property
    def grain(self) -> int:
        return self.scale * int(self.config.get("patch_size") or 1)  # UNets have no patches

    @torch.no_grad()
    def encode_pictures(self, pictures: Tensor) -> Latents:
        vae: Any = self.vae
        config, encoded = vae.config, vae.encode(pictures.to(vae.dtype))
        shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
        mean, std = config.get("latents_mean"), config.get("latents_std")
        shifts = pictures.new_tensor(mean).reshape(1, -1, 1, 1) if mean is not None else shift
        scales = scale / pictures.new_tensor(std).reshape(1, -1, 1, 1) if std is not None else scale
        found = getattr(encoded, "latent_dist", None)
        if found is None:  # an autoencoder without a distribution
            return Latents((encoded.latent.float() - shifts) * scales)
        return Latents((found.mean.float() - shifts) * scales, found.std.float() * scales)

    def call(self, asked: dict[str, Any], generators: list[torch.Generator], size: tuple[int, int]) -> Any:
        with _decoding_exactly(self.vae):
            return super().call(asked, generators, size)

    @property
    def format(self) -> torch.dtype:
        """The number format that the denoiser takes its inputs in."""
        found: torch.dtype = self.denoiser.dtype  # type: ignore[assignment]
        return found if found.itemsize > 1 else torch.float32


@contextmanager
def _decoding_exactly(vae: Any) -> Iterator[None]:
    """Latents are decoded in the number format of the VAE, whatever the denoiser's and whatever autocast says: that of
    SDXL overflows in fp16, and few pipelines convert."""
    decode = vae.decode

    def decode_in_its_own(latents: Tensor, *more: Any, **options: Any) -> Any:
        with torch.autocast(latents.device.type, enabled=False):
            return decode(latents.to(vae.dtype), *more, **options)

    vae.decode = decode_in_its_own
    try:
        yield
    finally:
        del vae.decode
