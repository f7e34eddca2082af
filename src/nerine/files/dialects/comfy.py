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

from nerine.algorithms import BOFT, IA3, DiagOFT, DoRA, Full, GLoRA, LoHa, LoKr, LowRank, Norm, OFTv2
from nerine.errors import FormatError
from nerine.files.checkpoint import Base, Layer, Record
from nerine.files.dialects.base import DENOISER, Dialect, Emitted, Shapes, Splits, canonical
from nerine.files.names import family_of
from nerine.files.names.families.same import T5
from nerine.files.pieces import MAGNITUDE, Known, Stem
from nerine.files.rows import plain
from nerine.files.store import Source
from nerine.ops.precision import wide
from nerine.ops.tucker import tucker_in

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
        "text_encoders.umt5xxl.transformer.": "text_encoder",
        "text_encoders.": "text_encoder",
    }
    flat = False
    naming = "native"

    def prefix_of(self, component: str, part: str, shapes: Shapes, several: bool) -> str:
        known = family_of(shapes)
        if known is None or known[0] is not T5:  # of which there are kinds, and no numbers
            return super().prefix_of(component, part, shapes, several)
        biases = sum(path.endswith("SelfAttention.relative_attention_bias") for path in shapes)
        return f"text_encoders.{'umt5xxl' if biases > 1 else 't5xxl'}.transformer."  # UMT5 has one in every block

    def refuses(self, record: Record) -> str:
        return unread(record)

    def emit(self, record: Record, base: Base | None) -> Emitted:
        record = _without_core(_as_lora(record))
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


def unread(record: Record) -> str:
    """Why ComfyUI would not compute what an adapter does, in whatever spelling; empty where it does."""
    algorithm, site, tensors = record.algorithm, record.site, record.params.tensors
    inner = algorithm.inner if isinstance(algorithm, DoRA) else algorithm
    if isinstance(inner, IA3 | OFTv2) or not isinstance(inner, _KNOWN):
        return f"ComfyUI has no {type(inner).__name__}"
    if site.kind in ("embedding", "transposed") or site.flipped or site.experts:
        return f"ComfyUI takes the weight of this layer ({site.kind}) the other way round"
    if isinstance(algorithm, DoRA) and not isinstance(inner, LowRank | LoHa | LoKr | GLoRA):
        return f"ComfyUI has no DoRA around {type(inner).__name__}"
    if isinstance(inner, DiagOFT) and "rescale" in tensors:
        return "ComfyUI leaves out the rescale of Diag-OFT"
    needs_2d = isinstance(inner, LoKr) or not {"mid", "t1", "t2"}.isdisjoint(tensors)
    if needs_2d and len(site.kernel) in (1, 3):
        return "ComfyUI knows Tucker cores and Kronecker products on two-dimensional convolutions only"
    return ""


_KNOWN = (LowRank, LoHa, LoKr, GLoRA, DiagOFT, BOFT, Full, Norm)


def _as_lora(record: Record) -> Record:
    """A low-rank adapter of another name as the LoRA that it is."""
    inner = record.algorithm.inner if isinstance(record.algorithm, DoRA) else record.algorithm
    return (plain(record) or record) if "p" in record.params.tensors and isinstance(inner, LowRank) else record


def _without_core(record: Record) -> Record:
    """A LoKr with its Tucker core taken into one of the matrices beside it, which ComfyUI stumbles over otherwise."""
    tensors = record.params.tensors
    inner = record.algorithm.inner if isinstance(record.algorithm, DoRA) else record.algorithm
    if not isinstance(inner, LoKr) or "t2" not in tensors:
        return record
    w2_b = tucker_in(tensors["t2"], tensors["w2_b"]).flatten(1)
    return replace(record, params=record.params.without("t2").replaced(w2_a=tensors["w2_a"].mT.contiguous(), w2_b=w2_b))


class Bare(Dialect):
    """Dotted paths without any prefix, as some official releases have them."""

    name = "bare"
    about = "DiffSynth, Mochi, some official releases"
    prefixes: ClassVar[Mapping[str, str]] = {"": ""}
    flat = False

    def score(self, source: Source, splits: Splits, known: Known) -> float:
        return 0.4 * super().score(source, splits, known)  # any dotted name is one of these


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
