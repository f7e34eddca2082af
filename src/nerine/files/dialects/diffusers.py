"""The diffusers dialect: `unet.<path>.lora_A.weight` and `lora_B.weight`, with PEFT's settings in the header.

diffusers (through PEFT) knows low-rank adapters, and DoRA over outputs around them. Any low-rank adapter is written as
the plain one that computes the same: a Tucker core is multiplied out, T-LoRA becomes a LoRA of twice the rank. The
scale is in `lora_B`, so that readers that do not look into the header compute the same.
Source: diffusers 0.42 `loaders/`; the attention-processor form is that of 0.14 to 0.20.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar

from nerine.files.checkpoint import Base, Record
from nerine.files.dialects.base import DENOISER, Dialect, Emitted, Shapes, is_unet
from nerine.files.dialects.low_rank import low_rank_config, low_rank_emitted, low_rank_refusal, scaled_by
from nerine.files.dialects.peft_config import PeftConfig
from nerine.files.pieces import Piece, Stem
from nerine.files.store import Source

__all__ = ["HEADER", "Diffusers"]

HEADER = "lora_adapter_metadata"


class Diffusers(Dialect):
    """diffusers' pipelines, and SimpleTuner and ai-toolkit through them."""

    name = "diffusers"
    about = "diffusers, SimpleTuner, ai-toolkit, ComfyUI"
    prefixes: ClassVar[Mapping[str, str]] = {
        "unet.": DENOISER,
        "transformer.": DENOISER,
        "prior.": DENOISER,
        "text_encoder.": "text_encoder",
        "text_encoder_2.": "text_encoder_2",
        "text_encoder_3.": "text_encoder_3",
    }
    flat = False
    naming = "diffusers"

    def telling(self, source: Source) -> bool:
        return HEADER in source.metadata

    def stem(self, text: str) -> Stem | None:
        found = super().stem(text)
        if found is None:
            return None
        name = found.name.replace(".processor.", ".").replace(".base_layer", "")
        return found._replace(name=_attention(name))

    def translate(self, stem: Stem, pieces: dict[str, Piece], source: Source) -> dict[str, Piece]:
        top = stem.text.split(".", 1)[0]
        text = source.metadata.get(HEADER, "{}")
        config = PeftConfig.of_component(text, top, str(source.path))
        return scaled_by(config, stem, pieces)

    def prefix_of(self, component: str, part: str, shapes: Shapes, several: bool) -> str:
        if f"{part}." in self.prefixes:
            return f"{part}."
        if component == DENOISER:
            return "unet." if is_unet(shapes) else "transformer."
        return super().prefix_of(component, part, shapes, several)

    def refuses(self, record: Record) -> str:
        return low_rank_refusal(record, "diffusers")

    def emit(self, record: Record, base: Base | None) -> Emitted:
        return low_rank_emitted(record)

    def beside(self, records: Mapping[str, Record]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        parts: dict[str, dict[str, Record]] = {}
        for stem, record in records.items():
            part, _, path = stem.partition(".")
            parts.setdefault(part, {})[path] = record
        if any(self.prefixes.get(f"{part}.") != DENOISER for part in parts):
            return {}, {}  # which layers a text encoder has differs by version of transformers; the tensors tell enough
        values = {
            f"{part}.{name}": value
            for part, own in sorted(parts.items())
            for name, value in low_rank_config(own).items()
        }
        return {}, {HEADER: json.dumps(values, sort_keys=True)}


def _attention(name: str) -> str:
    """The layer that an old attention processor adapts: "to_out" there is "to_out.0" of the module."""
    return f"{name}.0" if name.endswith(".to_out") else name
