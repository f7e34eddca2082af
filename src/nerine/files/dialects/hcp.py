"""The HCP-Diffusion dialect: `lora:<path>.___.layer.W_down`, and an `alpha` that is alpha / rank already.

Other algorithms are LyCORIS's tensors as a plugin, `plugin:<path>.___.hada_w1_a`, with LyCORIS's alpha. UNet and text
encoders are in files of their own; SDXL's text encoders stand below `clip_B` and `clip_bigG`.
Source: HCP-Diffusion `hcpdiff/models/lora_base.py`, `hcpdiff/tools/lora_convert.py`; LyCORIS `batch_hcp_convert`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch

from nerine.algorithms import LowRank
from nerine.files.checkpoint import Base, Record
from nerine.files.dialects.base import Dialect, Emitted, Shapes, canonical
from nerine.files.pieces import ALPHA, Piece, Stem
from nerine.files.rows import plain
from nerine.files.store import Source

__all__ = ["Hcp"]

_BETWEEN = ".___"
_LAYER = {"layer.W_down": "lora_down.weight", "layer.W_up": "lora_up.weight"}
_LAYER |= {"layer.lora_down.weight": "lora_down.weight", "layer.lora_up.weight": "lora_up.weight"}


class Hcp(Dialect):
    """HCP-Diffusion."""

    name = "hcp"
    about = "HCP-Diffusion"
    prefixes: ClassVar[Mapping[str, str]] = {"": ""}
    flat = False
    naming = "diffusers"
    renamed = _LAYER

    def stem(self, text: str) -> Stem | None:
        if not text.endswith(_BETWEEN):
            return None
        name = text.removesuffix(_BETWEEN).removeprefix("lora:").removeprefix("plugin:")
        for top, component in (("clip_B.", "text_encoder"), ("clip_bigG.", "text_encoder_2")):
            if name.startswith(top):
                return Stem(text, component, name.removeprefix(top), False)
        return Stem(text, "", name, False)

    def translate(self, stem: Stem, pieces: dict[str, Piece], source: Source) -> dict[str, Piece]:
        if "lora_down.weight" in pieces and ALPHA in pieces and not stem.text.startswith("plugin:"):
            pieces = {**pieces, "scale": pieces[ALPHA]}
        return pieces

    def prefix_of(self, component: str, part: str, shapes: Shapes, several: bool) -> str:
        return {"text_encoder_2": "clip_bigG."}.get(component, "")

    def key(self, stem: str, suffix: str) -> str:
        kind = "lora" if suffix in ("layer.W_down", "layer.W_up", "scale") else "plugin"
        return f"{kind}:{stem}{_BETWEEN}.{'alpha' if suffix == 'scale' else suffix}"

    def emit(self, record: Record, base: Base | None) -> Emitted:
        found = plain(record) if isinstance(record.algorithm, LowRank) else None
        if found is None:
            return canonical(record)
        down, up = found.params.tensors["down"], found.params.tensors["up"]
        return {"layer.W_down": down, "layer.W_up": up, "scale": torch.ones(())}
