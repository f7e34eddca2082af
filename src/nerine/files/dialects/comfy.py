"""The ComfyUI dialect: `diffusion_model.<native path>.<suffix>`, with magnitudes as ComfyUI computes with them.

ComfyUI divides by the norm of the *original* row where a DoRA norm runs over outputs, W' = V·m/|W|. What is written is
therefore m·|W|/|V|, with which it computes W' = V·m/|V| exactly, at strength one. Likewise the bound of an orthogonal
adapter is applied before writing, because ComfyUI understands another bound.
Source: ComfyUI `comfy/lora.py`, `comfy/weight_adapter/`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from nerine.algorithms import BOFT, DiagOFT, DoRA
from nerine.errors import FormatError
from nerine.files.checkpoint import Base, Layer, Record
from nerine.files.dialects.base import DENOISER, Dialect, Emitted, canonical
from nerine.files.pieces import MAGNITUDE, Stem
from nerine.files.store import Source
from nerine.ops.precision import wide

__all__ = ["Bare", "Comfy"]


class Comfy(Dialect):
    """ComfyUI's own names."""

    name = "comfy"
    about = "ComfyUI, ai-toolkit, DiffSynth, official Wan and LTX files"
    prefixes: ClassVar[Mapping[str, str]] = {
        "diffusion_model.": DENOISER,
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.clip_g.transformer.": "text_encoder_2",
        "text_encoders.t5xxl.transformer.": "text_encoder_3",
        "text_encoders.": "text_encoder",
    }
    flat = False
    naming = "native"

    def emit(self, record: Record, base: Base | None) -> Emitted:
        algorithm = record.algorithm
        if isinstance(algorithm, DoRA) and algorithm.axis == "out":
            if base is None:
                raise FormatError(
                    "ComfyUI's form of a DoRA magnitude depends on the weight of the layer: give the base"
                )
            emitted = canonical(record)
            own, changed = _norms(record, base.weight())
            return {**emitted, MAGNITUDE: emitted[MAGNITUDE] * (own / changed).to(emitted[MAGNITUDE])}
        inner = algorithm.inner if isinstance(algorithm, DoRA) else algorithm
        if isinstance(inner, DiagOFT | BOFT):
            return canonical(_unbound(record))
        return canonical(record)

    def settle(self, layer: Layer, stem: Stem, source: Source) -> Layer:
        if isinstance(layer.algorithm, DoRA) and layer.algorithm.axis == "out":
            return replace(layer, finish=_decompensated)
        return layer


class Bare(Dialect):
    """Dotted paths without any prefix, as some official releases have them."""

    name = "bare"
    about = "DiffSynth, Mochi, some official releases"
    prefixes: ClassVar[Mapping[str, str]] = {"": ""}
    flat = False

    def score(self, source: Source, splits: Mapping[str, tuple[str, str] | None]) -> float:
        return 0.5 * super().score(source, splits)  # any dotted name is one of these


def _norms(record: Record, weight: Tensor) -> tuple[Tensor, Tensor]:
    """|W| and |V| of the rows, in the shape of the magnitude, with the floor that ComfyUI adds."""
    algorithm, params = record.algorithm, record.params
    assert isinstance(algorithm, DoRA)
    inner = params.without("magnitude")
    inner = inner.filled(wide(t) for t in inner.tensors.values())
    weight = wide(weight)
    own = weight.flatten(1).norm(dim=1) + torch.finfo(weight.dtype).eps
    changed = algorithm.inner.row_norm(inner, weight)
    shape = params.tensors["magnitude"].shape
    return own.reshape(shape), changed.reshape(shape)


def _decompensated(record: Record, weight: Tensor, bias: Tensor | None) -> Record:
    own, changed = _norms(record, weight)
    magnitude = wide(record.params.tensors["magnitude"])
    return replace(record, params=record.params.replaced(magnitude=magnitude * (changed / own).to(magnitude)))


def _unbound(record: Record) -> Record:
    """The same orthogonal adapter with its bound applied to the blocks and no bound left."""
    params = record.params
    bound = params.scale * record.site.shape[0]
    if not bound:
        return record
    blocks = wide(params.tensors["blocks"])
    size = (blocks - blocks.mT).norm() + 1e-8
    factor = torch.where(size > bound, bound / size, torch.ones_like(size))
    return replace(record, params=params.replaced(blocks=blocks * factor)._replace(scale=0.0))
