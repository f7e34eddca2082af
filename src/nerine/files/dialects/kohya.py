"""The kohya dialect: the tensors of LyCORIS under the names of sd-scripts, `lora_unet_...` and `lora_te1_...`.

Layers of SDXL's UNet and of transformers bear the names of the original implementations, which is what sd-scripts
reads; those of SD 1 and 2 bear diffusers' names. Reading takes either for any model. sd-scripts' own OFT (`oft_unet_`)
clamps by alpha even where alpha is zero, which leaves nothing.
Source: sd-scripts `networks/*.py`, LyCORIS's kohya plug-in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from nerine.algorithms import Algorithm, DoRA
from nerine.files.checkpoint import Record
from nerine.files.dialects.base import DENOISER, Dialect, Shapes, rank_of
from nerine.files.pieces import ALPHA, Piece, Stem, is_zero
from nerine.files.store import Source
from nerine.files.training_metadata import kohya_metadata

__all__ = ["Kohya"]


class Kohya(Dialect):
    """sd-scripts and everything that reads its files."""

    name = "kohya"
    about = "sd-scripts, LyCORIS in sd-scripts, A1111, Forge, ComfyUI"
    prefixes: ClassVar[Mapping[str, str]] = {
        "lora_unet_": DENOISER,
        "oft_unet_": DENOISER,
        "lora_te_": "text_encoder",
        "lora_te1_": "text_encoder",
        "lora_te2_": "text_encoder_2",
        "lora_te3_": "text_encoder_3",
        "lora_prior_unet_": DENOISER,
        "lora_prior_te_": "text_encoder",
    }
    flat = True
    naming = "native"

    def prefix_of(self, component: str, part: str, shapes: Shapes, several: bool) -> str:
        if several and component == "text_encoder":
            return "lora_te1_"
        return super().prefix_of(component, part, shapes, several)

    def naming_for(self, family: str) -> str:
        return "diffusers" if family == "unet" else "native"

    def beside(self, records: Mapping[str, Record]) -> tuple[Mapping[str, Any], Mapping[str, str]]:
        found = {stem: _as_it_is(record) for stem, record in records.items() if record.params.scale > 0}
        return {}, kohya_metadata(found)

    def translate(self, stem: Stem, pieces: dict[str, Piece], source: Source) -> dict[str, Piece]:
        if not stem.text.startswith("oft_unet_") or "oft_blocks" not in pieces or ALPHA not in pieces:
            return pieces
        if is_zero(pieces[ALPHA]):  # a bound of zero, and not the absence of one
            pieces = {**pieces, "oft_blocks": pieces["oft_blocks"].changed(lambda t: t * 0)}
        return pieces


def _as_it_is(record: Record) -> Algorithm:
    """The algorithm with the rank and alpha that the tensors have, whatever its settings say."""
    algorithm, params = record.algorithm, record.params
    if isinstance(algorithm, DoRA):
        inner = _as_it_is(Record(algorithm.inner, record.site, params.without("magnitude")))
        return replace(algorithm, inner=inner)
    layout = algorithm.layout_of(params.tensors)
    fields = {field.name for field in dataclasses.fields(algorithm)}
    if layout.alpha != "scale" or not {"rank", "alpha"} <= fields:
        return algorithm
    rank = rank_of(params, layout, record.site)
    settings: Any = algorithm  # of a class that has these two
    found: Algorithm = replace(settings, rank=rank, alpha=params.scale * rank)
    return found
