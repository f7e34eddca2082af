"""The OneTrainer dialect: diffusers' names with underscores, `lora_transformer_...`, and embeddings beside the layers.

Its OFT is PEFT's (a series of five terms on the inputs), the entries divided by 2·√(s - 1) where a mark says so.
Source: OneTrainer `modules/modelSaver/`, `modules/module/oft_utils.py`, `modules/util/load_lora_util.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from nerine.algorithms import DoRA, LoHa, LoKr, LoRA, OFTv2
from nerine.files.checkpoint import Record
from nerine.files.dialects.base import DENOISER, EMBEDDINGS, Dialect, Shapes, is_unet
from nerine.files.store import Source

__all__ = ["OneTrainer"]


class OneTrainer(Dialect):
    """OneTrainer's own names."""

    name = "onetrainer"
    about = "OneTrainer"
    prefixes: ClassVar[Mapping[str, str]] = {
        "lora_transformer_": DENOISER,
        "lora_unet_": DENOISER,
        "lora_prior_unet_": DENOISER,
        "lora_te_": "text_encoder",
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "lora_te3_": "text_encoder_3",
        "lora_prior_te_": "text_encoder",
    }
    flat = True
    naming = "diffusers"
    variant = True

    def telling(self, source: Source) -> bool:
        return any(
            key.startswith(("lora_transformer_", EMBEDDINGS)) or (key.startswith("lora_") and ".oft_R." in key)
            for key in source.keys
        )

    def prefix_of(self, component: str, part: str, shapes: Shapes, several: bool) -> str:
        if component == DENOISER:
            return "lora_unet_" if is_unet(shapes) else "lora_transformer_"
        return super().prefix_of(component, part, shapes, several)

    def refuses(self, record: Record) -> str:
        algorithm = record.algorithm
        inner = algorithm.inner if isinstance(algorithm, DoRA) else algorithm
        known = LoRA if isinstance(algorithm, DoRA) else LoRA | LoHa | LoKr | OFTv2
        if not isinstance(inner, known):
            return f"OneTrainer has no {algorithm}"
        if {"mid", "t1", "t2"} & set(record.params.tensors):
            return "OneTrainer has no Tucker cores"
        if isinstance(inner, OFTv2) and inner.terms != 5:
            return "OneTrainer turns by a series of five terms"
        return ""
