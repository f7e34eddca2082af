"""Pipelines of the common shape: `encode_prompt` gives states and perhaps a mask, and the transformer takes latents,
timestep and states. What else a transformer may want of the known ones stands in a table; others are refused, because
a convention that is guessed wrong trains something else in silence.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from nerine.errors import UnsupportedBase
from nerine.train.batch import Text
from nerine.train.families.latent import LatentBase
from nerine.train.schedules import TIMES

__all__ = ["AnyTransformer"]


@dataclass(frozen=True)
class Convention:
    """How a pipeline calls its transformer: `times` counts time up to that number, `towards_pictures` counts it from
    the noise on, so that what it says points the other way than the scheduler wants, `mask` is what it calls the mask
    of the states ("" for none)."""

    times: float = TIMES
    towards_pictures: bool = False
    mask: str = "encoder_attention_mask"


_KNOWN = {
    "PixArtAlphaPipeline": Convention(),
    "PixArtSigmaPipeline": Convention(),
    "SanaPipeline": Convention(),
    "AuraFlowPipeline": Convention(times=1.0, mask=""),
    "Lumina2Pipeline": Convention(times=1.0, towards_pictures=True),
}


class AnyTransformer(LatentBase):
    """PixArt-Alpha, PixArt-Sigma, Sana, AuraFlow, Lumina-Image 2.

    Raises:
        UnsupportedBase: the transformer wants an argument that is not known here.
    """

    family: ClassVar[str] = "transformer"
    classes: ClassVar[tuple[str, ...]] = tuple(_KNOWN)
    guidance: ClassVar[float] = 4.5

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self.convention = _KNOWN[type(pipeline).__name__]
        given = {"self", "hidden_states", "timestep", "encoder_hidden_states", "return_dict", self.convention.mask}
        for name, parameter in inspect.signature(self.denoiser.forward).parameters.items():
            if parameter.default is inspect.Parameter.empty and name not in given:
                raise UnsupportedBase(
                    f"{type(pipeline).__name__}: its transformer wants {name!r}, of which nothing is known"
                )

    def encode_text(self, captions: Sequence[str]) -> Text:
        device = next(iter(self.text_encoders.values())).device
        asked = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1, "device": device}
        found = self.pipeline.encode_prompt(list(captions), **asked, **self._manner())
        states, mask = found[0], found[1]
        return (
            {"states": states, "mask": mask}
            if isinstance(mask, Tensor) and self.convention.mask
            else {"states": states}
        )

    def _manner(self) -> dict[str, Any]:
        """How the pipeline's call has prompts encoded: their length, and what Sana puts in front of them."""
        known = inspect.signature(self.pipeline.encode_prompt).parameters
        called = inspect.signature(self.pipeline.__call__).parameters
        names = ("max_sequence_length", "complex_human_instruction")
        return {name: called[name].default for name in names if name in known and name in called}

    def predict(self, noisy: Tensor, timesteps: Tensor, text: Text, sizes: Tensor) -> Tensor:
        more: dict[str, Any] = {}
        if "mask" in text:
            more[self.convention.mask] = text["mask"]
        if "added_cond_kwargs" in inspect.signature(self.denoiser.forward).parameters:
            more["added_cond_kwargs"] = self._sizes(sizes)
        turned = self.convention.towards_pictures
        times = TIMES - timesteps if turned else timesteps
        found: Tensor = self.denoiser(
            noisy.to(self.format),
            encoder_hidden_states=text["states"],
            timestep=times * (self.convention.times / TIMES * (self.config.get("timestep_scale") or 1.0)),
            return_dict=False,
            **more,
        )[0]
        if found.shape[1] == 2 * noisy.shape[1]:  # the second half says how sure it is
            found = found.chunk(2, dim=1)[0]
        return -found if turned else found

    def _sizes(self, sizes: Tensor) -> dict[str, Tensor | None]:
        """What PixArt is told of sizes, where it was trained with them."""
        if not getattr(self.denoiser, "use_additional_conditions", False):  # the configuration may leave it open
            return {"resolution": None, "aspect_ratio": None}
        shown = sizes[:, 4:6].to(self.format)
        return {"resolution": shown, "aspect_ratio": torch.stack([shown[:, 0] / shown[:, 1]], 1)}
