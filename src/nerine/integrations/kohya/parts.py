"""The parts of a pipeline as sd-scripts hands them over, and the prefixes that their layers have in its files.

Text encoders come alone or in a list, in which T5 is always the third (`lora_te3`), also where there is no second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

__all__ = ["Part", "is_t5", "parts_of", "view"]


class Part(NamedTuple):
    """A model of the pipeline: its name among the others, its prefix in files, and the number of a text encoder."""

    key: str
    prefix: str
    model: nn.Module
    number: int = 0  # 0 is the denoiser

    def lora_name(self, path: str) -> str:
        """What a layer is called in files."""
        return f"{self.prefix}_{path.replace('.', '_')}"


def is_t5(model: nn.Module) -> bool:
    """Whether a text encoder is a T5: its layers lie in `encoder.block`, and attention has relative positions."""
    return any(path.endswith("relative_attention_bias") for path, _ in model.named_modules())


def parts_of(text_encoder: Any, unet: nn.Module | None) -> list[Part]:
    """The text encoders that are there, in their order, then the denoiser."""
    given: Sequence[Any] = text_encoder if isinstance(text_encoder, list | tuple) else [text_encoder]
    found: list[Part] = []
    several = len(given) > 1
    for i, model in enumerate(given):
        if model is None:
            continue
        number = 3 if several and is_t5(model) else i + 1
        key = f"text_encoder_{number}" if several else "text_encoder"
        found.append(Part(key, f"lora_te{number}" if several else "lora_te", model, number))
    if unet is not None:
        found.append(Part("unet", "lora_unet", unet))
    return found


def view(parts: Sequence[Part]) -> nn.ModuleDict:
    """All of them as one model, whose layers are called "unet.down_blocks..."; nothing is moved or copied."""
    return nn.ModuleDict({part.key: part.model for part in parts})
